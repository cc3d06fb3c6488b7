"""Callbacks that were written apart work together, in any company: in one fit, in the next one, and after an interruption."""
import json
import warnings
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lamella.base.seeds import set_seed
from lamella.callbacks.accumulation import GradientAccumulation
from lamella.callbacks.auto_batch import AutoBatch
from lamella.callbacks.averaging import EMACallback
from lamella.callbacks.batchnorm import BnFreeze
from lamella.callbacks.best import SaveModelCallback
from lamella.callbacks.checkpoint import Checkpoint
from lamella.callbacks.gradient_checkpointing import GradientCheckpointing
from lamella.callbacks.gradients import GradientClip
from lamella.callbacks.log_files import CSVLogger, JSONLogger
from lamella.callbacks.mixup import CutMix, CutMixUp, MixUp
from lamella.callbacks.nan import TerminateOnNaNCallback
from lamella.callbacks.plateau import ReduceLROnPlateau
from lamella.callbacks.short import ShortEpochCallback
from lamella.callbacks.stopping import EarlyStoppingCallback
from lamella.data.loader import DataLoader
from lamella.data.loaders import DataLoaders
from lamella.learner.learner import Learner
from lamella.loop.callback import Callback
from lamella.metrics import accuracy
from lamella.nets.groups import params
from lamella.optim.optimizer import QHAdam, Adam, Adan, Lamb, ranger


class Block(nn.Module):
    "Blocks of a kind, which GradientCheckpointing finds"
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x): return x + self.norm(self.conv(x)).relu()


def net(): return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), Block(), Block()), nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 3)))


def pictures(n):
    xs = torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(n))
    return list(zip(xs, xs.mean((2, 3)).argmax(1)))


def make_learner(path, cbs=(), **kwargs):
    set_seed(3)
    load = partial(DataLoader, bs=8, num_workers=0, after_item=None)
    noise = lambda o: o + 0.1 * torch.randn_like(o) if o.is_floating_point() else o
    dls = DataLoaders(load(pictures(36), shuffle=True, after_batch=noise, split_idx=0), load(pictures(12), split_idx=1), device='cpu')
    learn = Learner(dls, net(), nn.CrossEntropyLoss(), metrics=accuracy, path=path, splitter=lambda m: [params(m[0]), params(m[1])], **kwargs)
    learn.recorder.train_metrics = True
    return learn.add_cbs([o() for o in cbs])


def quietly(learn, fit, **kwargs):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(learn, **kwargs)


FITS = {
    'fit': lambda learn, **kw: learn.fit(2, 0.01, **kw),
    'one cycle': lambda learn, **kw: learn.fit_one_cycle(2, 0.01, **kw),
    'flat': lambda learn, **kw: learn.fit_flat_cos(2, 0.01, **kw),
    'restarts': lambda learn, **kw: learn.fit_sgdr(2, 1, 0.01, **kw),
    'fine_tune': lambda learn, **kw: learn.fine_tune(1, 0.01, **kw),
    'milestones': lambda learn, **kw: learn.finetune(3, ('unfreeze_milestones', ((1, 2), 1)), 0.01, train_bn=False, **kw),
    'freeze': lambda learn, **kw: learn.finetune(2, 'freeze_unfreeze_1', 0.01, **kw),
}
CALLBACKS = {
    'accumulation': partial(GradientAccumulation, 20), 'clip': partial(GradientClip, 0.1), 'average': partial(EMACallback, 0.9), 'mixup': MixUp, 'cutmix': CutMix, 'both': CutMixUp,
    'best': SaveModelCallback, 'stopping': partial(EarlyStoppingCallback, patience=2), 'plateau': ReduceLROnPlateau, 'nan': TerminateOnNaNCallback,
    'parts': partial(AutoBatch, 3), 'blocks': GradientCheckpointing, 'short': partial(ShortEpochCallback, 0.6), 'csv': CSVLogger, 'json': partial(JSONLogger, every=2), 'norms': BnFreeze,
}


