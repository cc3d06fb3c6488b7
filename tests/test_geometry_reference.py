"""Geometry against slow references with 64 bits: where does this pixel come from, where does this point go."""
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from lamella.base.seeds import no_random
from lamella.data.pipeline import Pipeline
from lamella.data.types import plain
from lamella.vision.augment import RandomResizedCropGPU
from lamella.vision.batch import IntToFloatTensor, Normalize
from lamella.vision.geometry import AffineCoordTfm, DeterministicDihedral, DeterministicDraw, DeterministicFlip, Dihedral, Flip, Rotate, Warp, Zoom
from lamella.vision.points import TensorBBox, TensorPoint
from lamella.vision.transforms import CropPad, DihedralItem, FlipItem, RandomCrop, RandomResizedCrop, RatioResize, Resize
from lamella.vision.types import PILImage, PILMask, TensorImage, TensorMask

H, W, N = 13, 17, 3
PADS = 'zeros', 'border', 'reflection'
# The grid has 24 bits: a coordinate is wrong by about 17 pixels * 2^-23, and noise from 0 to 1 changes by at most 1 a pixel.
PIXEL, COORDINATE = 1e-4, 1e-5


# The references: one pixel, one point at a time

def to_pixel(u: float, n: int, align: bool) -> float:
    "From -1..1 to the number of a pixel (its middle)"
    return (u + 1) / 2 * (n - 1) if align else ((u + 1) * n - 1) / 2

def to_grid(i: float, n: int, align: bool) -> float:
    "The way back"
    return 2 * i / (n - 1) - 1 if align else (2 * i + 1) / n - 1

def inside(v: float, n: int, pad: str, align: bool) -> float:
    "The place in the image for a place outside of it"
    if pad == 'zeros': return v
    if pad == 'reflection':
        low, span = (0, n - 1) if align else (-0.5, n)
        v = abs(v - low) % (2 * span)
        v = low + (2 * span - v if v > span else v)
    return min(max(v, 0), n - 1)

def pixel(im: np.ndarray, i: int, j: int):
    "Nothing is outside"
    return im[..., i, j] if 0 <= i < im.shape[-2] and 0 <= j < im.shape[-1] else 0 * im[..., 0, 0]

def value_at(im: np.ndarray, x: float, y: float, nearest: bool):
    "What is at a place between the pixels"
    if nearest: return pixel(im, round(y), round(x))
    j, i = math.floor(x), math.floor(y)
    return sum(pixel(im, i + di, j + dj) * (1 - abs(x - j - dj)) * (1 - abs(y - i - di)) for di in (0, 1) for dj in (0, 1))

def source_of(matrix: np.ndarray, i: int, j: int, size: tuple, before: tuple, pad: str, align: bool) -> tuple[float, float]:
    "Where pixel (i, j) of the result comes from, as pixel numbers (x, y)"
    x, y, z = matrix @ [to_grid(j, size[1], align), to_grid(i, size[0], align), 1]
    return inside(to_pixel(x / z, before[1], align), before[1], pad, align), inside(to_pixel(y / z, before[0], align), before[0], pad, align)

def sampled(im: np.ndarray, matrix: np.ndarray, size: tuple, pad: str, align: bool, nearest: bool = False) -> tuple[np.ndarray, np.ndarray]:
    "The result, and which of its pixels a rounding error could change (of those taken as they are)"
    out, unsure = np.zeros((*im.shape[:-2], *size)), np.zeros(size, dtype=bool)
    for i, j in itertools.product(*map(range, size)):
        x, y = source_of(matrix, i, j, size, im.shape[-2:], pad, align)
        out[..., i, j] = value_at(im, x, y, nearest)
        unsure[i, j] = nearest and any(abs(v % 1 - 0.5) < 1e-3 for v in (x, y))
    return out, unsure

def moved(p: np.ndarray, matrix: np.ndarray, size: tuple, before: tuple, align: bool) -> np.ndarray:
    "Where a point goes, both from -1 to 1 between the edges"
    grid = [to_grid((u + 1) / 2 * n - 0.5, n, align) for u, n in zip(p, before[::-1])] # the middle of the first pixel is half a pixel from the edge
    x, y, z = np.linalg.solve(matrix, [*grid, 1])
    return np.array([(to_pixel(v / z, n, align) + 0.5) / n * 2 - 1 for v, n in zip((x, y), size[::-1])])

