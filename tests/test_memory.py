"""Precision, compilation and memory, end to end: the same result in half the bits, in parts, compiled, computed twice."""
import copy
import io
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from conftest import make_photos
from lamella.base.seeds import set_seed
from lamella.callbacks.auto_batch import AutoBatch
from lamella.callbacks.gradient_checkpointing import GradientCheckpointing
from lamella.callbacks.hooks import ActivationStats
from lamella.callbacks.precision import MixedPrecision
from lamella.data.loaders import DataLoaders
from lamella.learner.learner import Learner
from lamella.loop.callback import Callback
from lamella.loop.events import CancelBatchException
from lamella.metrics import accuracy
from lamella.optim.optimizer import SGD


class Net(nn.Module):
    "A small network that has no memory for more than `most` samples: in the forward pass, the backward pass, or in fact"
    def __init__(self, most: int = 10**9, fails: str = 'forward', norm: bool = False, drop: float = 0.):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(drop))
        self.head, self.most, self.fails, self.types = nn.Linear(8, 3), most, fails, set()

    def check(self, n: int) -> None:
        if n <= self.most: return
        if self.fails == 'real': torch.empty(2**48 + n)
        raise torch.cuda.OutOfMemoryError('CUDA out of memory')

    def forward(self, x):
        if self.fails != 'backward': self.check(len(x))
        hidden = self.body(x)
        if hidden.requires_grad and self.fails == 'backward': hidden.register_hook(lambda grad: self.check(len(grad))) # the head has its gradients already
        out = self.head(hidden)
        self.types.add(out.dtype)
        return out


class Accumulate(Callback):
    "Steps at every second batch only"
    def before_step(self):
        if self.iter % 2 == 0: raise CancelBatchException()


def make_learner(cbs=(), n: int = 40, bs: int = 16, loss=None, **kwargs) -> Learner:
    set_seed(4)
    x = torch.randn(n, 5)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long())
    dls = DataLoaders(*(torch.utils.data.DataLoader(data, bs) for _ in range(2)), device='cpu')
    learn = Learner(dls, Net(**kwargs), loss or nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=0.9), metrics=accuracy, cbs=list(cbs)) # Adam would make much of a rounding error
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def train(cbs=(), epochs: int = 2, **kwargs) -> Learner:
    learn = make_learner(cbs, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(epochs, 0.05)
    return learn


def assert_same(one: Learner, other: Learner, tolerance: float = 0.) -> None:
    "The weights, buffers and losses of two learners"
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)
    torch.testing.assert_close(torch.tensor(one.recorder.losses), torch.tensor(other.recorder.losses), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(torch.tensor(one.recorder.values), torch.tensor(other.recorder.values), rtol=max(tolerance, 1e-6), atol=max(tolerance, 1e-6)) # a sum depends on where in memory its numbers begin


# Batches that do not fit

@settings(max_examples=15, deadline=None)
@given(most=st.integers(1, 17), n=st.integers(2, 40), fails=st.sampled_from(['forward', 'backward', 'real']), weighted=st.booleans())
def test_parts_have_the_result_of_the_whole(most, n, fails, weighted):
    loss = lambda: nn.CrossEntropyLoss(torch.tensor([1., 3., 9.])) if weighted else nn.CrossEntropyLoss()
    whole, parts = train(n=n, loss=loss()), train([auto := AutoBatch()], n=n, loss=loss(), most=most, fails=fails)
    assert_same(whole, parts, 1e-6)
    assert auto.micro_bs is None if most >= min(n, 16) else auto.micro_bs <= most


@pytest.mark.parametrize('fails', ['forward', 'backward'])
def test_accumulated_gradients_survive(fails):
    assert_same(train([Accumulate()]), train([Accumulate(), AutoBatch()], most=5, fails=fails), 1e-6)
    late = AutoBatch(micro_bs=16)
    learn = make_learner([Accumulate(), late], most=16, fails=fails)
    whole = make_learner([Accumulate()])
    class Shrink(Callback):
        "Memory becomes scarce at the second batch of each epoch, when there are gradients already"
        order = -200
        def before_batch(self): self.model.most = 16 if self.iter == 0 else 3
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1, 0.05, cbs=Shrink())
        whole.fit(1, 0.05)
    assert late.micro_bs == 2
    assert_same(whole, learn, 1e-6)


