"""Looking at what a model learned, for every task: the metric of the task, pictures of results, thresholds, points in pixels, and larger pictures for the same learner."""
import json
import warnings

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from lamella.losses import BaseLoss, BCEWithLogitsLossFlat
from lamella.metrics import accuracy, best_thresholds
from lamella.vision.all import (BBoxBlock, BBoxLblBlock, CategoryBlock, DataBlock, ImageBlock, Learner, MultiCategoryBlock, Normalize, PILImage, PointBlock, RandomSplitter, RegressionBlock,
    Resize, SegmentationDataLoaders, aug_transforms, get_annotations, get_image_files, load_learner, set_seed, vision_learner)
from lamella.vision.shapes import make_shapes


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    "Twelve pictures of one to three shapes"
    return make_shapes(tmp_path_factory.mktemp('shapes'), n=12, size=48, seed=3)

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

def found_in(o):
    "Boxes and names of a picture"
    names, things = get_annotations(o.parents[1]/'annotations.json')
    return dict(zip(names, things))[o.name]

def first_name(o): return found_in(o)[1][0]
def all_names(o): return sorted(set(found_in(o)[1]))
def count(o): return float(len(found_in(o)[1]))
def corners(o):
    left, top, right, bottom = found_in(o)[0][0]
    return [[left, top], [right, bottom]]

BLOCKS = {'classification': (CategoryBlock(vocab=['circle', 'square', 'triangle']), first_name), 'multi-label': (MultiCategoryBlock(vocab=['circle', 'square', 'triangle']), all_names),
    'regression': (RegressionBlock, count), 'points': (PointBlock, corners)}

def loaders(path, task, **kwargs):
    block, get_y = BLOCKS[task]
    block = DataBlock((ImageBlock, block), get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(0.5, seed=1), **kwargs)
    return block.dataloaders(path/'images', bs=4, num_workers=0, seed=1, device='cpu', path=path)

class Tiny(nn.Module):
    "The smallest network that sees something"
    def __init__(self, n_out):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4)), nn.Linear(128, n_out)

    def forward(self, x): return self.head(self.body(x).flatten(1))

def titles(): return [(ax.get_title(), ax.title.get_color()) for ax in plt.gcf().axes]


# Loss and metric of the task

@pytest.mark.parametrize('task, loss, metric, n', [('classification', 'CrossEntropyLossFlat()', 'error_rate', 3), ('multi-label', 'BCEWithLogitsLossFlat()', 'f1_score', 3),
    ('regression', 'MSELossFlat()', 'rmse', 1), ('points', 'MSELossFlat()', 'point_distance', 4)])
def test_chosen_by_the_task(path, task, loss, metric, n):
    "Loss, metric and outputs fit, and the summary says them"
    dls = loaders(path, task)
    learn = vision_learner(dls, 'torchvision:resnet18', pretrained=False)
    assert (dls.task, dls.c, repr(learn.loss_func), [o.name for o in learn.metrics]) == (task, n, loss, [metric])
    assert len(learn.validate()) == 2
    text = learn.summary()
    for part in (f'Task: {task}', f'Loss function: {loss}', f'Metrics: {metric}'): assert part in text
    assert vision_learner(dls, 'torchvision:resnet18', pretrained=False, metrics=[]).metrics == []
    assert [o.name for o in vision_learner(dls, 'torchvision:resnet18', pretrained=False, metrics=accuracy).metrics] == ['accuracy']
    assert Learner(dls, Tiny(n)).metrics == [] # as in fastai


# Pictures

def test_results_of_classes(path):
    "As many as asked for, though the batches are smaller; green where right"
    learn = Learner(loaders(path, 'classification'), Tiny(3))
    learn.show_results(max_n=6, shuffle=False)
    decided, targets = learn.get_preds(with_decoded=True)[2], learn.get_preds()[1]
    vocab = learn.dls.vocab
    assert titles() == [(f'{vocab[t]}\n{vocab[d]}', 'green' if t == d else 'red') for t, d in zip(targets, decided)] and len(titles()) == 6

