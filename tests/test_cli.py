"""The command line, as a person uses it: words in, text and exit codes out; killed in the middle, and gone on with."""
import csv
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import make_photos

from lamella.cli.commands import lamella
from lamella.cli.messages import run_command

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'}
TINY = '--arch test_resnet --no-pretrained --size 32 --bs 4 --workers 0 --device cpu'.split()


def command(*words) -> list[str]:
    return [sys.executable, '-m', 'lamella.cli', *map(str, words)]


def run(*words, code: int = 0, cwd=None, **kwargs) -> subprocess.CompletedProcess:
    "A real process, which has to end with this exit code"
    done = subprocess.run(command(*words), capture_output=True, text=True, env=ENV, cwd=cwd, timeout=100, **kwargs)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


def here(capsys, *words, code: int = 0) -> str:
    "In this process: what it prints"
    capsys.readouterr()
    found = run_command(lamella, [str(o) for o in words])
    said = capsys.readouterr()
    assert found == code, (found, said)
    return said.out + said.err


@pytest.fixture(scope='module')
def pets(tmp_path_factory) -> Path:
    return make_photos(tmp_path_factory.mktemp('data')/'pets', n=12)


@pytest.fixture(scope='module')
def model(pets) -> Path:
    "A model that the command line trained, in a terminal: a person's first command"
    file = pets.parent/'model.pkl'
    said = in_terminal('train', 'image-classification', 'from-folder', pets, *TINY, '--epochs', 20, '--lr', 0.01, '--out', file) # with 6, one order of additions in ten learns nothing
    for part in ('20 pictures to learn from, 4 pictures to check with; 2 classes', 'Model: test_resnet, random weights', 'accuracy', f'lamella predict {file}', '%|'): assert part in said, said
    assert not file.with_suffix('.checkpoint').exists()
    return file


def in_terminal(*words) -> str:
    "What a process that ends well writes into a terminal"
    pty, termios, fcntl = map(pytest.importorskip, ('pty', 'termios', 'fcntl'))
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0)) # rows and columns
    process = subprocess.Popen(command(*words), stdout=other, stderr=subprocess.PIPE, env=ENV)
    os.close(other)
    said = b''.join(iter(lambda: _read(main), b'')).decode()
    assert process.wait(60) == 0, (said, process.stderr.read())
    return said


def _read(file: int) -> bytes:
    try: return os.read(file, 4096)
    except OSError: return b'' # the other end was closed


# Help

def all_commands(group, path=()):
    context = __import__('click').Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        if hasattr(found, 'list_commands'): yield from all_commands(found, (*path, name))
        else: yield (*path, name), found


COMMANDS = dict(all_commands(lamella))


@pytest.mark.parametrize('path', COMMANDS, ids=' '.join)
def test_help_explains_every_option(path):
    done = CliRunner().invoke(lamella, [*path, '--help'])
    assert done.exit_code == 0
    for param in COMMANDS[path].params:
        assert getattr(param, 'help', None) or getattr(param, 'about', None), f'{param.name} is not explained'
        shown = param.opts[0] if param.param_type_name == 'option' else param.about[:20]
        assert shown in done.output, (shown, done.output)


def test_help_does_not_import_torch():
    code = "import sys\nfrom lamella.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\nprint('torch' in sys.modules, 'numpy' in sys.modules)"
    for words in (['--help'], ['train', 'image-classification', 'from-csv', '--help'], ['predict', '--help']):
        done = subprocess.run([sys.executable, '-c', code, *words], capture_output=True, text=True, env=ENV)
        assert done.stdout.endswith('False False\n'), done


def test_the_shell_completes():
    done = subprocess.run(command(), capture_output=True, text=True, env={**ENV, '_LAMELLA_COMPLETE': 'bash_complete', 'COMP_WORDS': 'lamella train image-classification from', 'COMP_CWORD': '3'})
    assert [line.rpartition(',')[2] for line in done.stdout.split()] == ['from-folder', 'from-folders', 'from-csv'], done


# Exit codes and errors

