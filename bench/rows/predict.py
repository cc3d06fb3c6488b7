"""`learn.predict` of one JPEG by a resnet18 at 224 pixels; floor: open, resize, normalise, forward and softmax by hand."""
import torch
from _common import library, main, median_seconds, photos, prepare
from PIL import Image, ImageOps
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms.functional import normalize, to_tensor


def measure(name: str) -> float:
    "Milliseconds a call"
    vision = library(name)
    file = sorted(vision.get_image_files(photos()))[0]
    prepare()
    dls = vision.DataBlock(
        blocks=(vision.ImageBlock, vision.CategoryBlock), get_items=vision.get_image_files, get_y=vision.parent_label,
        splitter=vision.RandomSplitter(valid_pct=0.2, seed=100), item_tfms=vision.Resize(224),
        batch_tfms=vision.Normalize.from_stats(*vision.imagenet_stats)).dataloaders(photos(), bs=16, num_workers=0)
    learn = vision.vision_learner(dls, vision.resnet18, pretrained=False)
    return 1e3 * median_seconds(lambda: learn.predict(file))


class ConcatPool(nn.Module):
    "The maximum and the mean of every channel"
    def forward(self, x): return torch.cat([x.amax((2, 3), keepdim=True), x.mean((2, 3), keepdim=True)], 1)


def make_model(classes: int):
    "A resnet18 with the two-layer head of `vision_learner`"
    body = nn.Sequential(*list(resnet18(weights=None).children())[:-2])
    head = nn.Sequential(ConcatPool(), nn.Flatten(), nn.BatchNorm1d(1024), nn.Dropout(0.25), nn.Linear(1024, 512, bias=False),
                         nn.ReLU(), nn.BatchNorm1d(512), nn.Dropout(0.5), nn.Linear(512, classes, bias=False))
    return nn.Sequential(body, head).eval()


def floor() -> float:
    "Milliseconds of the same work without a framework"
    file = sorted(photos().glob('*/*.jpg'))[0]
    prepare()
    model, mean, std = make_model(4), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

    def predict():
        with Image.open(file) as image:
            small = ImageOps.fit(image.convert('RGB'), (224, 224), Image.Resampling.BILINEAR)
        with torch.inference_mode():
            return model(normalize(to_tensor(small), mean, std)[None]).softmax(-1)[0].argmax().item()
    return 1e3 * median_seconds(predict)


if __name__ == '__main__': main('ms', measure, floor)
