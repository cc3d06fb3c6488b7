"""A million paths: how much is made for each of them, and what stays in memory. No test measures absolute time."""
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lamella.base.packed import PackedL, PackedPaths
from lamella.data.blocks import CategoryBlock, TransformBlock
from lamella.data.datablock import DataBlock
from lamella.data.labels import RegexLabeller, parent_label, using_attr
from lamella.data.loader import DataLoader
from lamella.data.sources import get_files, get_image_files
from lamella.data.splitters import (ColSplitter, FuncSplitter, GrandparentSplitter, RandomSplitter, RandomSubsetSplitter,
                                    TrainTestSplitter)

N = 20_000


def paths(n: int = N) -> list[Path]:
    "Paths under a hundred folders"
    folders = [Path('data')/f'class_{k:02}' for k in range(100)]
    return [folders[i % 100]/f'photo_{i:07}.jpg' for i in range(n)]


def block(get_y=parent_label, **kwargs):
    return DataBlock(blocks=(TransformBlock, CategoryBlock), get_y=get_y, splitter=RandomSplitter(seed=42), **kwargs)


@pytest.fixture
def folder(tmp_path):
    "300 empty files in three folders"
    for k in range(3):
        (tmp_path/f'c{k}').mkdir()
        for i in range(100): (tmp_path/f'c{k}'/f'{i:03}.jpg').touch()
    return tmp_path


# What is kept

BYTES = """
import gc, tracemalloc
from test_scale import N, block, paths
block().datasets(paths()) # whatever is made once
gc.collect()
tracemalloc.start()
before = tracemalloc.get_traced_memory()[0]
items = paths()
print((tracemalloc.get_traced_memory()[0] - before) / N)
kept = block().datasets(items)
del items
gc.collect()
print((tracemalloc.get_traced_memory()[0] - before) / N)
assert len(kept) == N
"""

