"""Reading a trained learner: against straightforward computations, against fastai and pycocotools, and what is kept in memory."""
import gc
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, Subset, TensorDataset

from lamella.data.blocks import CategoryBlock, RegressionBlock, TransformBlock
from lamella.data.datablock import DataBlock
from lamella.data.labels import ColReader, parent_label
from lamella.data.loader import DataLoader
from lamella.data.loaders import DataLoaders
from lamella.data.multilabel import MultiCategoryBlock
from lamella.data.sources import get_image_files
from lamella.data.splitters import RandomSplitter
from lamella.interpret import ClassificationInterpretation, DetectionInterpretation, Interpretation, RegressionInterpretation, SegmentationInterpretation
from lamella.interpret.boxes import match_boxes
from lamella.learner.learner import Learner
from lamella.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss
from lamella.vision.boxes import get_annotations
from lamella.vision.data import BBoxBlock, BBoxLblBlock, ImageBlock, ImageDataLoaders, MaskBlock, PointBlock
from lamella.vision.geometry import Flip
from lamella.vision.shapes import make_shapes

from conftest import make_photos


def mean_colour(n_out=3):
    "A model without randomness: a linear function of the mean colours"
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, n_out))
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.linspace(-2, 2, p.numel()).reshape(p.shape))
    return model


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    "Photos of three classes"
    return make_photos(tmp_path_factory.mktemp('three'), ('cat', 'dog', 'fox'), n=8, size=(16, 16))


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp('shapes'), n=24, size=48)


def photo_learner(path, **kwargs):
    return Learner(ImageDataLoaders.from_path_func(path, get_image_files(path), parent_label, valid_pct=0.5, seed=3, bs=5, num_workers=0, device='cpu', **kwargs), mean_colour())


def titles():
    import matplotlib.pyplot as plt
    return [(ax.get_title(), ax.title.get_color()) for ax in plt.gcf().axes if ax.get_title()]


# The order of things

def straightforward(learn, items):
    "Loss, decision and probability of each item, one by one"
    rows = []
    for item in items:
        label, number, probs = learn.predict(item)
        true = learn.dls.vocab.o2i[parent_label(item)]
        rows.append((str(item), parent_label(item), str(label), float(-probs[true].log()), float(probs[number])))
    return pd.DataFrame(rows, columns=['path', 'label', 'prediction', 'loss', 'probability'])


def agrees(frame, wanted):
    assert frame.columns.tolist() == ['path', 'label', 'prediction', 'loss', 'probability']
    assert frame.path.map(str).tolist() == wanted.path.map(str).tolist()
    assert frame.label.tolist() == wanted.label.tolist() and frame.prediction.tolist() == wanted.prediction.tolist()
    np.testing.assert_allclose(frame[['loss', 'probability']], wanted[['loss', 'probability']], rtol=1e-4, atol=1e-5)


def loaders_of(learn, path):
    dls = learn.dls
    some = dls.train.dataset
    return {'validation': (dls.valid, dls.valid.dataset.items), 'training, shuffled': (dls.train, some.items),
            'weighted': (dls.train.new(weights=np.arange(1, len(some) + 1), n=4), some.items), 'a sampler': (dls.valid.new(sampler=[2, 0]), dls.valid.dataset.items),
            'new items': (dls.test_dl(get_image_files(path)[::-1][:7], with_labels=True), get_image_files(path)[::-1][:7]),
            'subset': (DataLoader(Subset(dls.valid.dataset, [4, 1, 7]), bs=2, after_item=dls.valid.after_item, after_batch=dls.valid.after_batch, num_workers=0), [dls.valid.dataset.items[i] for i in (4, 1, 7)])}


@pytest.mark.parametrize('kind', ['validation', 'training, shuffled', 'weighted', 'a sampler', 'new items', 'subset'])
def test_each_row_of_the_table_is_about_its_file(three, kind):
    learn = photo_learner(three)
    dl, items = loaders_of(learn, three)[kind]
    interp = ClassificationInterpretation.from_learner(learn, dl=dl)
    agrees(interp.to_frame(), straightforward(learn, items))
    losses, numbers, found = interp.top_losses(3, items=True)
    assert [str(o) for o in found] == [str(items[int(i)]) for i in numbers] and losses.tolist() == sorted(interp.losses.tolist(), reverse=True)[:3]