@pytest.mark.parametrize('words,part', [
    (['trian'], "No such command 'trian'"), (['train', 'image-clasification'], "No such command"), (['train', 'image-classification', 'from-folder', 'no-such-folder'], 'does not exist'),
    (['train', 'image-classification', 'from-folder', '.', '--epocs', 3], 'No such option'), (['train', 'image-classification', 'from-folder', '.', '--size', 'big'], "not a size"),
    (['predict', __file__], "Missing argument 'PATHS...'"), (['models', 'resnt34'], "Did you mean 'resnet34'")])
def test_what_is_not_understood_is_2(capsys, words, part):
    assert part in here(capsys, *words, code=2)


def test_errors_are_one_line(capsys, tmp_path, pets):
    broken = tmp_path/'broken.pkl'
    broken.write_bytes(b'no zip')
    said = here(capsys, 'predict', broken, pets/'cat', code=1)
    assert said.startswith('Error: ') and said.count('\n') == 1, said
    (tmp_path/'empty').mkdir()
    assert here(capsys, 'train', 'image-classification', 'from-folder', tmp_path/'empty', *TINY, code=1).count('\n') == 1
    said = here(capsys, 'train', 'image-classification', 'from-folder', pets, *TINY, '--arch', 'resnet43', '--out', tmp_path/'m.pkl', code=1)
    assert "Did you mean 'resnet34'" in said.splitlines()[-1] and 'Traceback' not in said, said
    assert not list(tmp_path.glob('m.*'))


def test_debug_shows_the_traceback(tmp_path):
    broken = tmp_path/'broken.pkl'
    broken.write_bytes(b'no zip')
    with pytest.raises(ValueError, match='broken'): run_command(lamella, ['predict', str(broken), __file__, '--debug']) # Python shows it


def test_weights_that_cannot_be_downloaded(capsys, tmp_path, pets, monkeypatch):
    import timm
    def _no_network(*args, pretrained=False, **kwargs):
        if pretrained: raise OSError('no route to host\nmore\nlines')
        return before(*args, pretrained=pretrained, **kwargs)
    before = timm.create_model
    monkeypatch.setattr(timm, 'create_model', _no_network)
    said = here(capsys, 'train', 'image-classification', 'from-folder', pets, '--arch', 'resnet18', '--size', 32, '--workers', 0, '--out', tmp_path/'m.pkl', code=1).splitlines()[-1]
    assert said.startswith('Error: ') and '--no-pretrained' in said and '--weights FILE' in said, said


def test_nothing_is_overwritten_unasked(capsys, tmp_path, pets):
    (tmp_path/'m.pkl').write_text('mine')
    assert '--overwrite' in here(capsys, 'train', 'image-classification', 'from-folder', pets, *TINY, '--out', tmp_path/'m.pkl', code=2)
    assert (tmp_path/'m.pkl').read_text() == 'mine'


# Values

def test_config(capsys, tmp_path, pets):
    file = tmp_path/'run.yaml'
    words = ['train', 'image-classification', 'from-folder', pets, *TINY, '--metrics', 'accuracy', '--metrics', 'error_rate', '--augment', 'off', '--strategy', 'freeze-unfreeze:2', '--balance']
    printed = here(capsys, *words, '--print-config')
    file.write_text(printed)
    assert here(capsys, '--config', file, '--print-config') == printed                               # the whole command
    assert here(capsys, 'train', '--config', file, '--print-config') == printed
    assert here(capsys, *words[:3], '--config', file, '--print-config') == printed                   # the options of one
    assert 'epochs: 9' in here(capsys, 'train', '--config', file, '--epochs', 9, '--print-config')   # the command line wins
    assert "bs: 4" in printed and 'pretrained: false' in printed and "augment: 'off'" in printed, printed
    file.write_text('epoch: 3')
    assert "Did you mean 'epochs'" in here(capsys, *words, '--config', file, code=2)
    file.write_text('task: image-regression')
    assert 'for another command' in here(capsys, *words, '--config', file, code=2)
    file.write_text('epochs: many')
    assert "'many' is not a valid integer" in here(capsys, *words, '--config', file, code=2)


