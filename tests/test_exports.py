"""Every task of the library exported, loaded by another process and compared bit for bit; exports that fail leave everything as it was."""
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from tools.make_released import box, make_pictures, number

from lamella.base.bundle import EXPORT_MEMBERS, BundleError, read_bundle
from lamella.base.pickling import UntrustedError
from lamella.export import ExportError, load_learner, read_spec
from lamella.vision.all import (BBoxBlock, BBoxLblBlock, CategoryBlock, DataBlock, ImageBlock, IndexSplitter, Learner, MaskBlock, MSELossFlat, MultiCategoryBlock, Normalize, PointBlock, RegressionBlock, Resize,
                                accuracy, aug_transforms, create_timm_model, detection_learner, imagenet_stats, unet_learner, vision_learner)

LIBRARY = Path(__file__).resolve().parents[1]/'lib'

OWN = '''
import torch
from torch import nn
from lamella.base.pickling import register_layer
from lamella.base.registry import register
from lamella.data.transform import Transform
from lamella.losses import BaseLoss

@register_layer
class Scaled(nn.Module):
    "A layer of one's own in a network that has no name"
    def __init__(self, by): super().__init__(); self.by = by
    def forward(self, x): return x * self.by

@register
class TwoEyes(nn.Module):
    "A network of two pictures that is built from its arguments"
    def __init__(self, width=4, n_out=2):
        super().__init__()
        self.init_args = dict(width=width, n_out=n_out)
        self.eye, self.last = nn.Sequential(nn.Conv2d(3, width, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(2 * width, n_out)
    def forward(self, a, b): return self.last(torch.cat([self.eye(a), self.eye(b)], 1))

@register
class TwoClasses(BaseLoss):
    "Two answers from four numbers"
    takes_all = True
    def __init__(self): self.init_args = {}
    def __call__(self, pred, a, b): return nn.functional.cross_entropy(pred[:, :2], a.long()) + nn.functional.cross_entropy(pred[:, 2:], b.long())
    def activation(self, x): return x[:, :2].softmax(1), x[:, 2:].softmax(1)
    def decodes(self, x): return tuple(o.argmax(1) for o in x)

@register
class Darker(Transform):
    def __init__(self, by=2): self.by = by
    def encodes(self, o: object): return o / self.by if isinstance(o, torch.Tensor) and o.dim() == 4 else o

class Mine(nn.Sequential): "Nobody registered it"
'''

LOAD = '''
import json, sys
import torch
torch.set_num_threads(1)
from lamella.export import load_learner
if sys.argv[3] == 'own': import own_parts
def plain(o):
    if hasattr(o, 'tolist'): return o.tolist()
    if isinstance(o, dict): return {k: plain(v) for k, v in o.items()}
    return [plain(v) for v in o] if isinstance(o, (list, tuple)) else o if isinstance(o, (str, int, float)) else str(o)
files, items = json.loads(sys.argv[1]), json.loads(sys.argv[2])
print(json.dumps({name: [plain(tuple(load_learner(file).predict(item))) for item in items[name]] for name, file in files.items()}))
'''


def plain(o):
    "Tensors and tuples as lists"
    if hasattr(o, 'tolist'): return o.tolist()
    if isinstance(o, dict): return {k: plain(v) for k, v in o.items()}
    return [plain(v) for v in o] if isinstance(o, (list, tuple)) else o if isinstance(o, (str, int, float)) else str(o)


