"""Bytes of pictures, resized and as floats by `_pixels.c`: bit by bit what PyTorch and NumPy make of them, whatever the sizes."""
import math
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import lamella.vision.decoding as decoding
import lamella.vision.pixels as pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from lamella.data.pipeline import Pipeline
from lamella.vision.all import IntToFloatTensor, Normalize, PILImage, RandomResizedCrop, Resize, TensorImage, imagenet_stats
from lamella.vision.decoding import resize_tensor
from lamella.vision.pixels import Pixels

compiled = pytest.mark.skipif(decoding.byte_resizer() is None, reason='lamella was installed without GCC or Clang, or this is no x86 with AVX2')


@pytest.fixture
def without(monkeypatch):
    monkeypatch.setattr(decoding, 'byte_resizer', lambda: None)
    monkeypatch.setattr(pixels, 'byte_writer', lambda: None)


def picture(height, width, seed=0, kind='noise'):
    "Noise; or nothing but black and white, where sums are largest"
    noise = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))
    return (noise * 256).to(torch.uint8) if kind == 'noise' else (noise > 0.5).to(torch.uint8) * 255


def by_torch(x, size):
    "(height, width, 3) to (3, rows, columns)"
    return F.interpolate(x.permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last), size, mode='bilinear', antialias=True)[0]


def by_c(x, size):
    found = torch.full((3, *size), 99, dtype=torch.uint8)
    decoding.byte_resizer()(x.numpy(), found.numpy())
    return found


SIDES = st.one_of(st.integers(2, 70), st.integers(2, 700))


@compiled
@settings(max_examples=400, deadline=None)
@given(height=SIDES, width=SIDES, rows=SIDES, columns=SIDES, seed=st.integers(0, 1000), kind=st.sampled_from(['noise', 'black and white']))
def test_resized_as_by_torch(height, width, rows, columns, seed, kind):
    x = picture(height, width, seed, kind)
    assert torch.equal(by_c(x, (rows, columns)), by_torch(x, (rows, columns)))


@compiled
@pytest.mark.parametrize('before', [(1, 9), (9, 1), (1, 1), (2, 3000), (3000, 2), (5, 9000)])
@pytest.mark.parametrize('after', [(2, 2), (2, 500), (500, 2), (17, 16), (16, 17)])
def test_strange_shapes(before, after):
    x = picture(*before)
    assert torch.equal(by_c(x, after), by_torch(x, after))


@compiled
@settings(max_examples=200, deadline=None)
@given(box=st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 40), st.integers(1, 40)), size=st.tuples(st.integers(2, 60), st.integers(2, 60)),
       layout=st.sampled_from(['pixels', 'planes', 'flipped', 'every second', 'expanded', 'turned']))
def test_any_part_of_any_memory(box, size, layout):
    "Not only whole pictures whose channels lie side by side"
    left, top, width, height = box
    x = picture(70, 71).permute(2, 0, 1)
    x = {'pixels': lambda: x, 'planes': x.contiguous, 'flipped': lambda: x.flip(-1), 'every second': lambda: picture(140, 142).permute(2, 0, 1)[:, ::2, ::2],
         'expanded': lambda: x[:, :1].expand(3, 70, 71), 'turned': lambda: picture(71, 70).permute(2, 1, 0)}[layout]()
    part = x[:, top:top + height, left:left + width]
    if part.shape[1:] == size[::-1]: size = size[0] + 1, size[1]
    expected = by_torch(part.permute(1, 2, 0).contiguous(), size[::-1])
    assert torch.equal(resize_tensor(x, size, (left, top, left + width, top + height)), expected)
    out = torch.zeros(3, size[1], size[0], dtype=torch.uint8)
    assert resize_tensor(x, size, (left, top, left + width, top + height), out=out) is out and torch.equal(out, expected)


AT_THE_END = '''
import ctypes, mmap, sys
import numpy as np
from lamella.vision._pixels import resize
libc = ctypes.CDLL(None, use_errno=True)
for height, width, row in [(1, 4096 // 3, 4095), (4, 340, 1021), (5, 100, 300), (9, 7, 455), (2, 1, 3), (17, 33, 200), (40, 31, 93)]:
    size = (height - 1) * row + 3 * width
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(place + room), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0, ctypes.get_errno()
    whole = np.frombuffer(memory, np.uint8)[room - size:room]
    x = np.lib.stride_tricks.as_strided(whole, (height, width, 3), (row, 3, 1))
    x[:] = np.random.default_rng(0).integers(0, 256, x.shape)
    for after in ((2, 2), (9, 31), (64, 48)):
        beside, found = np.full((3, *after), 1, np.uint8), np.full(3 * after[0] * after[1] + 200, 0xA5, np.uint8)
        resize(x.copy(), beside)
        resize(x, found[100:-100].reshape(3, *after))
        assert (found[100:-100] == beside.reshape(-1)).all() and (found[:100] == 0xA5).all() and (found[-100:] == 0xA5).all()
    if sys.argv[1:]: whole.base[room] # must end the process
print('done')
'''

