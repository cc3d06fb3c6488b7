"""Reading what a model has learned: embeddings, Grad-CAM, cleaners, and the hooks of fastai's book."""
import importlib.util
import io
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_photos
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from lamella.data.types import plain
from lamella.interpret.embeddings import Embeddings, nearest, plot_embeddings, project, spread
from lamella.interpret.gradcam import GradCAM, plot_gradcam
from lamella.learner.features import LayerFeatures, as_map, pooled, widths_of
from lamella.learner.learner import Learner
from lamella.nets.hooks import Hook, hook_output, hook_outputs
from lamella.vision.all import ImageDataLoaders, PILImage, Resize, TensorImage, get_image_files, vision_learner


def loaders(path, size=32, bs=4, **kwargs):
    return ImageDataLoaders.from_folder(path, valid_pct=0.5, seed=1, item_tfms=Resize(size), bs=bs, num_workers=0, device='cpu', **kwargs)


def small_model(n_out=2):
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, n_out)))


@pytest.fixture
def learn(photos):
    learn = Learner(loaders(photos), small_model())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    return learn


# How an output is read

@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 3), channels=st.sampled_from([11, 24, 32]), h=st.integers(2, 7), w=st.integers(2, 7), others=st.integers(0, 5), kind=st.sampled_from(['first', 'last', 'tokens']))
def test_a_map_is_a_map_however_it_is_laid_out(n, channels, h, w, others, kind):
    maps = torch.rand(n, channels, h, w)
    tokens = torch.cat([torch.rand(n, others, channels), maps.flatten(2).mT], 1)
    given = {'first': maps, 'last': maps.movedim(1, -1), 'tokens': tokens}[kind]
    assert torch.equal(as_map(given, {channels}, (h * 8, w * 8), grid=(h, w)), maps)
    if kind != 'tokens': torch.testing.assert_close(pooled(given, {channels}), maps.mean((2, 3)))


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 30), features=st.integers(1, 6), k=st.integers(1, 8), seed=st.integers(0, 99))
def test_nearest_is_what_a_loop_finds(n, features, k, seed):
    rows = torch.randn(n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()
    cosines, numbers = nearest(rows, rows, k, without=range(n))
    for i in range(n):
        each = {j: float(F.cosine_similarity(rows[i], rows[j], dim=0)) for j in range(n) if j != i}
        best = sorted(each.values(), reverse=True)[:k]
        assert i not in numbers[i].tolist() and np.allclose(best, cosines[i], atol=1e-4)
        assert np.allclose([each[j] for j in numbers[i].tolist()], best, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 60), fields=st.integers(1, 6), seed=st.integers(0, 99))
def test_thumbnails_are_one_a_field(n, fields, seed):
    points = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed))
    chosen = spread(points, fields)
    low, high = points.amin(0), points.amax(0)
    place = ((points - low) / (high - low).clamp(min=1e-12) * fields).floor().clamp(max=fields - 1)
    assert len({tuple(o) for o in place[chosen].tolist()}) == len(chosen) == len({tuple(o) for o in place.tolist()})


# Embeddings

def test_embeddings_are_in_the_order_of_the_dataset(learn):
    xs = [learn.dls.train.in_order().make_batch([i])[0] for i in range(8)]
    learn.model.eval()
    with torch.no_grad(): known = torch.cat([learn.model[0](x).mean((2, 3)) for x in xs])
    torch.testing.assert_close(learn.get_embeddings(learn.dls.train.in_order()), known)
    assert learn.get_embeddings(ds_idx=0).shape == (8, 12) and learn.get_embeddings(ds_idx=0).dtype == torch.float32
    assert not torch.equal(learn.get_embeddings(), known)


@pytest.mark.parametrize('arch,features', [('test_vit', 64), ('test_convnext', 64), ('test_resnet', 96)])
def test_embeddings_of_timm(photos, arch, features):
    learn = vision_learner(loaders(photos, 160), arch, pretrained=False)
    found = learn.get_embeddings()
    assert found.shape == (8, features) and found.isfinite().all()
    body = learn.model[0].eval()
    with torch.no_grad(): known = torch.cat([body(x) for x, _ in learn.dls.valid])
    if known.dim() == 4: known = known.mean((2, 3))
    torch.testing.assert_close(found, known, atol=1e-4, rtol=1e-4)


def test_embeddings_of_a_plain_model_and_of_a_new_item(photos):
    from torchvision.models import SwinTransformer
    learn = Learner(loaders(photos, 64), SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=2))
    found = learn.get_embeddings()
    assert found.shape == (8, 32)
    file = learn.dls.valid_ds.items[3]
    torch.testing.assert_close(learn.get_embeddings(learn.dls.test_dl([file]))[0], found[3], atol=1e-4, rtol=1e-4)
    assert Embeddings.from_learner(learn).nearest(PILImage.create(file), k=1)[1].tolist() == [3]


