"""Exported files that were damaged or made by somebody else: each is one clear error, and nothing in them runs."""
import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from lamella.base.bundle import EXPORT_MEMBERS, BundleError, read_bundle, write_bundle
from lamella.base.pickling import UntrustedError
from lamella.export import ExportError, load_learner

CLEAR = (BundleError, ExportError, UntrustedError)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A small exported learner, and its bytes"
    from conftest import make_photos
    from lamella.vision.all import ImageDataLoaders, Resize, vision_learner
    folder = tmp_path_factory.mktemp('export')
    photos = make_photos(folder/'photos', n=4)
    dls = ImageDataLoaders.from_folder(photos, valid_pct=0.25, seed=1, item_tfms=Resize(32), bs=2, num_workers=0, device='cpu')
    file = vision_learner(dls, 'test_resnet', pretrained=False).export(folder/'model.pkl')
    return file, file.read_bytes()


def refused(path, data: bytes, match: str = ''):
    path.write_bytes(data)
    with pytest.raises(CLEAR, match=match or None) as caught: load_learner(path)
    assert '\n' not in str(caught.value).strip()


def test_the_file_itself_is_fine(exported):
    file, data = exported
    assert load_learner(file).vocab == ['cat', 'dog']
    spec = json.loads(zipfile.ZipFile(io.BytesIO(data)).read('spec.json'))
    assert spec['model']['args']['arch'] == 'timm:test_resnet' and spec['pipeline']['vocab'] == ['cat', 'dog']
    assert set(zipfile.ZipFile(io.BytesIO(data)).namelist()) == {'spec.json', 'weights.safetensors'}