def moved_box(b: np.ndarray, *args) -> np.ndarray:
    "The smallest box around four corners, cut off at the edges; zeros if nothing is left"
    corners = np.array([moved(np.array(p), *args) for p in itertools.product(b[[0, 2]], b[[1, 3]])])
    box = np.clip([*corners.min(0), *corners.max(0)], -1, 1)
    return box if box[2] > box[0] and box[3] > box[1] else np.zeros(4)


# Matrices, written out

def about(m, h=H, w=W):
    "A matrix of pixels, in coordinates that go from -1 to 1 in both directions"
    return np.array([[m[0][0], m[0][1] * h / w, m[0][2]], [m[1][0] * w / h, m[1][1], m[1][2]], [0, 0, 1]], dtype=np.float64)

def turn(degrees: float):
    t = np.deg2rad(degrees)
    return about([[np.cos(t), np.sin(t), 0], [-np.sin(t), np.cos(t), 0]])

def zoom(s: float, x: float, y: float): return about([[1 / s, 0, (1 - 1 / s) * (2 * x - 1)], [0, 1 / s, (1 - 1 / s) * (2 * y - 1)]])

def warp(x: float, y: float):
    "The perspective that moves the corners: eight equations"
    corners = list(itertools.product((-1, 1), (-1, 1)))
    targets = [(a - a * b * y, b - a * b * x) for a, b in corners]
    rows = [r for (a, b), (u, v) in zip(corners, targets) for r in ([u, v, 1, 0, 0, 0, -a * u, -a * v], [0, 0, 0, u, v, 1, -b * u, -b * v])]
    return np.append(np.linalg.solve(np.array(rows, dtype=np.float64), np.array(corners, dtype=np.float64).reshape(-1)), 1).reshape(3, 3)

def eighth(k: int):
    "Which of x and y, and which signs"
    return about([[(1, 0), (-1, 0), (1, 0), (0, -1), (-1, 0), (0, 1), (0, 1), (0, -1)][k] + (0,), [(0, 1), (0, 1), (0, -1), (1, 0), (0, -1), (-1, 0), (1, 0), (-1, 0)][k] + (0,)])

CASES = {
    'flip': (lambda **o: Flip(p=1., draw=[1, 0, 1], **o), lambda i: np.diag([1. if i == 1 else -1., 1, 1])),
    'dihedral': (lambda **o: Dihedral(p=1., draw=[3, 6, 5], **o), lambda i: eighth((3, 6, 5)[i])),
    'rotate': (lambda **o: Rotate(p=1., draw=[25., -40., 170.], **o), lambda i: turn((25., -40., 170.)[i])),
    'zoom': (lambda **o: Zoom(p=1., draw=[1.3, 0.8, 1.87], draw_x=[0.1, 0.9, 0.5], draw_y=[0.8, 0.2, 1.], **o), lambda i: zoom((1.3, 0.8, 1.87)[i], (0.1, 0.9, 0.5)[i], (0.8, 0.2, 1.)[i])),
    'warp': (lambda **o: Warp(p=1., draw_x=[0.2, -0.1, 0.], draw_y=[-0.1, 0.3, 0.2], **o), lambda i: warp((0.2, -0.1, 0.)[i], (-0.1, 0.3, 0.2)[i])),
}
RUNS = [*((k,) for k in CASES), ('flip', 'warp', 'rotate', 'zoom'), ('rotate', 'flip'), ('dihedral', 'zoom', 'warp'), ('rotate', 'rotate', 'zoom', 'dihedral', 'flip')]

@pytest.fixture
def batch():
    return make_batch()

def make_batch(h=H, w=W, n=N, seed=0):
    "Noise, a mask, points and boxes of which some are outside"
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-1.2, 1, (n, 5, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.1, 1, (n, 5, 2))], -1)
    boxes[:, -1] = 0 # fills up
    return (TensorImage(torch.from_numpy(rng.random((n, 2, h, w))).float()), TensorMask(torch.from_numpy(rng.integers(0, 9, (n, h, w)))),
            TensorPoint(torch.from_numpy(rng.uniform(-1.2, 1.2, (n, 6, 2))).float()), TensorBBox(torch.from_numpy(boxes).float()))

