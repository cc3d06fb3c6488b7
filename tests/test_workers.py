"""Worker processes, forked and started afresh: the same batches, errors that say what happened, and nothing left behind."""
import gc
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch

from lamella.data.loader import DataLoader
from lamella.data.pipeline import DataError
from lamella.data.transform import Transform
from lamella.vision.all import CategoryBlock, DataBlock, ImageBlock, RandomResizedCrop, RandomSplitter, aug_transforms, get_image_files, parent_label


class Numbers:
    "A dataset that another process can import"
    def __len__(self): return 12
    def __getitem__(self, i): return torch.tensor(float(i))


def add_noise(x):
    "A third-party transform: it draws from all three generators"
    return x + random.random() + np.random.rand() + torch.rand(())


class OwnGenerators:
    "A third-party transform that keeps generators of its own, without a seed, as albumentations does"
    def __init__(self): self.rng, self.py, self.torch = np.random.default_rng(), random.Random(), torch.Generator()
    def __call__(self, x): return x + self.rng.random() + self.py.random() + torch.rand((), generator=self.torch)


_RNG = np.random.default_rng()
def add_global_noise(x): return x + _RNG.random()


def batches(workers, after_item=add_noise, epochs=1, **kwargs):
    dl = DataLoader(Numbers(), bs=5, shuffle=True, num_workers=workers, seed=5, after_item=after_item, **kwargs)
    return torch.stack([torch.cat(list(dl)) for _ in range(epochs)])


@pytest.mark.parametrize('transform', [add_noise, add_global_noise, OwnGenerators], ids=lambda f: f.__name__)
@pytest.mark.parametrize('workers,method', [(2, 'fork'), (8, 'fork'), (2, 'spawn')])
def test_the_same_batches(transform, workers, method):
    make = transform if isinstance(transform, type) else lambda: transform
    expected = batches(0, make(), epochs=2)
    assert torch.equal(batches(workers, make(), epochs=2, multiprocessing_context=method), expected)
    assert not torch.equal(expected[0], expected[1])


def test_forkserver_gives_the_same_batches():
    assert torch.equal(batches(2, multiprocessing_context='forkserver'), batches(0))


def test_a_whole_pipeline_of_images_gives_the_same_batches(photos):
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=RandomResizedCrop(32), batch_tfms=aug_transforms(), splitter=RandomSplitter(seed=1))
    def epochs(workers, **kwargs):
        dl = block.dataloaders(photos, bs=4, num_workers=workers, seed=1, device='cpu', **kwargs).train
        return torch.stack([torch.cat([x for x, y in dl]) for _ in range(2)])
    expected = epochs(0)
    assert torch.equal(epochs(2), expected) and torch.equal(epochs(2, multiprocessing_context='spawn'), expected)
    assert not torch.equal(*expected)


def test_own_generators_are_as_they_were():
    "Reading in this process seeds a generator of the user's, and puts it back"
    mine = OwnGenerators()
    state = mine.rng.bit_generator.state, mine.py.getstate(), mine.torch.get_state()
    batches(0, mine)
    assert (mine.rng.bit_generator.state, mine.py.getstate()) == state[:2] and torch.equal(mine.torch.get_state(), state[2])


def test_albumentations_keeps_to_the_seed():
    albumentations = pytest.importorskip('albumentations')
    def epoch(workers):
        tfm = albumentations.Compose([albumentations.RandomBrightnessContrast(p=1), albumentations.HorizontalFlip(p=.5)])
        def apply(x): return torch.as_tensor(tfm(image=np.tile(np.arange(8, dtype=np.uint8)[:, None], (8, 1, 3)).reshape(8, 8, 3))['image'])
        return torch.cat(list(DataLoader(Numbers(), bs=5, num_workers=workers, seed=5, after_item=apply)))
    assert torch.equal(epoch(0), epoch(2)) and len(epoch(0).unique(dim=0)) > 6


def test_kept_workers_give_the_same_batches():
    "Worker processes that live on between epochs know the epoch"
    kept = DataLoader(Numbers(), bs=5, shuffle=True, num_workers=2, seed=5, after_item=add_noise, persistent_workers=True)
    fresh = DataLoader(Numbers(), bs=5, shuffle=True, num_workers=0, seed=5, after_item=add_noise)
    for _ in range(3): assert torch.equal(torch.cat(list(kept)), torch.cat(list(fresh)))