@compiled
@pytest.mark.skipif(sys.platform != 'linux', reason='mprotect, and the signal that tells')
def test_nothing_behind_the_picture_is_touched():
    "What ends with its page may have no page behind it: here there is one that may not even be read"
    done = subprocess.run([sys.executable, '-c', AT_THE_END], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, 'done\n'), done.stderr
    assert subprocess.run([sys.executable, '-c', AT_THE_END, 'read it'], capture_output=True).returncode == -signal.SIGSEGV


@compiled
def test_what_is_no_picture_is_an_error():
    resize, good, out = decoding.byte_resizer(), picture(8, 9).numpy(), np.zeros((3, 4, 5), np.uint8)
    resize(good, out)
    for wrong in (good[..., :2], good[:0], good[:, :0], good[0], good[:, ::2], good[::-1], good.astype(np.float32), good.view(np.int8), good.view(bool), good.transpose(2, 0, 1)):
        with pytest.raises(ValueError): resize(wrong, out)
    for wrong in (out[:2], out[:, :0], out[0], out.astype(np.int16), np.zeros((3, 4, 6), np.uint8)[..., :5]):
        with pytest.raises((ValueError, BufferError)): resize(good, wrong)
    out.flags.writeable = False
    with pytest.raises((ValueError, BufferError)): resize(good, out)
    with pytest.raises(TypeError): resize(good)
    with pytest.raises(TypeError): resize('text', np.zeros((3, 4, 5), np.uint8))


@compiled
@pytest.mark.parametrize('shape,size', [((3, 0, 5), (4, 4)), ((3, 5, 0), (4, 4)), ((3, 2, 2**20 + 1), (5, 3)), ((3, 2, 9), (2**20 + 1, 2)), ((4, 9, 9), (5, 5)), ((1, 9, 9), (5, 5))])
def test_what_is_not_for_it_ends_as_ever(shape, size, monkeypatch):
    "The same picture, or the same error"
    def end():
        try: return resize_tensor(torch.arange(math.prod(shape)).to(torch.uint8).view(shape), size)
        except Exception as error: return type(error), str(error)
    found = end()
    monkeypatch.setattr(decoding, 'byte_resizer', lambda: None)
    expected = end()
    assert found == expected if isinstance(expected, tuple) else torch.equal(found, expected)


@pytest.mark.parametrize('out', [torch.zeros(3, 4, 6), torch.zeros(3, 6, 4, dtype=torch.uint8).transpose(1, 2), torch.zeros(2, 3, 4, 6, dtype=torch.int64)])
def test_into_memory_of_another_kind(out):
    x = picture(9, 9).permute(2, 0, 1)
    assert resize_tensor(x, (6, 4), out=out) is out and torch.equal(out, resize_tensor(x, (6, 4)).to(out.dtype).expand(out.shape))


def test_into_memory_of_another_size():
    with pytest.raises(RuntimeError, match='size'): resize_tensor(picture(9, 9).permute(2, 0, 1), (5, 3), out=torch.zeros(3, 4, 7, dtype=torch.uint8))


@compiled
def test_many_threads_at_once():
    sizes = [(20 + k, 90 - k) for k in range(32)] * 4
    x = picture(70, 71)
    with ThreadPoolExecutor(8) as pool: found = list(pool.map(lambda size: by_c(x, size), sizes))
    assert all(torch.equal(o, by_torch(x, size)) for o, size in zip(found, sizes))


@compiled
def test_another_pytorch_is_followed(monkeypatch):
    "Where PyTorch rounds in another way, or the processor makes it take another one, its way is taken"
    module = type(sys)('lamella.vision._pixels')
    def resize(x, out): out[:] = 0
    module.resize = resize
    monkeypatch.setitem(sys.modules, 'lamella.vision._pixels', module)
    assert decoding.byte_resizer.__wrapped__() is None


def all_ways():
    "Images on every way to fewer pixels"
    rng = np.random.default_rng(0)
    for size in ((80, 60), (33, 91)):
        for mode in ('RGB', 'L'):
            im = PILImage.create(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8), mode=mode)
            for tfm in (Resize(24), Resize((30, 20), method='squish'), Resize(200, method='pad'), RandomResizedCrop(32)):
                random.seed(1)
                yield np.asarray(tfm(im, 0))
        yield np.asarray(im.resize_part((20, 20), resample=3))


def test_the_same_without(monkeypatch):
    found = list(all_ways())
    monkeypatch.setattr(decoding, 'byte_resizer', lambda: None)
    assert all(np.array_equal(a, b) for a, b in zip(found, all_ways(), strict=True))


