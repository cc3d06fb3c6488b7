"""Downloads against a real server on this machine that misbehaves on demand, and the data that travels with lamella."""
import hashlib
import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path

import pytest

from lamella.base import download as module
from lamella.base.download import DownloadError, URLs, cache_dir, download, untar_data
from lamella.base.files import ArchiveError, extract

CONTENT = bytes(range(256)) * 1200  # 307,200 bytes


class Server(ThreadingHTTPServer):
    "A server of one file, with knobs"
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.content, self.etag, self.ranges, self.lies = CONTENT, '"one"', True, 0
        self.obeys_if_range, self.cuts, self.statuses = True, [], []  # bytes to send before hanging up; statuses to answer; one a request
        self.requests = []

    @property
    def address(self): return f'http://127.0.0.1:{self.server_port}/sample.tgz'


class Handler(BaseHTTPRequestHandler):
    "One answer"
    def do_GET(self):
        server, asked = self.server, self.headers.get('Range')
        server.requests.append(asked)
        if server.statuses: return self.send_error(server.statuses.pop(0))
        is_same = not server.obeys_if_range or self.headers.get('If-Range') == server.etag
        start = int(asked[6:-1]) if asked and server.ranges and is_same else 0
        if start >= len(server.content): return self.send_error(416)
        self.send_response(206 if start else 200)
        if start: self.send_header('Content-Range', f'bytes {start}-{len(server.content) - 1}/{len(server.content)}')
        if server.etag: self.send_header('ETag', server.etag)
        self.send_header('Content-Length', str(len(server.content) - start + server.lies))
        self.end_headers()
        self.wfile.write(server.content[start:][:server.cuts.pop(0) if server.cuts else None])

    def log_message(self, *args): pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(module, '_pause', 0)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('LAMELLA_HOME', str(tmp_path/'home'))
    return tmp_path/'home'


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError('a socket was opened')
    for name in ('socket', 'create_connection', 'getaddrinfo'): monkeypatch.setattr(socket, name, refuse)


def get(server, folder, **kwargs): return download(server.address, folder/'sample.tgz', progress=False, **kwargs)

def names(folder): return sorted(o.name for o in folder.iterdir())

def tgz(**files):
    "The bytes of an archive of these files, `name__x` meaning `name/x`"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name.replace('__', '/'))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()

def one_line(error, *parts):
    "The message of `error`, which is one line with all of `parts` in it"
    message = str(error.value)
    assert '\n' not in message and all(str(part) in message for part in parts), message
    assert error.value.__cause__ is not None
    return message


# --- one file

def test_a_normal_download(server, tmp_path):
    assert get(server, tmp_path, sha256=hashlib.sha256(CONTENT).hexdigest()) == tmp_path/'sample.tgz'
    assert (tmp_path/'sample.tgz').read_bytes() == CONTENT
    assert names(tmp_path) == ['sample.tgz'] and server.requests == [None]

def test_a_folder_as_destination_and_a_progress_bar(server, tmp_path, capsys):
    assert download(server.address, tmp_path) == tmp_path/'sample.tgz'
    assert 'sample.tgz: 100%' in capsys.readouterr().err

def test_no_progress_bar(server, tmp_path, capsys):
    get(server, tmp_path)
    assert capsys.readouterr().err == ''

def test_a_cut_connection_is_resumed(server, tmp_path):
    server.cuts = [100_000, 50_000]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, 'bytes=100000-', 'bytes=150000-']
    assert names(tmp_path) == ['sample.tgz']

def test_the_next_call_resumes_too(server, tmp_path):
    server.cuts = [100_000]
    with pytest.raises(DownloadError) as error: get(server, tmp_path, retries=0)
    one_line(error, 'after 100,000 of 307,200 bytes')
    assert names(tmp_path) == ['sample.tgz.part', 'sample.tgz.part.tag']
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, 'bytes=100000-'] and names(tmp_path) == ['sample.tgz']

