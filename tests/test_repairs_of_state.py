"""What a search, an average, an interruption and a nested validation leave behind: buffers that are assigned anew, frozen parts, scales, generators, autocast."""
import json
import warnings

import pytest
import torch
from torch import nn

from lamella.base.seeds import set_seed
from lamella.callbacks.accumulation import GradientAccumulation
from lamella.callbacks.auto_batch import AutoBatch
from lamella.callbacks.averaging import EMACallback
from lamella.callbacks.checkpoint import Checkpoint
from lamella.callbacks.log_files import JSONLogger
from lamella.callbacks.nan import first_bad_module
from lamella.callbacks.precision import MixedPrecision
from lamella.data.loader import DataLoader
from lamella.data.loaders import DataLoaders
from lamella.learner.learner import Learner
from lamella.loop.callback import Callback
from lamella.loop.events import CancelTrainException
from lamella.metrics import accuracy
from lamella.nets.groups import params, trainable_params
from lamella.optim.optimizer import SGD


pytestmark = pytest.mark.filterwarnings('ignore:another learner of this process') # a script that is started again, here in one process


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Average(nn.Module):
    "Assigns its buffer anew in each step"
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 2)
        self.register_buffer('mean', torch.zeros(4))

    def forward(self, x):
        if self.training: self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.line(x - self.mean)


class LossWithMemory(nn.CrossEntropyLoss):
    "Has a running average and a parameter, both changed by a fit"
    def __init__(self):
        super().__init__()
        self.register_buffer('seen', torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pred, targ):
        loss = super().forward(pred, targ) * self.scale.item()
        self.seen = self.seen + 1
        with torch.no_grad(): self.scale.mul_(0.99)
        return loss


def samples(n=64):
    xs = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    return list(zip(xs, (xs.sum(1) > 0).long()))


def net(): return nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 2))


def body_and_head(model): return [params(model[0]), params(model[1])]


def own_loaders():
    load = lambda part, **options: DataLoader(part, bs=8, after_item=None, num_workers=0, **options)
    return DataLoaders(load(samples()[:48], shuffle=True, split_idx=0), load(samples()[48:], split_idx=1))


def make_learner(cbs=(), model=None, dls=None, loss_func=None, **options):
    set_seed(5)
    learn = Learner(dls or own_loaders(), model or net(), loss_func or nn.CrossEntropyLoss(), metrics=accuracy, cbs=list(cbs),
                    splitter=trainable_params if model else body_and_head, opt_func=lambda p, lr: SGD(p, lr), **options)
    learn.logger = lambda row: None
    return learn


class Interrupt(Callback):
    "Ctrl-C at an event of one of the fits that this process runs"
    order = 300

    def __init__(self, event, fit=0, when=lambda learn: True):
        self.fits = -1
        setattr(self, event, lambda: self.stop(fit, when))

    def before_fit(self): self.fits += 1

    def stop(self, fit, when):
        if self.fits == fit and when(self.learn): raise KeyboardInterrupt()


def interrupted(run, cb):
    with pytest.raises(KeyboardInterrupt): run(cb)


# ---- the average of the weights

def test_average_of_a_body_that_is_unfrozen_within_the_fit():
    ema = EMACallback(0.5, warmup=False)
    learn = make_learner([ema])
    learn.freeze()
    before = learn.model[0][0].weight.detach().clone()
    learn.finetune(4, ('freeze_unfreeze', 1), lr=0.1)
    average = learn.model[0][0].weight.detach().clone()
    ema.swap()
    trained = learn.model[0][0].weight.detach()
    assert not torch.equal(trained, before) and not torch.equal(average, before)
    assert (average - trained).norm() < (average - before).norm() # of the last steps, mostly


def test_average_of_a_body_that_is_frozen_within_the_fit():
    class Freeze(Callback):
        def before_epoch(self): self.learn.opt.freeze_to(int(self.epoch >= 1))
    ema = EMACallback(0.5, warmup=False)
    learn = make_learner([Freeze, ema])
    learn.fit(8, 0.1)
    average = learn.model[0][0].weight.detach().clone()
    ema.swap()
    assert torch.allclose(average, learn.model[0][0].weight, atol=1e-6) # 42 steps of which each halves the distance


