"""The server: what it answers, to whom it says no, and that nothing which clients do brings it down, makes it forget a request or fills its memory."""
import asyncio
import base64
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from conftest import make_photos
from lamella.export import load_learner
from lamella.serve import Batcher, create_app, serve, serving
from lamella.vision.all import CrossEntropyLossFlat, ImageDataLoaders, Learner, Resize

PAGE = Path(__file__).resolve().parents[1]/'lib'/'lamella'/'assets'/'serve.html'
SERVER = 'import json, sys, torch; torch.set_num_threads(1); from lamella.serve import serve; serve(sys.argv[1], port=0, log_level="warning", **json.loads(sys.argv[2]))'
HTTP = httpx.Client(timeout=60, verify=False, limits=httpx.Limits(max_keepalive_connections=0)) # a client for each request would read certificates for each
LIMITS = dict(max_bytes=300_000, max_pixels=200_000, max_files=8, max_batch=8)


# Pictures, good and bad

def picture(seed: int = 0, size=(60, 48), kind: str = 'JPEG') -> bytes:
    "A file in memory; each seed has its own colours"
    rng, file = np.random.default_rng(seed), io.BytesIO()
    pixels = rng.integers(0, 256, 3) * rng.random((size[1], size[0], 1))
    Image.fromarray(pixels.astype(np.uint8)).save(file, kind)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    "A PNG whose head promises that many pixels"
    def chunk(name, data): return len(data).to_bytes(4, 'big') + name + data + zlib.crc32(name + data).to_bytes(4, 'big')
    head = width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + bytes([8, 2, 0, 0, 0])
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(bytes(10 ** 6))) + chunk(b'IEND', b'')


def zip_of_numbers() -> bytes:
    "An array that unfolds to gigabytes, in a zip"
    import zipfile
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('a.npy', b'\x93NUMPY\x01\x00v\x00' + b"{'descr': '|u1', 'fortran_order': False, 'shape': (100000, 100000), }".ljust(117) + b'\n' + bytes(10 ** 6))
    return file.getvalue()


BAD = {
    'truncated.jpg': (picture()[:-300], 422, 'damaged'), 'head.jpg': (picture()[:40], 422, 'no picture'), 'text.jpg': (b'milk, bread\n' * 9, 422, 'no picture'),
    'empty.png': (b'', 422, 'empty'), 'bomb.png': (bomb(20_000, 20_000), 413, 'too many pixels'), 'large.png': (bomb(5000, 5000), 413, '25,000,000'),
    'post.eps': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n', 422, 'EPS'), 'numbers.npz': (zip_of_numbers(), 422, 'no picture'), 'page.svg': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 422, 'no picture')}


# A model, and servers

@pytest.fixture(scope='module')
def exported(tmp_path_factory) -> Path:
    "A tiny network"
    folder = tmp_path_factory.mktemp('serve')
    torch.manual_seed(3)
    dls = ImageDataLoaders.from_folder(make_photos(folder/'photos'), valid_pct=.25, seed=0, item_tfms=Resize(24), bs=4, num_workers=0, device='cpu')
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    Learner(dls, net, loss_func=CrossEntropyLossFlat(), path=folder).export(folder/'model.pkl')
    return folder/'model.pkl'


@pytest.fixture(scope='module')
def predictor(exported): return load_learner(exported)


@contextmanager
def process(model: Path, **limits):
    "A server of its own: its address, and the process"
    command = [sys.executable, '-c', SERVER, str(model), json.dumps(limits)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'MALLOC_ARENA_MAX': '2'})
    try:
        line = child.stdout.readline()
        assert line, child.stderr.read()
        yield re.search(r'http://[\d.:]+', line).group(), child
    finally:
        child.kill()
        child.communicate()


@pytest.fixture(scope='module')
def server(exported):
    with process(exported, **LIMITS) as found: yield found


@pytest.fixture
def url(server): return server[0]


@pytest.fixture
def client(predictor): return TestClient(create_app(predictor, **LIMITS))


def post(url: str, *files, **kwargs) -> httpx.Response:
    "Send (name, bytes) as a form"
    return HTTP.post(f'{url}/predict', files=[('file', o) for o in files], **kwargs)


def same(found: dict, predictor, data: bytes) -> bool:
    "What the predictor says of the same bytes; sums of a batch may differ in the last bit"
    expected = predictor.predict(data).to_dict()
    found = {name: value for name, value in found.items() if name != 'file'}
    return found.keys() == expected.keys() and found['label'] == expected['label'] and found['probabilities'] == pytest.approx(expected['probabilities'], abs=1e-6)


