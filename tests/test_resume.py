"""A run that is killed at any moment and started again ends as the run that was left alone: weights, optimizer, recorder, metrics."""
import os
import signal
import subprocess
import sys

import pytest
import torch

SCRIPT = '''
import os, signal, sys, torch
from torch import nn
from lamella.vision.all import *
from lamella.callbacks.checkpoint import Checkpoint
from lamella.callbacks import checkpoint as module

folder, result, kill = sys.argv[1:4]

def die(): os.kill(os.getpid(), signal.SIGKILL)

class Kill(Callback):
    "Dies at a place such as 'batch 1 7' (second fit, eighth batch), 'validation 0 0', 'epoch 1 0'"
    order = 300
    fits = -1
    def before_fit(self): self.fits += 1 # fits that this process ran
    def at(self, place, number): return kill == f'{place} {self.fits} {number}'
    def after_batch(self):
        if self.at('batch' if self.training else 'validation', self.train_iter if self.training else self.iter): die()
    def after_epoch(self):
        if self.at('epoch', self.epoch): die()
    def after_fit(self):
        if self.at('fit', 0): die()

if kill.startswith('write'):
    save, left = torch.save, [int(kill.split()[1])]
    def half(state, file):
        save(state, file)
        if not isinstance(file, (str, os.PathLike)): return
        left[0] -= 1
        if not left[0]:
            with open(file, 'r+b') as f: f.truncate(1000)
            die()
    torch.save = half

set_seed(7)
xs = torch.randn(64, 4)
items = list(zip(xs, (xs.sum(1) > 0).long()))
make = lambda part, **options: DataLoader(part, bs=8, after_item=None, num_workers=2, **options)
dls = DataLoaders(make(items[:48], shuffle=True, after_batch=lambda o: o + 0.1 * torch.randn_like(o) if o.is_floating_point() else o, split_idx=0), make(items[48:], split_idx=1))
model = nn.Sequential(nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU()), nn.Dropout(0.3), nn.Linear(16, 2))
learn = Learner(dls, model, nn.CrossEntropyLoss(), metrics=accuracy, splitter=lambda m: [params(m[0]), params(m[2])], cbs=[Kill()])
learn.recorder.train_metrics = True
with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, freeze_epochs=2, checkpoint=Checkpoint(folder, n_batches=2))
r = learn.recorder
torch.save({'model': model.state_dict(), 'opt': learn.opt.state_dict(), 'losses': r.losses, 'lrs': r.lrs, 'iters': r.iters, 'hps': {k: list(map(float, v)) for k, v in r.hps.items()},
            'values': [list(map(float, row)) for row in r.values], 'smooth': float(r.smooth_loss), 'random': torch.rand(3)}, result)
'''

KILLS = ['batch 0 5', 'validation 0 1', 'write 2', 'epoch 0 1', 'fit 0 0', 'batch 1 7', 'none']


def run(script, folder, result, kill):
    "Run the script once; its exit status"
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'}
    return subprocess.run([sys.executable, str(script), str(folder), str(result), kill], capture_output=True, text=True, env=env, timeout=300)


def same(a, b) -> bool:
    "Equal, bit for bit, however nested"
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no SIGKILL here')
def test_killed_runs_end_as_the_one_that_was_left_alone(tmp_path):
    script = tmp_path/'script.py'
    script.write_text(SCRIPT)
    alone = run(script, tmp_path/'alone', tmp_path/'alone.pt', 'none')
    assert alone.returncode == 0, alone.stderr
    for kill in KILLS:
        done = run(script, tmp_path/'killed', tmp_path/'killed.pt', kill)
        assert done.returncode == (0 if kill == 'none' else -signal.SIGKILL), f'{kill}: {done.returncode}\n{done.stderr[-3000:]}'
    expected, found = (torch.load(tmp_path/name, weights_only=False) for name in ('alone.pt', 'killed.pt'))
    for name in expected: assert same(expected[name], found[name]), f'{name}:\n{expected[name]}\n{found[name]}'
    assert len(list((tmp_path/'killed').glob('checkpoint-*.pt'))) == 2 and not list((tmp_path/'killed').glob('.checkpoint*'))
    again = run(script, tmp_path/'killed', tmp_path/'again.pt', 'none')
    assert again.returncode == 0 and same(expected['model'], torch.load(tmp_path/'again.pt', weights_only=False)['model'])