def check(result, batch, matrices, size, pad, align):
    "Every value of the batch against the references"
    before = tuple(batch[0].shape[-2:])
    image, mask, points, boxes = (np.asarray(plain(o), dtype=np.float64) for o in batch)
    for i, matrix in enumerate(matrices):
        assert np.abs(result[0][i].numpy() - sampled(image[i], matrix, size, pad, align)[0]).max() < PIXEL
        wanted, unsure = sampled(mask[i], matrix, size, pad, align, nearest=True)
        assert ((result[1][i].numpy() == wanted) | unsure).all() and unsure.mean() < 0.2
        args = matrix, size, before, align
        assert np.abs(result[2][i].numpy() - [moved(p, *args) for p in points[i]]).max() < COORDINATE * 10 # points may be far outside
        assert np.abs(result[3][i].numpy() - [moved_box(b, *args) for b in boxes[i]]).max() < COORDINATE


@pytest.mark.parametrize('align', [True, False])
@pytest.mark.parametrize('pad', PADS)
@pytest.mark.parametrize('run', RUNS, ids='+'.join)
def test_transforms(batch, run, pad, align):
    "Alone and composed: image, mask, points and boxes"
    fs = [CASES[name][0](pad_mode=pad, align_corners=align) for name in run]
    matrices = [np.linalg.multi_dot([np.eye(3), *(CASES[name][1](i) for name in run)]) for i in range(N)]
    result = Pipeline(fs, 0)(batch)
    assert [type(o) for o in result] == [type(o) for o in batch]
    check(result, batch, matrices, (H, W), pad, align)


@pytest.mark.parametrize('align', [True, False])
@pytest.mark.parametrize('size', [(13, 9), (20, 31), (8, 17)])
def test_to_another_size(batch, size, align):
    "Each transform corrects the aspect of the size before it; the last size counts"
    fs = [Rotate(p=1., draw=30., align_corners=align), Flip(p=1., draw=1., size=size, align_corners=align)]
    check(Pipeline(fs, 0)(batch), batch, [turn(30.) @ np.diag([-1., 1, 1])] * N, size, 'reflection', align)
    check(Pipeline(fs, 1)(batch), batch, [np.eye(3)] * N, size, 'reflection', align)


@pytest.mark.parametrize('align', [True, False])
def test_two_samplings(batch, align):
    "Transforms that sample in different ways are done one after another; points too"
    fs = [Rotate(p=1., draw=10., size=(11, 19), align_corners=align), Zoom(p=1., draw=1.5, draw_x=0.2, draw_y=0.9, pad_mode='zeros', align_corners=align)]
    result, middle = Pipeline(fs, 0)(batch), fs[0](batch, 0)
    check(middle, batch, [turn(10.)] * N, (11, 19), 'reflection', align)
    check(result, middle, [zoom(1.5, 0.2, 0.9)] * N, (11, 19), 'zeros', align)


numbers = st.floats(-1, 1, allow_nan=False, width=32)

@settings(deadline=None, max_examples=25)
@given(st.lists(numbers, min_size=6, max_size=6), st.integers(5, 12), st.integers(5, 12), st.sampled_from(PADS), st.booleans())
def test_any_matrix(values, h, w, pad, align):
    "Affine matrices that are not singular"
    m = np.array(values).reshape(2, 3) * 0.6 + [[1, 0, 0.0137], [0, 1, 0.0137]] # a shift of just half a pixel leaves the nearest one open
    if abs(np.linalg.det(m[:, :2])) < 0.1: return
    batch = make_batch(h, w, n=1)
    matrix = torch.from_numpy(np.vstack([m, [0, 0, 1]]))[None]
    result = AffineCoordTfm(lambda x: matrix, pad_mode=pad, align_corners=align)(batch, 0)
    check(result, batch, [about(m, h, w)], (h, w), pad, align)