def is_alive(url: str, predictor) -> bool:
    "It answers as ever, and nobody waits"
    wait_until(lambda: HTTP.get(f'{url}/health').json() == {'status': 'ok', 'waiting': 0})
    return same(post(url, ('a.jpg', picture(1))).json()['predictions'][0], predictor, picture(1))


def wait_until(true) -> None:
    "Fail if that does not come to pass"
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.02)


class Slow:
    "A stand-in for a model, which answers when it is allowed to"
    def __init__(self): self.go, self.calls = threading.Event(), []
    def sample(self, data): return data
    def predict_samples(self, samples):
        self.go.wait(30)
        self.calls.append(len(samples))
        return [Answer(value=len(o)) for o in samples]


class Answer(dict):
    "A prediction"
    to_dict = dict.copy


# Answers

def test_every_kind_of_request(url, predictor):
    pictures = [picture(i, kind=kind) for i, kind in enumerate(('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF'))]
    texts = [base64.b64encode(o).decode() for o in pictures]
    answers = [post(url, *[(f'{i}.x', o) for i, o in enumerate(pictures)]), HTTP.post(f'{url}/predict', json={'images': texts}),
        HTTP.post(f'{url}/predict', json={'images': [f'data:image/png;base64,{o}' for o in texts]}), HTTP.post(f'{url}/predict', files=[(f'photo{i}', (f'{i}.x', o)) for i, o in enumerate(pictures)])]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert all(same(found, predictor, data) for found, data in zip(answer.json()['predictions'], pictures, strict=True))
    assert [o['file'] for o in answers[0].json()['predictions']] == [f'{i}.x' for i in range(6)]
    for kind in ('image/jpeg', 'application/octet-stream', 'IMAGE/PNG; x=y'):
        answer = HTTP.post(f'{url}/predict', content=pictures[0], headers={'Content-Type': kind})
        assert same(answer.json()['predictions'][0], predictor, pictures[0])


@pytest.mark.parametrize('name', BAD)
def test_bad_picture(url, name):
    "Alone it is an error, in words that name it; among good ones it is their neighbour"
    data, status, words = BAD[name]
    alone = post(url, (name, data))
    assert alone.status_code == status and alone.json()['detail'].startswith(f'{name}: ') and words in alone.json()['detail'], alone.text
    assert 'Traceback' not in alone.text and '/lamella/' not in alone.text
    mixed = post(url, ('a.jpg', picture(1)), (name, data), ('b.jpg', picture(2)))
    first, bad, last = mixed.json()['predictions']
    assert mixed.status_code == 200 and words in bad['error'] and {'file', 'error'} == bad.keys() and 'label' in first and 'label' in last


def request(kind: str, content: bytes, **headers) -> dict: return dict(content=content, headers={'Content-Type': kind, **headers})
def form(*parts: bytes, end: bytes = b'--B--\r\n') -> dict:
    return request('multipart/form-data; boundary=B', b''.join(b'--B\r\nContent-Disposition: form-data; name="file"' + o + b'\r\n' for o in parts) + end)


WRONG = [
    (request('text/plain', b'x'), 415, "'text/plain' is not accepted"), (dict(content=b'x'), 415, 'send multipart/form-data'), (request('application/x-www-form-urlencoded', b'a=b'), 415, 'not accepted'),
    (request('image/png', picture(), **{'Content-Encoding': 'gzip'}), 415, 'gzip'),
    (request('application/json', b'{"images": ['), 400, 'no JSON'), (request('application/json', b'[' * 90_000), 400, 'no JSON'), (request('application/json', b'{"images": [' + b'9' * 9000 + b']}'), 400, 'no JSON'), (request('application/json', b'\xff\xfe'), 400, 'no JSON'),
    (request('application/json', b'{"image": "a"}'), 422, '{"images":'), (request('application/json', b'[1]'), 422, '{"images":'), (request('application/json', b'{"images": [1]}'), 422, '{"images":'),
    (request('application/json', b'{"images": ["a*b"]}'), 422, 'images[0] is no base64'), (request('application/json', '{"images": ["é"]}'.encode()), 422, 'no base64'), (request('application/json', b'{"images": ["data:text/plain,x"]}'), 422, 'not in base64'),
    (request('application/json', b'{"images": []}'), 422, 'no picture'), (dict(json={'images': ['AAAA'] * 9}), 413, '9 pictures'),
    (request('image/png', b''), 422, 'empty'), (request('image/png', bytes(300_001)), 413, '300,000 bytes'),
    (form(), 422, 'no picture'), (form(*[b'; filename="a"\r\n\r\nx'] * 9), 413, 'more than 8 files'), (form(b'; filename="a"\r\n\r\nx', end=b''), 400, 'last boundary'),
    (form(b'; filename="a"\r\n\r\nx', end=b'--B\r\nContent-Dis'), 400, 'last boundary'), (form(b'\r\n\r\na.jpg'), 422, 'is text and no file'), (request('multipart/form-data; boundary=B', b'rubbish'), 400, 'form'),
    (request('multipart/form-data', b'--B--'), 400, 'boundary'), (request('image/png', picture(), **{'Sec-Fetch-Site': 'cross-site'}), 403, 'other sites')]


