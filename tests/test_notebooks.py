"""Every notebook runs, is clean, and is exported as it is."""
import shutil
from pathlib import Path

import pytest
from notebooks import TOP, names_of_notebooks, nbdev, run_notebook

COPIED = 'nbs', 'lib', 'pyproject.toml', 'settings.ini', 'setup.py', 'README.md'
IGNORED = shutil.ignore_patterns('__pycache__', '*.egg-info', '.ipynb_checkpoints')


@pytest.mark.parametrize('name', names_of_notebooks())
def test_notebook(name: str):
    result = run_notebook(name, MPLBACKEND='Agg')
    assert result.passed, f'nbs/{name}\n{result.error}'


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    "A copy of what nbdev reads and writes"
    for name in COPIED:
        source = TOP/name
        if source.is_dir(): shutil.copytree(source, tmp_path/name, ignore=IGNORED)
        else: shutil.copy(source, tmp_path/name)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    "The bytes of every file below `folder` by its path"
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob('*')) if file.is_file()}


def differences(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    "The paths that are new, gone or different"
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def test_export_changes_nothing(copy: Path):
    before = contents(copy/'lib')
    nbdev('export', copy)
    found = differences(before, contents(copy/'lib'))
    assert not found, f'nbdev-export changes in lib/: {", ".join(found)}'


def test_notebooks_are_clean(copy: Path):
    before = contents(copy/'nbs')
    nbdev('clean', copy)
    found = differences(before, contents(copy/'nbs'))
    assert not found, f'nbdev-clean changes in nbs/: {", ".join(found)}'


def test_modules_have_notebooks():
    "A module that says it was exported from a notebook names one that is there"
    modules = {path: path.read_text(encoding='utf-8') for path in (TOP/'lib'/'lamella').rglob('*.py')}
    sources = {path: text.partition('File to edit: ')[2].partition('\n')[0].rstrip('.') for path, text in modules.items()}
    lost = [f'{path.name}: {source}' for path, source in sources.items() if source and not (path.parent/source).exists()]
    assert not lost, '\n' + '\n'.join(lost)
