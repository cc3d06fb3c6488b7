"""Masks, points and boxes from files to batches, shown, learned and exported; and what is wrong with them, by the name of the file."""
import json
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lamella.data.blocks import TransformBlock
from lamella.data.datablock import DataBlock
from lamella.data.pipeline import DataError
from lamella.data.splitters import IndexSplitter
from lamella.data.types import TensorCategory
from lamella.export import load_learner
from lamella.learner.learner import Learner
from lamella.vision.augment import aug_transforms
from lamella.vision.batch import Normalize, imagenet_stats
from lamella.vision.boxes import bb_pad, get_annotations
from lamella.vision.data import BBoxBlock, BBoxLblBlock, ImageBlock, MaskBlock, PointBlock, SegmentationDataLoaders
from lamella.vision.geometry import Flip, Rotate, Zoom
from lamella.vision.points import LabeledBBox, TensorBBox, TensorPoint
from lamella.vision.targets import AddMaskCodes, PointScaler
from lamella.vision.transforms import CropPad, RandomResizedCrop, Resize
from lamella.vision.types import PILMask, TensorImage, TensorMask

CODES = ['sky', 'tree', 'road']


def make_pictures(folder: Path, n: int = 8, size=(48, 36)) -> list[Path]:
    "Grey pictures with one white square each, in another place; their masks beside them"
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for k in range(n):
        image, mask = rng.integers(0, 90, (size[1], size[0], 3), dtype=np.uint8), np.zeros((size[1], size[0]), dtype=np.uint8)
        left, top = square(k)[:2]
        image[top:top + 10, left:left + 10] = 255
        mask[top:top + 10, left:left + 10], mask[-5:] = 1, 2
        Image.fromarray(image).save(folder/f'{k}.png')
        Image.fromarray(mask).save(folder/f'{k}_mask.png')
    return sorted(folder.glob('?.png'))

def square(k: int) -> list[int]: return [6 + 3 * k, 4 + 2 * k, 16 + 3 * k, 14 + 2 * k]
def number(file: Path) -> int: return int(Path(file).stem)
def mask_of(file: Path) -> Path: return file.with_name(f'{file.stem}_mask.png')
def corners(file: Path) -> list: return np.reshape(square(number(file)), (2, 2)).tolist()
def boxes_of(file: Path) -> list: return [square(number(file)), [0, 31, 48, 36]][:number(file) % 3]
def labels_of(file: Path) -> list: return ['square', 'floor'][:number(file) % 3]

@pytest.fixture
def files(tmp_path):
    return make_pictures(tmp_path/'pictures')

def loaders(files, *blocks, bs=4, num_workers=0, item_tfms=None, batch_tfms=None, n_inp=1, seed=1, **getters):
    block = DataBlock((ImageBlock, *blocks), n_inp=n_inp, splitter=IndexSplitter([6, 7]), item_tfms=item_tfms, batch_tfms=batch_tfms, **getters)
    return block.dataloaders(files, bs=bs, num_workers=num_workers, seed=seed)


# Masks

def rewrite(file: Path, change) -> None:
    "Another mask in the file"
    Image.fromarray(change(np.array(Image.open(file))).astype(np.uint8)).save(file)

def test_mask_batches(files):
    dls = loaders(files, MaskBlock(CODES), get_y=mask_of, batch_tfms=[*aug_transforms(size=32), Normalize.from_stats(*imagenet_stats)])
    x, y = dls.one_batch()
    assert (x.shape, y.shape, y.dtype) == ((4, 3, 32, 32), (4, 32, 32), torch.int64)
    assert set(y.unique().tolist()) == {0, 1, 2} and type(y) is torch.Tensor
    assert (list(dls.vocab), dls.c, dls.task) == (CODES, 3, 'segmentation')
    image, mask = dls.decode_batch((x, y))[0]
    assert isinstance(mask, TensorMask) and list(mask.codes) == CODES
    dls.show_batch()

