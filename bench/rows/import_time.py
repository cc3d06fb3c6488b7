"""A fresh process that runs `from NAME.vision.all import *` and ends; floor: `import torch`."""
import subprocess
import sys

from _common import main, median_seconds


def fresh_process(code: str) -> float:
    "The seconds of a Python process that runs `code`, start and end included"
    return median_seconds(lambda: run(code), calls=1, warm_up=1)


def run(code: str) -> None:
    "Run `code` in a new Python process, whose error is ours"
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    if result.returncode: sys.exit(result.stderr)


def measure(name: str) -> float: return fresh_process(f'from {name}.vision.all import *')
def floor() -> float: return fresh_process('import torch')


if __name__ == '__main__': main('s', measure, floor)
