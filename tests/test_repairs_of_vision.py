"""Faults that users of the vision part met: titles without colours, warnings about the wrong loaders, errors that led nowhere."""
import warnings

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from lamella.data.blocks import CategoryBlock, RegressionBlock, TransformBlock
from lamella.data.datablock import DataBlock
from lamella.data.labels import parent_label
from lamella.data.multilabel import MultiCategoryBlock
from lamella.data.sources import get_image_files
from lamella.data.splitters import RandomSplitter
from lamella.interpret import Interpretation
from lamella.interpret.gradcam import GradCAM
from lamella.learner.learner import Learner
from lamella.losses import CrossEntropyLossFlat
from lamella.vision.data import ImageBlock, MaskBlock
from lamella.vision.detection_data import DetectionDataLoaders
from lamella.vision.detection_learner import detection_learner
from lamella.vision.shapes import make_shapes

from conftest import make_photos

HERE = dict(num_workers=0, device='cpu')


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return make_photos(tmp_path_factory.mktemp('photos'), ('cat', 'dog', 'fox'), n=4, size=(16, 16))


@pytest.fixture(scope='module')
def shapes(tmp_path_factory): return make_shapes(tmp_path_factory.mktemp('shapes'), n=8, size=64, seed=3)


class Fixed(nn.Module):
    "Returns the same for each picture"
    def __init__(self, *values):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(values))

    def forward(self, x): return self.p.expand(len(x), -1)


def block(path, blocks, get_y, **kwargs):
    return DataBlock(blocks, get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(0.5, seed=1), **kwargs).dataloaders(path, bs=4, **HERE)


def titles():
    found = [(ax.get_title(), ax.title.get_color()) for ax in plt.gcf().axes if ax.get_title()]
    plt.close('all')
    return found


# ---- titles

def test_a_class_is_written_once_in_green_or_red(photos):
    interp = Interpretation.from_learner(Learner(block(photos, (ImageBlock, CategoryBlock), parent_label), Fixed(2., 1., 0.)))
    truth = [parent_label(o) for o in interp.top_losses(items=True)[2]]
    interp.plot_top_losses(6)
    seen = titles()
    assert {t for t in truth} > {'cat'}, 'right and wrong ones are needed'
    for (text, color), wanted, loss in zip(seen, truth, interp.top_losses()[0].tolist()):
        assert (text, color) == (f'cat/{wanted} / {loss:.2f} / 0.67', 'green' if wanted == 'cat' else 'red')
    interp.show_results(range(6))
    assert titles() == [(f'cat\n{o}', 'green' if o == 'cat' else 'red') for o in map(parent_label, interp.dl.dataset.items)]


def test_several_labels_are_written_once(photos):
    interp = Interpretation.from_learner(Learner(block(photos, (ImageBlock, MultiCategoryBlock), lambda o: [parent_label(o), 'pet']), Fixed(1., -1., -1., 1.)))
    interp.plot_top_losses(6)
    seen = titles()
    assert {c for _, c in seen} == {'green', 'red'}
    for text, color in seen: assert text.count('cat;pet/') == 1 and '\n' not in text and (color == 'green') == ('cat;pet/cat;pet' in text)


def test_numbers_are_written_once_in_black(photos):
    interp = Interpretation.from_learner(Learner(block(photos, (ImageBlock, RegressionBlock), lambda o: float(o.stem)), Fixed(1.5)))
    loss, _, files = interp.top_losses(1, items=True)
    interp.plot_top_losses(1)
    assert titles() == [(f'1.5/{float(files[0].stem):.4g} / {loss.item():.2f}', 'black')]


def test_without_a_picture_it_is_printed(capsys):
    dls = DataBlock((TransformBlock(type_tfms=lambda i: torch.tensor([float(i)])), CategoryBlock(vocab=['a', 'b'])), get_y=lambda i: 'ab'[i % 2], splitter=lambda o: (range(2), range(6))).dataloaders(range(6), bs=4, **HERE)
    interp = Interpretation.from_learner(Learner(dls, Fixed(1., 0.), CrossEntropyLossFlat()))
    interp.plot_top_losses(2)
    assert capsys.readouterr().out.count('a/b / 1.31 / 0.73') == 2
    interp.show_results([0])
    assert capsys.readouterr().out.split() == ['a', 'a']


# ---- other loaders

