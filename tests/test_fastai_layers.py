"""Every layer beside fastai's: the same names of tensors, the same outputs and gradients from the same weights. Skipped where fastai is not installed."""
import io
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lamella.nets import activations, attention, blocks, convolutions, helpers, initialising, layers, merging, modules, norms, pooling
from lamella.vision import xresnet
from lamella.vision.models import xresnet as xresnet_for_fastai_programs

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    pytest.importorskip('fastai')
    import fastai.layers
    import fastai.torch_core
    import fastai.vision.models.xresnet

HOMES = (layers, modules, activations, pooling, norms, initialising, convolutions, merging, attention, blocks, helpers, xresnet)
OURS = SimpleNamespace(**{name: getattr(home, name) for home in HOMES for name in home.__all__})
THEIRS = SimpleNamespace(**{name: getattr(home, name) for home in (fastai.torch_core, fastai.layers, fastai.vision.models.xresnet) for name in home.__all__})

CASES = {
    'Identity': (lambda l: l.Identity(), (2, 3)),
    'Lambda': (lambda l: l.Lambda(torch.tanh), (2, 3)),
    'PartialLambda': (lambda l: l.PartialLambda(F.leaky_relu, negative_slope=.2), (2, 3)),
    'Flatten': (lambda l: l.Flatten(), (2, 3, 4)),
    'Flatten full': (lambda l: l.Flatten(full=True), (2, 3, 4)),
    'View': (lambda l: l.View(-1, 2), (2, 3, 4)),
    'ResizeBatch': (lambda l: l.ResizeBatch(4, 3), (2, 3, 4)),
    'SigmoidRange': (lambda l: l.SigmoidRange(-1, 4), (2, 3)),
    'AdaptiveConcatPool1d': (lambda l: l.AdaptiveConcatPool1d(2), (2, 3, 7)),
    'AdaptiveConcatPool2d': (lambda l: l.AdaptiveConcatPool2d(), (2, 3, 7, 7)),
    'AdaptiveConcatPool2d (2,3)': (lambda l: l.AdaptiveConcatPool2d((2, 3)), (2, 3, 7, 7)),
    'PoolFlatten': (lambda l: l.PoolFlatten(l.PoolType.Cat), (2, 3, 7, 7)),
    'adaptive_pool': (lambda l: l.adaptive_pool(l.PoolType.Max)(2), (2, 3, 7, 7)),
    'AdaptiveAvgPool': (lambda l: l.AdaptiveAvgPool(2, ndim=1), (2, 3, 7)),
    'MaxPool': (lambda l: l.MaxPool(3, 2, 1), (2, 3, 7, 7)),
    'AvgPool': (lambda l: l.AvgPool(2, ndim=2, ceil_mode=True), (2, 3, 7, 7)),
    'BatchNorm': (lambda l: l.BatchNorm(3, ndim=1, eps=1e-3), (5, 3, 4)),
    'BatchNorm zero': (lambda l: l.BatchNorm(3, norm_type=l.NormType.BatchZero), (5, 3, 4, 4)),
    'InstanceNorm': (lambda l: l.InstanceNorm(3), (5, 3, 4, 4)),
    'InstanceNorm plain': (lambda l: l.InstanceNorm(3, ndim=3, affine=False), (5, 3, 4, 4, 2)),
    'BatchNorm1dFlat': (lambda l: l.BatchNorm1dFlat(4), (5, 3, 4)),
    'LinBnDrop': (lambda l: l.LinBnDrop(4, 3, act=nn.ReLU()), (5, 4)),
    'LinBnDrop lin_first': (lambda l: l.LinBnDrop(4, 3, act=nn.ReLU(), lin_first=True), (5, 4)),
    'Mish': (lambda l: l.Mish(), (5, 4)),
    'Swish': (lambda l: l.Swish(), (5, 4)),
    'inplace_relu': (lambda l: nn.Sequential(nn.Linear(4, 3), l.inplace_relu()), (5, 4)),
    'ConvLayer': (lambda l: l.ConvLayer(4, 6), (2, 4, 7, 7)),
    'ConvLayer stride': (lambda l: l.ConvLayer(4, 6, 5, 2, bias=True, act_cls=nn.Mish), (2, 4, 7, 7)),
    'ConvLayer even': (lambda l: l.ConvLayer(4, 6, 4, padding_mode='reflect'), (2, 4, 7, 7)),
    'ConvLayer groups': (lambda l: l.ConvLayer(4, 6, groups=2, dilation=2, padding=0), (2, 4, 7, 7)),
    'ConvLayer none': (lambda l: l.ConvLayer(4, 6, norm_type=None, act_cls=None), (2, 4, 7, 7)),
    'ConvLayer bn last': (lambda l: l.ConvLayer(4, 6, bn_1st=False, xtra=nn.Tanh()), (2, 4, 7, 7)),
    'ConvLayer 1d': (lambda l: l.ConvLayer(4, 6, ndim=1, norm_type=l.NormType.Instance), (2, 4, 7)),
    'ConvLayer 3d': (lambda l: l.ConvLayer(4, 6, ndim=3, norm_type=l.NormType.BatchZero), (2, 4, 5, 5, 5)),
    'ConvLayer weight': (lambda l: l.ConvLayer(4, 6, norm_type=l.NormType.Weight), (2, 4, 7, 7)),
    'ConvLayer spectral': (lambda l: l.ConvLayer(4, 6, norm_type=l.NormType.Spectral), (2, 4, 7, 7)),
    'ConvLayer transposed': (lambda l: l.ConvLayer(4, 6, transpose=True, stride=2, output_padding=1), (2, 4, 7, 7)),
    'ConvLayer transposed weight': (lambda l: l.ConvLayer(4, 6, 4, 2, 1, transpose=True, norm_type=l.NormType.Weight), (2, 4, 7, 7)),
    'ConvLayer transposed spectral': (lambda l: l.ConvLayer(4, 6, 4, 2, 1, transpose=True, norm_type=l.NormType.Spectral), (2, 4, 7, 7)),
    'SimpleCNN': (lambda l: l.SimpleCNN([3, 8, 16, 4]), (2, 3, 16, 16)),
    'SimpleCNN sizes': (lambda l: l.SimpleCNN([3, 8, 4], [5, 3], [1, 2], bn=False), (2, 3, 16, 16)),
    'PixelShuffle_ICNR': (lambda l: l.PixelShuffle_ICNR(4), (2, 4, 5, 5)),
    'PixelShuffle_ICNR blur': (lambda l: l.PixelShuffle_ICNR(4, 3, blur=True, norm_type=None), (2, 4, 5, 5)),
    'PixelShuffle_ICNR batch': (lambda l: l.PixelShuffle_ICNR(4, 3, norm_type=l.NormType.Batch, act_cls=nn.Mish), (2, 4, 5, 5)),
    'SequentialEx': (lambda l: l.SequentialEx(nn.Conv2d(3, 3, 1), l.MergeLayer(), nn.ReLU(), l.MergeLayer(dense=True)), (2, 3, 5, 5)),
    'ProdLayer': (lambda l: l.SequentialEx(nn.Conv2d(3, 3, 1), nn.Sigmoid(), l.ProdLayer()), (2, 3, 5, 5)),
    'Cat': (lambda l: l.Cat([nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1)]), (2, 3, 5, 5)),
    'TimeDistributed': (lambda l: l.TimeDistributed(nn.Conv2d(3, 2, 1)), (2, 6, 3, 5, 5)),
    'TimeDistributed low_mem': (lambda l: l.TimeDistributed(nn.Conv2d(3, 2, 1), low_mem=True), (2, 6, 3, 5, 5)),
    'TimeDistributed tdim': (lambda l: l.TimeDistributed(nn.Linear(3, 2), low_mem=True, tdim=2), (2, 5, 6, 3)),
    'SelfAttention': (lambda l: l.SelfAttention(16), (2, 16, 4, 4)),
    'PooledSelfAttention2d': (lambda l: l.PooledSelfAttention2d(16), (2, 16, 4, 4)),
    'SimpleSelfAttention': (lambda l: l.SimpleSelfAttention(8), (2, 8, 4, 4)),
    'SimpleSelfAttention ks': (lambda l: l.SimpleSelfAttention(8, ks=3), (2, 8, 4, 4)),
    'SEModule': (lambda l: l.SEModule(32, 4), (2, 32, 4, 4)),
    'SEModule odd': (lambda l: l.SEModule(30, 3, act_cls=nn.Mish), (2, 30, 4, 4)),
    'ResBlock': (lambda l: l.ResBlock(1, 8, 8), (2, 8, 7, 7)),
    'ResBlock stride': (lambda l: l.ResBlock(1, 8, 16, stride=2), (2, 8, 7, 7)),
    'ResBlock bottleneck': (lambda l: l.ResBlock(4, 2, 4, stride=2, nh1=6, nh2=8, groups=2, g2=4), (2, 8, 7, 7)),
    'ResBlock dw': (lambda l: l.ResBlock(4, 2, 4, dw=True, pool_first=False, stride=2, ks=5, act_cls=nn.Mish), (2, 8, 8, 8)),
    'ResBlock max pool': (lambda l: l.ResBlock(1, 8, 16, stride=2, pool=l.MaxPool, norm_type=l.NormType.Instance), (2, 8, 8, 8)),
    'ResBlock all': (lambda l: l.ResBlock(1, 8, 16, stride=2, reduction=4, sa=True, bias=True), (2, 8, 8, 8)),
    'ResBlock weight': (lambda l: l.ResBlock(1, 8, 8, norm_type=l.NormType.Weight, bn_1st=False), (2, 8, 8, 8)),
    'ResBlock 1d': (lambda l: l.ResBlock(1, 8, 16, stride=2, ndim=1), (2, 8, 8)),
    'SEBlock': (lambda l: l.SEBlock(2, 4, 8, stride=2), (2, 8, 8, 8)),
    'SEResNeXtBlock': (lambda l: l.SEResNeXtBlock(4, 16, 32, groups=4, base_width=8), (2, 64, 4, 4)),
    'SeparableBlock': (lambda l: l.SeparableBlock(4, 8, 64, reduction=8), (2, 32, 4, 4)),
    'xresnet18': (lambda l: l.xresnet18(n_out=5, widen=.25), (2, 3, 32, 32)),
    'xresnet18 all': (lambda l: l.xresnet18(n_out=5, c_in=1, widen=.25, sa=True, act_cls=nn.Mish, ks=5, stride=1), (2, 1, 8, 8)),
    'xresnet18 1d': (lambda l: l.xresnet18(n_out=5, c_in=2, widen=.25, ndim=1, norm_type=l.NormType.Instance), (2, 2, 64)),
    'xresnet50 gates': (lambda l: l.XResNet(l.SEBlock, 4, [1, 1, 1, 1], n_out=5, widen=.125, reduction=16), (2, 3, 32, 32)),
}


