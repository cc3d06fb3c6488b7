"""What every row shares: the command line, the seeds, the threads, the folder of photographs."""
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Callable

RESULTS = Path(__file__).resolve().parents[1]/'results'
PHOTO_SIZE, PHOTO_COUNT = (500, 375), 2048 # 25 batches an epoch, so that the start of an epoch counts no more than it does in practice
LARGE_SIZE, LARGE_COUNT = (4032, 3024), 48
SOURCES = dict(space=['astronaut', 'rocket', 'hubble_deep_field'], things=['coffee', 'stereo_motorcycle'],
               animals=['chelsea'], medicine=['immunohistochemistry', 'retina'])


def main(
    unit: str,                         # what the value is, such as 'images/s'
    measure: Callable[[str], float],   # measures a library, given its name
    floor: Callable[[], float] = None, # measures hand-written code that does the same
    **others: Callable[[], float],     # measure what one would pick instead, by their names
) -> None:
    "Measure what `sys.argv[1]` names (fastai, lamella, floor, or one of the others) and print the result as one line of JSON"
    name, alone = sys.argv[1], dict(others, floor=floor)
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        value = alone[name]() if name in alone else measure(name)
    print(json.dumps(dict(value=value, unit=unit)))


def library(name: str) -> ModuleType:
    "A module that holds what `from NAME.vision.all import *` imports"
    module = ModuleType(f'{name}_names')
    exec(f'from {name}.vision.all import *', vars(module))
    return module


def prepare() -> None:
    "The same seeds for everybody, and one torch thread: more of them fight for the cores of a busy machine"
    import numpy
    import torch
    torch.set_num_threads(1)
    for seed in (random.seed, numpy.random.seed, torch.manual_seed): seed(0)


def seconds(work: Callable[[], object]) -> float:
    "How long one call of `work` takes"
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_seconds(
    work: Callable[[], object],
    calls: int = 30,
    warm_up: int = 5, # calls that are not counted
) -> float:
    "The median time of a call of `work`"
    for _ in range(warm_up): work()
    return statistics.median(seconds(work) for _ in range(calls))


def images_per_second(
    loader,          # yields batches, whose first part is the images
    epochs: int = 1, # whole epochs that are counted
) -> float:
    "The speed of `loader` over whole epochs, the start of each included, after one that is not counted"
    def one_epoch() -> int: return sum(len(batch[0]) for batch in loader)
    one_epoch()
    start = time.perf_counter()
    count = sum(one_epoch() for _ in range(epochs))
    return count / (time.perf_counter() - start)


def photos() -> Path: return made_once(f'photos_{PHOTO_COUNT}', PHOTO_COUNT, PHOTO_SIZE)
def large_photos() -> Path: return made_once('photos_12mp', LARGE_COUNT, LARGE_SIZE)


def made_once(name: str, count: int, size: tuple[int, int]) -> Path:
    "A folder with JPEGs in four class folders, made when it is missing"
    path = RESULTS/name
    if not path.exists():
        RESULTS.mkdir(exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=RESULTS))
        make_photos(made, count, size)
        made.rename(path)
    return path


def make_photos(path: Path, count: int, size: tuple[int, int]) -> None:
    "Crops of the photographs that scikit-image brings along, re-encoded as JPEGs of the size of ImageNet's, or of a telephone's"
    rng = random.Random(0)
    for label, names in SOURCES.items():
        (path/label).mkdir()
        sources = [open_source(name) for name in names]
        for i in range(count//len(SOURCES)):
            random_crop(sources[i % len(sources)], rng, size).save(path/label/f'{label}_{i:03}.jpg', quality=90)


def open_source(name: str):
    "The sample image of scikit-image called `name`"
    from PIL import Image
    from skimage import data
    pixels = getattr(data, name)()
    return Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels)


def random_crop(image, rng: random.Random, size: tuple[int, int]):
    "A random 4:3 part of `image`, at least half as wide as it, mirrored half of the time"
    from PIL import Image, ImageOps
    width = rng.uniform(0.5, 1) * min(image.width, image.height*4/3)
    height = width * 3/4
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    crop = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop
