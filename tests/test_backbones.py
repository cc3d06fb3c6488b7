"""Backbones of every kind: built, grouped, adapted to other channels and sizes, exported, and what is said of those that cannot be."""
import json
import warnings
import zipfile

import pytest
import timm
import torch
import torchvision
from torch import nn

from lamella.base.pickling import UntrustedError
from lamella.base.registry import register
from lamella.vision.all import ImageDataLoaders, Resize, load_learner, vision_learner
from lamella.vision.bodies import made_for
from lamella.vision.nets import build_body, create_timm_model, create_vision_model, find_architecture, model_meta, rebuild_vision_model, vision_splitter

# One small network of every kind: families of timm and of torchvision whose bodies differ in how they are cut, pooled and grouped.
NETWORKS = ['test_convnext', 'test_efficientnet', 'test_vit', 'test_nfnet', 'test_mambaout', 'test_byobnet', 'test_resnet', 'test_coatnet', 'test_vit_relpos',
            'mobilevit_xxs', 'mobilenetv3_small_050', 'ese_vovnet19b_slim_dw', 'edgenext_xx_small', 'efficientvit_m0', 'ghostnet_050', 'regnetx_002', 'starnet_s1',
            'repghostnet_050', 'levit_128s', 'pit_ti_224', 'swin_tiny_patch4_window7_224', 'vit_tiny_patch16_224',
            'torchvision:squeezenet1_1', 'torchvision:mobilenet_v3_small', 'torchvision:mnasnet0_5', 'torchvision:shufflenet_v2_x0_5', 'torchvision:resnet18',
            'torchvision:regnet_y_400mf', 'torchvision:efficientnet_b0', 'torchvision:densenet121', 'torchvision:googlenet', 'torchvision:swin_t']
SMALLER = {'swin_tiny_patch4_window7_224': dict(img_size=56, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2)), 'vit_tiny_patch16_224': dict(img_size=32, depth=4)}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def size_for(model: nn.Module) -> tuple[int, int]:
    "The size that it was made for, or a small one"
    inner = getattr(model[0], 'model', model[0])
    return made_for(inner) if (getattr(inner, 'pretrained_cfg', None) or {}).get('fixed_input_size') else (64, 64)


@pytest.mark.parametrize('name', NETWORKS)
def test_networks(name: str):
    "Body and head fit; three groups with every parameter in one of them; all parameters are used; a file builds the same"
    model = create_vision_model(name, 3, pretrained=False, **SMALLER.get(name, {}))
    x = torch.rand(2, 3, *size_for(model))
    out = model.train()(x)
    assert out.shape == (2, 3)
    out.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    groups = vision_splitter(model)
    ids = [id(p) for group in groups for p in group]
    assert len(groups) == 3 and len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    assert {id(p) for p in groups[-1]} == {id(p) for p in model[1].parameters()}
    first, second = (sum(p.dim() > 1 for p in group) for group in groups[:2])
    assert min(first, second) * 4 >= max(first, second), (first, second)
    again = rebuild_vision_model(**model.built_by[1])
    again.load_state_dict(model.state_dict())
    with torch.no_grad(): assert torch.equal(again.eval()(x), model.eval()(x))


# Learners

def pictures(folder, n=6, size=64):
    "Bright and dark noise"
    from PIL import Image
    generator = torch.Generator().manual_seed(0)
    for name, light in (('dark', 60), ('light', 190)):
        (folder/name).mkdir(parents=True)
        for i in range(n): Image.fromarray((torch.rand(size, size, 3, generator=generator) * 60 + light).byte().numpy()).save(folder/name/f'{i}.png')
    return folder


@pytest.fixture
def make_dls(tmp_path):
    folder = pictures(tmp_path/'pictures')
    return lambda size=64, **kwargs: ImageDataLoaders.from_folder(folder, valid_pct=0.5, seed=1, item_tfms=Resize(size), bs=2, num_workers=0, device='cpu', **kwargs)


