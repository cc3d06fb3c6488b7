"""Object detection to the end: files of boxes, torchvision's detectors in the loop, mAP, predictions in pixels of the picture, export, resume."""
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lamella.base.seeds import set_seed
from lamella.callbacks.checkpoint import Checkpoint
from lamella.data.blocks import CategoryBlock
from lamella.data.datablock import DataBlock
from lamella.data.splitters import IndexSplitter
from lamella.export import load_learner
from lamella.learner.learner import Learner
from lamella.losses import CrossEntropyLossFlat
from lamella.metrics.detection import mAP, mAP50
from lamella.vision.augment import aug_transforms
from lamella.vision.batch import Normalize, imagenet_stats
from lamella.vision.boxes import get_annotations
from lamella.vision.data import BBoxBlock, BBoxLblBlock, ImageBlock
from lamella.vision.detection import Detector, create_detector, to_targets
from lamella.vision.detection_data import DetectionDataLoaders
from lamella.vision.detection_learner import detection_learner
from lamella.vision.geometry import Flip, Rotate
from lamella.vision.shapes import SHAPES, make_shapes
from lamella.vision.transforms import CropPad, RandomResizedCrop, Resize

SMALL = dict(backbone='resnet10t', pretrained=False, width=32, levels=3, head_convs=1)
FEW = {f'rpn_{k}_nms_top_n_{mode}': 60 for k in ('pre', 'post') for mode in ('train', 'test')} # proposals, for speed
HERE = dict(num_workers=0, device='cpu')


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp('shapes'), n=12, size=64, seed=3)


def loaders(shapes: Path, bs: int = 4, **kwargs):
    return DetectionDataLoaders.from_coco(shapes/'annotations.json', shapes/'images', **{'seed': 1, 'bs': bs, **HERE, **kwargs})


def a_learner(shapes: Path, arch: str = 'fcos', dls=None, seed: int = 0, **kwargs):
    set_seed(seed)
    return detection_learner(loaders(shapes) if dls is None else dls, arch, **{**SMALL, **({'options': FEW} if arch == 'fasterrcnn' else {}), **kwargs})


def quiet(learn, *args, **kwargs):
    "Fit without a word"
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kwargs)
    return learn


# ---- files

def as_voc(shapes: Path, folder: Path) -> Path:
    "The same annotations in the format of VOC"
    coco = json.loads((shapes/'annotations.json').read_text())
    (folder/'Annotations').mkdir(parents=True)
    for image in coco['images']:
        objects = ''
        for o in coco['annotations']:
            if o['image_id'] != image['id']: continue
            left, top, width, height = o['bbox']
            objects += f"<object><name>{SHAPES[o['category_id'] - 1]}</name><bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{left + width}</xmax><ymax>{top + height}</ymax></bndbox></object>"
        (folder/'Annotations'/f"{image['id']}.xml").write_text(f"<annotation><filename>{image['file_name']}</filename>{objects}</annotation>")
    (folder/'JPEGImages').symlink_to(shapes/'images')
    return folder


def as_table(shapes: Path) -> pd.DataFrame:
    coco = json.loads((shapes/'annotations.json').read_text())
    names = {o['id']: o['file_name'] for o in coco['images']}
    rows = [(names[o['image_id']], *o['bbox'][:2], o['bbox'][0] + o['bbox'][2], o['bbox'][1] + o['bbox'][3], SHAPES[o['category_id'] - 1]) for o in coco['annotations']]
    rows += [(name, *[float('nan')] * 4, None) for i, name in names.items() if i not in {o['image_id'] for o in coco['annotations']}]
    return pd.DataFrame(rows, columns=['path', 'left', 'top', 'right', 'bottom', 'label'])


def everything(dls) -> dict:
    "For each image: its boxes and labels, of training and validation"
    found = {}
    for dl in dls:
        batches = [(b, l) for _, b, l in dl.new(shuffle=False, drop_last=False)]
        files = [Path(o[0] if isinstance(o, tuple) else o).name for o in dl.dataset.items]
        rows = [(b[i], l[i]) for b, l in batches for i in range(len(b))]
        for name, (b, l) in zip(files, rows): found[name] = sorted((dls.vocab[int(k)], *[round(v, 4) for v in box.tolist()]) for box, k in zip(b, l) if k)
    return found


