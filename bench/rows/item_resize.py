"""One JPEG of 500x375 pixels, opened, RandomResizedCrop(224) and to a tensor of bytes, in one process."""
from _common import library, main, median_seconds, photos, prepare

COUNT = 64


def milliseconds(open_and_crop) -> float:
    "The median time of an image"
    files = sorted(photos().glob('*/*.jpg'))[:COUNT]
    prepare()
    def work():
        for file in files: open_and_crop(file)
    return 1e3 * median_seconds(work, calls=5, warm_up=1) / len(files)


def measure(name: str) -> float:
    "Milliseconds of what a loader of the library does to an item"
    vision = library(name)
    return milliseconds(vision.Pipeline([vision.PILImage.create, vision.RandomResizedCrop(224, min_scale=0.3), vision.ToTensor()], split_idx=0))


def torchvision_v2() -> float:
    "Milliseconds of what torchvision's documentation recommends: a tensor first"
    from PIL import Image
    from torchvision.transforms import v2
    tfm = v2.Compose([v2.ToImage(), v2.RandomResizedCrop(224, scale=(0.3, 1), antialias=True)])
    def open_and_crop(file):
        with Image.open(file) as image: return tfm(image.convert('RGB'))
    return milliseconds(open_and_crop)


if __name__ == '__main__': main('ms', measure, torchvision_v2=torchvision_v2)
