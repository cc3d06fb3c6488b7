"""Transforms of torchvision and albumentations in data blocks: one draw for all fields, labels left alone, the same with any number of workers."""
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from lamella.base.pickling import UntrustedError
from lamella.base.seeds import seed_all
from lamella.data.third_party import ThirdParty, library_of, target_of, train_only
from lamella.data.types import TensorBase, TensorCategory
from lamella.vision.all import (CategoryBlock, DataBlock, DataLoader, ImageBlock, IntToFloatTensor, Learner, Pipeline, RandomSplitter, Resize,
                                ToTensor, TransformBlock, get_image_files, load_learner, parent_label)
from lamella.vision.types import PILImage, PILImageBW, PILMask, TensorImage, TensorImageBW, TensorMask

A = pytest.importorskip('albumentations')

class TensorPoint(TensorBase): "Points (n,2) from -1 to 1"
class TensorBBox(TensorBase): "Boxes (n,4) from -1 to 1"
class TensorMultiCategory(TensorBase): "The classes of boxes"

SIZE = 48, 64 # (height, width)
FLIPS = {'v2': v2.RandomHorizontalFlip(p=1), 'albumentations': A.HorizontalFlip(p=1), 'A.Compose': A.Compose([A.HorizontalFlip(p=1)])}


def picture() -> np.ndarray: return np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
def classes() -> np.ndarray: return (np.arange(SIZE[0]*SIZE[1]).reshape(SIZE)//100 % 7).astype(np.uint8)

@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    "Photographs of different sizes, in two folders"
    path, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for i in range(12):
        (path/'ab'[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40 + i, 60, 3), dtype=np.uint8)).save(path/'ab'[i % 2]/f'{i}.png')
    return path

def block(**kwargs) -> DataBlock:
    return DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(0.5, seed=0), **kwargs)

def grey_of(path: Path) -> Image.Image: return Image.open(path).convert('L')


# One draw

@pytest.mark.parametrize('name', FLIPS)
@pytest.mark.parametrize('as_tensors', [False, True])
def test_all_fields_are_flipped(name: str, as_tensors: bool):
    points, boxes = torch.tensor([[-1., -1.], [0.5, 0.25]]), torch.tensor([[-0.5, -0.5, 0., 1.], [0.5, -1., 1., -0.5]])
    image, mask = PILImage.create(picture()), PILMask.create(classes())
    if as_tensors: image, mask = ToTensor()(image), ToTensor()(mask)
    sample = image, mask, TensorPoint(points), TensorBBox(boxes), TensorMultiCategory([4, 5]), TensorCategory(1), 'name'
    found = ThirdParty(FLIPS[name])(sample, 0)
    assert [type(o) for o in found] == [type(o) for o in sample]
    pixels = found[0].permute(1, 2, 0) if as_tensors else np.asarray(found[0])
    assert np.array_equal(pixels, picture()[:, ::-1]) and np.array_equal(found[1], classes()[:, ::-1])
    assert torch.allclose(found[3][:, [0, 2]], -boxes[:, [2, 0]], atol=1e-5) and torch.allclose(found[3][:, [1, 3]], boxes[:, [1, 3]], atol=1e-5)
    assert torch.allclose(found[2][:, 0], -points[:, 0], atol=1e-5) and torch.allclose(found[2][:, 1], points[:, 1], atol=1e-5)
    assert all(a is b for a, b in zip(found[4:], sample[4:]))


ONE_DRAW = {'v2': v2.Compose([v2.RandomAffine(40, translate=(0.1, 0.1)), v2.RandomCrop(30), v2.RandomVerticalFlip()]),
            'elastic': v2.ElasticTransform(200.), 'choice': v2.RandomChoice([v2.RandomRotation((90, 90)), v2.RandomHorizontalFlip(p=1)]),
            'A': A.Compose([A.Affine(rotate=(-40, 40), p=0.7), A.RandomCrop(30, 30), A.VerticalFlip(), A.OneOf([A.Transpose(), A.ElasticTransform(alpha=50)])])}

