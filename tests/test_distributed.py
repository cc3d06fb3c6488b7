"""The same script, started once or by a launcher with one or two processes, gives the same losses, metrics, weights and predictions."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('accelerate')
sys.path.insert(0, str(Path(__file__).parent))
SCRIPT = Path(__file__).with_name('distributed_script.py')
LIBRARY = Path(__file__).resolve().parents[1]/'lib'
SAME = ['fit', 'fine_tune', 'lr_find', 'predict', 'losses', 'raw_loader', 'stream', 'bad_samples', 'augmented', 'train_metrics', 'own_batches', 'thaw', 'names', 'resume', 'together']
OTHERS = ['unseeded', 'files', 'other_samples', 'error', 'halves', 'nan', 'auto_batch']


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def launch(how, folder, parts):
    "Start the script; nobody waits yet"
    folder.mkdir()
    launcher = [sys.executable, '-m', 'accelerate.commands.launch']
    command = {'python': [sys.executable], 'one': [*launcher, '--cpu', '--num_processes', '1'],
               'two': [*launcher, '--multi_gpu', '--num_processes', '2', '--main_process_port', str(free_port())]}[how]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': '1', 'PYTHONPATH': str(LIBRARY)}
    return subprocess.Popen([*command, str(SCRIPT), str(folder), *parts], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process):
    try: return process.communicate(timeout=600) # long, so as not to wait for ever
    finally: process.kill()


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Each way to start it has a folder with what its processes found, and what it printed"
    folder = tmp_path_factory.mktemp('distributed')
    wanted = {'python': SAME + OTHERS, 'one': ['fit', 'predict'], 'two': SAME + OTHERS}
    started = {how: launch(how, folder/how, parts) for how, parts in wanted.items()}
    for how, process in started.items():
        out, errors = wait_for(process)
        assert process.returncode == 0, f'{how}:\n{out}\n{errors}'
        (folder/how/'printed').write_text(out)
    return folder


def found(runs, how, part, rank=0): return torch.load(runs/how/f'{part}-{rank}.pt', weights_only=False)


def differences(a, b, rtol, where=''):
    "Where two nested results are not the same"
    if isinstance(a, dict): return [o for k in {*a, *b} for o in (differences(a[k], b[k], rtol, f'{where}.{k}') if k in a and k in b else [f'{where}.{k} in one only'])]
    if isinstance(a, (list, tuple)): return [f'{where}: {len(a)} and {len(b)}'] if len(a) != len(b) else [o for k, (x, y) in enumerate(zip(a, b)) for o in differences(x, y, rtol, f'{where}[{k}]')]
    if isinstance(a, (torch.Tensor, float)):
        x, y = torch.as_tensor(a), torch.as_tensor(b)
        return [] if x.shape == y.shape and torch.allclose(x, y, rtol=rtol, atol=rtol, equal_nan=True) else [f'{where}: {a} and {b}']
    return [] if a == b else [f'{where}: {a} and {b}']


@pytest.mark.parametrize('part', SAME)
def test_two_processes_are_as_one(runs, part):
    one, two = found(runs, 'python', part), found(runs, 'two', part)
    assert not differences(one, two, 2e-5)


@pytest.mark.parametrize('part', SAME + ['unseeded', 'files', 'halves', 'nan', 'auto_batch'])
def test_both_processes_have_the_same(runs, part):
    first, second = found(runs, 'two', part), found(runs, 'two', part, 1)
    if isinstance(first, dict): [o.pop('mask', None) for o in (first, second)]
    assert not differences(first, second, 0.)


@pytest.mark.parametrize('part', ['fit', 'predict'])
def test_one_process_of_a_launcher(runs, part):
    assert not differences(found(runs, 'python', part), found(runs, 'one', part), 0.)


def test_comparing_finds_differences(runs):
    "Without sync_bn it is another training"
    assert differences(found(runs, 'python', 'files'), found(runs, 'two', 'files'), 1e-3)


def test_predictions_are_complete_and_in_order(runs):
    from distributed_script import points
    x, y = points(21, 2)
    for rank in (0, 1):
        inputs, preds, targets, decided, losses = found(runs, 'two', 'predict', rank)['preds']
        assert torch.equal(inputs, x) and torch.equal(targets, y) and preds.shape == (21, 3) and decided.shape == losses.shape == (21,)
        assert torch.equal(found(runs, 'two', 'predict', rank)['train'][1], points(43, 1)[1])


def test_random_numbers(runs):
    "Dropout is another one in each process; after the fit they go on alike"
    first, second = (found(runs, 'two', 'unseeded', rank) for rank in (0, 1))
    assert first['mask'] != second['mask'] and first['after'] == second['after']


def test_one_process_writes(runs):
    assert (runs/'two'/'by-0'/'models'/'model.pth').is_file() and not (runs/'two'/'by-1').exists()
    assert (runs/'two'/'order.txt').read_text() == '0\n1\n'
    assert sorted(o.name for o in (runs/'two').glob('run/*')) == sorted(o.name for o in (runs/'python').glob('run/*'))


def printed(runs, how):
    "The rows of the tables of each part"
    parts = (runs/how/'printed').read_text().split('part ')[1:]
    return {part.split()[0]: [[float(o) for o in row.split()[:-1]] for row in part.splitlines() if row[:1].isdigit()] for part in parts if len(part.splitlines()) > 1}


def test_one_process_prints(runs):
    one, two = printed(runs, 'python'), printed(runs, 'two')
    assert len(one['fit']) == len(one['fine_tune']) == 2 and not one.get('lr_find')
    for part in ('fit', 'fine_tune', 'predict', 'augmented'): assert not differences(one[part], two[part], 2e-5)


def test_all_processes_tell_of_an_error(runs):
    own, other = found(runs, 'two', 'error', 1), found(runs, 'two', 'error', 0)
    reader = next(o for o in (own, other) if 'DataError: sample 7' in o)
    assert 'no point 7' in reader
    told = next(o for o in (own, other) if o is not reader)
    assert 'all processes stop' in told and 'no point 7' in told


def test_other_samples_are_refused(runs):
    for rank in (0, 1):
        message = found(runs, 'two', 'other_samples', rank)
        assert 'process 0 has 40 samples' in message and 'process 1 has 41 samples' in message and 'set_seed' in message


def test_a_nan_in_one_stops_all(runs):
    "Both say what the one knows, and neither waits for the other"
    one, two = found(runs, 'python', 'nan'), found(runs, 'two', 'nan')
    assert len(one['told']) == len(two['told']) == 1 and one['steps'] == two['steps'] < 4
    assert "module '1' (Broken)" in one['told'][0] and "Process 1: The first output that is not finite is that of module '1' (Broken)" in two['told'][0]


def test_batches_are_not_cut_in_each_process(runs):
    assert found(runs, 'python', 'auto_batch') is None and 'AutoBatch is for one process' in found(runs, 'two', 'auto_batch', 1)


def test_logs_are_written_once(runs):
    one, two = ((runs/how/'together'/'history.csv').read_text().splitlines() for how in ('python', 'two'))
    assert len(one) == len(two) == 3 # headings, and two epochs until it stopped
    steps = [[json.loads(line)['step'] for line in (runs/how/'together'/'history.jsonl').read_text().splitlines()] for how in ('python', 'two')]
    assert steps[0] == steps[1]


def test_a_crash_of_one_ends_all(tmp_path):
    process = launch('two', tmp_path/'crash', ['crash'])
    out, errors = wait_for(process)
    assert process.returncode and 'ValueError: out of luck' in errors


def test_the_trap_of_accelerate_launch(monkeypatch):
    "accelerate launch --cpu --num_processes 2 starts one process"
    from distributed_script import learner
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'True')
    monkeypatch.setenv('MASTER_PORT', '29500')
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    with pytest.warns(UserWarning, match='--multi_gpu'):
        with learner().distrib_ctx(): pass


def test_accelerate_is_an_extra(monkeypatch):
    from distributed_script import learner
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with learner().distrib_ctx() as learn: learn.fit(1) # alone, nobody needs it
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ImportError, match=r'pip install lamella\[distributed\]'): learner().to_distributed()


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    from distributed_script import learner
    learn = learner()
    learn.path = tmp_path
    monkeypatch.setenv('RANK', '1')
    assert learn.save('x') == tmp_path/'models'/'x.pth' and learn.export('e.pkl') == tmp_path/'e.pkl'
    assert not any(tmp_path.iterdir())
