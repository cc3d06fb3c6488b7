"""What went wrong in loaders once: positions in the middle of an epoch, seeds, lengths, loops within loops, changes between epochs, large datasets."""
import copy
import os
import pickle
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader as TorchLoader, IterableDataset

from lamella.base.seeds import set_seed
from lamella.data.balance import balanced_order
from lamella.data.loader import DataLoader
from lamella.data.order import Shuffled, Weighted
from lamella.data.pipeline import DataError
from lamella.data.plans import Plans
from lamella.data.transform import Transform
from lamella.vision.all import DataLoaders, IndexSplitter, Learner


class Numbers:
    def __init__(self, n=24): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        return torch.tensor(float(i))


class NumbersWithBad(Numbers):
    def __getitem__(self, i):
        if i in (3, 7): raise OSError(f'{i} cannot be read')
        return torch.tensor(float(i))


def add_noise(x): return x + random.random()


def values(batches): return [x.tolist() for x in batches]


# Positions

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('given', [dict(shuffle=True), dict(shuffle=True, n=17), dict(weights=np.arange(24)), dict(sampler=[5, 4, 3, 3, 2, 1, 0, 9, 9]), dict(on_error='skip', shuffle=True),
                                   dict(on_error='replace', shuffle=True), dict(split_idx=1)], ids=str)
@pytest.mark.filterwarnings('ignore:.*could not be read')
def test_a_state_from_within_an_epoch_gives_exactly_the_rest(given, workers):
    make = lambda: DataLoader((NumbersWithBad if 'on_error' in given else Numbers)(), bs=4, num_workers=workers, seed=5, after_item=add_noise, **given)
    dl, again = make(), make()
    list(dl)
    seen, states = [], []
    for x in dl:
        seen.append(x.tolist())
        states.append(dl.state_dict())
    following = values(dl)
    assert dl.state_dict()['first_batch'] == 0
    for done, state in enumerate(states, 1):
        again.load_state_dict(pickle.loads(pickle.dumps(state)))
        assert values(again) == seen[done:] and values(again) == following


def test_an_epoch_that_was_given_up_is_not_gone_on_with():
    dl = DataLoader(Numbers(), bs=4, shuffle=True, num_workers=0, seed=5)
    next(iter(dl))
    assert dl.state_dict()['first_batch'] == 0 and dl.state_dict()['epoch'] == 1
    outer = iter(dl)
    next(outer)
    list(dl)
    assert (dl.state_dict()['epoch'], dl.state_dict()['first_batch']) == (1, 1)


def test_a_loaded_state_holds_however_often_a_seed_was_set():
    set_seed(3)
    dl = DataLoader(Numbers(), bs=4, shuffle=True, num_workers=0)
    list(dl)
    state, expected = dl.state_dict(), values(dl)
    set_seed(1)
    set_seed(2)
    other = DataLoader(Numbers(), bs=4, shuffle=True, num_workers=0)
    set_seed(8)
    other.load_state_dict(state)
    assert values(other) == expected
    set_seed(3)
    assert other.state_dict()['epoch'] == 0, 'a seed that is set later begins anew'


# Lengths and orders

def test_the_length_of_a_balanced_or_weighted_loader():
    order = Weighted([1., 1., 0.] * 8, groups=[0, 1, 2] * 8)
    dl = DataLoader(Numbers(), bs=4, sampler=order, n=10, num_workers=0)
    assert len(torch.cat(list(dl))) == 10 and dl.n == 10 and order.n == 24
    assert set(torch.cat(list(dl.new(weights=[0.] * 23 + [1.]))).tolist()) == {23.}
    weighted = dl.new(weights=np.ones(24))
    assert torch.cat(list(weighted.new(sampler=[1, 2]))).tolist() == [1., 2.]
    assert sum(map(len, weighted)) == 10 and sum(map(len, weighted.new(n=None))) == 24


def test_the_length_stays_when_the_order_changes():
    dl = DataLoader(Numbers(), bs=4, n=6, num_workers=0)
    assert not dl.shuffle and dl.new(shuffle=True).n == 6 and dl.new(shuffle=True).shuffle
    assert torch.cat(list(dl.new(shuffle=True).new(shuffle=False))).tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.cat(list(dl.new(weights=np.ones(24)).new(shuffle=False))).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_sampler_that_ends_early_makes_short_epochs():
    dl = DataLoader(Numbers(), bs=4, sampler=list(range(10)), n=100, num_workers=0)
    assert len(dl) == len(list(dl)) == 3 and dl.n == 10


@pytest.mark.parametrize('size,n', [(10, 7), (10, 4), (5, 12)])
def test_a_sample_twice_in_an_epoch_is_augmented_in_two_ways(size, n):
    dl = DataLoader(Numbers(size), bs=3, shuffle=True, n=n, num_workers=0, seed=1, after_item=add_noise)
    epochs = [torch.cat(list(dl)).tolist() for _ in range(10)]
    assert any(len({int(x) for x in epoch}) < n for epoch in epochs) and all(len(set(epoch)) == n for epoch in epochs)