def same_predictions(learn, file, **kwargs):
    "Does the exported file predict what the learner does?"
    item = learn.dls.valid_ds.items[0]
    return torch.equal(load_learner(learn.export(file), **kwargs).predict(item)[2], learn.predict(item)[2])


def test_constructor_arguments_are_remembered(make_dls, tmp_path):
    "A vision transformer for small images, exported and loaded without anything but the file"
    learn = vision_learner(make_dls(), 'vit_tiny_patch16_224', pretrained=False, img_size=64, depth=2, drop_path_rate=0.1)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert same_predictions(learn, tmp_path/'a.pkl')
    spec = json.loads(zipfile.ZipFile(tmp_path/'a.pkl').read('spec.json'))
    assert spec['model']['args']['options'] == {'img_size': 64, 'depth': 2, 'drop_path_rate': 0.1}


def test_image_of_another_size(make_dls):
    "The error says which size, and both ways out"
    learn = vision_learner(make_dls(96), 'vit_tiny_patch16_224', pretrained=False, depth=2)
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match=r'made for images of 224x224 pixels.*96x96.*Resize\(224\).*img_size=96'): learn.fit(1)


def test_freezing_and_discriminative_rates(make_dls):
    weights = timm.create_model('test_resnet').state_dict()
    learn = vision_learner(make_dls(), 'test_resnet', weights=weights)
    body, head = learn.model[0], learn.model[1]
    norms = {id(p) for m in body.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert all(p.requires_grad == (id(p) in norms) for p in body.parameters()) and all(p.requires_grad for p in head.parameters())
    before = body.model.conv1[0].weight.clone() if isinstance(body.model.conv1, nn.Sequential) else body.model.conv1.weight.clone()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        assert torch.equal(before, next(p for p in body.model.conv1.parameters()))
        learn.unfreeze()
        learn.fit(1, slice(1e-5, 1e-3))
    assert [f"{g['lr']:.0e}" for g in learn.opt.hypers] == ['1e-05', '1e-04', '1e-03']
    assert not torch.equal(before, next(p for p in body.model.conv1.parameters()))


def test_body_of_another_learner(make_dls, tmp_path):
    "Weights kept, frozen, exported as the first; training the second leaves the first alone"
    first = vision_learner(make_dls(), 'test_convnext', pretrained=False)
    second = vision_learner(make_dls(), (first.model[0], 64))
    name = 'model.stem.0.weight'
    assert torch.equal(first.model[0].state_dict()[name], second.model[0].state_dict()[name])
    assert not dict(second.model[0].named_parameters())[name].requires_grad
    assert 'Normalisation: mean 0.5 0.5 0.5' in str(second.summary())
    before = first.model[0].state_dict()[name].clone()
    second.unfreeze()
    with second.no_bar(), second.no_logging(): second.fit(1, 1e-2)
    assert torch.equal(first.model[0].state_dict()[name], before) and not torch.equal(second.model[0].state_dict()[name], before)
    assert same_predictions(second, tmp_path/'b.pkl')


class Own(nn.Module):
    "A network that nobody knows"
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x): return self.fc(self.conv(x).mean((2, 3)))


@register
def named_network(pretrained: bool = False, width: int = 8) -> nn.Module:
    "A constructor that files may name"
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


def test_networks_of_ones_own(make_dls, tmp_path):
    own = Own()
    learn = vision_learner(make_dls(), own)
    assert torch.equal(learn.model[0].model.conv.weight, own.conv.weight) and isinstance(own.fc, nn.Linear)
    assert not any(f.name == 'Normalize' for f in learn.dls.train.after_batch.fs) # nothing is known of what it expects
    learn.export(tmp_path/'c.pkl')
    with pytest.raises(UntrustedError, match='trust=True'): load_learner(tmp_path/'c.pkl')
    assert same_predictions(learn, tmp_path/'c.pkl', trust=True)
    learn = vision_learner(make_dls(), named_network, pretrained=False, width=6)
    assert learn.model[0][0].out_channels == 6 and same_predictions(learn, tmp_path/'d.pkl')


