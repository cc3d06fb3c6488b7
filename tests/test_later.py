"""Pixels that are made when all samples of a batch are drawn: the same batches and the same errors as without, and no batch of the user's is ever written to."""
import ctypes
import io
import os
import shutil
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import assert_same_batches
from hypothesis import given, settings, strategies as st
from PIL import Image

import lamella.vision.decoding as decoding
import lamella.vision.jpeg as jpeg_module
import lamella.vision.pixels as pixels
from lamella.data import workers
from lamella.data.later import Later
from lamella.data.reading import BatchReader
from lamella.data.transform import Transform
from lamella.vision.all import (CategoryBlock, DataBlock, DihedralItem, FlipItem, ImageBlock, IndexSplitter, IntToFloatTensor, MaskBlock, Normalize, PILImage, PILImageBW, PointBlock, RandomCrop,
                                RandomResizedCrop, RatioResize, Resize, TensorImage, ToTensor, get_image_files, parent_label)
from lamella.vision.batch import imagenet_stats


def loader(photos, item_tfms, blocks=(ImageBlock, CategoryBlock), get_y=parent_label, batch_tfms=None, **kwargs):
    "Of the training part: 14 of 16 photographs, in four batches"
    block = DataBlock(blocks=blocks, get_items=get_image_files, get_y=get_y, item_tfms=item_tfms, batch_tfms=batch_tfms, splitter=IndexSplitter([0, 9]))
    return block.dataloaders(photos, **{'bs': 4, 'num_workers': 0, 'seed': 1, 'device': 'cpu', 'drop_last': False} | kwargs).train


def epochs(dl, n=2): return [tuple(torch.as_tensor(o).clone() for o in batch) for _ in range(n) for batch in dl]


@pytest.fixture
def at_one_go(monkeypatch):
    "How many tensors were filled later, and a switch to the old way"
    class Seen:
        filled = 0
        def never(self): monkeypatch.setattr(BatchReader, '_can_put_off', lambda reader: False)
    seen, finish = Seen(), Later.finish
    def counted(later):
        seen.filled += len(later.work)
        finish(later)
    monkeypatch.setattr(Later, 'finish', counted)
    return seen


# A batch belongs to who has it

KINDS = {'floats': dict(item_tfms=Resize(40)), 'large floats': dict(item_tfms=Resize(600), bs=4), 'bytes': dict(item_tfms=Resize(40), batch_tfms=[], with_floats=False),
         'large bytes': dict(item_tfms=Resize(1200), batch_tfms=[], bs=4, with_floats=False), 'normalised': dict(item_tfms=RandomResizedCrop(600), batch_tfms=Normalize.from_stats(*imagenet_stats))}


@pytest.mark.parametrize('kind,given_', KINDS.items())
@pytest.mark.parametrize('workers,method', [(0, 'fork'), (2, 'fork'), (2, 'spawn')])
def test_a_batch_that_is_kept_is_never_overwritten(photos, kind, given_, workers, method):
    if method == 'spawn' and kind not in ('floats', 'large floats'): pytest.skip('as with fork')
    given_ = dict(given_)
    with_floats = given_.pop('with_floats', True)
    dl = loader(photos, **given_, num_workers=workers, multiprocessing_context=method)
    if not with_floats: dl.after_batch.fs[:] = [f for f in dl.after_batch.fs if not isinstance(f, IntToFloatTensor)]
    held = [(batch, tuple(o.clone() for o in batch)) for _ in range(2) for batch in dl]
    assert held[0][0][0].dtype == (torch.float32 if with_floats else torch.uint8)
    for batch, copy in held: assert all(map(torch.equal, batch, copy))
    places = [batch[0].data_ptr() for batch, _ in held]
    assert len(set(places)) == len(places)