def test_loaders_are_compared_with_the_first_ones(photos):
    def made(names): return block(photos, (ImageBlock, CategoryBlock(vocab=names, sort=False)), parent_label)
    learn = Learner(made(['cat', 'dog', 'fox']), Fixed(2., 1., 0.))
    for _ in range(2):
        with pytest.warns(UserWarning, match=r'other classes \(3: fox, dog, cat\) .* \(3: cat, dog, fox\)'): learn.dls = made(['fox', 'dog', 'cat'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.dls = made(['cat', 'dog', 'fox'])


# ---- the summary

def task_of(learn): return next((o[6:] for o in str(learn.summary()).split('\n') if o.startswith('Task: ')), None)


def test_the_summary_says_each_task(photos):
    assert task_of(Learner(block(photos, (ImageBlock, CategoryBlock), parent_label), Fixed(2., 1., 0.))) == 'classification of 3 classes'
    dls = block(photos, (ImageBlock, CategoryBlock, RegressionBlock), [parent_label, lambda o: float(o.stem)], n_inp=1)
    assert task_of(Learner(dls, Fixed(2., 1.), loss_func=CrossEntropyLossFlat())) == 'classification of 3 classes, regression'


# ---- detectors

@pytest.fixture(scope='module')
def detector(shapes):
    torch.manual_seed(0)
    dls = DetectionDataLoaders.from_coco(shapes/'annotations.json', shapes/'images', seed=1, bs=4, **HERE)
    return detection_learner(dls, 'fcos', backbone='resnet10t', pretrained=False, width=32, levels=3, head_convs=1)


def test_the_background_is_no_class(detector): assert task_of(detector) == f'detection of {len(detector.dls.vocab) - 1} classes'


def test_embeddings_of_a_detector(detector):
    body, n = detector.model.detector.backbone.body, len(detector.dls.valid_ds)
    found = detector.get_embeddings()
    seen = []
    handle = body.register_forward_hook(lambda m, x, out: seen.append(out[-1].mean((2, 3))))
    detector.get_preds()
    handle.remove()
    assert found.shape == (n, 512)
    torch.testing.assert_close(found, torch.cat(seen).detach())
    assert detector.get_embeddings(layer='detector.backbone').shape == (n, 32)


def test_gradcam_of_a_detector_is_told_what_to_explain(detector):
    picture = detector.dls.one_batch()[0][:1]
    with pytest.raises(TypeError, match=r'boxes, labels and scores: say target='): GradCAM(detector).heat(picture)
    threshold, detector.model.score_thresh = detector.model.score_thresh, 0.
    cam = GradCAM(detector, 'detector.backbone.body.layer4')
    for_it, against = (cam.heat(picture, target=lambda pred: sign * pred[2].sum(1))[0] for sign in (1, -1))
    detector.model.score_thresh = threshold
    assert for_it.shape == against.shape == (1, 2, 2) and max(for_it.max(), against.max()) > 0, 'the score depends on the layer'


# ---- errors

def test_a_folder_is_no_damaged_picture(photos):
    "It stands for the pictures in it; as an item of a list it is a mistake"
    learn = Learner(block(photos, (ImageBlock, CategoryBlock), parent_label), Fixed(2., 1., 0.))
    assert learn.predict(photos).items == get_image_files(photos)
    with pytest.raises(Exception) as caught: learn.predict([photos])
    said = '\n'.join([str(caught.value), *getattr(caught.value, '__notes__', [])])
    assert 'get_image_files(' in said and 'remove it' not in said and 'damaged' not in said


# ---- tta

def test_tta_without_anything_random_is_the_plain_prediction(shapes, detector):
    codes = (shapes/'codes.txt').read_text().split()
    dls = block(shapes/'images', (ImageBlock, MaskBlock(codes)), lambda o: shapes/'masks'/f'{o.stem}.png')
    torch.manual_seed(0)
    learn = Learner(dls, nn.Conv2d(3, len(codes), 1), CrossEntropyLossFlat(axis=1))
    for each in (learn, detector):
        wanted = each.get_preds()[0]
        with pytest.warns(UserWarning, match='plain predictions'): torch.testing.assert_close(each.tta()[0], wanted)
        with pytest.warns(UserWarning, match='plain predictions'): torch.testing.assert_close(each.tta(beta=None)[0], (wanted, wanted))
