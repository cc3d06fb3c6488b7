"""Make `fashion_sample.tgz`, the data that lamella carries, from the four original files of Fashion-MNIST.

    python tests/tools/make_fashion_sample.py /usr/share/datasets/fashion-mnist lib/lamella/assets/fashion_sample.tgz

The first 300 images of each class of the training set and the first 100 of the test set, as PNG files named after their
number in the original. The same bytes every time: fixed order, owners and dates (the PNG bytes depend on Pillow's zlib).
"""
import argparse
import gzip
import io
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ['t-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle-boot']
SPLITS = [('train', 'train', 300), ('valid', 't10k', 100)]  # folder, name of the original, images of each class
LICENSE = """Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist)
A sample of 4,000 of its 70,000 images, stored as PNG files; the pixels are unchanged.

The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def read_idx(
    path: Path,     # a `.gz` file of the idx format: two zero bytes, a type, the number of dimensions, the dimensions
) -> np.ndarray:    # unsigned bytes, in that shape
    "The array of one original file"
    raw = gzip.decompress(path.read_bytes())
    ndim = raw[3]
    shape = np.frombuffer(raw, '>u4', ndim, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def png(
    pixels: np.ndarray, # grayscale, height by width
) -> bytes:             # the smallest of the PNG files that Pillow writes
    "One image as a file"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'PNG', optimize=True)
    return buffer.getvalue()


def samples(
    originals: Path,            # the folder of the four files
) -> Iterator[tuple[str, bytes]]:  # name in the archive, content
    "All files of the archive, in their order"
    yield 'fashion_sample/LICENSE.txt', LICENSE.encode()
    for folder, original, count in SPLITS:
        images, labels = (read_idx(originals/f'{original}-{kind}-ubyte.gz') for kind in ('images-idx3', 'labels-idx1'))
        chosen = defaultdict(list)
        for index, label in enumerate(labels):
            chosen[label].append(index)
        for label, name in enumerate(CLASSES):
            for index in chosen[label][:count]:
                yield f'fashion_sample/{folder}/{name}/{index:05d}.png', png(images[index])


def main() -> None:
    "Write the archive and say how large it is"
    parser = argparse.ArgumentParser(description='Make fashion_sample.tgz')
    parser.add_argument('originals', type=Path, help='folder of train-images-idx3-ubyte.gz and its three companions')
    parser.add_argument('archive', type=Path, help='the .tgz file to write')
    args = parser.parse_args()
    with open(args.archive, 'wb') as file, gzip.GzipFile('', 'wb', 9, file, mtime=0) as packed, \
            tarfile.open(fileobj=packed, mode='w', format=tarfile.USTAR_FORMAT) as tar:
        for name, content in samples(args.originals):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            tar.addfile(info, io.BytesIO(content))
    print(f'{args.archive}: {args.archive.stat().st_size:,} bytes')


if __name__ == '__main__':
    main()