@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**32 - 1))
@pytest.mark.parametrize('name', ONE_DRAW)
def test_image_and_mask_stay_together(name: str, seed: int):
    "Where the image, which was made of the mask, says one class without doubt, the mask says the same"
    areas = (np.arange(SIZE[1])[None]//20 + np.zeros((SIZE[0], 1), int)).astype(np.uint8) + 1
    sample = PILImage.create(np.stack([areas*60]*3, -1)), PILMask.create(areas)
    tfm = ThirdParty(ONE_DRAW[name])
    def run():
        seed_all(seed)
        return [np.asarray(o) for o in tfm(sample, 0)]
    image, mask = run()
    level = image[..., 0].astype(int)
    sure = (level % 60 == 0) & (level > 0)
    assert image.shape[:2] == mask.shape and set(np.unique(mask)) <= {0, 1, 2, 3, 4}
    assert (mask[sure] == level[sure]//60).mean() > 0.9 and sure.mean() > 0.3
    assert all(np.array_equal(a, b) for a, b in zip(run(), (image, mask)))


def test_albumentations_draws_are_independent():
    "Two transforms of one probability do not always come together"
    tfm, seen = ThirdParty(A.Compose([A.HorizontalFlip(), A.InvertImg()])), set()
    x = PILImage.create(picture())
    for seed in range(40):
        seed_all(seed)
        found = np.asarray(tfm((x,), 0)[0])
        inverted = int(not np.isin(found[0, :, 0], picture()[0, :, 0]).all())
        flipped = int(np.array_equal(255 - found[..., 0] if inverted else found[..., 0], picture()[:, ::-1, 0]))
        seen.add((flipped, inverted))
    assert len(seen) == 4


def test_albumentations_leaves_the_users_object_and_generators_alone():
    tfm = A.Compose([A.HorizontalFlip()], seed=3)
    before = tfm.py_random.getstate()
    wrapped = ThirdParty(tfm)
    for _ in range(3): wrapped((PILImage.create(picture()),), 0)
    assert tfm.py_random.getstate() == before


def test_boxes_that_leave_take_their_labels_along():
    boxes = TensorBBox(torch.tensor([[-0.9, -0.9, -0.8, -0.8], [-0.2, -0.2, 0.2, 0.2], [0.8, 0.8, 0.9, 0.9]]))
    sample = PILImage.create(picture()), boxes, TensorMultiCategory([7, 8, 9]), TensorBase([1, 2, 3])
    for tfm in (A.CenterCrop(20, 20), A.Compose([A.CenterCrop(20, 20)], bbox_params=A.BboxParams('coco', label_fields=['x'], min_visibility=0.5)),
                v2.Compose([v2.CenterCrop(20), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])):
        image, left, labels, other = ThirdParty(tfm)(sample, 0)
        assert left.shape == (1, 4) and labels.tolist() == [8] and type(labels) is TensorMultiCategory and other.tolist() == [1, 2, 3]
        assert torch.allclose(left, torch.tensor([[-0.2*64/20, -0.2*48/20, 0.2*64/20, 0.2*48/20]]), atol=1e-4), (tfm, left)


def test_several_images_get_the_same(folder: Path):
    x = PILImage.create(picture())
    for tfm in (v2.RandomAffine(40), A.Affine(rotate=(-40, 40), p=1), v1.ColorJitter(0.9)):
        first, second = ThirdParty(tfm)(((x, x), TensorCategory(0)), 0)[0]
        assert np.array_equal(first, second) and not np.array_equal(first, x)


# Types

@pytest.mark.parametrize('tfm,kind,dtype', [
    (v2.ToImage(), TensorImage, torch.uint8), (v2.PILToTensor(), TensorImage, torch.uint8), (v1.ToTensor(), TensorImage, torch.float32),
    (v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]), TensorImage, torch.float32), (A.ToTensorV2(), TensorImage, torch.uint8),
    (A.Normalize(), TensorImage, torch.float32), (A.ToFloat(255), TensorImage, torch.float32)])
def test_to_tensors(tfm, kind, dtype):
    image, mask = ThirdParty(tfm)((PILImage.create(picture()), PILMask.create(classes())), 1) if library_of(tfm) != 'torchvision.transforms' else (*ThirdParty(tfm)((PILImage.create(picture()),), 1), None)
    assert type(image) is kind and image.dtype == dtype and image.shape == (3, *SIZE)
    assert mask is None or isinstance(mask, (PILMask, TensorMask))
    grey = ThirdParty(tfm)((PILImageBW.create(picture()[..., 0]),), 1)[0] if not isinstance(tfm, A.Normalize) else None
    assert grey is None or type(grey) is TensorImageBW and grey.shape == (1, *SIZE)


