"""What the tests share: folders of small photographs, batches compared, a quiet matplotlib, one seed."""
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use('Agg')


def make_photos(root: Path, classes=('cat', 'dog'), n: int = 8, size=(60, 48), seed: int = 0) -> Path:
    "JPEGs in a folder for each class; each class has its own colours, so that they can be learned"
    from PIL import Image
    rng = np.random.default_rng(seed)
    for k, name in enumerate(classes):
        (root/name).mkdir(parents=True, exist_ok=True)
        for i in range(1, n + 1):
            pixels = rng.integers(0, 100, (size[1], size[0], 3), dtype=np.uint8)
            pixels[..., k % 3] += 150
            Image.fromarray(pixels).save(root/name/f'{i}.jpg', quality=90)
    return root


def assert_same_batches(found, expected):
    "Tuples of tensors: as many, of the same types and shapes, and equal in each number"
    import torch
    assert len(found) == len(expected)
    for a, b in zip(found, expected): assert [(o.dtype, o.shape) for o in a] == [(o.dtype, o.shape) for o in b] and all(map(torch.equal, a, b))


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path/'photos')


@pytest.fixture(autouse=True)
def _tidy():
    "The same seed and number of threads for each test, and no figures left"
    import torch
    from lamella.base.seeds import set_seed
    set_seed(7)
    threads = torch.get_num_threads()
    yield
    import matplotlib.pyplot as plt
    plt.close('all')
    torch.set_num_threads(threads) # sums depend on it in the last bit
