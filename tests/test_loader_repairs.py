"""What went wrong in loaders once: positions in the middle of an epoch, seeds, lengths, loops within loops, changes between epochs, large datasets."""
import copy
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch

from lamella.base.seeds import set_seed
from lamella.data.loader import DataLoader
from lamella.data.order import Shuffled, Weighted
from lamella.data.plans import Plans


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