def in_another_process(files: dict, items: dict, cwd: Path, own: Path | None = None) -> dict:
    "What a program predicts that has nothing but the files"
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(LIBRARY), *([str(own)] if own else [])]), 'OMP_NUM_THREADS': '1'}
    arguments = [json.dumps({k: str(v) for k, v in files.items()}), json.dumps({k: [str(o) for o in v] if not isinstance(v[0], list) else v for k, v in items.items()}), 'own' if own else '']
    found = subprocess.run([sys.executable, '-W', 'ignore', '-c', LOAD, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout)


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    "A module with registered parts, as a user would write it"
    folder = tmp_path_factory.mktemp('own')
    (folder/'own_parts.py').write_text(OWN)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop('own_parts', None)


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> list[Path]: return make_pictures(tmp_path_factory.mktemp('pictures'))


def is_cat(file): return Path(file).stem in '0246'
is_cat.__module__ = '__main__' # where the book has it


def loaders(files, *blocks, get_y=is_cat, item_tfms=None, batch_tfms=(), **options):
    block = DataBlock((ImageBlock, *blocks), get_y=get_y, splitter=IndexSplitter([6, 7]), item_tfms=Resize(32) if item_tfms is None else item_tfms, batch_tfms=[*batch_tfms, Normalize.from_stats(*imagenet_stats)], **options)
    return block.dataloaders(files, bs=4, num_workers=0, device='cpu')


def mask_of(file): return Path(file).parents[1]/'masks'/Path(file).name
def small(dls, **options): return vision_learner(dls, 'test_resnet', pretrained=False, **{'cut': 4, 'lin_ftrs': [8], **options})
def layers(*last): return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2), *last)


def tiny_xresnet():
    from lamella.vision.xresnet import xresnet18
    return xresnet18(n_out=2, stem_szs=(4, 4, 8), widen=0.1)


TASKS = {
    'classification': lambda files: small(loaders(files, CategoryBlock, batch_tfms=aug_transforms()), metrics=accuracy),
    'multi-label': lambda files: small(loaders(files, MultiCategoryBlock, get_y=lambda o: ['square'] + ['odd'] * (number(o) % 2))),
    'regression': lambda files: small(loaders(files, RegressionBlock, get_y=lambda o: float(number(o))), n_out=1, y_range=(-1, 9)),
    'points': lambda files: small(loaders(files, PointBlock, get_y=lambda o: [box(o)[:2], box(o)[2:]]), n_out=4),
    'segmentation': lambda files: unet_learner(loaders(files, MaskBlock(['ground', 'square']), get_y=mask_of), 'test_resnet', pretrained=False, cut=3, last_cross=False),
    'detection': lambda files: detection_learner(loaders(files, BBoxBlock, BBoxLblBlock, get_y=[lambda o: [box(o)], lambda o: ['square']], n_inp=1), 'retinanet', backbone='test_efficientnet', width=8, levels=2,
                                                 head_convs=1, pretrained=False, score_thresh=0., detections_per_img=3),
    'timm': lambda files: Learner(dls := loaders(files, CategoryBlock), create_timm_model('test_vit', 2, pretrained=False, img_size=32, lin_ftrs=[8])[0]),
    'torchvision': lambda files: vision_learner(loaders(files, CategoryBlock, item_tfms=Resize(64)), 'torchvision:squeezenet1_1', pretrained=False, cut=None, lin_ftrs=[8]),
    'xresnet': lambda files: Learner(loaders(files, CategoryBlock), tiny_xresnet()),
    'layers': lambda files: Learner(loaders(files, CategoryBlock), layers()),
    'embeddings': lambda files: Learner(loaders(files, RegressionBlock, get_y=number), small(loaders(files, CategoryBlock), custom_head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())).model, MSELossFlat())}


@pytest.fixture
def one_thread():
    "The same number of threads as in the other process"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(learn, name: str = ''):
    "A step or two of training, so that no buffer is that of a new model"
    if name != 'embeddings':
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return learn