def pair(make):
    "A layer of ours and one of fastai's with the same random weights, so that no zero hides a difference"
    ours, theirs = make(OURS), make(THEIRS)
    with torch.no_grad():
        for p in theirs.parameters(): p.copy_(torch.randn_like(p) * 0.4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(layer, x):
    "What comes out, and the gradients of the input and of all parameters"
    x = x.clone().requires_grad_()
    out = layer(x)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out.as_subclass(torch.Tensor) * weights).sum().backward()
    return [out.detach().as_subclass(torch.Tensor), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize('name', CASES)
def test_layer(name: str):
    torch.manual_seed(0)
    make, shape = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ours, theirs = pair(make)
        for training in (True, False):
            x = torch.randn(shape)
            for layer in (ours, theirs): layer.train(training).zero_grad()
            for a, b in zip(run(ours, x), run(theirs, x), strict=True):
                assert (a is None) == (b is None)
                if a is not None: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1., b.abs().max().item()))
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize('act', [nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, None])
@pytest.mark.parametrize('options', [{}, {'norm_type': None}, {'ndim': 1, 'bias': True}, {'init': nn.init.kaiming_normal_, 'norm_type': None}])
def test_initial_weights_are_of_the_same_size(act, options):
    torch.manual_seed(0)
    stats = [[(p.std().item(), p.mean().item()) for p in l.ConvLayer(64, 256, act_cls=act, **options).parameters()] for l in (OURS, THEIRS)]
    for (a, mean_a), (b, mean_b) in zip(*stats, strict=True): assert a == pytest.approx(b, rel=0.15, abs=1e-3) and mean_a == pytest.approx(mean_b, abs=5e-3)