@pytest.mark.parametrize('fails', ['forward', 'backward'])
def test_a_batch_that_failed_leaves_no_trace(fails):
    "With dropout and batch norm: finding the size is, bit for bit, the same as knowing it"
    kwargs = dict(norm=True, drop=0.4, most=4, fails=fails)
    found, known = AutoBatch(), AutoBatch(micro_bs=4)
    known.sizes['valid'] = 4
    one, other = train([found], **kwargs), train([known], **kwargs)
    assert found.sizes['train'] == 4
    assert_same(one, other)
    assert int(one.model.body[1].num_batches_tracked) == 2 * (4 + 4 + 2)


def test_parts_in_half_the_bits_with_blocks_computed_twice():
    cbs = lambda: [MixedPrecision('bf16'), GradientCheckpointing()]
    learn = train([*cbs(), AutoBatch()], most=4, epochs=6, n=64)
    assert learn.model.types == {torch.bfloat16}
    whole = train([MixedPrecision('bf16')], epochs=6, n=64)
    assert_same(whole, learn, 0.05)
    assert learn.validate()[0] == pytest.approx(whole.validate()[0], abs=0.02)


def test_size_is_remembered_and_searches_leave_no_trace():
    learn = make_learner([auto := AutoBatch()], most=5)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        learn.lr_find(show_plot=False, num_it=6)
        assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())
        learn.fit(1)
        preds, _ = learn.get_preds()
    assert preds.shape == (40, 3) and len([o for o in told if 'out of memory' in str(o.message)]) == 4 # 16, 8 in training; 16, 8 in validation
    state = io.BytesIO()
    torch.save(auto.state_dict(), state)
    state.seek(0)
    (again := AutoBatch()).load_state_dict(torch.load(state, weights_only=True))
    assert again.sizes == {'train': 4, 'valid': 4}


def test_out_of_memory_in_the_step_is_not_repeated():
    class Full(Callback):
        def after_step(self): raise torch.cuda.OutOfMemoryError('CUDA out of memory')
    with pytest.raises(torch.cuda.OutOfMemoryError): train([AutoBatch(), Full()])


# Precision

@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_half_the_bits_learn_as_well(mode):
    full, half = train(epochs=12, n=128), train([MixedPrecision(mode)], epochs=12, n=128)
    assert half.model.types == {torch.float16 if mode == 'fp16' else torch.bfloat16}
    assert {p.dtype for p in half.model.parameters()} == {torch.float32} and half.get_preds()[0].dtype == torch.float32
    assert half.validate()[0] == pytest.approx(full.validate()[0], rel=0.1)


def test_interrupted_fit_leaves_no_autocast():
    class Stop(Callback):
        def after_loss(self): raise KeyboardInterrupt
    learn = make_learner([MixedPrecision('fp16')])
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())
    assert not torch.is_autocast_enabled('cpu')
    learn.fit(1)
    assert learn.model.types == {torch.float16}


def test_scale_goes_on_from_a_checkpoint():
    learn = make_learner([amp := MixedPrecision('fp16', init_scale=2.**10, growth_interval=2)])
    learn.fit(2)
    state = io.BytesIO()
    torch.save(amp.state_dict(), state)
    state.seek(0)
    other = make_learner([again := MixedPrecision('fp16')])
    class Load(Callback):
        def before_train(self): again.load_state_dict(torch.load(state, weights_only=True))
        def before_batch(self): self.scale = again.scaler.get_scale(); raise CancelBatchException()
    other.fit(1, cbs=(load := Load()))
    assert load.scale == amp.scaler.get_scale() > 2.**10


