"""Docstrings, annotations, sizes and paths: what the style of the library asks for and a machine can see."""
import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
LIBRARY = TOP/'lib'/'lamella'
MOST_LINES_OF_FUNCTION, MOST_LINES_OF_MODULE = 20, 300
Function = (ast.FunctionDef, ast.AsyncFunctionDef)
# Methods that the docstring of their class explains: transforms, callback events, torch's forward.
EXPLAINED_BY_CLASS = re.compile('(encodes|decodes|setups|forward|(before|after|cleanup)_.*)$')
MACHINE_PATH = re.compile(r'(?<![\w.\-/])/(work|root|tmp|home|Users)/[^\s"\'`)]*')


# Functions

def library() -> dict[str, str]:
    "The source of every module, by its path"
    files = sorted(file for file in LIBRARY.rglob('*.py') if file.name != '_modidx.py')
    return {str(file.relative_to(TOP)): file.read_text(encoding='utf-8') for file in files}


def definitions(node: ast.AST, kinds: tuple) -> Iterator:
    "What is defined in the body of a module or class, also under `if`, `try` and `with`, but not in functions"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, kinds): yield child
        elif isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)): yield from definitions(child, kinds)


def public(node: ast.AST, kinds: tuple) -> list:
    "The definitions whose names do not start with an underscore"
    return [child for child in definitions(node, kinds) if not child.name.startswith('_')]


def public_classes(node: ast.AST, prefix: str = '') -> Iterator[tuple[str, ast.ClassDef]]:
    "The full names of public classes, nested ones too"
    for item in public(node, (ast.ClassDef,)):
        yield prefix + item.name, item
        yield from public_classes(item, f'{prefix}{item.name}.')


def decorators(function: ast.AST) -> list[str]:
    "The last names of the decorators"
    nodes = [node.func if isinstance(node, ast.Call) else node for node in function.decorator_list]
    return [getattr(node, 'attr', getattr(node, 'id', '')) for node in nodes]


def needs_docstring(method: ast.AST, owner: ast.ClassDef) -> bool:
    "No: setters, overloads, and what the docstring of the class explains"
    if {'setter', 'deleter', 'overload'} & set(decorators(method)): return False
    return not (EXPLAINED_BY_CLASS.match(method.name) and has_docstring(owner))


def has_docstring(node: ast.AST) -> bool:
    "A docstring of at least a word"
    return bool((ast.get_docstring(node) or '').strip())


def undocumented(source: str) -> list[str]:
    "The public functions, classes and methods without a docstring"
    tree = ast.parse(source)
    found = [item for item in public(tree, Function) if not has_docstring(item) and 'overload' not in decorators(item)]
    result = [(item.lineno, item.name) for item in found]
    for name, owner in public_classes(tree):
        result += [(owner.lineno, name)] * (not has_docstring(owner))
        result += [(method.lineno, f'{name}.{method.name}') for method in public(owner, Function)
                   if not has_docstring(method) and needs_docstring(method, owner)]
    return [f'{line}: {name} has no docstring' for line, name in result]


def untyped(source: str) -> list[str]:
    "The public functions and methods, and `__init__`, with parameters that are not annotated"
    tree = ast.parse(source)
    found = [(item.lineno, item.name, bare_parameters(item)) for item in public(tree, Function)]
    for name, owner in public_classes(tree):
        found += [(method.lineno, f'{name}.{method.name}', bare_parameters(method, is_method=True))
                  for method in definitions(owner, Function) if is_typed_method(method)]
    return [f'{line}: {name}: no type for {", ".join(bare)}' for line, name, bare in found if bare]


def is_typed_method(method: ast.AST) -> bool:
    "Public methods and `__init__`, but not `setups`, which a Transform calls with whatever its items are"
    return method.name == '__init__' or not method.name.startswith('_') and method.name != 'setups'


