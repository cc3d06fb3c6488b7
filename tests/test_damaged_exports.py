"""More than 2,000 damaged files, also with a checksum that fits: each is one clear error or differs in values only; nothing runs, nothing hangs."""
import hashlib
import io
import json
import os
import pickle
import random
import signal
import struct
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from lamella.base.bundle import EXPORT_MEMBERS, BundleError, read_bundle, write_bundle
from lamella.base.pickling import UntrustedError
from lamella.base.registry import register
from lamella.data.transform import Transform
from lamella.export import ExportError, load_learner, read_spec

CLEAR = (BundleError, ExportError, UntrustedError)
WATCHED = ('subprocess.Popen', 'os.system', 'os.exec', 'os.fork', 'os.forkpty', 'os.posix_spawn', 'os.spawn', 'socket.', 'os.remove', 'os.rename', 'os.mkdir', 'os.rmdir', 'os.putenv',
           'os.chmod', 'os.link', 'os.symlink', 'shutil.', 'ctypes.', 'pickle.find_class', 'urllib.', 'webbrowser.', 'os.kill', 'tempfile.')
watching, seen = False, []


def watch(event: str, args: tuple) -> None:
    "What a file that is only read never does"
    if not watching: return
    writes = event == 'open' and (set(str(args[1] or '')) & set('wax+') or isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if writes or event.startswith(WATCHED): seen.append((event, repr(args)[:200]))


sys.addaudithook(watch)


class Late(BaseException): "It takes for ever"


@contextmanager
def guarded(seconds: int = 20):
    "A block that starts no process, opens no connection, writes no file and comes to an end"
    global watching
    def late(*_): raise Late
    before, bytecode = signal.signal(signal.SIGALRM, late), sys.dont_write_bytecode
    seen.clear()
    sys.dont_write_bytecode = True
    signal.alarm(seconds)
    watching = True
    try: yield
    finally:
        watching = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.dont_write_bytecode = bytecode
    assert not seen, seen


@register
class Doubled(Transform):
    "A number as a tensor"
    def __init__(self, by=2.): self.by = by
    def encodes(self, o: object): return torch.tensor([float(o) * self.by])


@pytest.fixture(scope='module')
def tiny(tmp_path_factory) -> Path:
    "A file with layers of torch.nn as objects, two tensors in its description, several metrics: all parts that a file can have"
    from lamella.data.blocks import CategoryBlock, TransformBlock
    from lamella.data.datablock import DataBlock
    from lamella.learner.learner import Learner
    folder = tmp_path_factory.mktemp('tiny')
    block = DataBlock(blocks=(TransformBlock(type_tfms=Doubled(2.5)), CategoryBlock), get_y=lambda i: 'many' if i > 4 else 'few')
    dls = block.dataloaders(range(10), bs=2, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), path=folder)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn.export('tiny.pkl')


@pytest.fixture(scope='module')
def named() -> Path:
    "A file that names a network of timm"
    return Path(__file__).parent/'released'/'0.5.0'/'regression.pkl'


def signed(body: bytes) -> bytes: return body + hashlib.blake2b(body, digest_size=32).hexdigest().encode()


def attempt(path: Path, data: bytes):
    "The predictor that a file gives, or `None` if it is refused in one line that names it"
    path.write_bytes(data)
    try:
        with guarded(): return load_learner(path)
    except CLEAR as error:
        assert '\n' not in str(error) and str(path) in str(error) and len(str(error)) < 2000, error
        return None


def named_in(spec) -> set:
    "All names of classes and functions"
    if isinstance(spec, list): return set().union(*map(named_in, spec))
    if not isinstance(spec, dict): return set()
    return {str(v) for k, v in spec.items() if k in ('$new', '$ref', 'builder', 'method')} | set().union(*map(named_in, spec.values()))


def harmless(predictor, whole) -> bool:
    "Does it differ from the undamaged one in nothing but values?"
    shapes = lambda o: [(k, v.shape, v.dtype) for k, v in o.model.state_dict().items()]
    kinds = lambda o: [type(m) for m in o.model.modules()]
    return shapes(predictor) == shapes(whole) and kinds(predictor) == kinds(whole) and named_in(predictor.spec) <= named_in(whole.spec)