def test_a_view_keeps_a_batch():
    made = pixels.new_batch((5, 1000, 1000), torch.empty(0), torch.float32)
    made[:] = torch.arange(5.)[:, None, None]
    views = [made[3], made.numpy()[4], made.view(-1)[1_500_000:1_500_010]]
    del made
    others = [pixels.new_batch((5, 1000, 1000), torch.empty(0), torch.float32).fill_(9.) for _ in range(3)]
    assert len(others) == 3 and [float(o.max()) for o in views] == [3., 4., 1.]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_a_batch_that_is_held_while_the_process_forks_is_nobody_elses():
    new = lambda: pixels.new_batch((5, 1000, 1000), torch.empty(0), torch.float32)
    held, gone = new().fill_(1.), new().fill_(2.)
    del gone
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1) # OpenMP does not outlive a fork
        ok = bool((held == 1).all()) and bool((new().fill_(3.) == 3).all()) and bool((new().fill_(4.) == 4).all())
        held.fill_(5.)
        del held
        os._exit(0 if ok and float(new().fill_(6.).min()) == 6 else 1)
    more = [new().fill_(7.) for _ in range(3)]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bool((held == 1).all()) and all(bool((o == 7).all()) for o in more)
    pixels._spare.clear()
    del held # its pages were shared with the child: not for another batch
    assert len(pixels._spare) == 0
    del more # made after the fork
    assert len(pixels._spare) == 2