def test_embeddings_of_a_map_to_map_model(photos):
    learn = Learner(loaders(photos), nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 9, 3, 2, 1), nn.Upsample(scale_factor=4), nn.Conv2d(9, 2, 1)), nn.CrossEntropyLoss())
    assert learn.get_embeddings().shape == (8, 9)


def test_the_layer_that_cannot_be_guessed_is_asked_for(photos):
    learn = Learner(loaders(photos), nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(ValueError, match='cannot be guessed: say layer='): learn.get_embeddings()
    assert learn.get_embeddings(layer='0').shape == (8, 2)
    assert not any(m._forward_hooks for m in learn.model.modules())


def test_a_layer_that_sees_pieces_is_refused(photos):
    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        def forward(self, x): return self.last(self.conv(torch.cat(x.chunk(2, 2))).mean((2, 3)).unflatten(0, (2, len(x))).mean(0))
    learn = Learner(loaders(photos), Pieces())
    assert learn.get_embeddings().shape == (8, 4)
    with pytest.raises(ValueError, match='has 8 rows for a batch of 4 samples'): learn.get_embeddings(layer='conv')


def test_only_features_are_kept(learn):
    "Neither pictures nor maps are kept from one batch to the next"
    with LayerFeatures(learn.model) as watched:
        for x, _ in learn.dls.valid:
            watched.take(learn.model(x), len(x))
            assert watched._seen == {} and all(h.stored is None for h in watched.hooks)


@pytest.mark.skipif(importlib.util.find_spec('umap') is None, reason='the extra umap is not installed')
def test_umap_keeps_groups_apart():
    groups = torch.cat([torch.randn(20, 6) * 0.1 + torch.eye(6)[k] * 5 for k in range(2)])
    points = project(groups, 'umap', n_neighbors=8, n_epochs=30)
    centres = points.unflatten(0, (2, 20)).mean(1)
    closer = torch.cdist(points, centres).argmin(1)
    assert points.shape == (40, 2) and (closer == torch.arange(40) // 20).all()


def test_a_missing_umap_names_what_there_is(monkeypatch):
    monkeypatch.setattr('lamella.interpret.embeddings.find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r"pip install lamella\[umap\], or take method='pca'"): project(torch.rand(5, 3), 'umap')


def test_maps_with_thumbnails(learn):
    ax = plot_embeddings(learn, ds_idx=0, thumbs=3)
    assert 1 < len(ax.child_axes) <= 9 and all(len(o.images) == 1 for o in ax.child_axes)
    assert [o.get_text() for o in ax.get_legend().get_texts()] == ['cat', 'dog']


# Grad-CAM

def test_heat_is_the_formula_of_the_paper_on_the_whole_graph(learn):
    "The same as with a graph of the whole network, hooks of the book, and no cut"
    x, _ = learn.dls.valid.one_batch()
    heat, pred = GradCAM(learn).heat(x, target=1)
    with hook_output(learn.model[0], detach=False) as hook: out = learn.model.eval()(x)
    maps = hook.stored
    slopes, = torch.autograd.grad(out[:, 1].sum(), maps)
    known = torch.relu((slopes.mean((2, 3), keepdim=True) * maps).sum(1)).detach()
    torch.testing.assert_close(heat, known)
    torch.testing.assert_close(pred, out.detach())
    assert known.max() > 0 or GradCAM(learn).heat(x, target=0)[0].max() > 0


def test_a_corner_that_tells_the_class_lights_up(tmp_path):
    rng, files = np.random.default_rng(0), []
    for k in range(48):
        pixels, corner = rng.integers(0, 200, (32, 32, 3), dtype=np.uint8), k // 2 % 4
        row, column = (16 * o + 4 for o in divmod(corner, 2))
        pixels[row:row + 8, column:column + 8, 2 * (k % 2)] += 55
        pixels[row:row + 8, column:column + 8, 1] //= 3
        Image.fromarray(pixels).save(tmp_path/f'{"rb"[k % 2]}_{corner}_{k}.png')
    dls = ImageDataLoaders.from_name_func(tmp_path, sorted(tmp_path.glob('*.png')), lambda name: name[0], valid_pct=0.25, seed=1, bs=12, num_workers=0, device='cpu')
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    learn = Learner(dls, nn.Sequential(body, nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 2))))
    with learn.no_bar(), learn.no_logging(): learn.fit(25, 1e-2)
    probs, targets = learn.get_preds(ds_idx=0)
    right = probs.argmax(1) == targets
    assert right.float().mean() > 0.9
    heat, _ = GradCAM(learn).heat(dls.train.in_order().make_batch(range(36))[0])
    quarters = heat.unflatten(2, (2, 4)).unflatten(1, (2, 4)).sum((2, 4)).flatten(1)
    corners = torch.tensor([int(o.name.split('_')[1]) for o in dls.train_ds.items])
    assert (quarters.argmax(1) == corners)[right].float().mean() > 0.9


def test_a_frozen_learner_is_left_as_it_was(learn):
    learn.model[0].requires_grad_(False)
    learn.model.train()
    learn.model[0][1].eval()
    state = lambda: ([m.training for m in learn.model.modules()], [(p.requires_grad, p.grad) for p in learn.model.parameters()], learn.model[0][1].running_mean.tolist(),
                     [len(m._forward_hooks) for m in learn.model.modules()])
    before = state()
    x, _ = learn.dls.valid.one_batch()
    with torch.no_grad(): heat, _ = GradCAM(learn).heat(x)
    assert state() == before and not heat.requires_grad
    learn.model[0].requires_grad_(True)
    torch.testing.assert_close(GradCAM(learn).heat(x)[0], heat)
    with pytest.raises(ValueError): GradCAM(learn, '1').heat(x)
    assert [len(m._forward_hooks) for m in learn.model.modules()] == before[3]


@pytest.mark.parametrize('arch,layer,grid', [('test_vit', 'blocks.5.norm1', (10, 10)), ('test_convnext', '', (5, 5)), ('test_resnet', '', (5, 5))])
def test_layers_of_timm(photos, arch, layer, grid):
    learn = vision_learner(loaders(photos, 160), arch, pretrained=False)
    cam = GradCAM(learn)
    heat, _ = cam.heat(learn.dls.valid.one_batch()[0])
    assert heat.shape[1:] == grid and cam.name.endswith(layer) and heat.sum() > 0


def test_a_swin_whose_channels_come_last(photos):
    from torchvision.models import SwinTransformer
    learn = Learner(loaders(photos, 64), SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=2))
    cam = GradCAM(learn)
    heat, _ = cam.heat(learn.dls.valid.one_batch()[0])
    assert heat.shape[1:] == (8, 8) and heat.sum() > 0