def test_functions_of_the_grid(batch):
    "What no matrix can do: points are asked for with invert=True"
    def bend(grid, invert=False): return torch.stack([grid[..., 0] + (-1 if invert else 1) * 0.2 * grid[..., 1] ** 2, grid[..., 1]], -1)
    result = AffineCoordTfm(lambda x: torch.from_numpy(turn(20.)).expand(N, 3, 3) * torch.tensor([[1, W / H, 1], [H / W, 1, 1], [1, 1, 1]]), bend, align_corners=False)(batch, 0)
    for p, q in zip(batch[2][0].tolist(), result[2][0].double().numpy()):
        x, y, _ = turn(20.) @ [*q, 1]
        assert abs(x + 0.2 * y ** 2 - p[0]) < 1e-4 and abs(y - p[1]) < 1e-4
    with pytest.raises(TypeError, match='invert=False'): AffineCoordTfm(coord_fs=lambda grid: grid)(batch, 0)
    assert AffineCoordTfm(coord_fs=lambda grid: grid)(batch[0], 0).shape == batch[0].shape # without points nobody asks


# A bright spot goes where its point goes

def spot(h: int, w: int, x: float, y: float, width: float = 1.5) -> np.ndarray:
    "A soft spot whose middle is at (x, y) in pixels, counted from the edges"
    rows, columns = np.mgrid[:h, :w] + 0.5
    return np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 2 / width ** 2)

def middle(im) -> np.ndarray:
    "Where a spot is, from -1 to 1"
    a = np.asarray(im, dtype=np.float64)
    rows, columns = np.mgrid[:a.shape[0], :a.shape[1]] + 0.5
    return np.array([(a * columns).sum() / a.sum() / a.shape[1] * 2 - 1, (a * rows).sum() / a.sum() / a.shape[0] * 2 - 1])

def marked(h=64, w=96, at=(60., 22.), width=1.5):
    "An image with a spot, the mask and the box of it, and its point"
    im = spot(h, w, *at, width)
    scaled = torch.tensor([[[2 * at[0] / w - 1, 2 * at[1] / h - 1]]], dtype=torch.float32)
    return TensorImage(torch.from_numpy(im).float()[None, None]), TensorMask(torch.from_numpy(im > 0.1).long()[None]), TensorPoint(scaled)

SMALL = [lambda **o: Flip(p=1., **o), lambda **o: Rotate(p=1., draw=20., **o), lambda **o: Zoom(p=1., draw=1.2, draw_x=0.3, draw_y=0.6, **o), lambda **o: Warp(p=1., draw_x=0.1, draw_y=-0.1, **o),
         lambda **o: Dihedral(p=1., draw=4, **o), lambda **o: RandomResizedCropGPU(o.pop('size', None), min_scale=0.6, **o)]

@pytest.mark.parametrize('align', [True, False])
@pytest.mark.parametrize('size', [None, (64, 64), (120, 100), (20, 28)], ids=str)
@pytest.mark.parametrize('make', SMALL)
def test_a_spot_and_its_point(make, size, align):
    "Also when the image is averaged down first, which changes where the middle of its outermost pixels is"
    f = make(size=size, pad_mode='zeros', align_corners=align)
    with no_random(3): image, mask, point = f(marked(), 0)
    pixels = (torch.tensor(image.shape[:1:-1]) / 2).numpy() # pixels a unit
    if abs(plain(point)).max() > 0.8: pytest.skip('the spot is cut off')
    difference = np.abs((middle(plain(image)[0, 0]) - plain(point)[0, 0].numpy()) * pixels)
    assert difference.max() < 0.08 # a warp changes its shape a little
    assert np.abs((middle(plain(mask)[0]) - plain(point)[0, 0].numpy()) * pixels).max() < 0.6 # whole pixels


@pytest.mark.parametrize('align', [True, False])
def test_a_spot_averaged_down(align):
    "256 pixels made 16 of: averaged to 32 first, whose outermost pixels have another middle, 0.1 pixels of the result away"
    image, _, point = Flip(p=1., size=16, pad_mode='zeros', align_corners=align)(marked(256, 256, (60., 70.), 14.), 0)
    assert image.shape[-2:] == (16, 16)
    assert np.abs(middle(plain(image)[0, 0]) - plain(point)[0, 0].numpy()).max() * 8 < 0.04


# fastai's results for the same numbers

def fastai_batch(batch):
    from fastai.vision.all import TensorBBox as FBox, TensorImage as FImage, TensorMask as FMask, TensorPoint as FPoint
    return tuple(kind(plain(o).clone()) for kind, o in zip((FImage, FMask, FPoint, FBox), batch))

