"""Any number of labels a sample, from a table to the exported file; the encoding is compared with fastai's."""
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from lamella.base.seeds import set_seed
from lamella.data.blocks import CategoryBlock, CategoryMap, RegressionBlock
from lamella.data.datablock import DataBlock
from lamella.data.labels import ColReader
from lamella.data.multilabel import MultiCategoryBlock
from lamella.data.splitters import ColSplitter
from lamella.data.types import MultiCategory, TensorMultiCategory
from lamella.export import load_learner
from lamella.learner.learner import Learner
from lamella.losses import BCEWithLogitsLossFlat
from lamella.metrics import accuracy_multi
from lamella.vision.data import ImageBlock

COLORS = ['red', 'green', 'blue']


def mean_colour():
    "A model that can know the answer: the mean of each colour decides"
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    with torch.no_grad():
        for p in model.parameters(): p.zero_()
    return model


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    "Images in which each colour is there or not, with their labels in one column and in three"
    root = tmp_path_factory.mktemp('colours')
    rows = []
    for i in range(32):
        bits = [i >> k & 1 for k in range(3)]
        Image.fromarray(np.broadcast_to(np.array(bits, dtype=np.uint8) * 255, (8, 8, 3)).copy()).save(root/f'{i}.png')
        rows.append({'file': str(root/f'{i}.png'), 'tags': ';'.join(c for c, bit in zip(COLORS, bits) if bit), **dict(zip(COLORS, bits)), 'is_valid': i >= 24})
    return pd.DataFrame(rows)


def blocks(encoded):
    "The two ways to write the same labels in a table"
    target, get_y = (MultiCategoryBlock(encoded=True, vocab=COLORS), ColReader(COLORS)) if encoded else (MultiCategoryBlock, ColReader('tags', label_delim=';'))
    return DataBlock(blocks=(ImageBlock, target), get_x=ColReader('file'), get_y=get_y, splitter=ColSplitter())


@pytest.fixture(params=[False, True], ids=['delimiter', 'columns'])
def trained(table, tmp_path, request):
    "A learner that knows the colours; no loss function is named"
    set_seed(1)
    dls = blocks(request.param).dataloaders(table, bs=8, num_workers=0, device='cpu', path=tmp_path)
    learn = Learner(dls, mean_colour(), metrics=accuracy_multi)
    learn.fit(15, lr=0.5)
    return learn


def test_the_loss_follows_from_the_data(trained):
    assert isinstance(trained.loss_func, BCEWithLogitsLossFlat)
    assert trained.dls.c == 3 and sorted(trained.dls.vocab) == sorted(COLORS)
    assert trained.validate()[1] == 1


def test_predictions_are_labels(trained, table):
    "Probabilities between 0 and 1 for each label; a decision at 0.5; the names of those that are decided for"
    probs, targets, decisions = trained.get_preds(with_decoded=True)
    assert ((probs >= 0) & (probs <= 1)).all() and decisions.dtype == torch.bool
    assert torch.equal(decisions, targets.bool()) and torch.equal(decisions, probs > 0.5)
    for i in (0, 5, 7):
        label, decision, prob = trained.predict(table.file[i])
        assert isinstance(label, MultiCategory) and set(label) == set(filter(None, table.tags[i].split(';')))
        assert torch.equal(decision, prob > 0.5)


def test_export(trained, table, tmp_path):
    trained.export('colours.pkl')
    predictor = load_learner(tmp_path/'colours.pkl')
    for i in range(8):
        a, b = trained.predict(table.file[i]), predictor.predict(table.file[i])
        assert a.label == b.label and torch.allclose(a[2], b[2]) and torch.equal(a[1], b[1])


def test_show(trained, capsys):
    trained.dls.valid.show_batch(max_n=2)
    trained.show_results(max_n=2)
    MultiCategory(['a', 'b']).show()
    assert capsys.readouterr().out == 'a;b\n'


