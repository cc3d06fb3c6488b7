"""Runs every script in `rows/` with fastai, with lamella and by hand, in turn, and prints one table (`make bench`)."""
import argparse
import ast
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROWS = Path(__file__).resolve().parent/'rows'
PACKAGES = 'torch', 'torchvision', 'pillow', 'fastai', 'lamella'
HEADER = 'row', 'unit', 'fastai', 'lamella', 'floor', 'lamella/fastai', 'lamella/floor', 'fastai/floor'
TIMEOUT = 900 # seconds a process


@dataclass
class Row:
    "One benchmark: its values by who was measured, one a round, the error of who failed, and who is not installed"
    name: str
    unit: str = ''
    values: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def script(self) -> Path:
        "The file that measures it"
        return ROWS/f'{self.name}.py'

    @property
    def tree(self) -> ast.Module:
        "The parsed script"
        return ast.parse(self.script.read_text(encoding='utf-8'))

    @property
    def about(self) -> str:
        "The script's docstring"
        return ast.get_docstring(self.tree) or ''

    @property
    def names(self) -> list[str]:
        "Who is measured: the hand-written code too, if the script has a function `floor`"
        floor = any(isinstance(node, ast.FunctionDef) and node.name == 'floor' for node in self.tree.body)
        return ['fastai', 'lamella'] + ['floor']*floor + self.others

    @property
    def others(self) -> list[str]:
        "What one would pick instead: the functions that the script passes to `main` by their names"
        calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'main']
        return [keyword.arg for call in calls for keyword in call.keywords if keyword.arg not in (None, 'floor', 'unit', 'measure')]

    def median(self, name: str) -> float | None:
        "The median over the rounds; None where there is no value"
        if name in self.errors or not self.values.get(name): return None
        return statistics.median(self.values[name])


def main() -> int:
    "Measure, print, save; the exit code is 1 if a row failed"
    args = parse_args()
    if args.list: return print_list()
    rows = [Row(name) for name in args.rows]
    for row in rows: measure(row, args.rounds)
    about = environment(args.rounds)
    print(table(rows), others_table(rows), footnotes(rows), notes(rows, about), sep='\n')
    if args.json: save(args.json, rows, about)
    return int(any(row.errors for row in rows))


def parse_args() -> argparse.Namespace:
    "The command line"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rows', nargs='+', metavar='NAME', default=row_names(), choices=row_names(), help='only these')
    parser.add_argument('--rounds', type=int, default=3, help='measurements of each, whose median is printed')
    parser.add_argument('--json', type=Path, metavar='FILE', help='save every value here')
    parser.add_argument('--list', action='store_true', help='say what the rows are and end')
    args = parser.parse_args()
    if args.rounds < 1: parser.error('--rounds must be at least 1')
    return args


def row_names() -> list[str]:
    "The scripts in `rows/`, but for those whose names start with an underscore"
    return sorted(file.stem for file in ROWS.glob('[!_]*.py'))


def print_list() -> int:
    "One line a row"
    for name in row_names(): print(f'{name:20} {Row(name).about}')
    return 0


def measure(row: Row, rounds: int) -> None:
    "Fill `row`; every round measures all in turn, in the opposite order of the one before, but for who has failed"
    for i in range(rounds):
        for name in row.names[::-1 if i % 2 else 1]:
            if name not in row.errors and name not in row.missing: measure_once(row, name)
        print(f'{row.name}: round {i + 1} of {rounds}', file=sys.stderr)


def measure_once(row: Row, name: str) -> None:
    "One process; its value or its error goes to `row`"
    try: result = json.loads(run_script(row.script, name).splitlines()[-1])
    except (RuntimeError, ValueError, IndexError) as error: note_failure(row, name, error)
    else:
        row.unit = result['unit']
        row.values.setdefault(name, []).append(result['value'])


def note_failure(row: Row, name: str, error: Exception) -> None:
    "An alternative that is not installed is no failure"
    if name in row.others and 'ModuleNotFoundError' in str(error): row.missing.append(name)
    else: row.errors[name] = str(error) or repr(error)


def run_script(script: Path, name: str) -> str:
    "What `script name` prints; it runs on the CPU in an empty folder"
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | dict(CUDA_VISIBLE_DEVICES='', PYTHONHASHSEED='0', PYTHONWARNINGS='ignore', MPLBACKEND='Agg')
        try:
            result = subprocess.run([sys.executable, script, name], cwd=folder, env=env, timeout=TIMEOUT,
                                    capture_output=True, text=True)
        except subprocess.TimeoutExpired as error: raise RuntimeError(f'longer than {TIMEOUT} s') from error
    if result.returncode: raise RuntimeError(last_line(result.stderr) or f'exit code {result.returncode}')
    return result.stdout