def test_own_entry_in_fastais_table(make_dls):
    split = lambda m: [list(m[0].parameters()), list(m[1].parameters())]
    model_meta[named_network] = {'cut': 1, 'split': split, 'stats': ([0.1] * 3, [0.2] * 3)}
    try:
        learn = vision_learner(make_dls(), named_network)
        assert len(learn.model[0]) == 1 and learn.splitter is split and repr(learn.dls.train.after_batch[-1]).startswith('Normalize(mean 0.1')
    finally: del model_meta[named_network]


def test_heads_of_ones_own_are_loaded_without_trust(make_dls, tmp_path):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 2))
    learn = vision_learner(make_dls(), 'test_resnet', pretrained=False, custom_head=head)
    assert same_predictions(learn, tmp_path/'e.pkl')


@pytest.mark.parametrize('kwargs', [{'cut': -3}, {'concat_pool': False, 'lin_ftrs': [16, 8], 'ps': [0.1, 0.2, 0.3]}, {'y_range': (0, 1), 'n_out': 1}, {'lin_first': True, 'bn_final': True}, {'first_bn': False}, {'n_in': 3}])
def test_arguments_of_the_head_reach_the_file(make_dls, tmp_path, kwargs):
    learn = vision_learner(make_dls(), 'torchvision:squeezenet1_1' if 'cut' not in kwargs else 'torchvision:resnet18', pretrained=False, loss_func=nn.MSELoss() if 'n_out' in kwargs else None, **kwargs)
    assert same_predictions(learn, tmp_path/'f.pkl')


# Weights

@pytest.mark.parametrize('name', ['torchvision:resnet18', 'test_resnet', 'test_convnext', 'test_vit', 'swin_tiny_patch4_window7_224', 'torchvision:mobilenet_v3_small'])
@pytest.mark.parametrize('n_in', [1, 2, 4, 6])
def test_other_channels(name, n_in):
    "Grey images, as one channel, are what they were as three; with other numbers the first layer takes them, and keeps what it knows"
    smaller = SMALLER.get(name, {})
    weights = find_architecture(name)(**smaller).state_dict()
    body, known = (build_body(name, weights=weights, n_in=n, **smaller)[0].eval() for n in (n_in, None))
    x = torch.rand(2, 6, *size_for([body]))
    with torch.no_grad():
        grey = x[:, :1].expand(-1, 3, -1, -1)
        if n_in == 1: assert torch.allclose(body(x[:, :1]), known(grey), atol=1e-4)
        first = next(p for p in body.parameters() if p.dim() == 4)
        old = next(p for p in known.parameters() if p.dim() == 4)
        assert body(x[:, :n_in]).shape == known(grey).shape and first.shape[1] == n_in
        if n_in > 3 and 'torchvision' in name: assert torch.equal(first[:, :3], old) and first[:, 3:].abs().sum() == 0
        elif n_in > 1: assert torch.allclose(first[:, 1] * n_in / 3, old[:, 1], atol=1e-6)


def test_weights_for_other_sizes():
    "Positions are interpolated: of timm's transformers and of torchvision's"
    weights = timm.create_model('vit_tiny_patch16_224', depth=1).state_dict()
    body, n = build_body('vit_tiny_patch16_224', weights=weights, img_size=64, depth=1)
    assert n == 192 and body(torch.rand(1, 3, 64, 64)).shape == (1, 192)
    assert torch.equal(body.model.blocks[0].mlp.fc1.weight, weights['blocks.0.mlp.fc1.weight']) and body.model.pos_embed.shape[1] == 17
    weights = torchvision.models.vit_b_32(num_classes=2).state_dict()
    body, n = build_body('torchvision:vit_b_32', weights=weights, img_size=64)
    assert n == 768 and body.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 768) and torch.equal(body.model.conv_proj.weight, weights['conv_proj.weight'])
    with pytest.raises(ValueError, match='do not fit timm:test_vit'): build_body('test_vit', weights={'patch_embed.proj.weight': torch.rand(5, 5, 5)})