@pytest.mark.parametrize('make', [lambda l: l.SelfAttention(64).query[0], lambda l: l.SimpleSelfAttention(64).conv, lambda l: l.xresnet18(n_out=5)[4][0].convpath[0][0],
                                  lambda l: l.xresnet18(n_out=512)[11], lambda l: l.Embedding(100, 50), lambda l: l.SEModule(64, 4)[1][0]])
def test_initial_weights_of_parts(make):
    torch.manual_seed(0)
    spread = [dict(make(l).named_parameters()) for l in (OURS, THEIRS)]
    assert list(spread[0]) == list(spread[1])
    for a, b in zip(*(o.values() for o in spread)): assert a.numel() < 100 or a.std().item() == pytest.approx(b.std().item(), rel=0.15, abs=2e-3)


FAMILY = [name for name in fastai.vision.models.xresnet.__all__ if name.startswith('x') and name != 'xsenet154'] # fastai's xsenet154 cannot be built


@pytest.mark.parametrize('name', FAMILY)
def test_networks_have_the_same_tensors_and_strides(name: str):
    with torch.device('meta'): ours, theirs = (getattr(l, name)(n_out=7, sa=True) for l in (OURS, THEIRS))
    shapes = [{k: tuple(v.shape) for k, v in o.state_dict().items()} for o in (ours, theirs)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    described = [[repr(m) for m in o.modules() if isinstance(m, (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d, nn.Dropout))] for o in (ours, theirs)]
    assert described[0] == described[1] and any('gamma' in k for k in shapes[0])
    assert getattr(xresnet_for_fastai_programs, name) is getattr(xresnet, name)


FUNCTIONS = {
    'sigmoid': lambda l, x: l.sigmoid(x * 100), 'sigmoid_': lambda l, x: l.sigmoid_(x.clone()), 'sigmoid_range': lambda l, x: l.sigmoid_range(x, -1, 3),
    'vleaky_relu': lambda l, x: l.vleaky_relu(x, inplace=False), 'mish': lambda l, x: l.mish(x), # fastai's swish returns nothing
    'batch_to_samples': lambda l, x: l.batch_to_samples((x, x * 2), 3)[2][1],
    'norm_bias_params': lambda l, x: torch.tensor([p.numel() for p in l.norm_bias_params(fastai_net())]),
    'norm_bias_params without': lambda l, x: torch.tensor([p.numel() for p in l.norm_bias_params(fastai_net(), with_bias=False)]),
    'requires_grad': lambda l, x: torch.tensor([l.requires_grad(nn.Linear(2, 2)), l.requires_grad(nn.ReLU())]),
    'init_default': lambda l, x: l.init_default(nn.Linear(2, 2), nn.init.ones_)(x[:, :2]),
    'children': lambda l, x: torch.tensor([l.has_children(fastai_net()), len(l.children_and_parameters(fastai_net()))]),
    'sequential': lambda l, x: l.sequential(torch.tanh, nn.Identity())(x),
    'module': lambda l, x: l.module('a', b=2)(lambda self, x: x * self.a + self.b)(3)(x),
}


def fastai_net(): return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Conv2d(3, 4, 1)))


