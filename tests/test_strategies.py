"""Which parameters and statistics move in which epoch: for every strategy of `finetune`, for `fine_tune`, `freeze`, `freeze_to` and `unfreeze`.

Every tensor of the model is compared bit by bit with what it was before the epoch: weights, biases, normalisation and its running statistics.
"""
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from lamella.base.seeds import set_seed
from lamella.data.loaders import DataLoaders
from lamella.learner.learner import Learner
from lamella.learner.strategies import STRATEGIES, body_layers, register_strategy
from lamella.loop.callback import Callback
from lamella.optim.optimizer import SGD, Adam, Lamb, ranger

OPTIMIZERS = {'sgd': partial(SGD, mom=0.9, wd=0.1), 'adam': partial(Adam, wd=0.1), 'adam, all decay': partial(Adam, wd=0.1), 'ranger': partial(ranger, k=2), 'lamb': partial(Lamb, wd=0.1),
              'adamw of torch': partial(torch.optim.AdamW, weight_decay=0.1)}


def block(n_in: int, n_out: int) -> nn.Sequential:
    "A bias before batch norm has no gradient, so there is an activation between"
    return nn.Sequential(nn.Linear(n_in, n_out), nn.Tanh(), nn.BatchNorm1d(n_out))


def make_learner(optimizer: str = 'adam', train_bn: bool = True, n: int = 32) -> Learner:
    "Three blocks in a body of two groups, and a head with batch norm"
    set_seed(0)
    x = torch.randn(n, 3)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    model = nn.Sequential(nn.Sequential(block(3, 4), block(4, 4), block(4, 4)), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)))
    groups = lambda m: [list(m[0][0].parameters()), list(m[0][1:].parameters()), list(m[1].parameters())]
    dls = DataLoaders.from_dsets(data, data, bs=8, num_workers=0, device='cpu')
    learn = Learner(dls, model, nn.MSELoss(), OPTIMIZERS[optimizer], splitter=groups, train_bn=train_bn, wd_bn_bias=optimizer.endswith('all decay'))
    learn.logger = lambda row: None
    return learn.remove_cbs([o for o in learn.cbs if type(o).__name__ == 'ProgressCallback'])


class Moves(Callback):
    "The names of the tensors that an epoch changed"
    def __init__(self): self.moved = []

    def before_epoch(self): self.before = {k: v.clone() for k, v in self.model.state_dict().items()}

    def after_epoch(self): self.moved.append({k for k, v in self.model.state_dict().items() if not torch.equal(v, self.before[k])})


NAMES = list(make_learner().model.state_dict())
LINEAR = {k: {f'0.{k}.0.weight', f'0.{k}.0.bias'} for k in range(3)}
NORM_WEIGHTS = {k: {f'0.{k}.2.weight', f'0.{k}.2.bias'} for k in range(3)}
STATISTICS = {k: {f'0.{k}.2.{name}' for name in ('running_mean', 'running_var', 'num_batches_tracked')} for k in range(3)}
HEAD = {name for name in NAMES if name.startswith('1.')}


def moving(blocks: list[int], train_bn: bool) -> set[str]:
    "What moves when these blocks of the body train, and the head does"
    norms = range(3) if train_bn else blocks
    return HEAD.union(*[LINEAR[k] for k in blocks], *[NORM_WEIGHTS[k] | STATISTICS[k] for k in norms])


CASES = {
    'no_freeze': ('no_freeze', [[0, 1, 2]] * 4),
    'freeze': ('freeze', [[]] * 4),
    'freeze_unfreeze': (('freeze_unfreeze', 2), [[], [], [0, 1, 2], [0, 1, 2]]),
    'as text': ('freeze_unfreeze_3', [[], [], [], [0, 1, 2]]),
    'without number': ('freeze_unfreeze', [[], [0, 1, 2], [0, 1, 2], [0, 1, 2]]),
    'milestones': (('unfreeze_milestones', ((1, 3), 1)), [[], [2], [2], [0, 1, 2]]),
    'milestones of two layers': (['unfreeze_milestones', [[1, 2], 2]], [[], [1, 2], [0, 1, 2], [0, 1, 2]]),
    'own': (lambda learn, epoch: epoch, [[0, 1, 2], [1, 2], [], []]),
}


def test_the_names_are_all():
    "The tables above speak of every tensor of the model"
    assert moving([0, 1, 2], True) == set(NAMES) == moving([0, 1, 2], False)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('train_bn', [True, False])
