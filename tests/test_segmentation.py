"""Semantic segmentation from files to an exported file: encoders, U-Nets, masks, predictions, and what is wrong with them, by the name of the file."""
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from lamella.base.seeds import set_seed
from lamella.data.blocks import TransformBlock
from lamella.data.datablock import DataBlock
from lamella.data.pipeline import DataError
from lamella.data.sources import get_image_files
from lamella.data.splitters import IndexSplitter, RandomSplitter
from lamella.data.types import plain
from lamella.export import load_learner
from lamella.losses import CombinedLoss, CrossEntropyLossFlat, DiceLoss, FocalLoss
from lamella.metrics import Dice, DiceMulti, JaccardCoeffMulti, foreground_acc
from lamella.nets.unet import DynamicUnet
from lamella.vision.augment import aug_transforms
from lamella.vision.batch import Normalize
from lamella.vision.data import ImageBlock, MaskBlock, SegmentationDataLoaders
from lamella.vision.encoders import create_encoder
from lamella.vision.nets import Architecture, build_body
from lamella.vision.original import predict_mask
from lamella.vision.shapes import make_shapes
from lamella.vision.transforms import Resize
from lamella.vision.types import PILImageBW, TensorImage
from lamella.vision.unet import create_unet_model, unet_learner

CODES = ['background', 'circle', 'square', 'triangle']


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path: return make_shapes(tmp_path_factory.mktemp('shapes'), n=12, size=40, seed=3)

@pytest.fixture
def own_shapes(tmp_path) -> Path:
    "Files that may be spoilt"
    return make_shapes(tmp_path, n=6, size=32, seed=4)

def loaders(path: Path, **options) -> SegmentationDataLoaders:
    return SegmentationDataLoaders.from_folder(path, **{'bs': 4, 'seed': 1, 'num_workers': 0, 'device': 'cpu', **options})

def quiet(learn):
    learn.remove_cb(next(o for o in learn.cbs if type(o).__name__ == 'ProgressCallback'))
    return learn

# Models

@pytest.mark.parametrize('arch', ['torchvision:resnet18', 'torchvision:mobilenet_v3_small', 'torchvision:regnet_x_400mf', 'torchvision:squeezenet1_1',
    'test_resnet', 'test_efficientnet', 'test_convnext', 'test_vit', 'test_byobnet', 'tf_efficientnet_lite0', 'mobilenetv3_small_050', 'convnext_atto'])
def test_a_result_for_each_pixel_and_a_gradient_for_each_weight(arch):
    model = create_unet_model(arch, 3, (64, 72), pretrained=False)
    for size in ((64, 72), (45, 71), (96, 33)):
        with torch.no_grad(): assert model.eval()(torch.randn(1, 3, *size)).shape == (1, 3, *size)
    model.train()(torch.randn(2, 3, 64, 72)).square().sum().backward()
    first = next(model[0].parameters())
    assert first.grad is not None and first.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model[1:].parameters())

@pytest.mark.parametrize('arch,n', [('swin_tiny_patch4_window7_224', 4), ('torchvision:swin_t', 4), ('vit_tiny_patch16_224', 1), ('torchvision:googlenet', 5), ('torchvision:vgg11', 6), ('torchvision:shufflenet_v2_x0_5', 5), ('torchvision:densenet121', 5), ('pvt_v2_b0', 4)])
def test_encoders_of_other_kinds(arch, n):
    from lamella.nets.unet import last_of_each_size, map_shapes
    found = map_shapes(create_encoder(arch, img_size=(96, 64)), (96, 64))
    sizes = [found[k][1:] for k in last_of_each_size(found)]
    assert len(sizes) == n and sizes == sorted(sizes, reverse=True)

def resnet18_chain(): return nn.Sequential(*list(torchvision.models.resnet18().children())[:-2])

