"""A batch of 64x3x224x224 bytes to normalised floats with aug_transforms(mult=2), as the training loader does it; floor: one affine grid and the lighting in plain torch."""
import math

import torch
import torch.nn.functional as F
from _common import library, main, median_seconds, prepare

SHAPE, CALLS = (64, 3, 224, 224), 8
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def milliseconds(work) -> float: return 1e3 * median_seconds(work, calls=CALLS, warm_up=2)


def batch() -> torch.Tensor:
    "Smooth pictures"
    small = torch.rand(SHAPE[0], SHAPE[1], 14, 14)
    return (F.interpolate(small, SHAPE[2:], mode='bicubic').clamp_(0, 1) * 255).to(torch.uint8)


def measure(name: str) -> float:
    "Milliseconds a batch, images and labels"
    vision = library(name)
    prepare()
    x, y = batch(), torch.zeros(SHAPE[0], dtype=torch.long)
    normalize = vision.Normalize.from_stats(MEAN, STD, **(dict(cuda=False) if name == 'fastai' else {}))
    tfms = [vision.IntToFloatTensor(), *vision.aug_transforms(mult=2), normalize]
    if name == 'fastai': return milliseconds(in_fastai(vision, tfms, x, y))
    samples = [(vision.TensorImage(image), vision.TensorCategory(label)) for image, label in zip(x, y)]
    loader = vision.DataLoader(samples, bs=len(x), after_batch=tfms, num_workers=0, split_idx=0)
    plan = loader.plans(0)[0]
    return milliseconds(lambda: loader.finish((x, y), plan))


def in_fastai(vision, tfms: list, x: torch.Tensor, y: torch.Tensor):
    "What fastai's training loader does to a batch"
    pipeline = vision.Pipeline(tfms, split_idx=0)
    return lambda: pipeline((vision.TensorImage(x), vision.TensorCategory(y)))


def torchvision_v2() -> float:
    "Milliseconds of similar transforms; they draw once a call, so each image is a call"
    from torchvision.transforms import v2
    prepare()
    tfm = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomPerspective(0.2, p=0.75), v2.RandomApply([v2.RandomAffine(20, scale=(1, 1.1))], p=0.75),
                      v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4)], p=0.75), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    x = batch()
    return milliseconds(lambda: torch.stack([tfm(image) for image in x]))


def kornia() -> float:
    "Milliseconds of similar transforms of kornia, which draw for each image of a batch"
    import kornia.augmentation as K
    prepare()
    tfm = torch.nn.Sequential(K.RandomHorizontalFlip(), K.RandomPerspective(0.2, p=0.75), K.RandomAffine(20, scale=(1., 1.1), p=0.75),
                              K.ColorJiggle(brightness=0.4, contrast=0.4, p=0.75), K.Normalize(torch.tensor(MEAN), torch.tensor(STD)))
    x = batch()
    return milliseconds(lambda: tfm(x.float() / 255))


def floor() -> float:
    "Milliseconds of the same ranges by hand: flip, turn and zoom as one matrix, brightness and contrast and statistics"
    prepare()
    x, mean, std = batch(), torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)

    def augment():
        angle, zoom, flip = (torch.rand(len(x)) * 40 - 20) * math.pi / 180, 1 / (1 + 0.1*torch.rand(len(x))), (torch.rand(len(x)) < 0.5) * 2. - 1
        zero = torch.zeros(len(x))
        matrix = torch.stack([flip*zoom*angle.cos(), zoom*angle.sin(), zero, -flip*zoom*angle.sin(), zoom*angle.cos(), zero], -1).view(-1, 2, 3)
        y = F.grid_sample(x.float().div_(255), F.affine_grid(matrix, SHAPE, align_corners=True), padding_mode='reflection', align_corners=True)
        bright, contrast = 0.3 + 0.4*torch.rand(len(x), 1, 1, 1), 0.6 + 0.8*torch.rand(len(x), 1, 1, 1)
        logits = y.clamp_(1e-7, 1 - 1e-7).logit_().add_(bright.logit()).mul_(contrast)
        return logits.sigmoid_().sub_(mean).div_(std)
    return milliseconds(augment)


if __name__ == '__main__': main('ms', measure, floor, torchvision_v2=torchvision_v2, kornia=kornia)