def test_networks_that_change_their_input_with_weights():
    "torchvision's GoogLeNet undoes ImageNet's normalisation if it has weights, and so does the one that a file builds"
    weights = torchvision.models.googlenet(init_weights=False).state_dict()
    model = create_vision_model('torchvision:googlenet', 2, weights=weights).eval()
    again = rebuild_vision_model(**model.built_by[1]).eval()
    again.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 64, 64)
    assert model[0].model.transform_input and torch.equal(again(x), model(x))
    assert not create_vision_model('torchvision:googlenet', 2, pretrained=False)[0].model.transform_input


def test_files_of_older_versions_have_the_unused_layers():
    old = dict(arch='timm:mobilenetv3_small_050', n_out=3, n_in=3, cut=None, pool=True, lin_ftrs=None, ps=0.5, concat_pool=True, first_bn=True, bn_final=False, lin_first=False, y_range=None)
    assert 'model.conv_head.weight' in rebuild_vision_model(**old)[0].state_dict()
    assert 'model.conv_head.weight' not in create_vision_model('mobilenetv3_small_050', 3, pretrained=False)[0].state_dict()


# Bad input

class NoCut(nn.Module):
    "Returns tokens"
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 16, 16)

    def forward(self, x): return self.embed(x).flatten(2).transpose(1, 2)


@pytest.mark.parametrize('arch, options, error, message', [
    (NoCut(), {}, ValueError, r'NoCut returns a tensor of shape \(2, 16, 8\).*give cut='),
    (lambda pretrained: NoCut(), {}, ValueError, r'NoCut returns.*give cut=.*or a pair'),
    ('test_convnext', {'cut': 'stem'}, TypeError, 'number of children'),
    ('convnext_at*', {}, ValueError, 'choose one of 3: convnext_atto'),
    ('resnett18', {}, ValueError, "Did you mean 'resnet18'"),
    ('test_vit', {'img_sise': 64}, TypeError, "Did you mean 'img_size'"),
    ('test_vit', {'in_chans': 1}, TypeError, 'say it with n_in'),
    (Own(), {'img_size': 64}, TypeError, 'takes no arguments'),
    (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 8)), {'n_in': 1}, ValueError, 'could not be tried.*no convolution'),
    ((Own(), '8'), {}, TypeError, 'a network and a whole number'),
    ((Own(), 8), {}, ValueError, 'returns 5 features, not 8'),
])
def test_what_cannot_be_built(arch, options, error, message):
    with pytest.raises(error, match=message): create_vision_model(arch, 2, pretrained=False, **options)


@pytest.mark.parametrize('args', [{'options': {'checkpoint_path': 'x.pth'}}, {'options': {'pretrained_cfg_overlay': {'file': 'x.pth'}}}, {'options': {'pretrained': True}}, {'arch': 'hf-hub:a/b'},
                                  {'arch': 'local-dir:x'}, {'arch': 'timm:hf-hub:a/b'}, {'arch': Own}, {'cut': 'x'}, {'weights': 'x.pth'}])
def test_files_cannot_ask_for_more(args):
    with pytest.raises((TypeError, ValueError)): rebuild_vision_model(**{'arch': 'timm:test_resnet', 'n_out': 2, **args})


def test_timm_model():
    model, config = create_timm_model('test_resnet', 4, pretrained=False, ps=0.1, drop_path_rate=0.2)
    assert model.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 4) and len(config['mean']) == 3
    with pytest.raises(ValueError, match='takes a name of timm'): create_timm_model('torchvision:resnet18', 4)
