"""Progress, recorder and loggers from end to end: real libraries read back what was written, runs are interrupted, disks are full."""
import io
import itertools
import json
import os
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_photos
from torch import nn

from lamella.callbacks.log_files import CSVLogger, JSONLogger
from lamella.callbacks.mlflow import MLflowCallback
from lamella.callbacks.progress import ProgressCallback
from lamella.callbacks.tensorboard import TensorBoardCallback
from lamella.callbacks.wandb import WandbCallback
from lamella.learner.learner import Learner
from lamella.loop.callback import Callback
from lamella.loop.loggers import Logger, LoggerCallback
from lamella.loop.recorder import Recorder
from lamella.loop.state import loop_state
from lamella.loop.training import TrainingLoop
from lamella.metrics import mae

N = 8 # batches an epoch


class Batches:
    "A loader whose place can be kept"
    def __init__(self, n): self.data, self.done = [(torch.rand(4, 1), torch.rand(4, 1)) for _ in range(n)], 0
    def __len__(self): return len(self.data)
    def state_dict(self): return {'done': self.done}
    def load_state_dict(self, state): self.done = state['done']

    def __iter__(self):
        for self.done in range(self.done + 1, len(self.data) + 1): yield self.data[self.done - 1]
        self.done = 0


class Loaders(SimpleNamespace):
    "What a loop needs of DataLoaders"
    def __iter__(self): return iter((self.train, self.valid))


def make_loop(path, cbs=()):
    "A loop over eight batches"
    torch.manual_seed(0)
    line = nn.Linear(1, 1)
    loop = TrainingLoop(Loaders(train=Batches(N), valid=Batches(2)), line, nn.functional.mse_loss, torch.optim.SGD(line.parameters(), lr=0.1), cbs=[Recorder, *cbs])
    loop.metrics, loop.logger, loop.path = [mae], lambda row: None, Path(path)
    return loop


def make_learner(path, cbs=(), **options):
    "The same as a learner"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    return Learner(Loaders(train=Batches(N), valid=Batches(2)), model, nn.functional.mse_loss, metrics=mae, path=path, cbs=cbs,
                   splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())], **options)


# Reading back

def curves(folder):
    "What TensorBoard reads"
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    return found, {name: [(o.step, o.value) for o in found.Scalars(name)] for name in found.Tags()['scalars']}


def wandb_records(file: Path):
    "The records of an offline run: blocks of 32 KiB with parts of records, after a header of 7 bytes"
    pb = pytest.importorskip('wandb.proto.wandb_internal_pb2')
    data, position, parts, found = file.read_bytes(), 7, b'', []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7: position += left; continue
        _, length, kind = struct.unpack('<IHB', data[position:position + 7])
        parts += data[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4): # whole, or the last part
            record = pb.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b''
    return found


def wandb_history(file: Path):
    "Step and values of each entry of an offline run"
    records = [o.history for o in wandb_records(file) if o.WhichOneof('record_type') == 'history']
    return [(o.step.num, {'.'.join(item.nested_key) or item.key: json.loads(item.value_json) for item in o.item}) for o in records]


def _wait_until(condition, seconds=60):
    "Until it holds, or until it is hopeless"
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end: time.sleep(0.2)


@pytest.fixture
def mlflow_store(tmp_path, monkeypatch):
    "A folder of runs"
    pytest.importorskip('mlflow')
    for name, value in (('MLFLOW_ALLOW_FILE_STORE', 'true'), ('MLFLOW_DISABLE_TELEMETRY', 'true'), ('DO_NOT_TRACK', 'true')): monkeypatch.setenv(name, value)
    return (tmp_path/'mlruns').as_uri()


def mlflow_metric(store, run_id, name):
    "Step and value of each entry"
    from mlflow import MlflowClient
    return sorted((o.step, o.value) for o in MlflowClient(tracking_uri=store).get_metric_history(run_id, name))


# Each library

def test_tensorboard_has_what_the_recorder_has(tmp_path):
    pytest.importorskip('tensorboard')
    learn = make_learner(tmp_path, TensorBoardCallback(tmp_path/'tb', trace_model=True, every=3))
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    events, found = curves(tmp_path/'tb')
    assert [step for step, _ in found['train_loss']] == [3, 6, 8, 11, 14, 16]
    assert [step for step, _ in found['mae']] == [8, 16] and [value for _, value in found['epoch']][-1] == 2
    assert {'lr_0', 'lr_1', 'mom_0'} <= set(found)
    assert found['mae'][-1][1] == pytest.approx(learn.recorder.values[-1][2])
    assert found['train_loss'][-1][1] == pytest.approx(learn.recorder.smooth_loss)
    assert events.Tags()['graph']