@pytest.mark.parametrize('case', CASES)
def test_every_epoch_moves_what_it_should(case: str, train_bn: bool, optimizer: str):
    strategy, blocks = CASES[case]
    if case == 'own': blocks, strategy = blocks[:3], (lambda learn, epoch: epoch)
    learn, moves = make_learner(optimizer), Moves()
    learn.finetune(len(blocks), strategy, lr=0.05, train_bn=train_bn, cbs=moves)
    assert moves.moved == [moving(o, train_bn) for o in blocks]


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('train_bn', [True, False])
def test_fine_tune(train_bn: bool, optimizer: str):
    learn, moves = make_learner(optimizer, train_bn), Moves()
    learn.fine_tune(2, base_lr=1., lr_mult=1, freeze_epochs=2, cbs=moves)
    assert moves.moved == [moving([], train_bn)] * 2 + [moving([0, 1, 2], train_bn)] * 2


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('train_bn', [True, False])
def test_freeze_and_its_like(train_bn: bool, optimizer: str):
    "Frozen after training: neither weight decay nor old momentum moves what is frozen"
    learn, moves = make_learner(optimizer, train_bn), Moves()
    for freeze in (learn.unfreeze, learn.freeze, lambda: learn.freeze_to(1), lambda: learn.freeze_to(-2), learn.unfreeze):
        freeze()
        learn.fit(1, 0.05, cbs=moves)
    assert moves.moved == [moving(o, train_bn) for o in ([0, 1, 2], [], [1, 2], [1, 2], [0, 1, 2])]


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_state_that_is_kept_moves_nothing(optimizer: str):
    "The optimizer alone freezes, and remembers its averages"
    learn, moves = make_learner(optimizer, train_bn=False), Moves()
    learn.fit(1, 0.05, cbs=moves)
    assert all(learn.opt.state.get(p) for p in learn.model.parameters())
    learn.opt.freeze()
    learn.fit(1, 0.05, cbs=moves)
    assert moves.moved == [moving([0, 1, 2], False), moving([], False)]


@pytest.mark.parametrize('start', [0, 1, 2, 3])
@pytest.mark.parametrize('train_bn', [True, False])
def test_a_later_epoch_is_in_its_phase(start: int, train_bn: bool):
    learn, moves = make_learner(), Moves()
    learn.finetune(4, ('unfreeze_milestones', ((1, 3), 1)), lr=0.05, train_bn=train_bn, cbs=moves, start_epoch=start)
    assert moves.moved == [moving(o, train_bn) for o in ([], [2], [2], [0, 1, 2])][start:]


@pytest.mark.parametrize('saved', [0, 1, 2])
def test_the_epoch_decides_not_the_state(saved: int):
    "An optimizer's state that was saved at the end of a phase does not take the next one back"
    class Reload(Callback):
        order = 100

        def before_train(self):
            if self.epoch != saved + 1: return
            self.learn.opt.load_state_dict(self.state)
            self.learn.fine_tuning.load_state_dict(self.learn.fine_tuning.state_dict())

        def after_epoch(self):
            if self.epoch == saved: self.state = self.learn.opt.state_dict()
    learn, moves = make_learner(), Moves()
    learn.finetune(4, 'freeze_unfreeze_2', lr=0.05, train_bn=False, cbs=[Reload, moves])
    assert moves.moved == [moving(o, False) for o in ([], [], [0, 1, 2], [0, 1, 2])]


def test_validation_in_between_leaves_norms_frozen():
    class Validate(Callback):
        def after_batch(self):
            if self.training: self.learn.validate()
    learn, moves = make_learner(train_bn=False), Moves()
    learn.freeze()
    learn.fit(1, 0.05, cbs=[Validate, moves])
    assert moves.moved[-1] == moving([], False)


def test_norms_without_parameters_go_with_the_layer_before():
    learn, moves = make_learner(train_bn=False), Moves()
    learn.model[0][0][2] = nn.BatchNorm1d(4, affine=False)
    learn.freeze()
    learn.fit(1, 0.05, cbs=moves)
    learn.unfreeze()
    learn.fit(1, 0.05, cbs=moves)
    assert moves.moved == [HEAD, set(learn.model.state_dict())]