def all_harmless(file: Path, folder: Path, damaged) -> int:
    "How many of the damaged files were refused; the others differ in values"
    whole, refused = load_learner(file), 0
    for k, data in enumerate(damaged):
        found = attempt(folder/f'damaged {k}.pkl', data)
        refused += found is None
        assert found is None or harmless(found, whole), f'number {k}'
        (folder/f'damaged {k}.pkl').unlink()
    return refused


def flipped(data: bytes, start: int, stop: int, n: int, seed: int = 0):
    "Copies of `data` with one byte changed, between two places"
    draw = random.Random(seed)
    for _ in range(n):
        place = draw.randrange(start, stop)
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8) if draw.random() < 0.7 else draw.randrange(1, 256)
        yield bytes(changed)


# ---- damage that nobody hid

@pytest.mark.parametrize('which', ['tiny', 'named'])
def test_truncated_at_every_percent(which, request, tmp_path):
    file = request.getfixturevalue(which)
    data = file.read_bytes()
    cuts = [data[:len(data) * percent // 100] for percent in range(100)]
    assert all_harmless(file, tmp_path, cuts) == 100


def test_single_flipped_bytes(tiny, tmp_path):
    data = tiny.read_bytes()
    assert all_harmless(tiny, tmp_path, flipped(data, 0, len(data), 800)) == 800


# ---- damage with a checksum that fits

def resigned(file: Path, n: int, name: str, start: int = 0, stop: int | None = None, seed: int = 1):
    "The file with one byte of a member changed, as somebody would write it who wants it to be read"
    members = read_bundle(file, EXPORT_MEMBERS)
    content = members[name]
    for k, changed in enumerate(flipped(content, start, len(content) if stop is None else stop, n, seed)):
        yield rewritten(file, {**members, name: changed})


def rewritten(file: Path, members: dict) -> bytes:
    "A file with these members and the right checksum"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_STORED) as archive:
        for name, content in members.items(): archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content)
        archive.comment = b'0' * 64
    return signed(buffer.getvalue()[:-64])


def with_member(file: Path, **changed) -> bytes:
    names = {'spec': 'spec.json', 'weights': 'weights.safetensors', 'objects': 'objects.pkl', 'tensors': 'objects.safetensors'}
    return rewritten(file, {**read_bundle(file, EXPORT_MEMBERS), **{names[k]: v for k, v in changed.items()}})


@pytest.mark.parametrize('which, n', [('tiny', 350), ('named', 150)])
def test_descriptions_with_a_flipped_byte(which, n, request, tmp_path):
    file = request.getfixturevalue(which)
    assert all_harmless(file, tmp_path, resigned(file, n, 'spec.json')) > n // 4


def test_weights_with_a_flipped_byte(tiny, tmp_path):
    weights = read_bundle(tiny, EXPORT_MEMBERS)['weights.safetensors']
    header = 8 + struct.unpack('<Q', weights[:8])[0]
    assert all_harmless(tiny, tmp_path, resigned(tiny, 300, 'weights.safetensors', 0, header)) > 200
    assert all_harmless(tiny, tmp_path, resigned(tiny, 50, 'weights.safetensors', header)) == 0 # values


def test_objects_with_a_flipped_byte(tiny, tmp_path):
    assert all_harmless_objects(tiny, tmp_path, resigned(tiny, 400, 'objects.pkl')) > 100
    assert all_harmless(tiny, tmp_path, resigned(tiny, 60, 'objects.safetensors', 0, 60)) > 20


def all_harmless_objects(file: Path, folder: Path, damaged) -> int:
    "The same, but an object may be of another class of torch.nn, and have other attributes"
    refused = 0
    for k, data in enumerate(damaged):
        found = attempt(folder/f'damaged {k}.pkl', data)
        refused += found is None
        assert found is None or all(type(m).__module__.startswith('torch.nn.modules.') for m in found.model.modules())
    return refused


@pytest.mark.parametrize('seed', [1, 2])
def test_the_list_of_members_with_a_flipped_byte(tiny, tmp_path, seed):
    body = tiny.read_bytes()[:-64]
    start = zipfile.ZipFile(tiny).start_dir
    assert all_harmless(tiny, tmp_path, [signed(o) for o in flipped(body, start, len(body), 150, seed)]) > 50
    heads = [o.header_offset + k for o in zipfile.ZipFile(tiny).infolist() for k in range(30)]
    changes = [bytes(bytearray(body[:place]) + bytes([body[place] ^ (1 << bit)]) + body[place + 1:]) for place in heads for bit in ((seed * 3) % 8,)]
    all_harmless(tiny, tmp_path, map(signed, changes))


