"""The program of the README, word for word, in the ways people run it: as a script, with workers, with other networks."""
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from conftest import make_photos

PROGRAM = '''
from lamella.vision.all import *
path = Path('photos')
mask_datablock = DataBlock(
    get_items=get_image_files, get_y=parent_label,
    blocks=(ImageBlock, CategoryBlock),
    item_tfms=RandomResizedCrop(224, min_scale=0.3),
    splitter=RandomSplitter(valid_pct=0.2, seed=100),
    batch_tfms=aug_transforms(mult=2))
dls = mask_datablock.dataloaders(path)
dls.show_batch()
learn = cnn_learner(dls, resnet34, metrics=error_rate)
learn.lr_find()
learn.fine_tune(4)
learn.export()
learn.predict('photos/cat/1.jpg')
load_learner('export.pkl').predict('photos/cat/1.jpg')
'''


def run_script(folder: Path, source: str, timeout: int = 1500, **env: str) -> str:
    "Run a program in its own process and folder; its output"
    (folder/'program.py').write_text(textwrap.dedent(source), encoding='utf-8')
    done = subprocess.run([sys.executable, 'program.py'], cwd=folder, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, 'MPLBACKEND': 'Agg', **env})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def torch_home(tmp_path):
    "A cache of torch.hub with 'pretrained' weights of resnet34, so that the program runs without network"
    from torchvision.models import ResNet34_Weights, resnet34
    folder = tmp_path/'torch'/'hub'/'checkpoints'
    folder.mkdir(parents=True)
    torch.save(resnet34().state_dict(), folder/Path(ResNet34_Weights.DEFAULT.url).name)
    return tmp_path/'torch'


def test_word_for_word(tmp_path, torch_home):
    "Exactly the program of the README, with nothing changed"
    make_photos(tmp_path/"photos", n=3)
    out = run_script(tmp_path, PROGRAM, TORCH_HOME=str(torch_home))
    assert out.count('error_rate') == 2                       # a table for each phase of fine_tune
    rows = [line for line in out.splitlines() if line[:1].isdigit()]
    assert [line.split()[0] for line in rows] == ['0', '0', '1', '2', '3']
    assert (tmp_path/"export.pkl").is_file()


SCRIPT = '''
from lamella.vision.all import *

def main():
    block = DataBlock(get_items=get_image_files, get_y={get_y}, blocks=(ImageBlock, CategoryBlock), item_tfms=RandomResizedCrop(64, min_scale=0.3),
                      splitter=RandomSplitter(valid_pct=0.2, seed=100), batch_tfms=aug_transforms(mult=2))
    dls = block.dataloaders(Path('photos'), bs=4, num_workers={workers})
    learn = {learner}(dls, {arch}, pretrained=False, metrics=error_rate)
    learn.fine_tune(1)
    learn.export()
    label, number, probs = learn.predict('photos/cat/1.jpg')
    other = load_learner('export.pkl').predict('photos/cat/1.jpg')
    assert label == other.label and torch.equal(probs, other[2]), (probs, other[2])
    assert set(other.probabilities) == {{'cat', 'dog'}} and abs(sum(other.probabilities.values()) - 1) < 1e-5

if __name__ == '__main__': main()
'''


@pytest.mark.parametrize('workers, get_y, learner, arch', [
    (0, 'parent_label', 'cnn_learner', 'resnet18'),
    (2, 'lambda o: o.parent.name', 'vision_learner', "'resnet26d'"),
    (2, 'parent_label', 'vision_learner', "'convnext_tiny'"),
    (0, 'lambda o: o.parent.name', 'vision_learner', '__import__("torchvision").models.shufflenet_v2_x0_5'),
])
def test_as_a_script(photos, workers, get_y, learner, arch):
    "Under `if __name__ == '__main__'`, with and without workers, label functions that are lambdas, networks of both libraries"
    run_script(photos.parent, SCRIPT.format(workers=workers, get_y=get_y, learner=learner, arch=arch))


def test_another_process_agrees(photos):
    "One script trains, exports and exits; another, in another folder, that imports only lamella.export, gives the same predictions"
    train = '''
    from lamella.vision.all import *
    is_cat = lambda o: 'cat' in str(o)
    dls = ImageDataLoaders.from_path_func('photos', get_image_files('photos'), is_cat, item_tfms=Resize(48), bs=4, num_workers=0, seed=1)
    learn = vision_learner(dls, resnet18, pretrained=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.export(Path('model.pkl').resolve())
    for f in get_image_files('photos'): print(f.name, *[float(p).hex() for p in learn.predict(f)[2]])
    '''
    use = '''
    import sys
    from pathlib import Path
    from lamella.export import load_learner
    assert not any(m.startswith(('lamella.loop', 'lamella.callbacks')) for m in sys.modules)
    predictor = load_learner(Path('..')/'model.pkl')
    for f in sorted((Path('..')/'photos').rglob('*.jpg')): print(f.name, *[float(p).hex() for p in predictor.predict(f)[2]])
    '''
    (photos.parent/'elsewhere').mkdir()
    assert run_script(photos.parent, train).split() == run_script(photos.parent/'elsewhere', use).split()


def test_the_same_weights_with_and_without_workers(photos):
    "One seed decides everything, whatever the number of worker processes"
    from lamella.vision.all import (CategoryBlock, DataBlock, ImageBlock, RandomResizedCrop, RandomSplitter, aug_transforms, get_image_files,
                                    parent_label, set_seed, vision_learner)

    def weights(workers):
        set_seed(3)
        block = DataBlock(get_items=get_image_files, get_y=parent_label, blocks=(ImageBlock, CategoryBlock), splitter=RandomSplitter(),
                          item_tfms=RandomResizedCrop(32, min_scale=0.3), batch_tfms=aug_transforms())
        learn = vision_learner(block.dataloaders(photos, bs=4, num_workers=workers, device='cpu'), 'test_resnet', pretrained=False)
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
        return learn.model.state_dict()

    one, two = weights(0), weights(2)
    assert all(torch.equal(one[k], two[k]) for k in one)
