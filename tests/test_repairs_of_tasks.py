"""Losses of one's own with several outputs, encoders that are there already, and what does not go together says so."""
import pytest, torch
from torch import nn

from lamella.callbacks.mixup import CutMixUp, MixUp
from lamella.data.blocks import CategoryBlock
from lamella.data.datablock import DataBlock
from lamella.export import load_learner
from lamella.learner.learner import Learner
from lamella.losses import CrossEntropyLossFlat
from lamella.loop.named import OwnLoss
from lamella.vision.data import ImageBlock
from lamella.vision.detection import DetectionLoss
from lamella.vision.detectors import find_detector
from lamella.vision.encoders import create_encoder
from lamella.vision.learner import vision_learner
from lamella.vision.types import PILImage, PILImageBW
from lamella.vision.unet import create_unet_model, unet_learner


def pictures(kind=PILImage, n=8, blocks=1):
    names = [f'{"ab"[i % 2]}{i}' for i in range(n)]
    block = DataBlock(blocks=(ImageBlock(kind), *[CategoryBlock] * blocks), n_inp=1, get_x=lambda o: kind.create(torch.randint(0, 255, (32, 32), dtype=torch.uint8).numpy()),
                      get_y=[lambda o: o[0]] * blocks)
    return block.dataloaders(names, bs=4, num_workers=0)


class Two(nn.Module):
    def __init__(self, both=True):
        super().__init__()
        self.layers, self.both = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]), both

    def forward(self, x):
        found = tuple(layer(x.mean((2, 3))) for layer in self.layers)
        return found if self.both else torch.cat(found, 1)


class OfBoth:
    "Its activation and its decisions need both outputs"
    reduction = 'mean'
    def __call__(self, pred, a, b): return nn.functional.cross_entropy(pred[0], a) + nn.functional.cross_entropy(pred[1], b)
    def activation(self, pred): return pred[0].softmax(-1), pred[1].softmax(-1) * 0.5
    def decodes(self, probs): return [probs[0].argmax(-1), probs[0].argmax(-1) * 0 + (probs[1].sum(-1) < 0.6)]


class OfOne(OfBoth):
    def activation(self, pred): return pred
    def decodes(self, probs): return probs.argmax(-1)


class Inherits(CrossEntropyLossFlat):
    "Only the loss is new: each output is decoded as lamella does it"
    def forward(self, pred, a, b): return super().forward(pred[0], a) + super().forward(pred[1], b)


def test_loss_of_ones_own_gets_the_whole_prediction():
    learn = Learner(pictures(blocks=2), Two(), OfBoth())
    probs, targs, decided = learn.get_preds(with_decoded=True)
    assert torch.allclose(probs[1].sum(1), torch.tensor(0.5)) and decided[1].eq(1).all()
    assert learn.get_preds(with_decoded=True, with_preds=False)[2][1].eq(1).all()
    assert learn.tta(n=1)[0][1].sum(1).allclose(torch.tensor(0.5))
    assert learn.predict('a0').label[1] == 'b' and len(learn.predict('a0').probability) == 2
    learn.show_results(max_n=2)


def test_act_gets_the_whole_prediction():
    learn = Learner(pictures(blocks=2), Two(), Inherits())
    assert torch.allclose(learn.get_preds(act=lambda o: o[0] * 0 + len(o))[0], torch.tensor(2.))


def test_losses_of_lamella_are_asked_output_by_output():
    learn = Learner(pictures(blocks=2), Two(), Inherits())
    probs, _, decided = learn.get_preds(with_decoded=True)
    assert all(torch.allclose(p.sum(1), torch.tensor(1.)) and p.argmax(1).equal(d) for p, d in zip(probs, decided))
    assert len(learn.predict('a0').label) == 2


@pytest.mark.parametrize('ask', [lambda learn: learn.predict('a0'), lambda learn: learn.show_results()], ids=['predict', 'show_results'])
def test_one_output_for_two_targets(ask):
    learn = Learner(pictures(blocks=2), Two(both=False), OfOne())
    with pytest.raises(ValueError, match='one output for 2 targets: give the loss a `decodes`'): ask(learn)


def test_encoder_around_a_body_of_timm_says_how_it_was_built():
    from lamella.base.spec import describe, rebuild
    body = vision_learner(pictures(), 'resnet10t', pretrained=False).model[0]
    encoder = create_encoder((body, 512))
    objects = []
    again = rebuild(describe(encoder, objects))
    again.load_state_dict(encoder.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert objects == [] and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(encoder.eval()(x), again.eval()(x)))


def test_unet_around_a_body_of_timm_is_loaded_without_trust(tmp_path):
    image = lambda o: PILImage.create(torch.randint(0, 255, (32, 32), dtype=torch.uint8).numpy())
    dls = DataBlock(blocks=(ImageBlock, ImageBlock), get_x=image, get_y=image).dataloaders(list(range(8)), bs=4, num_workers=0)
    body = vision_learner(pictures(), 'resnet10t', pretrained=False).model[0]
    learn = unet_learner(dls, (body, 512), normalize=False)
    learn.export(tmp_path/'unet.lamella')
    loaded = load_learner(tmp_path/'unet.lamella')
    assert loaded.model.state_dict().keys() == learn.model.state_dict().keys()


def test_a_file_may_not_name_other_arguments():
    from lamella.vision.encoders import NamedMaps
    with pytest.raises(TypeError, match='may not say'): NamedMaps({'arch': 'timm:resnet10t', 'options': {'checkpoint_path': 'x'}})


@pytest.mark.parametrize('library', ['torchvision', 'timm'])
def test_whole_network_as_encoder(library):
    import timm, torchvision
    network = torchvision.models.resnet18() if library == 'torchvision' else timm.create_model('resnet10t')
    before = set(network.state_dict())
    model = create_unet_model(network, 2, 64)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 2, 64, 64)
    assert set(network.state_dict()) == before and not {id(p) for p in network.parameters()} & {id(p) for p in model.parameters()}


def test_cut_of_a_network_that_is_there():
    network = nn.Sequential(*[nn.Conv2d(3, 3, 3, 2, 1) for _ in range(4)])
    assert len(create_encoder(network, cut=2)) == 2 and len(create_encoder(network)) == 4


def test_thresholds_are_not_for_detectors():
    learn = Learner(pictures(), nn.Flatten(), DetectionLoss())
    with pytest.raises(TypeError, match='thresholds are for several labels'): learn.find_thresholds()


def test_grey_images_for_a_network_of_colours():
    learn = vision_learner(pictures(PILImageBW), 'resnet10t', pretrained=False, normalize=False, n_in=3)
    with pytest.raises(ValueError, match='the images have 1 channel, and the network takes 3: n_in=1'): learn.validate()


@pytest.mark.parametrize('mix', [MixUp, CutMixUp])
def test_mixing_needs_a_loss_of_predictions(mix):
    learn = Learner(pictures(), nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), OwnLoss(), cbs=mix())
    with pytest.raises(TypeError, match='MixUp mixes two losses .* Sequential computes its loss itself'): learn.fit(1)


def test_detector_that_is_there():
    from torchvision.models.detection import fcos_resnet50_fpn
    network = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    with pytest.raises(TypeError, match='by name .* not as a FCOS'): find_detector(network)