@pytest.mark.parametrize('kwargs,status,words', WRONG, ids=range(len(WRONG)))
def test_wrong_request(client, kwargs, status, words):
    answer = client.post('/predict', **kwargs)
    assert (answer.status_code, words in answer.json()['detail']) == (status, True), answer.text
    assert str(status) in client.get('/openapi.json').json()['paths']['/predict']['post']['responses']


def test_other_addresses(client):
    assert [client.get(o).status_code for o in ('/', '/docs', '/health', '/info', '/openapi.json', '/nothing', '/predict', '/../secret')] == [200, 200, 200, 200, 200, 404, 405, 404]
    info = client.get('/info').json()
    assert info['task'] == 'classification' and info['classes'] == ['cat', 'dog'] and info['limits']['max_pixels'] == 200_000


def test_description_has_examples(client):
    spec = client.get('/openapi.json').json()
    for methods in spec['paths'].values():
        for operation in methods.values(): assert all('example' in o['content']['application/json'] for o in operation['responses'].values())
    docs = client.get('/docs').text.partition('<script')[0]
    assert all(f'{path}' in docs for path in spec['paths']) and 'Retry-After' in docs and 'http' not in docs.partition('<body')[2]


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(['image/png', 'application/json', 'multipart/form-data; boundary=B', 'multipart/form-data; boundary=', 'multipart/form-data; boundary="B', 'text/html', '']),
       body=st.one_of(st.binary(max_size=300), st.lists(st.sampled_from([b'--B', b'--B--', b'\r\n', b'Content-Disposition: form-data; name="file"; filename="a"', b'\r\n\r\n', b'{"images":', b'["', b'"]}', b'AAAA', b'name=', b'\0', b'\xff', b'null'])).map(b''.join)))
def test_rubbish_is_refused(predictor, kind, body):
    "Whatever comes: an answer in JSON, and never an error of the server"
    answer = TestClient(create_app(predictor)).post('/predict', content=body, headers={'Content-Type': kind})
    assert answer.status_code in (400, 413, 415, 422) and answer.json()['detail'], (answer.status_code, answer.text)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 10 ** 6), byte=st.integers(0, 255), kind=st.sampled_from(['JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF']))
def test_changed_bytes(predictor, at, byte, kind):
    "A picture with a wrong byte is predicted or refused"
    data = bytearray(picture(kind=kind))
    data[at % len(data)] = byte
    answer = TestClient(create_app(predictor, max_pixels=10 ** 6)).post('/predict', content=bytes(data), headers={'Content-Type': 'image/png'})
    assert answer.status_code in (200, 413, 422), answer.text


def test_other_tasks(tmp_path):
    "What `to_dict` says of a mask arrives"
    from lamella.vision.all import DataBlock, ImageBlock, MaskBlock, RandomSplitter
    images = [tmp_path/f'{i}.png' for i in range(6)]
    for i, file in enumerate(images): file.write_bytes(picture(i, kind='PNG'))
    block = DataBlock(blocks=(ImageBlock, MaskBlock(codes=['sky', 'sea'])), get_items=lambda _: images, get_y=lambda o: np.zeros((48, 60), dtype=np.uint8), splitter=RandomSplitter(.3, seed=0))
    learn = Learner(block.dataloaders(tmp_path, bs=2, num_workers=0, device='cpu'), nn.Conv2d(3, 2, 1), loss_func=CrossEntropyLossFlat(axis=1), path=tmp_path)
    learn.export(tmp_path/'mask.pkl')
    predictor = load_learner(tmp_path/'mask.pkl')
    found, = TestClient(create_app(predictor)).post('/predict', content=picture(1), headers={'Content-Type': 'image/jpeg'}).json()['predictions']
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(found['mask']))))
    assert found['size'] == [48, 60] and np.array_equal(mask, np.asarray(predictor.predict(picture(1))[1]))


