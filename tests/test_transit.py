"""Batches that come from worker processes in memory that is used again: the same as ever, and no batch that somebody holds is ever written to."""
import copy
import gc
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from conftest import assert_same_batches

from lamella.data import transit
from lamella.data.loader import DataLoader
from lamella.data.pipeline import DataError
from lamella.data.transform import Transform
from lamella.data.transit import Slots, pack, picture_sizes, unpack
from lamella.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, IntToFloatTensor, RandomResizedCrop, Resize, get_image_files, parent_label

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='slots are seen by processes that are forked')
LARGE = RandomResizedCrop(500, min_scale=0.3) # two of them are more than a megabyte


def loader(photos, item_tfms=LARGE, with_floats=False, **kwargs):
    "Of the training part: 14 of 16 photographs, in four batches, the last one smaller"
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=item_tfms, splitter=IndexSplitter([0, 9]))
    dl = block.dataloaders(photos, **{'bs': 4, 'num_workers': 2, 'seed': 1, 'device': 'cpu', 'drop_last': False} | kwargs).train
    if not with_floats: dl.after_batch.fs[:] = [f for f in dl.after_batch.fs if not isinstance(f, IntToFloatTensor)]
    return dl


def epoch(dl): return [tuple(o.clone() for o in batch) for batch in dl]


@pytest.fixture
def lent(monkeypatch):
    "The slots that were lent, in this order"
    found, lend = [], Slots.lend
    monkeypatch.setattr(Slots, 'lend', lambda slots, k, shape: (found.append((slots.key, k)), lend(slots, k, shape))[1])
    return found


def taken(dl): return sum(dl.workers._slots[0]._taken[:])


@pytest.mark.parametrize('with_floats', [True, False])
@pytest.mark.parametrize('workers', [1, 2, 3])
def test_the_same_batches_from_the_second_epoch_on(photos, lent, workers, with_floats):
    dl, alone = (loader(photos, num_workers=n, with_floats=with_floats) for n in (workers, 0))
    for k in range(4):
        assert_same_batches(epoch(dl), epoch(alone))
        assert len(lent) == 4 * k, 'in the first one nobody knows yet how large batches are'
    assert len({key for key, _ in lent}) == 1 and taken(dl) == 0


def test_who_keeps_batches_keeps_them(photos, lent):
    "More of them than there are slots: the others come in new memory"
    dl = loader(photos)
    epoch(dl)
    held = [(batch, tuple(o.clone() for o in batch)) for _ in range(4) for batch in dl]
    assert len(lent) == len(set(lent)) == 16 and len(held) == 16, 'each epoch gets slots of its own'
    for batch, before in held: assert all(map(torch.equal, batch, before))
    assert len({batch[0].data_ptr() for batch, _ in held}) == 16
    row, array = held[5][0][0][2], held[6][0][0].numpy()[1]
    before = row.clone(), array.copy()
    del held, batch
    for _ in range(2): epoch(dl)
    assert torch.equal(row, before[0]) and np.array_equal(array, before[1]) and taken(dl) == 0


def test_more_batches_are_held_than_there_are_slots(photos, lent):
    "The others come in new memory"
    dl = loader(photos, bs=2)
    dl.workers.num_workers = 1
    epoch(dl)
    held = [(batch, tuple(o.clone() for o in batch)) for batch in dl]
    assert len(lent) == taken(dl) == 4 and len(held) == 7
    for batch, before in held: assert all(map(torch.equal, batch, before))


def test_a_batch_of_a_loop_that_was_broken_off(photos, lent):
    "Its workers may be at work for a moment yet: their slots are never used again"
    dl, alone = loader(photos), loader(photos, num_workers=0)
    assert_same_batches(epoch(dl), epoch(alone))
    for _ in range(3):
        kept = next(iter(dl))
        before, key = kept[0].clone(), lent[-1][0]
        assert not dl.workers._slots and key not in transit._all
        next(iter(alone))
        assert_same_batches(epoch(dl), epoch(alone))
        assert torch.equal(kept[0], before) and lent[-1][0] != key


def test_two_loops_at_once(photos, lent):
    dl, alone = loader(photos), loader(photos, num_workers=0)
    epoch(dl), epoch(alone)
    assert_same_batches([(*a, *b) for a, b in zip(dl, dl)], [(*(o.clone() for o in a), *b) for a, b in zip(alone, alone)])
    assert len({key for key, _ in lent}) == 2, 'slots of their own'
    assert_same_batches(epoch(dl), epoch(alone))


def test_an_error_in_the_loop(photos):
    dl, alone = loader(photos), loader(photos, num_workers=0)
    epoch(dl), epoch(alone)
    with pytest.raises(KeyError):
        for batch in dl: raise KeyError
    next(iter(alone))
    for _ in range(2): assert_same_batches(epoch(dl), epoch(alone))