@pytest.mark.parametrize('name', FUNCTIONS)
def test_function(name: str):
    x = torch.randn(4, 5)
    torch.testing.assert_close(FUNCTIONS[name](OURS, x), FUNCTIONS[name](THEIRS, x))


def test_none_reduce():
    for loss in (nn.CrossEntropyLoss, lambda: F.cross_entropy):
        found = []
        for l in (OURS, THEIRS):
            torch.manual_seed(0)
            with l.NoneReduce(loss()) as each: found.append(each(torch.randn(4, 3), torch.tensor([0, 1, 2, 0])))
        torch.testing.assert_close(*found)


def test_names():
    "All of fastai's layers are here, but for those that the notebook of departures names"
    ours = set(vars(OURS)) | {'flatten_model', 'in_channels'} # of other modules of lamella
    assert set(fastai.layers.__all__) - ours == {'ToTensorBase', 'MishJitAutoFn'}
    assert set(n for n in fastai.vision.models.xresnet.__all__ if n[0] not in 'gs') <= ours


def test_weights_of_fastai_are_loaded_from_a_file(tmp_path):
    from lamella.nets.weights import load_weights
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs = THEIRS.xresnet18(n_out=3, widen=.25, sa=True)
    torch.save({'model': theirs.state_dict()}, tmp_path/'model.pth')
    ours = OURS.xresnet18(n_out=3, widen=.25, sa=True)
    report = load_weights(ours, tmp_path/'model.pth')
    assert not report.missing and not report.unexpected and not report.mismatched
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.train()(x), theirs.train()(x), rtol=1e-4, atol=1e-4)