def test_three_formats_agree(shapes, tmp_path):
    given = everything(loaders(shapes))
    assert len(given) == 12 and sum(map(len, given.values())) == len(json.loads((shapes/'annotations.json').read_text())['annotations'])
    assert everything(DetectionDataLoaders.from_voc(as_voc(shapes, tmp_path/'voc'), bs=4, **HERE)) == given
    assert everything(DetectionDataLoaders.from_df(as_table(shapes), shapes, folder='images', bs=4, **HERE)) == given
    names, targets = get_annotations(shapes/'annotations.json', prefix=f'{shapes}/images/')
    assert everything(DetectionDataLoaders.from_lists(shapes, names, *zip(*targets), bs=4, **HERE)) == {k: v for k, v in given.items() if v}


def test_splits_by_name_column_and_second_file(shapes):
    by_name = loaders(shapes, valid_names=['0001.png', '0004.png'])
    assert [Path(o[0]).name for o in by_name.valid_ds.items] == ['0001.png', '0004.png']
    table = as_table(shapes)
    table['held out'] = table.path.isin(['0001.png', '0004.png'])
    by_column = DetectionDataLoaders.from_df(table, shapes, folder='images', valid_col='held out', **HERE)
    assert sorted(Path(o[0]).name for o in by_column.valid_ds.items) == ['0001.png', '0004.png']
    assert len(loaders(shapes, valid_json=shapes/'annotations.json').valid_ds) == 12


def changed(shapes: Path, tmp_path: Path, change) -> Path:
    coco = json.loads((shapes/'annotations.json').read_text())
    change(coco)
    (tmp_path/'changed.json').write_text(json.dumps(coco))
    return tmp_path/'changed.json'


def test_crowds_and_difficult_objects_are_left_out(shapes, tmp_path):
    file = changed(shapes, tmp_path, lambda coco: coco['annotations'][0].update(iscrowd=1))
    count = lambda **kwargs: sum(len(v) for v in everything(DetectionDataLoaders.from_coco(file, shapes/'images', bs=4, **kwargs, **HERE)).values())
    assert count(crowd=True) == count() + 1


def test_images_without_boxes(shapes, tmp_path):
    "Kept unless one does not want them; a batch of nothing but them can be learned from"
    empty = lambda coco: coco.update(annotations=[o for o in coco['annotations'] if o['image_id'] > 3])
    file = changed(shapes, tmp_path, empty)
    assert len(DetectionDataLoaders.from_coco(file, shapes/'images', keep_empty=False, **HERE).train_ds) < len(DetectionDataLoaders.from_coco(file, shapes/'images', **HERE).train_ds)
    dls = DetectionDataLoaders.from_coco(file, shapes/'images', valid_names=['0001.png'], bs=1, n=3, **HERE)
    assert any(not len(o[1]) for o in dls.train_ds)
    for arch in ('fcos', 'retinanet', 'fasterrcnn'):
        learn = quiet(a_learner(shapes, arch, dls), 1, 1e-4)
        assert np.isfinite(learn.recorder.losses).all() and np.isfinite(learn.recorder.values[0][1]), arch


BROKEN = [
    (lambda coco: coco['annotations'][0].update(image_id=99), 'changed.json.*annotation 0 is of an image 99'),
    (lambda coco: coco['annotations'][0].update(category_id=9), 'changed.json.*category 9'),
    (lambda coco: coco['annotations'][0].pop('bbox'), "changed.json.*KeyError 'bbox'"),
    (lambda coco: coco.pop('categories'), "changed.json.*format of COCO"),
    (lambda coco: coco.update(images=[], annotations=[]), 'changed.json.* names no images'),
    (lambda coco: coco['images'][5].update(file_name='gone.png'), r"changed.json' names 12 images, of which 1 are not there, such as '.*gone.png'"),
]


