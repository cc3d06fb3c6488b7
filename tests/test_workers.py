"""Worker processes that are started afresh (as on Windows and macOS), and third-party randomness in them."""
import random

import numpy as np
import pytest
import torch

import lamella.data.loader as loader
from lamella.data.loader import DataLoader
from lamella.data.transform import Transform


class Numbers:
    "A dataset that another process can import"
    def __len__(self): return 12
    def __getitem__(self, i): return torch.tensor(float(i))


def add_noise(x):
    "A third-party transform: it draws from all three generators"
    return x + random.random() + np.random.rand() + torch.rand(())


def batches(workers, **kwargs):
    return torch.cat([x[0] if isinstance(x, tuple) else x for x in DataLoader(Numbers(), bs=5, shuffle=True, num_workers=workers, seed=5, **kwargs)])


def test_spawned_workers_give_the_same_batches(monkeypatch):
    expected = batches(0, after_item=add_noise)
    monkeypatch.setattr(loader, 'start_method', lambda: 'spawn')
    assert torch.equal(batches(2, after_item=add_noise, persistent_workers=False), expected)


def test_kept_workers_give_the_same_batches():
    "Worker processes that live on between epochs know the epoch"
    kept = DataLoader(Numbers(), bs=5, shuffle=True, num_workers=2, seed=5, after_item=add_noise, persistent_workers=True)
    fresh = DataLoader(Numbers(), bs=5, shuffle=True, num_workers=0, seed=5, after_item=add_noise)
    for _ in range(3): assert torch.equal(torch.cat(list(kept)), torch.cat(list(fresh)))


def test_what_cannot_be_sent_to_a_worker_is_named(monkeypatch):
    monkeypatch.setattr(loader, 'start_method', lambda: 'spawn')
    with pytest.warns(UserWarning, match='without worker processes.*lambda'): found = batches(2, after_item=lambda x: x + 1)
    assert sorted(found.tolist()) == [float(i) for i in range(1, 13)]


def test_a_loop_that_is_left_early_leaves_no_worker():
    import multiprocessing
    dl = DataLoader(Numbers(), bs=2, num_workers=2, seed=5)
    for _ in dl: break
    del _
    dl._torch_loader = None
    assert not multiprocessing.active_children()


def test_transform_that_dies_says_on_what():
    "The message of a worker's error is short, and its traceback is the cause"
    def explode(x): raise ZeroDivisionError('boom')
    with pytest.raises(RuntimeError, match=r'(?s)sample \d+ could not be read.*ZeroDivisionError: boom.*explode') as caught:
        list(DataLoader(Numbers(), bs=5, num_workers=2, seed=5, after_item=Transform(explode)))
    assert 'in a worker process' in str(caught.value.__cause__) and 'explode' in str(caught.value.__cause__)