def test_a_server_without_ranges_is_asked_from_the_start(server, tmp_path):
    server.ranges, server.cuts = False, [100_000]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, 'bytes=100000-']

@pytest.mark.parametrize('etag', ['', 'W/"weak"'])
def test_without_a_strong_version_nothing_is_joined(server, tmp_path, etag):
    server.etag, server.cuts = etag, [100_000]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, None]

@pytest.mark.parametrize('obeys', [True, False])
def test_a_changed_version_starts_again(server, tmp_path, obeys):
    server.cuts = [100_000]
    with pytest.raises(DownloadError): get(server, tmp_path, retries=0)
    server.content, server.etag, server.obeys_if_range = CONTENT[::-1], '"two"', obeys
    assert get(server, tmp_path).read_bytes() == CONTENT[::-1]

def test_a_part_as_long_as_the_file_starts_again(server, tmp_path):
    (tmp_path/'sample.tgz.part').write_bytes(CONTENT + b'more')
    (tmp_path/'sample.tgz.part.tag').write_text('"one"')
    assert get(server, tmp_path).read_bytes() == CONTENT

def test_a_wrong_length_is_no_success(server, tmp_path):
    server.lies = 10
    with pytest.raises(DownloadError) as error: get(server, tmp_path, retries=2)
    one_line(error, server.address, tmp_path/'sample.tgz')
    assert not (tmp_path/'sample.tgz').exists() and len(server.requests) == 3

def test_a_truncated_download_leaves_the_old_file(server, tmp_path):
    (tmp_path/'sample.tgz').write_bytes(b'old')
    server.cuts = [10] * 9
    with pytest.raises(DownloadError): get(server, tmp_path)
    assert (tmp_path/'sample.tgz').read_bytes() == b'old' and len(server.requests) == 4

def test_404_is_told_at_once(server, tmp_path):
    server.statuses = [404, 404]
    with pytest.raises(DownloadError) as error: get(server, tmp_path)
    one_line(error, server.address, 'HTTP 404', f'put the file at {tmp_path/"sample.tgz"} by hand')
    assert names(tmp_path) == [] and len(server.requests) == 1

def test_a_busy_server_is_asked_again(server, tmp_path):
    server.statuses = [503, 429]
    assert get(server, tmp_path).read_bytes() == CONTENT

def test_a_wrong_sha256_keeps_nothing(server, tmp_path):
    with pytest.raises(DownloadError) as error: get(server, tmp_path, sha256='0' * 64)
    one_line(error, hashlib.sha256(CONTENT).hexdigest(), '0' * 64)
    assert names(tmp_path) == []

