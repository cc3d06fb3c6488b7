"""What a process keeps in memory (RSS) of a DataBlock over 1,000,000 paths, which `get_items` makes."""
import gc
import os
from pathlib import Path

from _common import library, main, prepare
from build_1m_paths import make_block, paths


def resident() -> float:
    "The memory of this process, in MB"
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def measure(name: str) -> float:
    "MB that the training and the validation set add"
    vision = library(name)
    prepare()
    block = make_block(vision, get_items=lambda _: paths())
    gc.collect()
    before = resident()
    made = block.datasets(None)
    gc.collect()
    return resident() - before + 0*len(made)


if __name__ == '__main__': main('MB', measure)