FASTAI = {'flip': ('Flip', dict(draw=[1, 0, 1])), 'rotate': ('Rotate', dict(draw=[25., -40., 170.])), 'dihedral': ('Dihedral', dict(draw=[3, 6, 5])),
          'zoom': ('Zoom', dict(draw=[1.3, 0.8, 1.87], draw_x=[0.1, 0.9, 0.5], draw_y=[0.8, 0.2, 1.])), 'warp': ('Warp', dict(draw_x=[0.2, -0.1, 0.], draw_y=[-0.1, 0.3, 0.2]))}

@pytest.mark.parametrize('align', [True, False])
@pytest.mark.parametrize('pad', PADS)
@pytest.mark.parametrize('name', list(CASES))
def test_as_fastai(name, pad, align):
    """The same pictures. Its points are those of `align_corners=False`, whatever that is: with `True` they are half a pixel beside the picture at its edge,
    which is 1/W here. It neither cuts off boxes nor corrects the aspect of a warp (it needs none); it corrects that of points by their shape (n, 2), so the picture is square."""
    fv = pytest.importorskip('fastai.vision.all')
    batch = make_batch(h=16, w=16, seed=1)
    kind, draws = FASTAI[name]
    theirs = fastai_batch(batch)
    f = getattr(fv, kind)(p=1., pad_mode=pad, align_corners=align, **draws)
    wanted = f(theirs[:2], split_idx=0)
    ours = getattr(__import__('lamella.vision.geometry', fromlist=[kind]), kind)(p=1., pad_mode=pad, align_corners=align, **draws)(batch, 0)
    assert np.abs(ours[0].numpy() - wanted[0].numpy()).max() < 2e-3 # fastai's matrices have 24 bits, and those of a warp are solved for
    assert (ours[1].numpy() == wanted[1].numpy()).mean() > 0.97     # pixels at the border of two
    places = f((theirs[0], theirs[2].clone(), theirs[3].clone()), split_idx=0)[1:]
    near = 1e-4 if not align else 3 / 16
    assert np.abs(ours[2].numpy() - places[0].numpy()).max() < near * (1 if not align else 2)
    real = ~ours[3].empty().numpy()
    assert np.abs(ours[3].numpy() - places[1].numpy().clip(-1, 1))[real].max() < near


def test_deterministic_draws():
    x = TensorImage(torch.rand(2, 3, 8, 8))
    flip, eight, draw = DeterministicFlip(), DeterministicDihedral(), DeterministicDraw([3, 5])
    for k in range(4): torch.testing.assert_close(plain(flip(x, 0)), plain(x.flip(-1) if k % 2 else x), atol=1e-5, rtol=0)
    for k in [*range(8), 0, 1]: torch.testing.assert_close(plain(eight(x, 0)), plain(x.dihedral(k)), atol=1e-5, rtol=0)
    assert [draw(x).tolist() for _ in range(3)] == [[3, 3], [5, 5], [3, 3]]


def test_colours_leave_points_alone(batch):
    before = [plain(o).clone() for o in batch]
    result = Pipeline([IntToFloatTensor(), Normalize.from_stats([0.5, 0.5], [0.2, 0.2])], 0)((batch[0], batch[2], batch[3]))
    assert torch.equal(plain(result[1]), before[2])
    torch.testing.assert_close(plain(result[2]), plain(TensorBBox(before[3]).clipped()))


# Transforms of one sample

def photo(w=90, h=61, seed=0):
    return PILImage(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)))

def resized_in_floats(im, size, box):
    "PIL's resize of each channel of a part, with floats in place of bytes"
    part = np.asarray(im.crop(box)).transpose(2, 0, 1).astype(np.float32)
    return np.stack([np.asarray(Image.fromarray(c).resize(size, Image.Resampling.BILINEAR)) for c in part])

def wanted_resize(im, f, method, size, pad_mode):
    "The part, in floats, and what is beside it"
    (w, h), (tw, th) = im.size, size
    if method == 'squish': return resized_in_floats(im, size, (0, 0, w, h))
    if method == 'crop':
        scale = min(w / tw, h / th)
        pw, ph = int(scale * tw), int(scale * th)
        left, top = int(f.pcts[0] * (w - pw)), int(f.pcts[1] * (h - ph))
        return resized_in_floats(im, size, (left, top, left + pw, top + ph))
    scale = max(w / tw, h / th)
    inner = round(w / scale), round(h / scale)
    left, top = (round(p * (s - i)) for p, s, i in zip(f.pcts, size, inner))
    mode = {'zeros': 'constant', 'border': 'edge', 'reflection': 'reflect'}[pad_mode]
    return np.pad(resized_in_floats(im, inner, (0, 0, w, h)), [(0, 0), (top, th - inner[1] - top), (left, tw - inner[0] - left)], mode=mode)