def test_a_square_stays_on_its_mask(files):
    "White pixels are class 1, after everything has been drawn"
    dls = loaders(files, MaskBlock(CODES), get_y=mask_of, item_tfms=RandomResizedCrop(64, min_scale=0.5), batch_tfms=aug_transforms(max_lighting=0, max_warp=0.4, max_rotate=30, pad_mode='zeros'))
    for _ in range(3):
        x, y = dls.one_batch()
        white = x.amin(1) > 0.75
        assert (white & (y == 1)).sum() > 0.9 * white.sum() > 20

@pytest.mark.parametrize('codes', [['ground', 'square'], None])
def test_black_and_white(files, codes):
    "One message, and class 1"
    for file in files: rewrite(mask_of(file), lambda m: 255 * (m == 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        dls = loaders(files, MaskBlock(codes), get_y=mask_of)
        for _, y in [*dls.train, *dls.valid]: assert set(y.unique().tolist()) == {0, 1}
    said = [str(o.message) for o in caught if '_mask.png' in str(o.message)]
    assert len(said) == 1 and '255 was made 1' in said[0]

def test_class_out_of_range(files):
    "Before the loss sees it: file, number and codes"
    rewrite(mask_of(files[0]), lambda m: np.where(m == 2, 7, m))
    with pytest.raises(DataError, match=r"0_mask\.png' has pixels of class 7, and there are 3 codes \('sky', 'tree', 'road'\)"): loaders(files, MaskBlock(CODES), get_y=mask_of)

def test_class_out_of_range_in_a_worker(files):
    dls = loaders(files, MaskBlock(CODES), get_y=mask_of, num_workers=2)
    rewrite(mask_of(files[3]), lambda m: np.where(m == 2, 7, m))
    with pytest.raises(DataError, match=r"3_mask\.png' has pixels of class 7"): list(dls.train)

def test_void_with_several_codes(files):
    "An error that asks, not a guess"
    rewrite(mask_of(files[0]), lambda m: 255 * (m == 1))
    with pytest.raises(DataError, match=r'MaskBlock\(codes, ignore=255\)'): loaders(files, MaskBlock(CODES), get_y=mask_of)

@pytest.mark.parametrize('void', [255, 9])
def test_ignored_pixels(files, void):
    "They are 255 in a batch, and the loss leaves them out"
    for file in files: rewrite(mask_of(file), lambda m: np.where(m == 2, void, m))
    dls = loaders(files, MaskBlock(CODES, ignore=void), get_y=mask_of)
    x, y = dls.one_batch()
    assert set(y.unique().tolist()) == {0, 1, 255}
    learn = Learner(dls, nn.Conv2d(3, 3, 1))
    pred = learn.model.to(x.device)(x)
    kept = pred.movedim(1, -1)[y != 255], y[y != 255]
    torch.testing.assert_close(learn.loss_func(pred, y), nn.functional.cross_entropy(*kept))
    dls.show_batch()

def test_another_size(files):
    Image.new('L', (24, 18)).save(mask_of(files[0]))
    with pytest.raises(DataError, match=r"0\.png' has 48x36 pixels and the mask '.*0_mask\.png' has 24x18"): loaders(files, MaskBlock(CODES), get_y=mask_of, item_tfms=Resize(32))

def test_palette(files):
    "The number of a class is its place in the palette, not its colour"
    for file in files:
        im = Image.fromarray(np.array(Image.open(mask_of(file))), mode='P')
        im.putpalette([10, 20, 30, 200, 0, 0, 0, 99, 0] + [0] * 759)
        im.save(mask_of(file))
    assert set(loaders(files, MaskBlock(CODES), get_y=mask_of).one_batch()[1].unique().tolist()) == {0, 1, 2}

def test_missing_mask(files):
    mask_of(files[0]).unlink()
    with pytest.raises(DataError, match='0_mask.png'): loaders(files, MaskBlock(CODES), get_y=mask_of)

def test_segmentation_loaders(files):
    dls = SegmentationDataLoaders.from_label_func(files[0].parent, files, mask_of, codes=np.array(CODES), bs=2, num_workers=0, valid_pct=0.25, seed=1)
    assert (type(dls), list(dls.vocab), len(dls.train_ds)) == (SegmentationDataLoaders, CODES, 6)


# Points

def test_points_follow(files):
    "The corners of the square, from -1 to 1, wherever the image was moved; and back to pixels"
    dls = loaders(files, PointBlock, get_y=corners, item_tfms=RandomResizedCrop(64, min_scale=0.6), batch_tfms=aug_transforms(max_lighting=0, pad_mode='zeros', max_warp=0.1, size=96))
    x, y = dls.one_batch()
    assert (x.shape, y.shape, y.dtype, dls.c, dls.task) == ((4, 3, 96, 96), (4, 2, 2), torch.float32, 4, 'points')
    for image, points in zip(x, y):
        if points.abs().max() > 0.85: continue
        white = (image.amin(0) > 0.75).nonzero().flip(-1).float() + 0.5
        middle = (points.mean(0) + 1) * 48
        assert (white.mean(0) - middle).abs().max() < 2
    decoded = dls.decode_batch((x, y))[0][1]
    torch.testing.assert_close(decoded.as_subclass(torch.Tensor), (y[0] + 1) * 48)
    dls.show_batch()

def test_points_of_the_original_photo(files):
    "`img_size`: the points were made for a picture of twice that size"
    block = TransformBlock(type_tfms=lambda o: TensorPoint.create(np.array(corners(o)) * 2, img_size=(96, 72)), item_tfms=PointScaler)
    twice, once = loaders(files, block), loaders(files, PointBlock, get_y=corners)
    torch.testing.assert_close(twice.valid.one_batch()[1], once.valid.one_batch()[1])

def test_points_before_they_are_scaled(files):
    "`CropPad` and `FlipItem` come before `PointScaler`"
    dls = loaders(files, PointBlock, get_y=corners, item_tfms=[CropPad(40)])
    x, y = dls.valid.one_batch()
    torch.testing.assert_close(y, (torch.tensor([corners(o) for o in files[6:]]).float() - torch.tensor([4, -2])) / 20 - 1)

def test_different_numbers_of_points(files):
    with pytest.raises(DataError, match='different shapes'): loaders(files, PointBlock, get_y=lambda o: corners(o)[:1 + number(o) % 2])


# Boxes

def test_boxes_follow(files):
    "Boxes with their labels; images without any; filled up to the most of a batch"
    dls = loaders(files, BBoxBlock, BBoxLblBlock, get_y=[boxes_of, labels_of], bs=6, batch_tfms=Flip(p=1., align_corners=False))
    assert (list(dls.vocab), dls.c, dls.n_inp) == (['#na#', 'floor', 'square'], 3, 1)
    x, boxes, labels = dls.train.make_batch(range(6))
    assert (x.shape, boxes.shape, labels.shape, labels.dtype) == ((6, 3, 36, 48), (6, 2, 4), (6, 2), torch.int64)
    assert labels.tolist() == [[0, 0], [2, 0], [2, 1]] * 2 and boxes[0].abs().sum() == 0
    left, top, right, bottom = square(1)
    torch.testing.assert_close(boxes[1, 0], torch.tensor([1 - right / 24, top / 18 - 1, 1 - left / 24, bottom / 18 - 1]))
    shown = dls.decode_batch((x, boxes, labels))
    assert [len(o[1]) for o in shown] == [0, 1, 2] * 2
    assert isinstance(shown[2][2], LabeledBBox) and shown[2][2].lbl == ['square', 'floor']
    torch.testing.assert_close(shown[2][2].bbox[1].as_subclass(torch.Tensor), torch.tensor([0., 31, 48, 36]))

def test_boxes_are_drawn(files):
    "Each with its label, once for each real box"
    dls = loaders(files, BBoxBlock, BBoxLblBlock, get_y=[boxes_of, labels_of], bs=6)
    dls.train.show_batch(dls.train.make_batch(range(6)))
    assert [sorted(o.get_text() for o in ax.texts) for ax in plt.gcf().axes[:6]] == [[], ['square'], ['floor', 'square']] * 2

def test_no_box_in_a_batch(files):
    dls = loaders(files, BBoxBlock, BBoxLblBlock(['square', 'floor']), get_y=[lambda o: [], lambda o: []], batch_tfms=aug_transforms())
    x, boxes, labels = dls.one_batch()
    assert (boxes.shape, labels.shape) == ((4, 0, 4), (4, 0))
    dls.show_batch()

def test_boxes_cut_off_with_their_labels(files):
    "A crop leaves out the floor, and its label with it"
    dls = loaders(files, BBoxBlock, BBoxLblBlock, get_y=[boxes_of, labels_of], item_tfms=CropPad((24, 48)))
    boxes, labels = dls.train.make_batch([2, 5])[1:]
    assert labels.tolist() == [[2], [2]] and boxes.shape == (2, 1, 4)

def test_boxes_moved_out_of_a_batch(files):
    "Zooming makes them empty; the label says that there is nothing"
    dls = loaders(files, BBoxBlock, BBoxLblBlock, get_y=[boxes_of, labels_of], batch_tfms=Zoom(p=1., draw=4., draw_x=0., draw_y=0.))
    boxes, labels = dls.train.make_batch([1, 2])[1:]
    assert labels.tolist() == [[2, 0], [2, 0]] and boxes[:, 1].abs().sum() == 0

@pytest.mark.parametrize('boxes, labels, said', [
    ([[20, 5, 10, 15]], ['square'], r"'.*\d\.png' of \(48, 36\) pixels \(width, height\) has a box \[20.0, 5.0, 10.0, 15.0\], number 0, that ends before"),
    ([[1, 2, 3, 4], [60, 5, 70, 15]], ['square'] * 2, r"'.*\d\.png' .* number 1, that lies outside"),
    ([[1, 2, 3, 4]], ['square'] * 2, r"'.*\d\.png' has 1 boxes and 2 labels"),
    ([[1, 2, 3]], ['square'], r'4 numbers for each')])
def test_wrong_boxes(files, boxes, labels, said):
    with pytest.raises(DataError, match=said) as caught: loaders(files, BBoxBlock, BBoxLblBlock, get_y=[lambda o: boxes, lambda o: labels])
    assert '.png' in str(caught.value)

def test_a_label_that_is_new(files):
    with pytest.raises(DataError, match="label 'bird' of a box is not among"): loaders(files, BBoxBlock, BBoxLblBlock, get_y=[lambda o: [[1, 2, 3, 4]], lambda o: ['bird' if number(o) > 5 else 'cat']])

def test_boxes_without_labels(files):
    dls = loaders(files, BBoxBlock, get_y=boxes_of, batch_tfms=Rotate())
    assert dls.train.make_batch([1, 2])[1].shape == (2, 2, 4)

def test_coco_file(files, tmp_path):
    "From a file of annotations to batches, and new images without any"
    found = {'images': [{'id': k, 'file_name': f.name} for k, f in enumerate(files)], 'categories': [{'id': 3, 'name': 'square'}],
             'annotations': [{'image_id': k, 'category_id': 3, 'bbox': [*square(k)[:2], 10, 10]} for k in range(6)]}
    (tmp_path/'train.json').write_text(json.dumps(found))
    names, targets = get_annotations(tmp_path/'train.json', prefix=f'{files[0].parent}/')
    where = dict(zip(names, targets))
    assert len(names) == 6 and targets[2] == ([[float(o) for o in square(2)]], ['square'])
    dls = loaders(names, BBoxBlock, BBoxLblBlock, get_y=[lambda o: where[o][0], lambda o: where[o][1]], bs=2) if False else \
        DataBlock((ImageBlock, BBoxBlock, BBoxLblBlock), n_inp=1, splitter=IndexSplitter([5]), get_y=[lambda o: where[o][0], lambda o: where[o][1]]).dataloaders(names, bs=2, num_workers=0)
    assert dls.one_batch()[1].shape == (2, 1, 4)
    assert dls.test_dl([str(files[7])]).one_batch()[0].shape == (1, 3, 36, 48)

def test_bb_pad_as_fastai():
    fv = pytest.importorskip('fastai.vision.all')
    samples = [(0, torch.tensor([[-0.5, -1.5, 0.5, 0.5], [1., 0, 2, 1]]), torch.tensor([1, 2])), (0, torch.tensor([[-1., -1, 1, 1], [0, 0, 0.1, 0.1]]), torch.tensor([2, 1]))]
    theirs = fv.bb_pad([(a, fv.TensorBBox(b), fv.TensorMultiCategory(c)) for a, b, c in samples], 7)
    from lamella.vision.boxes import TensorBoxLabels
    ours = bb_pad([(a, TensorBBox(b), TensorBoxLabels(c)) for a, b, c in samples], 7)
    for a, b in zip(ours, theirs):
        for k in (1, 2): assert a[k].tolist() == b[k].tolist()


# Together

def test_mask_points_and_boxes_of_one_image(files):
    "One draw for all of them"
    dls = loaders(files, MaskBlock(CODES), PointBlock, BBoxBlock, get_y=[mask_of, corners, lambda o: [square(number(o))]], item_tfms=Resize(72, 'pad', 'zeros'),
                  batch_tfms=aug_transforms(max_lighting=0, pad_mode='zeros', flip_vert=False))
    x, mask, points, boxes = dls.one_batch()
    for m, p, b in zip(mask, points, boxes[:, 0]):
        rows = (m == 1).nonzero().flip(-1).float() + 0.5
        if b.abs().max() > 0.9: continue
        assert ((p.mean(0) + 1) * 36 - rows.mean(0)).abs().max() < 1
        low, high = (b.view(2, 2) + 1) * 36
        assert (rows.min(0)[0] > low - 1).all() and (rows.max(0)[0] < high + 1).all()

def test_many_channels_with_a_mask(files):
    "A tensor of five channels as the image"
    def many(file): return TensorImage(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float()[[0, 1, 2, 0, 1]])
    blocks = TransformBlock(type_tfms=many), MaskBlock(CODES)
    dls = DataBlock(blocks, splitter=IndexSplitter([6, 7]), get_y=mask_of, item_tfms=RandomResizedCrop(24), batch_tfms=[Flip(), Rotate()]).dataloaders(files, bs=4, num_workers=0)
    x, y = dls.one_batch()
    assert (x.shape, y.shape) == ((4, 5, 24, 24), (4, 24, 24))

def test_the_same_with_workers(files):
    "Masks and boxes from worker processes"
    made = [loaders(files, MaskBlock(CODES), BBoxBlock, BBoxLblBlock, get_y=[mask_of, boxes_of, labels_of], item_tfms=RandomResizedCrop(24), num_workers=k) for k in (0, 2)]
    for a, b in zip(*(list(dls.train) for dls in made)): assert all(torch.equal(p, q) for p, q in zip(a, b))


# Exported

def test_points_exported(files, tmp_path):
    dls = loaders(files, PointBlock, get_y=corners, item_tfms=[Resize((36, 48), 'squish')], batch_tfms=[Flip(p=0.), Normalize.from_stats(*imagenet_stats)])
    learn = Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 4)), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.show_results()
    spec_file = learn.export('points.pkl')
    point, again = learn.predict(files[0]), load_learner(spec_file).predict(files[0])
    assert point[0].shape == (2, 2) and torch.equal(point[2], again[2])
    torch.testing.assert_close(point[0].as_subclass(torch.Tensor), (point[2].view(2, 2) + 1) * torch.tensor([24., 18.])) # pixels of the input
    assert torch.equal(point[0].as_subclass(torch.Tensor), again[0].as_subclass(torch.Tensor))

