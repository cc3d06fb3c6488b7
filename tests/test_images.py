"""Images on their way from files to batches: damaged files, large files, many files, masks, seeds, geometry."""
import copy
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from PIL import Image

from lamella.base.seeds import no_random
from lamella.data.blocks import CategoryBlock
from lamella.data.datablock import DataBlock
from lamella.data.labels import parent_label
from lamella.data.loader import DataLoader
from lamella.data.pipeline import DataError, Pipeline
from lamella.data.sources import get_image_files
from lamella.data.transform import Transform
from lamella.vision.augment import Brightness, Contrast, Hue, RandomErasing, Saturation, aug_transforms
from lamella.vision.batch import IntToFloatTensor, Normalize, imagenet_stats
from lamella.vision.data import ImageBlock, ImageDataLoaders
from lamella.vision.files import verify_images
from lamella.vision.geometry import Dihedral, Flip, Rotate, Warp, Zoom
from lamella.vision.transforms import CropPad, FlipItem, RandomCrop, RandomResizedCrop, Resize, ToTensor
from lamella.vision.types import (PILBase, PILImage, PILImageBW, PILMask, TensorImage, TensorMask, image2tensor)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    "Something with structure, of any size"
    small = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    picture(320, 240).save(tmp_path/'photo.jpg', quality=95)
    return tmp_path/'photo.jpg'


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[int, int]]:
    "The sizes of all images that PIL decodes from now on"
    from PIL import ImageFile
    sizes, load = [], ImageFile.ImageFile.load
    def _load(self):
        if self.tile: sizes.append(self.size)
        return load(self)
    monkeypatch.setattr(ImageFile.ImageFile, 'load', _load)
    return sizes


# Damaged files

def test_text_named_jpg(tmp_path: Path):
    (tmp_path/'notes.jpg').write_text('not a picture')
    with pytest.raises(Image.UnidentifiedImageError) as caught: PILImage.create(tmp_path/'notes.jpg')
    assert any('notes.jpg' in note and 'verify_images' in note for note in caught.value.__notes__)


def test_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match='nothing.jpg'): PILImage.create(tmp_path/'nothing.jpg')


@pytest.mark.parametrize('read', [PILBase.load, np.asarray, Resize(32), RandomResizedCrop(32), CropPad(32), ToTensor()],
                         ids=['load', 'array', 'Resize', 'RandomResizedCrop', 'CropPad', 'ToTensor'])
def test_truncated_jpeg(photo: Path, read):
    photo.write_bytes(photo.read_bytes()[:-2000])
    with pytest.raises(OSError, match='truncated') as caught: read(PILImage.create(photo))
    assert any('photo.jpg' in note and 'verify_images' in note for note in caught.value.__notes__)


