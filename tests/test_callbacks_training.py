"""Callbacks of training, end to end: fits of a learner on small data."""
import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lamella.base.seeds import set_seed
from lamella.callbacks.accumulation import GradientAccumulation
from lamella.callbacks.averaging import EMACallback
from lamella.callbacks.batchnorm import BnFreeze
from lamella.callbacks.best import SaveModelCallback
from lamella.callbacks.collect import CollectDataCallback
from lamella.callbacks.gradients import GradientClip
from lamella.callbacks.mixup import CutMix, CutMixUp, MixUp
from lamella.callbacks.nan import TerminateOnNaNCallback
from lamella.callbacks.plateau import ReduceLROnPlateau
from lamella.callbacks.resizing import ProgressiveResize
from lamella.callbacks.short import ShortEpochCallback
from lamella.callbacks.stopping import EarlyStoppingCallback
from lamella.data.loaders import DataLoaders
from lamella.learner.learner import Learner
from lamella.loop.callback import Callback
from lamella.metrics import accuracy, mae
from lamella.optim.optimizer import SGD, Adam


def pictures(n: int = 64, seed: int = 0) -> TensorDataset:
    "Random pictures whose class is their brightest channel"
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.rand(n, 3, 16, 16, generator=rng), torch.arange(n) % 3
    x[torch.arange(n), y] += 0.3
    return TensorDataset(x, y)


def small_net(bn: bool = True) -> nn.Module:
    norm = nn.BatchNorm2d(4) if bn else nn.Identity()
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), norm, nn.ReLU()),
                         nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))


def make_learner(path, cbs=None, bs: int = 16, shuffle: bool = True, bn: bool = True, **kwargs) -> Learner:
    set_seed(0)
    data = pictures()
    dls = DataLoaders.from_dsets(data, pictures(32, 1), bs=bs, num_workers=0, device='cpu', path=path, shuffle=shuffle, drop_last=False)
    kwargs = {'loss_func': nn.CrossEntropyLoss(), 'metrics': [accuracy], 'splitter': lambda m: [list(m[0].parameters()), list(m[1].parameters())], **kwargs}
    return Learner(dls, small_net(bn), cbs=cbs, **kwargs)


def weights(learn: Learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()]).clone()


class Planned(Callback):
    "Writes planned values into the recorder in place of the validation loss, and notes the weights of each epoch"
    order = 55

    def __init__(self, *losses: float): self.losses, self.weights = list(losses), []

    def after_epoch(self) -> None:
        self.recorder.values[-1][1] = self.losses.pop(0)
        self.weights.append(weights(self.learn))


# The best weights

@pytest.mark.parametrize('losses,best', [((3., 1., 2., 4.), 1), ((1., 2., 3., 4.), 0), ((3., 2., 0.5, 1.), 2)])
@pytest.mark.parametrize('own', [True, False])
def test_best_weights_of_both_phases_win(tmp_path, losses, best, own):
    planned, save = Planned(*losses), SaveModelCallback()
    learn = make_learner(tmp_path, [planned, save] if own else planned)
    with learn.no_logging(): learn.fine_tune(2, freeze_epochs=2, **({} if own else {'cbs': save}))
    assert torch.equal(weights(learn), planned.weights[best])
    assert (save.best, save.best_epoch) == (losses[best], best)
    assert torch.equal(weights(learn.load('model')), planned.weights[best])
    assert learn.phase == 0


def test_second_phase_starts_from_the_best_of_the_first(tmp_path):
    starts = []
    class Start(Callback):
        def before_fit(self) -> None: starts.append(weights(self.learn))
    planned = Planned(1., 2., 3.)
    learn = make_learner(tmp_path, [planned, Start])
    with learn.no_logging(): learn.fine_tune(1, freeze_epochs=2, cbs=SaveModelCallback())
    assert torch.equal(starts[1], planned.weights[0])


def test_each_fit_of_its_own_begins_anew(tmp_path):
    planned = Planned(1., 2., 9., 8.)
    learn = make_learner(tmp_path, [planned, SaveModelCallback(with_opt=True)])
    with learn.no_logging():
        learn.fit(2)
        learn.fit(2)
    assert torch.equal(weights(learn), planned.weights[3])


