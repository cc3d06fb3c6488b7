"""Keep files of this version of lamella for ever: `tests/test_released.py` loads those of every version that was released.

    python tests/tools/make_released.py

writes tests/released/VERSION/NAME.pkl, one for each task, and beside it NAME.json with what the learner itself predicted for tests/released/picture.png.
To make those of an older version, run it with PYTHONPATH=TREE/lib, where TREE is a checkout of that version. Tasks that a version did not have are left out.
"""
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

RELEASED = Path(__file__).resolve().parents[1]/'released'
PICTURE = RELEASED/'picture.png'
HERE = dict(bs=4, num_workers=0, device='cpu')
SMALL = dict(pretrained=False, cut=4, lin_ftrs=[8])


def make_pictures(folder: Path, n: int = 8) -> list[Path]:
    "Pictures of noise with a white square, and their masks in a folder beside them"
    rng = np.random.default_rng(0)
    (folder/'images').mkdir()
    (folder/'masks').mkdir()
    for k in range(n):
        picture, mask = rng.integers(0, 120, (36, 48, 3), dtype=np.uint8), np.zeros((36, 48), dtype=np.uint8)
        picture[4 + k:16 + k, 8 + k:20 + k], mask[4 + k:16 + k, 8 + k:20 + k] = 255, 1
        Image.fromarray(picture).save(folder/'images'/f'{k}.png')
        Image.fromarray(mask).save(folder/'masks'/f'{k}.png')
    if not PICTURE.exists(): PICTURE.write_bytes((folder/'images'/'0.png').read_bytes())
    return sorted((folder/'images').glob('*.png'))


def number(file: Path) -> int: return int(Path(file).stem)
def box(file: Path) -> list: return [8 + number(file), 4 + number(file), 20 + number(file), 16 + number(file)]


def loaders(files, blocks, get_y, **options):
    "Loaders of pictures of 32 pixels a side"
    from lamella.vision.all import DataBlock, IndexSplitter, Normalize, Resize, imagenet_stats
    block = DataBlock(blocks, get_y=get_y, splitter=IndexSplitter([6, 7]), item_tfms=Resize(32), batch_tfms=Normalize.from_stats(*imagenet_stats), **options)
    return block.dataloaders(files, **HERE)


def classification(files):
    from lamella.vision.all import CategoryBlock, ImageBlock, vision_learner
    dls = loaders(files, (ImageBlock, CategoryBlock), lambda o: 'odd' if number(o) % 2 else 'even')
    return vision_learner(dls, 'test_resnet', cut=5, pretrained=False, lin_ftrs=[8])


def layers(files):
    "A model without a name, made of layers of torch.nn"
    from lamella.vision.all import CategoryBlock, ImageBlock, Learner
    dls = loaders(files, (ImageBlock, CategoryBlock), lambda o: 'odd' if number(o) % 2 else 'even')
    return Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))


def multilabel(files):
    from lamella.vision.all import ImageBlock, MultiCategoryBlock, vision_learner
    dls = loaders(files, (ImageBlock, MultiCategoryBlock), lambda o: ['square'] + (['odd'] if number(o) % 2 else []))
    return vision_learner(dls, 'test_resnet', **SMALL)


def regression(files):
    from lamella.vision.all import ImageBlock, RegressionBlock, vision_learner
    dls = loaders(files, (ImageBlock, RegressionBlock), lambda o: float(number(o)))
    return vision_learner(dls, 'test_resnet', n_out=1, y_range=(-1, 9), **SMALL)


def points(files):
    from lamella.vision.all import ImageBlock, PointBlock, vision_learner
    dls = loaders(files, (ImageBlock, PointBlock), lambda o: [box(o)[:2], box(o)[2:]])
    return vision_learner(dls, 'test_resnet', n_out=4, **SMALL)


def segmentation(files):
    from lamella.vision.all import ImageBlock, MaskBlock, unet_learner
    dls = loaders(files, (ImageBlock, MaskBlock(['ground', 'square'])), lambda o: Path(o).parents[1]/'masks'/Path(o).name)
    return unet_learner(dls, 'test_resnet', pretrained=False, cut=3, last_cross=False)


def detection(files):
    from lamella.vision.all import BBoxBlock, BBoxLblBlock, ImageBlock, detection_learner
    dls = loaders(files, (ImageBlock, BBoxBlock, BBoxLblBlock), [lambda o: [box(o)], lambda o: ['square']], n_inp=1)
    return detection_learner(dls, 'retinanet', backbone='test_efficientnet', width=8, levels=2, head_convs=1, pretrained=False, score_thresh=0., detections_per_img=5)


TASKS = [classification, layers, multilabel, regression, points, segmentation, detection]


def plain(value):
    "Tensors as lists, tuples as lists"
    if isinstance(value, torch.Tensor): return plain(value.as_subclass(torch.Tensor).tolist())
    if isinstance(value, float): return round(value, 7)
    if isinstance(value, dict): return {k: plain(v) for k, v in value.items()}
    return [plain(o) for o in value] if isinstance(value, (list, tuple)) else value


def keep(task, folder: Path, files: list[Path]) -> str:
    "Export a learner of the task, after a little training so that all buffers differ from those of a new model; what became of it"
    torch.manual_seed(0)
    try: learn = task(files)
    except (ImportError, TypeError, NotImplementedError) as error: return f'not in this version ({error})'
    with learn.no_bar(), learn.no_logging(): learn.fit(5, 3e-3)
    label, decision, probs = learn.predict(PICTURE)
    learn.export(folder/f'{task.__name__}.pkl')
    label = label if isinstance(label, str) else [str(o) for o in label] if task is multilabel else None
    (folder/f'{task.__name__}.json').write_text(json.dumps({'label': label, 'decision': plain(decision), 'probabilities': plain(probs)}))
    return f'{(folder/f"{task.__name__}.pkl").stat().st_size} bytes'


def main() -> None:
    from importlib.util import find_spec
    tree = Path(find_spec('lamella').submodule_search_locations[0]).parents[1]
    version = next(line.split('=')[1].strip() for line in (tree/'settings.ini').read_text().splitlines() if line.startswith('version'))
    folder = RELEASED/version
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as pictures:
        files = make_pictures(Path(pictures))
        for task in TASKS: print(version, task.__name__, keep(task, folder, files))


if __name__ == '__main__': sys.exit(main())