def last_line(text: str) -> str:
    "The last line of `text` that is not empty"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ''


def table(rows: list[Row]) -> str:
    "The results in markdown, as readable in a terminal"
    return in_markdown([HEADER] + [row_cells(row) for row in rows])


def in_markdown(cells: list) -> str:
    "Lines of cells as a table, whose first is the header"
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [table_line(line, widths) for line in cells]
    rule = [f'{"-"*(width - 1)}{"-" if i < 2 else ":"}' for i, width in enumerate(widths)]
    return '\n'.join([lines[0], table_line(rule, widths), *lines[1:]])


def others_table(rows: list[Row]) -> str:
    "What one would pick instead, where a row has such columns"
    rows = [row for row in rows if row.others]
    names = list(dict.fromkeys(name for row in rows for name in row.others))
    header = ['instead', 'unit', 'lamella', *names, *(f'lamella/{name}' for name in names)]
    lines = [[row.name, row.unit, *(value_cell(row, name) for name in ['lamella', *names]), *(ratio_cell(row, 'lamella', name) for name in names)] for row in rows]
    return f'\n{in_markdown([header, *lines])}' if rows else ''


def table_line(cells: list[str], widths: list[int]) -> str:
    "One line of the table: two columns of words, then numbers"
    words = [cell.ljust(width) for cell, width in zip(cells[:2], widths)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:])]
    return f"| {' | '.join(words + numbers)} |"


def row_cells(row: Row) -> list[str]:
    "The words and figures of one row"
    values = [value_cell(row, name) for name in ('fastai', 'lamella', 'floor')]
    pairs = ('lamella', 'fastai'), ('lamella', 'floor'), ('fastai', 'floor')
    return [row.name, row.unit, *values, *(ratio_cell(row, *pair) for pair in pairs)]


def value_cell(row: Row, name: str) -> str:
    "The median, 'failed', or nothing where nothing is measured"
    if name in row.errors: return 'failed'
    if name in row.missing: return 'not installed'
    value = row.median(name)
    return '' if value is None else f'{value:.0f}' if value >= 100 else f'{value:.3g}'


def ratio_cell(row: Row, above: str, below: str) -> str:
    "The quotient of two medians, or nothing"
    a, b = row.median(above), row.median(below)
    return f'{a/b:.2f}' if a is not None and b else ''


def footnotes(rows: list[Row]) -> str:
    "What failed, and why"
    failures = [f'- {row.name}, {name} failed: {error}' for row in rows for name, error in row.errors.items()]
    return '\n'.join(['', *failures, '']) if failures else ''


def notes(rows: list[Row], about: dict[str, str]) -> str:
    "How to read the table, and what it was made with"
    facts = '; '.join(f'{name} {value}' for name, value in about.items())
    return ('Medians; less is better, but for images/s. Floor: the same work in hand-written code.\n'
            f'All on the CPU, with one torch thread. {spread(rows)}{facts}')


def spread(rows: list[Row]) -> str:
    "How far apart the rounds were at worst, the noise of the machine"
    found = [((max(values) - min(values))/statistics.median(values), f'{row.name}, {name}')
             for row in rows for name, values in row.values.items() if len(values) > 1]
    if not found: return '\n'
    worst, where = max(found)
    return f'Largest difference between the rounds: {worst:.0%} of the median ({where}).\n'


def environment(rounds: int) -> dict[str, str]:
    "The date, the machine and the versions"
    machine = f'{cpu_model()}, {os.cpu_count()} cores'
    packages = {name: package_version(name) for name in PACKAGES}
    return dict(date=f'{datetime.datetime.now():%Y-%m-%d %H:%M}', rounds=str(rounds), machine=machine,
                python=platform.python_version(), **packages)


def package_version(name: str) -> str:
    "The installed version"
    try: return version(name)
    except PackageNotFoundError: return 'missing'


def cpu_model() -> str:
    "What the kernel calls the processor"
    try: lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError: return platform.processor() or platform.machine()
    models = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return models[0] if models else platform.machine()


def save(file: Path, rows: list[Row], about: dict[str, str]) -> None:
    "Every measured value as JSON"
    file.parent.mkdir(parents=True, exist_ok=True)
    medians = {row.name: {name: row.median(name) for name in row.names} for row in rows}
    result = dict(environment=about, medians=medians, rows=[asdict(row) for row in rows])
    file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


if __name__ == '__main__': sys.exit(main())