def test_bytes_an_item():
    "What a DataBlock keeps of a path: less than a fifth of the `Path`, and little more than the name; in a process where nobody else asks for memory"
    done = subprocess.run([sys.executable, '-c', BYTES], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    of_paths, of_datasets = map(float, done.stdout.split())
    assert of_paths > 200 and of_datasets < 45


def test_splits_are_shared_arrays():
    train, valid = RandomSplitter(seed=1)(range(1000))
    assert isinstance(train.items, np.ndarray) and np.shares_memory(train.items, train.items.base) and train.items.base is not None
    dsets = block().datasets(paths())
    assert dsets.train.index is dsets.splits[0] and dsets.train.source is dsets.source
    assert all(isinstance(o, np.ndarray) for o in dsets.splits)


@pytest.mark.parametrize('label', [parent_label, RegexLabeller(r'class_(\d+)/'), using_attr(RegexLabeller(r'(\d)\.jpg'), 'name')], ids=['parent', 'regex', 'name'])
def test_labels_need_no_path(label, monkeypatch):
    "The labels of packed paths are read from strings, and are the same"
    small = block(label).datasets(paths()).source
    assert isinstance(small.items, PackedPaths)
    made = []
    def counted(text): made.append(text); return Path(text)
    monkeypatch.setattr(small.items, 'kind', counted)
    dsets = block(label).datasets(small)
    assert len(made) <= 2
    assert list(dsets.vocab) == sorted({label(o) for o in paths()})


def test_a_function_that_wants_paths_gets_paths():
    dsets = block(lambda o: o.parent.name).datasets(PackedL(block().datasets(paths()).source.items))
    assert len(dsets.vocab) == 100 and isinstance(dsets.train.items[0], Path)


def test_other_items_are_left_alone():
    class Own(type(Path())): pass
    mixed = paths()
    mixed[7] = Own('data/class_00/x.jpg')
    dsets = block().datasets(mixed)
    assert dsets.source is mixed and type(dsets.source[7]) is Own
    short = paths(200)
    assert block().datasets(short).source is short


# Behaviour

def test_files_are_a_list_of_paths(folder):
    files = get_image_files(folder)
    plain = sorted(folder.rglob('*.jpg'))
    assert files == plain and list(files) == plain and sorted(files) == plain
    assert type(files[0]) is type(Path()) and files[-1] == plain[-1] and plain[5] in files and folder not in files
    for key in (slice(1, 50, 3), slice(None, None, -1)): assert list(files[key]) == plain[key]
    random.seed(3); chosen = random.choice(files)
    random.seed(3); assert chosen == random.choice(plain)
    assert (files + files)[300] == plain[0] and len(files * 2) == 600
    with pytest.raises(IndexError): files[300]


@pytest.mark.skipif(sys.platform != 'linux', reason='names of bytes')
def test_names_that_are_not_utf8(tmp_path):
    name = b'caf\xe9.jpg'
    (tmp_path/os.fsdecode(name)).touch()
    file, = get_image_files(tmp_path)
    assert os.fsencode(file.name) == name and file.exists()


def test_a_label_that_fails_names_its_item():
    def label(o):
        if o.name == 'photo_0000777.jpg': raise KeyError('no such label')
        return o.parent.name
    split = lambda items: (range(len(items) - 1, 0, -1), [0])
    with pytest.raises(RuntimeError, match=r'(?s)item 777 .*photo_0000777.*label.*no such label'):
        DataBlock(blocks=(TransformBlock, CategoryBlock), get_y=label, splitter=split).datasets(paths())


# Against fastai

@pytest.mark.filterwarnings('ignore')
def test_splits_are_those_of_fastai():
    fastai = pytest.importorskip('fastai.data.all')
    items, labels = list(range(500)), [i % 3 for i in range(500)]
    files = [f'{"train" if i % 4 else "valid"}/c{i % 3}/{i}.jpg' for i in range(500)]
    for ours, theirs, of in ((RandomSplitter(seed=42), fastai.RandomSplitter(seed=42), items),
            (TrainTestSplitter(0.3, random_state=7), fastai.TrainTestSplitter(0.3, random_state=7), items),
            (TrainTestSplitter(random_state=7, stratify=labels), fastai.TrainTestSplitter(random_state=7, stratify=labels), items),
            (TrainTestSplitter(random_state=7, stratify=lambda i: i % 3), fastai.TrainTestSplitter(random_state=7, stratify=labels), items),
            (TrainTestSplitter(shuffle=False, train_size=0.5), fastai.TrainTestSplitter(shuffle=False, train_size=0.5), items),
            (RandomSubsetSplitter(0.3, 0.1, seed=3), fastai.RandomSubsetSplitter(0.3, 0.1, seed=3), items),
            (GrandparentSplitter(), fastai.GrandparentSplitter(), [Path(o) for o in files]),
            (FuncSplitter(lambda o: o > 7), fastai.FuncSplitter(lambda o: o > 7), items)):
        assert [list(map(int, o)) for o in ours(of)] == [list(map(int, o)) for o in theirs(of)]


@pytest.mark.filterwarnings('ignore')
def test_much_faster_than_fastai():
    "100,000 paths: a fifth of fastai's time is the aim; half is what noise cannot hide"
    fastai = pytest.importorskip('fastai.data.all')
    items = paths(100_000)
    theirs = fastai.DataBlock(blocks=(fastai.TransformBlock, fastai.CategoryBlock), get_y=fastai.parent_label, splitter=fastai.RandomSplitter(seed=42))
    def seconds(work):
        start = time.process_time()
        made = work(items)
        return time.process_time() - start, made
    (slow, a), (fast, b) = seconds(theirs.datasets), seconds(block().datasets)
    assert list(a.vocab) == list(b.vocab) and a.train.items[:5] == list(b.train.items[:5])
    assert fast < slow / 2


# Other sources

def test_hugging_face_dataset():
    datasets = pytest.importorskip('datasets')
    table = datasets.Dataset.from_dict({'text': [f't{i}' for i in range(20)], 'label': ['a', 'b'] * 10, 'is_valid': [i >= 15 for i in range(20)]})
    dsets = DataBlock(blocks=(TransformBlock, CategoryBlock), get_x=lambda row: row['text'], get_y=lambda row: row['label'], splitter=ColSplitter()).datasets(table)
    assert dsets.vocab == ['a', 'b'] and dsets.valid[0][0] == 't15' and len(dsets.train.items) == 15 and dsets.train.items[2]['text'] == 't2'


def test_polars_dataframe():
    polars = pytest.importorskip('polars')
    table = polars.DataFrame({'text': [f't{i}' for i in range(20)], 'label': ['a', 'b'] * 10, 'is_valid': [i >= 15 for i in range(20)]})
    dsets = DataBlock(blocks=(TransformBlock, CategoryBlock), get_x=lambda row: row['text'], get_y=lambda row: row['label'], splitter=ColSplitter()).datasets(table)
    assert dsets.vocab == ['a', 'b'] and dsets.valid[0][0] == 't15' and len(dsets.train.items) == 15


def test_generators_are_sources():
    dsets = block(get_items=lambda n: (o for o in paths(n))).datasets(1000)
    assert len(dsets) == 1000 and len(dsets.vocab) == 100


# Worker processes

WORKERS = '''
import sys, torch
from pathlib import Path
from lamella.data.loader import DataLoader
from lamella.data.datablock import DataBlock
from lamella.data.blocks import TransformBlock, CategoryBlock
from lamella.data.splitters import RandomSplitter

def private(path):
    "The memory of this process that no other one shares, in KiB"
    lines = open('/proc/self/smaps_rollup').read().splitlines()
    return torch.tensor(sum(int(o.split()[1]) for o in lines if o.startswith('Private')))

def make(n):
    folders = [Path('data')/f'class_{k:02}' for k in range(100)]
    return [folders[i % 100]/f'{i:07}.jpg' for i in range(n)]

# the labels are learned from paths; the memory is asked for seldom
dsets = DataBlock(blocks=(TransformBlock, CategoryBlock), get_items=make, get_x=lambda o: private(o) if o.name.endswith('77.jpg') else torch.tensor(0),
                  get_y=lambda o: o.parent.name, splitter=RandomSplitter(0.1, seed=1)).datasets(int(sys.argv[1]))
if sys.argv[2] == 'unpacked': dsets.source = list(dsets.source)
dl = DataLoader(dsets.train, bs=1000, shuffle=True, num_workers=2, persistent_workers=True, seed=1)
for epoch in range(int(sys.argv[3])): print(max(int(x.max()) for x, y in dl))
'''


def worker_memory(kind: str, n: int, epochs: int) -> list[int]:
    "The largest private memory of a worker in each epoch, in bytes"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', WORKERS, str(n), kind, str(epochs)], capture_output=True, text=True, check=True)
    return [1024 * int(o) for o in done.stdout.split()]


@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='Linux says what a process has for itself')
def test_memory_of_workers_is_flat():
    "No worker copies the paths: what it has for itself does not grow from epoch to epoch, nor with the number of items. A list of paths is copied"
    n = 30_000
    first, *later = worker_memory('packed', n, 2)
    copied, = worker_memory('unpacked', n, 1)
    assert max(later) - first < 4 * 2**20, (first, later)
    assert copied - max(later) > 100 * n, (copied, later)
