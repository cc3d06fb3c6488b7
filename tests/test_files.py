"""Image files before there is a data set: fetched from a server that misbehaves, checked, made smaller; nothing of the user's is lost."""
import io
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from fastcore.foundation import L
from PIL import Image

from lamella.data.sources import get_image_files
from lamella.vision import downloads as module
from lamella.vision.downloads import download_images
from lamella.vision.files import resize_image, resize_images, verify_image, verify_images


def photo(size=(320, 240), mode='RGB') -> Image.Image:
    "A smooth picture, so that JPEG keeps it"
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8)).convert(mode)

def encoded(kind='png', size=(40, 30), **kwargs) -> bytes:
    buffer = io.BytesIO()
    photo(size).save(buffer, kind, **kwargs)
    return buffer.getvalue()

def names(folder: Path) -> list[str]: return sorted(o.relative_to(folder).as_posix() for o in folder.rglob('*') if o.is_file())


# Checking

@pytest.mark.parametrize('kwargs', [dict(kind='jpeg'), dict(kind='jpeg', progressive=True), dict(kind='png'), dict(kind='webp', lossless=True)])
def test_every_truncation_is_found(tmp_path: Path, kwargs: dict):
    whole = encoded(size=(200, 160), **kwargs)
    for missing in (0, 60, 200, len(whole)//2, len(whole) - 30):
        (tmp_path/f'{missing}.x').write_bytes(whole[:len(whole) - missing])
        assert verify_image(tmp_path/f'{missing}.x') == (missing == 0), missing


def test_reasons(tmp_path: Path, monkeypatch):
    (tmp_path/'empty.jpg').touch()
    (tmp_path/'folder.jpg').mkdir()
    (tmp_path/'page.jpg').write_text('  <!DOCTYPE HTML><p>not found')
    (tmp_path/'drawing.png').write_text('<?xml version="1.0"?><svg></svg>')
    (tmp_path/'cut.jpg').write_bytes(encoded('jpeg', (80, 80))[:-300])
    (tmp_path/'bomb.png').write_bytes(encoded(size=(100, 100)))
    wanted = {'empty.jpg': 'an empty file', 'folder.jpg': 'a folder', 'page.jpg': 'HTML page', 'drawing.png': 'SVG', 'cut.jpg': 'truncated',
              'bomb.png': 'too large', 'missing.jpg': 'no such file'}
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 4000)
    failed = verify_images([str(tmp_path/o) for o in wanted])
    found = dict(zip([o.name for o in failed], failed.reasons))
    assert found.keys() == wanted.keys() and all(wanted[o] in found[o] for o in wanted), found


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root reads everything')
def test_permission(tmp_path: Path):
    (tmp_path/'x.png').write_bytes(encoded())
    (tmp_path/'x.png').chmod(0)
    assert verify_images([tmp_path/'x.png']).reasons == ['not readable: permission denied']


def test_permissionin_words():
    from lamella.vision.files import in_words
    assert in_words(PermissionError(13, 'Permission denied'), Path('x')) == 'not readable: permission denied'


def test_failed_is_a_list_and_a_table(tmp_path: Path):
    for name in ('b.png', 'a.png'): (tmp_path/name).write_text('x')
    failed = verify_images([tmp_path/'b.png', tmp_path/'a.png'])
    assert isinstance(failed, L) and failed == [tmp_path/'b.png', tmp_path/'a.png']
    assert 'no image that PIL can read' in repr(failed) and '<table' in failed._repr_html_()
    assert failed.table.shape == (2, 2)
    assert type(failed.filter(lambda o: o.name == 'a.png')) is L and failed[0].name == 'b.png'
    assert len(list(tmp_path.iterdir())) == 2 # nothing is deleted
    failed.map(Path.unlink)
    assert list(tmp_path.iterdir()) == []


def test_order_does_not_depend_on_threads(tmp_path: Path):
    for i in range(20): (tmp_path/f'{i:02}.png').write_bytes(encoded()[:None if i % 3 else 50])
    files = get_image_files(tmp_path)
    assert verify_images(files, max_workers=0) == verify_images(files, max_workers=5)
    assert len(verify_images(files)) == 7


# Resizing