# ---- floats

def floats_of(x, *tfms):
    "The images of bytes after batch transforms"
    return Pipeline([IntToFloatTensor(), *tfms])(TensorImage(x.clone()))


@compiled
@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 9), channels=st.sampled_from([1, 3, 4]), h=st.integers(1, 40), w=st.integers(1, 40), normal=st.booleans())
def test_floats_as_by_numpy(n, channels, h, w, normal):
    x = torch.randint(0, 256, (n, channels, h, w), dtype=torch.uint8)
    stats = [[0.3, 0.4, 0.5, 0.6][:channels], [0.2, 0.1, 0.3, 0.25][:channels]]
    tfms = [Normalize.from_stats(*stats, cuda=False)] * normal
    found = floats_of(x, *tfms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, 'byte_writer', lambda: None)
        expected = floats_of(x, *tfms)
    assert torch.equal(found, expected) and found.dtype == torch.float32


@compiled
@pytest.mark.parametrize('scale', [0.25, torch.rand(3, 1, 1), torch.rand(1, 3, 1, 1), torch.rand(5, 1, 1, 1), torch.rand(5, 3, 1, 1), torch.rand(1), torch.rand(8), torch.rand(5, 3, 7, 8), torch.rand(7, 1), torch.tensor(0.5), torch.rand(1, 1, 1, 1), torch.rand(3, 1, 1).half(), torch.rand(1).expand(5, 3, 1, 1)])
@pytest.mark.parametrize('shift', [0., -0.7, torch.rand(3, 1, 1), torch.rand(7, 8)])
def test_numbers_of_any_shape(scale, shift, monkeypatch):
    "One for all, one a channel, one an image, one a pixel"
    x = torch.randint(0, 256, (5, 3, 7, 8), dtype=torch.uint8)
    found = []
    for writer in (pixels.byte_writer, lambda: None):
        monkeypatch.setattr(pixels, 'byte_writer', writer)
        px = Pixels(x)
        px.linear(scale, shift)
        px.write(out := torch.full((5, 3, 7, 8), float('nan')))
        found.append(out)
    assert torch.equal(*found)


@compiled
@pytest.mark.parametrize('begin', range(9))
def test_floats_at_any_place_in_memory(begin):
    "Vectors of 32 bytes begin where they can"
    write = pixels.byte_writer()
    for n in (0, 1, 7, 8, 9, 31, 33, 1000):
        x, room = np.arange(2 * n, dtype=np.uint8), np.full(2 * n + 64, np.nan, np.float32)
        write(x, np.array([0.5, 2], np.float32), np.array([1, -1], np.float32), room[begin:begin + 2 * n])
        assert np.array_equal(room[begin:begin + 2 * n], np.concatenate([x[:n] * np.float32(0.5) + 1, x[n:] * np.float32(2) - 1]))
        assert np.isnan(room[:begin]).all() and np.isnan(room[begin + 2 * n:]).all()


@compiled
def test_sizes_that_do_not_fit_are_an_error():
    write, x, one = pixels.byte_writer(), np.zeros(12, np.uint8), np.ones(3, np.float32)
    for args in ((x, one, one, np.zeros(11, np.float32)), (x, one, one[:2], np.zeros(12, np.float32)), (x[:11], one, one, np.zeros(11, np.float32)), (x, one[:0], one[:0], np.zeros(12, np.float32))):
        with pytest.raises(ValueError, match='fit together'): write(*args)


@compiled
def test_normalize_goes_this_way_too(monkeypatch):
    "Bytes are not made floats before they are written"
    calls, write = [], pixels.byte_writer()
    monkeypatch.setattr(pixels, 'byte_writer', lambda: lambda *args: (calls.append(1), write(*args))[1])
    floats_of(torch.zeros(4, 3, 9, 9, dtype=torch.uint8), Normalize.from_stats(*imagenet_stats, cuda=False))
    assert calls


@compiled
def test_a_compiler_that_rounds_once_is_found_out(monkeypatch):
    "A product and a sum in one step differ in the last bit from NumPy's two"
    module = type(sys)('lamella.vision._pixels')
    def floats(x, scale, shift, out): out[:] = (x.astype(np.float64) * scale + shift).astype(np.float32)
    module.floats = floats
    monkeypatch.setitem(sys.modules, 'lamella.vision._pixels', module)
    assert pixels.byte_writer.__wrapped__() is None


def test_a_batch_through_normalize(without):
    x = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    mean, std = (torch.tensor(o).view(3, 1, 1) for o in imagenet_stats)
    assert (floats_of(x, Normalize.from_stats(*imagenet_stats, cuda=False)) - (x / 255 - mean) / std).abs().max() < 1e-5