def test_several_flipped_bytes_anywhere(tiny, tmp_path):
    body, draw, damaged = tiny.read_bytes()[:-64], random.Random(3), []
    for _ in range(150):
        changed = bytearray(body)
        for _ in range(draw.randrange(2, 6)): changed[draw.randrange(len(body))] = draw.randrange(256)
        damaged.append(signed(bytes(changed)))
    assert all_harmless_objects(tiny, tmp_path, damaged) > 50


# ---- an attacker who knows the format

class Evil:
    def __init__(self, func, *args): self.call = func, args
    def __reduce__(self): return self.call


def text(o: str) -> bytes: return b'\x8c' + bytes([len(o)]) + o.encode()
def name(module: str, o: str) -> bytes: return text(module) + text(o) + b'\x93'
def list_of(*parts: bytes) -> bytes: return b'\x80\x04(' + b''.join(parts) + b'l.'
def call(f: bytes, *args: bytes) -> bytes: return f + b'(' + b''.join(args) + b'tR'


ATTACKS = {
    'system': lambda m: pickle.dumps([Evil(os.system, f'touch {m}')]), 'eval': lambda m: pickle.dumps([Evil(eval, f'open({str(m)!r}, "w")')]), 'exec': lambda m: pickle.dumps([Evil(exec, '1')]),
    'nested': lambda m: pickle.dumps([Evil(pickle.loads, pickle.dumps(Evil(os.system, f'touch {m}')))]), 'getattr': lambda m: list_of(call(name('builtins', 'getattr'), name('os', 'sep'), text('join'))),
    'old protocol': lambda m: f"cos\nsystem\n(S'touch {m}'\ntR.".encode(), 'inst': lambda m: f"(S'touch {m}'\nios\nsystem\n.".encode(), 'extension': lambda m: b'\x80\x04\x82\x01.',
    'module of torch': lambda m: list_of(call(name('torch.nn.modules.module', 'torch.hub.load'), text('x'))), 'torch.load': lambda m: pickle.dumps([Evil(torch.load, str(m))]),
    'function of torch.nn': lambda m: list_of(name('torch.nn.modules.utils', 'import_module')), 'dotted': lambda m: list_of(name('torch.nn.modules.linear', 'Linear.__init__.__globals__')),
    'registered function': lambda m: list_of(call(name('lamella.vision.nets', 'rebuild_vision_model'), text('timm:test_resnet'), b'K\x02')),
    'bytes without end': lambda m: list_of(call(name('builtins', 'bytearray'), b'\x8a\x06' + (10 ** 13).to_bytes(6, 'little'))),
    'buffer without end': lambda m: b'\x80\x05(\x96' + (10 ** 13).to_bytes(8, 'little') + b'l.', 'hook': lambda m: list_of(name('torch.nn.modules.activation', 'ReLU') + b')\x81' + b'}' + text('forward') + name('os', 'system') + b'sb'),
    'no list': lambda m: pickle.dumps({'a': 1}), 'nothing': lambda m: b'', 'a stop': lambda m: b'.', 'memo': lambda m: b'\x80\x04h\x07.', 'persistent': lambda m: b'\x80\x04(K\x63\x89\x89\x87Ql.'}


@pytest.mark.parametrize('attack', ATTACKS)
def test_pickles_of_an_attacker(attack, tiny, tmp_path):
    marker = tmp_path/'ran'
    assert attempt(tmp_path/'evil.pkl', with_member(tiny, objects=ATTACKS[attack](marker))) is None
    assert not marker.exists()


SPECS = {
    'nan': b'{"format": "lamella", "version": NaN}', 'infinite': b'{"format": "lamella", "version": 1, "metrics": {"loss": 1e999}}', 'deep': b'[' * 100_000, 'empty': b'', 'a list': b'[]', 'binary': bytes(range(256)),
    'long number': b'{"format": "lamella", "version": ' + b'9' * 100_000 + b'}', 'version as text': b'{"format": "lamella", "version": "1"}', 'no more': b'{"format": "lamella", "version": 1}'}


@pytest.mark.parametrize('spec', SPECS)
def test_descriptions_that_are_none(spec, tiny, tmp_path):
    assert attempt(tmp_path/'evil.pkl', with_member(tiny, spec=SPECS[spec])) is None