def traces(learn):
    "What a callback could leave behind: attributes, hooks, wrappers, another mode"
    attributes = {k for k, v in vars(learn).items() if callable(v) and k not in ('model', 'loss_func', 'opt_func', 'splitter')} | {'opt'}
    modules = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), 'forward' in vars(m), m.training) for m in learn.model.modules()]
    hooks = [len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in learn.model.parameters()]
    now = {k: getattr(learn, k) for k in ('xb', 'yb', 'pred', 'loss_grad', 'fitting', 'resuming', 'searching', 'only_validating', 'phase', 'metrics')}
    return dict(attributes=attributes, modules=modules, hooks=hooks, now=now, cbs=list(learn.cbs), logger=learn.logger, autocast=torch.is_autocast_enabled('cpu'),
                grads=[p.grad for p in learn.model.parameters()], loss=learn.loss_func, reduction=learn.loss_func.reduction)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(chosen=st.sets(st.sampled_from(sorted(CALLBACKS)), max_size=8), fit=st.sampled_from(sorted(FITS)), bits=st.sampled_from(['fp32', 'bf16', 'fp16']), compiled=st.booleans(), search=st.booleans())
def test_any_callbacks_in_one_fit_and_the_next(tmp_path, chosen, fit, bits, compiled, search):
    compiled = compiled and 'blocks' not in chosen
    learn = make_learner(tmp_path, [CALLBACKS[o] for o in sorted(chosen)])
    if bits != 'fp32': getattr(learn, f'to_{bits}')()
    if compiled: learn.compile(backend='eager')
    learn.create_opt()
    learn.model.eval()
    learn.fit(0) # what a fit leaves by itself
    before = traces(learn)
    if search:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.lr_find(num_it=6, show_plot=False, stop_div=False)
        assert traces(learn) == before
    for _ in range(2):
        first = torch.cat([p.detach().flatten().clone() for p in learn.model.parameters()])
        quietly(learn, FITS[fit])
        assert traces(learn) == before
        last = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
        assert last.isfinite().all() and not torch.equal(first, last) and learn.recorder.values
    learn.validate(), learn.get_preds()
    assert traces(learn) == before


# ---- interrupted

class Interrupt(Callback):
    "Ctrl+C at a batch of this process, of training or validation"
    order = 300
    def __init__(self, at): self.left = at

    def after_batch(self):
        self.left -= 1
        if self.left == 0: raise KeyboardInterrupt


def plain(x):
    "Numbers as Python's, to be compared bit by bit"
    if isinstance(x, dict): return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)): return [plain(o) for o in x]
    return x.tolist() if isinstance(x, torch.Tensor) else float(x) if isinstance(x, float) else x


def outcome(learn):
    r = learn.recorder
    found = dict(weights=learn.model.state_dict(), opt=learn.opt.state_dict(), losses=r.losses, raw=r.raw_losses, lrs=r.lrs, iters=r.iters, values=r.values, rows=[row[:-1] for row in r.rows], names=r.metric_names,
                 hps=r.hps, random=torch.rand(3), trains=[p.requires_grad for p in learn.model.parameters()], final=learn.final_record)
    kept = {cb.name: cb.state_dict() for cb in learn.cbs if cb.name not in ('recorder', 'csv_logger', 'json_logger', 'progress')}
    for state in kept.values(): state.pop('last_saved_path', None)
    return plain({**found, 'kept': kept})


def files(path):
    "What was logged, without times"
    table = [line.split(',')[:-1] for line in (path/'history.csv').read_text().splitlines()] if (path/'history.csv').is_file() else None
    lines = [json.loads(o) for o in (path/'history.jsonl').read_text().splitlines()] if (path/'history.jsonl').is_file() else []
    return table, [{k: v for k, v in line.items() if 'time' not in k and 'second' not in k} for line in lines if 'config' not in line]


def resumed(path, fit, cbs=(), at=(), adjust=lambda learn: learn, **kwargs):
    "Run a fit whole, and run it with interruptions; what both end with"
    def run(folder, *more):
        learn = adjust(make_learner(folder, [*cbs, *more], **kwargs))
        quietly(learn, FITS[fit] if isinstance(fit, str) else fit, checkpoint=Checkpoint(folder/'run', n_batches=1, keep=1))
        return outcome(learn), files(folder)
    whole, interrupted = run(path/'whole'), False
    for k in at:
        try: run(path/'killed', partial(Interrupt, k))
        except KeyboardInterrupt: interrupted = True
    assert interrupted
    return whole, run(path/'killed')


def differences(a, b, where=''):
    if isinstance(a, dict) and isinstance(b, dict): return [o for k in {**a, **b} for o in (differences(a[k], b[k], f'{where}.{k}') if k in a and k in b else [f'{where}.{k}: in one only'])]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b): return [o for k, (x, y) in enumerate(zip(a, b)) for o in differences(x, y, f'{where}[{k}]')]
    return [] if a == b or (a != a and b != b) else [f'{where}: {a} and {b}']


