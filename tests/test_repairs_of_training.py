"""What a review of the training part found, each finding once."""
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchLoader

from lamella.callbacks.lr_find import minimum, slide, steep, valley
from lamella.data.loaders import DataLoaders
from lamella.learner.learner import Learner
from lamella.base.errors import context_of
from lamella.callbacks.best import SaveModelCallback
from lamella.metrics import F1Score, accuracy, rmse

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


class Named(nn.Module):
    "Takes and returns dictionaries, as Hugging Face's models do"
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, pixels, labels=None):
        logits = self.inner(pixels)
        return {'loss': None if labels is None else F.cross_entropy(logits, labels), 'logits': logits}


def dictionaries(): return [{'pixels': x, 'labels': y} for x, y in zip(X, Y)]


@pytest.mark.parametrize('loss', [F.cross_entropy, None])
def test_batches_with_names_can_be_summarised_and_predicted(loss):
    learn = Learner(loaders(dictionaries()), Named(), loss)
    learn.logger = lambda row: None
    learn.fit(1, 0.01)
    assert 'Linear' in learn.summary() and '16 x 8' in learn.summary()
    item = dictionaries()[70]
    logits = learn.model.eval()(item['pixels'][None])['logits'][0]
    predicted = learn.predict(item)
    assert predicted[2].argmax() == logits.argmax() and predicted[2].shape == (3,)
    assert [o[2].argmax().item() for o in learn.predict([item, {'pixels': X[3]}])][0] == logits.argmax()


def test_what_a_model_leaves_out_stays_none_in_the_predictions():
    learn = Learner(loaders(dictionaries()), Named(), lambda pred, y: F.cross_entropy(pred['logits'], y))
    preds = learn.get_preds(with_decoded=True)[0]
    assert preds['loss'] is None and preds['logits'].shape == (32, 3)


def test_raw_loaders_are_interpreted_and_what_cannot_be_shown_is_said():
    from lamella.interpret import ClassificationInterpretation
    learn = learner()
    found = ClassificationInterpretation.from_learner(learn)
    assert found.confusion_matrix().shape == (3, 3) and found.confusion_matrix().sum() == 32
    assert all(isinstance(o[0], int) for o in found.most_confused())
    assert len(found.plot_confusion_matrix().get_xticklabels()) == 3
    with pytest.raises(TypeError, match='needs a loader of lamella'): found.plot_top_losses(2)
    with pytest.raises(TypeError, match='show_results needs a loader of lamella'): learn.show_results()


def returns_nothing(pred, y): F.cross_entropy(pred, y)


@pytest.mark.parametrize('loss, dtype, said', [(nn.CrossEntropyLoss(reduction='none'), torch.long, "reduction='mean'"), (returns_nothing, torch.long, 'no `return`'),
    (lambda pred, y: F.cross_entropy(pred, y).item(), torch.long, r'without .item\(\)'), (accuracy, torch.long, 'no gradient'),
    ('cross_entropy', torch.long, 'has to be a function'), (F.cross_entropy, torch.int32, r'y.long\(\)')])
def test_a_loss_that_cannot_be_trained_with_is_explained(loss, dtype, said):
    with pytest.raises((RuntimeError, AttributeError, TypeError)) as caught: learner(loaders(dtype=dtype) , loss).fit(1)
    assert re.search(said, '\n'.join(context_of(caught.value))), context_of(caught.value)


TWO_GROUPS = dict(splitter=lambda m: [list(m[0].parameters()), list(m[1:].parameters())])

@pytest.mark.parametrize('options, call, kind, said', [
    (dict(opt_func=torch.optim.Adam([torch.zeros(1, requires_grad=True)])), lambda l: l.fit(1), TypeError, 'a Adam that is made already was given'),
    (dict(opt_func='adam'), lambda l: l.fit(1), TypeError, "'adam' was given"),
    (dict(opt_func=lambda p, lr: torch.optim.SGD(p, lr)), lambda l: l.fit(1), TypeError, r'a torch.optim.sgd.SGD.*OptimWrapper\(opt=SGD'),
    (dict(splitter=lambda m: [m[0], m[1:]]), lambda l: l.fit(1), TypeError, r'params\(m\[0\]\)'),
    ({}, lambda l: l.fit_one_cycle(1e-3, 5), TypeError, 'a whole number, not 0.001'),
    ({}, lambda l: l.fit(0.01), TypeError, 'a whole number, not 0.01'),
    ({}, lambda l: l.fit(-1), ValueError, 'at least 0, not -1'),
    ({}, lambda l: l.fine_tune(1, 1e-3, 0.5), TypeError, 'freeze_epochs'),
    ({}, lambda l: l.fit(1, '0.1'), TypeError, 'a learning rate is a number'),
    ({}, lambda l: l.fit(1, 0.1, SaveModelCallback()), TypeError, 'cbs='),
    ({}, lambda l: l.fit_one_cycle(1, moms=0.9), TypeError, 'three numbers'),
    (TWO_GROUPS, lambda l: l.fit(1, [0.1] * 3), ValueError, '3 values were given for 2 parameter groups, as lr'),
    ({}, lambda l: l.get_preds(with_losses=True), TypeError, "Did you mean 'with_loss'"),
    ({}, lambda l: l.validate(dss_idx=1), TypeError, "Did you mean 'ds_idx'"),
    ({}, lambda l: l.predict(X[0], with_inputs=True), TypeError, "Did you mean 'with_input'"),
    ({}, lambda l: l.validate(3), IndexError, 'no loader number 3: this learner has 2, 0 for training, 1 for validation'),
    ({}, lambda l: l.get_preds(l.dls.valid), TypeError, 'dl=')])
