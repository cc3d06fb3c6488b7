"""A part of a JPEG has the pixels that it has in the whole picture, whoever decodes it; and what is damaged is told as ever."""
import io
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
import lamella.vision.decoding as decoding
import lamella.vision.jpeg as jpeg
import lamella.vision.pixels as pixels
import lamella.vision.sampling as sampling
from lamella.vision.all import CategoryBlock, DataBlock, ImageBlock, RandomResizedCrop, RandomSplitter, Resize, get_image_files, parent_label
from lamella.vision.types import PILImage, PILImageBW
from PIL import Image
from skimage import data

PHOTO = Image.fromarray(data.astronaut())
ROOT = Path(__file__).parents[1]
compiled = pytest.mark.skipif(jpeg.part_decoder() is None, reason='lamella was installed without a C compiler or the headers of libjpeg-turbo')


def file_of(size, mode='RGB', noise=0, **kwargs):
    "A picture as a file: a photograph, or noise, which no neighbour predicts"
    image = Image.fromarray(np.random.default_rng(noise).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) if noise else PHOTO.resize(size)
    image.convert(mode).save(stream := io.BytesIO(), format='JPEG', **{'quality': 90, **kwargs})
    return bytearray(stream.getvalue())


def whole(file, mode='RGB'): return torch.from_numpy(np.atleast_3d(np.array(Image.open(io.BytesIO(file)).convert(mode)))).permute(2, 0, 1)


def part_of(file, box, mode='RGB'): return jpeg.decode_part(file, mode, box)


@pytest.fixture
def without(monkeypatch): monkeypatch.setattr(jpeg, 'part_decoder', lambda: None)


@compiled
@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), subsampling=st.sampled_from([0, 1, 2]), grey=st.booleans(), noise=st.integers(0, 5), how=st.data())
def test_any_part_has_the_pixels_of_the_whole(width, height, subsampling, grey, noise, how):
    kwargs = how.draw(st.sampled_from([{}, {'optimize': True}, {'restart_marker_blocks': 2}]))
    file = file_of((width, height), 'L' if grey else 'RGB', noise, **kwargs, **({} if grey else {'subsampling': subsampling}))
    expected = whole(file)
    for _ in range(5):
        left, top = how.draw(st.integers(0, width - 1)), how.draw(st.integers(0, height - 1))
        box = left, top, how.draw(st.integers(left + 1, width)), how.draw(st.integers(top + 1, height))
        assert torch.equal(part_of(file, box), expected[:, box[1]:box[3], box[0]:box[2]]), box
        if grey: assert torch.equal(part_of(file, box, 'L'), whole(file, 'L')[:, box[1]:box[3], box[0]:box[2]]), box


@compiled
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_a_large_picture_at_every_place_of_a_block(mode):
    "Blocks are 8 or 16 pixels wide, and the colours of a pixel depend on those beside it"
    file = file_of((161, 133), noise=1)
    expected = part_of(file, (0, 0, 161, 133), mode)
    if mode == 'RGB': assert torch.equal(expected, whole(file))
    for k in range(36):
        for box in ((k, k, k + 50, k + 50), (k, 0, k + 1, 133), (0, k, 161, k + 1), (k, 3 * k, 161 - k, 133)):
            assert torch.equal(part_of(file, box, mode), expected[:, box[1]:box[3], box[0]:box[2]]), box


@pytest.fixture
def photos(tmp_path):
    rng = random.Random(0)
    for label in ('cat', 'dog'):
        (tmp_path/label).mkdir()
        for k in range(6): (tmp_path/label/f'{k}.jpg').write_bytes(file_of((rng.randint(200, 500), rng.randint(150, 375)), 'L' if k == 3 else 'RGB', subsampling=k % 3) if k != 3 else file_of((300, 200), 'L'))
    return tmp_path


