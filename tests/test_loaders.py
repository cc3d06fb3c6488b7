"""Samplers, streams and ready loaders of PyTorch; weights, balance and partial epochs: the same with any number of workers and after a resume."""
import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler, Sampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler
from torch.utils.data import DataLoader as TorchLoader

from lamella.data.balance import balanced_order
from lamella.data.loader import DataLoader
from lamella.data.order import Shuffled, Weighted
from lamella.vision.all import (CategoryBlock, DataBlock, DataError, DataLoaders, Datasets, ImageBlock, IndexSplitter, Learner, RandomResizedCrop, RandomSplitter, TensorImage,
    Transform, TransformBlock, aug_transforms, get_image_files, parent_label)


class Numbers:
    def __len__(self): return 24
    def __getitem__(self, i): return torch.tensor(float(i))


class Forever(Sampler):
    "Draws from all generators, and never ends"
    def __init__(self, size=24): self.size, self.rng = size, np.random.default_rng()
    def __iter__(self):
        while True: yield (random.randrange(self.size) + np.random.randint(99) + int(torch.randint(99, ())) + int(self.rng.integers(99))) % self.size


class Stream(IterableDataset):
    def __init__(self, n=10): self.n = n
    def __iter__(self): return (torch.tensor([i + random.random() + np.random.rand()]) for i in range(self.n))


SAMPLERS = {
    'random': lambda: dict(sampler=RandomSampler(range(24))),
    'own generator': lambda: dict(sampler=RandomSampler(range(24), generator=torch.Generator().manual_seed(3))),
    'subset': lambda: dict(sampler=SubsetRandomSampler(range(5, 15))),
    'weighted': lambda: dict(sampler=WeightedRandomSampler([1.] * 12 + [5.] * 12, 24)),
    'infinite': lambda: dict(sampler=Forever(), n=20),
    'batches': lambda: dict(batch_sampler=BatchSampler(RandomSampler(range(24)), 5, drop_last=False)),
    'infinite batches': lambda: dict(batch_sampler=[[1, 2], [3], [4, 5, 6]]),
    'list': lambda: dict(sampler=[3, 1, 2]),
    'weights': lambda: dict(weights=np.arange(24)),
    'part': lambda: dict(shuffle=True, n=7),
}


def add_noise(x): return x + random.random()


def loader(name, workers=0, **kwargs): return DataLoader(Numbers(), bs=4, num_workers=workers, seed=5, after_item=add_noise, **SAMPLERS[name](), **kwargs)


@pytest.mark.parametrize('name', SAMPLERS)
def test_any_sampler_with_any_number_of_workers(name):
    first, second = [[list(dl) for _ in range(2)] for dl in (loader(name), loader(name, 2))]
    for a, b in zip(first, second): assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))
    assert not all(torch.equal(x, y) for x, y in zip(*first)) # another epoch, another randomness
    assert len(loader(name)) == len(first[0])


@pytest.mark.parametrize('name', SAMPLERS)
def test_a_resume_in_the_middle_gives_the_rest(name):
    dl = loader(name)
    list(dl)
    state, whole = dl.state_dict(), list(dl)
    again = loader(name)
    again.one_batch()
    again.load_state_dict({**state, 'first_batch': 2})
    rest = list(again)
    assert len(rest) == max(0, len(whole) - 2) and all(torch.equal(a, b) for a, b in zip(rest, whole[2:]))


def test_looking_at_a_batch_changes_no_sampler():
    a, b = loader('own generator'), loader('own generator')
    a.one_batch()
    assert torch.equal(torch.cat(list(a)), torch.cat(list(b)))


def test_a_sampler_without_an_end_needs_n():
    with pytest.raises(ValueError, match='n=...'): DataLoader(Numbers(), sampler=Forever())


def test_a_sample_that_comes_twice_is_augmented_in_two_ways():
    dl = DataLoader(Numbers(), bs=6, sampler=[1, 1, 1, 2, 2, 2], num_workers=0, seed=1, after_item=add_noise)
    assert len(set(next(iter(dl)).tolist())) == 6


# ---- streams