def test_wrong_arguments_are_said_with_the_way_out(options, call, kind, said):
    with pytest.raises(kind, match=said): call(learner(**options))


def test_right_arguments_stay_right():
    from functools import partial
    import lamella.optim.optimizer as optim
    for options in (dict(opt_func=partial(torch.optim.SGD, momentum=0.9)), dict(opt_func=lambda p, lr: optim.OptimWrapper(opt=torch.optim.SGD(p, lr))), TWO_GROUPS):
        learn = learner(**options)
        learn.fit(np.int64(1), np.float32(0.01), wd=0.1)
        learn.fit(1, torch.tensor(0.01))
        learn.fit_one_cycle(1, slice(1e-4, 1e-3), moms=[0.9, 0.8, 0.9])
    learn.fit(1, [0.1, torch.tensor(0.2)])


@pytest.mark.parametrize('metric, monitor, column', [(accuracy, accuracy, 'accuracy'), (rmse, '_rmse', 'rmse'), (rmse, rmse, 'rmse'), (F1Score(average='macro'), F1Score(), 'f1_score')])
def test_a_metric_can_be_monitored_by_itself(tmp_path, metric, monitor, column):
    learn = learner(loaders(list(zip(X, X[:, :3]))) if column == 'rmse' else None, F.mse_loss if column == 'rmse' else F.cross_entropy, metrics=metric, path=tmp_path)
    save = SaveModelCallback(monitor=monitor)
    learn.fit(1, 0.01, cbs=save)
    assert save.monitor == column and save.best == pytest.approx(learn.recorder.values[0][-1])


def test_a_file_with_another_optimizer_changes_nothing_and_says_the_way_out(tmp_path):
    saved = learner(path=tmp_path)
    saved.fit(1, 0.01)
    saved.save('one')
    other = learner(path=tmp_path, **TWO_GROUPS)
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    with pytest.raises(ValueError, match=r'is the splitter another one\?.*with_opt=False'): other.load('one')
    assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items())
    other.load('one', with_opt=False)
    assert torch.equal(other.model[0].weight, saved.model[0].weight)
    learner(path=tmp_path).load('one').fit(1)


def two_numbers(pred, y): return pred.mean(), pred.std()


def test_a_metric_without_parentheses_and_a_metric_of_two_numbers():
    import lamella.metrics as metrics
    with pytest.raises(TypeError, match=r'metrics=F1Score\(\)'): learner(metrics=F1Score)
    with pytest.raises(TypeError, match=r'metrics=RocAuc\(\)'): learner(metrics=[accuracy, metrics.RocAuc])
    with pytest.raises(TypeError, match="'two_numbers' returned .* dictionary of numbers by name"): learner(metrics=two_numbers).fit(1)
    made = metrics.mk_metrics([accuracy, metrics.error_rate, metrics.mse, metrics.mae, lambda a, b: 0.])
    assert len(made) == 5
    forgotten = [f for name in metrics.__all__ if name[0].isupper() and hasattr(f := getattr(metrics, name), '__code__') and name not in ('Gather', 'LossMetrics')]
    for func in forgotten:
        with pytest.raises(TypeError, match='with parentheses'): metrics.mk_metrics(func)


def test_a_callback_of_functions_and_what_only_the_learner_has():
    from lamella.loop.callback import Callback
    epochs = []
    learn = learner()
    learn.fit(2, 0.01, cbs=Callback(after_epoch=lambda self: epochs.append(self.epoch), before_fit=lambda self: epochs.append('begin')))
    assert epochs == ['begin', 0, 1]
    with pytest.raises(AttributeError) as caught: learn.fit(1, 0.01, cbs=Callback(after_epoch=lambda self: self.path))
    assert 'read it as self.learn.path' in context_of(caught.value)[-1]
    with pytest.raises(AttributeError) as caught: learn.fit(1, 0.01, cbs=Callback(after_epoch=lambda self: self.nothing))
    assert not context_of(caught.value)
    for name, now in (('begin_fit', 'before_fit'), ('on_epoch_end', 'after_epoch')):
        with pytest.raises(AttributeError, match=f"'{now}' now"): type('Old', (Callback,), {name: lambda self: None})


def test_the_recorder_has_the_last_row_and_the_curve_of_the_search():
    learn = learner(metrics=accuracy)
    learn.fit(1, 0.01)
    assert learn.recorder.final_record == learn.recorder.values[-1] and len(learn.recorder.final_record) == 3
    learn.lr_find(num_it=20, stop_div=False, show_plot=False)
    axes = learn.recorder.plot_lr_find()
    assert axes.get_xscale() == 'log' and len(axes.lines[0].get_xdata()) == 15


def test_messages_have_a_subject_and_an_example():
    with pytest.raises(ValueError, match='f1_score .*2 classes'): learner(metrics=F1Score()).fit(1, 0.01)
    with pytest.raises(ValueError, match=r"\('unfreeze_milestones', \(\(2, 5\), 3\)\)"): learner().finetune(1, 'unfreeze_milestones')