def test_samples_are_those_of_the_numbers(three):
    learn = photo_learner(three)
    interp = ClassificationInterpretation.from_learner(learn, ds_idx=0)
    inputs, preds, targs, decoded, losses = interp[[5, 0, 3]]
    whole = learn.dls.train.in_order()
    every = [torch.cat(o) for o in zip(*whole)]
    assert torch.equal(inputs, every[0][[5, 0, 3]]) and torch.equal(targs, every[1][[5, 0, 3]])
    assert torch.allclose(preds, interp.preds[[5, 0, 3]], atol=1e-6) and torch.equal(decoded, preds.argmax(1)) and torch.equal(losses, interp.losses[[5, 0, 3]])
    for same in (torch.tensor([1, 2]), slice(1, 3), range(1, 3), np.arange(len(interp)) // 1 % 100 == 1):
        assert torch.equal(interp[same][1][0], interp[1][1][0])
    with pytest.raises(IndexError, match='there are 12 samples'): interp[12]


def test_rows_of_a_table_have_their_path_or_their_index(three):
    table = pd.DataFrame({'name': [str(o) for o in get_image_files(three)]}).assign(kind=lambda o: o.name.map(parent_label))
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('name'), get_y=ColReader('kind'), splitter=RandomSplitter(0.4, seed=1))
    learn = Learner(block.dataloaders(table, bs=4, num_workers=0, device='cpu'), mean_colour())
    frame = ClassificationInterpretation.from_learner(learn).to_frame()
    assert frame.path.tolist() == table.name.iloc[learn.dls.valid.dataset.splits[1]].tolist()
    assert frame.label.tolist() == [parent_label(o) for o in frame.path]
    rows = Interpretation.from_learner(learn).top_losses(2, items=True)[2]
    assert isinstance(rows, pd.DataFrame) and rows.name.tolist() == frame.sort_values('loss', ascending=False).path.tolist()[:2]
    numbers = DataBlock((TransformBlock(type_tfms=lambda row: torch.tensor([float(row['a'])])), CategoryBlock), get_y=ColReader('b'), splitter=lambda o: ([0, 1, 2], [3, 4]))
    learn = Learner(numbers.dataloaders(pd.DataFrame({'a': range(5), 'b': [0, 1, 0, 1, 0]}, index=list('abcde')), bs=2, num_workers=0, device='cpu'), nn.Linear(1, 2))
    assert Interpretation.from_learner(learn).to_frame()['item'].tolist() == ['d', 'e']


# Memory

def live_bytes():
    "Bytes of all dense tensors that exist now, each storage once (other tests may have left sparse and nested ones, which have none)"
    gc.collect()
    dense = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.layout == torch.strided and not (o.is_meta or o.is_nested)]
    storages = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in dense}
    return sum(storages.values())


class Masks(torch.utils.data.Dataset):
    "Big images and masks, made when they are asked for"
    def __init__(self, n, size): self.n, self.size = n, size
    def __len__(self): return self.n

    def __getitem__(self, i):
        if i >= self.n: raise IndexError(i)
        generator = torch.Generator().manual_seed(i)
        return torch.rand(3, self.size, self.size, generator=generator), torch.randint(0, 4, (self.size, self.size), generator=generator)


class Watched(nn.Module):
    "A pointwise model that notes how much there is in memory"
    def __init__(self):
        super().__init__()
        self.layer, self.most = nn.Conv2d(3, 4, 1), 0

    def forward(self, x):
        self.most = max(self.most, live_bytes())
        return self.layer(x)


def kept_by(n, size, kind=SegmentationInterpretation):
    "Bytes that an interpretation keeps, and the most that there were during the pass"
    dl = DataLoader(Masks(n, size), bs=2, num_workers=0)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), Watched(), CrossEntropyLossFlat(axis=1))
    before = live_bytes()
    interp = kind.from_learner(learn)
    return live_bytes() - before, learn.model.most - before, interp


def test_masks_are_not_kept():
    (few, few_most, _), (many, many_most, interp), (large, _, _) = kept_by(4, 64), kept_by(16, 64), kept_by(4, 128)
    assert many - few == 12 * (4 + 4 * 4), 'a loss and four IoU for each picture'
    assert large == few and few < 1000
    assert many_most - few_most < 12 * 100 < 64 * 64 * 4, 'less than one picture more, whatever their number'
    assert len(interp.losses) == 16
    assert kept_by(16, 64, Interpretation)[0] == 16 * 4


# Classifiers

@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(1, 40), st.integers(0, 10**6))
def test_confusions_are_counted_as_scikit_learn_does(classes, n, seed):
    sk = pytest.importorskip('sklearn.metrics')
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, classes, generator=generator), torch.randint(0, classes, (n,), generator=generator)
    learn = Learner([TorchLoader(TensorDataset(x, y), 7)] * 2, nn.Identity(), nn.CrossEntropyLoss(), default_cbs=False, opt_func=lambda *a, **k: None)
    interp = ClassificationInterpretation.from_learner(learn)
    assert (interp.confusion_matrix() == sk.confusion_matrix(y, x.argmax(1), labels=range(classes))).all()
    assert torch.allclose(interp.losses, F.cross_entropy(x, y, reduction='none'), atol=1e-5)
    confused = interp.most_confused()
    assert sum(o[2] for o in confused) == int((x.argmax(1) != y).sum()) and [o[2] for o in confused] == sorted((o[2] for o in confused), reverse=True)