def test_sizes_and_folders(tmp_path: Path):
    for name, size in {'a.jpg': (320, 240), 'x/b.png': (30, 300), 'x/y/c.png': (20, 10), 'thin.png': (1000, 1)}.items():
        (tmp_path/'in'/name).parent.mkdir(parents=True, exist_ok=True)
        photo(size).save(tmp_path/'in'/name)
    assert not len(resize_images(tmp_path/'in', max_size=100, recurse=True, dest=tmp_path/'out'))
    sizes = {o: Image.open(tmp_path/'out'/o).size for o in names(tmp_path/'out')}
    assert sizes == {'a.jpg': (100, 75), 'thin.png': (100, 1), 'x/b.png': (10, 100), 'x/y/c.png': (20, 10)}
    resize_images(tmp_path/'in', max_size=100, dest=tmp_path/'flat')
    assert names(tmp_path/'flat') == ['a.jpg', 'thin.png']


def test_as_fastai(tmp_path: Path):
    "The same names, sizes, modes and (but for the draft of a JPEG) pixels"
    utils = pytest.importorskip('fastai.vision.utils')
    (tmp_path/'in').mkdir()
    for i, mode in enumerate(['RGB', 'L', 'RGBA', 'P']): photo((320, 200 + i), mode).save(tmp_path/'in'/f'{mode}.png')
    photo((333, 500)).save(tmp_path/'in'/'large.jpg', quality=95)
    photo((33, 50)).save(tmp_path/'in'/'small.jpg', quality=95)
    utils.resize_images(tmp_path/'in', max_workers=0, max_size=80, dest=tmp_path/'theirs')
    resize_images(tmp_path/'in', max_workers=0, max_size=80, dest=tmp_path/'ours')
    assert names(tmp_path/'ours') == names(tmp_path/'theirs')
    for name in names(tmp_path/'ours'):
        ours, theirs = (Image.open(tmp_path/o/name) for o in ('ours', 'theirs'))
        assert (ours.size, ours.mode, ours.format) == (theirs.size, theirs.mode, theirs.format), name
        difference = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).mean()
        assert difference < (25 if name == 'P.png' else 3), (name, difference) # fastai resizes a palette by its nearest pixels


@pytest.mark.parametrize('orientation', [3, 6, 8])
@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp'])
def test_the_same_side_is_up(tmp_path: Path, orientation: int, ending: str):
    from PIL import ImageOps
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, 'a camera'
    photo().save(tmp_path/f'x.{ending}', exif=exif)
    made = resize_image(f'x.{ending}', tmp_path/'out', src=tmp_path, max_size=80)
    ours, original = (ImageOps.exif_transpose(Image.open(o)) for o in (made, tmp_path/f'x.{ending}'))
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(original.resize(ours.size))).mean() < 4
    assert dict(Image.open(made).getexif()) == {0x0112: orientation} # the camera is nobody's business


def test_in_place_is_safe(tmp_path: Path, monkeypatch):
    photo().save(tmp_path/'a.jpg')
    (tmp_path/'b.jpg').write_bytes((tmp_path/'a.jpg').read_bytes()[:-500])
    broken = (tmp_path/'b.jpg').read_bytes()
    failed = resize_images(tmp_path, max_size=100, dest=tmp_path)
    assert Image.open(tmp_path/'a.jpg').size == (100, 75)
    assert [o.name for o in failed] == ['b.jpg'] and 'truncated' in failed.reasons[0] and (tmp_path/'b.jpg').read_bytes() == broken
    before = (tmp_path/'a.jpg').read_bytes()
    def full_disk(self, target, *args, **kwargs):
        Path(target).write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Image.Image, 'save', full_disk)
    failed = resize_images(tmp_path, max_size=50, dest=tmp_path)
    assert 'No space left' in failed.reasons[0] and (tmp_path/'a.jpg').read_bytes() == before and names(tmp_path) == ['a.jpg', 'b.jpg']


def test_absolute_path_does_not_overwrite_the_original(tmp_path: Path):
    photo().save(tmp_path/'a.jpg')
    made = resize_image(tmp_path/'a.jpg', tmp_path/'out', max_size=50)
    assert made == tmp_path/'out'/'a.jpg' and Image.open(tmp_path/'a.jpg').size == (320, 240) and Image.open(made).size == (50, 37)


