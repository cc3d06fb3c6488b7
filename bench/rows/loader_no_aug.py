"""The loader of row `loader` without batch transforms; floor: a torch Dataset, PIL and torchvision."""
import torch
from _common import images_per_second, library, main, photos, prepare
from loader import make_loader
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import transforms


def measure(name: str) -> float:
    "Images a second"
    vision = library(name)
    photos()
    prepare()
    return images_per_second(make_loader(vision))


class Photos:
    "A map-style dataset of cropped images and the numbers of their classes"
    def __init__(self, path):
        files = sorted(path.glob('*/*.jpg'))
        self.labels = sorted({file.parent.name for file in files})
        self.files = files
        self.transform = transforms.Compose([transforms.RandomResizedCrop(224, scale=(0.3, 1)), transforms.PILToTensor()])

    def __len__(self): return len(self.files)

    def __getitem__(self, i):
        with Image.open(self.files[i]) as image: pixels = self.transform(image.convert('RGB'))
        return pixels, self.labels.index(self.files[i].parent.name)


def floor() -> float:
    "Images a second of what one would write by hand: the same split, crops of bytes, floats on the whole batch"
    dataset = Photos(photos())
    prepare()
    train = torch.randperm(len(dataset))[int(0.2*len(dataset)):].tolist()
    loader = DataLoader(Subset(dataset, train), batch_size=64, shuffle=True, drop_last=True, num_workers=2)
    return images_per_second(FloatBatches(loader))


class FloatBatches:
    "The batches of `loader` with their images as floats between 0 and 1"
    def __init__(self, loader): self.loader = loader
    def __iter__(self): return ((pixels.float().div_(255), labels) for pixels, labels in self.loader)


if __name__ == '__main__': main('images/s', measure, floor)