@pytest.mark.parametrize('change,message', BROKEN)
def test_broken_coco_files_are_named(shapes, tmp_path, change, message):
    file = changed(shapes, tmp_path, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message): DetectionDataLoaders.from_coco(file, shapes/'images', **HERE)


def test_box_outside_of_its_image_is_named_with_the_file(shapes, tmp_path):
    file = changed(shapes, tmp_path, lambda coco: coco['annotations'][0].update(bbox=[70, 70, 10, 10]))
    name = {o['id']: o['file_name'] for o in json.loads(file.read_text())['images']}[json.loads(file.read_text())['annotations'][0]['image_id']]
    with pytest.raises(Exception, match=f'{name}.*lies outside of the image'):
        for dl in DetectionDataLoaders.from_coco(file, shapes/'images', bs=1, **HERE): list(dl)


def test_unknown_labels_and_numbers_that_differ_are_named_with_the_file(shapes):
    files = sorted((shapes/'images').glob('*.png'))
    boxes = [[[1, 1, 20, 20]]] * len(files)
    with pytest.raises(Exception, match=r"000\d.png(?s:.*)label 'hexagon' of a box is not among"): DetectionDataLoaders.from_lists(shapes, files, boxes, [['hexagon']] * len(files), vocab=['circle'], **HERE)
    with pytest.raises(Exception, match=r'000\d.png.* has 1 boxes and 2 labels'): DetectionDataLoaders.from_lists(shapes, files, boxes, [['circle'] * 2] * len(files), **HERE)
    with pytest.raises(ValueError, match='12 images, boxes of 12 and labels of 3'): DetectionDataLoaders.from_lists(shapes, files, boxes, [['circle']] * 3, **HERE)


# ---- augmentation

@pytest.mark.parametrize('tfms', [dict(item_tfms=RandomResizedCrop(48, min_scale=0.4)), dict(item_tfms=CropPad(16)), dict(batch_tfms=[Flip(p=1.), Rotate(30, p=1.)]), dict(batch_tfms=aug_transforms(size=48))])
def test_boxes_follow_the_pictures(tmp_path, tfms):
    "One white square a picture, drawn so that the box can be found again in the pixels"
    rng, files, boxes = np.random.default_rng(0), [], []
    for k in range(8):
        left, top = map(int, rng.integers(0, 40, 2))
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[top:top + 16, left:left + 16] = 255
        files.append(tmp_path/f'{k}.png')
        Image.fromarray(picture).save(files[-1])
        boxes.append([[left, top, left + 16, top + 16]])
    dls = DetectionDataLoaders.from_lists(tmp_path, files, boxes, [['square']] * 8, bs=8, valid_pct=0.2, seed=0, drop_last=False, **HERE, **tfms)
    x, found, labels = dls.one_batch()
    for picture, box, label in zip(x, found[:, 0] if found.shape[1] else [], labels):
        bright = (picture[0] > 0.6).nonzero()
        if not label[0]: continue
        pixels = ((box.view(2, 2) + 1) / 2 * picture.shape[-1]).flatten()
        inside = bright[(bright[:, 1] >= pixels[0] - 1.5) & (bright[:, 1] <= pixels[2] + 1.5) & (bright[:, 0] >= pixels[1] - 1.5) & (bright[:, 0] <= pixels[3] + 1.5)]
        assert len(inside), 'the box is where nothing bright is'
        spread = torch.tensor([inside[:, 1].min(), inside[:, 0].min(), inside[:, 1].max() + 1, inside[:, 0].max() + 1])
        tight = 'batch_tfms' not in tfms # a square that is turned has a larger box than it needs
        assert ((spread - pixels).abs() < (2.5 if tight else 8)).all(), (spread, pixels)
    if 'item_tfms' in tfms and isinstance(tfms['item_tfms'], CropPad): assert 0 < (labels > 0).sum() < len(x) # boxes that were cut away are gone


# ---- the model