def test_an_item_without_a_list_is_named(table):
    rows = table.assign(labels=[float('nan') if i == 5 else ['red'] for i in range(len(table))])
    block = DataBlock(blocks=(ImageBlock, MultiCategoryBlock), get_x=ColReader('file'), get_y=ColReader('labels'), splitter=ColSplitter())
    with pytest.raises(RuntimeError, match=r'(?s)item 5 .*a list of labels is wanted, and the label function returned nan'): block.datasets(rows)
    rows['labels'] = ['red'] * len(rows)
    with pytest.raises(RuntimeError, match=r'(?s)item 0 .*returned the text .red.*label_delim'): block.datasets(rows)


@pytest.mark.filterwarnings('ignore')
def test_encoding_is_that_of_fastai(table):
    fastai = pytest.importorskip('fastai.data.all')
    labels = [o.split(';') if o else [] for o in table.tags]
    theirs = fastai.Datasets(labels, [[fastai.MultiCategorize(), fastai.OneHotEncode()]])
    from lamella.data.datasets import Datasets
    ours = Datasets(labels, [MultiCategoryBlock().type_tfms])
    assert list(ours.vocab) == list(theirs.vocab)
    for i in range(8):
        a, b = ours[i][0], theirs[i][0]
        assert type(a) is TensorMultiCategory and a.dtype == b.dtype and a.tolist() == b.tolist()
        assert list(ours.decode(ours[i])[0]) == list(theirs.decode(theirs[i])[0])


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kwargs', [{}, {'sort': False}, {'add_na': True}])
@pytest.mark.parametrize('column', [['b', 'a', 'b'], pd.Series(['b', 'a']), pd.Series(pd.Categorical(['lo', 'hi'], categories=['lo', 'mid', 'hi'], ordered=True)), [3, 1.5, None, 3]], ids=['list', 'series', 'ordered', 'missing'])
def test_category_map_is_that_of_fastai(column, kwargs):
    fastai = pytest.importorskip('fastai.data.all')
    expected = fastai.CategoryMap([o for o in column if o is not None] if isinstance(column, list) else column, **kwargs)
    assert list(CategoryMap(column, **kwargs)) == list(expected)


def test_add_na_survives_an_export(table, tmp_path):
    "A label that training did not know is '#na#', and the exported file knows the same classes"
    rows = table.assign(label=['cat', 'dog'] * 16)
    rows.loc[31, 'label'] = 'cow'
    dls = DataBlock(blocks=(ImageBlock, CategoryBlock(add_na=True)), get_x=ColReader('file'), get_y=ColReader('label'), splitter=ColSplitter()).dataloaders(rows, bs=8, num_workers=0, device='cpu', path=tmp_path)
    assert dls.vocab == ['#na#', 'cat', 'dog'] and dls.valid_ds[7][1] == 0
    learn = Learner(dls, mean_colour())
    learn.export('na.pkl')
    predictor = load_learner(tmp_path/'na.pkl')
    assert list(predictor.vocab) == ['#na#', 'cat', 'dog'] and predictor.predict(rows.file[0]).label == learn.predict(rows.file[0]).label


def test_two_images_in_one_number_out(table):
    "Several inputs (`n_inp`), and a regression of several numbers"
    rows = table.assign(other=table.file.tolist()[::-1])
    block = DataBlock(blocks=(ImageBlock, ImageBlock, RegressionBlock(n_out=3)), n_inp=2, get_x=[ColReader('file'), ColReader('other')], get_y=ColReader(COLORS), splitter=ColSplitter())
    dls = block.dataloaders(rows, bs=4, num_workers=0, device='cpu')
    a, b, y = dls.one_batch()
    assert a.shape == b.shape == (4, 3, 8, 8) and y.shape == (4, 3) and (dls.n_inp, dls.c) == (2, 3)
    assert dls.valid_ds.decode(dls.valid_ds[0])[2] == (0., 0., 0.)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = mean_colour()

        def forward(self, x, other): return self.one(x) + self.one(other)
    learn = Learner(dls, Both())
    learn.fit(1, lr=0.01)
    assert learn.get_preds()[0].shape == (8, 3)