@pytest.mark.parametrize('ending', ['png', 'webp', 'bmp', 'tiff', 'gif', 'jpg'])
def test_damaged_file_of_any_kind(tmp_path: Path, ending: str):
    file = tmp_path/f'x.{ending}'
    picture(64, 64).save(file)
    good = file.read_bytes()
    file.write_bytes(good[:len(good)//3])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(Exception) as caught: np.asarray(PILImage.create(file))
    assert f'x.{ending}' in '\n'.join(getattr(caught.value, '__notes__', []))


def test_loader_names_the_damaged_file(tmp_path: Path):
    for label in 'ab':
        (tmp_path/label).mkdir()
        for i in range(4): picture(40, 40, i).save(tmp_path/label/f'{i}.jpg')
    file = tmp_path/'b'/'2.jpg'
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match=r'2\.jpg') as caught:
        ImageDataLoaders.from_folder(tmp_path, valid_pct=0.25, item_tfms=Resize(32), bs=2, num_workers=0)
    assert 'verify_images' in str(caught.value) and 'Resize' in str(caught.value)


def test_verify_images(tmp_path: Path):
    for i in range(5): picture(40, 40, i).save(tmp_path/f'{i}.jpg')
    (tmp_path/'1.jpg').write_bytes((tmp_path/'1.jpg').read_bytes()[:-100])
    (tmp_path/'3.jpg').write_text('')
    failed = verify_images(get_image_files(tmp_path))
    assert [o.name for o in failed] == ['1.jpg', '3.jpg']
    assert len(list(tmp_path.iterdir())) == 5 # nothing is deleted


# Kinds of files

@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L', 'LA', 'P', '1', 'CMYK', 'I;16', 'I'])
@pytest.mark.parametrize('ending', ['png', 'tiff', 'jpg'])
def test_modes_become_rgb(tmp_path: Path, mode: str, ending: str):
    if mode in ('CMYK', 'I') and ending == 'png' or ending == 'jpg' and mode not in ('RGB', 'L', 'CMYK'): pytest.skip('no such file')
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    deep = {'I;16': np.uint16, 'I': np.int32}.get(mode)
    image = Image.fromarray(grey.astype(deep)*257) if deep else Image.fromarray(grey).convert('RGB').convert(mode)
    image.save(tmp_path/f'x.{ending}')
    made = PILImage.create(tmp_path/f'x.{ending}')
    assert made.mode == 'RGB' and image2tensor(made).shape == (3, 8, 8)
    wanted = np.stack([grey]*3, -1) if deep else np.asarray(image.convert('RGB'))
    assert np.abs(np.asarray(made).astype(int) - wanted).max() <= (12 if ending == 'jpg' else 0)


def test_palette_of_a_mask_is_dropped(tmp_path: Path):
    classes = np.arange(64, dtype=np.uint8).reshape(8, 8) % 5
    mask = Image.fromarray(classes)
    mask.putpalette([o for i in range(256) for o in (i*37 % 256, i*91 % 256, 7)])
    mask.save(tmp_path/'mask.png')
    assert (np.asarray(PILMask.create(tmp_path/'mask.png')) == classes).all()


def test_bytes_and_copies(photo: Path):
    wanted = np.asarray(Image.open(photo))
    for image in (PILImage.create(photo.read_bytes()), copy.deepcopy(PILImage.create(photo)), PILImage.create(str(photo)),
                  pickle.loads(pickle.dumps(PILImage.create(photo))), PILImage.create(wanted), PILImage.create(image2tensor(Image.open(photo)))):
        assert type(image) is PILImage and (np.asarray(image) == wanted).all()


def test_pickle_does_not_need_the_file(photo: Path):
    pickled = pickle.dumps(PILImage.create(photo))
    photo.unlink()
    assert pickle.loads(pickled).size == (320, 240)


# Large and many files

@pytest.mark.parametrize('tfm,split_idx', [(Resize(224), 0), (Resize(224), 1), (Resize(224, 'squish'), 0), (Resize(224, 'pad'), 1), (RandomResizedCrop(224), 1)])
@pytest.mark.parametrize('cls', [PILImage, PILImageBW])
def test_large_jpeg_is_decoded_small(tmp_path: Path, decoded, cls, tfm: Transform, split_idx: int):
    picture(4000, 3000).save(tmp_path/'phone.jpg', quality=70)
    image = cls.create(tmp_path/'phone.jpg')
    assert image.size == (4000, 3000) and not decoded
    assert tfm(image, split_idx).size == (224, 224)
    least = 224 if tfm.init_args.get('method') == 'pad' else 300
    assert len(decoded) == 1 and max(decoded[0]) <= 2*max(least, 299), decoded


def test_random_crops_of_a_large_jpeg(tmp_path: Path, decoded):
    picture(2000, 1500).save(tmp_path/'phone.jpg', quality=70)
    tfm = RandomResizedCrop(64)
    for _ in range(20):
        assert tfm(PILImage.create(tmp_path/'phone.jpg'), 0).size == (64, 64)
        width = 64/(tfm.box[2] - tfm.box[0]), 64/(tfm.box[3] - tfm.box[1])
        assert decoded[-1][0] < 2*width[0] + 8 or decoded[-1][1] < 2*width[1] + 8 or decoded[-1] == (250, 188)
    assert (2000, 1500) not in decoded


def test_small_and_large_decoding_agree(photo: Path):
    lazy = np.asarray(Resize(60)(PILImage.create(photo), 1)).astype(float)
    full = PILImage.create(photo)
    full.load()
    assert np.abs(lazy - np.asarray(Resize(60)(full, 1))).mean() < 1.5


@pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='counts file handles as Linux does')
def test_ten_thousand_open_images(photo: Path):
    before = len(os.listdir('/proc/self/fd'))
    images = [PILImage.create(photo) for _ in range(10_000)]
    assert len(os.listdir('/proc/self/fd')) - before < 20
    wanted = np.asarray(Image.open(photo))
    for image in (images[0], images[5000], images[-1]): assert (np.asarray(image) == wanted).all()