def test_losses_are_those_of_torchvision(shapes):
    model, (x, boxes, labels) = a_learner(shapes).model, loaders(shapes).one_batch()
    targets = [{'boxes': (b[l > 0] + 1) * 32, 'labels': l[l > 0]} for b, l in zip(boxes, labels)]
    model.train()
    with torch.no_grad(): own, theirs = model(x, boxes, labels)['loss'], model.detector(list(x), targets)
    assert [float(o) for o in own.values()] == pytest.approx([float(o) for o in theirs.values()], rel=1e-5)
    assert to_targets(boxes, labels, x.shape[-2:])[0]['boxes'].shape == targets[0]['boxes'].shape


@pytest.mark.parametrize('arch', ['fcos', 'retinanet', 'fasterrcnn'])
def test_validation_loss_leaves_everything_as_it_was(shapes, arch):
    learn = a_learner(shapes, arch)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = learn.validate()[0], learn.validate()[0]
    assert first == second and np.isfinite(first)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    learn.model.eval()
    x, boxes, labels = learn.dls.one_batch()
    with torch.no_grad(): learn.model(x, boxes, labels)
    assert not any(m.training for m in learn.model.modules())


def test_loss_of_each_image(shapes):
    "Their mean is not the loss of the batch (which is an average over boxes), but each is that of its image alone"
    learn = a_learner(shapes)
    losses = learn.get_preds(with_loss=True)[2]
    x, boxes, labels = next(iter(learn.dls.valid))
    learn.model.eval()
    with torch.no_grad(): alone = sum(learn.model(x[1:2], boxes[1:2], labels[1:2])['loss'].values())
    assert float(losses[1]) == pytest.approx(float(alone), rel=1e-4)


FAMILIES = [('fcos', SMALL), ('retinanet', SMALL), ('fasterrcnn', {**SMALL, 'options': FEW}), ('fcos', {**SMALL, 'backbone': 'mobilenetv3_small_050', 'levels': 5}),
    ('fasterrcnn_mobilenet_v3_large_320_fpn', {}), ('ssdlite320_mobilenet_v3_large', {}), ('fcos_resnet50_fpn', {}), ('retinanet_resnet50_fpn_v2', {}), ('ssd300_vgg16', {})]