def test_pictures_of_heat(learn, photos):
    files = get_image_files(photos)
    axes = plot_gradcam(learn, [files[0], files[1]], target='dog')
    assert [ax.get_title().split()[0] for ax in axes] == ['dog', 'dog'] and all(len(ax.images) == 2 for ax in axes)
    assert axes[0].images[0].get_extent() == axes[0].images[1].get_extent()
    for ax, right in zip(plot_gradcam(learn, [0, 5], dl=learn.dls.valid), (learn.get_preds()[0].argmax(1) == learn.get_preds()[1])[[0, 5]]):
        assert ax.title.get_color() == ('green' if right else 'red')


# fastai's book, chapter 18, with the word fastai changed

def test_program_of_the_book(learn, photos):
    dls = learn.dls
    img = PILImage.create(get_image_files(photos)[0])
    x, = next(iter(dls.test_dl([img])))

    class HookOfBook:
        def __init__(self, m): self.hook = m.register_forward_hook(self.hook_func)
        def hook_func(self, m, i, o): self.stored = o.detach().clone()
        def __enter__(self, *args): return self
        def __exit__(self, *args): self.hook.remove()

    class HookBwd:
        def __init__(self, m): self.hook = m.register_full_backward_hook(self.hook_func)
        def hook_func(self, m, gi, go): self.stored = go[0].detach().clone()
        def __enter__(self, *args): return self
        def __exit__(self, *args): self.hook.remove()

    with HookBwd(learn.model[0][-2]) as hookg:
        with HookOfBook(learn.model[0][-2]) as hook:
            output = learn.model.eval()(x)
            act = hook.stored
        output[0, 1].backward()
        grad = hookg.stored
    cam_map = (grad[0].mean(dim=[1, 2], keepdim=True) * act[0]).sum(0)
    torch.testing.assert_close(GradCAM(learn, '0.3').heat(x, target=1)[0][0], cam_map.clamp(min=0))
    x_dec = TensorImage(dls.train.decode((x,))[0][0])
    assert x_dec.shape == (3, 32, 32) and x_dec.max() > 1 and torch.equal(x_dec, plain(dls.train.decode_batch((x,))[0][0]))
    _, ax = plt.subplots()
    x_dec.show(ctx=ax)
    ax.imshow(cam_map.detach().cpu(), alpha=0.6, extent=(0, 32, 32, 0), interpolation='bilinear', cmap='magma')

    with hook_output(learn.model[0]) as hook_a, hook_output(learn.model[0], grad=True) as hook_g:
        learn.model.eval()(x)[0, 1].backward()
    assert hook_a.stored.shape == hook_g.stored[0].shape == (1, 12, 8, 8)
    with hook_outputs(learn.model[0]) as hooks: learn.model(x)
    assert [tuple(o.shape[1:]) for o in hooks.stored][-1] == (12, 8, 8)
    back = Hook(learn.model[1][-1], lambda m, gi, go: go[0].shape, is_forward=False)
    learn.model(x).sum().backward()
    back.remove()
    assert back.stored == (1, 2)