@pytest.mark.parametrize('split_idx', [0, 1])
@pytest.mark.parametrize('size', [(40, 40), (32, 50), (70, 100)])
@pytest.mark.parametrize('method, pad_mode', [('squish', 'zeros'), ('crop', 'zeros'), *(('pad', mode) for mode in PADS)])
def test_resize(method, pad_mode, size, split_idx):
    "Against PIL with floats: bytes are rounded after each direction, 1 at most; floats of five channels exactly"
    im, f = photo(), Resize(size, method, pad_mode)
    many = TensorImage(torch.from_numpy(np.array(im)).permute(2, 0, 1).float()[[0, 1, 2, 1, 0]] / 255)
    a, b, c = f((im, many, TensorImage(torch.from_numpy(np.array(im)).permute(2, 0, 1).contiguous())), split_idx)
    wanted = wanted_resize(im, f, method, size[::-1], pad_mode)
    assert a.size == size[::-1] and b.shape == (5, *size)
    assert np.abs(np.asarray(a).transpose(2, 0, 1) - wanted).max() <= 1
    assert np.abs(c.numpy() - wanted).max() <= 1
    assert np.abs(b.numpy() * 255 - wanted[[0, 1, 2, 1, 0]]).max() < 0.01


ITEM = [lambda: Resize(48), lambda: Resize((40, 70), 'pad', 'zeros'), lambda: Resize((50, 40), 'squish'), lambda: CropPad((90, 100)), lambda: CropPad((50, 80)), lambda: RandomCrop((50, 60)),
        lambda: RandomCrop((80, 130)), lambda: RandomResizedCrop(56, min_scale=0.5), lambda: RatioResize(50), lambda: FlipItem(1.), lambda: DihedralItem(1.)]
NAMES = ['crop', 'pad', 'squish', 'CropPad larger', 'CropPad', 'RandomCrop', 'RandomCrop larger', 'RandomResizedCrop', 'RatioResize', 'FlipItem', 'DihedralItem']

@pytest.mark.parametrize('split_idx', [0, 1])
@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('make', ITEM, ids=NAMES)
def test_a_spot_in_a_sample(make, seed, split_idx):
    "One draw for a PIL image, a mask, a tensor of five channels, a point and a box, scaled or still in pixels"
    w, h, at = 96, 64, (50., 30.)
    im = spot(h, w, *at, 3.)
    picture = PILImage(Image.fromarray((im * 255).astype(np.uint8)).convert('RGB'))
    mask, many = PILMask(Image.fromarray((im > 0.1).astype(np.uint8))), TensorImage(torch.from_numpy(im).float().expand(5, h, w).clone())
    box = [44., 25., 56., 35.]
    scaled = TensorPoint(torch.tensor([[2 * at[0] / w - 1, 2 * at[1] / h - 1]])), TensorBBox(torch.tensor([[2 * v / n - 1 for v, n in zip(box, (w, h, w, h))]]))
    with no_random(seed): a, b, c, p, q, r, s = make()((picture, mask, many, *scaled, TensorPoint.create([at]), TensorBBox.create([box])), split_idx)
    size = np.array(a.size)
    assert b.size == a.size and c.shape == (5, *a.size[::-1]) and (type(a), type(b), type(c), type(p), type(q)) == (PILImage, PILMask, TensorImage, TensorPoint, TensorBBox)
    assert set(np.unique(b)) <= {0, 1}
    place = (plain(p)[0].numpy() + 1) / 2 * size
    np.testing.assert_allclose(plain(r)[0].numpy(), place, atol=1e-3)
    np.testing.assert_allclose(plain(s)[0].numpy(), (plain(q)[0].numpy() + 1) / 2 * np.tile(size, 2), atol=1e-3)
    if (place < 12).any() or (place > size - 12).any(): pytest.skip('the spot is cut off')
    for found, near in ((np.asarray(a)[..., 0], 0.15), (c[4], 0.05), (np.asarray(b), 0.6)):
        assert np.abs((middle(found) + 1) / 2 * size - place).max() < near
    left, top, right, bottom = plain(s)[0].numpy()
    assert abs((left + right) / 2 - place[0]) < 1e-3 and abs((top + bottom) / 2 - place[1]) < 1e-3


