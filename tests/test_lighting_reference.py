"""Light, colour and normalisation against slow, obvious code in 64 bits, and against fastai."""
import colorsys
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lamella.data.pipeline import Pipeline
from lamella.data.types import plain
from lamella.vision.augment import Brightness, Contrast, Hue, RandomErasing, Saturation
from lamella.vision.batch import IntToFloatTensor, Normalize, imagenet_stats
from lamella.vision.types import TensorImage, TensorMask

GREY = 0.299, 0.587, 0.114
STEPS = {Brightness: lambda z, f: z + np.log(f / (1 - f)),
         Contrast: lambda z, f: z * f,
         Saturation: lambda z, f: f * z + (1 - f) * np.tensordot(GREY, z, axes=(0, 0))[None]}
FACTORS = {Brightness: st.floats(0.1, 0.9), Contrast: st.floats(0.4, 2.5), Saturation: st.floats(0., 2.5)}


def images(n: int = 2, size: int = 6, seed: int = 0) -> torch.Tensor:
    "Random bytes (n,3,size,size) with black and white among them"
    x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    x[:, :, 0, 0], x[:, :, 0, 1] = 0, 255
    return x


def reference(pixels: np.ndarray, changes: list[tuple[type, float]]) -> np.ndarray:
    "One image (c,h,w) of bytes: each change done to the logits, in 64 bits"
    p = np.clip(pixels.astype(np.float64) / 255, 1e-7, float(np.float32(1 - 1e-7))) # what is white in 32 bits
    z = np.log(p) - np.log1p(-p)
    for kind, factor in changes: z = STEPS[kind](z, factor)
    return 1 / (1 + np.exp(-z))


def in_order(changes: list[tuple[type, float]]) -> list[tuple[type, float]]:
    "Saturation mixes channels and is the first of our pass; brightness and contrast are done in the order given"
    return sorted(changes, key=lambda change: change[0] is not Saturation)


def changed(x: torch.Tensor, changes: list[tuple[type, float]]) -> torch.Tensor:
    "By the library, in one pass"
    tfms = [kind(p=1., draw=factor) for kind, factor in changes]
    return plain(Pipeline([IntToFloatTensor(), *tfms], 0)((TensorImage(x),))[0])


@pytest.mark.parametrize('kinds', [kinds for n in (1, 2, 3) for kinds in itertools.permutations(STEPS, n)])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_lighting(kinds, data):
    changes = [(kind, data.draw(FACTORS[kind])) for kind in kinds]
    x = images()
    expected = np.stack([reference(o, in_order(changes)) for o in x.numpy()])
    np.testing.assert_allclose(changed(x, changes).numpy(), expected, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(turn=st.floats(-0.9, 0.9))
def test_hue(turn):
    x = images(1, 5)
    def turned(rgb: np.ndarray) -> tuple:
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb((h + turn) % 1, s, v)
    expected = np.apply_along_axis(turned, 1, x.double().div(255).numpy())
    done = plain(Pipeline([IntToFloatTensor(), Hue(p=1., draw=turn)], 0)((TensorImage(x),))[0])
    np.testing.assert_allclose(done.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize('kind,most', [(torch.uint8, 255), (torch.uint16, 65535)])
def test_whole_numbers_become_0_to_1_and_are_normalised(kind, most):
    numbers = torch.randint(0, most + 1, (2, 3, 7, 5), generator=torch.Generator().manual_seed(1))
    mean, std = (np.array(o, dtype=np.float64)[:, None, None] for o in imagenet_stats)
    run = Pipeline([IntToFloatTensor(), Normalize.from_stats(*imagenet_stats)], 1)
    mask = torch.randint(0, 9, (2, 7, 5), dtype=torch.uint8)
    done, labels = run((TensorImage(numbers.to(kind)), TensorMask(mask)))
    np.testing.assert_allclose(plain(done).numpy(), (numbers.numpy() / most - mean) / std, atol=1e-5)
    assert labels.dtype == torch.int64 and (plain(labels) == mask).all()


def test_floats_of_any_range_are_normalised_and_not_divided():
    x = torch.rand(2, 6, 5, 5, generator=torch.Generator().manual_seed(2)) * 3000
    normalise = Normalize(x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True))
    done = plain(Pipeline([IntToFloatTensor(), normalise], 1)((TensorImage(x),))[0])
    np.testing.assert_allclose(done.numpy(), ((x - normalise.mean) / normalise.std).numpy(), atol=1e-5)


def test_the_same_in_one_pass_and_one_by_one_and_on_two_threads():
    x, changes = images(40, 128), [(Brightness, 0.6), (Contrast, 1.3), (Saturation, 0.7)]
    together, before = changed(x, changes), torch.get_num_threads()
    one_by_one = IntToFloatTensor()(TensorImage(x))
    for kind, factor in in_order(changes): one_by_one = kind(p=1., draw=factor)(one_by_one, 0)
    np.testing.assert_allclose(together.numpy(), plain(one_by_one).numpy(), atol=2e-5)
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        assert torch.equal(changed(x, changes), together)
    finally: torch.set_num_threads(before)


def test_memory_that_is_used_again_does_not_change_older_batches():
    x = images(64, 224)
    first = changed(x, [(Contrast, 1.2)])
    copy = first.clone()
    for factor in (0.5, 0.8, 2.): changed(x, [(Contrast, factor)])
    assert torch.equal(first, copy)
    del first
    second = changed(x, [(Contrast, 1.2)])
    assert torch.equal(second, copy)


@pytest.mark.parametrize('name,draw', [('Brightness', 0.62), ('Contrast', 1.4), ('Saturation', 0.3), ('Hue', 0.13)])
def test_as_fastai(name, draw):
    fastai = pytest.importorskip('fastai.vision.all')
    import lamella.vision.augment as ours
    x = images(2, 16, seed=3).float().div(255).clamp(0.05, 0.95)
    expected = getattr(fastai, name)(p=1., draw=draw)(fastai.TensorImage(x.clone()), split_idx=0)
    done = getattr(ours, name)(p=1., draw=draw)(TensorImage(x), 0)
    np.testing.assert_allclose(plain(done).numpy(), torch.Tensor(expected).numpy(), atol=1e-4)


def test_random_erasing_replaces_rectangles_of_the_area_that_was_asked_for():
    x = TensorImage(torch.zeros(3, 1, 100, 100))
    torch.manual_seed(0)
    shares = [float((RandomErasing(p=1., sl=0.1, sh=0.2)(x, 0)[0] != 0).float().mean()) for _ in range(40)]
    assert 0.05 < min(shares) and max(shares) < 0.21 and max(shares) - min(shares) > 0.05
    assert float((plain(RandomErasing(p=1.)(x, 1)) != 0).float().sum()) == 0, 'validation images stay as they are'
