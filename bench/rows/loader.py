"""The training loader of a photo classifier: RandomResizedCrop and aug_transforms, 2 workers, bs=64."""
from _common import images_per_second, library, main, photos, prepare


def make_loader(vision, **kwargs):
    "The training loader of the program that users write"
    block = vision.DataBlock(
        blocks=(vision.ImageBlock, vision.CategoryBlock), get_items=vision.get_image_files, get_y=vision.parent_label,
        splitter=vision.RandomSplitter(valid_pct=0.2, seed=100),
        item_tfms=vision.RandomResizedCrop(224, min_scale=0.3), **kwargs)
    return block.dataloaders(photos(), bs=64, num_workers=2).train


def measure(name: str) -> float:
    "Images a second"
    vision = library(name)
    photos()
    prepare()
    return images_per_second(make_loader(vision, batch_tfms=vision.aug_transforms(mult=2)))


if __name__ == '__main__': main('images/s', measure)