def test_open_file_of_another_process_is_not_read(photo: Path, monkeypatch):
    "After a fork both processes would share, and move, one position in the file"
    image, wanted = PILImage.create(photo), np.asarray(Image.open(photo))
    mine, pid = image._opened
    monkeypatch.setattr(os, 'getpid', lambda: pid + 1)
    assert (np.asarray(image) == wanted).all() and mine.fp is None


def test_images_that_were_opened_before_a_fork(photo: Path):
    dataset = [(image, 0) for image in [PILImage.create(photo)]*4]
    x, _ = next(iter(DataLoader(dataset, bs=2, num_workers=2, after_item=[Resize(32), ToTensor()], split_idx=1)))
    assert (x[0] == x[1]).all()


# Image and mask

@pytest.mark.parametrize('tfm', [Resize(48), Resize(48, 'pad'), Resize(48, 'pad', 'zeros'), Resize(48, 'squish'), RandomResizedCrop(48, 0.3), RandomCrop(48), CropPad(48),
                                 FlipItem(0.5)], ids=repr)
def test_image_and_mask_get_the_same(tfm: Transform):
    classes = np.kron(np.arange(12).reshape(3, 4), np.ones((30, 30))).astype(np.uint8)
    image, mask = PILImage.create(np.stack([classes*20]*3, -1)), PILMask.create(classes)
    with no_random(2): a, b = tfm((image, mask), 0)
    assert type(a) is PILImage and type(b) is PILMask and a.size == b.size
    assert set(np.unique(b)) <= set(range(12))
    assert (np.abs(np.asarray(a)[..., 0]/20 - np.asarray(b)) < 0.6).mean() > 0.85


def test_batch_of_images_and_masks_gets_the_same():
    classes = torch.from_numpy(np.kron(np.arange(12).reshape(3, 4), np.ones((20, 15)))).byte().expand(8, 60, 60)
    pipe = Pipeline([IntToFloatTensor(div=1.), *aug_transforms(2., max_lighting=0., flip_vert=True, size=50, min_scale=0.5)], 0)
    image, mask = pipe((TensorImage(classes[:, None].contiguous()), TensorMask(classes)))
    assert mask.dtype == torch.int64 and mask.shape == (8, 50, 50) and set(mask.unique().tolist()) <= set(range(12))
    assert ((image[:, 0] - mask).abs() < 0.01).float().mean() > 0.6


# Seeds

def labelled(folder: Path) -> DataBlock:
    for label in 'ab':
        (folder/label).mkdir()
        for i in range(6): picture(48, 40, i).save(folder/label/f'{i}.png')
    return DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=RandomResizedCrop(32),
                     batch_tfms=[*aug_transforms(2., xtra_tfms=[Saturation(), Hue(), RandomErasing(1.)]), Normalize.from_stats(*imagenet_stats)])


def test_same_seed_same_batches(tmp_path: Path):
    block = labelled(tmp_path)
    def _batches(seed, workers):
        with no_random(0): dls = block.dataloaders(tmp_path, bs=4, seed=seed, num_workers=workers)
        return [x for _ in range(2) for x, _ in dls.train]
    one, two, other = _batches(5, 0), _batches(5, 2), _batches(6, 0)
    assert len(one) == 4 and all((a == b).all() for a, b in zip(one, two))
    assert not (one[0] == other[0]).all() and not (one[0] == one[2]).all()


@pytest.mark.parametrize('threads', [1, 2, 3])
def test_threads_change_nothing(threads: int):
    before, x = torch.get_num_threads(), TensorImage(torch.arange(11*3*300*300).view(11, 3, 300, 300).remainder(251).byte())
    pipe = Pipeline([IntToFloatTensor(), *aug_transforms(), Normalize.from_stats(*imagenet_stats)], 0)
    with no_random(1): wanted = pipe(x)
    try:
        torch.set_num_threads(threads)
        with no_random(1), torch.inference_mode(): made = pipe(TensorImage(x.clone()))
        assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(before)
    assert torch.equal(made.clone(), wanted)


