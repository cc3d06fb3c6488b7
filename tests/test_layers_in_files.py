"""Layers of lamella in exported files: loaded without trust, unless something in them is not known."""
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lamella.base.pickling import UntrustedError, dump_objects, load_objects, register_layer
from lamella.data.loaders import DataLoaders
from lamella.export import load_learner
from lamella.learner.learner import Learner
from lamella.losses import CrossEntropyLossFlat
from lamella.nets.activations import inplace_relu
from lamella.nets.attention import PooledSelfAttention2d, SelfAttention
from lamella.nets.blocks import ResBlock, SEBlock
from lamella.nets.convolutions import ConvLayer, PixelShuffle_ICNR, SimpleCNN
from lamella.nets.layers import AdaptiveConcatPool2d, LinBnDrop, SigmoidRange
from lamella.nets.merging import Cat, MergeLayer, SequentialEx
from lamella.nets.modules import Debugger, Flatten, Lambda, View
from lamella.nets.norms import NormType
from lamella.vision.learner import vision_learner
from lamella.vision.xresnet import xresnet18, xse_resnet18

SMALL = dict(stem_szs=(8, 8, 16), widen=0.25, n_out=2)


def loaders():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 2)
    return DataLoaders.from_dsets(data, data, bs=4, device='cpu', num_workers=0)


def head(n): return [AdaptiveConcatPool2d(), Flatten(), LinBnDrop(2 * n, 2, act=SigmoidRange(-2, 2))]


MODELS = {
    'by name': lambda: xresnet18(**SMALL),
    'gates': lambda: xse_resnet18(n_out=2, widen=0.25),
    'other activation': lambda: xresnet18(**SMALL, act_cls=nn.Mish, sa=True),
    'partial activation': lambda: xresnet18(**SMALL, act_cls=inplace_relu),
    'inside another': lambda: nn.Sequential(xresnet18(**SMALL), nn.Linear(2, 2)),
    'blocks': lambda: nn.Sequential(ConvLayer(3, 16, norm_type=NormType.Spectral), ResBlock(1, 16, 16), SEBlock(1, 16, 16), SelfAttention(16), PooledSelfAttention2d(16), *head(16)),
    'merged': lambda: nn.Sequential(SequentialEx(nn.Conv2d(3, 3, 1), MergeLayer(True)), Cat([nn.Conv2d(6, 8, 1)] * 2), PixelShuffle_ICNR(16, 4), *head(4)),
    'simple': lambda: nn.Sequential(SimpleCNN([3, 8, 2]), View(-1, 2)),
}


@pytest.mark.parametrize('name', MODELS)
def test_a_trained_model_is_loaded_without_trust(name, tmp_path):
    learn = Learner(loaders(), MODELS[name](), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    again = load_learner(learn.export(tmp_path/'model.pkl'))
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(again.model(x), learn.model.eval()(x))
    assert ('builder' in again.spec['model']) == (name in ('by name', 'gates'))


def test_a_network_that_was_changed_is_not_built_by_its_name(tmp_path):
    model = xresnet18(**SMALL)
    model[11] = nn.Linear(model[11].in_features, 2, bias=False)
    again = load_learner(Learner(loaders(), model, loss_func=CrossEntropyLossFlat()).export(tmp_path/'model.pkl'))
    assert again.model[11].bias is None and 'builder' not in again.spec['model']


def test_as_architecture_of_a_vision_learner(tmp_path):
    learn = vision_learner(loaders(), xresnet18, pretrained=False, n_out=2, loss_func=CrossEntropyLossFlat())
    assert len(learn.model[0]) == 8 and len(learn.opt_groups if hasattr(learn, 'opt_groups') else learn.splitter(learn.model)) == 3
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    again, x = load_learner(learn.export(tmp_path/'model.pkl')), torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(again.model(x), learn.model.eval()(x))


def test_weights_go_from_a_network_to_a_vision_learner():
    donor = xresnet18(n_out=7)
    learn = vision_learner(loaders(), xresnet18, pretrained=False, weights=donor.state_dict(), n_out=2, loss_func=CrossEntropyLossFlat(), normalize=False)
    torch.testing.assert_close(learn.model[0][7][1].convpath[0][0].weight.cpu(), donor[7][1].convpath[0][0].weight)


@pytest.mark.parametrize('layer', [Lambda(torch.tanh), Debugger()])
def test_functions_and_debuggers_need_trust(layer, tmp_path):
    file = Learner(loaders(), nn.Sequential(layer, Flatten(), nn.Linear(3072, 2)), loss_func=CrossEntropyLossFlat()).export(tmp_path/'model.pkl')
    with pytest.raises(UntrustedError): load_learner(file)
    assert load_learner(file, trust=True).model(torch.zeros(1, 3, 32, 32)).shape == (1, 2) if isinstance(layer, Lambda) else True


@register_layer
class Known(nn.Module):
    def __init__(self, by): super().__init__(); self.by = by
    def forward(self, x): return x * self.by


def text(o): return b'\x8c' + bytes([len(o)]) + o.encode()


def test_the_class_of_a_registered_layer_cannot_be_changed():
    name = text(Known.__module__) + text('Known') + b'\x93'
    changed = b'\x80\x04(' + name + b'N}' + text('forward') + text('evil') + b's\x86b' + b'l.'
    called = b'\x80\x04(' + name + b')\x81(' + text('x') + b'tR' + b'l.'
    by_reduce = b'\x80\x04(' + name + b'(K\x01tR' + b'l.'
    for attack in (changed, called, by_reduce):
        with pytest.raises(UntrustedError): load_objects(attack, [])
    assert callable(Known.forward)


@pytest.mark.parametrize('module, name', [('lamella.losses.flat', 'CrossEntropyLossFlat'), ('lamella.data.labels', 'AttrGetter'), ('lamella.vision.xresnet', 'xresnet18'),
                                          ('lamella.nets.modules', 'Debugger'), ('lamella.nets.blocks', 'SEBlock'), ('lamella.nets.modules', 'Lambda.forward')])
def test_what_is_registered_but_no_layer_is_refused(module, name):
    with pytest.raises(UntrustedError): load_objects(b'\x80\x04(' + text(module) + text(name) + b'\x93' + b'l.', [])


def test_layers_survive_copies_and_compilers():
    from copy import deepcopy
    for name in ('blocks', 'merged', 'gates'):
        model, x = MODELS[name](), torch.randn(2, 3, 32, 32)
        model(x).sum().backward() # weights that are computed have a graph now
        model.eval()
        torch.testing.assert_close(deepcopy(model)(x), model(x))
        objects = load_objects(*dump_objects([model]))
        torch.testing.assert_close(objects[0](x), model(x))
    torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(x), model(x))
