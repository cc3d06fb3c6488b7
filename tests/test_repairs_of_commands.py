"""The command line in the hands of a newcomer: nothing of theirs is overwritten, no model is lost, every message names the way out."""
import csv
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_photos

from lamella.cli.commands import lamella
from lamella.cli.interrupts import StoppableCheckpoint
from lamella.cli.messages import run_command
from lamella.cli.predict import _with_all_classes, rows_of

TINY = '--arch test_resnet --no-pretrained --size 32 --bs 4 --workers 0 --device cpu --epochs 1'.split()
TRAIN = ['train', 'image-classification', 'from-folder']


@pytest.fixture(scope='module')
def pets(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return make_photos(tmp_path_factory.mktemp('data')/'pets', n=8)


@pytest.fixture
def said(capsys):
    "What a command prints, and its exit code"
    def run(*words, code: int = 2) -> str:
        capsys.readouterr()
        found = run_command(lamella, [str(o) for o in words])
        out = ''.join(capsys.readouterr())
        assert found == code, (found, out)
        return out
    return run


def table_of(pets, folder, *rows) -> Path:
    file = folder/'labels.csv'
    file.write_text('\n'.join(['name,label,valid', *rows]) + '\n')
    return file


# Nothing of the user's is replaced unasked

def test_a_log_does_not_replace_the_table(said, pets, tmp_path):
    table = table_of(pets, tmp_path, *(f"{o},{o.parent.name},{o.stem == '1'}" for o in pets.glob('*/*.jpg')))
    before = table.read_bytes()
    for more in ([], ['--overwrite']): # not even if asked: it is being read
        assert '--out gives another name' in said('train', 'image-classification', 'from-csv', table, *TINY, '--out', tmp_path/'labels.pkl', '--log', 'csv', *more)
    assert table.read_bytes() == before


def test_a_log_of_before_is_replaced_only_if_asked(said, pets, tmp_path):
    (tmp_path/'model.jsonl').write_text('mine')
    assert '--overwrite replaces it' in said(*TRAIN, pets, *TINY, '--out', tmp_path/'model.pkl', '--log', 'jsonl')
    assert (tmp_path/'model.jsonl').read_text() == 'mine'


@pytest.mark.parametrize('name,more', [('run.yaml', []), ('best.pth', ['--best'])])
def test_files_in_the_folder_of_checkpoints_are_left_alone(said, pets, tmp_path, name, more):
    (tmp_path/name).write_text('mine')
    assert f"'{name}'" in said(*TRAIN, pets, *TINY, '--out', tmp_path/'model.pkl', '--checkpoint', tmp_path, *more)
    assert (tmp_path/name).read_text() == 'mine'


def test_predictions_do_not_replace_a_file(said, pets, tmp_path):
    model = tmp_path/'model.pkl'
    said(*TRAIN, pets, *TINY, '--out', model, code=0)
    before = model.read_bytes()
    assert '--overwrite' in said('predict', model, pets, '--out', model)
    said('predict', model, pets, '--out', model, '--overwrite') # it is read
    assert model.read_bytes() == before
    table = tmp_path/'found.csv'
    table.write_text('old')
    assert '--overwrite' in said('predict', model, pets, '--out', table)
    assert table.read_text() == 'old'
    said('predict', model, pets, '--out', table, '--format', 'csv', '--overwrite', code=0)
    assert len(list(csv.DictReader(table.open()))) == 16
    assert 'the model itself' in said('export', model, '--out', model, '--format', 'torchscript', '--overwrite')


HOLDER = '''import fcntl, sys
file = open(sys.argv[1], 'a')
fcntl.lockf(file, fcntl.LOCK_EX)
print('held', flush=True)
sys.stdin.read()'''


def test_one_run_at_a_time_in_a_folder(said, pets, tmp_path):
    pytest.importorskip('fcntl')
    file = tmp_path/'model.checkpoint'/'run.yaml'
    file.parent.mkdir()
    file.write_text('# written by lamella train\n')
    other = subprocess.Popen([sys.executable, '-c', HOLDER, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == 'held\n'
    assert 'is at work' in said(*TRAIN, pets, *TINY, '--out', tmp_path/'model.pkl')
    other.communicate('')
    said(*TRAIN, pets, *TINY, '--out', tmp_path/'model.pkl', code=0) # a run that was killed holds nothing
    assert [o.name for o in tmp_path.iterdir()] == ['model.pkl']


# No model is lost

def test_a_picture_that_spoils_the_report_does_not_cost_the_model(said, pets, tmp_path):
    table = table_of(pets, tmp_path, *(f"{o},{o.parent.name},{o.stem in '12'}" for o in pets.glob('*/*.jpg')), 'bad.jpg,cat,True')
    good = next(pets.glob('*/*.jpg')).read_bytes()
    (tmp_path/'bad.jpg').write_bytes(good[:len(good) // 2])
    out = said('train', 'image-classification', 'from-csv', table, '--valid-col', 'valid', *TINY, '--on-error', 'skip', '--out', tmp_path/'model.pkl', code=0)
    assert (tmp_path/'model.pkl').is_file() and not (tmp_path/'model.checkpoint').exists(), out


def test_nothing_to_check_with(said, pets, tmp_path):
    assert 'no picture to check with' in said(*TRAIN, pets, *TINY, '--valid-pct', 0.001, '--out', tmp_path/'model.pkl', code=0)
    assert (tmp_path/'model.pkl').is_file()


def test_a_folder_that_cannot_be_written_is_known_before_training(said, pets, tmp_path, monkeypatch):
    monkeypatch.setattr(StoppableCheckpoint, '__enter__', lambda self: pytest.fail('it trains'))
    (tmp_path/'file').write_text('')
    assert '--out gives another place' in said(*TRAIN, pets, *TINY, '--out', tmp_path/'file'/'model.pkl', code=1)
    assert '--out' in said(*TRAIN, pets, *TINY, '--out', tmp_path/'model.checkpoint')


# Messages

def test_without_a_network_the_answer_comes_at_once(said, pets, tmp_path, monkeypatch):
    from huggingface_hub.utils import _http
    for name in ('http_proxy', 'https_proxy', 'all_proxy'): # they would be asked in place of the host
        monkeypatch.delenv(name, raising=False), monkeypatch.delenv(name.upper(), raising=False)
    def _no_network(*args, **kwargs): raise socket.gaierror(-2, 'Name or service not known')
    monkeypatch.setattr(socket, 'create_connection', _no_network)
    monkeypatch.setattr(_http.time, 'sleep', lambda seconds: pytest.fail('it tries again'))
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    out = said(*TRAIN, pets, '--arch', 'resnet10t', '--size', 32, '--workers', 0, '--out', tmp_path/'m.pkl', code=1).splitlines()
    assert '--no-pretrained' in out[-1] and '--weights FILE' in out[-1] and not any('thrown while' in o for o in out), out


@pytest.mark.parametrize('words,part', [
    (['--strategy', 'fine-tune:3'], 'no numbers'), (['--strategy', 'freeze-unfreze'], "Did you mean 'freeze-unfreeze'"), (['--lr', 'inf'], 'not a number to compute with'),
    (['--device', 'gpu'], "'cuda:1'")])
def test_wrong_values(said, pets, tmp_path, words, part):
    assert part in said(*TRAIN, pets, *TINY, *words, '--out', tmp_path/'m.pkl')
    assert not list(tmp_path.iterdir())


def test_wrong_words_are_answered_with_those_that_there_are(said):
    assert 'There are image-classification, image-regression' in said('train', 'image')


def test_wrong_tables(said, pets, tmp_path):
    files = sorted(pets.glob('*/*.jpg'))
    options = ['--label-col', 'label', *TINY, '--out', tmp_path/'m.pkl']
    table = table_of(pets, tmp_path, *(f'{o},{k if k else ""},{k % 3}' for k, o in enumerate(files)))
    assert '1 of the 16 rows have no number' in said('train', 'image-regression', 'from-csv', table, *options)
    assert '--valid-col' in said('train', 'image-classification', 'from-csv', table, *options, '--valid-col', 'valid')
    assert 'no rows' in said('train', 'image-classification', 'from-csv', table_of(pets, tmp_path), *options)
    (tmp_path/'empty.csv').write_text('')
    assert '--delimiter' in said('train', 'image-classification', 'from-csv', tmp_path/'empty.csv', *options)


def test_wrong_files_of_values(said, pets, tmp_path):
    file = tmp_path/'run.yaml'
    for text, part in (('epochs: [1, 2]', 'which takes one value'), ('lr: {a: 1}', 'which takes one value')):
        file.write_text(text)
        assert part in said(*TRAIN, pets, '--config', file, '--print-config')
    file.write_text('best: 1\nmetrics: accuracy')
    assert 'best: true' in said(*TRAIN, pets, '--config', file, '--print-config', code=0)
    assert 'which command' in said('--config', file)
    assert 'No such file' in said('train', '--config', tmp_path/'none.yaml')


# Rows

def test_every_picture_has_a_row():
    row, = rows_of('a.jpg', {'boxes': []})
    assert list(row) == ['file', 'label', 'score', 'left', 'top', 'right', 'bottom'] and row['label'] == ''
    found = _with_all_classes({'classes': {'sky': 1.}}, ['sky', 'tree'])
    assert json.dumps(rows_of('a.jpg', found)) == '[{"file": "a.jpg", "sky": 1.0, "tree": 0.0}]'


# Stopped

@pytest.mark.parametrize('event', ['after_batch', 'after_epoch'])
def test_a_signal_while_the_checkpoint_decides_is_for_the_next_batch(tmp_path, monkeypatch, event):
    "It used to leave without a file, and to say that there was one"
    from lamella.callbacks.checkpoint import Checkpoint
    keeper, files = StoppableCheckpoint(tmp_path), []
    keeper._in_epochs = True
    def _decides(self):
        if self._due(): files.append(event)
        self.signum = 15 # comes a moment later
    monkeypatch.setattr(Checkpoint, '_due', lambda self: False)
    monkeypatch.setattr(Checkpoint, event, _decides)
    getattr(keeper, event)()
    with pytest.raises(KeyboardInterrupt): getattr(keeper, event)()
    assert files == [event]