def test_streams():
    dl = DataLoader(Stream(), bs=4, seed=1, after_item=add_noise, n=8)
    epochs = [list(dl) for _ in range(2)]
    assert [len(o) for o in epochs[0]] == [4, 4] and len(dl) == 2 and not torch.equal(epochs[0][0], epochs[1][0])
    again = DataLoader(Stream(), bs=4, seed=1, after_item=add_noise)
    found = list(again)
    assert [len(o) for o in found] == [4, 4, 2] and torch.equal(found[1], epochs[0][1])
    again.load_state_dict({**again.state_dict(), 'epoch': 0, 'first_batch': 1})
    assert torch.equal(next(iter(again)), found[1])
    with pytest.raises(TypeError, match='n=...'): len(again)
    with pytest.raises(ValueError, match='its order is its own'): DataLoader(Stream(), shuffle=True)
    with pytest.raises(ValueError, match="Use 'skip'"): DataLoader(Stream(), on_error='replace')


def test_a_stream_leaves_out_what_cannot_be_transformed():
    def odd(x):
        if x % 3 == 0: raise OSError('truncated')
        return x
    dl = DataLoader(map(float, range(20)), bs=5, after_item=odd, on_error='skip', num_workers=0)
    with pytest.warns(UserWarning, match='7 of 20 samples'): assert [len(o) for o in dl] == [3, 3, 4, 3]


# ---- a learner on ready loaders

XS = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
YS = XS.sum(1, keepdim=True)


class Pairs(IterableDataset):
    def __iter__(self): return zip(XS, YS)


class Dicts(nn.Module):
    def __init__(self): super().__init__(); self.lin = nn.Linear(3, 1)
    def forward(self, x): return self.lin(x['a'])


def dict_collate(samples): return {'a': torch.stack([x for x, y in samples])}, torch.stack([y for x, y in samples])


READY = {
    'torch': lambda: TorchLoader(TensorDataset(XS, YS), batch_size=8, shuffle=True),
    'torch workers': lambda: TorchLoader(TensorDataset(XS, YS), batch_size=8, num_workers=1),
    'batch_sampler': lambda: TorchLoader(TensorDataset(XS, YS), batch_sampler=BatchSampler(RandomSampler(range(40)), 8, True)),
    'stream': lambda: TorchLoader(Pairs(), batch_size=8),
    'own stream': lambda: DataLoader(Pairs(), bs=8),
    'infinite': lambda: DataLoader(TensorDataset(XS, YS), bs=8, sampler=Forever(40), n=40, num_workers=0),
    'dicts': lambda: TorchLoader(TensorDataset(XS, YS), batch_size=8, collate_fn=dict_collate),
    'own dicts': lambda: DataLoader(TensorDataset(XS, YS), bs=8, collate_fn=dict_collate, num_workers=0),
    'lists': lambda: TorchLoader(TensorDataset(XS, YS), batch_size=8, collate_fn=lambda b: [torch.stack(o) for o in zip(*b)]),
    'a list of batches': lambda: list(zip(XS.split(8), YS.split(8))),
}


@pytest.mark.parametrize('name', READY)
def test_a_learner_trains_on_ready_loaders(name):
    dls = DataLoaders(READY[name](), READY[name](), device='cpu')
    model = Dicts() if 'dicts' in name else nn.Linear(3, 1)
    learn = Learner(dls, model, loss_func=nn.MSELoss(), lr=.1)
    before = learn.validate()[0]
    with learn.no_bar(): learn.fit_one_cycle(3, .1)
    assert learn.pct_train == 1. and learn.validate()[0] < before
    with learn.no_bar(): assert len(learn.get_preds()[0]) == 40


def test_batches_of_any_nesting_go_to_the_device():
    dls = DataLoaders(READY['dicts'](), device='meta')
    assert dls.one_batch()[0]['a'].device.type == 'meta' and isinstance(dls.one_batch()[0], dict)


# ---- arguments

def test_names_of_pytorch_and_fastai():
    called = []
    dl = DataLoader(Numbers(), batch_size=6, generator=torch.Generator().manual_seed(4), shuffle=True, num_workers=0, wif=called.append, timeout=3, collate_fn=len, indexed=True)
    same = DataLoader(Numbers(), bs=6, generator=torch.Generator().manual_seed(4), shuffle=True, num_workers=0)
    assert list(dl) == [6] * 4 and dl.plans(0) == same.plans(0) and dl.new().workers.timeout == 3
    for name, instead in (('create_batch', 'collate_fn'), ('do_batch', 'before_batch'), ('get_idxs', 'sampler'), ('before_iter', 'Callback')):
        with pytest.raises(TypeError, match=instead): DataLoader(Numbers(), **{name: len})
    with pytest.raises(ValueError, match='sampler and weights'): DataLoader(Numbers(), sampler=[1], weights=[1] * 24)
    with pytest.raises(ValueError, match='3 weights for 24'): DataLoader(Numbers(), weights=[1] * 3)