def test_floats_are_not_divided_again(folder: Path):
    for tfm in (v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]), v1.ToTensor(), A.ToFloat(255)):
        x = block(item_tfms=[Resize(32), tfm]).dataloaders(folder, bs=6, num_workers=0).valid.one_batch()[0]
        assert x.dtype == torch.float32 and 0.4 < x.mean() < 0.6 and x.max() <= 1


def test_first_version_beside_a_mask():
    sample = PILImage.create(picture()), PILMask.create(classes())
    assert ThirdParty(v1.ColorJitter(0.5))(sample, 0)[1] is sample[1]
    for tfm in (v1.RandomRotation(30), v1.Compose([v1.ColorJitter(), v1.RandomCrop(20)]), v1.Lambda(lambda x: x)):
        with pytest.raises(TypeError, match='v2'): ThirdParty(tfm)(sample, 0)
        assert isinstance(ThirdParty(tfm)((sample[0], TensorCategory(1)), 0)[0], PILImage) # alone it is welcome


@pytest.mark.parametrize('tfm', [v2.AutoAugment(), v2.RandAugment(), v2.TrivialAugmentWide(), v2.AugMix(), v1.AutoAugment(), v1.RandAugment(),
                                 v2.ColorJitter(0.5, 0.5, 0.5, 0.1), v2.RandomPhotometricDistort(p=1), v2.GaussianBlur(5), A.CLAHE(p=1), A.GaussNoise(p=1)])
def test_labels_are_not_touched(tfm):
    label, words, number = TensorCategory(3), ['a'], 5
    for x in (PILImage.create(picture()), TensorImage(torch.from_numpy(picture()).permute(2, 0, 1).contiguous())):
        found = ThirdParty(tfm)((x, label, words, number), 0)
        assert type(found[0]) is type(x) and all(a is b for a, b in zip(found[1:], (label, words, number)))


# Which run when

class MyV2(v2.Transform):
    "A transform of the user's"
    def make_params(self, flat_inputs): return {}

class MyA(A.ImageOnlyTransform):
    "Another one"
    def apply(self, img, **params): return img

@pytest.mark.parametrize('tfm,shown', [
    (v2.Resize(20), 'v2.Resize'), (v2.ToImage(), 'v2.ToImage'), (v2.Normalize([0.5], [0.5]), 'v2.Normalize'), (v2.CenterCrop(4), 'v2.CenterCrop'),
    (v2.Grayscale(), 'v2.Grayscale'), (A.Resize(4, 4), 'Resize'), (A.Normalize(), 'Normalize'),
    *((o, 'training only') for o in (v2.RandomHorizontalFlip(), v2.ColorJitter(), v2.AutoAugment(), v2.GaussianBlur(3), v2.RandomResizedCrop(4), v2.GaussianNoise(),
        v2.RandomApply([v2.Grayscale()]), v2.ElasticTransform(), v2.RandomErasing(), v2.AugMix(), v2.JPEG((5, 50)), MyV2(), v1.RandomCrop(3), v1.ColorJitter(),
        v1.RandAugment(), A.HorizontalFlip(p=1), A.Normalize(p=0.5), A.OneOf([A.Blur()]), MyA(p=1), A.Compose([A.Resize(3, 3)], p=0.5))),
    (v2.Compose([v2.Resize(3), v2.Compose([v2.ColorJitter(), v2.ToImage()])]), '[validation: Resize, ToImage]'),
    (A.Compose([A.RandomCrop(3, 3), A.Normalize()]), '[validation: Normalize]'), (v2.Compose([v2.ToImage()]), 'v2.Compose(ToImage)')])
def test_what_is_random(tfm, shown: str):
    text = repr(ThirdParty(tfm))
    assert shown in text and ('training only' in text) == (shown == 'training only') and ('validation' in text) == ('validation' in shown)
    assert 'training only' in repr(train_only(tfm)) and '[' not in repr(ThirdParty(tfm, splits='both'))


