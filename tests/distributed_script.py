"""What test_distributed.py launches: `python distributed_script.py FOLDER PART ...`; each process writes what it found to FOLDER/PART-RANK.pt."""
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from lamella.base.processes import distrib_barrier, is_main_process, num_distrib, rank0_first, rank_distrib
from lamella.base.seeds import set_seed
from lamella.callbacks.accumulation import GradientAccumulation
from lamella.callbacks.auto_batch import AutoBatch
from lamella.callbacks.averaging import EMACallback
from lamella.callbacks.best import SaveModelCallback
from lamella.callbacks.checkpoint import Checkpoint
from lamella.callbacks.gradients import GradientClip
from lamella.callbacks.log_files import CSVLogger, JSONLogger
from lamella.callbacks.mixup import MixUp
from lamella.callbacks.nan import TerminateOnNaNCallback
from lamella.callbacks.progress import ProgressCallback
from lamella.callbacks.stopping import EarlyStoppingCallback
from lamella.data.loader import DataLoader
from lamella.data.loaders import DataLoaders
from lamella.learner.learner import Learner
from lamella.loop.callback import Callback
from lamella.loop.recorder import Recorder
from lamella.metrics import accuracy
from lamella.optim.optimizer import SGD

torch.set_num_threads(1)
FOLDER = Path(sys.argv[1] if __name__ == '__main__' else '.')


def points(n, seed):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :3] * 2).argmax(1)


class Points(torch.utils.data.Dataset):
    "Points with noise of the sample's own randomness; some of them cannot be read"
    def __init__(self, n, seed, bad=(), noise=0.): self.x, self.y, self.bad, self.noise = *points(n, seed), set(bad), noise
    def __len__(self): return len(self.x)

    def __getitem__(self, i):
        if i in self.bad: raise OSError(f'no point {i}')
        return self.x[i] + self.noise * torch.randn(6), self.y[i]


class Stream(IterableDataset):
    def __iter__(self): return iter(zip(*points(23, 5)))


def net(norm=True): return nn.Sequential(nn.Sequential(nn.Linear(6, 8, bias=not norm), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU()), nn.Linear(8, 3))
def halves(model): return [list(model[0].parameters()), list(model[1].parameters())]
def spread(pred, y): return pred.float().softmax(1).std(correction=0) + y.float().std(correction=0) # no mean over samples


def learner(dls=None, seed=0, norm=True, **kwargs):
    if dls is None: dls = DataLoaders(DataLoader(Points(43, 1, noise=0.5), bs=10, shuffle=True, num_workers=0), DataLoader(Points(21, 2), bs=10, num_workers=0, split_idx=1), device='cpu', path=FOLDER)
    set_seed(seed)
    return Learner(dls, net(norm), **{'loss_func': nn.CrossEntropyLoss(), 'metrics': [accuracy, spread], 'splitter': halves, **kwargs})


def outcome(learn):
    return dict(weights={k: v.clone() for k, v in learn.model.state_dict().items()}, losses=list(learn.recorder.losses), lrs=list(learn.recorder.lrs), values=[list(o) for o in learn.recorder.values])


def part_fit():
    learn = learner()
    with learn.distrib_ctx(): learn.fit_one_cycle(2, 0.05)
    assert 'forward' not in vars(learn) and type(learn.model) is nn.Sequential
    return outcome(learn)


def part_fine_tune():
    learn = learner(train_bn=False)
    with learn.distrib_ctx(): learn.fine_tune(1, 0.05)
    return outcome(learn)


def part_lr_find():
    learn = learner()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.distrib_ctx(): found = learn.lr_find(num_it=30, show_plot=False)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    return dict(found=tuple(found), losses=list(learn.recorder.losses))


def part_predict():
    learn = learner()
    with learn.distrib_ctx():
        learn.fit(1, 0.05)
        return dict(validate=list(learn.validate()), preds=learn.get_preds(with_input=True, with_decoded=True, with_loss=True), train=learn.get_preds(ds_idx=0), **outcome(learn))


