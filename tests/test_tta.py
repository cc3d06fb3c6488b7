"""Test-time augmentation: the numbers are fastai's, masks, points and boxes come back to where they belong, and the same seed gives the same."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from lamella.data.moves import Moves
from lamella.learner.undoing import boxes_back, map_back, merge_boxes, places_of, points_back
from lamella.losses import BaseLoss
from lamella.vision.all import (BBoxBlock, BBoxLblBlock, CategoryBlock, DataBlock, DeterministicDihedral, Dihedral, Flip, ImageBlock, IndexSplitter, Learner, MaskBlock, PointBlock, Resize, Rotate, Transform,
    Warp, Zoom, aug_transforms, get_annotations, get_image_files, set_seed)
from lamella.vision.augment import RandomResizedCropGPU
from lamella.vision.geometry import AffineCoordTfm
from lamella.vision.shapes import make_shapes
from lamella.vision.types import TensorImage, TensorMask

CODES = ['background', 'circle', 'square', 'triangle']


@pytest.fixture(scope='module')
def path(tmp_path_factory): return make_shapes(tmp_path_factory.mktemp('shapes'), n=10, size=48, seed=3)

def found_in(o):
    names, things = get_annotations(o.parents[1]/'annotations.json')
    return dict(zip(names, things))[o.name]

def name_of(o): return found_in(o)[1][0]
def mask_of(o): return o.parents[1]/'masks'/o.name
def corners(o): return [found_in(o)[0][0][:2], found_in(o)[0][0][2:]]

def loaders(path, *blocks, get_y=name_of, bs=3, seed=5, **kwargs):
    block = DataBlock((ImageBlock, *blocks), n_inp=1, get_items=get_image_files, get_y=get_y, splitter=IndexSplitter(range(3, 10)), **kwargs)
    return block.dataloaders(path/'images', bs=bs, num_workers=kwargs.get('num_workers', 0), seed=seed, device='cpu')

def linear():
    set_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, 3))


# Classes

@pytest.mark.parametrize('options', [{}, {'beta': None}, {'use_max': True}, {'n': 2, 'beta': 0.6}])
def test_same_as_fastai(path, options):
    "With a transform that draws nothing, fastai's numbers"
    fastai = pytest.importorskip('fastai.vision.all')
    model = linear()
    block = fastai.DataBlock((fastai.ImageBlock, fastai.CategoryBlock(vocab=CODES[1:])), get_items=lambda o: sorted(fastai.get_image_files(o)), get_y=name_of, splitter=fastai.IndexSplitter(list(range(3, 10))), batch_tfms=[fastai.Flip(p=1.)])
    theirs = fastai.Learner(block.dataloaders(path/'images', bs=3, num_workers=0, device='cpu'), model, loss_func=fastai.CrossEntropyLossFlat())
    learn = Learner(loaders(path, CategoryBlock(vocab=CODES[1:]), batch_tfms=[Flip(p=1.)]), model)
    with theirs.no_bar(): wanted, targets = theirs.tta(**options)
    preds, targs = learn.tta(**options)
    files = [list(map(str, o.dls.valid_ds.items)) for o in (learn, theirs)]
    order = [files[1].index(o) for o in files[0]]
    pairs = zip(preds, wanted) if options.get('beta', 0) is None else [(preds, wanted)]
    for a, b in pairs: torch.testing.assert_close(a, b.as_subclass(torch.Tensor)[order], atol=1e-4, rtol=0)
    assert targs.tolist() == targets.as_subclass(torch.Tensor)[order].tolist()

def test_by_hand(path):
    "Each sample once and in order, though the loader shuffles, drops and draws; the mean of n passes and the plain one"
    dls = loaders(path, CategoryBlock(vocab=CODES[1:]), batch_tfms=[Flip(p=1.)])
    model = linear()
    x = torch.cat([b[0] for b in dls.valid])
    plain, flipped = model(x).softmax(1), model(x.flip(3)).softmax(1)
    learn = Learner(dls, model)
    dl = dls.valid.new(shuffle=True, drop_last=True, n=2)
    for loader in (None, dl): torch.testing.assert_close(learn.tta(dl=loader)[0], 0.75 * flipped + 0.25 * plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(learn.tta(use_max=True)[0], torch.maximum(plain, flipped), atol=1e-5, rtol=0)
    torch.testing.assert_close(learn.tta(beta=1.)[0], plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(learn.tta(dl=dls.test_dl(dls.valid_ds.items))[0], learn.tta()[0])
    assert learn.tta(dl=dls.test_dl(dls.valid_ds.items))[1] is None

def test_passes_differ_and_come_again(path):
    "Each pass draws anew; one seed gives one result, with workers too, and the training is not touched"
    dls = loaders(path, CategoryBlock(vocab=CODES[1:]), item_tfms=Resize(48), batch_tfms=aug_transforms())
    learn = Learner(dls, linear())
    position, state = dls.train.state_dict(), torch.get_rng_state()
    first = learn.tta()[0]
    assert dls.train.state_dict() == position and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, learn.tta()[0]) and not torch.equal(first, learn.tta(n=1)[0])
    assert torch.equal(first, learn.tta(dl=dls.valid.new(num_workers=2))[0])
    other = loaders(path, CategoryBlock(vocab=CODES[1:]), item_tfms=Resize(48), batch_tfms=aug_transforms(), seed=6)
    assert not torch.equal(first, learn.tta(dl=other.valid)[0])

def test_other_transforms(path):
    "`item_tfms` and `batch_tfms` take the place of those that resize or are random, also for the plain prediction"
    dls = loaders(path, CategoryBlock(vocab=CODES[1:]), item_tfms=Resize(32), batch_tfms=aug_transforms())
    learn = Learner(dls, linear()) # takes 48 pixels
    with pytest.raises(RuntimeError): learn.tta()
    mean, plain = learn.tta(item_tfms=Resize(48), batch_tfms=[], beta=None)[0]
    torch.testing.assert_close(mean, plain)
    whole = Learner(loaders(path, CategoryBlock(vocab=CODES[1:]), item_tfms=Resize(48)), learn.model)
    torch.testing.assert_close(plain, whole.get_preds()[0])


# Masks

class Seer(nn.Module):
    "Sees the mask: it is in the picture, as red"
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.))

    def forward(self, x): return self.weight * 8 * torch.cat([1 - x[:, :1], x[:, :1], -torch.ones_like(x[:, :2])], 1)

def painted(o):
    from lamella.vision.types import PILMask
    import numpy as np
    return np.repeat((np.asarray(PILMask.create(mask_of(o)))[..., None] > 0).astype('uint8') * 255, 3, -1)

def mask_loaders(path, **kwargs):
    return loaders(path, MaskBlock(CODES), get_x=painted, get_y=mask_of, **kwargs)

def test_exact_flips_of_masks(path):
    "All eight ways to lay a picture down come back to the pixel"
    learn = Learner(mask_loaders(path, batch_tfms=[Dihedral(p=1.)]), Seer())
    mean, plain = learn.tta(n=6, beta=None)[0]
    torch.testing.assert_close(mean, plain, atol=1e-4, rtol=0)

def test_masks_come_back(path):
    "After rotations, zooms and warps the shapes are where they were; without the way back they are not"
    learn = Learner(mask_loaders(path, batch_tfms=aug_transforms(max_rotate=30., max_zoom=1.5, max_lighting=0., flip_vert=True)), Seer())
    mean, plain = learn.tta(n=6, beta=None)[0]
    wrong = ((mean.argmax(1) != plain.argmax(1)).float().mean())
    assert wrong < 0.03
    from lamella.learner import tta as module
    way = module._WAYS.pop('segmentation')
    try: assert ((learn.tta(n=6, beta=None)[0][0].argmax(1) != plain.argmax(1)).float().mean()) > 3 * wrong
    finally: module._WAYS['segmentation'] = way

def test_what_was_not_seen_does_not_count(path):
    "A zoom into the left top quarter: the rest keeps the plain prediction, whatever the passes say"
    class Liar(Seer):
        def forward(self, x): return super().forward(1 - x if self.calls() else x)
        def calls(self):
            self.count = getattr(self, 'count', 0) + 1
            return self.count > 3 # batches of the plain pass
    learn = Learner(mask_loaders(path, batch_tfms=[Zoom(p=1., draw=2., draw_x=0., draw_y=0.)]), Liar())
    mean, plain = learn.tta(n=1, beta=None)[0]
    torch.testing.assert_close(mean[..., 24:, :], plain[..., 24:, :])
    torch.testing.assert_close(mean[..., :, 24:], plain[..., :, 24:])
    assert (mean - plain)[:, :2, 2:22, 2:22].abs().min() > 0.5

def test_validation_of_its_own_size(path):
    "Batch transforms that resize, in validation too: the result has the size of validation"
    learn = Learner(mask_loaders(path, batch_tfms=aug_transforms(size=40, min_scale=0.5, max_lighting=0.)), Seer())
    mean, plain = learn.tta(n=4, beta=None)[0]
    assert mean.shape == plain.shape == (7, 4, 40, 40)
    assert (mean.argmax(1) != plain.argmax(1)).float().mean() < 0.04

def test_what_cannot_be_undone(path):
    "Random transforms of items are left out; a batch transform that moves masks and does not say how is an error"
    class Roll(Transform):
        split_idx, order = 0, 50
        def encodes(self, x: TensorImage): return x.roll(3, -1)
        def encodes(self, x: TensorMask): return x.roll(3, -1)
    with pytest.raises(TypeError, match='Roll does not say how'): Learner(mask_loaders(path, batch_tfms=[Roll(), Flip()]), Seer()).tta()
    with pytest.warns(UserWarning, match='batch_tfms=aug_transforms'): Learner(mask_loaders(path), Seer()).tta()
    from lamella.vision.all import RandomCrop
    learn = Learner(mask_loaders(path, item_tfms=RandomCrop(40), batch_tfms=[Flip(p=1.)]), Seer())
    mean, plain = learn.tta(beta=None)[0]
    torch.testing.assert_close(mean, plain, atol=1e-4, rtol=0)


# Places, for any draw

matrices = st.lists(st.floats(-0.25, 0.25), min_size=8, max_size=8)

def moves(values, size, out=None):
    from lamella.vision.sampling import Sampling
    matrix = torch.eye(3, dtype=torch.float64) + torch.tensor([[values[0], values[1], values[2]], [values[3], values[4], values[5]], [values[6] / 3, values[7] / 3, 0]], dtype=torch.float64)
    made = Moves()
    made.add([Sampling(matrix[None], out)], size)
    return made

@settings(max_examples=60, deadline=None)
@given(matrices, matrices, st.tuples(st.integers(8, 40), st.integers(8, 40)))
def test_points_there_and_back(values, more, size):
    "Points of the augmented picture are those of the validation picture, moved"
    made, wanted = moves(values, size, (12, 20)), moves(more, size)
    places = torch.rand(1, 9, 2, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    there = made.points(wanted.origins(places))
    torch.testing.assert_close(points_back(there, made, wanted), places, atol=2e-3, rtol=0)

@settings(max_examples=30, deadline=None)
@given(matrices)
def test_maps_there_and_back(values):
    "A smooth map, warped as a picture is and moved back, is the map where it was seen"
    size = (40, 40)
    smooth = (places_of(size) @ torch.tensor([[0.8, 0.3], [-0.4, 0.7]])).sin().view(1, *size, 2).permute(0, 3, 1, 2) / 2 + 0.5
    made = moves(values, size)
    from lamella.vision.pixels import Pixels
    px = Pixels(smooth)
    made.steps[0][0].image(px, slice(0, 1))
    back, seen = map_back(px.value(), made, Moves(), size)
    inner = (F.avg_pool2d(F.pad(seen.float(), (3, 3, 3, 3)), 7, 1) > 0.999).expand_as(back)
    torch.testing.assert_close(back[inner], smooth[inner], atol=0.03, rtol=0)

@pytest.mark.parametrize('f', [Rotate(p=1., draw=20.), Warp(p=1., draw_x=0.2, draw_y=-0.1), Zoom(p=1., draw=1.3), RandomResizedCropGPU(32, min_scale=0.5), Flip(p=1.), DeterministicDihedral(),
    AffineCoordTfm(coord_fs=[lambda grid, invert=False: grid / 0.9 if invert else grid * 0.9])])
def test_transforms_say_where_points_go(f):
    "What the step says of points is where the pixels went: a bright spot is found again"
    picture = torch.zeros(1, 3, 64, 64)
    picture[:, :, 28:32, 36:40] = 1.
    steps = type(f).plan([f], picture, 0)
    made = Moves()
    made.add(steps, (64, 64))
    from lamella.vision.pixels import Pixels
    px = Pixels(picture)
    for step in steps: step.image(px, slice(0, 1))
    seen = px.value()[0, 0]
    middle = (seen.flatten()[:, None] * places_of(tuple(seen.shape))).sum(0) / seen.sum()
    torch.testing.assert_close(made.points(torch.tensor([[[38., 30.]]]) / 32 - 1)[0, 0], middle, atol=0.03, rtol=0)


# Points and boxes of a model that finds what is bright

class Finder(nn.Module):
    "The corners of what is bright, from -1 to 1"
    def __init__(self, detects=False):
        super().__init__()
        self.weight, self.detects = nn.Parameter(torch.zeros(1)), detects

    def forward(self, x):
        places, bright = places_of(tuple(x.shape[-2:])), x[:, 0].flatten(1) > 0.5
        low, high = (torch.stack([func(places[o]) for o in bright]) for func in (lambda p: p.amin(0), lambda p: p.amax(0)))
        if not self.detects: return torch.cat([low, high], 1) + 0 * self.weight
        none = torch.zeros(len(x), 1)
        return torch.stack([torch.cat([low, high], 1), torch.zeros(len(x), 4)], 1), torch.tensor([[2, 0]]).repeat(len(x), 1), torch.cat([none + 0.8, none], 1)

def spot(o):
    import numpy as np
    n, picture = int(o.stem), np.zeros((48, 48, 3), 'uint8')
    picture[14 + n:22 + n, 18:30] = 255
    return picture

def spot_corners(o): return [[18, 14 + int(o.stem)], [30, 22 + int(o.stem)]]

def test_points_come_back(path):
    "Corners found in moved pictures, where they belong: for flips, low and high change places, and their mean stays"
    learn = Learner(loaders(path, PointBlock, get_x=spot, get_y=spot_corners, batch_tfms=aug_transforms(do_flip=False, max_rotate=0., max_warp=0., max_zoom=1.5, max_lighting=0.)), Finder())
    mean, plain = learn.tta(beta=None)[0]
    assert mean.shape == (7, 4) and not torch.equal(mean, plain)
    torch.testing.assert_close(mean, plain, atol=0.06, rtol=0)
    learn = Learner(loaders(path, PointBlock, get_x=spot, get_y=spot_corners, batch_tfms=[Flip(p=1.)]), Finder())
    mean, plain = learn.tta(beta=None)[0]
    torch.testing.assert_close(mean[:, [2, 1, 0, 3]], plain, atol=1e-4, rtol=0)

class NoLoss(BaseLoss):
    def forward(self, pred, *targ): return pred[0].sum() * 0

def box_loaders(path, **kwargs):
    return loaders(path, BBoxBlock, BBoxLblBlock(vocab=['circle', 'spot']), get_x=spot, get_y=[lambda o: [sum(spot_corners(o), [])], lambda o: ['spot']], **kwargs)

def test_boxes_come_back(path):
    "One box for each picture, where it is without augmentation, as sure as in each pass"
    learn = Learner(box_loaders(path, batch_tfms=aug_transforms(max_rotate=0., max_warp=0., max_zoom=1.4, max_lighting=0.)), Finder(True), loss_func=NoLoss())
    (boxes, labels, scores), (true_boxes, true_labels) = learn.tta(n=3)
    assert boxes.shape == (7, 1, 4) and labels.tolist() == [[2]] * 7 and true_labels.tolist() == [[2]] * 7
    torch.testing.assert_close(boxes, true_boxes, atol=0.09, rtol=0)
    torch.testing.assert_close(scores, torch.full((7, 1), 0.8))
    mean, plain = learn.tta(n=2, beta=None)[0]
    assert mean[0].shape == (7, 1, 4) and plain[0].shape == (7, 2, 4)

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 6))
def test_merged_boxes(seed, passes, k):
    "Nothing is invented: labels that were found, scores no larger than the best, boxes within what was found; of one class they do not lie on each other"
    from torchvision.ops import box_iou
    rng = torch.Generator().manual_seed(seed)
    corner, labels, scores = torch.rand(passes * k, 2, generator=rng) * 1.5 - 1, torch.randint(0, 3, (passes * k,), generator=rng), torch.rand(passes * k, generator=rng)
    boxes = torch.cat([corner, corner + 0.1 + 0.4 * torch.rand(passes * k, 2, generator=rng)], 1)
    number, seen, weights = torch.arange(passes).repeat_interleave(k), torch.rand(passes, passes * k, generator=rng) > 0.2, torch.full((passes,), 1 / passes)
    seen[number, torch.arange(passes * k)] = True
    found, kinds, sure = merge_boxes(boxes, labels, scores, number, seen, weights)
    assert set(kinds.tolist()) <= set(labels[labels > 0].tolist()) and (sure[:-1] >= sure[1:]).all()
    if not len(found): return
    assert sure.max() <= scores[labels > 0].max() + 1e-6 and (found >= boxes.amin(0) - 1e-5).all() and (found <= boxes.amax(0) + 1e-5).all()
    best, kinds, _ = merge_boxes(boxes, labels, scores, number, seen, weights, use_max=True)
    overlap = box_iou(best, best) * (kinds[:, None] == kinds) - torch.eye(len(best))
    assert (overlap <= 0.55 + 1e-5).all()

def test_boxes_outside_are_lost():
    "A box of a part of the picture that validation does not show fills up"
    shift = Moves()
    from lamella.vision.sampling import Sampling
    shift.add([Sampling(torch.tensor([[[1., 0, 1.5], [0, 1, 0], [0, 0, 1]]], dtype=torch.float64), align_corners=False)], (8, 8))
    found = boxes_back(torch.tensor([[[0., 0, 0.5, 0.5], [-1., -1, -0.6, -0.6]]]), shift, Moves())
    torch.testing.assert_close(found, torch.tensor([[[0., 0, 0, 0], [0.5, -1, 0.9, -0.6]]]))