def test_predict_in_the_precision_of_training(tmp_path):
    from lamella.vision.all import ImageDataLoaders, Resize, vision_learner
    make_photos(tmp_path/'photos')
    dls = ImageDataLoaders.from_folder(tmp_path/'photos', valid_pct=0.25, seed=1, item_tfms=Resize(32), bs=4, num_workers=0, device='cpu')
    learn = vision_learner(dls, 'resnet10t', pretrained=False, metrics=accuracy).to_bf16()
    seen = []
    learn.model[-1][-1].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    file = tmp_path/'photos'/'cat'/'1.jpg'
    half = learn.predict(file)[2]
    assert half.dtype == torch.float32 and seen == [torch.bfloat16]
    learn.show_results(max_n=2)
    assert set(seen) == {torch.bfloat16}
    full = learn.to_fp32().predict(file)[2]
    assert seen[-1] == torch.float32
    torch.testing.assert_close(half, full, atol=0.05, rtol=0.05)


# Computed twice

def test_checkpointing_is_bitwise_the_same():
    kwargs = dict(norm=True, drop=0.5)
    assert_same(train(**kwargs), train([GradientCheckpointing()], **kwargs))
    assert_same(train([MixedPrecision('bf16')], **kwargs), train([MixedPrecision('bf16'), GradientCheckpointing()], **kwargs))


def test_a_copy_made_in_a_fit_is_a_copy():
    class Copy(Callback):
        def after_epoch(self): self.copy = copy.deepcopy(self.model)
    learn = make_learner([GradientCheckpointing(), keep := Copy()])
    learn.fit(1)
    x = torch.randn(4, 5)
    before = keep.copy.eval()(x)
    torch.testing.assert_close(before, learn.model.eval()(x))
    for p in learn.model.parameters(): p.data.zero_()
    torch.testing.assert_close(keep.copy(x), before)
    with pytest.raises(ValueError, match='compiled'): make_learner([GradientCheckpointing()]).compile(backend='eager').fit(1)


# Compiled

def test_compiled_learner_is_the_same_learner(tmp_path):
    splitter = lambda m: [list(m.body.parameters()), list(m.head.parameters())]
    results = []
    for compiled in (False, True):
        learn = make_learner(norm=True)
        learn.splitter, learn.path = splitter, tmp_path
        if compiled: learn.compile(backend='aot_eager')
        learn.freeze()
        body = learn.model.body[0].weight.clone()
        learn.fit(1)
        assert torch.equal(body, learn.model.body[0].weight)
        learn.fine_tune(1)
        learn.lr_find(show_plot=False, num_it=5)
        learn.fit(1)
        assert not torch.equal(body, learn.model.body[0].weight)
        results.append(learn)
    plain, fast = results
    assert fast.model._compiled_call_impl is not None and list(plain.model.state_dict()) == list(fast.model.state_dict())
    assert_same(plain, fast, 1e-5)
    fast.save('weights')
    fast.model.head.weight.data.zero_()
    torch.testing.assert_close(fast.load('weights').get_preds()[0], plain.get_preds()[0], atol=1e-5, rtol=1e-5)


def test_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(RuntimeError, match='aot_eager'): make_learner().compile()


# Looking

def test_shape_error_names_the_layer():
    for learn in (make_learner(), make_learner().compile(backend='eager')):
        learn.model.head = nn.Linear(7, 3)
        with pytest.raises(Exception) as caught: learn.fit(1)
        notes = ' '.join(getattr(caught.value, '__notes__', []))
        assert "layer 'head', Linear(in_features=7" in notes and 'Tensor (16, 8) float32' in notes and 'its weight is (3, 7)' in notes


def test_statistics_belong_to_the_fit():
    learn = make_learner([stats := ActivationStats(every=2)], drop=0.1)
    learn.fit(2)
    rows = len(stats.stats)
    learn.lr_find(show_plot=False, num_it=5)
    learn.validate()
    assert rows == len(stats.stats) == 3 and not any(m._forward_hooks for m in learn.model.modules()) # steps 0, 2, 4 of 6
    assert [type(m).__name__ for m in stats.modules] == ['Linear', 'Linear']


def test_summary_asks_nothing_of_the_data_or_the_model():
    learn = make_learner(norm=True)
    state = torch.get_rng_state()
    text = learn.summary()
    assert torch.equal(state, torch.get_rng_state()) and int(learn.model.body[1].num_batches_tracked) == 0
    assert f'Total params: {5*8 + 8 + 16 + 8*3 + 3}\n' in text and 'Input shape: 16 x 5' in text and 'SGD, made when the first fit begins' in text