@pytest.mark.parametrize('arch,options', FAMILIES, ids=[a if not o else f"{a}-{o['backbone']}" for a, o in FAMILIES])
def test_every_family_learns_and_predicts(shapes, arch, options):
    "One step, a validation, predictions in the one format; two steps on one batch make its loss smaller"
    set_seed(0)
    dls = loaders(shapes, bs=2, n=2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = detection_learner(dls, arch, **{'pretrained': False, **options})
    quiet(learn, 1, 1e-5)
    assert np.isfinite(learn.recorder.losses).all() and np.isfinite(learn.recorder.values[0][1])
    assert {'mAP50', 'classification', 'bbox_regression'} <= set(learn.recorder.metric_names)
    boxes, labels, scores = learn.get_preds()[0]
    n, k = len(dls.valid_ds), learn.model.detections_per_img
    assert (boxes.shape, labels.shape, scores.shape, labels.dtype) == ((n, k, 4), (n, k), (n, k), torch.int64)
    assert boxes.abs().max() <= 1 + 1e-5 and labels.max() < dls.c and (scores.diff(dim=1) <= 1e-6).all() and ((labels > 0) == (scores > 0)).all()


def test_names_and_constructors():
    from torchvision.models.detection import fcos_resnet50_fpn
    assert type(create_detector(fcos_resnet50_fpn, 3).detector).__name__ == 'FCOS'
    with pytest.raises(ValueError, match="Did you mean 'retinanet_resnet50_fpn'"): create_detector('retinanet_resnet_50_fpn', 3)
    with pytest.raises(ValueError, match='has a backbone of its own'): create_detector('ssd300_vgg16', 3, backbone='resnet18')
    with pytest.raises(ValueError, match='cannot be the backbone'): create_detector('fcos', 3, backbone='vit_tiny_patch16_224')


def test_pretrained_weights_without_network_are_one_line(shapes, tmp_path, monkeypatch):
    from torchvision.models.detection import FasterRCNN_MobileNet_V3_Large_320_FPN_Weights as W
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(W.DEFAULT.value, 'url', 'http://127.0.0.1:9/weights-00000000.pth')
    with pytest.raises(ConnectionError, match=r"could not be loaded \(.*pretrained=False") as caught: create_detector('fasterrcnn_mobilenet_v3_large_320_fpn', 4, pretrained=True)
    assert '\n' not in str(caught.value)


def test_coco_weights_with_new_class_heads(tmp_path, monkeypatch):
    "A file as torchvision serves it (of 91 classes), loaded as an entry of its enum: all but the class heads is taken over, and the norms are fixed"
    import hashlib
    from torchvision.models.detection import FasterRCNN_MobileNet_V3_Large_320_FPN_Weights as W, fasterrcnn_mobilenet_v3_large_320_fpn as make
    from torchvision.ops import FrozenBatchNorm2d
    set_seed(5)
    theirs = make(weights=None, weights_backbone=None, num_classes=91)
    (tmp_path/'hub'/'checkpoints').mkdir(parents=True)
    torch.save(theirs.state_dict(), tmp_path/'w.pth')
    digest = hashlib.sha256((tmp_path/'w.pth').read_bytes()).hexdigest()[:8]
    (tmp_path/'w.pth').rename(tmp_path/'hub'/'checkpoints'/f'w-{digest}.pth')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(W.DEFAULT.value, 'url', f'http://127.0.0.1:9/w-{digest}.pth')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = create_detector('fasterrcnn_mobilenet_v3_large_320_fpn', 4, pretrained=True)
    own = model.detector.state_dict()
    assert all(torch.equal(own[k], v) for k, v in theirs.state_dict().items() if k in own and not k.startswith('roi_heads.box_predictor.'))
    assert own['roi_heads.box_predictor.cls_score.weight'].shape[0] == 4
    assert any(isinstance(m, FrozenBatchNorm2d) for m in model.modules())


def test_backbone_weights(shapes, tmp_path):
    "weights= is a file of the whole classifier; its body is taken over, and frozen"
    import timm
    set_seed(3)
    whole = timm.create_model('resnet10t')
    torch.save(whole.state_dict(), tmp_path/'w.pth')
    learn = a_learner(shapes, weights=tmp_path/'w.pth')
    body = learn.model.detector.backbone.body.state_dict()
    assert torch.equal(body['layer3.0.conv1.weight'], whole.state_dict()['layer3.0.conv1.weight'])
    frozen = {n.split('.')[2] for n, p in learn.model.named_parameters() if not p.requires_grad}
    assert frozen == {'body'} and learn.model.detector.head.classification_head.cls_logits.weight.requires_grad
    with pytest.raises(ValueError, match='none of the 1 tensors'): a_learner(shapes, weights={'other': torch.zeros(3)})


def test_pixels_are_normalised_once(shapes):
    inside = a_learner(shapes).model.detector.transform
    outside = a_learner(shapes, dls=loaders(shapes, batch_tfms=Normalize.from_stats(*imagenet_stats))).model.detector.transform
    assert inside.image_mean != [0.] * 3 and (outside.image_mean, outside.image_std) == ([0.] * 3, [1.] * 3)


def test_nothing_is_resized_twice(shapes):
    "Whatever the size, FCOS sees the pixels of the batch; SSDs see 300 pixels"
    seen = []
    model = a_learner(shapes).model.eval()
    model.detector.backbone.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[-2:])))
    model(torch.rand(1, 3, 64, 96))
    assert seen == [(64, 96)]


@pytest.mark.parametrize('arch,change', [('fcos', lambda learn: learn.to_bf16()), ('fasterrcnn', lambda learn: learn.to_bf16()),
    ('fcos', lambda learn: learn.to_channelslast(use_amp=False)), ('fcos', lambda learn: learn.compile(backend='eager'))], ids=['bf16', 'bf16-fasterrcnn', 'channels_last', 'compile'])