OF_FASTAI = [(resnet18_chain, {}, 31113208, [512, 384, 256, 96]), (resnet18_chain, {'self_attention': True}, 31297529, [512, 384, 256, 96]), (resnet18_chain, {'last_cross': False}, 30936580, [512, 384, 256, 96]),
    (lambda: torchvision.models.vgg11_bn().features, {}, 62635992, [768, 896, 704, 480, 152]), (lambda: torchvision.models.mobilenet_v3_small().features, {}, 16855384, [336, 192, 112, 36])]

@pytest.mark.parametrize('encoder,options,n,widths', OF_FASTAI)
def test_the_structure_is_that_of_fastai(encoder, options, n, widths):
    "Numbers of parameters and channels of fastai 2.8.12's DynamicUnet for images of 64x72"
    model = DynamicUnet(encoder(), 4, (64, 72), **options)
    assert (sum(p.numel() for p in model.parameters()), [o.n_out for o in model.blocks]) == (n, widths)

def test_the_numbers_are_those_of_fastai():
    "With the same weights, the same result"
    fastai = pytest.importorskip('fastai.vision.models.unet')
    theirs, ours = (kind(resnet18_chain(), 4, (64, 72), blur=True, y_range=(-1, 1)).eval() for kind in (fastai.DynamicUnet, DynamicUnet))
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values())))
    for size in ((64, 72), (50, 77)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad(): assert torch.allclose(plain(theirs(x)), ours(x), atol=1e-6)

def test_nothing_hangs_on_hooks():
    model = create_unet_model('test_resnet', 2, 64, pretrained=False).eval()
    assert not any(o._forward_hooks or o._forward_pre_hooks for o in model.modules())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): assert torch.allclose(torch.compile(model, backend='eager', fullgraph=True)(x), model(x))
    exported = torch.export.export(model, (x,))
    with torch.no_grad(): assert torch.allclose(exported.module()(x), model(x), atol=1e-5)

def test_the_body_of_another_learner():
    body, n = build_body('test_resnet')
    model = create_unet_model((body, n), 2, 64).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 2, 64, 64)
    assert torch.equal(next(model[0].parameters()), next(body.parameters()))
    with torch.no_grad(): next(model[0].parameters()).zero_()
    assert next(body.parameters()).abs().sum() > 0

def test_architectures_that_cannot_be_cut():
    with pytest.raises(ValueError, match='no chain of layers.*timm'): create_unet_model('torchvision:vit_b_16', 2, 64, pretrained=False)
    with pytest.raises(ValueError, match='resnet18'): create_unet_model('resnet81', 2, 64, pretrained=False)
    with pytest.raises(ValueError, match=r'nn.Sequential of its layers'): create_unet_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), 2, 16)

# Learning

def small(*sizes, n_in=3):
    "A chain of halving convolutions"
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in zip((n_in, *sizes), sizes)))

def bright(file: Path) -> np.ndarray: return (np.asarray(Image.open(file).convert('L')) > 127).astype(np.uint8)

def test_it_learns(shapes):
    "Which pixels are bright"
    set_seed(1)
    dls = loaders_of(shapes, bright, ['dark', 'bright'])
    learn = quiet(unet_learner(dls, small(8, 16), pretrained=False, metrics=[foreground_acc, DiceMulti(), JaccardCoeffMulti()]))
    assert (learn.loss_func.axis, learn.loss_func.ignore_index) == (1, 255)
    before = learn.validate(0)
    with learn.no_logging(): learn.fit_one_cycle(25, 1e-2)
    after = learn.validate(0)
    assert after[0] < before[0] / 2 and after[3] > 0.7 > before[3], (before, after)

def loaders_of(path: Path, mask_of, codes) -> SegmentationDataLoaders:
    return SegmentationDataLoaders.from_label_func(path, get_image_files(path/'images'), mask_of, codes=codes, bs=4, seed=1, num_workers=0, valid_pct=0.3, device='cpu')