@pytest.mark.parametrize('error', [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_fit_keeps_its_best_weights(tmp_path, capsys, error):
    class Break(Callback):
        def before_train(self) -> None:
            if self.epoch == 2: raise error()
    planned = Planned(1., 2.)
    learn = make_learner(tmp_path, [planned, SaveModelCallback(fname='best'), Break])
    with pytest.raises(error): learn.fit(4)
    assert "the best weights (valid_loss 1.0, epoch 0)" in capsys.readouterr().out
    assert torch.equal(weights(learn), planned.weights[1])
    assert torch.equal(weights(learn.load('best')), planned.weights[0])


def test_early_stopping_and_nan_leave_the_best(tmp_path, capsys):
    planned = Planned(1., 2., 3., 4.)
    learn = make_learner(tmp_path, [planned, SaveModelCallback(), EarlyStoppingCallback(patience=2)])
    learn.fit(4)
    assert len(planned.weights) == 3 and torch.equal(weights(learn), planned.weights[0])
    assert 'No improvement since epoch 0: early stopping' in capsys.readouterr().out


def test_stale_files_are_not_loaded(tmp_path):
    learn = make_learner(tmp_path)
    learn.save('model')
    learn.add_cbs([planned := Planned(float('nan'), float('nan')), SaveModelCallback()])
    with learn.no_logging(): learn.fit(2, 0.1)
    assert torch.equal(weights(learn), planned.weights[1])


def test_unknown_column_is_told_at_the_beginning(tmp_path):
    learn = make_learner(tmp_path)
    before = weights(learn)
    for kind in (SaveModelCallback, EarlyStoppingCallback, ReduceLROnPlateau):
        with pytest.raises(ValueError, match="Did you mean 'accuracy'"): learn.fit(1, cbs=kind(monitor='acuracy'))
    assert torch.equal(weights(learn), before)


def test_errors_are_better_when_smaller(tmp_path):
    learn = make_learner(tmp_path, metrics=[lambda p, y: mae(p[:, 0], y)])
    assert SaveModelCallback('mae').falls and not SaveModelCallback('accuracy').falls and SaveModelCallback('accuracy', comp=np.less).falls
    with learn.no_logging(): learn.fit(1, cbs=SaveModelCallback('<lambda>'))


# Purity

def test_a_search_leaves_no_trace_of_callbacks(tmp_path):
    def final(search: bool) -> torch.Tensor:
        cbs = [MixUp(), GradientAccumulation(32), GradientClip(), EMACallback(0.9), SaveModelCallback(), TerminateOnNaNCallback(), EarlyStoppingCallback()]
        learn = make_learner(tmp_path/str(search), cbs)
        if search:
            learn.lr_find(show_plot=False, num_it=20)
            assert not (tmp_path/str(search)/'models').exists()
        with learn.no_logging(): learn.fit_one_cycle(2, 0.05)
        return weights(learn)
    assert torch.equal(final(True), final(False))


def test_mixing_is_on_while_searching(tmp_path):
    learn = make_learner(tmp_path, [mixer := MixUp()])
    mixer.mix_targets = lambda order, own=mixer.mix_targets: (calls.append(1), own(order))
    calls: list = []
    learn.lr_find(show_plot=False, num_it=8)
    assert len(calls) == 8


# Accumulation

@pytest.mark.parametrize('opt_func', [SGD, Adam])
@pytest.mark.parametrize('small,big', [(8, 16), (4, 32), (8, 24)]) # 64 samples: the last has a group that is not complete
def test_accumulation_is_the_big_batch(tmp_path, opt_func, small, big):
    def final(bs: int, cbs=None) -> tuple[torch.Tensor, list]:
        learn = make_learner(tmp_path, cbs, bs=bs, shuffle=False, bn=False, opt_func=opt_func)
        with learn.no_logging(): learn.fit_one_cycle(3, 0.1)
        return weights(learn), learn.opt.hypers
    (a, hypers_a), (b, hypers_b) = final(big), final(small, GradientAccumulation(big))
    assert torch.allclose(a, b, atol=1e-6, rtol=1e-6), (a - b).abs().max()
    assert hypers_a == hypers_b
    assert not torch.allclose(a, final(small)[0], atol=1e-3)


def test_accumulation_clips_the_whole_gradient(tmp_path):
    def final(bs: int, *cbs) -> torch.Tensor:
        learn = make_learner(tmp_path, cbs, bs=bs, shuffle=False, bn=False, opt_func=SGD)
        with learn.no_logging(): learn.fit(2, 0.5)
        return weights(learn)
    a, b = final(32, GradientClip(0.01)), final(8, GradientClip(0.01), GradientAccumulation(32))
    assert torch.allclose(a, b, atol=1e-6) and not torch.allclose(a, final(32), atol=1e-3)


# Mixing

@pytest.mark.parametrize('mixer', [MixUp, CutMix, CutMixUp])
@pytest.mark.parametrize('loss_func', [None, nn.CrossEntropyLoss(), nn.functional.cross_entropy])
def test_mixing_trains_and_repeats_itself(tmp_path, mixer, loss_func):
    def final(cbs) -> tuple[torch.Tensor, Learner]:
        learn = make_learner(tmp_path, cbs, loss_func=loss_func or (lambda p, y: nn.functional.cross_entropy(p, y)))
        given = learn.loss_func
        with learn.no_logging(): learn.fit(2, 0.05)
        assert learn.loss_func is given
        return weights(learn), learn
    (a, learn), (b, _) = final(mixer()), final(mixer())
    assert torch.equal(a, b) and not torch.equal(a, final(None)[0])
    assert learn.validate()[0] == pytest.approx(learn.recorder.values[-1][1], rel=1e-4) # nothing is mixed there


def test_mixing_after_an_interruption(tmp_path):
    class Break(Callback):
        def after_pred(self) -> None:
            if self.training and self.iter == 1: raise KeyboardInterrupt()
    learn = make_learner(tmp_path, [MixUp(), breaking := Break()])
    given = learn.loss_func
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    learn.remove_cb(breaking)
    assert learn.loss_func is given and torch.isfinite(torch.tensor(learn.validate()[0]))


# Averages

def test_average_is_validated_saved_and_exported(tmp_path):
    learn = make_learner(tmp_path, [EMACallback(0.9), SaveModelCallback()])
    with learn.no_logging(): learn.fit_one_cycle(3, 0.05)
    best = min(learn.recorder.values, key=lambda row: row[1])
    assert learn.validate()[0] == pytest.approx(best[1], rel=1e-5) # what the file holds is what was validated
    plain = make_learner(tmp_path)
    with plain.no_logging(): plain.fit_one_cycle(3, 0.05)
    assert not torch.allclose(weights(plain), weights(learn), atol=1e-4)


def test_average_does_not_change_the_training(tmp_path):
    def losses(cbs) -> list[float]:
        learn = make_learner(tmp_path, cbs)
        with learn.no_logging(): learn.fine_tune(2)
        return learn.recorder.losses
    assert losses(None) == losses(EMACallback(0.95))


# A loss that is no number

class Breaks(nn.Module):
    "Gives NaN from a call on"
    def __init__(self, call: int):
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor: return x * float('nan') if self.call <= 0 else x


def test_nan_names_step_rate_and_module(tmp_path):
    class Count(Callback):
        def before_batch(self) -> None:
            if self.training: breaks.call -= 1
    breaks = Breaks(7)
    learn = make_learner(tmp_path, [Count, check := TerminateOnNaNCallback()], lr=0.02)
    learn.model[0].add_module('breaks', breaks)
    with learn.no_logging(), pytest.warns(RuntimeWarning, match='epoch 1, batch 2'): learn.fit(3)
    assert "module '0.breaks' (Breaks)" in check.report and 'learning rate 0.02' in check.report
    assert len(learn.recorder.losses) == 6 and weights(learn).isfinite().all()


def test_a_good_fit_is_not_disturbed(tmp_path):
    def final(cbs) -> torch.Tensor:
        learn = make_learner(tmp_path, cbs)
        learn.model[1].insert(0, nn.Dropout())
        with learn.no_logging(): learn.fit(2, 0.05)
        return weights(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(final(TerminateOnNaNCallback()), final(None))


# The others

def test_short_epochs_and_small_pictures(tmp_path):
    sizes = []
    class Look(Callback):
        def after_pred(self) -> None: sizes.append((self.training, self.x.shape[-1]))
    learn = make_learner(tmp_path, [ShortEpochCallback(0.5), ProgressiveResize({0: 8, 1: 16}, multiple=8), Look])
    with learn.no_logging(): learn.fit_one_cycle(2, 0.05)
    assert sizes == [(True, 8)]*2 + [(False, 16)]*1 + [(True, 16)]*2 + [(False, 16)]*1
    assert learn.recorder.hps['lr'][0] == pytest.approx(0.05 / 25) and len(learn.recorder.losses) == 4
    assert len(learn.get_preds()[0]) == 32 # all of them


def test_frozen_batch_norm(tmp_path):
    def moved(*cbs, train_bn: bool = True) -> bool:
        learn = make_learner(tmp_path, cbs, train_bn=train_bn)
        learn.freeze()
        learn.model[0][1].requires_grad_(False) # by hand
        with learn.no_logging(): learn.fit(1)
        return bool(learn.model[0][1].running_mean.any())
    assert moved() and not moved(BnFreeze)
    assert not moved(train_bn=False) # a learner with train_bn=False keeps them by itself


def test_collected_batches(tmp_path):
    learn = make_learner(tmp_path, collect := CollectDataCallback())
    with learn.no_logging(): learn.fit(1)
    assert sum(len(xb[0]) for xb, *_ in collect.data) == 64 + 32


def test_lower_rates_on_a_plateau(tmp_path):
    learn = make_learner(tmp_path, [Planned(1., 2., 3.), ReduceLROnPlateau(factor=2.)])
    with learn.no_logging(): learn.fit(3, slice(0.01, 0.1))
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx([0.0025, 0.025])


# What a checkpoint keeps

@pytest.mark.parametrize('make', [lambda: SaveModelCallback(), lambda: EarlyStoppingCallback(patience=9), lambda: ReduceLROnPlateau(), lambda: EMACallback(0.9), lambda: GradientAccumulation(64)])
def test_states_are_safe_and_complete(tmp_path, make):
    states = []
    class Keep(Callback):
        order = 99
        def after_batch(self) -> None:
            if self.training and self.epoch == 1 and self.iter == 1: states.append(copy.deepcopy(watched.state_dict()))
    learn = make_learner(tmp_path, [watched := make(), Keep])
    with learn.no_logging(): learn.fit(2)
    torch.save(states[0], tmp_path/'state.pth')
    loaded = torch.load(tmp_path/'state.pth', weights_only=True)
    watched.load_state_dict(loaded)
    after = watched.state_dict()
    assert repr(after) == repr(states[0]) and loaded.keys() == after.keys()