def test_mlflow_has_what_the_recorder_has(tmp_path, mlflow_store):
    from mlflow import MlflowClient
    callback = MLflowCallback('trial', 'first', mlflow_store, every=3, config={'author': 'me'})
    learn = make_learner(tmp_path, callback)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    client = MlflowClient(tracking_uri=mlflow_store)
    runs = client.search_runs([client.get_experiment_by_name('trial').experiment_id])
    assert len(runs) == 1 and runs[0].info.status == 'FINISHED' and runs[0].info.run_name == 'first'
    assert runs[0].data.params['author'] == 'me' and runs[0].data.params['model'] == 'Sequential'
    assert [step for step, _ in mlflow_metric(mlflow_store, runs[0].info.run_id, 'train_loss')] == [3, 6, 8, 11, 14, 16]
    assert mlflow_metric(mlflow_store, runs[0].info.run_id, 'mae')[-1] == (16, learn.recorder.values[-1][2])


def test_mlflow_uses_the_active_run_and_leaves_it_open(tmp_path, mlflow_store):
    import mlflow
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(mlflow_store)
    try:
        with mlflow.start_run() as run:
            make_loop(tmp_path, [MLflowCallback()]).run_epochs(1)
            assert mlflow.get_run(run.info.run_id).info.status == 'RUNNING'
        assert len(mlflow_metric(mlflow_store, run.info.run_id, 'mae')) == 1
    finally: mlflow.set_tracking_uri(before)


def test_wandb_offline_has_what_the_recorder_has(tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    run = wandb.init(mode='offline', project='trial', dir=str(tmp_path))
    try:
        wandb.log({'own': 1}, step=4)
        learn = make_learner(tmp_path, WandbCallback(log='gradients', log_model=True, every=3))
        with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
        assert wandb.run is run
    finally: wandb.finish()
    file = next(tmp_path.glob('wandb/offline-run-*/run-*.wandb'))
    _wait_until(lambda: any(o.WhichOneof('record_type') == 'exit' for o in wandb_records(file))) # another process writes it
    history = wandb_history(file)
    offset = history[0][0]
    assert history[0][1]['own'] == 1
    found = [(step - offset, values['train_loss']) for step, values in history if 'train_loss' in values]
    assert [step for step, _ in found] == [3, 6, 8, 11, 14, 16] and found[-1][1] == pytest.approx(learn.recorder.smooth_loss)
    assert [values['mae'] for _, values in history if 'mae' in values][-1] == pytest.approx(learn.recorder.values[-1][2])
    config = {item.key for o in wandb_records(file) if o.WhichOneof('record_type') == 'config' for item in o.config.update}
    assert {'model', 'bs', 'epochs', 'optimizer', 'torch'} - {'bs'} <= config
    assert (tmp_path/'models'/'model.pth').is_file()


def test_predictions_are_pictured_and_change_nothing(tmp_path):
    pytest.importorskip('tensorboard')
    from lamella.vision.data import ImageDataLoaders
    from lamella.base.seeds import set_seed
    make_photos(tmp_path/'photos')
    weights = []
    for log_preds in (True, False):
        set_seed(3)
        dls = ImageDataLoaders.from_folder(tmp_path/'photos', valid_pct=0.5, bs=4, num_workers=0, seed=1)
        model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 2))
        learn = Learner(dls, model, path=tmp_path, cbs=TensorBoardCallback(tmp_path/f'tb{log_preds}', log_preds=log_preds, n_preds=4))
        with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
            warnings.simplefilter('error', UserWarning)
            learn.fit(2)
        weights.append(model[-1].weight.detach().clone())
    assert torch.equal(*weights)
    assert len(curves(tmp_path/'tbTrue')[0].Images('predictions')) == 2


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr('lamella.loop.loggers.find_spec', lambda name: None)
    for callback in (TensorBoardCallback, MLflowCallback, WandbCallback):
        with pytest.raises(ImportError, match=r'is not installed: pip install lamella\[loggers\]$'): callback()


# Interrupted runs