def test_places_given(path):
    "`ctxs`, `figsize`, `nrows`, `ncols` and options of pictures reach their places"
    learn = Learner(loaders(path, 'classification'), Tiny(3))
    ctxs = list(plt.subplots(1, 3)[1])
    learn.show_results(max_n=2, ctxs=ctxs)
    assert all(ax.images for ax in ctxs[:2]) and not ctxs[2].images
    learn.show_results(max_n=4, nrows=1, figsize=(8, 2), interpolation='nearest')
    assert plt.gcf().get_size_inches().tolist() == [8, 2] and len({round(ax.get_position().y0, 3) for ax in plt.gcf().axes}) == 1
    assert plt.gcf().axes[0].images[0].get_interpolation() == 'nearest'
    with pytest.raises(ValueError, match='need 4 places'): learn.show_results(max_n=4, ctxs=ctxs)

def test_results_of_labels(path):
    "What is missing and what is too much"
    learn = Learner(loaders(path, 'multi-label'), Tiny(3))
    learn.model.head.weight.data.zero_()
    learn.model.head.bias.data.copy_(torch.tensor([9., -9, -9])) # always: circle
    learn.show_results(max_n=6, shuffle=False)
    for (text, color), o in zip(titles(), learn.dls.valid.dataset.items):
        names = all_names(o)
        lines = [';'.join(names), 'circle']
        missing, more = [n for n in names if n != 'circle'], [] if 'circle' in names else ['circle']
        if missing or more: lines.append(', '.join([f'missing {", ".join(missing)}'] * bool(missing) + [f'too much {", ".join(more)}'] * bool(more)))
        assert (text, color) == ('\n'.join(lines), 'red' if missing or more else 'green')

def test_results_of_numbers(path):
    learn = Learner(loaders(path, 'regression'), Tiny(1))
    learn.show_results(max_n=2, shuffle=False)
    assert all('predicted' in text and color == 'black' for text, color in titles())

def test_results_of_points(path):
    "Target and prediction in two shapes, with a legend and the distance"
    learn = Learner(loaders(path, 'points'), Tiny(4))
    learn.show_results(max_n=2, shuffle=False)
    ax = plt.gcf().axes[0]
    assert [line.get_marker() for line in ax.lines if line.get_linestyle() == 'None'] == ['o', 'x']
    assert ax.get_title().startswith('off by ') and [o.get_text() for o in plt.gcf().legends[0].get_texts()] == ['target', 'prediction']
    shown = torch.tensor([line.get_xydata() for line in ax.lines if line.get_marker() == 'o'][0])
    torch.testing.assert_close(shown, torch.tensor(corners(learn.dls.valid.dataset.items[0])).to(shown.dtype), atol=1e-4, rtol=0)

def masks(path, **kwargs):
    codes = (path/'codes.txt').read_text().split()
    return SegmentationDataLoaders.from_label_func(path, get_image_files(path/'images'), lambda o: path/'masks'/o.name, codes=codes, bs=4, valid_pct=0.5, num_workers=0, seed=1, device='cpu', **kwargs)

def test_results_of_masks(path):
    "Side by side, with the share of the pixels and the names of the classes"
    learn = Learner(masks(path), nn.Conv2d(3, 4, 1))
    learn.dls.show_batch(max_n=2)
    assert [o.get_text() for o in plt.gcf().legends[0].get_texts()] == ['background', 'circle', 'square', 'triangle']
    learn.show_results(max_n=2, shuffle=False)
    preds, targets = learn.get_preds()
    share = (preds[0].argmax(0) == targets[0]).float().mean()
    assert [text for text, _ in titles()[:2]] == ['target', f'prediction\n{float(share):.0%} right']

class Known(nn.Module):
    "A detector that was told the boxes of the first batch, and gives the first thing another name"
    def __init__(self, boxes, labels):
        super().__init__()
        self.boxes, self.labels, self.weight = boxes, labels.clone(), nn.Parameter(torch.zeros(1))
        self.labels[0, 0] = self.labels[0, 0] % 3 + 1

    def forward(self, x):
        n = len(x)
        return self.boxes[:n], self.labels[:n], (self.labels[:n] > 0) * torch.linspace(0.9, 0.5, self.labels.shape[1])