# Plans of large datasets

class Counted(Weighted):
    "Counts the plans that are made"
    def batches(self, *args): return CountedBatches(super().batches(*args))


class CountedBatches(list):
    def __init__(self, cuts): self.cuts, self.made = cuts, 0
    def __len__(self): return len(self.cuts)
    def __getitem__(self, k):
        self.made += 1
        return self.cuts[k]


def test_plans_are_made_when_their_turn_comes():
    plans = Plans(Counted(np.ones(1000)), 1, 0, bs=1, drop_last=False)
    plans[0], plans[1:][0:5]
    assert plans.batches.made <= 3


@pytest.mark.parametrize('order', [Shuffled(50, 20), Shuffled(50, 120), Weighted(np.arange(50), 90)], ids=lambda o: type(o).__name__)
def test_counts_and_spares_of_plans(order):
    plans, seen = Plans(order, 3, 1, bs=8, drop_last=False, spares=True), Counter()
    everything = {i for plan in plans for i in plan.indices}
    for plan in plans:
        for i, count in zip(plan.indices, plan.repeats or [0] * 8):
            assert seen[i] == count and type(i) is int
            seen[i] += 1
        assert set(plan.spares) <= everything and len(plan.spares) == 16


# Processes that are kept

class Scaled(Transform):
    def __init__(self, size=1): self.size = size
    def encodes(self, x: torch.Tensor): return x * self.size


class Sizes(Numbers):
    "Counts how often it is pickled; a part of it is large"
    pickled = 0
    def __init__(self): self.n, self.size, self.data = 24, 1, list(range(5000))
    def __getitem__(self, i): return torch.tensor(float(i * self.size))


class Large(list):
    pickled = 0
    def __reduce__(self):
        Large.pickled += 1
        return Large, (), None, iter(self)


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_kept_processes_hear_of_changes(method):
    f, data = Scaled(), Sizes()
    dl = DataLoader(data, bs=12, num_workers=2, persistent_workers=True, multiprocessing_context=method, after_item=f)
    assert torch.cat(list(dl)).sum() == 276
    processes = dl.workers._torch_loader
    list(dl)
    assert dl.workers._torch_loader is processes, 'nothing has changed'
    f.size = 5
    assert torch.cat(list(dl)).sum() == 276 * 5
    data.size = 2
    assert torch.cat(list(dl)).sum() == 276 * 10


def test_large_data_is_not_pickled_for_each_epoch():
    data = Sizes()
    data.data, Large.pickled = Large(range(5000)), 0
    dl = DataLoader(data, bs=12, num_workers=1, multiprocessing_context='spawn')
    list(dl)
    before = Large.pickled
    for _ in range(3): list(dl)
    assert before and Large.pickled == before


@pytest.mark.parametrize('kept', [True, False])
def test_a_loop_within_a_loop(kept):
    make = lambda workers: DataLoader(Numbers(), bs=4, shuffle=True, seed=1, num_workers=workers, persistent_workers=kept if workers else None, after_item=add_noise)
    def twice(dl):
        for k, x in enumerate(dl):
            yield x.tolist()
            if k == 1: yield from values(dl)
    here, there = make(0), make(2)
    assert list(twice(here)) == list(twice(there))
    assert values(here) == values(there)
    next(iter(here)), next(iter(there))
    assert values(here) == values(there), 'after a loop that was left'


def test_a_loader_with_kept_processes_can_be_copied():
    dl = DataLoader(Numbers(), bs=4, shuffle=True, seed=1, num_workers=2, persistent_workers=True)
    open_loop = iter(dl)
    next(open_loop)
    for again in (pickle.loads(pickle.dumps(dl)), copy.deepcopy(dl)): assert sum(map(len, again)) == 24


class Leaves(Numbers):
    def __getitem__(self, i): return torch.zeros(100_000) if i < 8 else os._exit(3)


@pytest.mark.parametrize('error', [FileNotFoundError, EOFError, ConnectionResetError])
def test_a_process_that_ended_by_itself(error, monkeypatch):
    dl = DataLoader(Numbers(), bs=4, num_workers=1)
    class Broken:
        _workers = [SimpleNamespace(exitcode=3, sentinel=os.open(os.devnull, os.O_RDONLY))]
        def __iter__(self): return self
        def __next__(self): raise error('rebuild_storage_fd')
    monkeypatch.setattr('multiprocessing.connection.wait', lambda *args, **kwargs: [])
    with pytest.raises(DataError, match='a worker process that reads batches died'): list(dl.workers._watched(Broken()))
    Broken._workers = []
    with pytest.raises(error): list(dl.workers._watched(Broken()))


def test_a_process_that_leaves():
    with pytest.raises(DataError, match='died'): list(DataLoader(Leaves(), bs=4, num_workers=1))


# Generators of a module, and where they are used

RNG, RNG_OF_HELPER = np.random.default_rng(0), random.Random(0)
def helper(x): return further(x)
def further(x): return x + RNG_OF_HELPER.random()


