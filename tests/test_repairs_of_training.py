"""What a review of the training part found, each finding once."""
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchLoader

from lamella.callbacks.lr_find import minimum, slide, steep, valley
from lamella.data.loaders import DataLoaders
from lamella.learner.learner import Learner
from lamella.metrics import accuracy

torch.manual_seed(0)
X = torch.randn(96, 4)
Y = X[:, :3].argmax(1)


def loaders(data=None, dtype=torch.long):
    data = list(zip(X, Y.to(dtype))) if data is None else data
    return DataLoaders(TorchLoader(data[:64], batch_size=16), TorchLoader(data[64:], batch_size=16))


def net(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))


def learner(dls=None, loss=F.cross_entropy, **kwargs):
    learn = Learner(loaders() if dls is None else dls, net(), loss, **kwargs)
    learn.logger = lambda row: None
    return learn


def noisy_search(seed, n):
    "Rates, and a loss that stays, falls and explodes"
    rng = np.random.default_rng(seed)
    lrs = np.geomspace(1e-7, 10, n)
    place = np.log10(lrs) + rng.uniform(2, 4)
    losses = 2.5 - 1.5 / (1 + np.exp(-2 * place)) + np.exp(np.minimum(2 * place - 4, 3)) + rng.normal(0, rng.choice([0.001, 0.02, 0.2]), n)
    return lrs, losses


@pytest.mark.parametrize('ours', [valley, slide, steep, minimum])
def test_suggestions_are_those_of_fastai(ours):
    fastai = pytest.importorskip('fastai.callback.schedule')
    for seed in range(40):
        lrs, losses = noisy_search(seed, 40 + 3 * seed)
        rate, (_, loss) = getattr(fastai, ours.__name__)(torch.tensor(lrs), torch.tensor(losses), 100)
        found, point = ours(lrs, losses, 100)
        assert found == pytest.approx(float(rate)), seed
        if ours is not minimum: assert point == pytest.approx((found, float(loss))), seed # fastai marks a tenth of the rate with the loss of the whole


def test_lr_find_leaves_out_what_fastai_leaves_out_and_takes_functions_written_for_it():
    seen = []
    def mine(lrs, losses, num_it):
        seen.append((len(lrs), float(lrs[0]), num_it))
        return lrs.log().mean().exp().item(), (1e-3, losses.max().item())
    learn = learner()
    found = learn.lr_find(num_it=40, stop_div=False, show_plot=False, suggest_funcs=(mine, 'valley'))
    assert found._fields == ('mine', 'valley') and 0 < found.mine < 1
    assert seen == [(40 - 4 - 5, pytest.approx(learn.recorder.lrs[4]), 40)]
    assert learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None) is None


def test_what_is_no_suggestion_is_said_before_the_search():
    learn = learner()
    with pytest.raises(ValueError, match="Did you mean 'valley'"): learn.lr_find(show_plot=False, suggest_funcs='vally')
    assert not learn.recorder.lrs