@pytest.mark.parametrize('loss', [lambda pred, y: F.cross_entropy(pred, y), F.cross_entropy, nn.CrossEntropyLoss(), CrossEntropyLossFlat(), nn.CrossEntropyLoss(reduction='sum')])
def test_any_loss_has_losses_of_samples(three, loss):
    wanted = ClassificationInterpretation.from_learner(photo_learner(three)).to_frame()
    learn = photo_learner(three)
    learn.loss_func = loss
    interp = ClassificationInterpretation.from_learner(learn)
    agrees(interp.to_frame(), wanted)
    interp.plot_top_losses(2)
    assert titles()[0][0].split('/')[0] in learn.dls.vocab
    assert getattr(loss, 'reduction', 'mean') in ('mean', 'sum'), 'it is put back'


def test_yes_or_no_of_one_output():
    x, y = torch.tensor([[-2.], [3.], [0.5], [-1.]]), torch.tensor([0, 1, 0, 1])
    for target, loss in ((y, BCEWithLogitsLossFlat()), (y[:, None].float(), nn.BCEWithLogitsLoss())):
        learn = Learner([TorchLoader(TensorDataset(x, target), 3)] * 2, nn.Identity(), loss, default_cbs=False)
        interp = ClassificationInterpretation.from_learner(learn)
        assert interp.classes == [0, 1] and interp.confusion_matrix().tolist() == [[1, 1], [1, 1]]
        frame = interp.to_frame()
        assert frame.prediction.tolist() == [0, 1, 1, 0]
        np.testing.assert_allclose(frame.probability, [1 - torch.sigmoid(x[0]).item(), torch.sigmoid(x[1]).item(), torch.sigmoid(x[2]).item(), 1 - torch.sigmoid(x[3]).item()], rtol=1e-5)


LABELS = ['a', 'b', 'c']

def label_learner():
    sets = [{'a'}, {'a', 'b'}, set(), {'b', 'c'}, {'c'}, {'a', 'b', 'c'}]
    block = DataBlock((TransformBlock(type_tfms=lambda i: torch.tensor([1. + i, -2. + i, 2. - i])), MultiCategoryBlock(vocab=LABELS)), get_y=lambda i: sorted(sets[i]), splitter=lambda o: (range(2), range(6)))
    return Learner(block.dataloaders(range(6), bs=4, num_workers=0, device='cpu'), nn.Identity()), sets


def test_several_labels(capsys):
    sk = pytest.importorskip('sklearn.metrics')
    learn, sets = label_learner()
    interp = ClassificationInterpretation.from_learner(learn)
    said = [{o for o, v in zip(LABELS, (1 + i, i - 2, 2 - i)) if v > 0} for i in range(6)]
    frame = interp.to_frame(classes=True)
    assert frame.label.tolist() == sets and frame.prediction.tolist() == said
    assert [set(o) for o in frame.probability] == said and frame['p(b)'].tolist() == interp.preds[:, 1].tolist()
    true, guess = ([[o in s for o in LABELS] for s in many] for many in (sets, said))
    assert (interp.confusion_matrix() == sk.multilabel_confusion_matrix(true, guess)).all()
    assert dict(((a, b), n) for a, b, n in interp.most_confused())[('not a', 'a')] == sum('a' in s and 'a' not in t for s, t in zip(said, sets))
    ax = interp.plot_confusion_matrix()
    assert [o.get_width() for o in ax.patches[:3]] == [sum(o in s and o in t for s, t in zip(said, sets)) for o in LABELS]
    interp.print_classification_report()
    assert capsys.readouterr().out.strip() == sk.classification_report(true, guess, target_names=LABELS, zero_division=0).strip()
    interp.plot_top_losses(2)
    assert '/' in capsys.readouterr().out


def test_the_report_is_scikit_learns_and_its_absence_one_line(three, capsys, monkeypatch):
    sk = pytest.importorskip('sklearn.metrics')
    interp = ClassificationInterpretation.from_learner(photo_learner(three))
    interp.print_classification_report()
    frame = interp.to_frame()
    assert capsys.readouterr().out.strip() == sk.classification_report(frame.label, frame.prediction, zero_division=0, labels=['cat', 'dog', 'fox']).strip()
    monkeypatch.setitem(sys.modules, 'sklearn.metrics', None)
    with pytest.raises(ImportError, match=r"not installed: pip install 'lamella\[sklearn\]'"): interp.print_classification_report()