# Cleaners

widgets = pytest.importorskip('lamella.vision.widgets')
needs_ipywidgets = pytest.mark.skipif(importlib.util.find_spec('ipywidgets') is None, reason='the extra widgets is not installed')


@needs_ipywidgets
def test_cleaner_in_the_words_of_fastai(learn, photos):
    cleaner = widgets.ImageClassifierCleaner(learn, max_n=3)
    losses = dict(zip(map(str, learn.dls.train.in_order().dataset.items), learn.get_preds(ds_idx=0, with_loss=True)[-1].tolist()))
    shown = [losses[str(o)] for o in cleaner.fns]
    cats = sorted((loss for name, loss in losses.items() if '/cat/' in name.replace('\\', '/')), reverse=True)
    assert shown == cats[:3] and {o.parent.name for o in cleaner.fns} == {'cat'}
    cells = cleaner.widget.children[2].children
    assert cells[0].children[1].options == ('<Keep>', '<Delete>', 'cat', 'dog')
    cells[1].children[1].value, cells[2].children[1].value = '<Delete>', 'dog'
    before = sorted(photos.rglob('*.jpg'))
    assert (cleaner.delete(), cleaner.change(), sorted(photos.rglob('*.jpg'))) == ([1], [(2, 'dog')], before)
    for idx in cleaner.delete(): cleaner.fns[idx].unlink()
    assert len(list(photos.rglob('*.jpg'))) == len(before) - 1 and cleaner.delete() == []
    cleaner.dd_ds.value, cleaner.dd_cats.value = 'Valid', 'dog'
    assert {o.parent.name for o in cleaner.fns} == {'dog'} and set(cleaner.fns) <= set(learn.dls.valid_ds.items)
    table = cleaner.to_frame()
    assert table.choice.tolist() == ['<Delete>', 'dog'] and table['set'].tolist() == ['train'] * 2 and table.label.tolist() == ['cat'] * 2
    cleaner.dd_ds.value, cleaner.dd_cats.value = 'Train', 'cat'
    assert cleaner.values() == ['<Keep>', '<Delete>', 'dog']
    assert type(cleaner.widget.children[2].children[1].children[0]).__name__ == 'Label' # the deleted one


@needs_ipywidgets
def test_a_page_with_the_cleaner_has_its_pictures(photos):
    from ipywidgets.embed import dependency_state, embed_data
    cleaner = widgets.ImagesCleaner(opts=('cat',), height=16, max_n=2)
    cleaner.set_fns(get_image_files(photos))
    state = embed_data(views=[cleaner.widget], state=dependency_state([cleaner.widget]))['manager_state']['state'].values()
    pictures = [o for o in state if o['model_name'] == 'ImageModel']
    choices = [o['state']['_options_labels'] for o in state if o['model_name'] == 'DropdownModel']
    assert len(pictures) == 2 and choices == [('<Keep>', '<Delete>', 'cat')] * 2 and json.dumps(list(state), default=str)
    data = pictures[0]['buffers'][0]['data']
    import base64
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (20, 16)


@needs_ipywidgets
def test_no_thumbnail_is_made_before_somebody_looks(photos, monkeypatch):
    opened = []
    real = widgets.PILImage.create.__func__
    monkeypatch.setattr(widgets.PILImage, 'create', classmethod(lambda cls, fn: opened.append(fn) or real(cls, fn)))
    cleaner = widgets.ImagesCleaner(max_n=4)
    cleaner.set_fns(get_image_files(photos))
    assert (opened, len(cleaner.fns), cleaner.delete()) == ([], 4, [])
    assert len(cleaner.widget.children) == 4 and len(opened) == 4


@needs_ipywidgets
def test_star_import_has_the_names_of_fastai():
    names = {}
    exec('from lamella.vision.widgets import *', names)
    import ipywidgets
    for name in 'HBox VBox Button Checkbox Dropdown Layout Box Output Label FileUpload'.split(): assert names[name] is getattr(ipywidgets, name)
    assert names['widgets'] is ipywidgets and {'widget', 'carousel', 'ImagesCleaner', 'ImageClassifierCleaner'} <= names.keys()