@pytest.mark.parametrize('loss', [DiceLoss(), FocalLoss(), CrossEntropyLossFlat(axis=1, weight=torch.tensor([0.1, 1, 1, 1]), ignore_index=255), CombinedLoss({'focal': FocalLoss(), 'dice': DiceLoss()})])
def test_losses(loss, shapes, tmp_path):
    learn = quiet(unet_learner(loaders(shapes), small(8, 16), pretrained=False, loss_func=loss, path=tmp_path))
    with learn.no_logging(): learn.fit(1)
    assert np.isfinite(learn.recorder.losses).all() if hasattr(learn.recorder, 'losses') else True
    predictor = load_learner(learn.export('unet.pkl')) # an encoder of torch's layers needs no trust
    file = shapes/'images'/'0000.png'
    assert torch.equal(plain(learn.predict(file)[0]), plain(predictor.predict(file)[0]))

def test_weights_of_classes_change_what_is_learned(shapes):
    share = []
    for weight in (None, torch.tensor([0.01, 1, 1, 1])):
        set_seed(2)
        learn = quiet(unet_learner(loaders(shapes), small(8, 16), pretrained=False, loss_func=CrossEntropyLossFlat(axis=1, weight=weight, ignore_index=255)))
        with learn.no_logging(): learn.fit(6, 3e-3)
        share.append(float((learn.get_preds(with_preds=False, with_decoded=True)[2] > 0).float().mean()))
    assert share[1] > share[0] + 0.1, share

def test_pixels_without_a_class_do_not_count(own_shapes):
    for file in (own_shapes/'masks').iterdir():
        mask = np.array(Image.open(file))
        mask[:, 16:] = 77
        Image.fromarray(mask).save(file)
    dls = loaders(own_shapes, ignore=77)
    x, y = dls.one_batch()
    assert (y[:, :, 16:] == 255).all() and (y[:, :, :16] < 4).all()
    logits = torch.randn(len(y), 4, 32, 32)
    loss = unet_learner(dls, small(8), pretrained=False).loss_func
    assert torch.allclose(loss(logits, y), loss(logits[..., :16], y[..., :16]))

def test_freezing_and_fine_tuning(shapes):
    weights = Architecture('timm', 'test_resnet')().state_dict()
    dls = loaders(shapes)
    learn = quiet(unet_learner(dls, 'test_resnet', weights=weights))
    assert dls.valid.after_batch.find(Normalize) is not None
    encoder, decoder = learn.model[0], learn.model[1:]
    fixed = next(encoder.parameters()).clone()
    assert not next(encoder.parameters()).requires_grad and all(p.requires_grad for p in decoder.parameters())
    with learn.no_logging():
        learn.fit(1)
        assert torch.equal(next(encoder.parameters()), fixed)
        learn.fine_tune(1)
    assert not torch.equal(next(encoder.parameters()), fixed)

def test_its_own_statistics(shapes):
    "Normalisation is that of the encoder's weights"
    import timm
    name = 'test_vit'
    dls = loaders(shapes)
    unet_learner(dls, name, weights=Architecture('timm', name)().state_dict())
    mean = dls.valid.after_batch.find(Normalize).mean.flatten().tolist()
    assert mean == pytest.approx(timm.get_pretrained_cfg(name).mean)

# Channels and sizes

@pytest.mark.parametrize('n_in', [1, 5])
def test_other_numbers_of_channels(shapes, n_in):
    def opened(file):
        picture = np.asarray(Image.open(file).convert('L'))
        return TensorImage(torch.from_numpy(np.stack([picture] * n_in)))
    block = DataBlock((TransformBlock(type_tfms=opened, batch_tfms=ImageBlock().batch_tfms), MaskBlock(CODES)), get_items=lambda o: get_image_files(o/'images'), get_y=lambda o: o.parent.parent/'masks'/o.name, splitter=RandomSplitter(seed=1))
    dls = block.dataloaders(shapes, bs=4, num_workers=0)
    learn = quiet(unet_learner(dls, 'test_resnet', pretrained=False))
    with learn.no_logging(): learn.fit(1)
    assert learn.get_preds()[0].shape[1:] == (4, 40, 40)
    with pytest.raises(ValueError, match=f'the images have {n_in} channels, and n_in=3'): unet_learner(dls, 'test_resnet', pretrained=False, n_in=3)