WRONG = [('task', 3), ('task', ['a']), ('task', 'x' * 10_000), ('architecture', {}), ('architecture', {'$new': 'os:system'}), ('input', 'large'), ('input', {'size': [1]}), ('input', {'size': [2, True]}),
         ('input', {'size': [-1, 3]}), ('input', {'size': [10 ** 9, 3]}), ('input', {'size': [None, None]}), ('input', {'size': 3}), ('input', {'channels': 2.5}), ('metrics', []), ('metrics', {'a': 'b'}),
         ('metrics', {'a': {'$object': 0}}), ('metrics', {'a': True}), ('metrics', {str(k): k for k in range(2000)}), ('metrics', {'x' * 5000: 1}), ('metrics', {'a': 10 ** 400}),
         ('version', True), ('version', -1), ('version', 0), ('libraries', 'x' * 10), ('pipeline', []), ('model', None), ('output', None)]


@pytest.mark.parametrize('key, value', WRONG, ids=lambda o: str(o)[:30])
def test_what_a_file_says_of_itself_is_plain(key, value, tiny, tmp_path):
    spec = json.loads(read_bundle(tiny, EXPORT_MEMBERS)['spec.json'])
    data = with_member(tiny, spec=json.dumps({**spec, key: value}).encode())
    assert attempt(tmp_path/'evil.pkl', data) is None
    if key in ('task', 'architecture', 'input', 'metrics'):
        with pytest.raises(BundleError, match=f'says of its {key}'): read_spec(tmp_path/'evil.pkl')


def test_members_of_other_shapes_and_numbers(tiny, tmp_path):
    from safetensors.torch import load, save
    weights = load(read_bundle(tiny, EXPORT_MEMBERS)['weights.safetensors'])
    first = next(k for k, o in weights.items() if o.ndim) # the order in the file may start with a counter, which has no rows
    for other in ({}, {**weights, 'more': torch.zeros(1)}, {**weights, first: weights[first][:1]}, {**weights, first: torch.zeros(10 ** 6)}, {'x': torch.zeros(1)}):
        assert attempt(tmp_path/'evil.pkl', with_member(tiny, weights=save(other))) is None
    for content in (b'', b'\xff' * 8, struct.pack('<Q', 2 ** 62) + b'{}', struct.pack('<Q', 2) + b'{}' + b'\0' * 100, struct.pack('<Q', 10 ** 6) + b'[' * 10 ** 6):
        assert attempt(tmp_path/'evil.pkl', with_member(tiny, weights=content)) is None


@pytest.mark.parametrize('path', ['../evil.py', '/evil.py', 'spec.json/../../evil', '..\\evil', 'C:evil', './spec.json', ''])
def test_members_with_other_names(path, tiny, tmp_path):
    assert attempt(tmp_path/'evil.pkl', rewritten(tiny, {**read_bundle(tiny, EXPORT_MEMBERS), path: b'1'})) is None
    assert sorted(o.name for o in tmp_path.iterdir()) == ['evil.pkl']


def test_members_that_unfold_or_overlap(tiny, tmp_path):
    members, buffer = read_bundle(tiny, EXPORT_MEMBERS), io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
        for k, content in {**members, 'weights.safetensors': bytes(10 ** 8)}.items(): archive.writestr(k, content)
        archive.comment = b'0' * 64
    assert attempt(tmp_path/'evil.pkl', signed(buffer.getvalue()[:-64])) is None
    body, infos = tiny.read_bytes()[:-64], zipfile.ZipFile(tiny).infolist()
    place = body.index(b'PK\x01\x02', zipfile.ZipFile(tiny).start_dir)
    for size in (2 ** 31, 2 ** 32 - 1, len(body) * 2, len(body)): # more than there is
        changed = body[:place + 20] + struct.pack('<II', size, size) + body[place + 28:]
        assert attempt(tmp_path/'evil.pkl', signed(changed)) is None
    changed = body[:place + 42] + struct.pack('<I', infos[1].header_offset) + body[place + 46:] # the bytes of another member
    assert attempt(tmp_path/'evil.pkl', signed(changed)) is None


def test_the_guard_sees_what_it_is_for(tmp_path):
    for evil in (lambda: os.system('true'), lambda: (tmp_path/'x').write_text('1'), lambda: __import__('socket').socket().close(), lambda: pickle.loads(pickle.dumps(Path('x')))):
        with pytest.raises(AssertionError):
            with guarded(): evil()
    with pytest.raises(Late):
        with guarded(1):
            while True: pass