# What a model says

def test_predict_in_every_format(capsys, model, pets, tmp_path):
    photo = pets/'cat'/'1.jpg'
    said = here(capsys, 'predict', model, photo)
    assert said.splitlines()[0].split() == ['file', 'label', 'probability'] and len(said.splitlines()) == 2, said
    rows = list(csv.DictReader(here(capsys, 'predict', model, pets, '--format', 'csv').splitlines()))
    assert len(rows) == 24 and list(rows[0]) == ['file', 'label', 'probability', 'cat', 'dog']
    assert all(row['label'] == Path(row['file']).parent.name for row in rows)
    lines = [json.loads(o) for o in here(capsys, 'predict', model, f'{pets}/*/1.jpg', '--format', 'jsonl', '--top', 1).splitlines()]
    assert [Path(o['file']).parent.name for o in lines] == ['cat', 'dog'] and all(len(o['probabilities']) == 1 for o in lines)
    here(capsys, 'predict', model, photo, '--format', 'json', '--out', tmp_path/'out.json')
    assert json.loads((tmp_path/'out.json').read_text())[0]['label'] == 'cat'


def test_predict_reads_names(capsys, model, pets, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.StringIO('\n'.join(str(o) for o in sorted(pets.glob('*/*.jpg'))*2)))
    assert len(here(capsys, 'predict', model, '-', '--format', 'jsonl').splitlines()) == 24