# ---- weights, balance, parts of an epoch

@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=40).filter(lambda o: sum(o) > 1e-3), st.integers(1, 200), st.integers(0, 5))
def test_no_sample_is_more_than_one_draw_off(weights, n, epoch):
    drawn = Counter(Weighted(weights, n).draw(3, epoch))
    expected = np.array(weights) / sum(weights) * n
    assert sum(drawn.values()) == n
    assert all(abs(drawn[i] - e) < 1 + 1e-6 * n for i, e in enumerate(expected))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 100), st.integers(1, 12))
def test_partial_epochs_see_all_samples_equally_often(size, n, epochs):
    drawn = Counter(i for epoch in range(epochs) for i in Shuffled(size, n).draw(1, epoch))
    counts = [drawn[i] for i in range(size)]
    assert sum(counts) == n * epochs and max(counts) - min(counts) <= 1


def test_independence_of_weighted_draws():
    "Over many epochs each pair of samples comes together as often as its weights say: no pair is stuck together by the line they lie on"
    together = np.zeros((4, 4))
    for epoch in range(3000):
        drawn = Weighted([1., 1., 1., 1.], n=2).draw(7, epoch)
        together[min(drawn), max(drawn)] += 1
    pairs = together[np.triu_indices(4, 1)]
    assert together.trace() == 0 and (((pairs - 500) ** 2) / 500).sum() < 20.5 # chi-square with 5 degrees of freedom, p = 0.001


LABELS = ['cat'] * 60 + ['dog'] * 30 + ['owl'] * 10


def animals(**kwargs):
    block = DataBlock(blocks=(TransformBlock(type_tfms=lambda o: torch.tensor(float(o))), CategoryBlock), get_items=lambda n: list(range(n)), get_y=lambda i: LABELS[i % 100],
        splitter=lambda items: (list(range(100)), list(range(100, 120))))
    return block.dataloaders(120, **{'bs': 10, 'num_workers': 0, 'device': 'cpu', 'seed': 1, **kwargs})


def counts(dls): return Counter(dls.vocab[y] for x, ys in dls.train for y in ys.tolist())


def test_balance():
    assert sorted(counts(animals(balance=True)).values()) == [33, 33, 34] and counts(animals()) == Counter(LABELS)
    assert counts(animals(balance='classes', n=900)) == {'cat': 300, 'dog': 300, 'owl': 300}
    assert counts(animals(balance={'owl': .4}, n=1000)) == {'cat': 400, 'dog': 200, 'owl': 400}
    firsts = animals(balance=lambda i: i < 10).train
    assert sum(int(x < 10) for xs, ys in firsts for x in xs) == 50
    assert counts(animals(balance=True)) != Counter(LABELS) and len(animals(balance=True).valid) == 2
    assert Counter(animals(balance=True).valid.plans(0)[0].indices) == Counter(range(10))
    with pytest.raises(ValueError, match="Did you mean 'owl'"): animals(balance={'owls': .4})


def test_balance_by_a_column():
    import pandas as pd
    table = pd.DataFrame({'x': range(20), 'y': ['a', 'b'] * 10, 'site': ['north'] * 16 + ['south'] * 4})
    dsets = Datasets(table, [[lambda row: row['x']], [lambda row: row['y']]], splits=[range(20), []])
    dls = dsets.dataloaders(balance='site', n=40, bs=10, num_workers=0, device='cpu', seed=1)
    assert sum(int(x >= 16) for xs, ys in dls.train for x in xs) == 20
    with pytest.raises(ValueError, match="Did you mean 'site'"): dsets.dataloaders(balance='sit', num_workers=0)


def test_balance_of_several_labels():
    "An item of a rare and a frequent class is drawn as often as the mean of both"
    class Vocab: vocab = ['a', 'b']
    class Field: fs = [Transform(lambda x: x), Vocab()]
    class Sets: source, splits, n_inp, fields = [['a']] * 8 + [['a', 'b']] * 2 + [[]] * 2, [range(12)], 0, [Field()]
    order = balanced_order(Sets(), True)
    third = 1 / 3
    assert np.allclose(order.weights[:8], third / 10) and np.allclose(order.weights[8:10], (third / 10 + third / 2) / 2) and np.allclose(order.weights[10:], third / 2)