def test_lr_find_keeps_what_is_frozen():
    learn = make_learner(train_bn=False)
    learn.finetune(2, lambda learn, epoch: body_layers(learn)[0], train_bn=False)
    before = [p.requires_grad for p in learn.model.parameters()]
    assert set(before) == {True, False}
    weights = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.lr_find(show_plot=False, num_it=20)
    assert [p.requires_grad for p in learn.model.parameters()] == before
    assert all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())


def test_train_bn_is_as_before_if_not_given():
    for first in (True, False):
        learn, moves = make_learner(train_bn=not first), Moves()
        learn.finetune(1, 'freeze', lr=0.05, train_bn=first, cbs=moves)
        learn.finetune(1, 'freeze', lr=0.05, cbs=moves)
        learn.fit(1, 0.05, cbs=moves)
        assert moves.moved == [moving([], first)] * 3


def test_one_group_cannot_be_frozen():
    learn = make_learner()
    learn.splitter = lambda m: list(m.parameters())
    with pytest.raises(ValueError, match='one parameter group'): learn.freeze()
    with pytest.raises(ValueError, match='one parameter group'): learn.finetune(1, 'freeze')
    learn.finetune(1, 'no_freeze')


def test_misspelt_names_change_nothing():
    learn = make_learner()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match="Did you mean 'unfreeze_milestones'"): learn.finetune(1, ('unfreeze_milestone', ((1, 2), 1)))
    with pytest.raises(ValueError, match='no_freeze, freeze, freeze_unfreeze'): learn.finetune(1, 7)
    with pytest.raises(TypeError, match="Did you mean 'strategy'"): learn.finetune(1, strateg='freeze')
    assert learn.opt is None and all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_an_epoch_that_is_never_reached_is_said():
    with pytest.warns(UserWarning, match='do not reach'): make_learner().finetune(2, 'freeze_unfreeze_2')


def test_strategies_of_ones_own():
    try:
        @register_strategy('alternate')
        class Alternate:
            "The head trains in every `n`th epoch, everything in the others"
            def __init__(self, n: int = 2): self.n = n

            def __call__(self, learn, epoch): return -1 if epoch % self.n == 0 else 0
        learn, moves = make_learner(), Moves()
        learn.finetune(4, ('alternate', 3), lr=0.05, train_bn=False, cbs=moves)
        assert moves.moved == [moving(o, False) for o in ([], [0, 1, 2], [0, 1, 2], [])]
    finally: STRATEGIES.pop('alternate')


def test_counts_are_said_when_they_change(capsys):
    learn = make_learner()
    learn.logger = print
    learn.finetune(3, 'freeze_unfreeze_2', train_bn=False)
    said = [line for line in capsys.readouterr().out.splitlines() if 'parameters train' in line]
    everything = sum(p.numel() for p in learn.model.parameters())
    head = sum(p.numel() for p in learn.model[1].parameters())
    assert said == [f'epoch 0: {head} of {everything} parameters train, {everything - head} are frozen', f'epoch 2: {everything} of {everything} parameters train, 0 are frozen']
    learn.freeze()
    assert learn.trainable_summary().splitlines()[-1] == 'all: ' + said[0].removeprefix('epoch 0: ')
    with learn.no_logging(): learn.finetune(1)
    assert not capsys.readouterr().out


def test_layers_of_the_body():
    learn = make_learner()
    learn.create_opt()
    names = {id(p): n for n, p in learn.model.named_parameters()}
    assert [{names[id(p)] for p in layer} for layer in body_layers(learn)] == [LINEAR[k] | NORM_WEIGHTS[k] for k in range(3)]


@settings(max_examples=15, deadline=None)
@given(first=st.integers(0, 4), more=st.integers(0, 3), layers=st.integers(1, 5), train_bn=st.booleans(), optimizer=st.sampled_from(sorted(OPTIMIZERS)))
def test_any_milestones(first: int, more: int, layers: int, train_bn: bool, optimizer: str):
    learn, moves, n = make_learner(optimizer, n=16), Moves(), first + more + 1
    learn.finetune(n, ('unfreeze_milestones', ((first, first + more), layers)), lr=0.05, div=1, div_final=1, train_bn=train_bn, cbs=moves) # not so slowly that a weight stays where it is
    last = list(range(3))[-layers:]
    assert moves.moved == [moving([] if e < first else last if e < first + more else [0, 1, 2], train_bn) for e in range(n)]