def test_a_hundred_classes_can_be_read():
    x = torch.eye(100).repeat(3, 1)
    y = torch.arange(100).repeat(3)
    y[:2] = 50 # two samples that look like 0 and 1, and are 50
    y[100] = 50
    learn = Learner([TorchLoader(TensorDataset(x, y), 50)] * 2, nn.Identity(), nn.CrossEntropyLoss(), default_cbs=False)
    ax = ClassificationInterpretation.from_learner(learn).plot_confusion_matrix()
    texts = [o.get_text() for o in ax.texts]
    assert len(texts) == 3 and '1. 50 as 0: 2' in texts[-1] and '2. 50 as 1: 1' in texts[-1]
    assert max(ax.figure.get_size_inches()) <= 12 and len(ax.get_xticklabels()) == 100


# What cannot be read, and what can only partly

def test_loaders_that_shuffle_give_a_table_without_items():
    x, y = torch.randn(20, 3), torch.randint(0, 3, (20,))
    learn = Learner([TorchLoader(TensorDataset(x, y), 5, shuffle=True)] * 2, nn.Identity(), nn.CrossEntropyLoss(), default_cbs=False)
    interp = ClassificationInterpretation.from_learner(learn)
    frame = interp.to_frame()
    assert frame['item'].isna().all() and len(frame) == 20
    with pytest.raises(TypeError, match='it shuffles'): interp[0]
    with pytest.raises(TypeError, match='needs a loader of lamella'): interp.plot_top_losses(2)
    ordered = ClassificationInterpretation.from_learner(learn, dl=TorchLoader(TensorDataset(x, y), 5))
    assert torch.equal(ordered[[7, 2]][0], x[[7, 2]])


def test_wrong_uses_are_said(three):
    learn = photo_learner(three)
    with pytest.raises(ValueError, match='with_labels=True'): Interpretation.from_learner(learn, dl=learn.dls.test_dl(get_image_files(three)))
    with pytest.raises(TypeError, match='a picture of class scores'): SegmentationInterpretation.from_learner(learn)
    with pytest.raises(TypeError, match='boxes'): DetectionInterpretation.from_learner(learn)
    with pytest.raises(TypeError, match='as many numbers'): RegressionInterpretation.from_learner(learn)


class OwnLosses(nn.Module):
    def forward(self, x, labels=None): return {'logits': x, 'loss': None if labels is None else F.cross_entropy(x, labels)}


def test_a_model_with_its_own_loss_has_decisions_and_with_single_samples_losses():
    x = torch.randn(12, 3)
    data = [{'x': o, 'labels': int(o.argmax() + i % 2) % 3} for i, o in enumerate(x)]
    learn = Learner([TorchLoader(data, 4)] * 2, OwnLosses(), default_cbs=False)
    interp = ClassificationInterpretation.from_learner(learn)
    assert interp.confusion_matrix().trace() == 6 and 'loss' not in interp.to_frame()
    with pytest.raises(TypeError, match='batches of one sample'): interp.top_losses(2)
    alone = ClassificationInterpretation.from_learner(learn, dl=TorchLoader(data, 1))
    assert torch.allclose(alone.losses, F.cross_entropy(x, torch.tensor([o['labels'] for o in data]), reduction='none'), atol=1e-6)


# Masks

class TakesGreen(nn.Module):
    "The green channel decides between four classes"
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0., .25, .5, .75]))

    def forward(self, x): return -(x[:, 1:2] - self.p[None, :, None, None]).abs() * 8


def mask_learner(shapes, ignore=None, **kwargs):
    codes = (shapes/'codes.txt').read_text().split()
    block = DataBlock((ImageBlock, MaskBlock(codes, ignore=ignore)), get_items=get_image_files, get_y=lambda o: shapes/'masks'/o.name, splitter=RandomSplitter(0.5, seed=0))
    return Learner(block.dataloaders(shapes/'images', bs=5, num_workers=0, device='cpu'), TakesGreen(), **kwargs)


