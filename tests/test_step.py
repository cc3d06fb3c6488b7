"""A step of training passes through little of lamella: counted, not timed (its time is a row of `make bench`)."""
import sys
from pathlib import Path

import torch
from torch import nn

import lamella
from lamella.data.loaders import DataLoaders
from lamella.learner.learner import Learner
from lamella.loop.callback import Callback
from lamella.metrics import mae

HOME = str(Path(lamella.__file__).parent)


class Tracer(Callback):
    "Counts what is entered between the beginnings of two batches, in the middle of the second epoch"
    order = -1000

    def __init__(self): self.calls, self.lines = [], set()

    def before_batch(self):
        if self.learn.training and (self.learn.epoch, self.learn.iter) == (1, 2): sys.settrace(self.trace)
        if self.learn.training and (self.learn.epoch, self.learn.iter) == (1, 3): sys.settrace(None)

    def trace(self, frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith(HOME): return None
        self.calls.append((code.co_filename, code.co_name))
        return self.line

    def line(self, frame, event, _):
        if event == 'line': self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self.line


def traced_step() -> Tracer:
    "A fit with the table and a metric"
    torch.manual_seed(0)
    data = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(6)]
    model, tracer = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), Tracer()
    learn = Learner(DataLoaders(data, data), model, nn.MSELoss(), metrics=mae, cbs=tracer)
    learn.fit(2, 0.01)
    return tracer


def test_a_step_enters_few_functions_lines_and_files(capsys):
    tracer = traced_step()
    functions, files = set(tracer.calls), {file for file, _ in tracer.calls}
    with capsys.disabled(): print(f'\na step: {len(functions)} functions, {len(tracer.calls)} calls, {len(tracer.lines)} lines, {len(files)} files')
    assert 10 < len(functions) < 30, sorted(functions)
    assert 30 < len(tracer.lines) < 150
    assert len(files) <= 5, sorted(files)