def test_batch_is_not_changed():
    for x in (torch.randint(0, 256, (4, 3, 20, 20), dtype=torch.uint8), torch.rand(4, 3, 20, 20)):
        before = x.clone()
        Pipeline([*aug_transforms(2.), Hue(), Saturation(), Normalize.from_stats(*imagenet_stats), RandomErasing(1.)], 0)(TensorImage(x))
        assert torch.equal(x, before)


# Geometry and light against their definitions, with 64 bits

def sampled(image: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "Bilinear sampling with mirrored edges: `image` (c,h,w), `matrix` from result to image, coordinates from -1 to 1; and where 32 bits say enough: far from the horizon, behind which a perspective turns over"
    _, h, w = image.shape
    y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing='ij')
    u, v, t = np.einsum('ij,jhw->ihw', matrix, np.stack([x, y, np.ones_like(x)]))
    def _places(values, n):
        position = np.abs((values/t + 1)/2*(n - 1)) % (2*(n - 1))
        position = np.where(position > n - 1, 2*(n - 1) - position, position)
        first = np.minimum(position.astype(int), n - 2)
        return first, position - first
    (i, a), (j, b) = _places(v, h), _places(u, w)
    values = ((1 - a)*((1 - b)*image[:, i, j] + b*image[:, i, j + 1]) + a*((1 - b)*image[:, i + 1, j] + b*image[:, i + 1, j + 1]))
    return values, np.abs(t) > 0.05


def warp_matrix(x: float, y: float) -> np.ndarray:
    "The corners move: solved as eight equations"
    rows, corners = [], [(a, b) for a in (-1, 1) for b in (-1, 1)]
    for a, b in corners:
        u, v = a - a*b*y, b - a*b*x
        rows += [[u, v, 1, 0, 0, 0, -a*u, -a*v], [0, 0, 0, u, v, 1, -b*u, -b*v]]
    return np.append(np.linalg.solve(np.array(rows), np.array(corners).reshape(-1)), 1).reshape(3, 3)


def reference(h: int, w: int, flip: bool, warp: tuple, degrees: float, zoom: float, at: tuple) -> np.ndarray:
    "The product of the four, each by its definition"
    t, s = np.deg2rad(degrees), 1/zoom
    turn = np.array([[np.cos(t), np.sin(t)*h/w, 0], [-np.sin(t)*w/h, np.cos(t), 0], [0, 0, 1]])
    zooms = np.array([[s, 0, (1 - s)*(2*at[0] - 1)], [0, s, (1 - s)*(2*at[1] - 1)], [0, 0, 1]])
    return np.diag([-1. if flip else 1., 1., 1.]) @ warp_matrix(*warp) @ turn @ zooms


number = st.floats(-0.3, 0.3)
shares = st.tuples(st.floats(0, 1), st.floats(0, 1))


@settings(max_examples=60, deadline=None)
@example(34, 8, False, (0.28125, 0.), 16., 0.75, (0., 0.)) # a pixel on the horizon, 40,000 pixels from the picture
@given(st.integers(8, 40), st.integers(8, 40), st.booleans(), st.tuples(number, number), st.floats(-180, 180), st.floats(0.7, 2.5), shares)
def test_composed_geometry(h: int, w: int, flip: bool, warp: tuple, degrees: float, zoom: float, at: tuple):
    image = np.asarray(picture(w, h, h)).transpose(2, 0, 1)
    batch = TensorImage(torch.from_numpy(image.copy())[None].repeat(2, 1, 1, 1))
    tfms = [IntToFloatTensor(), Flip(p=1., draw=float(flip)), Warp(p=1., draw_x=warp[0], draw_y=warp[1]), Rotate(p=1., draw=degrees),
            Zoom(p=1., draw=zoom, draw_x=at[0], draw_y=at[1])]
    made = Pipeline(tfms, 0)(batch)
    wanted, sure = sampled(image/255, reference(h, w, flip, warp, degrees, zoom, at))
    assert made.shape == batch.shape and made.min() >= 0 and made.max() <= 1 + 1e-6
    assert sure.mean() > 0.8 and np.abs(made[1].numpy() - wanted)[:, sure].max() < 2/255


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 0.95), st.floats(0.2, 5.), st.floats(0., 3.))
def test_composed_light(brightness: float, contrast: float, saturation: float):
    x = torch.from_numpy(np.asarray(picture(30, 20)).transpose(2, 0, 1).copy())[None].clamp(1, 254) # black has no logit
    made = Pipeline([IntToFloatTensor(), Brightness(p=1., draw=brightness), Contrast(p=1., draw=contrast), Saturation(p=1., draw=saturation)], 0)(TensorImage(x))
    z = (torch.logit(x.double()/255, eps=1e-7) + torch.logit(torch.tensor(brightness).double()))*contrast
    grey = (z*torch.tensor([0.299, 0.587, 0.114]).double().view(3, 1, 1)).sum(1, keepdim=True)
    assert (made - torch.sigmoid(saturation*z + (1 - saturation)*grey)).abs().max() < 1/255