def bare_parameters(function: ast.AST, is_method: bool = False) -> list[str]:
    "The parameters without annotation; *args and **kwargs may be bare, `self` and `cls` are"
    given = function.args.posonlyargs + function.args.args
    if is_method and 'staticmethod' not in decorators(function): given = given[1:]
    return [item.arg for item in given + function.args.kwonlyargs if item.annotation is None]


def long_functions(source: str) -> list[str]:
    "The functions of more than the allowed lines, private and nested ones too; the signature, which is the documentation, does not count"
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]
    sizes = [(node, node.end_lineno - node.body[0].lineno + 1) for node in functions]
    return [f'{node.lineno}: {node.name} has {size} lines, more than {MOST_LINES_OF_FUNCTION}'
            for node, size in sizes if size > MOST_LINES_OF_FUNCTION]


def too_long(source: str) -> list[str]:
    "Whether the module has more than the allowed lines; nbdev's marks of cells do not count"
    size = sum(not line.startswith('# %% ') for line in source.splitlines())
    return [f'{size} lines, more than {MOST_LINES_OF_MODULE}'] * (size > MOST_LINES_OF_MODULE)


@pytest.mark.parametrize('check', [undocumented, untyped, long_functions, too_long])
def test_library(check):
    modules = library()
    assert modules, f'no module found in {LIBRARY}'
    found = [f'{name}:{line}' for name, source in modules.items() if not (check is too_long and name.endswith('/all.py')) for line in check(source)] # a door is a list of names
    assert not found, f'{len(found)} found\n' + '\n'.join(found)


# Paths

def texts(file: Path) -> list[str]:
    "The text of `file`; of a notebook the strings of its cells and outputs, without pictures; nothing if it is binary"
    try: text = file.read_text(encoding='utf-8')
    except UnicodeDecodeError: return []
    return list(strings(json.loads(text))) if file.suffix == '.ipynb' else [text]


def strings(value) -> Iterator[str]:
    "Every string in nested lists and dictionaries, but for pictures"
    if isinstance(value, str): yield value
    elif isinstance(value, list): yield from (text for item in value for text in strings(item))
    elif isinstance(value, dict):
        yield from (text for key, item in value.items() if not key.startswith('image/') for text in strings(item))


def machine_paths(text: str) -> list[str]:
    "The absolute paths that exist on one machine only"
    return [match.group() for match in MACHINE_PATH.finditer(text)]


def files_of_project() -> list[Path]:
    "What the project's readers see: the library, the notebooks, the tests, the readme"
    found = [file for folder in ('lib', 'nbs', 'tests') for file in (TOP/folder).rglob('*') if file.is_file()]
    hidden = re.compile(r'(^|/)(\.|_proc/|__pycache__/|[^/]*\.egg-info/)')
    return sorted(file for file in found if not hidden.search(file.relative_to(TOP).as_posix())) + [TOP/'README.md']


def test_no_machine_paths():
    found = [f'{file.relative_to(TOP)}: {path}' for file in files_of_project() for text in texts(file)
             for path in machine_paths(text)]
    assert not found, '\n' + '\n'.join(found)


def test_notebooks_begin_with_their_title():
    "What jupytext writes above a percent file has no place in the course, nor have empty cells"
    for file in sorted((TOP/'nbs').rglob('*.ipynb')):
        cells = json.loads(file.read_text(encoding='utf-8'))['cells']
        assert cells[0]['cell_type'] == 'markdown' and ''.join(cells[0]['source']).startswith('# '), file
        assert all(''.join(cell['source']).strip() for cell in cells), f'{file} has an empty cell'


# The checkers themselves

@pytest.mark.parametrize('source', [
    'def f(): pass', 'async def f(): pass', 'def f(): ""', 'class A: pass', 'if True:\n    def f(): pass',
    'try:\n    pass\nexcept ImportError:\n    def f(): pass',
    'class A:\n    "A"\n    def f(self): pass', 'class A:\n    "A"\n    @property\n    def f(self): pass',
    'class A:\n    "A"\n    class B: pass', 'class A:\n    "A"\n    def before(self): pass'])
