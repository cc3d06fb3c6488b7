"""Files of torch.export and TorchScript predict where PyTorch is, and lamella is not; a quantized learner predicts as before."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import make_photos
from torch import nn

from lamella.data.types import plain
from lamella.learner.preprocessing import DeployError
from lamella.vision.all import ImageDataLoaders, Learner, Normalize, Resize, get_image_files, load_learner

LOADING = '''
import sys, json
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('lamella', 'torchvision', 'fastcore', 'timm'): raise ImportError(f'{name} is not there')
sys.meta_path.insert(0, Blocked())
import torch
torch.set_num_threads(1)
said = {'lamella.json': ''}
if sys.argv[1].endswith('.pt2'): model = torch.export.load(sys.argv[1], extra_files=said).module()
else: model = torch.jit.load(sys.argv[1], _extra_files=said)
found = model(torch.load(sys.argv[2], weights_only=True))
print(json.dumps([found.tolist(), json.loads(said['lamella.json'])]))
'''

def elsewhere(path, x, tmp_path):
    "What a process without lamella makes of some inputs, and the metadata"
    torch.save(x, tmp_path/'x.pt')
    done = subprocess.run([sys.executable, '-I', '-c', LOADING, str(path), str(tmp_path/'x.pt')], capture_output=True, text=True, cwd=tmp_path)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def learner(tmp_path_factory):
    folder = make_photos(tmp_path_factory.mktemp('photos'), n=4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 5, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(32, 2))
    dls = ImageDataLoaders.from_folder(folder, valid_pct=0.5, seed=1, item_tfms=Resize(32), batch_tfms=Normalize.from_stats([0.4] * 3, [0.2] * 3), bs=4, num_workers=0)
    learn = Learner(dls, model, default_cbs=False, path=folder)
    learn.fit(2, 3e-2)
    return learn


@pytest.mark.parametrize('ending', ['pt2', 'pt'])
def test_without_lamella(learner, tmp_path, ending):
    torch.set_num_threads(1)
    source = load_learner(learner.export(tmp_path/'model.pkl')) if ending == 'pt' else learner
    path = source.to_torchscript(tmp_path/'model.pt') if ending == 'pt' else source.to_torch_export(tmp_path/'model.pt2')
    files = get_image_files(learner.path)[:3]
    x = torch.stack([plain(learner.inference().pipeline.sample(o)[0]) for o in files])
    probs, said = elsewhere(path, x, tmp_path)
    for file, row in zip(files, probs): assert row == pytest.approx(learner.predict(file)[2].tolist(), abs=1e-5)
    assert said['classes'] == ['cat', 'dog'] and said['preprocessing'][1]['size'] == [32, 32] and said['task'] == 'classification'


def test_names_and_folders(learner):
    "A name is one in the learner's folder, as for `export`"
    assert learner.to_torchscript() == learner.path/'model.pt' and (learner.path/'model.pt').is_file()
    with pytest.raises(TypeError, match="unexpected keyword argument 'sizes'.*Did you mean 'size'"): learner.to_torchscript(sizes=3)


def test_inputs_that_are_no_pictures(tmp_path):
    "A learner over loaders of PyTorch: an example says what goes in"
    from torch.utils.data import DataLoader, TensorDataset
    data = DataLoader(TensorDataset(torch.randn(20, 5), torch.randn(20, 1)), batch_size=5)
    learn = Learner([data, data], nn.Linear(5, 1), nn.MSELoss(), default_cbs=False)
    x = torch.randn(3, 5)
    with pytest.raises(DeployError, match='preprocessing=False'): learn.to_torch_export(tmp_path/'model.pt2')
    probs, said = elsewhere(learn.to_torch_export(tmp_path/'model.pt2', preprocessing=False, example=x), x, tmp_path)
    assert torch.allclose(torch.tensor(probs), learn.model(x)) and said['preprocessing'] is None and said['targets'][0]['decision'] == 'value'


def test_more_than_one_input(learner, tmp_path):
    inference = learner.inference()
    inference.pipeline.inputs = inference.pipeline.inputs * 2
    from lamella.learner.deployment import Deployment
    with pytest.raises(DeployError, match='the model has 2 inputs'): Deployment(inference)


def test_detectors_are_refused(learner, tmp_path):
    from lamella.vision.detection import DetectionLoss
    learn = Learner(learner.dls, learner.model, DetectionLoss(), default_cbs=False)
    with pytest.raises(DeployError, match='learn.export'): learn.to_onnx(tmp_path/'model.onnx')


def test_quantized(learner):
    pytest.importorskip('torchao')
    with pytest.raises(DeployError, match='convolutions'): learner.quantized()
    model = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 2))
    learn = Learner(learner.dls, model, default_cbs=False)
    learn.fit(2, 1e-3)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    small, files = learn.quantized(), get_image_files(learner.path)
    assert any(type(p.data) is not torch.Tensor for p in small.model.parameters()), 'nothing was quantized'
    moved = [abs(small.predict(o)[2] - learn.predict(o)[2]).max() for o in files]
    assert max(moved) < 0.05 and all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert sum(small.predict(o).label == learn.predict(o).label for o in files) >= len(files) - 1
