"Defects that a review of the data layer found, each with the case that showed it"
import os
from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path
import typing
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from lamella.vision.all import *


def picture(size: int = 8, seed: int = 0) -> PILImage:
    "Random pixels"
    return PILImage.create(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    "Four pictures in two folders"
    made = []
    for k, name in enumerate(['cat', 'dog', 'cat', 'dog']):
        (tmp_path/name).mkdir(exist_ok=True)
        made.append(tmp_path/name/f'{k}.png')
        Image.fromarray(np.full((8, 8, 3), 40 * k, dtype=np.uint8)).save(made[-1])
    return made


# Types of nested samples, and of samples that are a single value

LOADER = dict(bs=2, num_workers=0, after_item=[ToTensor()], after_batch=[IntToFloatTensor()])


def test_nested_tuples_reach_the_batch_transforms():
    dl = DataLoader([((picture(), picture()), torch.tensor(1))] * 4, **LOADER)
    (a, b), y = dl.one_batch()
    assert a.dtype == b.dtype == torch.float32 and float(a.max()) <= 1 and y.dtype == torch.int64
    (shown, _), _ = dl.decode_batch(dl.one_batch())[0]
    assert type(shown) is TensorImage


def test_single_values_reach_the_batch_transforms(files):
    dl = DataLoader([picture()] * 4, **LOADER)
    assert dl.one_batch().dtype == torch.float32
    assert type(dl.decode_batch(dl.one_batch())[0]) is TensorImage
    dl.show_batch()
    dl.show_batch(unique=True)
    lists = TfmdLists(files, [PILImage.create], splits=[[0, 1], [2, 3]])
    assert lists.dataloaders(**LOADER).train.one_batch().dtype == torch.float32


def test_list_of_another_collate_reaches_the_batch_transforms():
    x, y = DataLoader([(picture(), 1)] * 4, collate_fn=lambda o: default_collate([(x.as_subclass(torch.Tensor), y) for x, y in o]), **LOADER).one_batch()
    assert x.dtype == torch.float32


def test_single_plain_values_are_looked_at_once():
    dl = DataLoader(list(range(4)), bs=2, num_workers=0, after_batch=[lambda x: x + 1])
    assert [o.tolist() for o in dl] == [[1, 2], [3, 4]]
    assert dl.input_types == ()


# Annotations

def test_parent_label_is_a_transform(files):
    assert Pipeline([parent_label])(Path('im/a/0.png')) == 'a'
    assert Pipeline([RegexLabeller('(.)/0')])(Path('im/a/0.png')) == 'a'
    assert list(Datasets(files, [[PILImage.create], [parent_label, Categorize]]).vocab) == ['cat', 'dog']


@pytest.mark.parametrize('hint,value', [(os.PathLike, Path('a')), (Mapping, {}), (Sequence, [1]), (Number, 1), (typing.Sequence[str], ['a']),
                                        (typing.Sequence, [1]), (typing.Iterable, [1]), (typing.List, [1]), (Literal['a'], 'a')])
def test_abstract_annotations(hint: Any, value: Any):
    def taken(x): return 'taken'
    taken.__annotations__['x'] = hint
    assert Transform(taken)(value) == 'taken'


def test_abstract_annotation_is_before_object_and_after_a_class():
    class Kinds(Transform):
        def encodes(self, x: object): return 'object'
        def encodes(self, x: str): return 'str'
        def encodes(self, x: Sequence): return 'sequence'
    assert [Kinds()(o) for o in ('a', [1], 1)] == ['str', 'sequence', 'object']