CASES = {
    'best': ('fine_tune', ['best', 'average', 'json'], (9, 2), {}),
    'best of epochs': ('fit', ['best', 'stopping', 'plateau', 'csv'], (6, 8), dict(opt_func=Lamb)),
    'accumulation': ('one cycle', ['accumulation', 'clip', 'average'], (3, 6), {}),
    'fp16': ('one cycle', ['accumulation', 'clip'], (13, 6), dict(adjust=lambda learn: learn.to_fp16(growth_interval=2, init_scale=2.**20))),
    'bf16': ('one cycle', ['mixup'], (4, 5), dict(adjust=lambda learn: learn.to_bf16())),
    'mixing': ('flat', ['both', 'nan'], (8, 3), dict(opt_func=ranger)),
    'cutting': ('restarts', ['cutmix'], (2, 9), dict(opt_func=QHAdam)),
    'short': ('one cycle', ['short', 'accumulation'], (2, 4), {}),
    'parts': ('one cycle', ['parts', 'blocks'], (4, 2), dict(opt_func=Adan)),
    'files': ('one cycle', ['csv', 'json'], (5, 2), {}),
    'milestones': ('milestones', ['best', 'norms'], (9, 20), {}),
    'freezing': ('freeze', ['stopping', 'accumulation'], (13, 13), {}),
    'compiled': ('one cycle', ['average', 'plateau'], (1, 10), dict(adjust=lambda learn: learn.compile(backend='eager'), opt_func=partial(Adam, decouple_wd=False))),
}


@pytest.mark.parametrize('name', CASES)
def test_interrupted_fits_end_as_the_whole_one(tmp_path, name):
    "Interrupted twice, the second time after having gone on; where the second one comes too late, the fit is done, and the same script finds that"
    fit, cbs, at, options = CASES[name]
    whole, again = resumed(tmp_path, fit, [CALLBACKS[o] for o in cbs], at, **options)
    assert not differences(whole, again)


# ---- orders

class Norms(Callback):
    "The norm of all gradients, between unscaling and clipping, and before the step"
    def __init__(self, order): self.order, self.seen = order, []
    def before_step(self): self.seen.append(torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm().item())


def test_clipping_sees_whole_gradients_without_scale(tmp_path):
    seen = {}
    for bits in ('fp32', 'fp16'):
        before, after = Norms(10.5), Norms(12)
        learn = make_learner(tmp_path)
        learn.model[1][2].p = 0.
        if bits == 'fp16': learn.to_fp16(init_scale=2.**10)
        quietly(learn, lambda learn: learn.fit(1, 1e-4, cbs=[GradientAccumulation(16), GradientClip(0.05), before, after]))
        seen[bits] = before.seen
        assert len(before.seen) == 3 and min(before.seen) > 0.05 and max(after.seen) <= 0.0501 # 16, 16 and 4 samples
    assert torch.allclose(*map(torch.tensor, seen.values()), rtol=0.05)


def test_average_counts_steps_that_were_made(tmp_path):
    "Neither micro-batches nor steps that float16 left out"
    average = EMACallback(0.9)
    learn = make_learner(tmp_path).to_fp16(init_scale=2.**26)
    quietly(learn, lambda learn: learn.fit(12, 1e-3, cbs=[GradientAccumulation(16), average]))
    skipped = learn.mixed_precision.skipped_steps
    assert skipped > 2 and average.steps == 12 * 3 - skipped > 2


# ---- an error is seen, and forgotten

def test_an_error_leaves_nothing_behind(tmp_path):
    "At each event of a batch; the next fit works"
    for place in ('before_batch', 'after_pred', 'after_loss', 'before_step', 'after_step', 'after_batch', 'before_validate', 'after_epoch'):
        learn = make_learner(tmp_path, [CALLBACKS[o] for o in ('accumulation', 'average', 'mixup', 'parts', 'blocks', 'best', 'csv', 'json')]).to_bf16()
        learn.fit(0)
        before = traces(learn)
        def fail(self): raise ZeroDivisionError(place)
        with pytest.raises(ZeroDivisionError, match=place): quietly(learn, FITS['fit'], cbs=type('Fail', (Callback,), {'order': 250, place: fail})())
        after = traces(learn)
        for name in ('attributes', 'hooks', 'now', 'cbs', 'logger', 'autocast', 'loss', 'reduction'): assert after[name] == before[name], (place, name)
        assert [o[:4] for o in after['modules']] == [o[:4] for o in before['modules']]
        quietly(learn, FITS['fit'])
        assert {k: v for k, v in traces(learn).items() if k != 'modules'} == {k: v for k, v in before.items() if k != 'modules'}