def test_a_closed_pipe_is_quiet():
    process = subprocess.Popen(command('train', 'image-classification', 'from-folder', '--help'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV)
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait(60) in (0, 1)


def test_a_bad_picture_among_many(capsys, model, pets, tmp_path):
    bad = tmp_path/'bad.jpg'
    bad.write_bytes(b'no picture')
    said = here(capsys, 'predict', model, pets/'cat', bad, pets/'dog', '--on-error', 'skip', '--format', 'csv')
    assert len(said.splitlines()) == 1 + 24 + 1 and f'Skipped {bad}' in said
    assert 'bad.jpg' in here(capsys, 'predict', model, pets/'cat', bad, code=1)


def test_evaluate_agrees_with_predict(capsys, model, pets, tmp_path):
    found = json.loads(here(capsys, 'evaluate', model, 'from-folder', pets, '--format', 'json'))
    rows = list(csv.DictReader(here(capsys, 'predict', model, pets, '--format', 'csv').splitlines()))
    right = sum(row['label'] == Path(row['file']).parent.name for row in rows)
    assert found['pictures'] == 24 and found['accuracy'] == right/24
    wrong = 'dog', *['cat']*23 # every label is 'cat' but the first
    table = tmp_path/'labels.csv'
    table.write_text('name,kind\n' + '\n'.join(f"{row['file']},{label}" for row, label in zip(rows, wrong)))
    other = json.loads(here(capsys, 'evaluate', model, 'from-csv', table, '--label-col', 'kind', '--format', 'json'))
    assert other['accuracy'] == sum(row['label'] == label for row, label in zip(rows, wrong))/24
    assert 'Rows: what it is' in here(capsys, 'evaluate', model, 'from-folder', pets)


def test_info_reads_the_description_alone(capsys, model):
    facts = json.loads(here(capsys, 'info', model, '--format', 'json'))
    assert (facts['task'], facts['classes'], facts['size']) == ('classification', ['cat', 'dog'], model.stat().st_size)
    assert 'cat, dog' in here(capsys, 'info', model)


# Other tasks

def test_several_labels_from_a_table(capsys, pets, tmp_path):
    files = sorted(pets.glob('*/*.jpg'))
    table = tmp_path/'labels.csv'
    table.write_text('name,kinds\n' + '\n'.join(f"{o.relative_to(pets)},{o.parent.name}{' first' if o.stem == '1' else ''}" for o in files))
    out = tmp_path/'m.pkl'
    said = here(capsys, 'train', 'image-classification', 'from-csv', table, '--images', pets, '--label-delim', ' ', *TINY, '--epochs', 1, '--out', out, '--log', 'csv', '--log', 'jsonl')
    assert '3 labels' in said and out.with_suffix('.csv').is_file() and out.with_suffix('.jsonl').is_file(), said
    found = json.loads(here(capsys, 'evaluate', out, 'from-csv', table, '--images', pets, '--label-delim', ' ', '--format', 'json'))
    assert set(found['classes']) == {'cat', 'dog', 'first'} and found['classes']['first']['pictures'] == 2


def test_numbers_from_a_table(capsys, pets, tmp_path):
    table = tmp_path/'ages.csv'
    table.write_text('age;name\n' + '\n'.join(f'{k / 7};{o.relative_to(pets)}' for k, o in enumerate(sorted(pets.glob('*/*.jpg')))))
    columns = ['--images', pets, '--delimiter', ';', '--fn-col', 'name', '--label-col', 'age']
    said = here(capsys, 'train', 'image-regression', 'from-csv', table, *columns, *TINY, '--epochs', 1, '--out', tmp_path/'m.pkl', '--best', '--early-stop', 3, '--bs', 'auto')
    assert 'rmse' in said, said
    assert 'rmse' in here(capsys, 'evaluate', tmp_path/'m.pkl', 'from-csv', table, *columns)
    assert "Did you mean 'age'" in here(capsys, 'train', 'image-regression', 'from-csv', table, '--images', pets, '--delimiter', ';', '--fn-col', 'name', '--label-col', 'aeg', *TINY, '--out', tmp_path/'n.pkl', code=2)


# Stopped, and gone on with

def weights(file: Path) -> bytes:
    with zipfile.ZipFile(file) as archive: return archive.read('weights.safetensors')


def interrupted(words, signum) -> tuple[int, str, str]:
    "Start, wait for the row of the first epoch of the second phase, send the signal"
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    said, rows = '', 0
    for line in process.stdout:
        said += line
        rows += line[:1].isdigit()
        if rows == 3: break
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    return process.returncode, said + out, err


RUN = ['train', 'image-classification', 'from-folder', *TINY, '--strategy', 'fine-tune', '--freeze-epochs', 2, '--epochs', 8, '--checkpoint-every', 1000]


def test_interrupted_and_resumed_is_the_same_bit_for_bit(capsys, tmp_path, pets):
    out, whole = tmp_path/'model.pkl', tmp_path/'whole.pkl'
    code, said, err = interrupted([*RUN, '--out', out, pets], signal.SIGINT)
    assert code == 130 and not out.exists(), (code, said, err)
    assert f'lamella train --config {tmp_path}/model.checkpoint/run.yaml --resume' in err and 'Traceback' not in err, err
    assert '\r' not in said                      # no bars in a pipe
    assert len(read_rows(said)) < 10, said       # it did not run to its end
    here(capsys, *RUN, '--out', out, pets, code=2)                            # neither begun anew
    here(capsys, *RUN, '--out', out, pets, '--resume', '--lr', 0.5, code=2)   # nor gone on with otherwise
    torch.set_num_threads(1)                                                  # as in the other process
    rows = read_rows(here(capsys, 'train', '--config', out.with_suffix('.checkpoint')/'run.yaml', '--resume'))
    assert len(rows) < 10, rows                  # it went on
    here(capsys, *RUN, '--out', whole, pets)
    assert weights(out) == weights(whole)
    assert sorted(o.name for o in tmp_path.iterdir()) == ['model.pkl', 'whole.pkl']


def test_terminated_keeps_the_checkpoint(tmp_path, pets):
    code, said, err = interrupted([*RUN, '--out', tmp_path/'model.pkl', pets], signal.SIGTERM)
    assert code == 143 and 'To go on:' in err and list(tmp_path.glob('model.checkpoint/checkpoint-*.pt')), (code, said, err)


def read_rows(said: str) -> list[str]:
    "The rows of epochs"
    return [line for line in said.splitlines() if line[:1].isdigit()]