@pytest.mark.parametrize('percent', range(0, 100, 5))
def test_truncated(exported, tmp_path, percent):
    data = exported[1]
    refused(tmp_path/'x.pkl', data[:len(data) * percent // 100], 'truncated|no zip')


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_one_altered_byte(exported, tmp_path, place, flip):
    data = bytearray(exported[1])
    data[int(place * len(data))] ^= flip
    refused(tmp_path/'x.pkl', bytes(data))


def changed(exported, tmp_path, **members):
    "The export with other members, and a fitting checksum: what somebody makes who knows the format"
    return write_bundle(tmp_path/'x.pkl', {**read_bundle(exported[0], EXPORT_MEMBERS), **members})


def changed_spec(exported, tmp_path, change):
    spec = json.loads(read_bundle(exported[0], EXPORT_MEMBERS)['spec.json'])
    change(spec)
    return changed(exported, tmp_path, **{'spec.json': json.dumps(spec).encode()})


class Evil:
    def __init__(self, func, *args): self.call = func, args
    def __reduce__(self): return self.call


@pytest.mark.parametrize('how', ['system', 'eval', 'nested', 'through_torch', 'through_import'])
def test_pickles_that_would_run_code(exported, tmp_path, how):
    marker = tmp_path/'ran'
    evil = {'system': Evil(os.system, f'touch {marker}'), 'eval': Evil(eval, f"open({str(marker)!r}, 'w')"),
            'nested': Evil(pickle.loads, pickle.dumps(Evil(os.system, f'touch {marker}'))),
            'through_torch': Evil(torch.load, str(marker)), 'through_import': Evil(__import__, 'antigravity')}[how]
    from safetensors.torch import save
    file = changed(exported, tmp_path, **{'objects.pkl': pickle.dumps([evil], protocol=4), 'objects.safetensors': save({})})
    with pytest.raises(UntrustedError, match='trust=True'): load_learner(file)
    assert not marker.exists()


def test_whole_pickle_instead_of_an_export(tmp_path):
    marker = tmp_path/'ran'
    (tmp_path/'x.pkl').write_bytes(pickle.dumps(Evil(os.system, f'touch {marker}')))
    with pytest.raises(BundleError, match='looks like a pickle'): load_learner(tmp_path/'x.pkl')
    assert not marker.exists()


@pytest.mark.parametrize('change, match', [
    (lambda s: s['model'].update(builder='os:system', args={'command': 'true'}), 'nothing is registered'),
    (lambda s: s['model'].update(builder='lamella.base.download:download'), 'nothing is registered'),
    (lambda s: s['model']['args'].update(arch='timm:hf-hub:somebody/model'), 'has no architecture'),
    (lambda s: s['model']['args'].update(arch='timm:local-dir:/tmp'), 'has no architecture'),
    (lambda s: s['model']['args'].update(n_out=10**15), ''),
    (lambda s: s['model']['args'].update(n_out=3), ''),
    (lambda s: s['model']['args'].update(pretrained=True), 'cannot be loaded'),
    (lambda s: s['pipeline'].update(inputs=[[{'$ref': 'builtins:eval'}]]), 'nothing is registered'),
    (lambda s: s['pipeline'].update(item_tfms=[{'$object': 3}]), 'not there'),
    (lambda s: s.update(version=2), 'newer lamella'),
    (lambda s: s.pop('model'), 'cannot be loaded'),
])
def test_specs_that_lie(exported, tmp_path, change, match):
    with pytest.raises(CLEAR, match=match or None): load_learner(changed_spec(exported, tmp_path, change))


def test_members_outside_the_folder(exported, tmp_path):
    with pytest.raises(BundleError, match='do not belong'): load_learner(changed(exported, tmp_path, **{'../evil.py': b'1'}))
    assert not (tmp_path.parent/'evil.py').exists()


def test_objects_that_can_be_called_while_a_pickle_is_read(exported, tmp_path):
    "Registered getters as getattr and [], a chain of them to os.system: found in a review of the first version"
    from safetensors.torch import save
    marker = tmp_path/'ran'
    def text(o): return b'\x8c' + bytes([len(o)]) + o.encode()
    def name(module, o): return text(module) + text(o) + b'\x93'
    def call(f, *args): return f + b'(' + b''.join(args) + b'tR'
    labels = 'lamella.data.labels'
    def attribute(o, n): return call(call(name(labels, 'AttrGetter'), text(n)), o)
    def item(o, k): return call(call(name(labels, 'ItemGetter'), text(k)), o)
    system = attribute(item(attribute(attribute(name(labels, 'RegexLabeller'), '__init__'), '__globals__'), 'os'), 'system')
    attack = b'\x80\x04(' + call(system, text(f'touch {marker}')) + b'l.'
    file = changed(exported, tmp_path, **{'objects.pkl': attack, 'objects.safetensors': save({})})
    with pytest.raises(UntrustedError): load_learner(file)
    assert not marker.exists()


def test_classes_that_would_be_changed_for_the_whole_process(exported, tmp_path):
    from safetensors.torch import save
    from lamella.data.transform import Transform
    before = Transform.__call__
    def text(o): return b'\x8c' + bytes([len(o)]) + o.encode()
    for module, kind in (('lamella.data.transform', 'Transform'), ('torch.nn.modules.activation', 'ReLU')):
        attack = b'\x80\x04(' + text(module) + text(kind) + b'\x93' + b'N}' + text('name') + text('patched') + b's\x86b' + b'l.'
        file = changed(exported, tmp_path, **{'objects.pkl': attack, 'objects.safetensors': save({})})
        with pytest.raises(UntrustedError): load_learner(file)
    assert Transform.__call__ is before and getattr(torch.nn.ReLU, 'name', None) != 'patched'


def test_a_model_that_was_changed_after_it_was_built(exported, tmp_path):
    "The file holds the model as it is, not as its builder would make it"
    from lamella.vision.all import ImageDataLoaders, Resize, vision_learner
    photos = exported[0].parent/'photos'
    dls = ImageDataLoaders.from_folder(photos, valid_pct=0.25, seed=1, item_tfms=Resize(32), bs=2, num_workers=0, device='cpu')
    learn = vision_learner(dls, 'test_resnet', pretrained=False)
    place = next(i for i, layer in enumerate(learn.model[1]) if isinstance(layer, torch.nn.ReLU))
    learn.model[1][place] = torch.nn.Tanh()
    file = learn.export(tmp_path/'model.pkl')
    with pytest.raises(UntrustedError): load_learner(file)
    picture = photos/'cat'/'1.jpg'
    assert torch.equal(load_learner(file, trust=True).predict(picture)[2], learn.predict(picture)[2])


def test_labels_that_are_numpy_numbers(tmp_path):
    import pandas as pd
    from conftest import make_photos
    from lamella.vision.all import ImageDataLoaders, Resize, vision_learner
    photos = make_photos(tmp_path/'photos', n=4)
    names = [f'{k}/{i}.jpg' for k in ('cat', 'dog') for i in range(1, 5)]
    table = pd.DataFrame({'name': names, 'label': [0] * 4 + [1] * 4})
    dls = ImageDataLoaders.from_df(table, photos, valid_pct=0.25, seed=1, item_tfms=Resize(32), bs=2, num_workers=0, device='cpu')
    learn = vision_learner(dls, 'test_resnet', pretrained=False)
    assert load_learner(learn.export(tmp_path/'model.pkl')).vocab == [0, 1]
    assert load_learner(tmp_path/'model.pkl').predict(photos/'cat'/'1.jpg').label == learn.predict(table.iloc[0]).label


def test_a_layer_that_is_called_while_a_pickle_is_read(tmp_path, exported, monkeypatch):
    "Layers are on the list of names; calling one is refused all the same"
    from safetensors.torch import save
    called = []
    monkeypatch.setattr(torch.nn.ReLU, '__call__', lambda self, x: called.append(x))
    def text(o): return b'\x8c' + bytes([len(o)]) + o.encode()
    attack = b'\x80\x04(' + text('torch.nn.modules.activation') + text('ReLU') + b'\x93)\x81(' + text('x') + b'tRl.'
    file = changed(exported, tmp_path, **{'objects.pkl': attack, 'objects.safetensors': save({})})
    with pytest.raises(UntrustedError, match='a call of'): load_learner(file)
    assert not called


@pytest.mark.parametrize('name', ['hf-hub:somebody/model', 'timm:hf-hub:somebody/model', 'local-dir:/tmp', 'timm:local-dir:/tmp'])
@pytest.mark.parametrize('builder, args', [('lamella.vision.unet:rebuild_unet_model', {'n_out': 2, 'img_size': 32}),
                                           ('lamella.vision.detection:rebuild_detector', {'arch': 'fcos', 'n_classes': 2})])
def test_builders_that_would_look_elsewhere_for_a_network(exported, tmp_path, builder, args, name, monkeypatch):
    import timm
    monkeypatch.setattr(timm, 'create_model', lambda *a, **k: pytest.fail('timm was asked for it'))
    args = {**args, 'backbone' if 'detection' in builder else 'arch': name}
    with pytest.raises(ExportError, match='has no architecture'): load_learner(changed_spec(exported, tmp_path, lambda s: s.update(model={'builder': builder, 'args': args})))


def limited(seconds=10):
    "A block that fails in place of going on for ever"
    import signal
    from contextlib import contextmanager
    @contextmanager
    def block():
        def late(*_): raise SystemError('it takes for ever')
        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(seconds)
        try: yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    return block()


NESTED = b'K\x01' + b'2\x86' * 40 # a tuple of twice the same, 40 times: hashing it takes 2**40 steps


@pytest.mark.parametrize('attack', [b'}' + NESTED + b'K\x01s', b'}(' + NESTED + b'K\x01u', b'\x8f(' + NESTED + b'\x90', b'(' + NESTED + b'\x91', b'(' + NESTED + b'K\x01d',
                                    b'cbuiltins\nset\n](' + NESTED + b'e\x85R', b'cbuiltins\nfrozenset\n](' + NESTED + b'e\x85\x81', b'cbuiltins\nset\n' + NESTED + b'\x85R',
                                    b'ccollections\nOrderedDict\n](' + NESTED + b'K\x01\x86e\x85R', b'cbuiltins\nset\n}' + b'K\x01' + NESTED + b's\x85R'])
def test_keys_that_take_for_ever_to_hash(attack):
    from lamella.base.pickling import load_objects
    with limited(), pytest.raises(pickle.UnpicklingError, match='as a key or in a set|something else than lists'): load_objects(b'\x80\x04(' + attack + b'l.', [])


def test_keys_that_are_plain_are_read():
    from collections import OrderedDict, deque
    from lamella.base.pickling import load_objects
    objects = [{'a': 1, (1, 'b'): 2, None: 3}, {1, 2.5}, frozenset({b'x', (1, 2)}), OrderedDict(a=[1], b={2}), deque([1, [2]]), set(), OrderedDict()]
    assert load_objects(pickle.dumps(objects, protocol=4), []) == objects
    assert load_objects(pickle.dumps(objects, protocol=3), []) == objects


@pytest.mark.parametrize('attack', [b']' + b'2\x86' * 40, b'(' + NESTED + b'K\x01\x86' + NESTED + b'\x86l'])
def test_lists_that_unfold_for_ever(attack):
    from lamella.base.pickling import load_objects
    with limited(), pytest.raises(pickle.UnpicklingError, match='unfold'): load_objects(b'\x80\x04(' + attack + b'l.', [])


def test_layers_that_share_layers_for_ever(exported, tmp_path):
    from safetensors.torch import save
    model = torch.nn.ReLU()
    for _ in range(45): model = torch.nn.Sequential(model, model)
    file = changed(exported, tmp_path, **{'objects.pkl': pickle.dumps([model], protocol=4), 'objects.safetensors': save({})})
    for change in (lambda s: s['model']['args'].update(custom_head={'$object': 0}), lambda s: s.update(model={'$object': 0})):
        with limited(), pytest.raises(CLEAR, match='unfold'): load_learner(changed_spec((file, b''), tmp_path, change))


@pytest.mark.parametrize('change', [
    lambda s: s['model']['args'].update(lin_ftrs=[30000, 30000]),
    lambda s: s['model']['args'].update(lin_ftrs=[5000] * 1000),
    lambda s: s.update(model={'builder': 'lamella.vision.xresnet:XResNet', 'args': {'block': {'$ref': 'lamella.nets.blocks:ResBlock'}, 'expansion': 1, 'layers': [10**7]}}),
    lambda s: s.update(model={'builder': 'lamella.vision.unet:rebuild_unet_model', 'args': {'arch': 'timm:test_resnet', 'n_out': 2, 'img_size': [10**5, 10**5]}}),
    lambda s: s.update(model={'builder': 'lamella.vision.unet:rebuild_unet_model', 'args': {'arch': 'timm:test_resnet', 'n_out': 2, 'img_size': 32, 'n_in': 10**6}}),
])
def test_models_that_are_larger_than_their_weights(exported, tmp_path, change):
    "Each would take gigabytes, or hours"
    with limited(60), pytest.raises(ExportError, match='far larger than the weights|pixels a side'): load_learner(changed_spec(exported, tmp_path, change))


@pytest.mark.parametrize('where', ['model', 'output', 'inputs'])
def test_references_that_would_open_files(exported, tmp_path, where, monkeypatch):
    from lamella.vision.types import PILBase
    monkeypatch.setattr(PILBase, '_create_lazily', classmethod(lambda *a: pytest.fail('a file was opened')))
    picture = str(exported[0].parent/'photos'/'cat'/'1.jpg')
    args = {'loss_cls': {'$ref': 'lamella.vision.types:PILImage', 'method': 'create'}, 'fn': picture}
    loss = {'$new': 'lamella.losses.flat:BaseLoss', 'args': args}
    def change(s):
        if where == 'model': s['model'] = {'builder': 'lamella.losses.flat:BaseLoss', 'args': args}
        elif where == 'output': s['output'] = loss
        else: s['pipeline']['inputs'] = [loss]
    with pytest.raises(ExportError, match='has no place|may not say'): load_learner(changed_spec(exported, tmp_path, change))


def test_losses_that_a_file_may_not_name_are_made_elsewhere():
    from lamella.base.spec import call_named
    from lamella.vision.all import BaseLoss
    assert isinstance(BaseLoss(torch.nn.PoissonNLLLoss).func, torch.nn.PoissonNLLLoss)
    with pytest.raises(ValueError, match='may not say'): call_named(BaseLoss, {'loss_cls': torch.nn.PoissonNLLLoss})


def test_masks_of_too_many_colours_are_refused_before_they_are_compared():
    from lamella.vision.masks import MaskOfColors
    class Colors(dict):
        def items(self): pytest.fail('the colours were looked at')
    with pytest.raises(ValueError, match='300 classes'): MaskOfColors(Colors({i: (0, 0, i) for i in range(300)}))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_thresholds_between_neighbouring_numbers(dtype):
    from lamella.metrics import best_thresholds
    for start in (0.25, 0.5, 0.7, 0.9):
        for k in range(2): # one of two pairs of neighbours has its middle rounded up
            low = torch.tensor(start, dtype=dtype)
            for _ in range(k): low = torch.nextafter(low, torch.tensor(1., dtype=dtype)) if dtype.itemsize > 2 else (low.view(torch.int16) + 1).view(dtype)
            high = torch.nextafter(low, torch.tensor(1., dtype=dtype)) if dtype.itemsize > 2 else (low.view(torch.int16) + 1).view(dtype)
            limit = best_thresholds(torch.stack([high, low])[:, None], torch.tensor([[1], [0]]))
            assert high > limit[0] and not low > limit[0]


def test_thresholds_are_probabilities_and_made_of_them():
    from lamella.metrics import best_thresholds
    limits = best_thresholds(torch.zeros(3, 1), torch.ones(3, 1))
    assert 0 <= limits[0] <= 1
    for wrong in (float('nan'), 1.5, -0.1):
        with pytest.raises(ValueError, match='from 0 to 1'): best_thresholds(torch.tensor([[wrong], [0.5]]), torch.tensor([[1], [0]]))