@pytest.mark.parametrize('k', range(8))
def test_each_of_the_eight(k, monkeypatch):
    "Images, points and boxes, scaled or in pixels"
    monkeypatch.setattr(random, 'randint', lambda low, high: k)
    im = np.zeros((5, 8), dtype=np.uint8)
    im[1, 2:4] = 255
    box = TensorBBox.create([[2, 1, 4, 2]])
    a, b, c = DihedralItem()((PILMask(Image.fromarray(im)), box, TensorPoint.create([[3, 1.5]])), 0)
    scaled = DihedralItem()((PILMask(Image.fromarray(im)), TensorBBox(box / torch.tensor([4, 2.5, 4, 2.5]) - 1)), 0)[1]
    (top, left), (bottom, right) = np.argwhere(np.asarray(a)).min(0), np.argwhere(np.asarray(a)).max(0) + 1
    np.testing.assert_allclose(b.numpy(), [[left, top, right, bottom]], atol=1e-4)
    np.testing.assert_allclose((scaled.numpy() + 1) / 2 * np.tile(a.size, 2), [[left, top, right, bottom]], atol=1e-4)
    np.testing.assert_allclose(c.numpy(), [[(left + right) / 2, (top + bottom) / 2]], atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from(['crop', 'pad', 'squish']), st.sampled_from(PADS), st.integers(0, 1), st.integers(0, 10**6))
def test_any_size(w, h, tw, th, method, pad_mode, split_idx, seed):
    "Every size to every size: PIL images, masks and tensors have it, and corners of the image stay in its order"
    random.seed(seed)
    mask = np.random.default_rng(seed).integers(0, 5, (h, w), dtype=np.uint8)
    sample = photo(w, h), PILMask(Image.fromarray(mask)), TensorImage(torch.rand(4, h, w)), TensorPoint(torch.tensor([[-1., -1.], [1., 1.]]))
    a, b, c, p = Resize((th, tw), method, pad_mode)(sample, split_idx)
    assert (a.size, b.size, c.shape) == ((tw, th), (tw, th), (4, th, tw))
    assert set(np.unique(b)) <= set(np.unique(mask)) | {0}
    assert (p[0] < p[1]).all()
    if method == 'squish': torch.testing.assert_close(plain(p), plain(sample[3]))
    if method == 'pad': assert (p.abs() <= 1 + 1e-5).all()
    if method == 'crop': assert (p[0] <= -1 + 1e-5).all() and (p[1] >= 1 - 1e-5).all()


def test_as_fastai_items():
    """Points and boxes of one sample, where both frameworks cut the same part: when validating. (Not `RandomResizedCrop`: there fastai takes the size of the
    image before the resize for that after it, and points go where their image does not.)"""
    fv = pytest.importorskip('fastai.vision.all')
    w, h = 96, 64
    pts, boxes = np.random.default_rng(0).uniform(-1, 1, (6, 2)).astype(np.float32), np.array([[-0.5, -0.2, 0.3, 0.4]], dtype=np.float32)
    for name, args in (('Resize', (48,)), ('Resize', ((40, 70), 'squish')), ('RandomCrop', ((50, 60),)), ('CropPad', ((50, 80),))):
        theirs = getattr(fv, name)(*args)
        sample = fv.PILImage(Image.new('RGB', (w, h))), fv.TensorPoint(torch.from_numpy(pts), img_size=(w, h)), fv.TensorBBox(torch.from_numpy(boxes), img_size=(w, h))
        _, p, b = theirs(sample, split_idx=1)
        ours = globals()[name](*args)((PILImage(Image.new('RGB', (w, h))), TensorPoint(torch.from_numpy(pts)), TensorBBox(torch.from_numpy(boxes))), 1)
        np.testing.assert_allclose(ours[1].numpy(), p.numpy(), atol=1e-5, err_msg=name)
        np.testing.assert_allclose(ours[2].numpy(), b.numpy(), atol=1e-5, err_msg=name)