def part_losses():
    "Weights of classes, targets to be ignored, and sums, without batch norm; the last batch has one sample, process 1 nothing of it"
    dls = DataLoaders(DataLoader(Points(41, 1), bs=10, shuffle=True, num_workers=0), DataLoader(Points(21, 2), bs=10, num_workers=0, split_idx=1), device='cpu')
    found = {}
    for name, loss in dict(weighted=nn.CrossEntropyLoss(torch.tensor([1., 5., 2.])), ignoring=nn.CrossEntropyLoss(ignore_index=2), summed=nn.CrossEntropyLoss(reduction='sum')).items():
        learn = learner(dls, norm=False, loss_func=loss, opt_func=SGD)
        with learn.distrib_ctx(): learn.fit(1, 1e-3 if name == 'summed' else 0.05)
        found[name] = outcome(learn)
    return found


def part_raw_loader():
    valid = torch.utils.data.DataLoader(TensorDataset(*points(21, 2)), batch_size=10)
    learn = learner((torch.utils.data.DataLoader(TensorDataset(*points(43, 1)), batch_size=10, shuffle=True), valid))
    learn.dls.to('cpu')
    with learn.distrib_ctx():
        learn.fit(2, 0.05)
        return dict(preds=learn.get_preds(), **outcome(learn))


def part_stream():
    learn = learner(DataLoaders(DataLoader(Stream(), bs=5, n=23, split_idx=0), DataLoader(Points(9, 2), bs=4, num_workers=0, split_idx=1), device='cpu'))
    with learn.distrib_ctx(): learn.fit(1, 0.05)
    return outcome(learn)


def part_bad_samples():
    "Of the first batch process 1 can read nothing, neither in training nor in validation; of the third of validation nobody can"
    dls = DataLoaders(DataLoader(Points(40, 1, bad=[2, 3, 17]), bs=4, num_workers=2, on_error='skip', split_idx=0),
                      DataLoader(Points(20, 2, bad=[3, 4, 5, 12, 13, 14, 15, 16, 17]), bs=6, num_workers=0, on_error='skip', split_idx=1), device='cpu')
    learn = learner(dls, opt_func=SGD)
    with learn.distrib_ctx(): learn.fit(2, 0.05)
    return dict(failed=sorted(o.index for o in dls.failures), **outcome(learn))


def part_augmented():
    "Batch transforms draw for the whole batch"
    from lamella.vision.augment import RandomErasing, aug_transforms
    from lamella.vision.batch import IntToFloatTensor
    from lamella.data.types import TensorCategory
    from lamella.vision.types import TensorImage
    class Pictures(Points):
        def __getitem__(self, i): return TensorImage((torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)) * 255).byte()), TensorCategory(self.y[i])
    tfms = [IntToFloatTensor(), *aug_transforms(min_scale=0.6), RandomErasing(p=1.)]
    dls = DataLoaders.from_dsets(Pictures(24, 1), Pictures(7, 2), bs=7, batch_tfms=tfms, num_workers=0, device='cpu')
    set_seed(0)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), nn.CrossEntropyLoss(), metrics=accuracy)
    with learn.distrib_ctx(): learn.fit(2, 0.01)
    return outcome(learn)


def part_train_metrics():
    learn = learner(cbs=Recorder(train_metrics=True), default_cbs=False)
    with learn.distrib_ctx(): learn.fit(1, 0.05)
    return outcome(learn)