@pytest.mark.parametrize('kwargs', [dict(balance=True), dict(n=37), dict(balance=True, n=37), dict(weights=list(range(100)))], ids=str)
def test_drawn_epochs_with_workers_and_after_a_resume(kwargs):
    here, there = animals(**kwargs).train, animals(num_workers=2, **kwargs).train
    for _ in range(2): assert all(torch.equal(a[0], b[0]) for a, b in zip(here, there, strict=True))
    state, whole = here.state_dict(), [x for x, y in here]
    again = animals(**kwargs).train
    again.load_state_dict({**state, 'first_batch': 1})
    assert all(torch.equal(a, b) for a, b in zip([x for x, y in again], whole[1:], strict=True))


def test_predictions_of_a_balanced_training_set_are_in_order():
    dls = animals(balance=True)
    learn = Learner(dls, nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 3)), loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(): preds, targets = learn.get_preds(0)
    assert [dls.vocab[i] for i in targets.tolist()] == LABELS


def test_names_of_fastai():
    block = DataBlock(blocks=(TransformBlock(type_tfms=float), CategoryBlock), get_items=range, get_y=lambda i: LABELS[i], splitter=IndexSplitter(range(30, 40)))
    kwargs = dict(num_workers=0, device='cpu', seed=1)
    weighted = block.weighted_dataloaders(100, [float(i < 3) + (i == 70) for i in range(100)], 30, **kwargs)
    assert set(torch.cat([x for x, y in weighted.train]).tolist()) == {0, 1, 2, 70}
    assert len(block.partial_dataloaders(100, 20, bs=10, **kwargs).train) == 2
    with pytest.raises(TypeError, match="Did you mean 'balance'"): block.dataloaders(100, balanced=True)
    with pytest.raises(TypeError, match="Did you mean 'batch_tfms'"): block.dataloaders(100, batch_tfm=[])


def test_weights_of_fastai_draw_the_same_shares():
    "fastai draws independently, we do not: the means are the same, the spread is smaller"
    weights = np.random.default_rng(0).random(50)
    ours = np.mean([np.bincount(Weighted(weights).draw(1, e), minlength=50) for e in range(400)], 0)
    expected = weights / weights.sum() * 50
    assert np.abs(ours - expected).max() < .15


# ---- explain

class Centred(Transform):
    "A user's transform of a batch, which forgets to say that it comes after IntToFloatTensor"
    def encodes(self, x: TensorImage): return x - torch.mean(x)


def photo_loaders(photos, **kwargs):
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(seed=1), item_tfms=RandomResizedCrop(32),
        batch_tfms=aug_transforms(), **kwargs)
    return block.dataloaders(photos, bs=4, num_workers=0, device='cpu')


def test_explain_tells_what_handled_each_field(photos, capsys):
    dls = photo_loaders(photos)
    state = torch.get_rng_state(), dls.train.state_dict()
    found = dls.explain()
    assert torch.equal(torch.get_rng_state(), state[0]) and dls.train.state_dict() == state[1]
    assert repr(found) in capsys.readouterr().out and 'RandomResizedCrop' in found._repr_html_()
    rows = {(o.stage, o.transform, o.field): o for o in found}
    assert rows['item', 'ToTensor', '0'].after == 'TensorImage (3, 32, 32) uint8' and rows['item', 'ToTensor', '1'].handled_by == 'passes through'
    assert rows['type', 'parent_label', '1'].after in ("'cat'", "'dog'") and 'random' in rows['item', 'RandomResizedCrop', '0'].when
    batch = [o for o in found if o.stage == 'batch' and o.field == '0']
    assert {o.fused for o in batch} == {'pass 1'} and batch[-1].after.endswith('float32') and not found.hints
    assert len(found.table()) == len(found)


def test_a_batch_transform_that_comes_too_early_is_hinted_at(photos):
    dls = photo_loaders(photos)
    dls.train.after_batch.add(Centred())
    with pytest.raises(DataError, match=r'(?s)Centred.*before IntToFloatTensor.*order=11'): dls.one_batch()
    class Silent(Transform):
        def encodes(self, x: TensorImage): return x
    dls = photo_loaders(photos)
    dls.add_tfms(Silent())
    assert 'Silent is given whole numbers' in dls.explain(show=False).hints[0]
