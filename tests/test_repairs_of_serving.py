"""Faults that a review of the server found: little that is sent makes much work, and lines on which nobody speaks make no work at all."""
import io
import json
import socket
import struct
import time
import zlib
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from PIL import Image

pytest.importorskip('fastapi')
from lamella.serve import serving
from lamella.serve.uploads import Limits, Refused, _decode_json, check_picture


def encoded(kind: str, mode: str = 'L', size=(40, 30), **kwargs) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 99).save(file, kind, **kwargs)
    return file.getvalue()


def with_scans(n: int, behind: bytes = b'') -> bytes:
    "A progressive JPEG whose last scan comes n times more"
    data = encoded('JPEG', progressive=True)
    assert data.endswith(b'\xff\xd9')
    last = data[data.rindex(b'\xff\xda'):-2]
    return data[:-2] + last * n + b'\xff\xd9' + behind


def tiff_of(pages: int) -> bytes:
    "All pages share their pixels: a hundred bytes each"
    pixels, side = zlib.compress(bytes(100)), 10
    start = 8 + len(pixels) + len(pixels) % 2
    out, size = bytearray(b'II*\0' + struct.pack('<I', start) + pixels.ljust(start - 8, b'\0')), 2 + 12 * 9 + 4
    for i in range(pages):
        tags = [(256, side), (257, side), (258, 8), (259, 8), (262, 1), (273, 8), (277, 1), (278, side), (279, len(pixels))]
        out += struct.pack('<H', 9) + b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags) + struct.pack('<I', start + size * (i + 1) if i < pages - 1 else 0)
    return bytes(out)


def status_of(data: bytes, max_pixels: int = 10 ** 6) -> tuple[int, str]:
    with pytest.raises(Refused) as found: check_picture(data, max_pixels)
    return found.value.status, found.value.message


def test_scans():
    "20 MB of scans kept a thread for hours, and a thread of each processor the server for ever"
    Image.open(io.BytesIO(with_scans(150))).load() # libjpeg does read it
    assert status_of(with_scans(150)) == (422, 'is a JPEG with more than 100 scans, which takes too long to read: send it as it was before somebody changed it')
    for good in (encoded('JPEG'), encoded('JPEG', 'RGB', progressive=True), encoded('JPEG', progressive=True, restart_marker_blocks=1), with_scans(3), with_scans(0, b'\xff\xda\0\x02' * 500)): check_picture(good, 10 ** 6)
    assert status_of(with_scans(150).replace(b'\xff\xda', b'\xff\x01\xff\xff\xff\xda'))[0] == 422, 'a marker without a length, and fill bytes'


def test_numbers_as_text():
    for kind in (b'P1', b'P2', b'P3'): assert 'as text' in status_of(kind + b' 4 4 255\n' + b'1 ' * 48)[1]
    check_picture(encoded('PPM'), 10 ** 6)


def test_pages():
    "Those behind the thousandth were not counted"
    check_picture(tiff_of(900), 10 ** 6)
    assert status_of(tiff_of(1100))[0] == status_of(tiff_of(900), 10_000)[0] == 413


def test_json_of_many_things():
    "19 MB of them were 500 MB, and others waited for seconds"
    for body in (b'{"a":[' + b'{},' * 20_000 + b'0]}', b'[' * 20_000, b'{' + b','.join(b'"%d":1' % i for i in range(20_000)) + b'}', ('[' * 20_000).encode('utf-16')):
        with pytest.raises(Refused, match='too many commas and brackets') as found: _decode_json(body, Limits())
        assert found.value.status == 400
    assert _decode_json(json.dumps({'images': ['data:image/png;base64,A A\n\tA\r\nA'] * 64, 'note': 'a, b'}).encode(), Limits())[63].data == bytes(3)
    with pytest.raises(Refused, match='no base64'): _decode_json(b'{"images": ["AAA\\u00a0A"]}', Limits())


class Fixed:
    "A model of one answer"
    def sample(self, data): return data
    def predict_samples(self, samples): return [self for _ in samples]
    def to_dict(self): return {'value': 1}


def line(url: str, data: bytes) -> socket.socket:
    made = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=20)
    made.sendall(data)
    return made


HEAD = b'GET /health HTTP/1.1\r\nHost: localhost\r\n'

def test_silent_lines_are_closed():
    "A thousand of them were all that the server could hold, and they stayed: before a request, in its head, and after the answer to another"
    with serving(Fixed(), timeout=1.) as url:
        lines = [line(url, o) for o in (b'', HEAD, HEAD + b'\r\n' + HEAD)]
        begun = time.monotonic()
        heard = [b''.join(iter(lambda: o.recv(9999), b'')) for o in lines] # ends when the line is closed
        assert [o.count(b'200 OK') for o in heard] == [0, 0, 1] and time.monotonic() - begun > 0.3
        with urlopen(f'{url}/health') as answer: assert answer.status == 200


def test_endless_heads():
    "All that came was kept"
    with serving(Fixed()) as url:
        with line(url, HEAD) as talk:
            with pytest.raises(OSError):
                for _ in range(2000): talk.sendall(b'a' * 10_000)
                raise AssertionError('20 MB of a head were taken')
        with urlopen(f'{url}/health') as answer: assert answer.status == 200


@pytest.mark.parametrize('device', [None, 'cpu'])
def test_a_learner_is_served_as_a_file_of_it_would_be(tmp_path, device):
    "With what is known of it, and the same answers"
    import httpx
    from conftest import make_photos
    from lamella.vision.all import ImageDataLoaders, Resize, vision_learner
    photos = make_photos(tmp_path/'photos', n=4)
    dls = ImageDataLoaders.from_folder(photos, valid_pct=0.25, seed=1, item_tfms=Resize(32), bs=2, num_workers=0, device='cpu')
    learn, file = vision_learner(dls, 'test_resnet', pretrained=False), photos/'cat'/'1.jpg'
    with serving(learn, device=device) as address:
        info = httpx.get(f'{address}/info', timeout=60).json()
        found = httpx.post(f'{address}/predict', files={'file': file.read_bytes()}, timeout=60).json()['predictions'][0]
    assert info['task'] == 'classification' and info['classes'] == ['cat', 'dog'] and info['parameters'] > 1000
    assert found['probabilities'] == pytest.approx(learn.predict(file).to_dict()['probabilities'], abs=1e-6)