def test_nothing_that_is_spare_goes_to_a_child(photos):
    del_me = pixels.new_batch((5, 1000, 1000), torch.empty(0), torch.float32)
    del del_me
    assert len(pixels._spare) > 0
    list(loader(photos, Resize(40), num_workers=1, multiprocessing_context='fork'))
    assert len(pixels._spare) == 0


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bytes_become_floats_of_any_kind(kind):
    x = torch.randint(0, 256, (2, 3, 9, 8), dtype=torch.uint8)
    px, out = pixels.Pixels(x), torch.empty(x.shape, dtype=kind)
    px.unit(255)
    px.linear(torch.tensor([1., 2., 3.]).view(1, 3, 1, 1), torch.tensor([-.1, 0., .1]).view(1, 3, 1, 1))
    px.write(out)
    expected = x.double() / 255 * torch.tensor([1., 2., 3.]).view(1, 3, 1, 1) + torch.tensor([-.1, 0., .1]).view(1, 3, 1, 1)
    assert torch.allclose(out.double(), expected, atol={torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(kind, 1e-6), rtol=0)


# The same batches, whichever way they are read

class AddOne(Transform):
    order = 20
    def encodes(self, x: TensorImage): return (x.int() + 1).clamp(max=255).byte()

class OwnToTensor(ToTensor):
    def encodes(self, o: PILImage) -> TensorImage: return TensorImage(np.asarray(o).transpose(2, 0, 1).copy() // 2)

class Mosaic(Transform):
    "A user's transform that makes tensors by itself, looks at them, and gives back an image"
    def encodes(self, o: PILImage) -> PILImage:
        small = ToTensor()(o.resize_part((30, 30)))
        return PILImage.create(np.tile(255 - np.asarray(small).transpose(1, 2, 0), (2, 2, 1)))

class LooksBack(Transform):
    "Keeps the image before this one, as mixing transforms do"
    last = None
    def encodes(self, o: PILImage) -> PILImage:
        o = o.resize_part((32, 32))
        before, self.last = self.last or o, o
        return PILImage.create(np.asarray(o) // 2 + np.asarray(before) // 2)

def mask_of(fn): return np.asarray(Image.open(fn).convert('L')) // 64
def points_of(fn): return torch.tensor([[5., 7.], [20., 30.]])
def same(fn): return fn

CASES = {
    'resize': (dict(item_tfms=Resize(32)), True), 'crops': (dict(item_tfms=RandomResizedCrop(32)), True), 'squished': (dict(item_tfms=Resize(32, method='squish')), True), 'padded': (dict(item_tfms=Resize(32, method='pad')), None),
    'small part': (dict(item_tfms=[RandomCrop(40), Resize(32)]), None), 'flips': (dict(item_tfms=[RandomResizedCrop(32), FlipItem(), DihedralItem()]), None), 'no resizing': (dict(item_tfms=[RandomCrop(32)]), False),
    'another after': (dict(item_tfms=[Resize(32), AddOne()]), False), 'subclass': (dict(item_tfms=[Resize(32), OwnToTensor()]), None), 'mosaic': (dict(item_tfms=[Mosaic(), Resize(32)]), None),
    'grey': (dict(item_tfms=RandomResizedCrop(32), blocks=(ImageBlock(PILImageBW), CategoryBlock)), True), 'mask': (dict(item_tfms=RandomResizedCrop(32), blocks=(ImageBlock, MaskBlock), get_y=mask_of), True),
    'points': (dict(item_tfms=RandomResizedCrop(32), blocks=(ImageBlock, PointBlock), get_y=points_of), True), 'two images': (dict(item_tfms=RandomResizedCrop(32), blocks=(ImageBlock, ImageBlock), get_y=same), True),
    'before_batch': (dict(item_tfms=Resize(32), before_batch=[list]), False), 'twice': (dict(item_tfms=[Resize(32), ToTensor(), ToTensor()]), None), 'reduced': (dict(item_tfms=Resize(12)), False)}


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('kind', ['plain', 'some odd'])
def test_the_same_batches(photos, at_one_go, name, kind):
    given_, later = CASES[name]
    if kind == 'some odd': # scans one after another, EXIF, a PNG by its content, four channels, no colour
        odd = sorted(get_image_files(photos))[::3]
        for fn, how in zip(odd, [dict(progressive=True), dict(exif=b'Exif\0\0II*\0\x08\0\0\0\0\0'), dict(format='PNG'), dict(comment='here'), 'CMYK', 'L']):
            image = Image.open(fn).convert(how) if isinstance(how, str) else Image.open(fn)
            image.load()
            image.save(fn, **({} if isinstance(how, str) else how))
    found = epochs(loader(photos, **given_))
    filled = at_one_go.filled
    if later is not None: assert bool(filled) == later
    in_workers = epochs(loader(photos, **given_, num_workers=2, multiprocessing_context='fork'), 1) if name in ('crops', 'mask', 'two images', 'mosaic', 'another after') else found[:len(found) // 2]
    at_one_go.never()
    filled = at_one_go.filled
    expected = epochs(loader(photos, **given_))
    assert at_one_go.filled == filled
    assert_same_batches(found, expected)
    assert_same_batches(in_workers, expected[:len(in_workers)])


def test_spawned_workers_read_the_same(photos, at_one_go):
    found = epochs(loader(photos, RandomResizedCrop(32), num_workers=2, multiprocessing_context='spawn'))
    at_one_go.never()
    assert_same_batches(found, epochs(loader(photos, RandomResizedCrop(32))))


def test_an_image_that_outlives_its_sample(photos, at_one_go):
    found = epochs(loader(photos, [LooksBack(), Resize(32)]), 1)
    at_one_go.never()
    assert_same_batches(found, epochs(loader(photos, [LooksBack(), Resize(32)]), 1))


class Pair(PILImage): pass

def test_a_type_of_the_users_own_that_looks_at_its_tensors(photos, at_one_go):
    "`@ToTensor` teaches it a type, there the transform is called for parts of a picture, and they become one"
    class Parts(Transform):
        def encodes(self, o: PILImage) -> Pair:
            made = Pair(o)
            made.parts = [o.resize_part((40, 32)), o.resize_part((40, 32)).flip_lr()]
            return made
    def encodes(self, o: Pair) -> TensorImage: return torch.cat([self(p) for p in o.parts], 2)
    own = ToTensor._own_verbs['encodes']
    ToTensor(encodes)
    try:
        found = epochs(loader(photos, [Parts()]))
        assert found[0][0].shape == (4, 3, 32, 80)
        at_one_go.never()
        assert_same_batches(found, epochs(loader(photos, [Parts()])))
    finally:
        own.remove(encodes)
        ToTensor._inherit()
        type(ToTensor).version += 1


def test_a_batch_is_read_in_one_pass_and_nothing_is_stacked(photos):
    seen = Counter()
    def label(fn):
        seen[fn.name] += 1
        return fn.parent.name
    dl = loader(photos, Resize(32), get_y=label)
    seen.clear()
    list(dl)
    assert sum(seen.values()) == 14


# Errors

def broken(photos, bad='cat/5.jpg'):
    content = (photos/bad).read_bytes()
    (photos/bad).write_bytes(content[:len(content) // 2])
    return photos


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('on_error', ['skip', 'replace'])
def test_bad_files_are_found_one_by_one(photos, at_one_go, workers, on_error):
    def read(n):
        dl = loader(photos, RandomResizedCrop(32), on_error=on_error, num_workers=n, multiprocessing_context='fork')
        with pytest.warns(UserWarning, match='5.jpg'): found = epochs(dl, 1)
        return found, [(o.index, o.file, o.reason, o.epoch) for o in dl.failures]
    broken(photos)
    found, failures = read(workers)
    at_one_go.never()
    expected, known = read(0)
    assert_same_batches(found, expected)
    assert failures == known and len(failures) == 1
    assert sum(len(x) for x, _ in found) == (13 if on_error == 'skip' else 14)


class Picky(Transform):
    def encodes(self, o: PILImage) -> PILImage:
        if o.size == (60, 47): raise KeyError('too low')
        return o

def no_label(fn):
    if fn.name == '5.jpg' and fn.parent.name == 'cat': raise LookupError(f'nothing is known of {fn.name}')
    return fn.parent.name


@pytest.mark.parametrize('what', ['cut', 'no file', 'transform', 'sizes', 'text', 'end'])
@pytest.mark.parametrize('workers', [0, 2])
def test_errors_are_those_of_the_old_way(photos, at_one_go, what, workers):
    bad, tfms = photos/'cat/5.jpg', Resize(32)
    def make(n):
        dl = loader(photos, tfms, num_workers=n, multiprocessing_context='fork')
        if what == 'no file' and bad.exists(): bad.rename(bad.with_suffix('.gone'))
        return dl
    def message(n):
        if what == 'no file' and not bad.exists(): bad.with_suffix('.gone').rename(bad)
        with pytest.raises(Exception) as found: list(make(n))
        return type(found.value), str(found.value)
    if what == 'cut': broken(photos)
    elif what == 'text': bad.write_text('no image')
    elif what == 'end': bad.write_bytes(bad.read_bytes()[:-400])
    elif what == 'transform': tfms = [Picky(), Resize(32)]
    elif what == 'sizes': tfms = RatioResize(32)
    if what in ('transform', 'sizes'): Image.open(bad).crop((0, 0, 60, 47)).save(bad.with_name('new.jpg')); shutil.move(bad.with_name('new.jpg'), bad)
    if what == 'sizes': Image.new('RGB', (90, 30)).save(bad, format='JPEG')
    found = message(workers)
    at_one_go.never()
    assert found == message(0)
    assert '5.jpg' in found[1]
    if what == 'transform': assert 'Picky' in found[1] and 'too low' in found[1]
    if what == 'sizes': assert 'different shapes' in found[1]


def test_only_the_samples_of_a_batch_that_failed_are_read_again(photos):
    seen = Counter()
    class Counts(Transform):
        def encodes(self, o: PILImage) -> PILImage:
            seen[type(o)] += 1
            return o
    def label(fn):
        seen[f'{fn.parent.name}/{fn.name}'] += 1
        return fn.parent.name
    dl = loader(broken(photos), [Counts(), Resize(32)], get_y=label, on_error='skip')
    seen.clear()
    with pytest.warns(UserWarning, match='5.jpg'): sizes = [len(x) for x, _ in dl]
    again = [name for name, n in seen.items() if isinstance(name, str) and n > 1]
    assert sorted(sizes)[-1] == 4 and sum(sizes) == 13 and max(n for name, n in seen.items() if isinstance(name, str)) == 2
    assert 'cat/5.jpg' in again and len(again) <= 4
    assert seen[PILImage] == 14 + len(again) # a file that breaks off has a whole head


def test_without_torchvisions_decoder_nothing_is_read_twice(photos, at_one_go, monkeypatch):
    seen = Counter()
    def label(fn):
        seen[fn.name] += 1
        return fn.parent.name
    expected = epochs(loader(photos, RandomResizedCrop(32)), 1)
    filled = at_one_go.filled
    assert filled >= 14
    monkeypatch.setattr(jpeg_module, '_whole_decoder', lambda: None)
    dl = loader(photos, RandomResizedCrop(32), get_y=label)
    seen.clear()
    found = epochs(dl, 1)
    assert sum(seen.values()) == 14 and at_one_go.filled == filled
    assert all((a[0] - b[0]).abs().max() <= 2 / 255 for a, b in zip(found, expected))


# Heads of JPEGs

def jpeg(size=(21, 13), mode='RGB', **kwargs):
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(stream := io.BytesIO(), format='JPEG', **kwargs)
    return stream.getvalue()


def entries(content):
    "The head of a JPEG, in parts: the start, each of the entries, and all from the first scan on"
    at, parts = 2, [content[:2]]
    while content[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(content[at + 2:at + 4], 'big')
        parts.append(content[at:end])
        at = end
    return [*parts, content[at:]]


def check(content):
    "Nothing, or what PIL says; True if it is read here"
    found = jpeg_module.plain_jpeg(content)
    if found is None: return False
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.format == 'JPEG'
        assert (found.size, found.mode, found.info) == (opened.size, opened.mode, opened.info)
        for mode in ('RGB', 'L') if opened.mode == 'RGB' else ('L', 'RGB'):
            values = found.pixels(mode, found.size)
            again = Image.open(io.BytesIO(content))
            again.draft(mode, None)
            try: expected = np.atleast_3d(np.asarray(again.convert(mode))).transpose(2, 0, 1)
            except OSError: assert values is None
            else: assert values is None or np.array_equal(values.numpy(), expected)
    return True


PLAIN = {'4:2:0': jpeg(), '4:4:4': jpeg(subsampling=0), '4:2:2': jpeg(subsampling=1), 'grey': jpeg(mode='L'), 'dpi': jpeg(dpi=(300, 200)), 'optimized': jpeg(optimize=True), 'one pixel': jpeg((1, 1)),
         'restarts': jpeg(restart_marker_blocks=1), 'quality 1': jpeg(quality=1)}
ODD = {'progressive': jpeg(progressive=True), 'CMYK': jpeg(mode='CMYK'), 'EXIF': jpeg(exif=b'Exif\0\0II*\0\x08\0\0\0\0\0'), 'comment': jpeg(comment=b'a'), 'profile': jpeg(icc_profile=b'x' * 200),
       'as RGB': jpeg(keep_rgb=True)}


def marker(kind, content=b''): return struct.pack('>BBH', 255, kind, len(content) + 2) + content


def test_plain_ones_are_read_here_and_others_by_pil():
    assert {name: check(o) for name, o in PLAIN.items()} == dict.fromkeys(PLAIN, True)
    assert {name: check(o) for name, o in ODD.items() if name != 'as RGB'} == {name: False for name in ODD if name != 'as RGB'}
    check(ODD['as RGB'])


def with_head(change):
    "A plain JPEG whose entries were changed"
    parts = entries(PLAIN['4:2:0'])
    return b''.join(change(parts))


JFIF2, ADOBE = marker(0xE0, b'JFIF\0\x01\x01\x02\0\x1c\0\x1c\0\0'), marker(0xEE, b'Adobe\0\x64\0\0\0\0\x01')
def frame_as(change): return lambda parts: [bytes(change(bytearray(o))) if o[1] == 0xC0 else o for o in parts]
def put(at, value):
    def change(entry):
        entry[at] = value
        return entry
    return change

STRANGE = {
    'trailing': lambda p: [*p, b'garbage' * 9], 'trailing jpeg': lambda p: [*p, PLAIN['grey']], 'twelve bits': frame_as(put(4, 12)), 'arithmetic': frame_as(put(1, 0xC9)), 'extended': frame_as(put(1, 0xC1)), 'lossless': frame_as(put(1, 0xC3)),
    'four channels': frame_as(put(9, 4)), 'two channels': frame_as(put(9, 2)), 'one of three': frame_as(put(9, 1)), 'no width': frame_as(lambda o: o[:7] + b'\0\0' + o[9:]), 'no height': frame_as(lambda o: o[:5] + b'\0\0' + o[7:]),
    '4:1:1': frame_as(put(11, 0x41)), 'no sampling': frame_as(put(11, 0)), 'long frame': frame_as(lambda o: o[:2] + b'\0\x14' + o[4:] + b'\x04\x11\0'), 'short frame': frame_as(lambda o: o[:2] + b'\0\x0e' + o[4:-3]),
    'larger than it is': frame_as(put(6, 200)), 'two frames': lambda p: [q for o in p for q in ([o, o] if o[1] == 0xC0 else [o])], 'JFIF twice': lambda p: [p[0], p[1], *p[1:]], 'JFIF in cm': lambda p: [p[0], JFIF2, *p[2:]],
    'no JFIF': lambda p: [p[0], *p[2:]], 'JFIF last': lambda p: [p[0], *p[2:-1], p[1], p[-1]], 'Adobe too': lambda p: [*p[:2], ADOBE, *p[2:]], 'Adobe alone': lambda p: [p[0], ADOBE, *p[2:]], 'JFXX': lambda p: [*p[:2], marker(0xE0, b'JFXX\0\x10'), *p[2:]],
    'short JFIF': lambda p: [p[0], marker(0xE0, b'JFIF\0\x01'), *p[2:]], 'half a JFIF': lambda p: [p[0], marker(0xE0, b'JFIF\0\x01\x01\x01'), *p[2:]], 'JFIF without its end': lambda p: [p[0], marker(0xE0, b'JFIF\x20\x01\x01\x01\0\x1c\0\x1c\0\0'), *p[2:]],
    'long JFIF': lambda p: [p[0], marker(0xE0, b'JFIF\0\x01\x01\x01\0\x1c\0\x1c\x01\x01abc'), *p[2:]], 'empty APP0': lambda p: [*p[:2], marker(0xE0), *p[2:]], 'padding': lambda p: [p[0], b'\xff\xff\xff', *p[1:]], 'junk': lambda p: [*p[:2], b'\x01\x02', *p[2:]],
    'stuffing': lambda p: [*p[:2], b'\xff\0', *p[2:]], 'a second start': lambda p: [p[0], *p], 'end at once': lambda p: [p[0], b'\xff\xd9', *p[1:]], 'a restart before': lambda p: [p[0], b'\xff\xd0', *p[1:]], 'APP9 of odd length': lambda p: [*p[:2], marker(0xE9, b'abc'), *p[2:]],
    'length 0': lambda p: [*p[:2], b'\xff\xdd\0\0', *p[2:]], 'length 1': lambda p: [*p[:2], b'\xff\xdd\0\x01', *p[2:]], 'empty table': lambda p: [*p[:2], marker(0xDB), *p[2:]], 'short table': lambda p: [*p[:2], marker(0xDB, b'\0' + b'\1' * 40), *p[2:]],
    'wide table': lambda p: [*p[:2], marker(0xDB, b'\x10' + b'\0\1' * 64), *p[2:]], 'table in the way': lambda p: [*p[:2], marker(0xC4, b'\x0f'), *p[2:]], 'restart interval': lambda p: [*p[:-1], marker(0xDD, b'\0\1'), p[-1]], 'lines later': lambda p: [*p[:-1], marker(0xDC, b'\0\x0d'), p[-1]],
    'no scan': lambda p: p[:-1], 'no frame': lambda p: [o for o in p if o[1] != 0xC0], 'scan cut': lambda p: [*p[:-1], p[-1][:9]], 'scan twice': lambda p: [*p, p[-1]]}


@pytest.mark.parametrize('name', STRANGE)
def test_strange_heads_are_read_as_pil_reads_them(name): check(with_head(STRANGE[name]))


def test_truncated_at_any_place():
    for content in (PLAIN['grey'], PLAIN['dpi']):
        for end in range(len(content)): check(content[:end])


def test_no_byte_of_a_head_is_misread():
    content = PLAIN['dpi']
    head = len(content) - len(entries(content)[-1]) + 16
    for at in range(2, head):
        for value in (0, 1, 2, 0x7F, 0xFF, content[at] ^ 1, content[at] ^ 0x10): check(content[:at] + bytes([value]) + content[at + 1:])


@settings(max_examples=150, deadline=None)
@given(which=st.sampled_from(sorted(PLAIN)), order=st.randoms(use_true_random=False), extra=st.lists(st.tuples(st.integers(0xC0, 0xFE), st.binary(max_size=80)), max_size=3), at=st.integers(0, 400), noise=st.binary(max_size=3))
def test_shuffled_doubled_and_foreign_entries(which, order, extra, at, noise):
    first, *middle, last = entries(PLAIN[which])
    middle += [marker(kind, content) for kind, content in extra] + order.sample(middle, min(1, len(middle)))
    order.shuffle(middle)
    content = b''.join([first, *middle, last])
    check(content[:at] + noise + content[at:] if noise else content)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=300))
def test_random_bytes_are_no_jpeg(content):
    assert not check(content) and not check(b'\xff\xd8\xff' + content)


@pytest.mark.parametrize('path', ['no such file', 'with\0zero', '.', ''])
def test_what_is_wrong_with_a_path_is_said_as_ever(path):
    assert jpeg_module.plain_jpeg(path) is None
    with pytest.raises(Exception) as found: PILImage.create(path)
    with pytest.raises(type(found.value)) as expected: decoding.open_image(path)
    assert str(found.value) == str(expected.value)


# The memory of workers

@pytest.mark.parametrize('library', [lambda name: (_ for _ in ()).throw(OSError('no dynamic loading')), lambda name: object()], ids=['static', 'musl'])
def test_other_c_libraries_keep_their_ways(monkeypatch, library):
    monkeypatch.setattr(ctypes, 'CDLL', library)
    workers._keep_memory()


@pytest.mark.parametrize('platform,variable,asked', [('linux', None, 2), ('linux', 'MALLOC_TRIM_THRESHOLD_', 0), ('linux', 'GLIBC_TUNABLES', 0), ('darwin', None, 0), ('win32', None, 0)])
def test_memory_is_kept_on_linux_unless_the_user_has_chosen(monkeypatch, platform, variable, asked):
    calls = []
    class Library:
        def mallopt(self, *args): calls.append(args)
    for name in [o for o in os.environ if o.startswith(('MALLOC_', 'GLIBC_TUNABLES'))]: monkeypatch.delenv(name)
    if variable: monkeypatch.setenv(variable, '1')
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: Library())
    monkeypatch.setattr(workers.sys, 'platform', platform)
    workers._keep_memory()
    assert len(calls) == asked