@pytest.mark.parametrize('loss', [None, DiceLoss(), DiceLoss(reduction='mean')])
def test_masks_are_counted_as_from_whole_predictions(shapes, loss):
    learn = mask_learner(shapes, loss_func=loss)
    interp = SegmentationInterpretation.from_learner(learn)
    preds, targs = learn.get_preds()
    guess = preds.argmax(1)
    assert interp.confusion_matrix().tolist() == [[int(((targs == i) & (guess == j)).sum()) for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(interp.confusion_matrix('true').sum(1), 1), np.testing.assert_allclose(interp.confusion_matrix('pred').sum(0), 1)
    iou = lambda t, g, k: float(((t == k) & (g == k)).sum() / ((t == k) | (g == k)).sum())
    np.testing.assert_allclose(interp.per_class().iou, [iou(targs, guess, k) for k in range(4)], rtol=1e-6)
    frame = interp.to_frame()
    assert [o.name for o in frame.path] == [o.name for o in learn.dls.valid.dataset.items]
    np.testing.assert_allclose(frame['iou(square)'], [iou(t, g, 2) for t, g in zip(targs, guess)], rtol=1e-5)
    raw = learn.get_preds(act=lambda x: x)[0]
    np.testing.assert_allclose(frame.loss, [learn.loss_func(raw[i:i + 1], targs[i:i + 1]).item() for i in range(len(raw))], rtol=1e-4)
    from lamella.metrics import JaccardCoeffMulti
    assert interp.mean_iou == pytest.approx(JaccardCoeffMulti()(preds, targs))


def test_pixels_without_a_class_are_left_out(shapes):
    whole, without = SegmentationInterpretation.from_learner(mask_learner(shapes)), SegmentationInterpretation.from_learner(mask_learner(shapes, ignore=2))
    wanted = whole.confusion_matrix()
    wanted[2] = 0
    assert without.confusion_matrix().tolist() == wanted.tolist()
    learn = mask_learner(shapes, ignore=2)
    raw, targs = learn.get_preds(act=lambda x: x)
    losses = [F.cross_entropy(p[:, t != 255].T, t[t != 255]).item() for p, t in zip(raw, targs)]
    np.testing.assert_allclose(without.losses, losses, rtol=1e-4)
    assert without.per_class().loc['square', 'pixels'] == 0


def test_masks_are_shown_beside_the_picture(shapes):
    learn = mask_learner(shapes)
    interp = SegmentationInterpretation.from_learner(learn)
    interp.plot_top_losses(2)
    assert [o[0] for o in titles()] == ['input', 'target', f'prediction; loss {interp.top_losses(2)[0][0]:.2f}', 'input', 'target', f'prediction; loss {interp.top_losses(2)[0][1]:.2f}']
    import matplotlib.pyplot as plt
    drawn = [o.get_array() for o in plt.gcf().axes[1].images]
    mask = learn.dls.valid.dataset[int(interp.top_losses(1)[1])][1]
    assert (np.asarray(drawn[1]) == np.asarray(mask)).all()


# Pictures of other tasks

def test_classes_are_said_right_and_wrong(three):
    interp = ClassificationInterpretation.from_learner(photo_learner(three))
    interp.plot_top_losses(3)
    import matplotlib.pyplot as plt
    assert plt.gcf()._suptitle.get_text() == 'Prediction/Actual/Loss/Probability'
    frame = interp.to_frame().sort_values('loss', ascending=False)
    wanted = [(f'{o.prediction}/{o.label} / {o.loss:.2f} / {o.probability:.2f}', 'green' if o.prediction == o.label else 'red') for o in frame.itertuples()]
    assert titles() == wanted[:3]
    interp.plot_top_losses(range(3, 5), nrows=1, title='more')
    assert titles() == wanted[3:5] and plt.gcf()._suptitle.get_text() == 'more'
    interp.plot_top_losses(2, largest=False)
    assert titles() == wanted[::-1][:2]
    interp.show_results([0, 1])
    assert titles()[0][0] == f'{interp.to_frame().prediction[0]}\n{interp.to_frame().label[0]}'


def test_the_picture_of_a_row_is_the_file_of_the_row(three):
    "As in validation, also if the loader is that of the training, which flips every picture"
    import matplotlib.pyplot as plt
    learn = photo_learner(three, batch_tfms=Flip(p=1.))
    interp = ClassificationInterpretation.from_learner(learn, ds_idx=0)
    interp.plot_top_losses(1)
    path = interp.to_frame().sort_values('loss').path.iloc[-1]
    np.testing.assert_allclose(np.asarray(plt.gcf().axes[0].images[0].get_array()), np.asarray(Image.open(path)), atol=1)


def test_numbers_and_points(three):
    files = get_image_files(three)
    numbers = DataBlock((ImageBlock, RegressionBlock), get_y=lambda o: float(o.stem), splitter=RandomSplitter(0.5, seed=1))
    interp = RegressionInterpretation.from_learner(Learner(numbers.dataloaders(files, bs=4, num_workers=0, device='cpu'), mean_colour(1)))
    frame = interp.to_frame()
    assert frame.label.tolist() == [float(o.stem) for o in frame.path]
    np.testing.assert_allclose(frame.loss, frame.error ** 2, rtol=1e-4)
    interp.plot_top_losses(2)
    worst = frame.sort_values('loss').iloc[-1]
    assert titles()[0] == (f'{worst.prediction:.4g}/{worst.label:.4g} / {worst.loss:.2f}', 'black')
    interp.plot_predictions(), interp.plot_errors()
    points = DataBlock((ImageBlock, PointBlock), get_y=lambda o: [[2., 3.], [float(o.stem), 9.]], splitter=RandomSplitter(0.5, seed=1))
    interp = RegressionInterpretation.from_learner(Learner(points.dataloaders(files, bs=4, num_workers=0, device='cpu'), mean_colour(4)))
    flat = (interp.preds - interp.targs).reshape(-1, 2, 2)
    np.testing.assert_allclose(interp.to_frame().error, flat.norm(dim=-1).mean(1), rtol=1e-5)
    interp.plot_top_losses(1)
    import matplotlib.pyplot as plt
    target, guess = plt.gcf().axes[0].lines[-2:] # circles, crosses
    x, i = interp.targs, int(interp.top_losses(1)[1])
    np.testing.assert_allclose(target.get_xydata(), (x[i] + 1) * 8, rtol=1e-4)
    np.testing.assert_allclose(guess.get_xydata(), (interp.preds[i] + 1) * 8, rtol=1e-4)
    interp.plot_errors()


class TwoPictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = mean_colour()
    def forward(self, a, b): return self.model(a) - self.model(b)


def test_several_inputs_stand_side_by_side(three):
    block = DataBlock((ImageBlock, ImageBlock, CategoryBlock), n_inp=2, get_x=[lambda o: o, lambda o: o.with_name('1.jpg')], get_y=parent_label, splitter=RandomSplitter(0.5, seed=2))
    learn = Learner(block.dataloaders(get_image_files(three), bs=4, num_workers=0, device='cpu'), TwoPictures())
    interp = ClassificationInterpretation.from_learner(learn)
    assert [o.parent.name for o in interp.to_frame().path] == interp.to_frame().label.tolist()
    interp.plot_top_losses(2)
    import matplotlib.pyplot as plt
    assert len(titles()) == 2 and sum(len(ax.images) for ax in plt.gcf().axes) == 4


# Boxes

class Finds(nn.Module):
    "What a detector returns, by the sum of the pixels"
    def __init__(self, known):
        super().__init__()
        self.known, self.p = known, nn.Parameter(torch.zeros(1))

    def forward(self, x): return tuple(torch.stack(o) for o in zip(*(self.known[round(float(image.sum()), 2)] for image in x)))


class CountsBoxes(nn.Module):
    def activation(self, x): return x
    def decodes(self, x): return x
    def forward(self, pred, boxes, labels): return ((pred[1] > 0).sum(1) - (labels > 0).sum(1)).abs().float().mean()


def noisy_answers(boxes, labels, generator, k=6):
    "The targets, moved, doubled, left out, mistaken for others; filled up to `k`"
    found = []
    for box, label in zip(boxes, labels):
        if not label: continue
        for _ in range(int(torch.randint(0, 3, (1,), generator=generator))):
            other = int(torch.randint(1, 4, (1,), generator=generator)) if torch.rand(1, generator=generator) < 0.3 else int(label)
            moved = box + torch.randn(4, generator=generator) * 0.06
            if moved[2] > moved[0] and moved[3] > moved[1]: found.append((moved.clamp(-1, 1), other, float(torch.rand(1, generator=generator))))
    found = sorted(found, key=lambda o: -o[2])[:k]
    result = torch.zeros(k, 4), torch.zeros(k, dtype=torch.long), torch.zeros(k)
    for j, values in enumerate(found):
        for o, value in zip(result, values): o[j] = value
    return result


@pytest.fixture(scope='module')
def boxes(shapes):
    files, annotations = get_annotations(shapes/'annotations.json', prefix=str(shapes/'images') + '/')
    known = dict(zip(files, annotations))
    block = DataBlock((ImageBlock, BBoxBlock, BBoxLblBlock), n_inp=1, get_y=[lambda o: known[o][0], lambda o: known[o][1]], splitter=lambda o: (range(10), range(10, len(files))))
    dls = block.dataloaders(files, bs=4, num_workers=0, device='cpu')
    generator, answers = torch.Generator().manual_seed(5), {}
    for x, b, l in dls.valid:
        for image, *target in zip(x, b, l): answers[round(float(image.sum()), 2)] = noisy_answers(*target, generator)
    return Learner(dls, Finds(answers), CountsBoxes(), default_cbs=False), known


def of_coco(interp, learn, known):
    "The predictions that pycocotools matches: (image, score) of each that is right"
    coco_module, evaluation = pytest.importorskip('pycocotools.coco'), pytest.importorskip('pycocotools.cocoeval')
    truth, names, size = coco_module.COCO(), list(learn.dls.vocab), 48
    items = learn.dls.valid.dataset.items
    annotations = [{'id': i + 1, 'image_id': n, 'category_id': names.index(label), 'bbox': [b[0], b[1], b[2] - b[0], b[3] - b[1]], 'area': (b[2] - b[0]) * (b[3] - b[1]), 'iscrowd': 0}
                   for i, (n, b, label) in enumerate((n, b, label) for n, item in enumerate(items) for b, label in zip(*known[item]))]
    truth.dataset = {'images': [{'id': n} for n in range(len(items))], 'annotations': annotations, 'categories': [{'id': i} for i in range(1, len(names))]}
    truth.createIndex()
    rows = []
    for o in interp.boxes:
        if o.box is None: continue
        left, top, right, bottom = ((o.box.double() + 1) * size / 2).tolist()
        rows.append({'image_id': o.image, 'category_id': o.prediction, 'bbox': [left, top, right - left, bottom - top], 'score': o.score})
    run = evaluation.COCOeval(truth, truth.loadRes(rows), 'bbox')
    run.params.iouThrs, run.params.areaRng, run.params.areaRngLbl, run.params.maxDets = np.array([0.5]), [[0, 1e10]], ['all'], [100]
    run.evaluate()
    return {(o['image_id'], round(score, 5)) for o in run.evalImgs if o for score, match in zip(o['dtScores'], o['dtMatches'][0]) if match}


def test_right_boxes_are_those_of_coco(boxes, capsys):
    learn, known = boxes
    interp = DetectionInterpretation.from_learner(learn)
    right = {(o.image, round(o.score, 5)) for o in interp.boxes if o.kind == 'right'}
    assert right == of_coco(interp, learn, known) and len(right) > 7
    kinds = interp.to_frame().kind.value_counts()
    assert set(kinds.index) >= {'right', 'missed', 'duplicate', 'wrong class'}
    assert kinds['right'] + kinds['missed'] == sum(len(known[o][0]) for o in learn.dls.valid.dataset.items)


def test_boxes_as_a_table_and_as_pictures(boxes):
    learn, known = boxes
    interp = DetectionInterpretation.from_learner(learn)
    frame = interp.to_frame()
    missed = frame[frame.kind == 'missed'].iloc[0]
    pixels = [(missed[o] + 1) * 24 for o in ('left', 'top', 'right', 'bottom')]
    assert min(np.abs(np.array(b) - pixels).max() for b in known[missed.path][0]) < 1e-3 and missed.label in known[missed.path][1] and pd.isna(missed.prediction)
    per_class = interp.per_class()
    assert per_class.targets.tolist() == [sum(label == name for o in learn.dls.valid.dataset.items for label in known[o][1]) for name in per_class.index]
    assert (per_class.recall == per_class.right / per_class.targets).all()
    np.testing.assert_allclose(frame.loss.groupby(frame.image).first(), interp.losses[sorted(frame.image.unique())])
    interp.plot_patches('missed', k=2)
    import matplotlib.pyplot as plt
    first = interp._chosen('missed')[0]
    ax, box = plt.gcf().axes[0], (first.target + 1) * 24
    assert ax.get_title().startswith('missed') and ax.get_xlim()[0] < box[0] and ax.get_xlim()[1] > box[2]
    assert np.allclose(ax.patches[0].get_xy(), box[:2], atol=1e-3)
    interp.plot_kinds(), interp.plot_top_losses(2), interp.plot_patches(k=3)
    sure = DetectionInterpretation.from_learner(learn, min_score=0.7)
    assert all(o.box is None or o.score >= 0.7 for o in sure.boxes) and sum(o.kind == 'missed' for o in sure.boxes) >= (frame.kind == 'missed').sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6), st.integers(0, 5), st.integers(0, 10**6))