def test_missing_docstring_is_found(source: str):
    assert len(undocumented(source)) == 1


@pytest.mark.parametrize('source', [
    'def f(): "f"', 'def _f(): pass', 'class _A:\n    def f(self): pass', 'x = lambda: 0',
    'class A:\n    "A"\n    def __init__(self): pass\n    def __len__(self): pass\n    def _f(self): pass',
    'class A:\n    "A"\n    def encodes(self, x): pass\n    def decodes(self, x): pass\n    def setups(self, x): pass',
    'class A:\n    "A"\n    def before_fit(self): pass\n    def after_batch(self): pass\n    def cleanup_fit(self): pass',
    'class A:\n    "A"\n    @property\n    def f(self): "f"\n    @f.setter\n    def f(self, x): pass',
    'def f():\n    "f"\n    def g(): pass'])
def test_documented_code_passes(source: str):
    assert undocumented(source) == []


def test_events_need_the_docstring_of_their_class():
    assert undocumented('class A:\n    def before_fit(self): pass') == [
        '1: A has no docstring', '2: A.before_fit has no docstring']


@pytest.mark.parametrize('source,bare', [
    ('def f(a, b: int): pass', 'a'), ('def f(a=1, *, b): pass', 'a, b'), ('def f(a, /): pass', 'a'),
    ('class A:\n    def __init__(self, a): pass', 'a'), ('class A:\n    def f(self, a): pass', 'a'),
    ('class A:\n    @staticmethod\n    def f(a): pass', 'a'), ('class A:\n    @classmethod\n    def f(cls, a): pass', 'a'),
    ('class A:\n    def encodes(self, x): pass', 'x'), ('class A:\n    class B:\n        def f(self, a): pass', 'a')])
def test_missing_type_is_found(source: str, bare: str):
    assert [line.partition('no type for ')[2] for line in untyped(source)] == [bare]


@pytest.mark.parametrize('source', [
    'def f(a: int, *args, b: str = "", **kwargs): pass', 'def _f(a): pass', 'class _A:\n    def f(self, a): pass',
    'class A:\n    def __init__(self, a: int): pass\n    def __call__(self, a): pass\n    def _f(self, a): pass',
    'class A:\n    def setups(self, items): pass', 'class A:\n    @staticmethod\n    def f(a: int): pass'])
def test_typed_code_passes(source: str):
    assert untyped(source) == []


def test_sizes():
    function = 'def f(\n    x: int,\n):\n' + '    x = 1\n'*20
    assert long_functions(function) == [] and len(long_functions(function + '    x = 1\n')) == 1
    assert len(long_functions('class A:\n    def f(self):\n        def g():\n' + '            x = 1\n'*21)) == 2
    assert too_long('# %% cell\nx = 1\n'*300) == [] and len(too_long('x = 1\n'*301)) == 1


def test_paths():
    bad = ['/'.join(['', folder, 'x', 'y']) for folder in ('work', 'root', 'tmp', 'home')]
    for path in bad:
        for text in (path, f'see {path}', f'"{path}"', f'path={path}', f'a\n{path}'):
            assert machine_paths(text), text
    good = 'frame' + bad[0], 'https://example.com' + bad[2], '..' + bad[0], 'a' + bad[1], '/data/x', bad[0].replace('/x', 'shop/x')
    assert [machine_paths(text) for text in good] == [[]]*len(good)


def test_paths_in_notebooks(tmp_path: Path):
    bad = '/'.join(['', 'tmp', 'x'])
    output = {'data': {'image/png': bad, 'text/plain': [f'a\n{bad}\n']}}
    (tmp_path/'a.ipynb').write_text(json.dumps({'cells': [{'source': 'x', 'outputs': [output]}]}))
    assert [path for text in texts(tmp_path/'a.ipynb') for path in machine_paths(text)] == [bad]
    (tmp_path/'a.png').write_bytes(b'\x89PNG\xff')
    assert texts(tmp_path/'a.png') == []