def test_grey_pictures_with_weights_of_colour(shapes):
    weights = Architecture('timm', 'test_resnet')().state_dict()
    learn = quiet(unet_learner(loaders(shapes, img_cls=PILImageBW), 'test_resnet', weights=weights))
    assert next(learn.model[0].parameters()).shape[1] == 1
    with learn.no_logging(): learn.fit(1)

def test_other_sizes_after_training(shapes):
    learn = quiet(unet_learner(loaders(shapes), 'test_convnext', pretrained=False, metrics=DiceMulti()))
    for size in ((51, 51), (48, 70)):
        other = loaders(shapes, item_tfms=Resize(size, 'squish'))
        assert learn.get_preds(dl=other.valid)[0].shape[2:] == size

# Predictions

@pytest.fixture(scope='module')
def trained(shapes, tmp_path_factory):
    learn = quiet(unet_learner(loaders(shapes, item_tfms=Resize(36), batch_tfms=aug_transforms(size=32)), 'test_resnet', weights=Architecture('timm', 'test_resnet')().state_dict(),
        path=tmp_path_factory.mktemp('learner'), act_cls=nn.SiLU, norm_type='Batch', blur=True, self_attention=True))
    with learn.no_logging(): learn.fit(1)
    return learn

def test_decisions_without_the_predictions(trained):
    preds, targets, decided, losses = trained.get_preds(with_decoded=True, with_loss=True)
    nothing, _, same = trained.get_preds(with_preds=False, with_decoded=True)
    assert nothing is None and torch.equal(same, decided) and preds.shape[:2] == (2, 4) and decided.shape == targets.shape == (2, 32, 32)
    assert torch.allclose(losses.mean(), torch.tensor(trained.validate()[0]))

def test_the_file_is_loaded_in_another_process_without_trust(trained, shapes):
    file, exported = shapes/'images'/'0003.png', trained.export('unet.pkl')
    program = f"""
import sys, torch
from lamella.export import load_learner
torch.set_num_threads({torch.get_num_threads()}) # sums depend on it in the last bit
mask, decision, probs = load_learner({str(exported)!r}).predict({str(file)!r})
assert 'fastai' not in sys.modules
torch.save((decision, probs, list(mask.codes)), {str(exported) + '.pt'!r})
"""
    subprocess.run([sys.executable, '-c', program], check=True)
    decision, probs, codes = torch.load(str(exported) + '.pt')
    assert codes == CODES and probs.shape == (4, 32, 32)
    assert torch.equal(probs, trained.predict(file)[2]) and torch.equal(decision, trained.predict(file)[1])

def test_a_mask_as_large_as_the_picture(trained, tmp_path):
    picture = tmp_path/'wide.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)).save(picture)
    assert trained.predict(picture)[0].shape == (32, 32)
    mask, again = predict_mask(trained, picture), predict_mask(load_learner(trained.export('unet.pkl')), picture)
    assert mask.shape == (50, 90) and torch.equal(plain(mask), plain(again)) and mask.codes == CODES
    assert (plain(mask)[:, :19] == 255).all() and (plain(mask)[:, 21:69] < 4).all() # Resize has cut off both sides

def test_looking(trained):
    trained.dls.show_batch(max_n=4)
    assert all(len(ax.images) == 2 for ax in plt.gcf().axes)
    trained.show_results(max_n=2)
    assert [ax.get_title().split('\n')[0] for ax in plt.gcf().axes][:4] == ['target', 'prediction'] * 2
    plt.close('all')

# From images to images