class Interrupt(Callback):
    "Keeps the state at one step and dies at a later one"
    order, fit_only = 200, True
    def __init__(self, fit, keep, die): self.fit, self.keep, self.die, self.fits, self.state = fit, keep, die, -1, None
    def before_fit(self): self.fits += 1

    def after_batch(self):
        if not self.training or self.fits != self.fit: return
        if self.train_iter == self.keep:
            self.state = io.BytesIO()
            torch.save(loop_state(self.learn), self.state)
            self.state.seek(0)
        if self.train_iter == self.die: raise KeyboardInterrupt


def loggers(path, store):
    "One of each"
    return [CSVLogger(), JSONLogger(every=3), TensorBoardCallback(path/'tb', every=3), MLflowCallback('trial', tracking_uri=store, every=3)]


def run_whole(path, store):
    "Two fits that nobody disturbs"
    loop = make_loop(path, loggers(path, store))
    for _ in range(2): loop.run_epochs(3)
    return loop


def run_interrupted(path, store, fit, keep, die):
    "The same, dying in fit number `fit` at step `die`, going on from step `keep`"
    interrupt = Interrupt(fit, keep, die)
    loop = make_loop(path, [*loggers(path, store), interrupt])
    with pytest.raises(KeyboardInterrupt):
        for _ in range(2): loop.run_epochs(3)
    loop = make_loop(path, loggers(path, store))
    state = torch.load(interrupt.state, weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        loop.run_epochs(3, state=state)
        for _ in range(1 - fit): loop.run_epochs(3)
    return loop


def timeless(file):
    "The rows of a history, without the times"
    return [line.rpartition(',')[0] for line in file.read_text().splitlines()]


@pytest.mark.parametrize('fit, keep, die', [(0, 11, 13), (0, 12, 23), (1, 13, 20), (1, 8, 17)])
def test_interrupted_runs_are_logged_as_whole_ones(tmp_path, mlflow_store, fit, keep, die):
    from mlflow import MlflowClient
    pytest.importorskip('tensorboard')
    paths = tmp_path/'whole', tmp_path/'interrupted'
    for path in paths: path.mkdir()
    stores = [(path/'mlruns').as_uri() for path in paths]
    whole, resumed = run_whole(paths[0], stores[0]), run_interrupted(paths[1], stores[1], fit, keep, die)
    for name in ('losses', 'raw_losses', 'lrs', 'iters', 'values'): assert getattr(whole.recorder, name) == getattr(resumed.recorder, name), name
    assert timeless(paths[0]/'history.csv') == timeless(paths[1]/'history.csv') and len(timeless(paths[0]/'history.csv')) == 7
    lines = [[line for line in (path/'history.jsonl').read_text().splitlines() if 'config' not in line] for path in paths]
    assert lines[0] == lines[1] and len(lines[0]) > 20
    assert curves(paths[0]/'tb')[1] == curves(paths[1]/'tb')[1]
    found = []
    for store in stores:
        client = MlflowClient(tracking_uri=store)
        runs = client.search_runs([client.get_experiment_by_name('trial').experiment_id])
        assert len(runs) == 1
        found.append([mlflow_metric(store, runs[0].info.run_id, name) for name in ('train_loss', 'mae')])
    assert found[0] == found[1]


def test_two_phases_are_one_run(tmp_path):
    learn = make_learner(tmp_path, [CSVLogger, JSONLogger(every=4)])
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, freeze_epochs=1)
    table = learn.csv_logger.read_log()
    assert list(table.columns) == learn.recorder.metric_names and list(table.epoch) == [0, 0, 1]
    assert list(learn.json_logger.read_log().epoch.dropna()) == [0.5, 1, 1, 1.5, 2, 2, 2.5, 3, 3]


def test_searching_and_validating_write_nothing(tmp_path):
    learn = make_learner(tmp_path, [CSVLogger, JSONLogger(every=1)])
    learn.lr_find(show_plot=False, num_it=12)
    with learn.no_bar(): learn.validate()
    assert not list(tmp_path.glob('history*'))


# Faults

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no full disk here')
@pytest.mark.parametrize('callback', [lambda: CSVLogger('/dev/full'), lambda: JSONLogger('/dev/full', every=1)])
def test_full_disk_is_one_warning(tmp_path, callback):
    loop = make_loop(tmp_path, [callback()])
    with pytest.warns(UserWarning, match='training goes on. OSError.*No space left') as warned: loop.run_epochs(2)
    assert len(warned) == 1 and len(loop.recorder.losses) == 2 * N


