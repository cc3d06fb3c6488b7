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
from fastcore.basics import fastuple
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


# Tuples of a class of one's own: the Siamese tutorial of fastai

class ImageTuple(fastuple):
    "Two pictures"
    shown = []

    @classmethod
    def create(cls, names: Sequence[Path]) -> 'ImageTuple': return cls(tuple(PILImage.create(o) for o in names))

    def show(self, ctx: Any = None, **kwargs: Any) -> Any:
        self.shown.append([type(o) for o in self])
        return show_image(torch.cat([o.as_subclass(torch.Tensor) for o in self], dim=2), ctx=ctx)


class Siamese(torch.nn.Module):
    "Do two pictures have the same mean?"
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(6, 2)

    def forward(self, x: tuple) -> torch.Tensor:
        assert x[0].dtype == torch.float32 and x[0].max() <= 1
        return self.head(torch.cat([o.mean((2, 3)) for o in x], dim=1))


def same_folder(pair: Sequence[Path]) -> str: return 'same' if pair[0].parent == pair[1].parent else 'other'


def test_siamese_tutorial(files):
    block = DataBlock((TransformBlock(type_tfms=ImageTuple.create, batch_tfms=IntToFloatTensor), CategoryBlock), get_y=same_folder,
                      splitter=IndexSplitter([2, 3]), item_tfms=[Resize(6), ToTensor])
    dls = block.dataloaders([[files[0], files[k % 4]] for k in range(8)], bs=4, num_workers=0, device='cpu')
    x, y = dls.one_batch()
    assert type(x) is ImageTuple and x[0].shape == (4, 3, 6, 6) and type(x[0]) is torch.Tensor and x[0].dtype == torch.float32
    ImageTuple.shown.clear()
    dls.show_batch(max_n=2)
    assert ImageTuple.shown == [[TensorImage, TensorImage]] * 2
    Learner(dls, Siamese(), loss_func=CrossEntropyLossFlat()).fit(1)


class SiameseImage(fastuple):
    "Two pictures, and whether they are of one kind"
    def show(self, ctx: Any = None, **kwargs: Any) -> Any: return print(bool(self[2]))


class Pairs(Transform):
    "A picture with another one"
    def __init__(self, names: list[Path]): self.names = names
    def encodes(self, name: Path): return SiameseImage(PILImage.create(name), PILImage.create(self.names[0]), int(name.parent == self.names[0].parent))


def test_sample_of_a_class_of_its_own(files, capsys):
    dls = TfmdLists(files, Pairs(files), splits=[[0, 1], [2, 3]]).dataloaders(bs=2, num_workers=0, device='cpu', after_item=[Resize(6), ToTensor], after_batch=[IntToFloatTensor])
    batch = dls.valid.one_batch()
    assert type(batch) is SiameseImage and batch[1].dtype == torch.float32 and batch[2].tolist() == [1, 0]
    dls.valid.show_batch()
    assert capsys.readouterr().out.split() == ['True', 'False']


def test_a_class_may_ask_for_its_tuples():
    class Takes(Transform):
        def encodes(self, x: ImageTuple): return 'both'
    assert Takes()(ImageTuple((1, 2))) == 'both' and Pipeline([Takes()])((ImageTuple((1, 2)), 1)) == ('both', 1)


# What changes after it was built

def test_types_taught_later_are_seen():
    class Base(Transform):
        def encodes(self, x: float): return 'float'
    class Child(Base): pass
    class Grandchild(Child):
        def encodes(self, x: str): return 'own str'
    made = Base(), Child(), Grandchild()
    pipe = Pipeline([Grandchild()])
    assert [f(1) for f in made] == [1, 1, 1] and pipe(1) == pipe((1,))[0] == 1
    @Base
    def encodes(self, x: int): return 'int'
    @Base
    def encodes(self, x: str): return 'str'
    assert [f(1) for f in made] == ['int'] * 3 and pipe(1) == 'int' and pipe((1,)) == ('int',)
    assert [f('a') for f in made] == ['str', 'str', 'own str']