def test_masks_exported(files, tmp_path):
    dls = loaders(files, MaskBlock(CODES, ignore=9), get_y=mask_of, item_tfms=Resize(32), batch_tfms=aug_transforms())
    learn = Learner(dls, nn.Conv2d(3, 3, 3, padding=1), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.show_results()
    assert [ax.get_title().split('\n')[0] for ax in plt.gcf().axes[:4]] == ['target', 'prediction'] * 2
    assert all(len(ax.images) == 2 for ax in plt.gcf().axes[:4]) # the picture and one mask
    predictor = load_learner(learn.export('masks.pkl'))
    mask, again = learn.predict(files[0])[0], predictor.predict(files[0])[0]
    assert isinstance(again, TensorMask) and list(again.codes) == CODES and again.shape == (32, 32)
    assert torch.equal(mask.as_subclass(torch.Tensor), again.as_subclass(torch.Tensor))

def test_boxes_exported(files, tmp_path):
    "A learner with a loss of its own"
    dls = loaders(files, BBoxBlock, BBoxLblBlock, get_y=[lambda o: [square(number(o))], lambda o: ['square']], item_tfms=Resize(32))
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 4))
    learn = Learner(dls, model, loss_func=lambda pred, boxes, labels: nn.functional.l1_loss(pred, boxes[:, 0]), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert load_learner(learn.export('boxes.pkl')).predict(files[0])[2].shape == (4,)


def test_rare_foreground_of_255_is_no_void(tmp_path):
    "One of forty masks has foreground, and no codes are given"
    masks = [PILMask.create(np.zeros((4, 4), np.uint8)) for _ in range(40)]
    masks[3] = PILMask.create(np.array([[255, 0]], np.uint8))
    mapped = AddMaskCodes()
    mapped.setups(masks)
    with pytest.warns(UserWarning, match='255 was made 1'): assert np.asarray(mapped(masks[3])).tolist() == [[1, 0]]


def test_boxes_beside_a_class_of_the_image():
    box = TensorBBox(torch.tensor([[-.5, -.5, .5, .5]]))
    padded = bb_pad([(TensorImage(torch.zeros(3, 4, 4)), box, TensorCategory(torch.tensor(1)))])
    assert len(padded[0][1]) == 1 and int(padded[0][2]) == 1


def test_two_targets_have_two_numbers_of_outputs(tmp_path):
    from lamella.data.blocks import CategoryBlock, RegressionBlock
    block = DataBlock(blocks=(TransformBlock(type_tfms=lambda o: torch.zeros(2)), CategoryBlock, RegressionBlock), n_inp=1, get_y=[lambda i: 'abc'[i % 3], float])
    assert block.dataloaders(list(range(20)), bs=4, num_workers=0, device='cpu').c == [3, 1]


def test_pictures_beside_each_other_and_grey_ones(tmp_path):
    from lamella.vision.types import PILImageBW
    for i in range(5): Image.new('RGB', (8, 8), (50 * i,) * 3).save(tmp_path/f'{i}.png')
    block = DataBlock(blocks=(ImageBlock, ImageBlock(PILImageBW)), get_items=lambda p: sorted(p.glob('*.png')), get_y=lambda o: o)
    dls = block.dataloaders(tmp_path, bs=4, num_workers=0, device='cpu', seed=1)
    dls.show_batch(max_n=3, vmin=0, vmax=255, figsize=(4, 3))
    shown = [ax for ax in plt.gcf().axes if ax.images]
    assert len(shown) == 6 and shown[1].images[0].get_cmap().name == 'Greys'
    assert shown[0].images[0].get_clim() == (0, 255)
    plt.close('all')
