"""What a learner does on a CPU that it does nowhere else: channels last in memory, and memory that is kept for as long as it fits."""
import numpy as np
import pytest
import torch
from PIL import Image

from lamella.base import allocator
from lamella.nets.weights import has_channels_last
from lamella.vision.all import Callback, ImageDataLoaders, load_learner, vision_learner


@pytest.fixture
def learn(tmp_path):
    rng = np.random.default_rng(0)
    for name in 'ab':
        (tmp_path/name).mkdir()
        for i in range(6): Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path/name/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=0.5, seed=1, bs=4, num_workers=0, device='cpu')
    return vision_learner(dls, 'test_resnet', pretrained=False)


def test_a_file_says_where_the_channels_are(learn, tmp_path):
    assert has_channels_last(learn.model)
    loaded, file = load_learner(learn.export(tmp_path/'last.pkl')), tmp_path/'a'/'0.png'
    assert has_channels_last(loaded.model) and torch.equal(loaded.predict(file)[2], learn.predict(file)[2])
    learn.to_contiguous()
    assert not has_channels_last(load_learner(learn.export(tmp_path/'first.pkl')).model)


@pytest.mark.skipif(allocator._glibc() is None, reason='only glibc can be told to keep memory')
def test_memory_is_kept_while_fitting_and_no_longer(learn):
    seen = []
    class Look(Callback):
        def before_batch(self): seen.append(allocator._depth[0])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Look())
        assert set(seen) == {1} and allocator._depth[0] == 0
        class Fail(Callback):
            def after_loss(self): raise RuntimeError('on purpose')
        with pytest.raises(RuntimeError, match='on purpose'): learn.fit(1, cbs=Fail())
    assert allocator._depth[0] == 0