def test_pictures_of_different_sizes(tmp_path):
    "A model that takes any size: what does not fit into one batch is predicted one by one"
    class Any(Slow):
        def predict_samples(self, samples): return [Answer(value=float(o.sum())) for o in torch.stack(samples)]
        def sample(self, data): return torch.from_numpy(np.asarray(Image.open(io.BytesIO(data)), dtype=np.float64))
    data = [picture(i, size=(20 + i, 30)) for i in range(4)]
    answer = TestClient(create_app(Any())).post('/predict', files=[('file', ('a', o)) for o in data])
    assert [o['value'] for o in answer.json()['predictions']] == [float(Any().sample(o).sum()) for o in data]


def test_no_nan_in_json():
    class Lost(Slow):
        def predict_samples(self, samples): return [Answer(value=[float('nan'), 1.], probabilities={'a': float('inf')})]
    answer = TestClient(create_app(Lost())).post('/predict', content=picture(), headers={'Content-Type': 'image/jpeg'})
    found, = json.loads(answer.text, parse_constant=lambda o: pytest.fail(o))['predictions']
    assert found == {'file': 'image', 'value': [None, 1.], 'probabilities': {'a': None}}


def test_own_errors_are_logged(caplog):
    "The client gets an id, the log has the rest; the others in the batch are answered"
    class Broken(Slow):
        def predict_samples(self, samples):
            if any(len(o) > 2000 for o in samples): raise RuntimeError('the secret')
            return super().predict_samples(samples)
    broken = Broken(); broken.go.set()
    small, large = picture(kind='PNG', size=(9, 9)), picture(kind='BMP')
    answer = TestClient(create_app(broken)).post('/predict', files=[('file', ('a', o)) for o in (small, large, small)])
    number = re.search(r'under the id (\w+)', answer.json()['predictions'][1]['error']).group(1)
    assert [o.get('value') for o in answer.json()['predictions']] == [len(small), None, len(small)] and 'secret' not in answer.text
    assert f'{number}: the secret' in caplog.text and 'Traceback' in caplog.text
    assert TestClient(create_app(broken)).post('/predict', content=large, headers={'Content-Type': 'image/bmp'}).status_code == 500


# To whom it speaks

def test_only_for_this_machine(url):
    "A name that leads here is not enough"
    assert [HTTP.get(f'{url}/health', headers={'Host': o}).status_code for o in ('localhost', '127.0.0.1:99', '[::1]:8000', 'evil.example', '')] == [200, 200, 200, 400, 400]
    answer = HTTP.options(f'{url}/predict', headers={'Origin': 'http://evil.example', 'Access-Control-Request-Method': 'POST'})
    assert not any(name.startswith('access-control') for name in answer.headers)


def test_missing_package(predictor, monkeypatch):
    monkeypatch.setitem(sys.modules, 'fastapi', None)
    with pytest.raises(ImportError, match=r"pip install 'lamella\[serve\]'"): create_app(predictor)


def test_warning_for_strangers(predictor, capsys, monkeypatch):
    monkeypatch.setattr('uvicorn.Server.run', lambda self, sockets: None)
    serve(predictor, host='0.0.0.0', port=0)
    assert 'no authentication' in capsys.readouterr().err
    serve(predictor, port=0)
    out = capsys.readouterr()
    assert out.err == '' and 'http://127.0.0.1:' in out.out


# Many at a time

def test_no_request_is_lost(url, predictor):
    "32 clients at once, each with its own pictures, some of them bad: everyone gets what belongs to it"
    bad = list(BAD.items())
    def work(k: int) -> list[bool]:
        rng, found = random.Random(k), []
        for i in range(6):
            data, (name, (rotten, _, words)) = [picture(rng.randrange(10 ** 6)) for _ in range(rng.randint(1, 3))], rng.choice(bad)
            files = [(f'{j}', o) for j, o in enumerate(data)] + [(name, rotten)]
            while (response := post(url, *files)).status_code == 503: time.sleep(.05) # too much to do: the server said so
            answer = response.json()['predictions']
            found += [words in answer[-1]['error'], len(answer) == len(data) + 1, *[same(o, predictor, d) for o, d in zip(answer, data)]]
        return found
    torch.set_num_threads(1)
    with ThreadPoolExecutor(32) as pool: results = list(pool.map(work, range(32)))
    assert len(results) == 32 and all(map(all, results))
    assert is_alive(url, predictor)