def test_every_task_in_another_process(files, tmp_path, one_thread):
    "Label functions of __main__, lambdas and augmentations do not matter; nothing but lamella.export is imported there"
    exported, expected = {}, {}
    (tmp_path/'elsewhere').mkdir()
    for name, make in TASKS.items():
        learn = trained(make(files), name)
        exported[name] = learn.export(tmp_path/f'{name}.pkl')
        assert learn.export(tmp_path/'again.pkl').read_bytes() == exported[name].read_bytes()
        expected[name] = [plain(tuple(learn.predict(o))) for o in (files[0], files[7])]
    found = in_another_process(exported, {name: [files[0], files[7]] for name in TASKS}, tmp_path/'elsewhere')
    for name in TASKS: assert found[name] == expected[name], name
    spec = {name: read_spec(file) for name, file in exported.items()}
    assert [spec[k]['task'] for k in ('classification', 'multi-label', 'segmentation', 'detection')] == ['classification', 'multi-label', 'segmentation', 'detection']
    assert spec['torchvision']['input'] == {'size': [64, 64], 'channels': 3} and spec['detection']['architecture'] == 'Detector(retinanet, test_efficientnet)'
    assert set(spec['classification']['metrics']) == {'train_loss', 'valid_loss', 'accuracy'} and spec['embeddings']['metrics'] == {}


def test_registered_parts_of_ones_own(files, own, tmp_path, one_thread):
    "Several inputs, several targets, a network, a loss, a layer and a transform that are registered in a module: no trust is needed"
    import own_parts
    two = DataBlock((ImageBlock, ImageBlock, CategoryBlock), n_inp=2, get_x=[lambda o: o[0], lambda o: o[1]], get_y=lambda o: 'same' if is_cat(o[0]) == is_cat(o[1]) else 'other', splitter=IndexSplitter([6, 7]), item_tfms=Resize(32))
    pairs = [[str(a), str(b)] for a, b in zip(files, [files[k] for k in (1, 0, 3, 2, 4, 5, 6, 7)])]
    several = loaders(files, CategoryBlock, CategoryBlock, get_y=[is_cat, lambda o: 'few' if number(o) < 3 else 'many'], n_inp=1)
    learners = {'inputs': (Learner(two.dataloaders(pairs, bs=4, num_workers=0, device='cpu'), own_parts.TwoEyes(3, 2)), [pairs[0], pairs[7]]),
                'targets': (small(several, n_out=4, loss_func=own_parts.TwoClasses()), [files[0], files[7]]),
                'transform': (small(loaders(files, CategoryBlock, batch_tfms=[own_parts.Darker(3)])), [files[0]]),
                'layer': (Learner(loaders(files, CategoryBlock), layers(own_parts.Scaled(0.5))), [files[0]])}
    exported, expected = {}, {}
    for name, (learn, items) in learners.items():
        exported[name] = trained(learn).export(tmp_path/f'{name}.pkl')
        expected[name] = [plain(tuple(learn.predict(o))) for o in items]
    found = in_another_process(exported, {name: items for name, (_, items) in learners.items()}, tmp_path, own)
    for name in learners: assert found[name] == expected[name], name
    with pytest.raises(AssertionError, match="(?s)TwoEyes.*import the module that has `@register` above it first"): in_another_process({'inputs': exported['inputs']}, {'inputs': [pairs[0]]}, tmp_path)


def test_what_is_not_registered_needs_trust(files, own, tmp_path):
    import own_parts
    learn = Learner(loaders(files, CategoryBlock), own_parts.Mine(*layers()))
    file = learn.export(tmp_path/'mine.pkl')
    with pytest.raises(UntrustedError, match=r"own_parts.Mine.*trust=True") as caught: load_learner(file)
    assert '@register' in str(caught.value) and str(file) in str(caught.value)
    assert torch.equal(load_learner(file, trust=True).predict(files[0])[2], learn.predict(files[0])[2])
    twice = loaders(files, CategoryBlock, batch_tfms=[lambda o: o * 2 if isinstance(o, torch.Tensor) and o.dim() == 4 else o])
    with pytest.raises(TypeError, match='cannot be put into a file.*top level of a module, with @register above it'): small(twice).export(tmp_path/'never.pkl')
    assert not (tmp_path/'never.pkl').exists()