class NoLoss(BaseLoss):
    def forward(self, pred, *targ): return pred[0].sum() * 0

def boxes(path, **kwargs):
    block = DataBlock((ImageBlock, BBoxBlock, BBoxLblBlock), n_inp=1, get_items=get_image_files, get_y=[lambda o: found_in(o)[0], lambda o: found_in(o)[1]], splitter=RandomSplitter(0.5, seed=1), **kwargs)
    return block.dataloaders(path/'images', bs=6, num_workers=0, seed=1, device='cpu')

def test_results_of_boxes(path):
    "One picture for each, with the boxes that were predicted"
    dls = boxes(path)
    _, b, labels = dls.valid.one_batch()
    Learner(dls, Known(b, labels), loss_func=NoLoss()).show_results(max_n=2, shuffle=False)
    assert [len(ax.images) for ax in plt.gcf().axes] == [1, 1] and all(ax.patches for ax in plt.gcf().axes)

def test_results_of_two_pictures(path):
    "Each input has its place, and the answer is above the last one"
    block = DataBlock((ImageBlock, ImageBlock, CategoryBlock), n_inp=2, get_items=get_image_files, splitter=RandomSplitter(0.5, seed=1), getters=[lambda o: o, lambda o: o, lambda o: 'ab'[int(o.stem) % 2]])
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 2)
        def forward(self, a, b): return self.head(torch.cat([a.mean((2, 3)), b.mean((2, 3))], 1))
    learn = Learner(block.dataloaders(path/'images', bs=4, num_workers=0, seed=1, device='cpu'), Two())
    learn.show_results(max_n=2)
    assert [bool(ax.images) for ax in plt.gcf().axes] == [True] * 4 and [bool(text) for text, _ in titles()] == [False, True, False, True]


# Thresholds

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 40), st.sampled_from([0.5, 1., 2.]))
def test_best_thresholds(seed, n, beta):
    "No other threshold from 0 to 1 has a larger F"
    rng = torch.Generator().manual_seed(seed)
    probs, targs = torch.rand(n, 3, generator=rng).mul(20).round().div(20), torch.rand(n, 3, generator=rng) < torch.tensor([0.5, 0.2, 0.05])
    def score(limits):
        said = probs > limits
        right, both = (said & targs).sum(0), beta ** 2 * targs.sum(0) + said.sum(0)
        return (1 + beta ** 2) * right / both.clamp(min=1)
    best = score(best_thresholds(probs, targs, beta))
    for t in torch.linspace(0, 1, 41): assert (score(t) <= best + 1e-6).all()

def test_thresholds_are_exported(path, tmp_path):
    "What was chosen decides in the learner, in the picture, and in the file, which holds no code"
    set_seed(2)
    learn = vision_learner(loaders(path, 'multi-label'), 'torchvision:resnet18', pretrained=False, loss_func=BCEWithLogitsLossFlat(thresh=[0.1, 0.5, 0.9]))
    chosen = learn.find_thresholds()
    assert list(chosen) == ['circle', 'square', 'triangle'] and list(chosen.values()) != [0.1, 0.5, 0.9]
    learn.loss_func.thresh = torch.tensor([0.0, 1.0, 0.0]) # the middle one never, the others always
    loaded = load_learner(learn.export(tmp_path/'labels.pkl'))
    file = get_image_files(path/'images')[0]
    assert list(learn.predict(file)[0]) == list(loaded.predict(file)[0]) == ['circle', 'triangle']
    assert loaded.predict(file).thresholds == {'circle': 0., 'square': 1., 'triangle': 0.}
    with pytest.raises(ValueError, match='3 classes'):
        learn.loss_func.thresh = [0.1, 0.2]
        learn.predict(file)


# Points