def test_formats_resume_and_channels(tmp_path: Path):
    photo((50, 40)).save(tmp_path/'a.jpg')
    made = resize_image('a.jpg', tmp_path/'out', src=tmp_path, ext='.png')
    assert made.name == 'a.png' and Image.open(made).format == 'PNG' # fastai copies the JPEG under that name
    made.write_bytes(b'mine')
    assert resize_image('a.jpg', tmp_path/'out', src=tmp_path, ext='.png', resume=True).read_bytes() == b'mine'
    assert Image.open(resize_image('a.jpg', tmp_path/'out', src=tmp_path, n_channels=1)).mode == 'L'
    assert Image.open(resize_image('a.jpg', tmp_path/'out', src=tmp_path, img_format='webp')).format == 'WEBP'
    assert (tmp_path/'a.jpg').read_bytes() == resize_image('a.jpg', tmp_path/'same', src=tmp_path, max_size=50).read_bytes()
    small, large = (resize_image('a.jpg', tmp_path/str(q), src=tmp_path, quality=q).stat().st_size for q in (10, 95))
    assert small < large
    classes = photo((64, 64), 'L').point(lambda v: v//64)
    classes.save(tmp_path/'mask.png')
    made = np.asarray(Image.open(resize_image('mask.png', tmp_path/'out', src=tmp_path, max_size=20, n_channels=1, resample=Image.Resampling.NEAREST)))
    assert made.shape == (20, 20) and set(np.unique(made)) <= {0, 1, 2, 3}


# Fetching

class Site(BaseHTTPRequestHandler):
    "Answers by the path that was asked for"
    def do_GET(self):
        self.server.asked.append(self.path)
        kind = self.path.split('?')[0].strip('/').split('/')[0].split('.')[0]
        getattr(self, f'_{kind}', self._picture)()

    def _send(self, body: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for key, value in {'Content_Length': str(len(body)), **headers}.items(): self.send_header(key.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(body)

    def _picture(self): self._send(encoded())
    def _gone(self): self.send_error(404)
    def _page(self): self._send(b'<html>not here</html>')
    def _moved(self): self._send(b'', 302, Location='/picture.png')
    def _away(self): self._send(b'', 302, Location='file:///etc/passwd')
    def _circle(self): self._send(b'', 302, Location='/circle')
    def _cut(self): self._send(encoded('jpeg', (200, 200))[:-100])
    def _promises(self): self._send(b'x', Content_Length='99999999999')
    def _busy(self): self.send_error(503) if self.server.asked.count(self.path) == 1 else self._picture()
    def _silent(self): self.server.stop.wait(5)

    def _stream(self, chunk: bytes, pause: float):
        self.send_response(200)
        self.end_headers()
        try:
            while not self.server.stop.wait(pause):
                self.wfile.write(chunk)
                self.wfile.flush()
        except OSError: pass

    def _endless(self): self._stream(b'0'*65536, 0)
    def _drips(self): self._stream(b'0', 0.05)
    def log_message(self, *args): pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    def handle_error(self, *args): pass # a client that hangs up


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(module, '_pause', 0)
    server = Server(('127.0.0.1', 0), Site)
    server.asked, server.stop = [], threading.Event()
    server.address = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


def test_what_can_go_wrong(site, tmp_path: Path):
    wanted = {'picture.png': None, 'gone.jpg': '404', 'page.jpg': 'HTML page', 'moved.png': None, 'away.png': '', 'circle': 'HTTP 302',
              'promises.jpg': 'larger than max_bytes', 'endless.jpg': 'larger than max_bytes', 'busy.png': None, 'Ünicode and space.png': None}
    urls = [f'{site.address}/{o}' for o in wanted] + ['ftp://example.com/x.png', 'file:///etc/passwd', 'nonsense', 'http://127.0.0.1:1/x.png']
    failed = download_images(tmp_path/'new', urls=urls, max_bytes=1_000_000, timeout=60)
    found = {o.rpartition('/')[2]: reason for o, reason in zip(failed, failed.reasons)}
    for o, text in wanted.items(): assert text is None or text in found[o], (o, found[o])
    assert len(failed) == 4 + sum(o is not None for o in wanted.values()), failed
    good = [f'{i:08}.png' for i, text in enumerate(wanted.values()) if text is None]
    assert names(tmp_path/'new') == good and [o.name for o in (tmp_path/'new').iterdir() if o.name.startswith('.')] == []
    assert not len(verify_images(get_image_files(tmp_path/'new')))
    assert list(failed.table.columns) == ['url', 'file', 'reason']


def test_slow_servers(site, tmp_path: Path):
    silent = download_images(tmp_path, urls=[f'{site.address}/silent.png'], timeout=0.1, retries=0)
    drips = download_images(tmp_path, urls=[f'{site.address}/drips.png'], timeout=60, max_seconds=0.2)
    assert 'timed out' in silent.reasons[0] and 'longer than max_seconds' in drips.reasons[0] and names(tmp_path) == []


def test_retries(site, tmp_path: Path):
    failed = download_images(tmp_path, urls=[f'{site.address}/busy.png', f'{site.address}/gone.png'], retries=0)
    assert '503' in failed.reasons[0] and site.asked.count('/gone.png') == 1
    assert not len(download_images(tmp_path, urls=[f'{site.address}/busy.png'], retries=0)) # the second time it answers


def test_names(site, tmp_path: Path):
    hostile = ['..%2f..%2fout.png', '..', '%2e%2e', 'a%00b.png', 'x/', '.hidden.png', 'c:d.png', 'a'*300 + '.png', '?name=/etc/passwd', 'CON.png']
    folder = tmp_path/'deep'/'dest'
    failed = download_images(folder, urls=[f'{site.address}/{o}' for o in hostile], preserve_filename=True)
    assert not len(failed), failed
    assert len(names(folder)) == len(hostile) and names(tmp_path) == [f'deep/dest/{o}' for o in names(folder)]
    assert len(get_image_files(folder)) == len(hostile) # none is hidden, and all have the suffix of an image


def test_same_names_twice(site, tmp_path: Path):
    urls = [f'{site.address}/{o}/x.png' for o in 'abc'] + [f'{site.address}/X.png']
    assert not len(download_images(tmp_path, urls=urls, preserve_filename=True))
    assert names(tmp_path) == ['X3.png', 'x.png', 'x1.png', 'x2.png']
    download_images(tmp_path, urls=urls[:1], preserve_filename=True)
    assert 'x4.png' in names(tmp_path)


def test_two_searches_into_one_folder(site, tmp_path: Path):
    for _ in range(2): download_images(tmp_path, urls=[f'{site.address}/picture', f'{site.address}/b.jpg'])
    assert names(tmp_path) == ['00000000.png', '00000001.jpg', '00000002.png', '00000003.jpg']


def test_addresses_in_a_file(site, tmp_path: Path):
    (tmp_path/'urls.txt').write_text(f'\n{site.address}/a.png \r\n\n{site.address}/b.png\n{site.address}/c.png\n')
    with pytest.warns(UserWarning, match='only the first max_pics=2 of 3'): download_images(tmp_path/'x', tmp_path/'urls.txt', max_pics=2)
    assert names(tmp_path/'x') == ['00000000.png', '00000001.png']
    with pytest.raises(ValueError, match='say what to fetch'): download_images(tmp_path/'x')


def test_unchecked(site, tmp_path: Path):
    assert not len(download_images(tmp_path, urls=[f'{site.address}/page.html', f'{site.address}/page'], check=False))
    assert names(tmp_path) == ['00000000.html', '00000001.jpg']


def test_two_files_of_one_name_do_not_become_one(tmp_path: Path):
    (tmp_path/'src').mkdir()
    for name, colour in (('a.bmp', 'blue'), ('a.png', 'red'), ('b.png', 'red')): Image.new('RGB', (20, 20), colour).save(tmp_path/'src'/name)
    failed = resize_images(tmp_path/'src', dest=tmp_path/'dst', max_size=10, ext='.jpg')
    assert [o.name for o in failed] == ['a.png'] and 'a.bmp' in failed.reasons[0]
    assert sorted(o.name for o in (tmp_path/'dst').iterdir()) == ['a.jpg', 'b.jpg']
    with Image.open(tmp_path/'dst'/'a.jpg') as kept: assert kept.getpixel((5, 5))[2] > 200, 'the first one was kept'
