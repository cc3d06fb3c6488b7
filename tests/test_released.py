"""Files that every released version of lamella exported are loaded and predict what they did then (`tests/tools/make_released.py` made them)."""
import json
from pathlib import Path

import pytest
import torch

from lamella.export import load_learner, read_spec

ROOT = Path(__file__).resolve().parents[1]
RELEASED = ROOT/'tests'/'released'
FILES = sorted(RELEASED.glob('*/*.pkl'))
VERSIONS = ['0.1.0', '0.2.0', '0.3.0', '0.4.0', '0.5.0']
TASKS = {'classification', 'layers', 'multilabel', 'regression', 'points'}


def flat(value) -> list:
    "All numbers in lists, tuples, dictionaries and tensors, in their order"
    if isinstance(value, torch.Tensor): return flat(value.as_subclass(torch.Tensor).tolist())
    if isinstance(value, dict): return [x for o in value.values() for x in flat(o)]
    return [x for o in value for x in flat(o)] if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize('file', FILES, ids=lambda o: f'{o.parent.name}-{o.stem}')
def test_a_file_of_a_released_version(file: Path):
    expected = json.loads(file.with_suffix('.json').read_text())
    predictor = load_learner(file)
    label, decision, probs = predictor.predict(RELEASED/'picture.png')
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(flat(probs), dtype=torch.float64), torch.tensor(flat(expected['probabilities']), dtype=torch.float64), **close)
    torch.testing.assert_close(torch.tensor(flat(decision), dtype=torch.float64), torch.tensor(flat(expected['decision']), dtype=torch.float64), **close)
    if expected['label'] is not None: assert label == expected['label'] or list(label) == expected['label']


def test_files_of_all_versions_are_there():
    found = {version: {o.stem for o in FILES if o.parent.name == version} for version in VERSIONS}
    assert all(TASKS <= tasks for tasks in found.values())
    assert all({'segmentation', 'detection'} <= tasks for version, tasks in found.items() if version >= '0.3.0')
    version = next(line.split('=')[1].strip() for line in (ROOT/'settings.ini').read_text().splitlines() if line.startswith('version'))
    assert (RELEASED/version).is_dir(), f'keep files of this version: python tests/tools/make_released.py (then add {version} to VERSIONS)'


def test_what_old_files_do_not_say_is_not_there():
    assert 'task' not in read_spec(RELEASED/'0.1.0'/'classification.pkl')
    spec = read_spec(RELEASED/'0.5.0'/'classification.pkl')
    assert (spec['task'], spec['architecture'], spec['input']) == ('classification', 'timm:test_resnet', {'size': [32, 32], 'channels': 3})
    assert set(spec['metrics']) >= {'train_loss', 'valid_loss'}