# ---- exports that fail

def state_of(learn) -> list:
    "All that an export could change"
    weights = {k: v.clone() for k, v in learn.model.state_dict().items()}
    return [weights, [m.training for m in learn.model.modules()], [p.requires_grad for p in learn.model.parameters()], [p.device for p in learn.model.parameters()], torch.get_rng_state(), list(map(id, learn.cbs)),
            id(learn.opt), id(learn.dls), sorted(vars(learn))]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


def full_disk(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')
def interrupt(*args, **kwargs): raise KeyboardInterrupt


class Half:
    "A file on a disk that is full after some bytes, or a key that is pressed then"
    def __init__(self, file, fail): self.file, self.fail = file, fail
    def __enter__(self): return self
    def __exit__(self, *args): self.file.close()
    def write(self, data): self.file.write(data[:1000]); self.fail()


@pytest.mark.parametrize('fail, error', [(full_disk, OSError), (interrupt, KeyboardInterrupt)])
@pytest.mark.parametrize('where', ['write', 'rename', 'weights'])
def test_an_export_that_fails_leaves_everything(where, fail, error, files, tmp_path, monkeypatch):
    import lamella.base.bundle as bundle
    import lamella.base.files as base_files
    import lamella.learner.saving as saving
    learn = trained(small(loaders(files, CategoryBlock)))
    file = learn.export(tmp_path/'model.pkl')
    before, state = file.read_bytes(), state_of(learn)
    with torch.no_grad(): next(learn.model.parameters()).add_(1)
    state = state_of(learn)
    if where == 'write': monkeypatch.setattr(bundle, 'open', lambda path, mode: Half(open(path, mode), fail), raising=False)
    elif where == 'rename': monkeypatch.setattr(base_files.os, 'replace', fail)
    else: monkeypatch.setattr(saving, 'tensors_to_save', fail)
    with pytest.raises(error): learn.export(tmp_path/'model.pkl')
    with pytest.raises(error): learn.export(tmp_path/'new.pkl')
    monkeypatch.undo()
    assert file.read_bytes() == before and [o.name for o in tmp_path.iterdir()] == ['model.pkl']
    assert same(state_of(learn), state)
    assert learn.export(tmp_path/'model.pkl').read_bytes() != before


def test_an_export_changes_nothing(files, tmp_path):
    learn = trained(small(loaders(files, CategoryBlock, batch_tfms=aug_transforms())))
    learn.model.train()
    learn.model[0].eval()
    next(learn.model.parameters()).requires_grad_(False)
    state = state_of(learn)
    learn.export(tmp_path/'model.pkl')
    assert same(state_of(learn), state)


def test_a_learner_whose_files_are_gone_can_be_exported(tmp_path):
    files = make_pictures(tmp_path)
    learn = small(loaders(files, CategoryBlock))
    for file in files: file.unlink()
    assert read_spec(learn.export(tmp_path/'model.pkl'))['input'] == {'size': None, 'channels': None}
    assert load_learner(tmp_path/'model.pkl').vocab == learn.dls.vocab


def test_places_where_nothing_can_be_written(files, tmp_path):
    learn = small(loaders(files, CategoryBlock))
    (tmp_path/'file').write_text('mine')
    with pytest.raises(OSError): learn.export(tmp_path/'file'/'model.pkl') # a file where a folder should be
    assert (tmp_path/'file').read_text() == 'mine'
    (tmp_path/'folder').mkdir()
    with pytest.raises(OSError): learn.export(tmp_path/'folder')
    assert list((tmp_path/'folder').iterdir()) == [] and sorted(o.name for o in tmp_path.iterdir()) == ['file', 'folder']
    if os.geteuid() == 0: return # for whom all folders are writable
    (tmp_path/'folder').chmod(0o500)
    with pytest.raises(PermissionError, match='folder'): learn.export(tmp_path/'folder'/'model.pkl')