@pytest.mark.parametrize('k', range(8))
def test_dihedral(k: int):
    x = torch.rand(1, 2, 9, 9)
    wanted = x
    if k in (1, 3, 4, 7): wanted = wanted.flip(-1)
    if k in (2, 4, 5, 7): wanted = wanted.flip(-2)
    if k in (3, 5, 6, 7): wanted = wanted.transpose(-1, -2)
    assert (Dihedral(p=1., draw=k)(TensorImage(x)) - wanted).abs().max() < 1e-5


def test_drawn_for_each_image_or_for_the_batch():
    x = TensorImage(torch.rand(1, 3, 24, 24).repeat(40, 1, 1, 1))
    each, one = Pipeline(aug_transforms(2.), 0)(x), Pipeline(aug_transforms(2., batch=True), 0)(x)
    assert len({tuple(o.flatten()[:5].tolist()) for o in each}) > 30
    assert (one - one[:1]).abs().max() < 1e-5


def test_probabilities():
    x = TensorImage(torch.rand(1, 1, 8, 8).repeat(2000, 1, 1, 1))
    for p in (0.25, 0.75):
        changed = (Rotate(30, p=p)(x) - x).abs().flatten(1).amax(1) > 1e-3
        assert abs(changed.float().mean() - p) < 0.06
        assert Rotate(0., p=p)(x, 0) is x


def test_normalize_without_statistics_takes_them_from_a_training_batch():
    "Not from the few samples that are tried when the loaders are built, and not from validation images"
    from lamella.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, Normalize

    def picture(i): return np.full((8, 8, 3), 100 if i >= 40 else i % 2 * 40, dtype=np.uint8)
    block = DataBlock(blocks=(ImageBlock, CategoryBlock(vocab=[0, 1])), get_x=picture, get_y=lambda i: i % 2,
                      splitter=IndexSplitter(list(range(40, 50))), batch_tfms=Normalize())
    dls = block.dataloaders(list(range(50)), bs=40, num_workers=0, device='cpu')
    assert torch.allclose(dls.train.after_batch[-1].mean.flatten(), torch.full((3,), 20 / 255), atol=1e-4)
    assert dls.valid.after_batch[-1] is dls.train.after_batch[-1]


def test_pixels_for_inference_and_gradients_leave_no_trace():
    "The memory that is kept for a thread is neither an inference tensor nor part of a graph"
    import lamella.vision.pixels as pixels
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        pixels._thread.floats = None
        x, run = TensorImage(torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8)), Normalize.from_stats(*imagenet_stats)
        with torch.inference_mode(): IntToFloatTensor()(x)
        a = IntToFloatTensor()(x)
        assert not run(TensorImage(torch.rand(2, 3, 8, 8).requires_grad_())).requires_grad
        assert not run(a).requires_grad and torch.equal(IntToFloatTensor()(x), a)
    finally: torch.set_num_threads(threads)


def test_normalize_learns_from_images_of_16_bits_and_beside_masks():
    deep = TensorImage(torch.randint(0, 65536, (4, 3, 8, 8)).to(torch.uint16))
    done = Pipeline([IntToFloatTensor(), Normalize()], 0)((TensorMask(torch.zeros(4, 8, 8, dtype=torch.uint8)), deep))[1]
    assert abs(float(done.mean())) < 1e-3 and abs(float(done.std()) - 1) < 0.01


def test_normalize_names_the_channels_of_the_second_image():
    both = TensorImage(torch.rand(2, 3, 8, 8)), TensorImage(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match='have 1 channels, and Normalize has the statistics of 3'): Normalize.from_stats(*imagenet_stats)(both)