def test_average_of_a_buffer_that_is_assigned_anew():
    class Note(Callback):
        order, values = 20, None
        def before_fit(self): self.values = []
        def after_step(self): self.values.append(self.model.mean.clone())
    note = Note()
    learn = make_learner([EMACallback(0.5, warmup=False), note], model=Average())
    learn.fit(2, 0.1)
    expected = note.values[0]
    for value in note.values[1:]: expected = 0.5 * expected + 0.5 * value
    assert torch.allclose(learn.model.mean, expected, atol=1e-6)


# ---- no trace

def test_search_puts_back_buffers_that_are_assigned_anew():
    learn = make_learner(model=Average())
    learn.fit(1, 0.1)
    tensor, value = learn.model.mean, learn.model.mean.clone()
    learn.lr_find(num_it=5, show_plot=False)
    assert learn.model.mean is tensor and torch.equal(tensor, value)


def test_search_puts_back_the_loss_function():
    learn = make_learner(loss_func=LossWithMemory())
    learn.fit(1, 0.1)
    before = {k: v.clone() for k, v in learn.loss_func.state_dict().items()}
    learn.lr_find(num_it=5, show_plot=False)
    assert before['seen'] > 0 and before['scale'] < 1
    for name, value in learn.loss_func.state_dict().items(): assert torch.equal(value, before[name]), name


def test_the_look_for_a_bad_module_puts_back_buffers_that_are_assigned_anew():
    model, x = Average().train(), torch.randn(8, 4)
    first_bad_module(model, lambda: model(x))
    assert not model.mean.any()


def test_a_batch_begun_anew_puts_back_buffers_that_are_assigned_anew():
    class Full(nn.Module):
        "Has no room for more than 4 samples, and says so after its buffer has changed"
        def __init__(self):
            super().__init__()
            self.inner = Average()
        def forward(self, x):
            result = self.inner(x * 0 + 1)
            if len(x) > 4: raise torch.cuda.OutOfMemoryError('CUDA out of memory')
            return result
    class First(Callback):
        def after_pred(self): self.seen = getattr(self, 'seen', None) or self.model.inner.mean.max().item()
    first = First()
    learn = make_learner([AutoBatch, first], model=Full())
    with pytest.warns(UserWarning, match='and the same result$'): learn.fit(1, 0.1)
    assert first.seen == pytest.approx(1 - 0.9**2) # two parts, and nothing of the whole batch that failed


def test_parts_of_a_batch_are_the_whole_but_for_batch_norm():
    class Full(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()
        def forward(self, x):
            if len(x) > 4 and self.training: raise torch.cuda.OutOfMemoryError('CUDA out of memory')
            return self.inner(x)
    learn = make_learner([AutoBatch], model=Full())
    with pytest.warns(UserWarning, match='batch norm sees the parts'): learn.fit(1, 0.1)


# ---- generators of torch's loaders

def torch_loaders(kind):
    generator = torch.Generator().manual_seed(3)
    options = {'batch_size': 8, 'shuffle': True, 'generator': generator}
    if kind == 'sampler': options = {'batch_size': 8, 'sampler': torch.utils.data.RandomSampler(samples(), generator=generator)}
    if kind == 'batch sampler':
        options = {'batch_sampler': torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(samples(), generator=generator), 8, False)}
    train = torch.utils.data.DataLoader(samples(), **options)
    return DataLoaders(train, torch.utils.data.DataLoader(samples(), 8)), generator


KINDS = pytest.mark.parametrize('kind', ['loader', 'sampler', 'batch sampler'])


@KINDS
def test_search_puts_back_the_generator_of_a_loader_of_torch(kind):
    dls, generator = torch_loaders(kind)
    before = generator.get_state()
    make_learner(dls=dls).lr_find(num_it=5, show_plot=False)
    assert torch.equal(generator.get_state(), before)