def test_precision_layout_and_compiling(shapes, arch, change):
    learn = a_learner(shapes, arch)
    change(learn)
    quiet(learn, 1, 1e-4)
    assert np.isfinite(learn.recorder.values[0][1])
    assert learn.get_preds()[0][0].dtype == torch.float32 and len(learn.predict(shapes/'images'/'0000.png')) == 3


def test_wrong_data_is_told(shapes):
    files = sorted((shapes/'images').glob('*.png'))
    block = DataBlock((ImageBlock, CategoryBlock), get_y=lambda o: 'even' if int(o.stem) % 2 == 0 else 'odd')
    with pytest.raises(ValueError, match='these are for classification'): detection_learner(block.dataloaders(files, bs=4, **HERE), 'fcos', **SMALL)
    get_y = [lambda o: [[1, 1, 20, 20]], lambda o: ['circle']]
    with pytest.raises(ValueError, match='n_inp=1'): detection_learner(DataBlock((ImageBlock, BBoxBlock, BBoxLblBlock), n_inp=2, get_x=[lambda o: o, get_y[0]], get_y=get_y[1]).dataloaders(files, bs=4, **HERE), 'fcos', **SMALL)
    without = DataBlock((ImageBlock, BBoxBlock, BBoxLblBlock(add_na=False)), n_inp=1, get_y=get_y).dataloaders(files, bs=4, **HERE)
    with pytest.raises(ValueError, match='background'): detection_learner(without, 'fcos', **SMALL)
    with pytest.raises(ValueError, match='detection_learner'): Learner(loaders(shapes), torch.nn.Linear(1, 1))


def test_data_block_as_in_fastai(shapes):
    "get_annotations, three blocks, two functions of get_y"
    names, targets = get_annotations(shapes/'annotations.json', prefix=f'{shapes}/images/')
    where = dict(zip(names, targets))
    block = DataBlock((ImageBlock, BBoxBlock, BBoxLblBlock), n_inp=1, splitter=IndexSplitter([0, 1]), get_y=[lambda o: where[o][0], lambda o: where[o][1]], item_tfms=Resize(48))
    learn = quiet(a_learner(shapes, dls=block.dataloaders(names, bs=4, **HERE)), 1, 1e-4)
    learn.loss_func.thresh = 0.
    assert str(learn.predict(names[0]).label)


# ---- mAP

def test_map_is_that_of_pycocotools(tmp_path):
    "Random boxes, also in images without any, against pycocotools itself"
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    torch.manual_seed(0)
    n, m, k = 12, 4, 9
    corners = torch.rand(n, m, 2) * 60
    truth = torch.cat([corners, corners + 10 + torch.rand(n, m, 2) * 30], -1)
    labels = torch.randint(0, 4, (n, m))
    labels[3] = 0
    chosen = torch.randint(0, m, (n, k))
    guess = truth.gather(1, chosen[..., None].expand(-1, -1, 4)) + torch.randn(n, k, 4) * 2
    guess_labels = torch.where(torch.rand(n, k) < 0.8, labels.gather(1, chosen), torch.randint(0, 4, (n, k)))
    scores = torch.rand(n, k).sort(1, descending=True)[0] * (guess_labels > 0)
    xywh = lambda b: [float(b[0]), float(b[1]), float(b[2] - b[0]), float(b[3] - b[1])]
    annotations = [dict(image_id=i, category_id=int(labels[i, j]), bbox=xywh(truth[i, j]), area=1., iscrowd=0) for i in range(n) for j in range(m) if labels[i, j]]
    for number, o in enumerate(annotations): o['id'] = number + 1
    (tmp_path/'truth.json').write_text(json.dumps(dict(images=[dict(id=i, width=100, height=100) for i in range(n)], annotations=annotations, categories=[dict(id=c, name=str(c)) for c in (1, 2, 3)])))
    found = [dict(image_id=i, category_id=int(guess_labels[i, j]), bbox=xywh(guess[i, j]), score=float(scores[i, j])) for i in range(n) for j in range(k) if guess_labels[i, j]]
    coco = COCO(str(tmp_path/'truth.json'))
    judge = COCOeval(coco, coco.loadRes(found), 'bbox')
    judge.evaluate(); judge.accumulate(); judge.summarize()
    relative = lambda b: b / 50 - 1
    targs = relative(truth) * (labels > 0)[..., None], labels
    preds = relative(guess) * (guess_labels > 0)[..., None], guess_labels, scores
    assert 0.05 < judge.stats[0] < 0.95
    assert mAP()(preds, targs) == pytest.approx(judge.stats[0], abs=1e-4) and mAP50()(preds, targs) == pytest.approx(judge.stats[1], abs=1e-4)