def test_folder_that_cannot_be_made_is_one_warning(tmp_path):
    pytest.importorskip('tensorboard')
    (tmp_path/'file').write_text('in the way')
    loop = make_loop(tmp_path, [TensorBoardCallback(tmp_path/'file'/'tb'), CSVLogger('file/history.csv'), JSONLogger('file/history.jsonl')])
    with pytest.warns(UserWarning, match='training goes on') as warned: loop.run_epochs(2)
    assert len(warned) == 3 and len(loop.recorder.losses) == 2 * N


def test_service_that_is_down_is_one_warning(tmp_path, monkeypatch):
    pytest.importorskip('mlflow')
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '0')
    loop = make_loop(tmp_path, [MLflowCallback(tracking_uri='http://127.0.0.1:9')])
    with pytest.warns(UserWarning, match='MLflowCallback failed.*training goes on') as warned: loop.run_epochs(1)
    assert len([o for o in warned if 'training goes on' in str(o.message)]) == 1 and len(loop.recorder.losses) == N


def test_logger_that_fails_at_the_end_only(tmp_path):
    class Bad(Logger):
        def log(self, values, step): pass
        def finish(self): raise ConnectionError('gone')
    loop = make_loop(tmp_path, [LoggerCallback(Bad())])
    with pytest.warns(UserWarning, match='ConnectionError: gone'): loop.run_epochs(1)


def test_only_the_main_process_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    loop = make_loop(tmp_path, [CSVLogger, JSONLogger, ProgressCallback(plain_every=0)])
    loop.logger = print
    loop.run_epochs(1)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ''


# The table and the bar

@pytest.mark.parametrize('order', list(itertools.permutations(['no_bar', 'no_logging', 'no_mbar'])))
def test_blocks_nest_in_any_order(tmp_path, capsys, order):
    learn = make_learner(tmp_path, CSVLogger)
    before = list(learn.cbs), learn.logger, learn.create_mbar, learn.progress
    a, b, c = (getattr(learn, name) for name in order)
    with pytest.raises(ZeroDivisionError):
        with a(), b(), c():
            learn.fit(1)
            assert capsys.readouterr().out == ''
            1 / 0
    assert (list(learn.cbs), learn.logger, learn.create_mbar, learn.progress) == before
    learn.fit(1)
    assert capsys.readouterr().out.count('\n') == 2


def test_rows_go_where_the_user_wants_them(tmp_path, capsys):
    learn, rows = make_learner(tmp_path), []
    learn.logger = rows.append
    with learn.no_bar(): learn.fit(1)
    assert capsys.readouterr().out == '' and rows == [learn.recorder.log]
    learn.fit(1)
    assert len(rows) == 2 and learn.logger == rows.append


INTERRUPTED = '''
import sys, torch
from torch import nn
from lamella.learner.learner import Learner
from lamella.callbacks.progress import ProgressCallback
from lamella.loop.callback import Callback

class Stop(Callback):
    order = 90
    def after_batch(self):
        if self.training and self.train_iter == 25: raise KeyboardInterrupt

data = [(torch.rand(4, 1), torch.rand(4, 1)) for _ in range(20)]
learn = Learner([data, data[:2]], nn.Linear(1, 1), nn.functional.mse_loss, cbs=Stop)
learn.progress.every = 0
try: learn.fit(2)
except KeyboardInterrupt: print('interrupted')
learn.fit(1)
'''


@pytest.mark.skipif(sys.platform == 'win32', reason='needs a pseudo-terminal')
def test_interrupt_leaves_a_clean_terminal(tmp_path):
    import fcntl, pty, termios
    script = tmp_path/'script.py'
    script.write_text(INTERRUPTED)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 100, 0, 0))
    process = subprocess.Popen([sys.executable, str(script)], stdout=theirs, stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    os.close(theirs)
    found = b''
    while True:
        try: part = os.read(ours, 65536)
        except OSError: break # the other side is closed
        if not part: break
        found += part
    process.wait()
    assert process.returncode == 0, found
    assert b'25%' in found or b'|' in found, 'there was no bar'
    lines = [_on_screen(line) for line in found.decode().replace('\r\n', '\n').split('\n')]
    place = next(i for i, line in enumerate(lines) if line.startswith('interrupted'))
    assert lines[place - 1].startswith('0 ') and '|' not in lines[place] and '%' not in ''.join(lines), lines


def _on_screen(line: str) -> str:
    "What a terminal shows after a line with carriage returns"
    shown = ''
    for part in line.split('\r'): shown = part + shown[len(part):]
    return shown.rstrip()