def test_validation_is_not_augmented(folder: Path):
    for tfm in (v2.Compose([v2.ColorJitter(0.9), v2.RandomInvert(p=1)]), v2.Compose([v2.RandomInvert(p=1), v2.ToImage()]), A.InvertImg(p=1), [v1.RandomInvert(p=1)]):
        plain_dls = block(item_tfms=Resize(32, method='squish')).dataloaders(folder, bs=6, num_workers=0)
        dls = block(item_tfms=[Resize(32, method='squish')] + (tfm if isinstance(tfm, list) else [tfm])).dataloaders(folder, bs=6, num_workers=0)
        assert torch.equal(dls.valid.one_batch()[0], plain_dls.valid.one_batch()[0])
        images = dls.train.make_batch(range(6))[0], plain_dls.train.make_batch(range(6))[0]
        assert not torch.allclose(*images, atol=0.05)


def test_functions_run_on_all_as_in_fastai(folder: Path):
    "A plain function is chosen by its annotation, and runs on validation samples too"
    def darken(x: PILImage): return x.point(lambda v: 0)
    dls = block(item_tfms=[Resize(32), darken]).dataloaders(folder, bs=6, num_workers=0)
    assert dls.train.one_batch()[0].max() == 0 and dls.valid.one_batch()[0].max() == 0
    dls = block(item_tfms=[Resize(32), train_only(darken)]).dataloaders(folder, bs=6, num_workers=0)
    assert dls.train.one_batch()[0].max() == 0 and dls.valid.one_batch()[0].max() > 0


def test_place_in_the_pipeline():
    "Where the user has written it, before or after `Resize`, and before `ToTensor`"
    names = lambda fs: [type(o).__name__ for o in Pipeline(fs).fs]
    assert names([ToTensor, Resize(8), v2.ColorJitter()]) == ['Resize', 'ThirdParty', 'ToTensor']
    assert names([ToTensor, v2.ColorJitter(), Resize(8)]) == ['ThirdParty', 'Resize', 'ToTensor']


# The same twice

RANDOM = {'v2': v2.Compose([v2.RandomAffine(30), v2.ColorJitter(0.5)]), 'v1': v1.Compose([v1.RandomRotation(30), v1.RandomApply([v1.ColorJitter(0.5)])]),
          'A': A.Compose([A.Affine(rotate=(-30, 30), p=0.7), A.RandomBrightnessContrast(), A.GaussNoise()])}

@pytest.mark.parametrize('name', RANDOM)
def test_any_number_of_workers(folder: Path, name: str):
    def epochs(workers: int):
        dls = block(item_tfms=[Resize(32), RANDOM[name]]).dataloaders(folder, bs=2, num_workers=workers, seed=5)
        return [x for _ in range(2) for x, _ in dls.train]
    random.seed()
    one = epochs(0)
    torch.manual_seed(random.getrandbits(30))
    two = epochs(2)
    assert len(one) == len(two) == 6 and all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(one[0].sort(0)[0], one[3].sort(0)[0])


def test_on_batches(folder: Path):
    "torchvision draws once for a batch; the draw follows from the seed"
    def batches(tfm, **kwargs):
        return list(block(item_tfms=Resize(32), batch_tfms=tfm).dataloaders(folder, bs=3, num_workers=0, seed=5, **kwargs).train)
    one, two, plain_batches = batches(v2.RandomAffine(40)), batches(v2.RandomAffine(40)), batches(None)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, two))
    assert not any(torch.allclose(a[0], b[0]) for a, b in zip(one, plain_batches))
    with pytest.raises(Exception, match='put it into item_tfms'): batches(A.HorizontalFlip(p=1))


def test_order_on_batches(folder: Path):
    "A transform that needs floats comes after they are made, if one says so"
    with pytest.raises(Exception, match='(?s)v2.Normalize'): block(item_tfms=Resize(32), batch_tfms=v2.Normalize([0.5], [0.5])).dataloaders(folder, bs=3, num_workers=0)
    dls = block(item_tfms=Resize(32), batch_tfms=ThirdParty(v2.Normalize([0.5], [0.5]), order=11)).dataloaders(folder, bs=6, num_workers=0)
    plain_x = block(item_tfms=Resize(32)).dataloaders(folder, bs=6, num_workers=0).valid.one_batch()[0]
    assert torch.allclose(dls.valid.one_batch()[0], plain_x*2 - 1, atol=1e-5)