def test_map_in_fit_is_that_of_get_preds(shapes):
    learn = quiet(a_learner(shapes, dls=loaders(shapes, val_bs=1)), 1, 1e-3)
    preds, targs = learn.get_preds()
    assert learn.recorder.values[0][2] == pytest.approx(mAP50()(preds, targs), abs=1e-6)


def test_missing_pycocotools_is_one_line():
    code = "import sys; sys.modules['pycocotools'] = None\nfrom lamella.metrics.detection import mAP\ntry: mAP()\nexcept ImportError as error: print(error)"
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert said.stdout.strip() == "mean average precision needs 'pycocotools', which is not installed: pip install 'lamella[detection]'", said.stderr


# ---- predictions

class Known(torch.nn.Module):
    "A detector that finds the white square"
    def __init__(self): super().__init__(); self.weight = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x, targets=None):
        found = []
        for picture in x:
            y, column = (picture[0] > 0.5).nonzero().unbind(1)
            found.append({'boxes': torch.stack([column.min(), y.min(), column.max() + 1, y.max() + 1]).float()[None], 'labels': torch.tensor([1]), 'scores': torch.tensor([0.9])})
        return found
    score_thresh, nms_thresh, detections_per_img = 0.05, 0.5, 5


@pytest.mark.parametrize('item_tfms', [None, Resize(80, method='squish'), Resize(40, method='crop'), Resize(48, method='pad'), CropPad((50, 70))], ids=['none', 'squish', 'crop', 'pad', 'croppad'])
@pytest.mark.parametrize('kind', ['png', 'jpg'])
def test_boxes_come_back_in_pixels_of_the_original(tmp_path, item_tfms, kind):
    picture = np.zeros((60, 100, 3), np.uint8) if kind == 'png' else np.zeros((600, 1000, 3), np.uint8)
    scale = len(picture) // 60
    picture[25 * scale:40 * scale, 45 * scale:60 * scale] = 255
    files = [tmp_path/f'{k}.{kind}' for k in range(4)]
    for file in files: Image.fromarray(picture).save(file)
    box = [45 * scale, 25 * scale, 60 * scale, 40 * scale]
    if isinstance(item_tfms, CropPad) and kind == 'jpg': item_tfms = CropPad((500, 700))
    dls = DetectionDataLoaders.from_lists(tmp_path, files, [[box]] * 4, [['square']] * 4, bs=2, item_tfms=item_tfms, valid_pct=0.5, seed=0, **HERE)
    learn = detection_learner(dls, 'fcos', **SMALL)
    learn.model.detector = Known()
    label, decision, all_of_them = learn.predict(files[0])
    assert label.lbl == ['square'] and label.scores == pytest.approx([0.9])
    assert label.bbox[0].tolist() == pytest.approx(box, abs=1.6 * scale)
    assert [tuple(o.shape) for o in all_of_them] == [(5, 4), (5,), (5,)] and decision[1].tolist() == [1]
    assert [str(o.label) for o in learn.predict(files[:2])] == [str(label)] * 2


def test_thresholds_may_be_changed_after_training(shapes):
    learn = a_learner(shapes)
    many = (learn.get_preds()[0][2] > 0).sum()
    learn.model.score_thresh = float(learn.get_preds()[0][2].flatten().sort(descending=True)[0][10])
    assert 0 < (learn.get_preds()[0][2] > 0).sum() < many
    file = shapes/'images'/'0000.png'
    learn.loss_func.thresh = 2.
    assert learn.predict(file).label.lbl == [] and str(learn.predict(file).label) == 'no boxes'