@KINDS
def test_a_fit_goes_on_in_the_order_of_a_loader_of_torch(tmp_path, kind):
    def fit(folder, *cbs):
        learn = make_learner(cbs, dls=torch_loaders(kind)[0])
        learn.fit(4, 0.1, checkpoint=tmp_path/folder)
        return learn
    alone = fit('alone')
    interrupted(lambda cb: fit('resumed', cb), Interrupt('before_batch', when=lambda learn: learn.epoch == 2))
    again = fit('resumed')
    for name, value in again.model.state_dict().items(): assert torch.equal(value, alone.model.state_dict()[name]), name


# ---- fits that were done

def test_a_finetune_that_was_done_is_as_it_ended(tmp_path):
    def fit():
        learn = make_learner()
        learn.finetune(3, ('freeze_unfreeze', 1), checkpoint=tmp_path)
        return [p.requires_grad for p in learn.model.parameters()]
    assert fit() == fit() and all(fit())


def test_the_scale_of_float16_goes_on_in_the_next_phase(tmp_path):
    def fit(*cbs):
        learn = make_learner([MixedPrecision('fp16', init_scale=2.**8, growth_interval=4), *cbs])
        for _ in range(2): learn.fit(1, 0.01, checkpoint=tmp_path)
        return learn.mixed_precision.state_dict()
    interrupted(fit, Interrupt('before_train', fit=1))
    found = fit()
    assert found['scaler']['scale'] == 2.**11 and found['scaler']['_growth_tracker'] == 0 # 12 steps


@pytest.mark.parametrize('place, dls', [('before_validate', own_loaders), ('after_fit', lambda: torch_loaders('loader')[0])])
def test_a_log_goes_on_after_the_last_batch(tmp_path, place, dls):
    def fit(name, *cbs):
        learn = make_learner([JSONLogger(every=4), *cbs], dls=dls(), path=tmp_path/name)
        (tmp_path/name).mkdir(exist_ok=True)
        for _ in range(2): learn.fit(2, 0.01, checkpoint=Checkpoint(tmp_path/name/'checkpoints', n_batches=1)) # those of torch: behind each epoch
        rows = [json.loads(line) for line in (tmp_path/name/'history.jsonl').read_text().splitlines()]
        return [(row['step'], row['epoch'], sorted(row)) for row in rows if 'config' not in row]
    alone = fit('alone')
    interrupted(lambda cb: fit('resumed', cb), Interrupt(place, when=lambda learn: learn.epoch == 1))
    assert fit('resumed') == alone


# ---- a validation within a batch

def test_validating_within_a_batch_leaves_no_autocast_behind():
    class Look(Callback):
        order, inner = 20, False
        def after_pred(self):
            if self.inner or not self.training or self.iter: return
            self.inner = True
            self.learn.validate()
            self.inner = False
            self.seen = torch.is_autocast_enabled('cpu')
    look = Look()
    learn = make_learner([look]).to_bf16()
    try:
        learn.fit(1, 0.01)
        left = torch.is_autocast_enabled('cpu')
    finally: torch.set_autocast_enabled('cpu', False)
    assert look.seen and not left # the batch itself went on in 16 bits


def test_a_clean_up_that_fails_leaves_no_autocast_behind():
    class Fails(Callback):
        def after_pred(self): raise ValueError('first')
        def cleanup_batch(self): raise ValueError('mine')
    learn = make_learner([Fails]).to_bf16()
    try:
        with pytest.raises(ValueError, match='mine'): learn.fit(1, 0.01)
        left = torch.is_autocast_enabled('cpu')
    finally: torch.set_autocast_enabled('cpu', False)
    assert not left


# ---- groups of batches

@pytest.mark.parametrize('error', [ValueError('mine'), CancelTrainException()])
def test_an_epoch_that_ends_before_the_groups_begin(error):
    class Ends(Callback):
        order = 0
        def before_train(self): raise error
    learn = make_learner([Ends, GradientAccumulation(16)])
    if isinstance(error, CancelTrainException): return learn.fit(1, 0.1)
    with pytest.raises(ValueError, match='mine'): learn.fit(1, 0.1)
