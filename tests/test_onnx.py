"""ONNX files predict what the learner predicts, also where neither lamella nor PyTorch can be imported."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_photos
from PIL import Image
from torch import nn

for name in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(name)

from lamella.data.types import plain
from lamella.export import onnx_predict
from lamella.export.onnx_predict import OnnxPredictor, Prepared
from lamella.learner import deployment
from lamella.learner.preprocessing import DeployError, describe_preprocessing
from lamella.vision.all import (CategoryBlock, CropPad, DataBlock, ImageBlock, Learner, MultiCategoryBlock, Normalize, PILImage, PILImageBW, PointBlock, RandomResizedCrop, RatioResize,
                                Resize, aug_transforms, get_image_files, imagenet_stats, load_learner, parent_label)


def every_other(items):
    "The split: every class is in both parts"
    return list(range(0, len(items), 2)), list(range(1, len(items), 2))


def loaders(folder, block=CategoryBlock, get_y=parent_label, opens=PILImage, tfms=Resize((32, 40)), batch_tfms=()):
    stats = imagenet_stats if opens is PILImage else ([0.4], [0.2])
    return DataBlock((ImageBlock(opens), block()), get_items=get_image_files, get_y=get_y, splitter=every_other, item_tfms=tfms,
                     batch_tfms=[*batch_tfms, Normalize.from_stats(*stats)]).dataloaders(folder, bs=4, num_workers=0)


def net(n_out, n_in=3, pool=2):
    "Small, with a layer that behaves differently in training, and differences between pictures that can be seen"
    return nn.Sequential(nn.Conv2d(n_in, 8, 5, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(pool), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8 * pool ** 2, n_out))


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make_photos(tmp_path_factory.mktemp('photos'), n=4)


@pytest.fixture(scope='module')
def learner(folder):
    torch.manual_seed(0)
    learn = Learner(loaders(folder, batch_tfms=aug_transforms()), net(2), default_cbs=False, path=folder.parent)
    learn.fit(2, 3e-2)
    return learn


@pytest.fixture(scope='module')
def exported(learner): return learner.to_onnx('model.onnx')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "One photograph as files of every kind: sizes, colour modes, EXIF, 16 bits"
    from skimage import data
    folder = tmp_path_factory.mktemp('pictures')
    photo, exif = Image.fromarray(data.coffee()).resize((240, 160)), Image.Exif()
    exif[0x0112] = 6
    for k, size in enumerate([(300, 200), (87, 120), (500, 340), (20, 9)]):
        for ending in ('jpg', 'png'): photo.resize(size).save(folder/f'size{k}.{ending}')
    photo.save(folder/'exif.jpg', exif=exif)
    photo.save(folder/'progressive.jpg', progressive=True)
    photo.convert('CMYK').save(folder/'cmyk.jpg')
    photo.convert('L').save(folder/'grey.jpg')
    photo.convert('P').save(folder/'palette.png')
    photo.quantize(16).save(folder/'transparent.gif', transparency=3)
    photo.putalpha(128)
    photo.save(folder/'rgba.png')
    Image.fromarray(np.asarray(photo.convert('L')).astype(np.uint16) * 257).save(folder/'deep.png')
    return sorted(folder.iterdir())


def test_agrees_on_every_kind_of_picture(learner, exported, pictures):
    predictor = OnnxPredictor(exported, threads=1)
    for file, result in zip(pictures, predictor.predict(pictures)):
        wanted = learner.predict(file)
        assert result['label'] == wanted.label, file.name
        assert result['probabilities'] == pytest.approx(wanted.probabilities, abs=2e-3), file.name
        assert result['probability'] == pytest.approx(wanted.probability, abs=2e-3)
    assert len({round(o['probability'], 3) for o in predictor.predict(pictures)}) > 3 # the pictures do differ


def test_agrees_on_all_that_predict_takes(learner, exported, pictures):
    predictor, file = OnnxPredictor(exported), pictures[0]
    array = np.asarray(Image.open(file).convert('RGB'))
    for x in (file, str(file), file.read_bytes(), Image.open(file), array, array[..., 0], array.astype(np.float32) / 255):
        assert predictor.predict(x)['probabilities'] == pytest.approx(learner.predict(x).probabilities, abs=2e-3)
    with open(file, 'rb') as opened: assert predictor.predict(opened)['label'] == learner.predict(file).label
    several = predictor.predict([file, array, file], bs=2)
    assert several[0]['probabilities'] == pytest.approx(several[2]['probabilities']) and len(several) == 3


STEPS = {'crop': Resize((32, 40)), 'pad': Resize(48, 'pad'), 'zeros': Resize((48, 31), 'pad', pad_mode='zeros'), 'squish': Resize((20, 48), 'squish'), 'centre': CropPad(64, 'border'),
         'longer': RatioResize(50), 'random': RandomResizedCrop(48), 'lanczos': Resize(32, resamples=(Image.Resampling.LANCZOS, 0))}

@pytest.mark.parametrize('name', STEPS)
@pytest.mark.parametrize('opens', [PILImage, PILImageBW])
def test_pixels(folder, pictures, name, opens):
    "Without the library the pixels are those of the library: the same, or one of 255 beside them where resizing rounds"
    pipeline = Learner(loaders(folder, opens=opens, tfms=STEPS[name]), net(2, 3 if opens is PILImage else 1), default_cbs=False).inference().pipeline
    steps = json.loads(json.dumps(describe_preprocessing(pipeline)))
    for file in pictures:
        wanted, found = plain(pipeline.sample(file)[0]).numpy(), Prepared(file, steps).array
        assert found.shape == wanted.shape, file.name
        assert abs(found.astype(int) - wanted).max() <= 1, file.name
        assert abs(found.astype(int) - wanted).mean() < 0.3, file.name


GUARD = '''
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('lamella', 'torch', 'torchvision', 'fastcore'): raise ImportError(f'{name} is not there')
sys.meta_path.insert(0, Blocked())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''

def test_without_lamella(learner, exported, pictures, tmp_path):
    "A copy of one file, in another folder, where nothing of PyTorch can be imported"
    shutil.copy(onnx_predict.__file__, tmp_path/'onnx_predict.py')
    shutil.copy(exported, tmp_path/'model.onnx')
    files = [str(o) for o in pictures]
    done = subprocess.run([sys.executable, '-I', '-c', GUARD, str(tmp_path/'onnx_predict.py'), str(tmp_path/'model.onnx'), *files], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [o['file'] for o in results] == files
    for o in results: assert o['label'] == learner.predict(o['file']).label


def test_guard_blocks(tmp_path):
    (tmp_path/'x.py').write_text('import torch')
    assert subprocess.run([sys.executable, '-I', '-c', GUARD, str(tmp_path/'x.py')], capture_output=True).returncode


def test_learner_is_unchanged(learner, exported):
    learner.model.to(memory_format=torch.channels_last).train()
    learner.model[3].eval()
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    modes, grads = [o.training for o in learner.model.modules()], [o.requires_grad for o in learner.model.parameters()]
    learner.to_torch_export('unchanged.pt2')
    learner.to_onnx('unchanged.onnx')
    assert all(torch.equal(v, before[k]) for k, v in learner.model.state_dict().items())
    assert [o.training for o in learner.model.modules()] == modes and [o.requires_grad for o in learner.model.parameters()] == grads
    assert learner.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    learner.model.to(memory_format=torch.contiguous_format)


def test_what_differs_is_not_written(learner, tmp_path, monkeypatch):
    "A graph that is wrong by a hundredth: an error with the number, the older file stays, and nothing else is left"
    (tmp_path/'old.onnx').write_bytes(b'older')
    right = deployment.Deployed.forward
    monkeypatch.setattr(deployment.Deployed, 'forward', lambda self, images: right(self, images) * 1.01)
    with pytest.raises(deployment.ParityError, match=r'ONNX file and PyTorch, on a batch of the shape \(1, 3, 32, 40\), differ by 0\.00'): learner.to_onnx(tmp_path/'old.onnx')
    with pytest.raises(deployment.ParityError, match='exported program and PyTorch.*differ by 0.00'): learner.to_torch_export(tmp_path/'new.pt2')
    with pytest.raises(deployment.ParityError, match='TorchScript file and PyTorch.*differ by 0.00'): learner.to_torchscript(tmp_path/'new.pt')
    assert [o.name for o in tmp_path.iterdir()] == ['old.onnx'] and (tmp_path/'old.onnx').read_bytes() == b'older'


def test_predictor_and_opset(learner, exported, pictures, tmp_path):
    "An exported learner writes the same file as the learner"
    import onnx
    predictor = load_learner(learner.export(tmp_path/'model.pkl'))
    path = predictor.to_onnx(tmp_path/'again.onnx', opset=20, input='float')
    assert next(o.version for o in onnx.load(path).opset_import if not o.domain) == 20
    a, b = OnnxPredictor(exported), OnnxPredictor(path)
    file = pictures[0]
    assert a.predict(file)['probabilities'] == pytest.approx(b.predict(file)['probabilities'], abs=1e-5)
    assert (a.info['input']['dtype'], b.info['input']['dtype']) == ('uint8', 'float32')
    assert {k: v for k, v in a.info.items() if k not in ('input', 'largest_difference')} == {k: v for k, v in b.info.items() if k not in ('input', 'largest_difference')}
    with pytest.raises(TypeError, match='the graph takes uint8'): a.run(np.zeros((1, 3, 32, 40), np.float32))


def test_own_transforms(folder, pictures, tmp_path):
    def brighter(x: PILImage): return PILImage(x.point(lambda o: o + 9))
    learn = Learner(loaders(folder, tfms=[Resize(32), brighter]), net(2, pool=1), default_cbs=False)
    with pytest.raises(DeployError, match='brighter cannot be described.*preprocessing=False'): learn.to_onnx(tmp_path/'model.onnx')
    assert not list(tmp_path.iterdir())
    predictor = OnnxPredictor(learn.to_onnx(tmp_path/'model.onnx', preprocessing=False, size=32, dynamic_size=True))
    with pytest.raises(ValueError, match='without its preprocessing'): predictor.predict(pictures[0])
    file = get_image_files(folder)[0]
    x = plain(learn.inference().pipeline.sample(file)[0]).numpy()
    assert predictor.run(x[None])[0][0] == pytest.approx(learn.predict(file)[2].numpy(), abs=1e-5)
    assert predictor.run(np.zeros((3, 3, 50, 71), np.uint8))[0].shape == (3, 2)
    resized = Learner(loaders(folder, batch_tfms=aug_transforms(size=24)), net(2), default_cbs=False)
    with pytest.raises(DeployError, match='changes what is predicted'): resized.to_onnx(tmp_path/'other.onnx')


def test_sizes_that_a_graph_cannot_take(learner, tmp_path):
    "Pooling to 2x2 becomes a graph for one size: the comparison finds that out"
    with pytest.raises(DeployError, match='cannot predict a batch of the shape|differ by|cannot be exported'): learner.to_onnx(tmp_path/'model.onnx', dynamic_size=True)
    assert not list(tmp_path.iterdir())


def test_several_labels_and_points(folder, tmp_path):
    several = Learner(loaders(folder, lambda: MultiCategoryBlock(vocab=['cat', 'dog', '1', '2', '3', '4']), lambda o: [parent_label(o), o.stem]), net(6), default_cbs=False)
    several.loss_func.thresh = [0.1, 0.9, 0.4, 0.5, 0.45, 0.55]
    points = Learner(loaders(folder, PointBlock, lambda o: [[10., 10.], [20., 30.]]), net(4), default_cbs=False)
    a, b = OnnxPredictor(several.to_onnx(tmp_path/'a.onnx')), OnnxPredictor(points.to_onnx(tmp_path/'b.onnx'))
    for file in get_image_files(folder)[:4]:
        wanted = several.predict(file)
        assert a.predict(file)['labels'] == list(wanted.label) and a.predict(file)['probabilities'] == pytest.approx(wanted.probabilities, abs=2e-3)
        assert np.array(b.predict(file)['points']) == pytest.approx(plain(points.predict(file).label).numpy(), abs=0.2)


def test_whole_numbers(learner, exported, tmp_path):
    "Calibrated with training items: most decisions stay, and the file says how many"
    import onnx
    path = learner.to_onnx(tmp_path/'int8.onnx', int8=True)
    said, types = OnnxPredictor(path).info['quantization'], {o.op_type for o in onnx.load(path).graph.node}
    assert said['kind'] == 'static' and 'QuantizeLinear' in types and said['same_decision'] >= 0.75
    assert 0 < said['largest_difference'] < 0.3


def test_what_cannot_be_exported(folder, tmp_path):
    class Deciding(nn.Sequential):
        def forward(self, x): return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)
    learn = Learner(loaders(folder), Deciding(*net(2)), default_cbs=False)
    with pytest.raises(DeployError, match='Deciding cannot be exported to ONNX'): learn.to_onnx(tmp_path/'model.onnx')
    assert not list(tmp_path.iterdir())