def test_changes_of_a_pipeline_are_seen():
    add, double = Transform(lambda x: x + 1), Transform(lambda x: x * 2)
    pipe = Pipeline([add, double], split_idx=1)
    assert pipe(1) == 4
    double.split_idx = 0
    assert pipe(1) == 2
    pipe.fs.pop()
    assert pipe(1) == 2
    pipe.fs[0] = lambda x: x + 10
    assert pipe(1) == 11 and isinstance(pipe.fs[0], Transform)
    pipe.add(double)
    double.split_idx = 1
    assert pipe(1) == 22


# Types after `before_batch`

def swapped(samples: list) -> list: return [(y, x) for x, y in samples]


def test_before_batch_may_swap_fields():
    y, x = DataLoader([(picture(), TensorCategory(1))] * 4, before_batch=[swapped], **LOADER).one_batch()
    assert x.dtype == torch.float32 and y.dtype == torch.int64


# Transforms of blocks

def names(fs: list) -> list[str]: return [type(getattr(f, 'tfm', None) or f.enc or f).__name__ if f.enc is None else f.enc.__name__ for f in fs]


def test_new_does_not_repeat_the_transforms_of_blocks():
    def once(x): return x
    def own(x): return x
    block = DataBlock(TransformBlock(item_tfms=[once], batch_tfms=[once]), item_tfms=own)
    assert names(block.new().item_tfms) == ['once', 'own'] and names(block.new(item_tfms=[]).item_tfms) == ['once']
    assert names(block.new(batch_tfms=own).new().batch_tfms) == ['once', 'own']


def test_only_transforms_of_one_kind_replace_each_other():
    v2 = pytest.importorskip('torchvision.transforms.v2')
    block = TransformBlock(item_tfms=[v2.Resize(4), v2.ToImage()])
    assert names(DataBlock(block).item_tfms) == ['Resize', 'ToImage']
    assert names(DataBlock(block, item_tfms=v2.ColorJitter()).item_tfms) == ['Resize', 'ToImage', 'ColorJitter']
    assert names(DataBlock(block, item_tfms=v2.Resize(8)).item_tfms) == ['ToImage', 'Resize']
    assert names(DataBlock((block, block)).item_tfms) == ['Resize', 'ToImage']
    def f(x): return x
    def g(x): return x
    assert names(DataBlock(TransformBlock(item_tfms=[train_only(f), train_only(g)])).item_tfms) == ['f', 'g']
    assert names(DataBlock((ImageBlock, ImageBlock)).batch_tfms) == names(DataBlock(ImageBlock).batch_tfms)


class Learns(Transform):
    "Keeps all that it is given, and learns something"
    def __init__(self, *columns: str, **options: int): self.columns, self.options, self.learned = columns, options, None
    def setups(self, items): self.learned = len(items)


def test_transforms_that_learn_are_made_anew_as_they_were():
    given = Learns('a', 'b', scale=2)
    given.later = 'set after it was made'
    assert given.init_args == {'columns': ('a', 'b'), 'scale': 2}
    made = DataBlock(TransformBlock(type_tfms=given)).datasets(list(range(5))).fields[0][0]
    assert (made.columns, made.options, made.learned, made.later) == (('a', 'b'), {'scale': 2}, 4, 'set after it was made')
    assert given.learned is None


# New items

def test_test_items_of_tfmd_lists(files):
    dls = TfmdLists(files, [PILImage.create], splits=[[0, 1], [2, 3]]).dataloaders(**LOADER)
    batch = dls.test_dl(files[:2]).one_batch()
    assert batch.shape == (2, 3, 8, 8) and batch.dtype == torch.float32
    assert type(dls.valid_ds.test_set(files)) is TfmdLists and len(dls.valid_ds.test_set(files)) == 4 and len(dls.valid_ds) == 2


@pytest.fixture
def table(files):
    "The files with their labels"
    return pytest.importorskip('pandas').DataFrame({'name': [str(o) for o in files], 'label': ['cat', 'dog'] * 2, 'number': [.5, 1, 2, 3], 'count': [1, 2, 1, 2]})


def test_new_items_of_all_sorts(files):
    dls = DataBlock((ImageBlock, CategoryBlock), get_y=parent_label, splitter=IndexSplitter([2, 3])).dataloaders(files, bs=2, num_workers=0, device='cpu')
    for items, n in ((files[0], 1), (str(files[0]), 1), ((o for o in files), 4), (PILImage.create(files[0]), 1), (iter(files), 4)):
        assert len(dls.test_dl(items).one_batch()[0]) == min(n, 2)
    with pytest.raises(ValueError, match='is a folder.*get_image_files'): dls.test_dl(files[0].parent)
    with pytest.raises(ValueError, match='is a folder'): dls.test_dl(str(files[0].parent))