def batches(path, tfm, block=ImageBlock, workers=0):
    made = DataBlock(blocks=(block, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(0.3, seed=1), item_tfms=tfm)
    dls = made.dataloaders(path, bs=4, num_workers=workers, seed=1)
    return [x for dl in (dls.train, dls.valid) for _ in range(2) for x, _ in dl]


@pytest.mark.parametrize('tfm', [RandomResizedCrop(128, min_scale=0.3), Resize(140), Resize(260, method='pad'), Resize((200, 300), method='squish')])
@pytest.mark.parametrize('block', [ImageBlock, ImageBlock(PILImageBW)])
def test_batches_are_the_same_with_and_without(photos, tfm, block, monkeypatch):
    calls = []
    if jpeg.part_decoder() is not None:
        decode = jpeg.part_decoder()
        monkeypatch.setattr(jpeg, 'part_decoder', lambda: lambda *args: (calls.append(args[1:5]), decode(*args))[1])
    found = batches(photos, tfm, block)
    if jpeg.part_decoder() is not None: assert calls
    monkeypatch.setattr(jpeg, 'part_decoder', lambda: None)
    expected = batches(photos, tfm, block)
    assert len(found) == len(expected) > 2 and all(torch.equal(a, b) for a, b in zip(found, expected))


@compiled
def test_workers_use_it_too(photos):
    assert all(torch.equal(a, b) for a, b in zip(batches(photos, RandomResizedCrop(128, min_scale=0.3), workers=2), batches(photos, RandomResizedCrop(128, min_scale=0.3))))


@compiled
def test_one_image_alone(tmp_path, monkeypatch):
    "Not only in the batches of a loader"
    (tmp_path/'photo.jpg').write_bytes(file_of((400, 300)))
    found = [np.asarray(made.create(tmp_path/'photo.jpg').resize_part((200, 150), (13, 7, 313, 257))) for made in (PILImage, PILImageBW)]
    calls = []
    monkeypatch.setattr(jpeg, 'part_decoder', lambda: calls.append(1))
    expected = [np.asarray(made.create(tmp_path/'photo.jpg').resize_part((200, 150), (13, 7, 313, 257))) for made in (PILImage, PILImageBW)]
    assert calls and all(np.array_equal(a, b) for a, b in zip(found, expected))


def error_of(path):
    try: return np.asarray(PILImage.create(path).resize_part((64, 64), (3, 3, 90, 90)))
    except Exception as error: return type(error).__name__, str(error), getattr(error, '__notes__', None)


def damaged(good, rng):
    "Files cut off anywhere, with other bytes in the head or in the scan, with a marker where a byte was, with something behind"
    yield from (good[:k] for k in rng.sample(range(len(good)), 60))
    yield from (good + behind for behind in (b'\0', b'\xff\xd9', good, b'\xff\xd8'))
    yield from (good[:k] + b'\xff\xd9' for k in rng.sample(range(700, len(good)), 20))
    for k in range(240):
        other = bytearray(good)
        for _ in range(rng.randint(1, 3)): other[rng.randrange(630) if k % 4 == 0 else rng.randrange(len(good))] = 255 if k % 3 == 0 else rng.randrange(256)
        yield other
    stuffed = [k for k in range(700, len(good) - 1) if good[k] == 255 and good[k + 1] == 0]
    for k in stuffed[:8]:
        for marker in (0xC0, 0xC4, 0xDB, 0xDA, 0xD8, 0xC8, 0xFE, 0xD0, 0xD9, 0xFF): yield good[:k + 1] + bytes([marker]) + good[k + 2:]


@pytest.mark.parametrize('kwargs', [{}, {'restart_marker_blocks': 3}, {'subsampling': 0}])
def test_damaged_files_end_as_they_do_without(tmp_path, monkeypatch, kwargs):
    "The same pixels, or the same error"
    files = list(damaged(file_of((120, 110), noise=1, **kwargs), random.Random(3)))
    paths = [tmp_path/f'{k}.jpg' for k in range(len(files))]
    for path, content in zip(paths, files): path.write_bytes(content)
    found = [error_of(path) for path in paths]
    monkeypatch.setattr(jpeg, 'part_decoder', lambda: None)
    for path, one in zip(paths, found):
        other = error_of(path)
        assert type(one) is type(other) and (one == other if isinstance(one, tuple) else np.array_equal(one, other)), path
    assert sum(isinstance(o, tuple) for o in found) > 30 and sum(not isinstance(o, tuple) for o in found) > 30


@compiled
def test_several_scans_are_for_the_decoders_of_the_whole():
    assert part_of(file_of((60, 40), progressive=True), (0, 0, 8, 8)) is None
    good = file_of((60, 40))
    assert part_of(good, (0, 0, 8, 8)) is not None and part_of(good + good, (0, 0, 8, 8)) is None and part_of(good + b'\0', (0, 0, 8, 8)) is None
    scan = good.index(b'\xff\xda')
    assert jpeg.plain_jpeg(bytes(good)) and jpeg.plain_jpeg(bytes(good[:scan + 4] + b'\1' + good[scan + 5:])) is None # the first of three scans


@compiled
def test_another_default_device_changes_nothing():
    good = file_of((60, 40))
    torch.set_default_device('meta')
    try: found = part_of(good, (3, 3, 50, 30))
    finally: torch.set_default_device(None)
    assert torch.equal(found, whole(good)[:, 3:30, 3:50])


def test_a_library_of_another_version_is_not_used(monkeypatch):
    "Compiled with the headers of one libjpeg, and run with another: found out once"
    module = type(sys)('lamella.vision._jpeg')
    def decode(*args): raise ValueError('Wrong JPEG library version: library is 62, caller expects 80')
    module.decode = decode
    monkeypatch.setitem(sys.modules, 'lamella.vision._jpeg', module)
    assert jpeg.part_decoder.__wrapped__() is None


@compiled
def test_what_it_cannot_decode_is_an_error_and_no_crash():
    decode, file, rng = jpeg.part_decoder(), file_of((60, 40)), random.Random(0)
    for args in ((0, 0, 61, 40, 3), (0, 1, 60, 40, 3), (4294967295, 0, 2, 2, 3), (2, 4294967295, 2, 2, 3), (60, 0, 1, 1, 3)):
        with pytest.raises(ValueError, match='over the edge'): decode(file, *args, bytearray(args[2] * args[3] * args[4]))
    for args, size in (((0, 0, 4, 4, 4), 6400), ((0, 0, 0, 4, 3), 0), ((0, 0, 4, 4, -3), 4800), ((0, 0, 2**32 - 1, 2**32 - 1, 3), 3), ((0, 0, 4, 4, 2), 3200)):
        with pytest.raises(ValueError, match='channels'): decode(file, *args, bytearray(size))
    for args, size in (((0, 0, 4, 4, 3), 47), ((0, 0, 60, 40, 3), 7199), ((0, 0, 4, 4, 3), 0), ((30, 0, 30, 40, 1), 1200)):
        with pytest.raises(ValueError, match='too small'): decode(file, *args, bytearray(size))
    assert decode(file, 0, 0, 60, 40, 3, bytearray(7200)) == (0, 180)
    with pytest.raises(TypeError): decode(file, 0, 0, 4, 4, 3, bytes(48))
    with pytest.raises(ValueError): decode(b'', 0, 0, 4, 4, 3, bytearray(48))
    PHOTO.resize((60, 40)).convert('CMYK').save(stream := io.BytesIO(), format='JPEG')
    with pytest.raises(ValueError): decode(stream.getvalue(), 0, 0, 4, 4, 3, bytearray(48))
    for _ in range(3000):
        other = bytearray(file)
        for _ in range(rng.randint(1, 6)): other[rng.randrange(rng.choice((len(file), 620)))] = rng.choice((0, 255, 0xd9, 0xc4, rng.randrange(256)))
        try: decode(other[:rng.choice((len(file), rng.randrange(len(file))))], 5, 5, 40, 30, 3, bytearray(30 * 120 * 3))
        except ValueError: pass


@compiled
@pytest.mark.parametrize('sampling', [0, 1, 2])
def test_nothing_is_written_beside_the_memory(sampling):
    decode, file = jpeg.part_decoder(), file_of((90, 70), noise=1, subsampling=sampling)
    expected = whole(file)
    for left, top, width, height in ((0, 0, 90, 70), (33, 11, 5, 59), (89, 69, 1, 1), (17, 3, 40, 2), (40, 40, 50, 1)):
        for room in range(height * (width + jpeg._BESIDE) * 3, 0, -41):
            memory = bytearray(b'\xa5' * (room + 200))
            try: begin, row = decode(file, left, top, width, height, 3, memoryview(memory)[100:100 + room])
            except ValueError: continue
            finally: assert memory[:100] == memory[-100:] == b'\xa5' * 100
            found = torch.frombuffer(memory, dtype=torch.uint8)[100:100 + room].as_strided((3, height, width), (1, row, 3), 100 + begin)
            assert torch.equal(found, expected[:, top:top + height, left:left + width])


@compiled
def test_many_threads_at_once():
    file = file_of((500, 375))
    expected = whole(file)
    boxes = [(k, 2 * k, 300 + k, 200 + k) for k in range(64)]
    with ThreadPoolExecutor(8) as pool: parts = list(pool.map(lambda box: part_of(file, box), boxes * 4))
    assert all(torch.equal(part, expected[:, b[1]:b[3], b[0]:b[2]]) for part, b in zip(parts, boxes * 4))


def test_lamella_is_installed_without_a_compiler_too(tmp_path):
    "The extension is left out, and the command that builds it succeeds"
    script = tmp_path/'setup_only.py'
    script.write_text((ROOT/'setup.py').read_text(encoding='utf-8').replace('Path(__file__).parent', f'Path({str(ROOT)!r})'), encoding='utf-8')
    done = subprocess.run([sys.executable, str(script), 'build_ext', '--build-lib', str(tmp_path/'lib'), '--build-temp', str(tmp_path/'temp')], cwd=ROOT,
                          env={**os.environ, 'CC': 'no-such-compiler'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ('_jpeg', '_pixels', '_sampling'): assert f'lamella.vision.{name}' in done.stdout + done.stderr and not list((tmp_path/'lib').rglob(f'{name}*'))


@pytest.mark.skipif('AVX' not in torch.backends.cpu.get_cpu_capability(), reason='PyTorch was told to do without vectors, and rounds in another way then')
@pytest.mark.parametrize('name, function', [('_jpeg', jpeg.part_decoder), ('_pixels', decoding.byte_resizer), ('_pixels', pixels.byte_writer), ('_sampling', sampling.byte_sampler)])
def test_what_was_compiled_is_used(name, function):
    "A part that finds out that it does something else than PyTorch steps back: lamella would only be slower, and the tests of that part left out"
    pytest.importorskip(f'lamella.vision.{name}', exc_type=ImportError)
    assert function() is not None