def test_matches_are_one_to_one_and_better_ones_come_first(k, m, seed):
    generator = torch.Generator().manual_seed(seed)
    def some(n):
        corner = torch.rand(n, 2, generator=generator) * 4
        return torch.cat([corner, corner + 1 + torch.rand(n, 2, generator=generator) * 3], 1), torch.randint(1, 3, (n,), generator=generator)
    (guess, labels), (true, classes) = some(k), some(m)
    scores = torch.rand(k, generator=generator)
    found = match_boxes(guess, labels, scores, true, classes)
    right, missed = [o for o in found if o.kind == 'right'], [o for o in found if o.kind == 'missed']
    assert [o.guess for o in found[:k]] == list(range(k)) and sorted(o.true for o in right + missed) == list(range(m))
    assert all(o.iou >= 0.5 and labels[o.guess] == classes[o.true] for o in right)
    best = {o.true: float(scores[o.guess]) for o in right}
    assert all(float(scores[o.guess]) <= best[o.true] for o in found if o.kind == 'duplicate')


def test_of_two_targets_a_box_takes_the_nearer_one():
    true, guess = torch.tensor([[0., 0, 10, 10], [0, 3, 10, 13]]), torch.tensor([[0., 2, 10, 12]])
    right, missed = match_boxes(guess, torch.ones(1), torch.tensor([0.5]), true, torch.ones(2))
    assert (right.kind, right.true, missed.true) == ('right', 1, 0) and right.iou == pytest.approx(9 / 11)


