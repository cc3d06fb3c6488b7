"""Losses and metrics against scikit-learn and PyTorch on arbitrary data, in a learner, through a checkpoint and over processes."""
import io
import math
import threading
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lamella.metrics as metrics
from lamella.base.mismatch import explain_loss_error
from lamella.learner.learner import Learner
from lamella.losses import CrossEntropyLossFlat, MSELossFlat
from lamella.metrics import mk_metric, mk_metrics

quick = settings(max_examples=25, deadline=None)
pytestmark = [pytest.mark.filterwarnings('ignore::sklearn.exceptions.UndefinedMetricWarning'), pytest.mark.filterwarnings('ignore::UserWarning')]


def loop(pred, targ, loss_func=None, loss=0.): return SimpleNamespace(pred=pred, yb=(targ,), loss_func=loss_func, loss=torch.tensor(loss))


def batches_of(preds, targs, cuts, loss_func=None):
    "The data in batches of uneven size"
    edges = sorted({0, len(preds), *(c % (len(preds) + 1) for c in cuts)})
    return [loop(preds[a:b], targs[a:b], loss_func) for a, b in zip(edges, edges[1:])]


def value_of(metric, batches):
    metric.reset()
    for batch in batches: metric.accumulate(batch)
    return metric.value


@st.composite
def classes(draw, most=5):
    "True and predicted class numbers, of which some may never occur, and where the batches end"
    c, n = draw(st.integers(2, most)), draw(st.integers(1, 40))
    which = st.lists(st.integers(0, c - 1), min_size=n, max_size=n)
    return c, np.array(draw(which)), np.array(draw(which)), draw(st.lists(st.integers(0, 40), max_size=3))


def same(found, wanted): assert np.allclose(np.array(found, dtype=float), np.array(wanted, dtype=float), atol=1e-9, equal_nan=True), (found, wanted)


FUNCTIONS = {'Precision': sk.precision_score, 'Recall': sk.recall_score, 'F1Score': sk.f1_score, 'Jaccard': sk.jaccard_score}


@quick
@given(classes(), st.sampled_from(['micro', 'macro', 'weighted']), st.sampled_from(sorted(FUNCTIONS)))
def test_quotients_are_those_of_sklearn(data, average, name):
    c, true, guess, cuts = data
    batches = batches_of(torch.eye(c)[guess], torch.tensor(true), cuts)
    found = value_of(getattr(metrics, name)(average=average), batches)
    same(found, FUNCTIONS[name](true, guess, average=average, zero_division=0))
    each = value_of(getattr(metrics, name)(average=None), batches)
    same(each, FUNCTIONS[name](true, guess, average=None, labels=range(c), zero_division=0))
    some = [c - 1, 0]
    same(value_of(getattr(metrics, name)(average=average, labels=some), batches), FUNCTIONS[name](true, guess, average=average, labels=some, zero_division=0))


@quick
@given(classes(most=2), st.sampled_from([0, 1]), st.floats(0.1, 4))
def test_two_classes_are_those_of_sklearn(data, pos_label, beta):
    c, true, guess, cuts = data
    batches = batches_of(torch.eye(c)[guess], torch.tensor(true), cuts)
    labels = {'labels': [pos_label], 'average': 'micro', 'zero_division': 0} # what 'binary' means, also when only one class occurs
    for name, function in FUNCTIONS.items(): same(value_of(getattr(metrics, name)(pos_label=pos_label), batches), function(true, guess, **labels))
    same(value_of(metrics.FBeta(beta, pos_label=pos_label), batches), sk.fbeta_score(true, guess, beta=beta, **labels))


@quick
@given(classes())
def test_scores_of_counts_are_those_of_sklearn(data):
    c, true, guess, cuts = data
    batches = batches_of(torch.eye(c)[guess], torch.tensor(true), cuts)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        same(value_of(metrics.MatthewsCorrCoef(), batches), sk.matthews_corrcoef(true, guess))
        same(value_of(metrics.HammingLoss(), batches), sk.hamming_loss(true, guess))
        same(value_of(metrics.BalancedAccuracy(), batches), sk.balanced_accuracy_score(true, guess))
        for weights in (None, 'linear', 'quadratic') if len({*true, *guess}) > 1 else ():
            same(value_of(metrics.CohenKappa(weights=weights), batches), sk.cohen_kappa_score(true, guess, weights=weights))
        for function in (sk.accuracy_score, sk.confusion_matrix, partial(sk.f1_score, average='macro', zero_division=0), sk.adjusted_rand_score):
            same(value_of(mk_metric(function), batches), function(true, guess))