def test_requests_share_batches():
    "While the model is busy, others gather"
    slow = Slow()
    with serving(slow, max_batch=8) as url, ThreadPoolExecutor(17) as pool:
        answers = [pool.submit(post, url, ('a', picture(i))) for i in range(17)]
        wait_until(lambda: HTTP.get(f'{url}/health').json()['waiting'] == 17)
        slow.go.set()
        assert [o.result().json()['predictions'][0]['value'] for o in answers] == [len(picture(i)) for i in range(17)]
    assert sum(slow.calls) == 17 and max(slow.calls) == 8


def raw(url: str, data: bytes) -> socket.socket:
    "Send that, and keep the line open"
    parts = urlsplit(url)
    line = socket.create_connection((parts.hostname, parts.port), timeout=30)
    line.sendall(data)
    return line


def head(length: int, kind: str = 'image/jpeg') -> bytes: return f'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n'.encode()


def hang_up(url: str, rng: random.Random) -> None:
    "Somewhere on the way: in the head, in the body, or when all is sent"
    data = picture(rng.randrange(99))
    message = head(len(data)) + data
    raw(url, message[:rng.choice([10, 90, len(message) // 2, len(message)])]).close()


def test_clients_that_hang_up(url, predictor):
    rng = random.Random(0)
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda _: hang_up(url, rng), range(120)))
    assert is_alive(url, predictor)


def test_hanging_up_frees_the_place():
    "Of clients that do not wait any more nothing is left, even while the model is busy"
    slow = Slow()
    with serving(slow, max_batch=1, max_files=1) as url, ThreadPoolExecutor(1) as pool: # 8 places
        lines = [raw(url, head(len(picture())) + picture()) for _ in range(8)]
        wait_until(lambda: HTTP.get(f'{url}/health').json()['waiting'] == 8)
        assert post(url, ('a', picture())).status_code == 503
        for line in lines[2:]: line.close()
        wait_until(lambda: HTTP.get(f'{url}/health').json()['waiting'] == 2)
        answer = pool.submit(post, url, ('a', picture(5)))
        wait_until(lambda: HTTP.get(f'{url}/health').json()['waiting'] == 3)
        slow.go.set()
        assert answer.result().json()['predictions'][0]['value'] == len(picture(5))
        assert all(b'200 OK' in line.recv(9999) for line in lines[:2])
    assert sum(slow.calls) == 3, 'something was computed for nobody'


def test_overload_and_timeout():
    "Too much to do is an answer, at once; too late is one, too; and both pass"
    slow = Slow()
    with serving(slow, max_batch=1, max_files=1, timeout=2.) as url, ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(post, url, ('a', picture(i))) for i in range(8)]
        wait_until(lambda: HTTP.get(f'{url}/health').json()['waiting'] == 8)
        refused = post(url, ('a', picture()))
        assert (refused.status_code, refused.headers['Retry-After']) == (503, '1') and 'there is room for 8' in refused.json()['detail']
        late = [o.result() for o in waiting]
        assert {(o.status_code, o.headers['Retry-After'], o.json()['detail']) for o in late} == {(503, '5', 'no answer within 2 seconds')}
        slow.go.set()
        wait_until(lambda: HTTP.get(f'{url}/health').json()['waiting'] == 0)
        assert post(url, ('a', picture())).status_code == 200


def test_slow_senders():
    "They are told, and meanwhile others are answered"
    slow = Slow(); slow.go.set()
    with serving(slow, timeout=1.) as url:
        lines = [raw(url, head(10 ** 4) + bytes(100)) for _ in range(20)]
        for _ in range(5): assert post(url, ('a', picture())).status_code == 200
        assert all(b'408 Request Timeout' in b''.join(iter(lambda: line.recv(9999), b'')) for line in lines), 'and the line is closed'


def test_too_much_at_once():
    "The bytes of all requests together have a limit, and what is given back can be used again"
    slow = Slow(); slow.go.set()
    with serving(slow, max_bytes=50_000, timeout=20.) as url: # room for 800,000 bytes
        lines = [raw(url, head(50_000) + bytes(49_990)) for _ in range(16)]
        wait_until(lambda: post(url, ('a', picture())).status_code == 503)
        for line in lines[:8]: line.close()
        wait_until(lambda: post(url, ('a', picture())).status_code == 200)
        for line in lines: line.close()


@pytest.mark.parametrize('chunked', [True, False])
def test_endless_bodies(url, predictor, chunked):
    "They are cut off when they are over the limit, whether they say their length or not; the server does not keep them"
    parts = (bytes(10_000) for _ in range(60))
    try: answer = HTTP.post(f'{url}/predict', content=parts if chunked else b''.join(parts), headers={'Content-Type': 'image/jpeg'})
    except httpx.TransportError: answer = None # it may also close the line
    assert answer is None or answer.status_code == 413 and '300,000' in answer.json()['detail']
    assert is_alive(url, predictor)


def test_what_was_accepted_is_finished():
    "The server ends; who waits gets an answer, and no thread is left"
    slow, before = Slow(), set(threading.enumerate())
    with ThreadPoolExecutor(5) as pool:
        with serving(slow) as url:
            answers = [pool.submit(post, url, ('a', picture(i))) for i in range(5)]
            wait_until(lambda: HTTP.get(f'{url}/health').json()['waiting'] == 5)
            threading.Timer(.3, slow.go.set).start()
        assert [o.result().json()['predictions'][0]['value'] for o in answers] == [len(picture(i)) for i in range(5)]
    with pytest.raises(httpx.ConnectError): HTTP.get(f'{url}/health')
    wait_until(lambda: not [o for o in set(threading.enumerate()) - before if o.name.startswith('lamella')])


def test_end_by_signal(exported):
    "Ctrl-C, and the same from a supervisor"
    with process(exported) as (url, child):
        assert post(url, ('a', picture())).status_code == 200
        child.send_signal(signal.SIGTERM if sys.platform != 'win32' else signal.CTRL_BREAK_EVENT)
        assert child.wait(30) in (0, -signal.SIGTERM, 130, 143) and 'Traceback' not in child.stderr.read()


# Nothing is left

def test_memory_and_threads_stay(server, predictor):
    "Several hundred requests of all kinds: as much memory, as many threads and open files as after the first hundreds"
    url, child = server
    watched, rng = psutil.Process(child.pid), random.Random(1)
    files = {name: data for name, (data, _, _) in BAD.items()}
    def work(k: int) -> None:
        if k % 4 == 0: return hang_up(url, rng)
        name = rng.choice(list(files))
        post(url, *[(f'{i}', picture(rng.randrange(99), size=(400, 300))) for i in range(rng.randint(0, 4))], (name, files[name]))
    def rounds(n: int) -> tuple[int, int, int]:
        with ThreadPoolExecutor(8) as pool: list(pool.map(work, range(n)))
        assert is_alive(url, predictor)
        wait_until(lambda: len(watched.net_connections()) <= 2)
        return watched.memory_info().rss, watched.num_threads(), watched.num_fds() if hasattr(watched, 'num_fds') else 0
    before, after = rounds(200), rounds(400)
    assert after[0] - before[0] < 25 * 2 ** 20, f'{(after[0] - before[0]) / 2 ** 20:.0f} MB more' # 25 MB are 60 KB a request; those pictures have 360 KB each
    assert after[1] <= before[1] + 1 and after[2] <= before[2] + 2, (before, after)


def test_no_task_is_left():
    "Of a batcher that was loaded, left alone, and closed"
    async def client(batcher: Batcher, k: int) -> None:
        for i in range(30):
            task = asyncio.ensure_future(batcher.predict([k, i]))
            if (k + i) % 3 == 0:
                await asyncio.sleep((k + i) % 4 / 1000)
                task.cancel()
            else: assert await task == [k + 1, i + 1]
    async def main() -> None:
        batcher = Batcher(int, lambda samples: [o + 1 for o in samples], max_batch=7, max_waiting=64)
        await asyncio.gather(*[client(batcher, k) for k in range(16)])
        await asyncio.sleep(.05)
        assert (len(asyncio.all_tasks()), batcher.waiting, len(batcher._ready)) == (1, 0, 0)
        await batcher.close()
    before = threading.active_count()
    asyncio.run(main())
    assert threading.active_count() <= before


def test_cancelled_before_it_began():
    "A request that ends before its first step has a place to give back, too"
    async def main() -> None:
        batcher = Batcher(int, list, max_waiting=2)
        for _ in range(5):
            task = asyncio.ensure_future(batcher.predict([1, 2]))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(0.02)
        assert batcher.waiting == 0 and await batcher.predict([1, 2]) == [1, 2]
        await batcher.close()
    asyncio.run(main())


@settings(max_examples=40, deadline=None)
@given(requests=st.lists(st.tuples(st.lists(st.integers(-3, 20), max_size=6), st.integers(0, 3), st.booleans()), max_size=12), max_batch=st.integers(1, 5), max_wait=st.sampled_from([0., .001, .01]))
def test_answers_belong_to_their_questions(requests, max_batch, max_wait):
    "Whatever is asked, cancelled, not decodable (negative) or spoils its batch (divisible by seven)"
    def decode(x): return {True: lambda: 1 // 0, False: lambda: x}[x < 0]()
    def forward(samples): return [1 // (o % 7 or 1 // 0) * 0 + o for o in samples]
    def expected(x): return x if x >= 0 and x % 7 else ZeroDivisionError
    async def ask(batcher, items, milliseconds, cancelled):
        await asyncio.sleep(milliseconds / 1000)
        task = asyncio.ensure_future(batcher.predict(items))
        if cancelled:
            await asyncio.sleep(0)
            return task.cancel()
        assert [type(o) if isinstance(o, Exception) else o for o in await task] == [expected(o) for o in items]
    async def main():
        batcher = Batcher(decode, forward, max_batch=max_batch, max_wait=max_wait)
        await asyncio.gather(*[ask(batcher, *o) for o in requests])
        await batcher.close()
        assert not requests or max(batcher.sizes, default=0) <= max_batch
    asyncio.run(main())


# The page for people

def script() -> str: return PAGE.read_text(encoding='utf-8').partition('<script>')[2].rpartition('</script>')[0]


def test_page_needs_nothing_from_elsewhere(client):
    page = client.get('/')
    assert not re.search(r'(https?:)?//\w+\.\w+|@import|innerHTML|eval\(', page.text.replace('//www.w3.org', ''))
    assert "default-src 'none'" in page.headers['Content-Security-Policy'] and re.search(r'<label id="drop" for="file"', page.text)
    assert set(re.findall(r"getElementById\('(\w+)'\)", page.text)) <= set(re.findall(r'id="(\w+)"', page.text))


CHECKS = '''
const same = (a, b) => { if (JSON.stringify(a) !== JSON.stringify(b)) throw new Error(JSON.stringify(a) + ' is not ' + JSON.stringify(b)); };
same(headline({ label: 'dog', probability: 0.753 }), 'dog 75.3 %');
same(headline({ labels: [] }), 'none of the labels');
same(headline({ labels: ['a', 'b'], probabilities: {} }), 'a, b');
same(headline({ value: [1.23456, 2] }), '1.235, 2');
same(headline({ value: null }), '?');
same(headline({ targets: [{ label: 'x', probability: 0.5 }, { value: 3 }] }), 'x 50.0 % · 3');
same(headline({ error: 'is damaged' }), 'is damaged');
same(headline({ boxes: [{}] }), '1 box');
same(bars({ probabilities: { a: 0.1, b: 0.9 } }).map(o => o[0]), ['b', 'a']);
same(bars({ mask: 'x', classes: { sky: 0.5 } }), [['sky', 0.5, null]]);
same(parts({ targets: [{ value: 1 }, { targets: [{ value: 2 }] }] }), [{ value: 1 }, { value: 2 }]);
same(covers([48, 60], 600, 480), true);
same(covers([48, 48], 600, 480), false);
const [out, seen] = painted([0, 0, 0, 255, 3, 3, 3, 255], 140, true);
same([out[3], out[7], [...out.slice(4, 7)], seen], [0, 140, color(3), [0, 3]]);
same(new Set(Array.from({ length: 40 }, (_, i) => css(color(i)))).size, 40);
same(groups([{ size: 5 }, { size: 5 }, { size: 1 }], { max_files: 8, max_bytes: 10 }).map(o => o.length), [1, 2]);
same(groups(Array(9).fill({ size: 0 }), { max_files: 64, max_bytes: 10 }).map(o => o.length), [8, 1]);
same(about({ task: 'classification', classes: ['a'], metrics: { accuracy: 0.98765 }, architecture: 'resnet18' }), 'classification · resnet18 · 1 class · accuracy 0.9877');
'''


@pytest.mark.skipif(shutil.which('node') is None, reason='node is not installed')
def test_script_of_the_page(tmp_path):
    "Its syntax, and the functions that need no browser"
    (tmp_path/'page.js').write_text(script() + CHECKS, encoding='utf-8')
    done = subprocess.run(['node', 'page.js'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BROWSER = """
// As much of a browser as the page needs: what is drawn and what goes wrong is written down.
const drawn = [], wrong = [];
const context = new Proxy({}, { get: (o, name) => name in o ? o[name] : (...args) => { drawn.push(name); return name === 'measureText' ? { width: 9 } : name === 'getImageData' ? { data: new Uint8ClampedArray(4 * args[2] * args[3]) } : undefined; } });
class Element {
  constructor(name) { Object.assign(this, { name, children: [], style: {}, own: '', listeners: {}, classList: { toggle() {} } }); }
  get textContent() { return this.own + this.children.map(o => o.textContent).join(' '); }
  set textContent(text) { this.own = text; this.children = []; }
  append(...made) { this.children.push(...made); }
  prepend(...made) { this.children.unshift(...made); }
  insertBefore(made, place) { this.children.splice(this.children.indexOf(place), 0, made); }
  querySelector(name) { return this.children.find(o => o.name === name); }
  setAttribute() {}
  getContext() { return context; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
}
const elements = {}, listeners = {};
globalThis.document = { createElement: name => new Element(name), getElementById: id => elements[id] ??= new Element(id) };
globalThis.addEventListener = (name, listener) => { listeners[name] = listener; };
globalThis.createImageBitmap = async o => { if (o.name === 'no.txt') throw new Error('no picture'); return { width: 60, height: 48 }; };
console.error = error => wrong.push(String(error));
const ANSWERS = { 'a.jpg': { label: '<b>dog</b>', probability: 0.5, probabilities: { '<b>dog</b>': 0.5, cat: 0.5 } }, 'b.jpg': { boxes: [{ label: 'car', score: 0.9, box: [1, 2, 30, 40] }] },
  'c.jpg': { points: [[1, 2], [3, 4]] }, 'd.jpg': { size: [48, 60], classes: { sky: 0.75, sea: 0.25 }, mask: 'AAAA' }, 'e.jpg': { targets: [{ value: 3.5 }, { labels: ['wet'], probabilities: { wet: 0.9 } }] }, 'no.txt': { error: 'is no picture' },
  'f.jpg': { size: [48, 48], classes: { sky: 1 }, mask: 'AAAA' } };
globalThis.fetch = async (address, options) => {
  if (!['info', 'predict'].includes(address)) throw new TypeError(`the policy of the page forbids to fetch ${address}`); // connect-src 'self'
  return { status: 200, json: async () => address === 'info' ? { task: 'any', classes: ['sea', 'sky'], limits: { max_files: 3, max_bytes: 1000 } } : { predictions: options.body.getAll('file').map(o => ({ file: o.name, ...ANSWERS[o.name] })) } };
};
"""
DROP = """
(async () => {
  const files = Object.keys(ANSWERS).map(name => new File(['xxxx'], name));
  while (!listeners.drop) await new Promise(done => setTimeout(done, 1));
  listeners.drop({ preventDefault() {}, dataTransfer: { files } });
  while (elements.status.textContent !== `${files.length} of ${files.length} done`) await new Promise(done => setTimeout(done, 1));
  console.log(JSON.stringify({ wrong, drawn, said: elements.answers.children.map(o => o.textContent), about: elements.about.textContent, shown: elements.answers.children.map(o => o.children[0].children.map(o => o.name)) }));
})();
"""


@pytest.mark.skipif(shutil.which('node') is None, reason='node is not installed')
def test_dropped_files_are_shown(tmp_path):
    "All tasks, in an imitation of a browser: nothing fails, and each answer is beside its picture"
    (tmp_path/'page.js').write_text(BROWSER + script() + DROP, encoding='utf-8')
    done = subprocess.run(['node', 'page.js'], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found['wrong'] == [] and {'strokeRect', 'fillText', 'arc', 'putImageData', 'drawImage'} <= set(found['drawn'])
    mask_alone, error, several, mask, points, boxes, dog = found['said']
    assert '<b>dog</b> 50.0 %' in dog and '1 box' in boxes and '1 car' in boxes and '2 points' in points and 'sky 75.0 %' in re.sub(' +', ' ', mask) and '3.5 · wet' in several and 'is no picture' in error
    assert [o.count('canvas') for o in found['shown']] == [2, 0, 1, 1, 1, 1, 1] and found['about'] == 'any · 2 classes'