class Drawing(Numbers):
    def __getitem__(self, i): return torch.tensor(i + RNG.random())


class Callable_:
    def __call__(self, x): return x + sum([RNG.random() for _ in range(2)])


class InEncodes(Transform):
    def encodes(self, x: torch.Tensor): return x + RNG.random()


def with_helper(x): return helper(x)


@pytest.mark.parametrize('make', [lambda: dict(dataset=Drawing()), lambda: dict(dataset=Numbers(), after_item=Callable_()), lambda: dict(dataset=Numbers(), after_item=InEncodes()),
                                  lambda: dict(dataset=Numbers(), after_item=with_helper)], ids=['dataset', 'call', 'encodes', 'helper'])
def test_generators_of_a_module_are_seeded(make):
    here, there = (DataLoader(**make(), bs=4, seed=1, num_workers=workers) for workers in (0, 2))
    first, second = values(here), values(here)
    assert first != second and values(there) == first and values(there) == second


def test_generators_of_batch_transforms_are_looked_for_once_an_epoch(monkeypatch):
    import lamella.data.loader as module
    calls, find = [], module.find_generators
    monkeypatch.setattr(module, 'find_generators', lambda *args: calls.append(1) or find(*args))
    dl = DataLoader(Numbers(), bs=4, num_workers=0, after_batch=add_noise)
    list(dl), list(dl)
    assert len(calls) == 2


# Messages

class Stream(IterableDataset):
    def __iter__(self): return (torch.tensor([float(i)]) for i in range(10))


def test_a_stream_is_neither_explained_nor_shown_many_times():
    dl = DataLoader(Stream(), bs=4)
    with pytest.raises(TypeError, match='can only be iterated'): DataLoaders(dl, dl).explain()
    with pytest.raises(TypeError, match='can only be iterated'): dl.show_batch(unique=True)


@pytest.mark.parametrize('ask', [lambda o: o.explain(), lambda o: o.show_batch(), lambda o: o.new(bs=2), lambda o: o.decode_batch(()), lambda o: o.setup_tfms(), lambda o: o.add_tfms(add_noise)])
def test_loaders_of_torch_know_no_transforms(ask):
    dls = DataLoaders(TorchLoader(Numbers()), TorchLoader(Numbers()))
    with pytest.raises(TypeError, match='needs a loader of lamella'): ask(dls)


class Ragged(Numbers):
    "Each time another number of boxes"
    def __getitem__(self, i): return torch.zeros(random.randint(1, 5), 4) + random.random()


def pad(samples): return [torch.cat([o, torch.zeros(5 - len(o), 4)]) for o in samples]


def test_one_sample_many_times_is_padded_together():
    dl = DataLoader(Ragged(), bs=4, num_workers=0, seed=1, before_batch=pad)
    batch = dl._unique_batch(6)
    assert batch.shape == (6, 5, 4) and len(batch[:, 0, 0].unique()) == 6


@pytest.mark.parametrize('wrong', [[-1], [1.7], np.array([0, -3]), torch.tensor([2.5])], ids=str)
def test_indices_are_whole_numbers_from_0_on(wrong):
    with pytest.raises(ValueError, match='an index'): IndexSplitter(wrong)(range(5))
    assert list(IndexSplitter([1., 3])(range(5))[1]) == [1, 3] and list(IndexSplitter([])(range(2))[0]) == [0, 1]


def test_balance_over_what_has_no_classes():
    sets = SimpleNamespace(n_inp=1, fields=[None, SimpleNamespace(fs=[SimpleNamespace(vocab=[1])])], source=[[[1]], [[2]]], splits=[[0, 1]])
    with pytest.raises(ValueError, match='needs targets with classes'): balanced_order(sets, True)


@pytest.mark.filterwarnings('ignore:.*could not be read')
def test_in_validation_replacing_is_leaving_out():
    valid = DataLoader(NumbersWithBad(), bs=4, num_workers=0, split_idx=1, on_error='replace')
    assert len(torch.cat(list(valid))) == 22


def test_predictions_are_of_all_items():
    class Pairs(Numbers):
        def __getitem__(self, i): return torch.tensor([float(i)]), torch.tensor([float(i)])
    class BadPairs(Pairs):
        def __getitem__(self, i): return super().__getitem__(i) if i != 5 else open("missing")
    dls = DataLoaders(DataLoader(Pairs(), bs=4, shuffle=True, n=6, num_workers=0), DataLoader(Pairs(), bs=4, n=6, num_workers=0, split_idx=1), device='cpu')
    learn = Learner(dls, torch.nn.Linear(1, 1), loss_func=torch.nn.MSELoss())
    assert len(torch.cat([x for x, _ in dls.valid])) == 6
    for k in (0, 1): assert learn.get_preds(ds_idx=k)[1].flatten().tolist() == list(range(24))
    with pytest.raises(DataError, match='verify_images'): learn.get_preds(dl=DataLoader(BadPairs(), bs=4, num_workers=0, on_error='skip'))