def test_exported_file_in_another_process(shapes, tmp_path):
    "Without trust, with the thresholds of now, and the same numbers"
    learn = quiet(a_learner(shapes, dls=loaders(shapes, item_tfms=Resize(48))), 1, 1e-3)
    learn.model.score_thresh, learn.model.nms_thresh, learn.loss_func.thresh = 0.06, 0.4, 0.07
    learn.export(tmp_path/'model.pkl')
    file = shapes/'images'/'0005.png'
    found = learn.predict(file)
    code = (f"import sys\nfrom lamella.export import load_learner\np = load_learner(r'{tmp_path/'model.pkl'}')\nfound = p.predict(r'{file}')\n"
            "print(repr(found.label)); print([o.tolist() for o in found[2]]); print(p.model.score_thresh, p.model.nms_thresh, p.output.thresh, p.vocab)")
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [repr(found.label), str([o.tolist() for o in found[2]]), "0.06 0.4 0.07 ['#na#', 'circle', 'square', 'triangle']"]
    assert len(found.label.lbl)


def test_two_categories_as_targets(shapes, tmp_path):
    "A model with two outputs: predict tells both, also from a file"
    files = sorted((shapes/'images').glob('*.png'))
    block = DataBlock((ImageBlock, CategoryBlock, CategoryBlock), n_inp=1, get_y=[lambda o: 'even' if int(o.stem) % 2 == 0 else 'odd', lambda o: 'low' if int(o.stem) < 6 else 'high'])
    dls = block.dataloaders(files, bs=4, **HERE)
    learn = Learner(dls, TwoHeads(), BothLosses())
    quiet(learn, 1, 1e-3)
    found = learn.predict(files[0])
    assert set(found.label) < {'even', 'odd', 'low', 'high'} and found.label[0] in ('even', 'odd')
    assert [o.shape for o in found[2]] == [(2,), (2,)] and found.probability == tuple(float(p.max()) for p in found[2])
    preds, targs = learn.get_preds()
    assert [len(o) for o in (*preds, *targs)] == [2] * 4 and torch.allclose(preds[0].sum(1), torch.ones(2))
    learn.show_results(max_n=2)


class TwoHeads(torch.nn.Module):
    def __init__(self): super().__init__(); self.first, self.second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    def forward(self, x): return self.first(x.mean((2, 3))), self.second(x.mean((2, 3)))


class BothLosses(CrossEntropyLossFlat):
    def forward(self, preds, first, second): return super().forward(preds[0], first) + super().forward(preds[1], second)


def test_looking(shapes):
    import matplotlib.pyplot as plt
    learn = a_learner(shapes)
    learn.loss_func.thresh = 0.
    learn.dls.show_batch(max_n=2)
    learn.show_results(max_n=2)
    assert len(plt.gcf().axes[0].patches) > 1
    assert 'FCOS' in str(learn.summary()) or 'Detector' in str(learn.summary())
    plt.close('all')
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)


# ---- going on

def test_a_run_that_was_killed_goes_on(shapes, tmp_path):
    "From the checkpoint in the middle of an epoch: the same weights as without the interruption"
    class Kill(Exception): pass
    from lamella.loop.callback import Callback
    class KillAt(Callback):
        def after_batch(self):
            if self.training and self.learn.train_iter == 3: raise Kill
    whole = quiet(a_learner(shapes, 'fasterrcnn', seed=7), 2, 1e-3)
    try: quiet(a_learner(shapes, 'fasterrcnn', seed=7, cbs=KillAt()), 2, 1e-3, checkpoint=Checkpoint(tmp_path, n_batches=1))
    except Kill: pass
    else: pytest.fail('the run was not interrupted')
    again = quiet(a_learner(shapes, 'fasterrcnn', seed=7), 2, 1e-3, checkpoint=Checkpoint(tmp_path, n_batches=1))
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in whole.model.state_dict().items())
    assert whole.recorder.values[-1][2] == again.recorder.values[-1][2]
