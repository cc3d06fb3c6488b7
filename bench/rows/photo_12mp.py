"""The training loader of photographs of 12 megapixels: Resize(224), 2 workers, bs=8; floor: a torch Dataset with JPEG's own reduction."""
import random

from _common import images_per_second, large_photos, library, main, prepare
from loader_no_aug import FloatBatches
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

SIZE = 224


def measure(name: str) -> float:
    "Images a second of the program that users write"
    vision = library(name)
    path = large_photos()
    prepare()
    block = vision.DataBlock(
        blocks=(vision.ImageBlock, vision.CategoryBlock), get_items=vision.get_image_files, get_y=vision.parent_label,
        splitter=vision.RandomSplitter(valid_pct=0.2, seed=100), item_tfms=vision.Resize(SIZE))
    return images_per_second(block.dataloaders(path, bs=8, num_workers=2).train, epochs=1)


class LargePhotos:
    "A map-style dataset of random squares of photographs, decoded at an eighth, a quarter or half of their size"
    def __init__(self, files: list): self.files = files
    def __len__(self): return len(self.files)

    def __getitem__(self, i):
        with Image.open(self.files[i]) as image:
            aspect = image.width/image.height
            image.draft('RGB', (round(SIZE*max(1, aspect)), round(SIZE*max(1, 1/aspect))))
            side = min(image.size)
            left, top = (random.random()*(length - side) for length in image.size)
            small = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        return pil_to_tensor(small), i % 4


def floor() -> float:
    "Images a second of what one would write by hand"
    files = sorted(large_photos().glob('*/*.jpg'))
    prepare()
    random.shuffle(files)
    loader = DataLoader(LargePhotos(files[len(files)//5:]), batch_size=8, shuffle=True, drop_last=True, num_workers=2)
    return images_per_second(FloatBatches(loader), epochs=1)


if __name__ == '__main__': main('images/s', measure, floor)