# fastai

def test_as_fastai(three, capsys):
    fastai = pytest.importorskip('fastai.vision.all')
    ours = photo_learner(three)
    valid = {str(o) for o in ours.dls.valid.dataset.items}
    dls = fastai.DataBlock((fastai.ImageBlock, fastai.CategoryBlock), get_y=fastai.parent_label, splitter=fastai.FuncSplitter(lambda o: str(o) in valid)).dataloaders(
        [fastai.Path(o) for o in get_image_files(three)], bs=5, num_workers=0, device='cpu')
    learn = fastai.Learner(dls, mean_colour(), loss_func=fastai.CrossEntropyLossFlat())
    with learn.no_bar(): theirs = fastai.ClassificationInterpretation.from_learner(learn)
    mine = ClassificationInterpretation.from_learner(ours)
    place = {str(o): i for i, o in enumerate(learn.dls.valid_ds.items)}
    order = [place[str(o)] for o in mine.to_frame().path]
    np.testing.assert_allclose(mine.losses, np.asarray(theirs.losses)[order], rtol=1e-3, atol=1e-5)
    with learn.no_bar():
        assert (mine.confusion_matrix() == theirs.confusion_matrix()).all()
        assert sorted(mine.most_confused()) == sorted((a, b, int(n)) for a, b, n in theirs.most_confused())
        losses, _, items = theirs.top_losses(4, items=True)
        assert [str(o) for o in items] == [str(o) for o in mine.top_losses(4, items=True)[2]]
        inputs, preds, targs, decoded, _ = theirs[[order[0]]]
        theirs.print_classification_report()
    for a, b in zip(mine[0][1:4], (preds, targs, decoded)): np.testing.assert_allclose(a, np.asarray(b), rtol=1e-4)
    said = capsys.readouterr().out
    mine.print_classification_report()
    assert capsys.readouterr().out.split() == said.split()
    import matplotlib.pyplot as plt
    with learn.no_bar(): theirs.plot_top_losses(4)
    wanted, head = [o[0] for o in titles()], plt.gcf()._suptitle.get_text()
    mine.plot_top_losses(4)
    assert [o[0] for o in titles()] == wanted and plt.gcf()._suptitle.get_text() == head


