"""A fresh process that imports and loads an exported resnet34, in seconds of the processor; floor: `import torch, torchvision` and reading the weights of a resnet34, no more."""
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import RESULTS, library, main, made_once

ROUNDS = 5
HEAD = 'import time, resource, torch; torch.set_num_threads(1)\n'
FOOT = '\nused = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime)'
LOAD = {'lamella': 'from lamella.export import load_learner\npredictor = load_learner({file!r})',
        'fastai': 'import torchvision\nfrom fastai.learner import load_learner\nlearn = load_learner({file!r})',
        'floor': 'import torchvision\nweights = torch.load({file!r}, weights_only=True)'}


def exported(name: str) -> Path:
    "A file with a resnet34, made when it is missing"
    file = RESULTS/f'resnet34_{name}.pkl'
    if file.exists(): return file
    RESULTS.mkdir(exist_ok=True)
    import torch
    import torchvision
    if name == 'floor':
        torch.save(torchvision.models.resnet34().state_dict(), file)
        return file
    lib = library(name)
    photos = made_once('photos_load', 16, (100, 75))
    dls = lib.ImageDataLoaders.from_folder(photos, valid_pct=0.25, seed=1, item_tfms=lib.Resize(64), bs=4, num_workers=0, device=torch.device('cpu'))
    lib.vision_learner(dls, torchvision.models.resnet34, pretrained=False).export(file.resolve())
    return file


def processor_seconds(name: str) -> float:
    "The median over fresh processes, start and imports included"
    code = HEAD + LOAD[name].format(file=str(exported(name))) + FOOT
    def once() -> float:
        with tempfile.TemporaryDirectory() as folder: result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=folder, capture_output=True, text=True)
        if result.returncode: sys.exit(result.stderr)
        return float(result.stdout.split()[-1])
    once() # files come into memory
    return statistics.median(once() for _ in range(ROUNDS))


def floor() -> float: return processor_seconds('floor')


if __name__ == '__main__': main('s', processor_seconds, floor)