def test_other_sizes(photos, lent):
    "Smaller or larger pictures, other batches, another number of processes"
    tfm = Resize(600, method='squish')
    dl, alone = loader(photos, tfm), loader(photos, tfm, num_workers=0)
    for size, bs, workers in ((600, 4, 2), (700, 4, 2), (300, 4, 2), (400, 4, 3), (500, 7, 1), (32, 4, 2), (600, 4, 2)):
        tfm.size, dl.bs, alone.bs, dl.workers.num_workers = (size, size), bs, bs, workers
        for _ in range(2): assert_same_batches(epoch(dl), epoch(alone))
    assert len({key for key, _ in lent}) > 4


class Dies(Transform):
    "Ends the process at the third of the samples that it sees, if it is told to"
    def __init__(self, switch): self.switch, self.seen = switch, 0
    def encodes(self, o: object):
        self.seen += 1
        if os.path.exists(self.switch) and self.seen >= 3: os.kill(os.getpid(), signal.SIGKILL)
        return o


@pytest.mark.filterwarnings('ignore')
def test_a_worker_that_dies(photos, tmp_path):
    dl, alone = loader(photos, [Dies(tmp_path/'now'), LARGE]), loader(photos, [Dies(tmp_path/'now'), LARGE], num_workers=0)
    for _ in range(2): assert_same_batches(epoch(dl), epoch(alone))
    (tmp_path/'now').touch()
    with pytest.raises(DataError, match='died'): epoch(dl)
    (tmp_path/'now').unlink()
    dl.epoch = alone.epoch
    for _ in range(2): assert_same_batches(epoch(dl), epoch(alone))


@pytest.mark.parametrize('on_error', ['skip', 'replace'])
def test_batches_that_are_read_again_give_their_slot_back(photos, tmp_path, on_error, lent):
    "A file is damaged: what was begun in a slot is not sent"
    bad = sorted(photos.glob('*/*.jpg'))[5]
    bad.write_bytes(bad.read_bytes()[:300])
    dl, alone = (loader(photos, num_workers=n, on_error=on_error) for n in (2, 0))
    for _ in range(3):
        with pytest.warns(UserWarning): found = epoch(dl)
        with pytest.warns(UserWarning): assert_same_batches(found, epoch(alone))
    assert taken(dl) == 0 and lent


def test_a_child_that_was_forked_with_a_batch_gives_nothing_back(photos):
    dl = loader(photos)
    epoch(dl)
    held = list(dl)
    child = os.fork()
    if child == 0:
        del held
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert taken(dl) == len(held) == 4
    del held
    assert taken(dl) == 4, 'another process may see them yet'


def in_child(work):
    "The exit code of a process that is forked here and does `work`"
    child = os.fork()
    if child: return child
    try:
        torch.set_num_threads(1)
        ok = work()
    finally: os._exit(0 if ok else 1)


def exit_codes(children): return [os.waitstatus_to_exitcode(os.waitpid(o, 0)[1]) for o in children]


def test_a_batch_that_a_child_holds_is_not_overwritten(photos):
    "Though the one who forked it has let it go"
    dl = loader(photos, bs=2)
    epoch(dl)
    begun, done = os.pipe(), os.pipe()
    for k, (x, y) in enumerate(dl):
        if k == 0:
            before = x.clone()
            child = in_child(lambda: os.write(begun[1], b'x') and os.read(done[0], 1) and torch.equal(x, before))
            os.read(begun[0], 1)
    del x
    for _ in range(2): epoch(dl)
    os.write(done[1], b'x')
    assert exit_codes([child]) == [0]


def test_processes_that_are_forked_between_epochs(photos):
    "Each of them, and this one, gets slots of its own"
    dl, alone = loader(photos, bs=2), loader(photos, bs=2, num_workers=0)
    for _ in range(2): epoch(dl), epoch(alone)
    expected = [epoch(alone) for _ in range(4)]
    slots, made_with = dl.workers._slots[0], (dl.workers._sizes, 2, 2)
    before = slots.key
    assert slots.are_free(*made_with) and exit_codes([in_child(lambda: not slots.are_free(*made_with))]) == [0]
    def same():
        for one in expected: assert_same_batches(epoch(dl), one)
        return dl.workers._slots[0].key
    children = [in_child(lambda: same() > before) for _ in range(2)]
    assert same() == before and exit_codes(children) == [0, 0]


class Inner:
    "A dataset that makes batches of another loader, and keeps them"
    def __init__(self, dl): self.dl, self.kept = dl, []
    def __len__(self): return 8
    def __getitem__(self, i):
        self.kept.append((made := self.dl.make_batch([0, 1, 2, 3])[0], made.clone()))
        return torch.tensor([torch.equal(*o) for o in self.kept]).all(), torch.zeros(2**20, dtype=torch.uint8)


def test_a_loader_within_a_worker(photos):
    "Its batches are not sent, and stay"
    dl = DataLoader(Inner(loader(photos, num_workers=0)), bs=2, num_workers=1)
    for _ in range(3): assert all(ok.all() for ok, _ in dl)


@pytest.mark.parametrize('batches', [1, 2])
def test_a_batch_in_place(photos, batches):
    "What could be done to a tensor of the first epoch, can be done to those of the second"
    dl = loader(photos)
    for _ in range(batches + 1):
        for x, _ in dl:
            x.detach_(), x.mul_(0), x.resize_(3), x.unsqueeze_(0)
            assert x._base is None and not x.any()


def test_copies_have_slots_of_their_own(photos, lent):
    dl = loader(photos)
    for _ in range(2): expected = epoch(dl)
    for made in (copy.copy(dl.workers), copy.deepcopy(dl.workers), pickle.loads(pickle.dumps(dl.workers))): assert made._slots == made._sizes == []
    other = copy.deepcopy(dl)
    other.epoch = 1
    for _ in range(2): found = epoch(other)
    other.epoch = 1
    assert_same_batches(epoch(other), expected)
    assert len(found) == 4 and len({key for key, _ in lent}) == 2


@pytest.mark.parametrize('kwargs', [dict(multiprocessing_context='spawn'), dict(persistent_workers=True)], ids=str)
def test_without_slots_where_processes_do_not_see_them(photos, lent, kwargs):
    dl, alone = loader(photos, **kwargs), loader(photos, num_workers=0)
    for _ in range(2): assert_same_batches(epoch(dl), epoch(alone))
    assert not lent


def test_small_batches_have_none(photos, lent):
    dl = loader(photos, Resize(32))
    for _ in range(2): epoch(dl)
    assert not lent and dl.workers._sizes == []


def test_pinned_as_pytorchs_thread_asks_for_it(monkeypatch):
    "The thread pins what it gets, and what has a method for it pins itself: the slot is free when the copy is made"
    from torch.utils.data._utils.pin_memory import pin_memory
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda x, *args: x.clone())
    slots = Slots([2**20], workers=1, ahead=0)
    message = pack((slots.take(0, (2**20,)).fill_(3), torch.tensor([1, 2])), slots)
    assert sum(slots._taken[:]) == 1
    pinned = pin_memory(message)
    assert [int(o.sum()) for o in unpack(pinned)] == [3 * 2**20, 3] and not any(slots._taken[:])


class Pair(tuple): "Of a class of its own"


STRANGE = {'bfloat16': torch.ones(3, dtype=torch.bfloat16), 'complex': torch.ones(2, dtype=torch.complex64), 'conjugate': torch.ones(2, dtype=torch.complex64).conj(), 'negative': torch.ones(2, dtype=torch.complex64).conj().imag,
           'sparse': torch.eye(3).to_sparse(), 'one number': torch.tensor(3.), 'none': torch.zeros(0, 4), 'turned': torch.arange(6).view(2, 3).t(), 'expanded': torch.ones(1).expand(5),
           'truth': torch.tensor([True, False]), 'nested': torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), 'last first': torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), 'bytes': torch.ones(2**21, dtype=torch.uint8), 'numpy': np.ones(3), 'text': 'abc', 'nothing': None, 'own class': Pair([torch.ones(2)]), 'halves': torch.ones(2, dtype=torch.float16)}


@pytest.mark.parametrize('name', STRANGE)
def test_whatever_is_in_a_batch_arrives(name):
    value = STRANGE[name]
    for batch in (value, (value,), [value, 1], {'x': value, 'y': (value, [value])}):
        found = unpack(pack(batch))
        assert type(found) is type(batch)
    found = unpack(pack((value,)))[0]
    assert type(found) is type(value)
    if name == 'nested': assert found is value
    elif isinstance(value, torch.Tensor): assert found.dtype == value.dtype and found.layout == value.layout and torch.equal(found.to_dense(), value.to_dense())
    if name in ('turned', 'expanded', 'last first'): assert found is value, 'in an order of its own: as PyTorch sends it'


def test_tensors_that_share_memory_still_do(photos):
    "As PyTorch sends them"
    x = torch.arange(6)
    dl = DataLoader([0, 1], bs=2, num_workers=1, collate_fn=lambda samples: (x, x[2:], x.t()))
    for a, b, c in dl:
        a[2:] = 9
        assert b.tolist() == [9] * 4 and c.tolist() == [0, 1, 9, 9, 9, 9]


def test_targets_can_be_written_to(photos):
    for x, y in loader(photos):
        y += 1
        x[0] = 0
        assert x[0].max() == 0 and y.min() >= 1


def test_sizes_of_pictures():
    large = torch.zeros(2**20, dtype=torch.uint8)
    assert picture_sizes((large, {'a': large[:5], 'b': [large]}, large.float(), 3)) == [2**20, 2**20]


class Numbers:
    "A dataset whose batches nobody puts off"
    def __len__(self): return 8
    def __getitem__(self, i): return torch.full((3, 300, 400), i, dtype=torch.uint8), i


def test_a_plain_dataset(lent):
    "Its batches are large, but stacked by PyTorch: the slots stay empty"
    dl = DataLoader(Numbers(), bs=4, num_workers=2)
    for _ in range(3): assert [y.tolist() for _, y in dl] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert not lent