def test_losses_of_masks_as_fastai(shapes):
    fastai = pytest.importorskip('fastai.vision.all')
    ours = mask_learner(shapes)
    mine = SegmentationInterpretation.from_learner(ours)
    valid = {str(o) for o in ours.dls.valid.dataset.items}
    dls = fastai.SegmentationDataLoaders.from_label_func(shapes, [fastai.Path(o) for o in get_image_files(shapes/'images')], lambda o: shapes/'masks'/o.name, codes=(shapes/'codes.txt').read_text().split(),
                                                         bs=5, num_workers=0, device='cpu')
    learn = fastai.Learner(dls, TakesGreen(), loss_func=fastai.CrossEntropyLossFlat(axis=1))
    with learn.no_bar(): theirs = fastai.SegmentationInterpretation.from_learner(learn, dl=dls.test_dl([fastai.Path(o) for o in ours.dls.valid.dataset.items], with_labels=True))
    np.testing.assert_allclose(mine.losses, theirs.losses, rtol=1e-3)


class ReadyDataset(torch.utils.data.Dataset):
    "Pairs of picture and label, made when they are asked for"
    read = 0
    def __len__(self): return 20

    def __getitem__(self, i):
        type(self).read += 1
        return Image.new('RGB', (8, 8), (10 * i, 0, 0)), i % 2


def test_pictures_of_a_ready_dataset_are_not_read_again_for_a_table():
    dls = ImageDataLoaders.from_datasets(ReadyDataset(), bs=4, num_workers=0, device='cpu', valid_pct=0.5, seed=0)
    interp = ClassificationInterpretation.from_learner(Learner(dls, mean_colour(2)))
    before = ReadyDataset.read
    frame = interp.to_frame()
    assert frame['item'].tolist() == list(range(10)) and ReadyDataset.read <= before + 2
