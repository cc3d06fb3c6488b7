"""Images of bytes on a CPU are sampled by `_sampling.c`: as the grid says, whatever the matrices, and only where that is the same."""
import random
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import lamella.vision.sampling as sampling
from hypothesis import given, settings
from hypothesis import strategies as st
from lamella.data.pipeline import Pipeline
from lamella.vision.all import Flip, IntToFloatTensor, Normalize, Rotate, TensorImage, TensorMask, Warp, Zoom, aug_transforms, imagenet_stats, set_seed
from lamella.vision.pixels import Pixels
from lamella.vision.sampling import Sampling

compiled = pytest.mark.skipif(sampling.byte_sampler() is None, reason='lamella was installed without a C compiler that knows vectors')


def smooth(n, c, h, w, seed=0):
    "Bytes, each near its neighbours, so that a small error of the place is a small one of the value"
    noise = torch.rand(n, c, max(2, h // 4), max(2, w // 4), generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(noise, (h, w), mode='bicubic').clamp(0, 1) * 255).round().to(torch.uint8)


def exactly(x, matrix, size, pad_mode, align):
    "In 64 bits, with a grid of pairs"
    def axis(n): return torch.linspace(-1, 1, n, dtype=torch.float64) * (1 if align else 1 - 1 / n)
    points = torch.stack([axis(size[1])[None].expand(size), axis(size[0])[:, None].expand(size), torch.ones(size, dtype=torch.float64)], -1)
    moved = torch.einsum('nij,hwj->nhwi', matrix, points)
    return F.grid_sample(x.double(), moved[..., :2] / moved[..., 2:], mode='bilinear', padding_mode=pad_mode, align_corners=align)


def done(x, matrix, **kwargs):
    "The images after the step, and whether it was done from bytes"
    px = Pixels(x)
    Sampling(matrix, **kwargs).image(px, slice(0, len(x)))
    return px.y


@compiled
@settings(max_examples=150, deadline=None)
@given(channels=st.integers(1, 4), h=st.integers(2, 40), w=st.integers(2, 40), rows=st.integers(2, 40), columns=st.integers(2, 40), seed=st.integers(0, 10**6),
       pad_mode=st.sampled_from(['reflection', 'border']), align=st.booleans(), bend=st.booleans())
def test_as_the_grid_says(channels, h, w, rows, columns, seed, pad_mode, align, bend):
    torch.manual_seed(seed)
    x = smooth(3, channels, h, w, seed)
    matrix = torch.eye(3, dtype=torch.float64) + torch.randn(3, 3, 3, dtype=torch.float64) * 0.4
    matrix[:, 2] = torch.tensor([0., 0., 1.]) + torch.rand(3, 3) * bend * torch.tensor([0.3, -0.3, 0.])
    native = torch.empty(3, channels, rows, columns)
    sampling.byte_sampler()(x.numpy(), tuple(x.shape), matrix.numpy(), native.numpy(), (rows, columns), pad_mode == 'reflection', align)
    assert (native - exactly(x, matrix, (rows, columns), pad_mode, align)).abs().max() < 0.1


@compiled
def test_nothing_moves_nothing():
    x = torch.randint(0, 256, (5, 3, 31, 47), dtype=torch.uint8)
    for align in (True, False):
        found = done(x, torch.eye(3, dtype=torch.float64).expand(5, 3, 3), align_corners=align)
        assert (found - x.float()).abs().max() < 1e-3
    mirrored = torch.diag(torch.tensor([-1., 1., 1.], dtype=torch.float64)).expand(5, 3, 3)
    assert (done(x, mirrored) - x.flip(-1).float()).abs().max() < 1e-2


@pytest.mark.parametrize('tfms', [aug_transforms(mult=2), aug_transforms(mult=2, pad_mode='border'), aug_transforms(size=40), [Warp(p=1.), Zoom(p=1.)], [Rotate(p=1., pad_mode='zeros')], [Rotate(p=1., mode='nearest')],
                                  [Flip(p=1.)], aug_transforms(align_corners=False)])
@pytest.mark.parametrize('floats', [True, False])
def test_transforms_are_the_same_with_and_without(tfms, floats, monkeypatch):
    "Of a batch with its mask: whole numbers, and from 0 to 1"
    x, mask = TensorImage(smooth(9, 3, 48, 64)), TensorMask(torch.randint(0, 5, (9, 48, 64)))
    pipeline = Pipeline([*tfms, *([IntToFloatTensor(), Normalize.from_stats(*imagenet_stats, cuda=False)] if floats else [])]).for_split(0)
    calls, sample = [], sampling.byte_sampler()
    if sample is not None: monkeypatch.setattr(sampling, 'byte_sampler', lambda: lambda *args: (calls.append(1), sample(*args))[1])
    set_seed(3)
    found = pipeline((x, mask))
    options = [getattr(f, 'pad_mode', None) for f in tfms], [getattr(f, 'mode', None) for f in tfms]
    if sample is not None and 'zeros' not in options[0] and 'nearest' not in options[1]: assert calls
    monkeypatch.setattr(sampling, 'byte_sampler', lambda: None)
    set_seed(3)
    expected = pipeline((x, mask))
    assert found[0].dtype == expected[0].dtype and torch.equal(found[1], expected[1])
    assert (found[0].float() - expected[0].float()).abs().max() <= (0.01 if floats else 1)


@compiled
def test_only_where_it_is_the_same(monkeypatch):
    "Floats, fewer pixels, other ways to sample, what reaches into nothing, functions of the grid, five channels: those are PyTorch's"
    calls, sample = [], sampling.byte_sampler()
    monkeypatch.setattr(sampling, 'byte_sampler', lambda: lambda *args: (calls.append(1), sample(*args))[1])
    x, matrix = smooth(2, 3, 40, 40), torch.eye(3, dtype=torch.float64).expand(2, 3, 3) * torch.tensor([0.9, 0.9, 1.], dtype=torch.float64)
    for images, options in ((x.float(), {}), (x.to(torch.uint16), {}), (x, {'size': (8, 8)}), (x, {'mode': 'nearest'}), (x, {'mode': 'bicubic'}), (x, {'pad_mode': 'zeros'}), (x, {'coord_fs': [lambda grid: grid]}),
                            (smooth(2, 5, 40, 40), {}), (x.transpose(2, 3), {})): done(images, matrix, **options)
    assert not calls
    done(x, matrix)
    assert calls


@compiled
def test_matrices_that_make_no_sense_stay_within_the_image():
    weird, rng = [float('nan'), float('inf'), -float('inf'), 1e300, -1e38, 1e-320, 0., 1e9], random.Random(0)
    sample = sampling.byte_sampler()
    for _ in range(2000):
        n, c, h, w, rows, columns = rng.randint(0, 3), rng.randint(1, 4), rng.randint(1, 20), rng.randint(1, 20), rng.randint(1, 20), rng.randint(1, 20)
        numbers = [rng.choice(weird) if rng.random() < 0.2 else rng.gauss(0, 10) for _ in range(9 * n)]
        out = bytearray(4 * n * c * rows * columns)
        sample(bytes([200]) * (n * c * h * w), (n, c, h, w), struct.pack(f'{9 * n}d', *numbers), out, (rows, columns), rng.random() < 0.5, rng.random() < 0.5)
        assert all(abs(o - 200) < 0.01 for o in struct.unpack(f'{n * c * rows * columns}f', out))


@compiled
@pytest.mark.parametrize('shape, sizes, size', [((1, 3, 2, 2), (11, 72, 48), (2, 2)), ((1, 3, 2, 2), (12, 71, 48), (2, 2)), ((1, 3, 2, 2), (12, 72, 47), (2, 2)), ((1, 5, 2, 2), (20, 72, 80), (2, 2)),
    ((1, 0, 2, 2), (0, 72, 0), (2, 2)), ((-1, 3, 2, 2), (12, 72, 48), (2, 2)), ((1, 3, 0, 2), (0, 72, 48), (2, 2)), ((1, 1, 40000, 1), (40000, 72, 16), (2, 2)), ((1, 1, 2, 2), (4, 72, 160000), (1, 40000))])
def test_sizes_that_do_not_fit_together_are_an_error(shape, sizes, size):
    with pytest.raises(ValueError, match='sizes'): sampling.byte_sampler()(bytes(sizes[0]), shape, bytes(sizes[1]), bytearray(sizes[2]), size, True, True)


@compiled
def test_many_threads_at_once():
    x = smooth(8, 3, 64, 64)
    matrix = torch.eye(3, dtype=torch.float64).expand(8, 3, 3) * torch.tensor([0.7, 0.8, 1.], dtype=torch.float64)
    expected = done(x, matrix)
    with ThreadPoolExecutor(8) as pool: assert all(torch.equal(o, expected) for o in pool.map(lambda _: done(x, matrix), range(64)))


def test_very_wide_images_are_pytorch_s():
    "As without"
    x = TensorImage(torch.randint(0, 256, (2, 1, 4, 40000), dtype=torch.uint8))
    assert torch.equal(torch.as_tensor(Flip(p=1.)(x, split_idx=0)), torch.as_tensor(x).flip(-1))
    assert done(smooth(1, 3, 4, 50), torch.eye(3, dtype=torch.float64)[None], size=(4, 40000)).shape == (1, 3, 4, 40000)


def test_what_is_wrong_is_told_as_without(monkeypatch):
    x = TensorImage(smooth(2, 3, 20, 20))
    for sampler in (sampling.byte_sampler(), None):
        monkeypatch.setattr(sampling, 'byte_sampler', lambda sampler=sampler: sampler)
        with pytest.raises(ValueError, match='NaN'): Rotate(p=1., draw=float('nan'))(x, split_idx=0)
        with pytest.raises(ValueError, match='padding'): done(smooth(2, 3, 20, 20), torch.eye(3, dtype=torch.float64).expand(2, 3, 3), pad_mode='reflect')