def part_own_batches():
    "Each process has batches of 5: together as one with 10"
    dls = DataLoaders(DataLoader(Points(43, 1), bs=10 // max(1, num_distrib()), shuffle=True, num_workers=0), DataLoader(Points(21, 2), bs=10 // max(1, num_distrib()), num_workers=0, split_idx=1), device='cpu')
    learn = learner(dls)
    with learn.distrib_ctx(split_batches=False): learn.fit(1, 0.05)
    assert dls.train.bs == 10 // max(1, num_distrib())
    return outcome(learn)


class Thaw(Callback):
    "Unfreezes in the middle of a fit, and validates in the middle of an epoch"
    def before_epoch(self):
        if self.epoch == 1: self.learn.unfreeze()

    def after_batch(self):
        if self.training and self.iter == 2: self.learn.seen = self.learn.validate()


def part_thaw():
    learn = learner(cbs=Thaw(), train_bn=False)
    learn.freeze()
    with learn.distrib_ctx(): learn.fit(2, 0.05)
    return dict(seen=list(learn.seen), **outcome(learn))


def part_unseeded():
    "Other seeds in each process: only what they do together is the same"
    set_seed(100 + rank_distrib())
    dls = DataLoaders(DataLoader(Points(43, 1), bs=10, shuffle=True, num_workers=0), DataLoader(Points(21, 2), bs=10, num_workers=0, split_idx=1), device='cpu')
    learn = Learner(dls, nn.Sequential(net(), nn.Dropout(0.)), nn.CrossEntropyLoss(), metrics=accuracy)
    with learn.distrib_ctx():
        learn.fit(1, 0.05, cbs=Thaw)
        masks = []
        learn.fit(1, 0.01, cbs=type('Masks', (Callback,), {'order': 12, 'before_batch': lambda self: masks.append(torch.rand(1).item())})())
    return dict(mask=masks[0], after=torch.rand(3).tolist(), **outcome(learn))


def part_files():
    learn = learner()
    learn.dls.train.drop_last = True # without sync_bn a piece of one sample has no variance
    with learn.distrib_ctx(sync_bn=False):
        learn.fit(1, 0.05)
        learn.save(FOLDER/'weights')
        before = {k: v.clone() for k, v in learn.model.state_dict().items()}
        learn.fit(1, 0.05)
        learn.load(FOLDER/'weights')
        assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
        if num_distrib(): assert is_main_process() == any(isinstance(o, ProgressCallback) for o in learn.cbs)
    assert any(isinstance(o, ProgressCallback) for o in learn.cbs)
    learn.path = FOLDER/f'by-{rank_distrib()}'
    learn.save('model')
    rank0_first(lambda: (FOLDER/'order.txt').open('a').write(f'{rank_distrib()}\n'))
    return outcome(learn)


class Own(nn.Module):
    "Takes names, drops out, and computes its loss"
    def __init__(self):
        super().__init__()
        self.net, self.unused = net(), nn.Linear(2, 2)

    def forward(self, x, labels=None): return dict(loss=nn.functional.cross_entropy(out := self.net(x), labels), logits=out)


def part_names():
    "Batches with names, a model that computes its own loss and has parameters it does not use"
    named = lambda rows: {'x': torch.stack([o[0] for o in rows]), 'labels': torch.stack([o[1] for o in rows]), 'more': [str(o[1]) for o in rows]}
    dls = DataLoaders(DataLoader(Points(43, 1), bs=10, shuffle=True, num_workers=0, collate_fn=named), DataLoader(Points(21, 2), bs=10, num_workers=0, split_idx=1, collate_fn=named), device='cpu')
    set_seed(0)
    learn = Learner(dls, Own(), metrics=accuracy_of_logits)
    with learn.distrib_ctx(find_unused_parameters=True): learn.fit(1, 0.05)
    return outcome(learn)


def accuracy_of_logits(pred, y): return accuracy(pred['logits'] if isinstance(pred, dict) else pred, y)


class Stop(Callback):
    "Ends the script in the middle of the second epoch"
    fit_only = True
    def after_batch(self):
        if self.training and self.epoch == 1 and self.iter == 2: raise KeyboardInterrupt


def part_resume():
    "Interrupted in the middle of the second epoch, and gone on with"
    whole = learner()
    with whole.distrib_ctx(): whole.fit_one_cycle(2, 0.05)
    first = learner()
    try:
        with first.distrib_ctx(): first.fit_one_cycle(2, 0.05, checkpoint=Checkpoint(FOLDER/'run', n_batches=1), cbs=Stop)
    except KeyboardInterrupt: pass
    distrib_barrier()
    again = learner()
    with again.distrib_ctx(): again.fit_one_cycle(2, 0.05, checkpoint=Checkpoint(FOLDER/'run', n_batches=1))
    assert all(torch.equal(v, whole.model.state_dict()[k]) for k, v in again.model.state_dict().items())
    return outcome(again)


def part_other_samples():
    "A split that is another one in each process"
    dls = DataLoaders(DataLoader(Points(40 + rank_distrib(), 1), bs=10, num_workers=0), device='cpu')
    try:
        with learner(dls).distrib_ctx(): learner(dls).to_distributed().fit(1)
    except RuntimeError as error: return str(error)


def part_error():
    "A sample that only process 1 reads: all processes stop, without waiting for each other"
    learn = learner(DataLoaders(DataLoader(Points(40, 1, bad=[7]), bs=10, num_workers=0, split_idx=0), device='cpu'))
    try:
        with learn.distrib_ctx(): learn.fit(1)
    except Exception as error: return f'{type(error).__name__}: {error}'


def part_together():
    "What steps, keeps, clips, stops and writes"
    accumulated = learner(path=FOLDER/'together', cbs=[GradientAccumulation(20), GradientClip(0.5), EMACallback(0.9), SaveModelCallback(), EarlyStoppingCallback(patience=1, min_delta=10.), TerminateOnNaNCallback, CSVLogger, JSONLogger])
    with accumulated.distrib_ctx(): accumulated.fit_one_cycle(4, 0.05)
    thawed = learner(train_bn=False)
    with thawed.distrib_ctx(): thawed.finetune(3, ('unfreeze_milestones', ((1, 2), 1)), 0.05)
    return dict(accumulated=outcome(accumulated), thawed=outcome(thawed))


def part_halves():
    "Half the bits, and mixed batches: both processes end alike, though not as one process would"
    learn = learner(cbs=[MixUp, GradientAccumulation(20)]).to_bf16()
    with learn.distrib_ctx(): learn.fit(2, 0.05)
    return outcome(learn)


class Broken(nn.Module):
    "No number is left of a point that has a mark"
    def forward(self, x): return torch.where((x[:, :1] > 2), torch.nan, x)


def part_nan():
    "Only process 1 sees the point that makes the loss NaN"
    data = Points(40, 1)
    data.x[17] = 1000.
    dls = DataLoaders(DataLoader(data, bs=10, num_workers=0, split_idx=0), DataLoader(Points(21, 2), bs=10, num_workers=0, split_idx=1), device='cpu')
    learn = learner(dls, cbs=TerminateOnNaNCallback)
    learn.model = nn.Sequential(nn.BatchNorm1d(6), Broken(), nn.Linear(6, 3)) # process 1 alone has bad predictions, and batch norm needs both
    learn.splitter = lambda m: [list(m.parameters())]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        with learn.distrib_ctx(): learn.fit(2, 0.05)
    return dict(told=[str(o.message) for o in told if 'training stopped' in str(o.message)], steps=len(learn.recorder.losses))


def part_auto_batch():
    try:
        with learner().distrib_ctx() as learn: learn.fit(1, cbs=AutoBatch)
    except RuntimeError as error: return str(error)


class Crash(Callback):
    "Something goes wrong in one process alone"
    def after_batch(self):
        if rank_distrib() == 1 and self.iter == 1: raise ValueError('out of luck')


def part_crash():
    learn = learner()
    with learn.distrib_ctx(): learn.fit(1, cbs=Crash)


if __name__ == '__main__':
    for name in sys.argv[2:]:
        if is_main_process(): print('part', name, flush=True)
        torch.save(globals()[f'part_{name}'](), FOLDER/f'{name}-{rank_distrib()}.pt')