def test_from_grey_to_colours(shapes, tmp_path):
    block = DataBlock((ImageBlock(PILImageBW), ImageBlock), get_items=get_image_files, splitter=IndexSplitter([0, 1]))
    dls = block.dataloaders(shapes/'images', bs=4, num_workers=0, path=tmp_path)
    learn = quiet(unet_learner(dls, small(16, 32, n_in=1), pretrained=False, y_range=(-0.1, 1.1)))
    assert type(learn.loss_func).__name__ == 'MSELossFlat' and learn.model.head[0].out_channels == 3
    before = learn.validate()[0]
    with learn.no_logging(): learn.fit(5, 3e-3)
    assert learn.validate()[0] < before
    preds, targets = learn.get_preds()
    assert preds.shape == targets.shape == (2, 3, 40, 40)
    learn.show_results(max_n=2)
    titles = [ax.get_title() for ax in plt.gcf().axes]
    assert (titles[1:6:3], titles[2:6:3]) == (['target'] * 2, ['prediction'] * 2)
    plt.close('all')
    file = shapes/'images'/'0001.png'
    image = learn.predict(file)[0]
    assert isinstance(image, TensorImage) and image.shape == (3, 40, 40)
    image.show()
    plt.close('all')

def test_super_resolution_with_normalised_targets(shapes, tmp_path):
    "As in fastai, the targets are normalised like the images, and come back as pictures"
    def small_copy(file): return Image.open(file).resize((20, 20)).resize((40, 40))
    block = DataBlock((ImageBlock, ImageBlock), get_items=get_image_files, get_x=small_copy, splitter=IndexSplitter([0, 1]))
    dls = block.dataloaders(shapes/'images', bs=4, num_workers=0, path=tmp_path)
    learn = quiet(unet_learner(dls, 'test_resnet', weights=Architecture('timm', 'test_resnet')().state_dict(), n_out=3, y_range=(-3, 3)))
    y = learn.dls.valid.one_batch()[1]
    assert y.min() < -0.2
    true = np.asarray(Image.open(dls.valid_ds.items[0])).transpose(2, 0, 1).astype(int)
    shown = learn.dls.valid.decode_batch(learn.dls.valid.one_batch())[0][1]
    assert np.abs(np.asarray(shown.float() * (255 if shown.is_floating_point() else 1)) - true).max() <= 2
    learn.model.head = nn.Sequential(nn.Conv2d(learn.model.head[0].in_channels, 3, 1))
    nn.init.zeros_(learn.model.head[0].weight), nn.init.zeros_(learn.model.head[0].bias)
    image = learn.predict(dls.valid_ds.items[0])[0] # a zero is the mean of the statistics
    middle = learn.dls.valid.after_batch.find(Normalize).mean.flatten()
    assert torch.allclose(image.float().mean((1, 2)) / (1 if image.is_floating_point() else 255), middle, atol=0.01)

# Files

def test_folders_tables_and_lists(shapes):
    files = sorted((shapes/'images').iterdir())
    table = pd.DataFrame({'image': [o.stem for o in files], 'mask': [o.name for o in files], 'is_valid': [k % 3 == 0 for k in range(len(files))]})
    same = dict(valid_pct=0.25, codes=CODES)
    made = [loaders(shapes, valid_pct=0.25),
        SegmentationDataLoaders.from_df(table, shapes, 'image', 'mask', 'images', 'masks', '.png', bs=4, seed=1, num_workers=0, **same),
        SegmentationDataLoaders.from_lists(shapes, files, [shapes/'masks'/o.name for o in files], y_block=MaskBlock(shapes/'codes.txt'), valid_pct=0.25, bs=4, seed=1, num_workers=0),
        SegmentationDataLoaders.from_label_func(shapes, files, lambda o: shapes/'masks'/o.name, bs=4, seed=1, num_workers=0, **same)]
    batches = [o.valid.one_batch() for o in made]
    assert all(list(o.vocab) == CODES and o.c == 4 and o.task == 'segmentation' for o in made)
    for x, y in batches[1:]: assert torch.equal(x, batches[0][0]) and torch.equal(y, batches[0][1])
    by_column = SegmentationDataLoaders.from_df(table, shapes, 'image', 'mask', 'images', 'masks', '.png', codes='codes.txt', valid_col='is_valid', bs=4, num_workers=0)
    assert len(by_column.valid_ds) == 4
    with pytest.raises(ValueError, match='1 images are in the table more than once'): SegmentationDataLoaders.from_df(pd.concat([table, table[:1]]), shapes, 'image', 'mask', 'images', 'masks', '.png', codes=CODES)

