"""Predictions of 512 photographs by a small network: fastai's `test_dl` and `get_preds`, lamella's `predict(list)`; floor: a torch Dataset and a loop by hand."""
import time

import torch
from _common import library, main, photos, prepare
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

COUNT, MEAN, STD = 512, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def make_model(classes: int = 4):
    "Small, so that most of the time goes into reading"
    return nn.Sequential(nn.Conv2d(3, 16, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)).eval()


def per_second(work) -> float:
    "Images a second, after one run that is not counted"
    work()
    start = time.perf_counter()
    assert work() == COUNT
    return COUNT / (time.perf_counter() - start)


def measure(name: str) -> float:
    "Images a second"
    vision = library(name)
    files = sorted(vision.get_image_files(photos()))[:COUNT]
    prepare()
    dls = vision.DataBlock(
        blocks=(vision.ImageBlock, vision.CategoryBlock), get_items=vision.get_image_files, get_y=vision.parent_label,
        splitter=vision.RandomSplitter(valid_pct=0.2, seed=100), item_tfms=vision.Resize(224),
        batch_tfms=vision.Normalize.from_stats(MEAN, STD)).dataloaders(photos(), bs=64, num_workers=2, device=torch.device('cpu'))
    learn = vision.Learner(dls, make_model(), loss_func=nn.CrossEntropyLoss())
    if name == 'lamella': return per_second(lambda: len(learn.predict(files)))
    return per_second(lambda: len(learn.get_preds(dl=learn.dls.test_dl(files, bs=64, num_workers=2))[0]))


class Photos:
    "A map-style dataset of resized images, as bytes"
    def __init__(self, files): self.files = files
    def __len__(self): return len(self.files)

    def __getitem__(self, i):
        with Image.open(self.files[i]) as image:
            image.draft('RGB', (224, 224))
            return pil_to_tensor(ImageOps.fit(image.convert('RGB'), (224, 224), Image.Resampling.BILINEAR))


def floor() -> float:
    "Images a second of the same work without a framework"
    files = sorted(photos().glob('*/*.jpg'))[:COUNT]
    prepare()
    model, mean, std = make_model(), torch.tensor(MEAN).view(3, 1, 1) * 255, torch.tensor(STD).view(3, 1, 1) * 255

    def predict() -> int:
        found = []
        with torch.inference_mode():
            for batch in DataLoader(Photos(files), batch_size=64, num_workers=2): found.append(model((batch - mean) / std).softmax(-1))
        return len(torch.cat(found).argmax(1))
    return per_second(predict)


if __name__ == '__main__': main('images/s', measure, floor)
