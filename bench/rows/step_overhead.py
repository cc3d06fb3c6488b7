"""One training step of a tiny net by `Learner.fit` with SGD, batches in memory; floor: the loop written by hand."""
import torch
from _common import library, main, prepare, seconds
from torch import nn
from torch.utils.data import TensorDataset

STEPS, EPOCHS = 500, 8


class Batches:
    "The least that a loader can be: a list of batches with a `dataset`"
    def __init__(self, count: int, bs: int = 64):
        xs, ys = torch.randn(count*bs, 16), torch.randn(count*bs, 1)
        self.dataset, self.batch_size = TensorDataset(xs, ys), bs
        self.batches = list(zip(xs.split(bs), ys.split(bs)))

    def __len__(self): return len(self.batches)
    def __iter__(self): return iter(self.batches)


def make_model():
    "The tiny net"
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))


def microseconds_a_step(fit) -> float:
    "The time of a step in `fit(epochs)`, after an epoch that is not counted; one batch an epoch validates"
    fit(1)
    return 1e6 * seconds(lambda: fit(EPOCHS)) / (EPOCHS*STEPS)


def measure(name: str, optimizer: str = 'SGD') -> float:
    "Microseconds a step of the program that users write"
    vision = library(name)
    prepare()
    dls = vision.DataLoaders(Batches(STEPS), Batches(1))
    learn = vision.Learner(dls, make_model(), loss_func=nn.MSELoss(), opt_func=getattr(vision, optimizer),
                           metrics=vision.mae, lr=1e-3)
    return microseconds_a_step(learn.fit)


def floor(optimizer: str = 'SGD', **kwargs) -> float:
    "Microseconds a step of the same loop without a framework"
    prepare()
    train, valid, model, loss_func = Batches(STEPS), Batches(1), make_model(), nn.MSELoss()
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3, **kwargs)

    def fit(epochs: int):
        for _ in range(epochs):
            train_epoch(model, train, loss_func, opt)
            validate(model, valid, loss_func)
    return microseconds_a_step(fit)


def train_epoch(model, loader, loss_func, opt):
    "The five lines that everybody knows"
    model.train()
    for xb, yb in loader:
        loss = loss_func(model(xb), yb)
        loss.backward()
        opt.step()
        opt.zero_grad()


def validate(model, loader, loss_func) -> tuple[float, float]:
    "The mean loss and the mean absolute error"
    model.eval()
    with torch.no_grad():
        results = [(loss_func(pred := model(xb), yb).item(), (pred - yb).abs().mean().item()) for xb, yb in loader]
    return tuple(sum(column)/len(results) for column in zip(*results))


if __name__ == '__main__': main('µs', measure, floor)