def test_no_server_is_one_line_without_waiting(tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(module.time, 'sleep', lambda seconds: pytest.fail('it waited'))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{free.getsockname()[1]}/pets.tgz'
    with pytest.raises(DownloadError) as error: download(url, tmp_path/'pets.tgz')
    one_line(error, url, 'refused', tmp_path/'pets.tgz')
    assert isinstance(error.value, OSError) and names(tmp_path) == []

@pytest.mark.parametrize('url', ['file:///etc/passwd', 'ftp://host/x.tgz', 'x.tgz', 'http://host:port/x.tgz', 'http://ho st/x.tgz'])
def test_other_addresses_are_refused(tmp_path, url, no_network):
    with pytest.raises(DownloadError) as error: download(url, tmp_path/'x.tgz')
    one_line(error, url)

def test_two_at_once_share_no_part(server, tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(get(server, tmp_path).read_bytes())) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert results == [CONTENT] * 4 and names(tmp_path) == ['sample.tgz']


# --- from a name to a folder

def test_untar_data_end_to_end(server, home):
    server.content = tgz(sample__cat__1=b'meow', sample__dog__1=b'woof')
    path = untar_data(server.address)
    assert path == home/'data'/'sample' and (path/'cat'/'1').read_bytes() == b'meow'
    assert names(home) == ['archive', 'data'] and names(home/'archive') == ['sample.tgz'] and names(home/'data') == ['sample']
    assert untar_data(server.address) == path and len(server.requests) == 1

def test_what_is_unpacked_needs_no_network(home, no_network):
    (home/'data'/'oxford-iiit-pet').mkdir(parents=True)
    assert untar_data(URLs.PETS) == home/'data'/'oxford-iiit-pet'

def test_an_archive_put_there_by_hand_needs_no_network(home, no_network):
    (home/'archive').mkdir(parents=True)
    (home/'archive'/'oxford-iiit-pet.tgz').write_bytes(tgz(pets__1=b'purr'))
    assert (untar_data(URLs.PETS)/'1').read_bytes() == b'purr'

def test_force_download_replaces_all(server, home):
    server.content = tgz(sample__old=b'old')
    untar_data(server.address)
    server.content = tgz(sample__new=b'new')
    assert names(untar_data(server.address)) == ['old']
    assert names(untar_data(server.address, force_download=True)) == ['new']

def test_force_download_without_network_keeps_what_is_there(server, home):
    server.content = tgz(sample__old=b'old')
    path = untar_data(server.address)
    server.statuses = [404]
    with pytest.raises(DownloadError): untar_data(server.address, force_download=True)
    assert (path/'old').read_bytes() == b'old'

def test_folders_of_the_user(server, home, tmp_path):
    server.content = tgz(sample__a=b'a')
    path = untar_data(server.address, archive=tmp_path/'packed', data='unpacked', base=tmp_path/'base')
    assert path == tmp_path/'base'/'unpacked'/'sample' and names(tmp_path/'packed') == ['sample.tgz'] and not home.exists()
    assert untar_data(server.address, c_key='model') == home/'models'/'sample'

def test_a_hostile_archive_leaves_nothing(server, home, tmp_path):
    server.content = tgz(fine=b'fine', **{'../../../evil': b'evil'})
    with pytest.raises(ArchiveError) as error: untar_data(server.address)
    one_line(error, server.address, "'../../../evil' leads outside")
    assert names(home/'data') == [] and names(home/'archive') == [] and not list(tmp_path.rglob('evil'))

def test_a_page_instead_of_an_archive(server, home):
    server.content = b'<html>Please log in</html>'
    with pytest.raises(ArchiveError) as error: untar_data(server.address)
    one_line(error, server.address, 'no zip or tar archive')
    server.content = tgz(sample__a=b'a')
    assert names(untar_data(server.address)) == ['a']  # the page was not kept

def test_a_damaged_archive_put_there_by_hand_is_not_deleted(home, no_network):
    (home/'archive').mkdir(parents=True)
    (home/'archive'/'oxford-iiit-pet.tgz').write_bytes(tgz(pets__1=os.urandom(5000))[:3000])
    with pytest.raises(ArchiveError) as error: untar_data(URLs.PETS)
    one_line(error, 'is damaged', 'force_download=True')
    assert names(home/'archive') == ['oxford-iiit-pet.tgz'] and names(home/'data') == []

def test_an_archive_put_there_by_hand_is_checked(home, no_network):
    (home/'archive').mkdir(parents=True)
    (home/'archive'/'oxford-iiit-pet.tgz').write_bytes(tgz(pets__1=b'purr'))
    with pytest.raises(ArchiveError, match='has not the sha256 000.*force_download=True'): untar_data(URLs.PETS, sha256='0' * 64)
    assert not (home/'data').exists()

def test_eight_at_once_download_once(server, home):
    server.content, results = tgz(sample__a=b'a'), []
    threads = [threading.Thread(target=lambda: results.append(names(untar_data(server.address)))) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert results == [['a']] * 8 and len(server.requests) == 1

@pytest.mark.parametrize('url', ['http://host/..', 'http://host/', 'http://host/a\\b'])
def test_an_address_without_a_name(home, url, no_network):
    with pytest.raises(ValueError, match='does not end with the name of a file'): untar_data(url)

def test_the_cache_is_where_the_environment_says(home, monkeypatch):
    assert cache_dir('archive') == home/'archive'
    monkeypatch.setenv('FASTAI_HOME', '/fastai')
    assert cache_dir('model') == home/'models'
    monkeypatch.setenv('LAMELLA_HOME', '')
    assert cache_dir('data') == Path('/fastai/data')
    monkeypatch.delenv('FASTAI_HOME')
    assert cache_dir('data') == Path.home()/'.lamella'/'data'


# --- killed in the middle

def run(code, *args):
    "Run `code` in another process; what it printed"
    done = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True)
    return done.stdout + done.stderr

KILLED_WRITE = """
import os, sys
from lamella.base.files import atomic_write
with atomic_write(sys.argv[1]) as path:
    path.write_text('half of the ne')
    print('killed', flush=True)
    os.kill(os.getpid(), 9)
"""

KILLED_EXTRACT = """
import os, sys
from lamella.base import files
def kill(*args): print('killed', flush=True); os.kill(os.getpid(), 9)
files._Unpacker._make_link = kill # all files are written, no link is
files.extract(sys.argv[1], sys.argv[2])
"""

@pytest.mark.skipif(os.name == 'nt', reason='no signals')
def test_a_killed_writer_leaves_the_old_file(tmp_path):
    (tmp_path/'file').write_text('old')
    assert run(KILLED_WRITE, tmp_path/'file') == 'killed\n'
    assert (tmp_path/'file').read_text() == 'old'

@pytest.mark.skipif(os.name == 'nt', reason='no signals')
def test_a_killed_extraction_is_no_data_and_is_cleared_away(tmp_path):
    with tarfile.open(tmp_path/'x.tgz', 'w:gz') as tar:
        (tmp_path/'a').write_text('a')
        (tmp_path/'b').symlink_to('a')
        for name in 'ab': tar.add(tmp_path/name, name)
    assert run(KILLED_EXTRACT, tmp_path/'x.tgz', tmp_path/'to'/'x') == 'killed\n'
    assert names(tmp_path/'to') == ['.x.lock', '.x.unpacking']
    assert names(extract(tmp_path/'x.tgz', tmp_path/'to'/'x')) == ['a', 'b'] and names(tmp_path/'to') == ['x']

def test_the_import_is_light():
    heavy = "{'torch', 'tqdm', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules)"
    assert run(f'import sys, lamella.base.download; print({heavy})') == 'set()\n'


# --- the data that travels with lamella

def test_the_embedded_data_is_small():
    assert (resources.files('lamella')/'assets'/'fashion_sample.tgz').stat().st_size <= 2.5e6

def test_the_embedded_data_needs_no_network(home, no_network):
    path = untar_data(URLs.FASHION_SAMPLE)
    assert path == home/'data'/'fashion_sample' and names(path) == ['LICENSE.txt', 'train', 'valid']
    counts = {split: Counter(file.parent.name for file in (path/split).glob('*/*.png')) for split in ('train', 'valid')}
    assert {split: sum(count.values()) for split, count in counts.items()} == {'train': 3000, 'valid': 1000}
    assert [set(count.values()) for count in counts.values()] == [{300}, {100}]
    assert set(counts['train']) == set(counts['valid']) == {
        't-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle-boot'}
    assert 'MIT' in (path/'LICENSE.txt').read_text() and 'Zalando' in (path/'LICENSE.txt').read_text()

def test_the_embedded_images(home):
    from PIL import Image
    files = sorted(untar_data(URLs.FASHION_SAMPLE).rglob('*.png'))
    images = [Image.open(file) for file in files[::50]]
    assert {(image.mode, image.size) for image in images} == {('L', (28, 28))}
    assert len({hashlib.sha256(file.read_bytes()).digest() for file in files}) > 3990  # hardly any twin, so none in both sets by mistake