def test_folders_of_train_and_valid(own_shapes):
    for k, file in enumerate(sorted((own_shapes/'images').iterdir())):
        for kind in ('images', 'masks'):
            part = own_shapes/kind/('val' if k < 2 else 'train')
            part.mkdir(exist_ok=True)
            (own_shapes/kind/file.name).rename(part/file.name)
    dls = loaders(own_shapes, valid='val')
    assert (len(dls.train_ds), len(dls.valid_ds)) == (4, 2)

def test_a_mask_of_another_size(own_shapes):
    Image.new('L', (20, 10)).save(own_shapes/'masks'/'0002.png')
    with pytest.raises(DataError, match=r"0002\.png' has 32x32 pixels and the mask '.*masks.0002\.png' has 20x10"): loaders(own_shapes, item_tfms=Resize(16))

def test_a_class_out_of_range(own_shapes):
    Image.fromarray(np.full((32, 32), 9, np.uint8)).save(own_shapes/'masks'/'0004.png')
    with pytest.raises(DataError, match=r"0004\.png' has pixels of class 9, and there are 4 codes"): loaders(own_shapes)

def test_no_mask_for_an_image(own_shapes):
    (own_shapes/'masks'/'0001.png').unlink()
    with pytest.raises(ValueError, match=r"1 of 6 images have no mask in '.*masks', such as '.*0001\.png'"): loaders(own_shapes)

COLORS = {'background': (0, 0, 0), 'circle': (128, 0, 0), 'square': (0, 128, 0), 'triangle': (64, 0, 128)}

def painted(path: Path) -> None:
    for file in (path/'masks').iterdir(): Image.fromarray(np.array(list(COLORS.values()), np.uint8)[np.array(Image.open(file))]).save(file)

def test_masks_in_colours(own_shapes):
    numbers = [o[1] for o in loaders(own_shapes).valid]
    painted(own_shapes)
    with pytest.raises(DataError, match=r"(?s)colours, such as .*say which class each colour is.*masks.\d+\.png"): loaders(own_shapes)
    dls = loaders(own_shapes, codes=COLORS)
    assert list(dls.vocab) == CODES and all(torch.equal(a, b[1]) for a, b in zip(numbers, dls.valid))
    with pytest.raises(DataError, match=r"\d+\.png' has colours that are no class: \(\d+, \d+, \d+\)"): loaders(own_shapes, codes={k: v for k, v in COLORS.items() if k != 'background'})

def test_black_and_white(own_shapes):
    for file in (own_shapes/'masks').iterdir(): Image.fromarray(np.where(np.array(Image.open(file)) > 0, 255, 0).astype(np.uint8)).save(file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        dls = loaders(own_shapes, codes=['ground', 'shape'])
    assert any('255 was made 1' in str(o.message) for o in caught)
    learn = quiet(unet_learner(dls, small(8, 16), pretrained=False, metrics=[Dice(), foreground_acc]))
    with learn.no_logging(): learn.fit(1)

def test_masks_without_codes(own_shapes):
    (own_shapes/'codes.txt').unlink()
    with pytest.raises(ValueError, match='n_out'): unet_learner(loaders(own_shapes), small(8), pretrained=False)
    learn = quiet(unet_learner(loaders(own_shapes), small(8), pretrained=False, n_out=4))
    with learn.no_logging(): learn.fit(1)