def test_points_from_end_to_end(path, tmp_path):
    "Trained, predicted in pixels of the given picture, exported"
    dls = loaders(path, 'points', batch_tfms=aug_transforms(max_warp=0., max_rotate=0., do_flip=False, max_zoom=1.))
    learn = Learner(dls, Tiny(4), lr=1e-2, metrics=vision_learner(dls, 'torchvision:resnet18', pretrained=False).metrics)
    before = learn.validate()
    with learn.no_bar(), learn.no_logging(): learn.fit(12)
    assert learn.validate()[1] < before[1] < 2
    file = dls.valid.dataset.items[0]
    label, decision, _ = learn.predict(file)
    assert label.shape == (2, 2) and decision.shape == (4,)
    torch.testing.assert_close(label.as_subclass(torch.Tensor), (decision.view(2, 2) + 1) * 48 / 2)
    learn.model = vision_learner(dls, 'torchvision:resnet18', pretrained=False).model
    loaded = load_learner(learn.export(tmp_path/'points.pkl'))
    torch.testing.assert_close(loaded.predict(file)[0].as_subclass(torch.Tensor), learn.predict(file)[0].as_subclass(torch.Tensor))


# Other loaders for the same learner

def test_progressive_resizing(path, tmp_path):
    "Small pictures, then large ones: the model goes on, and the file resizes as the last loaders do"
    dls = loaders(path, 'classification', item_tfms=Resize(24))
    weights = vision_learner(dls, 'torchvision:resnet18', pretrained=False).model
    learn = vision_learner(dls, 'torchvision:resnet18', weights={k.removeprefix('_'): v for k, v in __import__('torchvision').models.resnet18().state_dict().items()})
    model, mean = learn.model, dls.valid.after_batch.find(Normalize).mean
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    learn.dls = loaders(path, 'classification', item_tfms=Resize(40), batch_tfms=aug_transforms())
    assert learn.model is model and all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())
    assert torch.equal(learn.dls.valid.after_batch.find(Normalize).mean, mean) and learn.dls.one_batch()[0].shape[-2:] == (40, 40)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    assert len(learn.recorder.values) == 1 and not torch.equal(model[0][0].weight, trained['0.0.weight'])
    loaded = load_learner(learn.export(tmp_path/'large.pkl'))
    file = learn.dls.valid.dataset.items[0]
    torch.testing.assert_close(loaded.predict(file)[2], learn.predict(file)[2])
    spec = json.dumps(loaded.spec['pipeline'])
    assert '40' in spec and 'Normalize' in spec and weights is not model

def test_other_classes_are_told(path):
    learn = Learner(loaders(path, 'classification'), Tiny(3))
    with pytest.warns(UserWarning, match='other classes'):
        learn.dls = DataBlock((ImageBlock, CategoryBlock(vocab=['triangle', 'square', 'circle'], sort=False)), get_items=get_image_files, get_y=first_name).dataloaders(path/'images', bs=4, num_workers=0)
    with pytest.warns(UserWarning, match="the task 'classification'"): learn.dls = loaders(path, 'regression')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.dls = loaders(path, 'classification', item_tfms=Resize(16))

def test_changed_transforms(path):
    "In `dls.new`, what resizes and what is random gives way; what is always needed stays"
    dls = loaders(path, 'classification', item_tfms=Resize(24), batch_tfms=[*aug_transforms(), Normalize.from_stats([0.5] * 3, [0.5] * 3)])
    made = dls.new(bs=3, item_tfms=Resize(16), batch_tfms=aug_transforms(size=12))
    assert made.one_batch()[0].shape == (3, 3, 12, 12) and dls.one_batch()[0].shape == (4, 3, 24, 24)
    for dl in made: assert [sum(type(f).__name__ == name for f in [*dl.after_item.fs, *dl.after_batch.fs]) for name in ('Resize', 'Normalize', 'Flip', 'IntToFloatTensor', 'ToTensor')] == [1] * 5
    assert PILImage.create(get_image_files(path/'images')[0]).to_thumb(10).size == (10, 10)