# ---- what cannot be sent

class Locked(Numbers):
    def __init__(self): self.parts = {'cache': [threading.Lock()]}


@pytest.mark.parametrize('kwargs,named', [
    (dict(after_item=lambda x: x), r'after_item.fs\[0\].*lambda'),
    (dict(after_item=Transform(add_noise, lambda x: x)), r'after_item.fs\[0\].*dec.*lambda'),
    (dict(collate_fn=lambda b: torch.stack(b)), 'collate.*lambda'),
    (dict(dataset=Locked()), r"dataset.parts\['cache'\]\[0\] \(lock\)"),
], ids=['transform', 'decodes', 'collate', 'dataset'])
def test_what_cannot_be_sent_to_a_worker_is_named(kwargs, named):
    dl = DataLoader(**{'dataset': Numbers(), **kwargs}, bs=5, num_workers=2, multiprocessing_context='spawn')
    with pytest.warns(UserWarning, match=f'without worker processes.*{named}'): found = list(dl)
    assert len(torch.cat(found)) == 12 and dl.num_workers == 0


def test_a_getter_that_cannot_be_sent_is_named(photos):
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=lambda o: o.parent.name, item_tfms=RandomResizedCrop(32))
    dl = block.dataloaders(photos, bs=4, num_workers=2, device='cpu', multiprocessing_context='spawn').train
    with pytest.warns(UserWarning, match=r'dataset\..*func.*lambda'): next(iter(dl))


# ---- what dies

class Killed(Numbers):
    def __getitem__(self, i):
        if i == 7 and torch.utils.data.get_worker_info(): os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


class Slow(Numbers):
    def __getitem__(self, i):
        if torch.utils.data.get_worker_info(): threading.Event().wait(60)
        return super().__getitem__(i)


def test_a_killed_worker_says_so_and_what_to_try():
    dl = DataLoader(Killed(), bs=3, num_workers=2)
    with pytest.raises(DataError, match='(?s)worker process.*died.*(?i:kill).*memory.*num_workers'): list(dl)
    dl.dataset.__class__ = Numbers
    assert len(list(dl)) == 4


def test_a_worker_that_takes_too_long():
    with pytest.raises(DataError, match='longer than timeout'): list(DataLoader(Slow(), bs=3, num_workers=1, timeout=1))


def test_a_transform_that_dies_says_on_what():
    "The message of a worker's error is short, and its traceback is the cause"
    def explode(x): raise ZeroDivisionError('boom')
    with pytest.raises(RuntimeError, match=r'(?s)sample \d+ could not be read.*ZeroDivisionError: boom.*explode') as caught:
        list(DataLoader(Numbers(), bs=5, num_workers=2, seed=5, after_item=Transform(explode)))
    assert 'in a worker process' in str(caught.value.__cause__) and 'explode' in str(caught.value.__cause__)


# ---- what is left

def test_a_loop_that_is_left_early_leaves_no_worker():
    import multiprocessing
    dl = DataLoader(Numbers(), bs=2, num_workers=2, seed=5)
    for _ in dl: break
    del _
    dl.workers._torch_loader = None
    gc.collect()
    assert not multiprocessing.active_children()


def open_files():
    gc.collect()
    return len(os.listdir('/proc/self/fd')), len([o for o in os.listdir('/dev/shm') if o.startswith('torch_')])


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='counts files as Linux shows them')
@pytest.mark.parametrize('kept', [False, True])
def test_epochs_leave_no_open_files_and_no_shared_memory(photos, kept):
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=RandomResizedCrop(32))
    dls = block.dataloaders(photos, bs=4, num_workers=2, device='cpu', seed=1, persistent_workers=kept)
    def epoch():
        for dl in dls: list(dl)
        next(iter(dls.train))
    for _ in range(2): epoch()
    before = open_files()
    for _ in range(5): epoch()
    assert open_files() <= (before[0] + 2, before[1])


def test_init_function_and_its_name_of_fastai(tmp_path):
    for name in ('worker_init_fn', 'wif'):
        list(DataLoader(Numbers(), bs=6, num_workers=2, **{name: lambda k: (tmp_path/f'{name}{k}').touch()}))
    assert len(list(tmp_path.iterdir())) == 4