def test_new_items_of_tables(files, table):
    dls = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('name'), get_y=ColReader('label'), splitter=IndexSplitter([2, 3])).dataloaders(table, bs=2, num_workers=0, device='cpu')
    assert len(dls.test_dl(table.iloc[[0]], with_labels=True).one_batch()) == 2 and len(dls.test_dl(files).one_batch()) == 1
    with pytest.raises(ValueError, match='one row'): dls.test_dl(table.iloc[0])
    with pytest.raises(ValueError, match='labels are in rows'): dls.test_dl(files, with_labels=True)


# Columns

def test_columns_are_read_at_once(table, monkeypatch):
    from lamella.data import datasets
    monkeypatch.setattr(datasets, 'item_getter', lambda items: pytest.fail('rows one by one'))
    vocab = lambda getter, *more: list(Datasets(table, [[getter, *more, Categorize]]).vocab)
    assert vocab(ColReader('label')) == ['cat', 'dog'] and vocab(ItemGetter('count')) == [1, 2]
    assert vocab(ColReader('label', pref='a-')) == ['a-cat', 'a-dog'] and vocab(ColReader(['label', 'count']), str) == ["['cat', 1]", "['dog', 2]"]


def test_vocabulary_of_hugging_face_decodes_no_picture(files):
    datasets = pytest.importorskip('datasets')
    made = datasets.Dataset.from_dict({'image': [str(o) for o in files[:3]] + ['nowhere.png'], 'label': ['cat', 'dog', 'cat', 'dog']}).cast_column('image', datasets.Image())
    dsets = DataBlock((TransformBlock, CategoryBlock), get_x=ItemGetter('image'), get_y=ItemGetter('label'), splitter=IndexSplitter([0])).datasets(made)
    assert list(dsets.vocab) == ['cat', 'dog']


def test_a_missing_column_is_named(table):
    with pytest.raises(Exception, match='lable'): DataBlock((TransformBlock, CategoryBlock), get_y=ColReader('lable')).datasets(table)


# Errors

def batch_of(samples: list, **kwargs: Any) -> Any: return DataLoader(samples, bs=len(samples), num_workers=0, **kwargs).one_batch()


def test_what_does_not_fit_into_a_batch():
    with pytest.raises(DataError, match='(?s)different shapes.*Resize'): batch_of([(torch.zeros(3, 4, 4), 1), (torch.zeros(3, 5, 4), 2)])
    with pytest.raises(DataError, match='(?s)different shapes.*before_batch'): batch_of([(torch.zeros(3), 1), (torch.zeros(4), 2)])
    with pytest.raises(DataError, match='sample 0 gave PILImage.*ToTensor'): batch_of([(picture(), 1), (picture(), 2)])
    with pytest.raises(DataError, match='2 values, sample 1 gave 1'): batch_of([(1, 2), (1,)])
    with pytest.raises(DataError, match='default_collate.*object') as caught: batch_of([(torch.zeros(2), object()), (torch.zeros(2), object())])
    assert 'shapes' not in str(caught.value) and isinstance(caught.value.__cause__, TypeError)


class Faulty(torch.utils.data.Dataset):
    "A plain dataset whose item 3 raises"
    def __init__(self, kind: type): self.kind = kind
    def __len__(self) -> int: return 4
    def __getitem__(self, i: int) -> int: return i if i < 3 else self.fail()
    def fail(self): raise self.kind('broken')


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('kind', [KeyError, ValueError, StopIteration])
def test_errors_of_plain_datasets_name_the_item(kind: type, workers: int):
    with pytest.raises(DataError, match=f'sample 3.*\n.*{kind.__name__}.*broken'): list(DataLoader(Faulty(kind), bs=2, num_workers=workers))


def test_an_error_of_before_batch_is_the_same_with_workers():
    class Local(Transform):
        def encodes(self, x): raise KeyError('before')
    for workers in (0, 1):
        with pytest.raises(KeyError, match='before'): list(DataLoader([1, 2], bs=2, num_workers=workers, before_batch=[Local()]))
