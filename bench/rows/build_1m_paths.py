"""Building a DataBlock over 1,000,000 paths under 100 folders: labels from the folders, a random split."""
from pathlib import Path

from _common import library, main, prepare, seconds

COUNT = 1_000_000


def paths() -> list[Path]:
    "The paths; there are no files"
    folders = [Path('data')/f'class_{i:02}' for i in range(100)]
    return [folder/f'{i:06}.jpg' for folder in folders for i in range(COUNT//100)]


def make_block(vision, **kwargs):
    "The description that users write; nothing is opened, so that time is that of the bookkeeping"
    return vision.DataBlock(blocks=(vision.TransformBlock, vision.CategoryBlock), get_y=vision.parent_label,
                            splitter=vision.RandomSplitter(seed=42), **kwargs)


def measure(name: str) -> float:
    "Seconds to make the training and the validation set of paths that are there"
    vision = library(name)
    prepare()
    items, block = paths(), make_block(vision)
    return seconds(lambda: block.datasets(items))


if __name__ == '__main__': main('s', measure)