def test_masks_in_a_block(folder: Path):
    "Segmentation: the batch has an image and its mask, moved alike"
    mask_block = TransformBlock(type_tfms=PILMask.create, item_tfms=ToTensor, batch_tfms=IntToFloatTensor)
    for tfm in (v2.RandomAffine(40), A.Affine(rotate=(-40, 40), p=1)):
        dls = DataBlock((ImageBlock, mask_block), get_items=get_image_files, get_y=grey_of, splitter=RandomSplitter(0.5, seed=0),
                        item_tfms=[Resize(32), tfm]).dataloaders(folder, bs=6, num_workers=0)
        x, y = dls.train.one_batch()
        assert x.shape == (6, 3, 32, 32) and y.shape == (6, 32, 32) and y.dtype == torch.int64
        outside = (x.sum(1) == 0) & (y == 0)
        assert outside[:, 0].any() and ((x.sum(1) == 0) == (y == 0)).float().mean() > 0.9


# Errors, predictions, exports

def test_an_error_names_the_file_and_the_transform(folder: Path):
    with pytest.raises(Exception, match=r'(?s)\.png.*v2\.RandomCrop'): block(item_tfms=[v2.RandomCrop(400), Resize(32)]).dataloaders(folder, bs=2, num_workers=0)
    with pytest.raises(TypeError, match='one image for one image'): ThirdParty(v2.FiveCrop(10))((PILImage.create(picture()),), 0)


def learner(folder: Path, tfms) -> Learner:
    dls = block(item_tfms=tfms).dataloaders(folder, bs=4, num_workers=0, path=folder)
    return Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)), loss_func=nn.CrossEntropyLoss())


def test_export_needs_trust_for_what_runs_on_validation_samples(folder: Path, tmp_path: Path):
    for tfm in (v2.Compose([v2.Resize((20, 20)), v2.ColorJitter(0.9)]), A.Compose([A.Resize(20, 20), A.InvertImg(p=1)])):
        learn = learner(folder, [tfm])
        file = learn.export(tmp_path/'x.pkl')
        with pytest.raises(Exception) as caught: load_learner(file)
        message = f'{caught.value} {caught.value.__cause__}'
        assert 'trust=True' in message and ('torchvision.transforms.v2' in message or 'albumentations' in message)
        predictor, item = load_learner(file, trust=True), get_image_files(folder)[0]
        assert torch.allclose(predictor.predict(item)[2], learn.predict(item)[2])
        kept = predictor.pipeline.item_tfms.fs[0]
        assert isinstance(kept, ThirdParty) and [type(o).__name__ for o in kept.parts] == ['Resize'] # no augmentation is exported


def test_export_of_augmentation_needs_no_trust(folder: Path, tmp_path: Path):
    learn = learner(folder, [Resize(32), v2.ColorJitter(0.5), A.HorizontalFlip()])
    predictor = load_learner(learn.export(tmp_path/'x.pkl'))
    item = get_image_files(folder)[0]
    assert torch.allclose(predictor.predict(item)[2], learn.predict(item)[2]) and len(predictor.pipeline.item_tfms.fs) == 2


def test_a_sample_without_images_passes():
    sample = TensorCategory(1), 'text'
    for tfm in (v2.RandomHorizontalFlip(p=1), A.HorizontalFlip(p=1), v1.RandomRotation(30)): assert ThirdParty(tfm)(sample, 0) is sample


def test_recognised_by_their_modules():
    assert library_of(v2.Resize(3)) == 'torchvision.transforms.v2' and library_of(v1.Resize(3)) == 'torchvision.transforms'
    assert library_of(A.Compose([])) == library_of(MyA()) == 'albumentations' and library_of(MyV2()) == 'torchvision.transforms.v2'
    assert library_of(nn.Identity()) is library_of(len) is library_of(None) is library_of(Resize(3)) is None
    assert target_of(PILMask.create(classes())) == 'mask' and target_of(TensorCategory(1)) is None and target_of(torch.zeros(3, 4, 4)) is None
