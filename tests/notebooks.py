"""Runs every notebook of `nbs/`, each in its own process, two at a time (`make notebooks` saves the outputs too)."""
import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
NOTEBOOKS = TOP/'nbs'
AT_ONCE = 2
TIMEOUT = 1800 # seconds a notebook
SEED = 7        # as in conftest.py
RUN = '''
import functools, random, sys
import nbdev.test
import numpy as np
import torch
from nbdev.test import test_nb
nbdev.test.CaptureShell = functools.partial(nbdev.test.CaptureShell, mpl_format='png') # small pictures, not retina ones
path, save, force, seed = sys.argv[1:]
for set_seed in (random.seed, np.random.seed, torch.manual_seed): set_seed(int(seed)) # the same run each time, as in the tests
passed, seconds = test_nb(path, skip_flags=['slow'], force_flags=force.split(), save=save == 'save')
sys.exit(not passed)
'''


@dataclass
class Result:
    "How the run of one notebook went"
    name: str
    passed: bool
    seconds: float
    error: str


def main() -> int:
    "Run the notebooks that the command line names; the exit code is 1 if one failed"
    args = parse_args()
    failures = run_all(selected(args.names), args)
    if args.save: clean_and_export()
    print(f'{failures} failed' if failures else 'All passed')
    return int(failures > 0)


def parse_args() -> argparse.Namespace:
    "The command line"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('names', nargs='*', help='parts of paths below nbs/; all notebooks by default')
    parser.add_argument('--save', action='store_true', help='store the outputs, then clean and export')
    parser.add_argument('--seed', type=int, default=SEED, help='what random numbers start from: a claim should hold with any (%(default)s)')
    parser.add_argument('--slow', action='store_true', help="run the cells marked '#| slow' too")
    return parser.parse_args()


def names_of_notebooks() -> list[str]:
    "The paths below `nbs/` in reading order, as nbdev finds them: nothing that starts with a dot or an underscore"
    paths = [path.relative_to(NOTEBOOKS) for path in NOTEBOOKS.rglob('*.ipynb')]
    return sorted(path.as_posix() for path in paths if not any(part[0] in '._' for part in path.parts))


def selected(
    parts: list[str], # parts of names; none for all
) -> list[str]:
    "The notebooks whose names contain one of `parts`; a part that fits none is an error"
    names = names_of_notebooks()
    for part in parts:
        if not any(part in name for name in names): sys.exit(f'no notebook below nbs/ has {part!r} in its name')
    return [name for name in names if not parts or any(part in name for part in parts)]


def run_all(names: list[str], args: argparse.Namespace) -> int:
    "Run them, printing a line when each ends; how many failed"
    failures = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = [pool.submit(run_notebook, name, args.save, args.slow, args.seed) for name in names]
        for result in (run.result() for run in as_completed(runs)):
            print(f'{"ok    " if result.passed else "FAILED"} {result.seconds:6.1f} s  {result.name}', flush=True)
            if not result.passed: print(result.error, file=sys.stderr, flush=True)
            failures += not result.passed
    return failures


def run_notebook(
    name: str,          # its path below `nbs/`
    save: bool = False, # store the outputs if it passes?
    slow: bool = False, # run the cells marked slow too?
    seed: int = SEED,   # what random numbers start from
    **env,              # additional environment variables
) -> Result:
    "Run one notebook in a process of its own, in its folder"
    path, start = NOTEBOOKS/name, time.perf_counter()
    command = [sys.executable, '-c', RUN, path.name, 'save' if save else '', 'slow' if slow else '', str(seed)]
    try:
        done = subprocess.run(command, cwd=path.parent, env=os.environ | env, timeout=TIMEOUT, capture_output=True, text=True)
        passed, error = done.returncode == 0, done.stdout + done.stderr
    except subprocess.TimeoutExpired: passed, error = False, f'longer than {TIMEOUT} s'
    return Result(name, passed, time.perf_counter() - start, error)


def nbdev(command: str, folder: Path) -> None:
    "Run `nbdev-clean` or `nbdev-export` in `folder`"
    env = {key: value for key, value in os.environ.items() if key != 'IN_TEST'}
    subprocess.run([Path(sys.executable).parent/f'nbdev-{command}'], cwd=folder, env=env, check=True)


def clean_and_export() -> None:
    "What is left to do after notebooks have changed"
    nbdev('clean', TOP)
    nbdev('export', TOP)


if __name__ == '__main__': sys.exit(main())
