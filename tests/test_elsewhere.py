"""The promise of an exported file: one process trains and exits, and another one, in another folder and without the training code, agrees on every prediction."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SAME = 'import json, sys, torch\nfrom pathlib import Path\ntorch.set_num_threads(1)\n' # sums depend on the number of threads in the last bit
PRINT = '''
def told(p): return [str(p.label), int(p[1]), [x.hex() for x in p[2].tolist()]]
files = sorted(Path('pictures').glob('*.jpg'))
print(json.dumps({'one': [told(MODEL.predict(f)) for f in files], 'many': [told(p) for p in MODEL.predict(files)]}))
'''
TRAIN = SAME + '''
from lamella.vision.all import *

def is_cat(name): return name[0].isupper()

path = Path('pictures')
LOADERS
learn = vision_learner(dls, 'test_resnet', pretrained=False, metrics=error_rate)
with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, 5e-3)
learn.export(Path('model.pkl').resolve())
learn.to_onnx(Path('model.onnx').resolve())
''' + PRINT.replace('MODEL', 'learn')
FROM_BLOCK = '''
pets = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, splitter=RandomSplitter(0.25, seed=42),
                 get_y=lambda file: is_cat(file.name), item_tfms=RandomResizedCrop(32, min_scale=0.5), batch_tfms=aug_transforms())
dls = pets.dataloaders(path, bs=4, num_workers=0, device='cpu')
'''
FROM_NAMES = 'dls = ImageDataLoaders.from_name_func(path, get_image_files(path), valid_pct=0.25, seed=42, label_func=is_cat, item_tfms=Resize(32), bs=4, num_workers=0, device="cpu")'
LOAD = SAME + '''
from lamella.export import load_learner
predictor = load_learner('model.pkl')
''' + PRINT.replace('MODEL', 'predictor') + '''
training = ('lamella.callbacks', 'lamella.optim', 'lamella.learner.fitting', 'lamella.vision.all', 'matplotlib', 'pandas')
print(*[m for m in sys.modules if m.startswith(training)], file=sys.stderr)
'''
ONNX = '''
import json, sys
from pathlib import Path
for name in ('lamella', 'torch', 'torchvision', 'timm', 'fastcore', 'onnx'): sys.modules[name] = None # as if they were not installed
import onnx_predict
files = sorted(Path('pictures').glob('*.jpg'))
print(json.dumps(onnx_predict.OnnxPredictor('model.onnx', threads=1).predict(files)))
'''


def pictures(folder: Path, n: int = 8) -> Path:
    "Cats have names with a capital letter, as in the book; colours and sizes differ"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(2 * n):
        pixels = rng.integers(0, 140, (40 + k, 60 - k, 3), dtype=np.uint8)
        pixels[..., k % 2] += 100
        Image.fromarray(pixels).save(folder/(f'Bengal_{k}.jpg' if k % 2 else f'beagle_{k}.jpg'), quality=90)
    return folder


def run(code: str | list[str], folder: Path, **env) -> subprocess.CompletedProcess:
    "A fresh process in `folder`"
    command = [sys.executable, *(['script.py'] if isinstance(code, str) else code)]
    if isinstance(code, str): (folder/'script.py').write_text(code)
    done = subprocess.run(command, cwd=folder, env={**os.environ, 'OMP_NUM_THREADS': '1', **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def moved(here: Path, there: Path, *names: str) -> Path:
    "Only these go along"
    there.mkdir()
    for name in names: (shutil.copytree if (here/name).is_dir() else shutil.copy)(here/name, there/name)
    shutil.rmtree(here)
    return there


@pytest.fixture(scope='module', params=['from_block', 'from_names'])
def trained(request, tmp_path_factory):
    "What the training process said before it was gone; the folder that is left has the files and the pictures"
    here = tmp_path_factory.mktemp('training')/'here'
    pictures(here/'pictures')
    said = run(TRAIN.replace('LOADERS', {'from_block': FROM_BLOCK, 'from_names': FROM_NAMES}[request.param]), here).stdout
    return json.loads(said.splitlines()[-1]), moved(here, here.with_name('elsewhere'), 'model.pkl', 'model.onnx', 'pictures')


def test_another_process_agrees_on_every_prediction(trained):
    said, folder = trained
    done = run(LOAD, folder)
    assert json.loads(done.stdout) == said # bit for bit
    assert done.stderr.strip() == '' # nothing that only training needs was imported
    assert len({tuple(o[2]) for o in said['one']}) == len(said['one']) == len(said['many']) == 16 # each picture is seen differently


def test_onnx_without_lamella_and_torch_agrees(trained):
    from lamella.export import onnx_predict
    said, folder = trained
    shutil.copy(onnx_predict.__file__, folder/'onnx_predict.py')
    found = json.loads(run(ONNX, folder, PYTHONPATH='').stdout)
    for o, (label, _, probabilities) in zip(found, said['one'], strict=True):
        expected = dict(zip(['False', 'True'], map(float.fromhex, probabilities)))
        assert {str(k): v for k, v in o['probabilities'].items()} == pytest.approx(expected, abs=1e-2) # a pixel may be one step of 255 apart
        assert str(o['label']) == label or abs(expected['True'] - 0.5) < 1e-2


# A person who has never seen the library

@pytest.fixture(scope='module')
def newcomer(tmp_path_factory):
    "A folder for each kind of picture, and nothing else"
    folder = tmp_path_factory.mktemp('newcomer')
    for k, name in enumerate(('cat', 'dog')):
        (folder/'pets'/name).mkdir(parents=True)
        for file in sorted(pictures(folder/f'all{k}').glob('Bengal*' if k else 'beagle*')): shutil.move(file, folder/'pets'/name)
        shutil.rmtree(folder/f'all{k}')
    shutil.copy(next((folder/'pets'/'dog').iterdir()), folder/'photo.jpg')
    return folder


def lamella(*args: str, folder: Path) -> str: return run(['-m', 'lamella.cli', *args], folder).stdout


def commands_of(text: str) -> dict[str, list[str]]:
    "The commands that a help text shows, by their first words"
    found = [shlex.split(line.strip())[1:] for line in text.splitlines() if re.match(r'\s+lamella \w+ \w', line)]
    return {o[0]: o for o in found}


QUICK = ['--arch', 'test_resnet', '--no-pretrained', '--size', '32', '--epochs', '2', '--bs', '4', '--workers', '0', '--device', 'cpu'] # a network of minutes becomes one of seconds


def test_a_newcomer_trains_predicts_and_takes_it_along(newcomer, tmp_path):
    shown = commands_of(lamella('--help', folder=newcomer))
    assert {'train', 'predict', 'serve'} <= set(shown)
    help_of_training = lamella(*shown['train'], '--help', folder=newcomer)
    for option in QUICK: assert not option.startswith('--') or option in help_of_training, option
    lamella(*shown['train'], *QUICK, folder=newcomer)
    found = json.loads(lamella(*shown['predict'], '--format', 'json', folder=newcomer))
    assert set(found[0]['probabilities']) == {'cat', 'dog'} and found[0]['label'] in ('cat', 'dog')
    assert 'cat' in lamella(*shown['predict'], folder=newcomer) + lamella('info', 'model.pkl', folder=newcomer)
    shutil.copy(newcomer/'model.pkl', tmp_path)
    shutil.copy(newcomer/'photo.jpg', tmp_path)
    elsewhere = run('from lamella.export import load_learner\nimport torch; torch.set_num_threads(1)\np = load_learner("model.pkl").predict("photo.jpg")\nprint(p.label, p.probability)', tmp_path).stdout.split()
    assert elsewhere[0] == found[0]['label'] and float(elsewhere[1]) == pytest.approx(found[0]['probability'], abs=1e-4)