@quick
@given(classes(), st.integers(0, 2**31))
def test_areas_are_those_of_sklearn(data, seed):
    c, true, guess, cuts = data
    logits = torch.randint(-3, 4, (len(true), c), generator=torch.Generator().manual_seed(seed)).float() # with ties
    truth, probs = np.eye(c, dtype=int)[true], logits.softmax(1).double().numpy()
    batches = batches_of(logits, torch.tensor(true), cuts)
    if len(set(true)) == c:
        found = [sk.roc_auc_score(truth[:, k], logits.softmax(1)[:, k]) for k in range(c)]
        assert np.allclose(value_of(metrics.RocAuc(average=None), batches), found, atol=1e-5)
        assert np.isclose(value_of(metrics.RocAuc(average='weighted'), batches), np.average(found, weights=truth.sum(0)), atol=1e-5)
    else: assert math.isnan(value_of(metrics.RocAuc(), batches))
    labels = batches_of(logits, torch.tensor(truth), cuts, nn.BCEWithLogitsLoss())
    wanted = [sk.average_precision_score(truth[:, k], logits[:, k]) for k in range(c)]
    assert np.allclose(value_of(metrics.APScoreMulti(average=None), labels), wanted, atol=1e-5)


@quick
@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from(['micro', 'macro', 'weighted', 'samples']), st.floats(0.1, 0.9))
def test_labels_are_those_of_sklearn(n, k, seed, average, thresh):
    generator = torch.Generator().manual_seed(seed)
    logits, truth = torch.randn(n, k + 1, generator=generator), torch.randint(2, (n, k + 1), generator=generator).float()
    guess, batches = logits.sigmoid() >= thresh, batches_of(logits, truth, [n // 3])
    for name, function in FUNCTIONS.items(): same(value_of(getattr(metrics, f'{name}Multi')(thresh=thresh, average=average), batches), function(truth, guess, average=average, zero_division=0))
    same(value_of(metrics.HammingLossMulti(thresh=thresh), batches), sk.hamming_loss(truth, guess))


@quick
@given(st.integers(3, 30), st.integers(0, 2**31), st.floats(-1e4, 1e4))
def test_numbers_are_those_of_sklearn(n, seed, offset):
    generator = torch.Generator().manual_seed(seed)
    preds, targs = (torch.randn(n, 1, generator=generator) + offset for _ in range(2))
    batches, (p, t) = batches_of(preds, targs, [n // 2]), (o.flatten().double().numpy() for o in (preds, targs))
    for name, function in (('R2Score', sk.r2_score), ('ExplainedVariance', sk.explained_variance_score)):
        assert np.isclose(float(value_of(getattr(metrics, name)(), batches)), function(t, p), rtol=1e-4, atol=1e-5)
    assert np.isclose(float(value_of(metrics.PearsonCorrCoef(), batches)), np.corrcoef(p, t)[0, 1], atol=1e-6)
    assert np.isclose(float(value_of(mk_metric(metrics.rmse), batches)), math.sqrt(((p - t)**2).mean()), rtol=1e-4)


# Every metric, through a checkpoint and over processes

def data_for(kind):
    torch.manual_seed(1)
    make = {'two': lambda: loop(torch.randn(8, 2), torch.arange(8) % 2), 'many': lambda: loop(torch.randn(23, 4), torch.arange(23) % 4, loss=float(torch.rand(()))),
            'labels': lambda: loop(torch.randn(8, 3), (torch.arange(24).reshape(8, 3) % 2).float()), 'numbers': lambda: loop(torch.rand(8, 1), torch.rand(8, 1)),
            'masks': lambda: loop(torch.randn(2, 2, 4, 4), torch.randint(2, (2, 4, 4)))}[kind]
    return [make() for _ in range(4)]


EVERY = [('two', f'{o}()') for o in 'APScoreBinary BalancedAccuracy BrierScore CohenKappa F1Score HammingLoss Jaccard Precision Recall RocAucBinary MatthewsCorrCoef'.split()]
EVERY += [('many', "F1Score(average='macro')"), ('many', 'RocAuc()'), ('many', 'accuracy'), ('many', 'partial(top_k_accuracy, k=2)'), ('many', 'AvgLoss()'), ('many', 'Perplexity()')]
EVERY += [('labels', f'{o}Multi()') for o in 'APScore BrierScore F1Score HammingLoss Jaccard MatthewsCorrCoef Precision Recall RocAuc'.split()] + [('labels', "F1ScoreMulti(average='samples')")]
EVERY += [('numbers', o) for o in ('R2Score()', 'ExplainedVariance()', 'PearsonCorrCoef()', 'SpearmanCorrCoef()', 'rmse', 'mae', 'msle', 'exp_rmspe', 'nn.L1Loss()', 'sk.r2_score', 'torchmetrics.MeanSquaredError()')]
EVERY += [('masks', o) for o in ('Dice()', 'DiceMulti()', 'JaccardCoeff()', 'JaccardCoeffMulti()', 'foreground_acc')]
EVERY += [('two', o) for o in ('sk.f1_score', 'sk.roc_auc_score', 'torchmetrics.AUROC(task="binary")', 'lambda pred, targ: {"a": pred.mean(), "b": targ.float().mean()}')]


def make_of(text): return lambda: mk_metric(eval(text, {**vars(metrics), 'partial': partial, 'nn': nn, 'sk': sk, 'torchmetrics': torchmetrics}))


@pytest.mark.parametrize('kind,text', EVERY)
def test_goes_on_from_a_checkpoint(kind, text):
    make, batches = make_of(text), data_for(kind)
    begun, again = make(), make()
    again.reset()
    value_of(begun, batches[:2])
    state, file = begun.state_dict(), io.BytesIO()
    for batch in batches[2:]: begun.accumulate(batch) # a state that was taken does not change with the metric
    torch.save(state, file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches[2:]: again.accumulate(batch)
    assert str(again.value) == str(begun.value) != str(value_of(make(), batches[2:]))


@pytest.mark.parametrize('kind,text', [o for o in EVERY if 'torchmetrics' not in o[1] and 'R2Score' not in o[1] and 'Explained' not in o[1] and 'Pearson' not in o[1]])
@pytest.mark.parametrize('shares', [(2, 2), (3, 1), (4, 0)])
def test_several_processes_have_the_value_of_one(kind, text, shares):
    make, batches = make_of(text), data_for(kind)
    mine = [make(), make()]
    for metric, part in zip(mine, (batches[:shares[0]], batches[shares[0]:])): value_of(metric, part)
    if not shares[1] and 'lambda' in text: pytest.skip('a process that saw nothing does not know the names of a dictionary')
    found, wanted = synced(mine), value_of(make(), batches)
    flat = lambda o: [float(v) for v in (o.values() if isinstance(o, dict) else [o])]
    for value in found: assert np.allclose(flat(value), flat(wanted), atol=1e-6)


def synced(group):
    "What `sync` makes of metrics in several processes, here threads that meet at every gather"
    barrier, box, errors = threading.Barrier(len(group), timeout=20), [None] * len(group), []
    def gather_of(i):
        def gather(x):
            box[i] = x
            barrier.wait()
            assert len({(o.shape, o.dtype) for o in box}) == 1
            stacked = torch.stack(box)
            barrier.wait()
            return stacked
        return gather
    def run(i):
        try: group[i].sync(gather_of(i))
        except Exception as error: errors.append(error); barrier.abort()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(group))]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    if errors: raise errors[0]
    return [metric.value for metric in group]


@pytest.mark.parametrize('kind,text', EVERY)
def test_nothing_seen_has_no_value(kind, text):
    metric = make_of(text)()
    assert metric.value is None
    metric.reset()
    assert metric.value is None
    one = data_for(kind)[0]
    metric.accumulate(one)
    first = str(metric.value)
    assert metric.value is not None
    metric.reset()
    assert metric.value is None
    metric.accumulate(one)
    assert str(metric.value) == first


def test_counts_do_not_grow():
    metric = metrics.F1Score(average='macro')
    for _ in range(50): metric.accumulate(loop(torch.randn(100, 4), torch.randint(4, (100,))))
    assert metric.counts.numel() == 16 and int(metric.counts.sum()) == 5000


# In a learner

def learner(n_out=3, targets=None, loss_func=None, **kwargs):
    torch.manual_seed(0)
    targets = torch.arange(40) % 3 if targets is None else targets
    data = TensorDataset(torch.randn(40, 4), targets)
    loader = DataLoader(data, batch_size=16)
    return Learner(SimpleNamespace(train=loader, valid=loader), nn.Linear(4, n_out), loss_func or CrossEntropyLossFlat(), **kwargs)


def test_all_kinds_in_a_learner(capsys):
    collection = torchmetrics.MetricCollection({'acc': torchmetrics.classification.MulticlassAccuracy(num_classes=3, average='micro'), 'f1': torchmetrics.classification.MulticlassF1Score(num_classes=3)})
    learn = learner(metrics=[metrics.accuracy, partial(sk.f1_score, average='macro'), collection, metrics.F1Score(average='macro'), sk.log_loss, metrics.AvgLoss, nn.CrossEntropyLoss()])
    learn.fit(2, 1e-2)
    names = learn.recorder.metric_names
    assert names[2:-1] == ['valid_loss', 'accuracy', 'f1_score', 'acc', 'f1', 'f1_score', 'log_loss', 'loss', 'cross_entropy_loss']
    loss, accuracy, f1, same_accuracy, torch_f1, own_f1, log_loss, same_loss, cross_entropy = learn.recorder.values[-1][1:]
    preds, targs = learn.get_preds()
    assert np.allclose([accuracy, same_accuracy], sk.accuracy_score(targs, preds.argmax(1)))
    assert np.allclose([f1, torch_f1, own_f1], sk.f1_score(targs, preds.argmax(1), average='macro'))
    assert np.allclose([loss, log_loss, same_loss, cross_entropy], sk.log_loss(targs, preds), atol=1e-5)


class OfYours:
    "Written for fastai, without lamella's base class"
    name = 'yours'
    def reset(self): self.n = 0
    def accumulate(self, learn): self.n += len(learn.yb[0])
    value = property(lambda self: self.n)


def test_a_metric_of_fastai_counts(capsys):
    learn = learner(metrics=OfYours)
    assert learn.validate()[1] == 40


@pytest.mark.parametrize('metric,name', [(lambda pred, targ: pred @ targ, '<lambda>'), (torchmetrics.classification.MulticlassAccuracy(num_classes=7), 'multiclass_accuracy'), (metrics.F1Score(), 'f1_score'),
    (sk.f1_score, 'f1_score'), (metrics.RocAucMulti(), 'roc_auc_score'), (metrics.PrecisionMulti(), 'precision_score'), (metrics.Dice(axis=-1), 'dice'), (metrics.R2Score(), 'r2_score')])
def test_a_metric_that_fails_names_itself(metric, name, capsys):
    with pytest.raises(Exception) as found: learner(metrics=[metric]).validate()
    notes = [o for o in found.value.__notes__ if o.startswith(f"in the metric '{name}'")]
    assert len(notes) == 1, found.value.__notes__


def test_a_metric_without_a_base_class_names_itself(capsys):
    class Bad(OfYours):
        def accumulate(self, learn): raise KeyError('x')
    with pytest.raises(KeyError) as found: learner(metrics=Bad).validate()
    assert "in the metric 'yours', given predictions Tensor (16, 3) float32" in found.value.__notes__[0]


LOSSES = [(nn.CrossEntropyLoss(), 3, torch.rand(40), 'MSELossFlat()'), (CrossEntropyLossFlat(), 3, torch.rand(40), 'MSELossFlat()'), (CrossEntropyLossFlat(), 3, torch.arange(40) % 4, 'class 3'),
    (nn.CrossEntropyLoss(), 3, torch.arange(40) % 4, '3 outputs'), (CrossEntropyLossFlat(), 3, torch.randint(2, (40, 3)), 'BCEWithLogitsLossFlat()'),
    (nn.BCEWithLogitsLoss(), 3, torch.arange(40) % 3, 'CrossEntropyLossFlat()'), (MSELossFlat(), 3, torch.rand(40), 'n_out=1'), (MSELossFlat(), 1, torch.rand(40, 2), 'n_out=2'),
    (nn.NLLLoss(), 1, torch.arange(40) % 2, 'one output')]


@pytest.mark.parametrize('loss,n_out,targets,hint', LOSSES)
def test_a_loss_that_does_not_fit_says_which_would(loss, n_out, targets, hint, capsys):
    with pytest.raises(Exception) as found: learner(n_out, targets, loss).fit(1, 1e-2)
    notes = '\n'.join(found.value.__notes__)
    assert 'in the loss function' in notes and 'given predictions Tensor (16' in notes and hint in notes, notes


@quick
@given(st.sampled_from([nn.CrossEntropyLoss(), nn.BCELoss(), nn.BCEWithLogitsLoss(), nn.MSELoss(), nn.NLLLoss(), CrossEntropyLossFlat(axis=1), MSELossFlat(), lambda p, t: p]),
       st.lists(st.integers(0, 4), max_size=4), st.lists(st.integers(0, 4), max_size=4), st.sampled_from([torch.float32, torch.int64, torch.uint8, torch.bool]))
def test_an_explanation_never_fails(loss, pred, targ, dtype):
    assert isinstance(explain_loss_error(loss, torch.randn(pred), (torch.ones(targ).to(dtype),)), str)
