"""The library keeps to the layer table of the design, and the checker finds what does not."""
from pathlib import Path

import pytest
from layers import LAYERS, find_imports, read_modules, rings, violations

LIBRARY = Path(__file__).resolve().parents[1]/'lib'/'lamella'


def test_library():
    modules = read_modules(LIBRARY)
    assert modules, f'no module found in {LIBRARY}'
    found = violations(modules)
    assert not found, '\n' + '\n'.join(found)


def test_every_part_is_checked():
    "Each row of the table is known by the folder or file of that name"
    for part in LAYERS:
        assert violations({f'lamella.{part}.x': '', f'lamella.{part}': ''}) == []


EMPTY = {f'lamella.{part}.x': '' for part in LAYERS}
LEGAL = [
    ('base.y', 'from .x import a\nfrom lamella.base.x import a\nimport lamella.base.x\nimport torch, numpy as np'),
    ('data.y', 'from ..base.x import a\nfrom . import x'),
    ('losses', 'from .base.x import a'),
    ('loop.y', 'from ..base import x\nfrom ..metrics.x import a'),
    ('callbacks.y', 'from ..base.x import a\nfrom ..loop.x import b\nfrom ..optim.x import c\nfrom ..losses import x'),
    ('learner.y', 'from ..callbacks.x import a\nfrom ..data.x import b'),
    ('interpret', 'from .learner.x import a'),
    ('export.y', 'def f():\n    from ..learner.x import a'),
    ('vision.y', 'from ..export.x import a\nfrom ..interpret.x import b\nfrom .x import c'),
    ('vision.all', 'from .x import *\nfrom ..learner.x import *'),
    ('basics', 'from .learner.x import *'),
    ('cli.y', 'from ..vision.x import a\nfrom ..serve.x import b\nimport importlib\nimportlib.import_module("lamella.text.x")'),
    ('demo', 'from .vision.x import a\nfrom .integrations.x import b'),
    ('learner.z', 'from fastcore.basics import patch\n@patch\ndef _private(self: A): pass\n@other.patched\ndef f(): pass'),
    ('text.y', 'import lamellate\nfrom lamellate.vision import x\nfrom importlib import import_module\nimport_module(name)'),
]
ILLEGAL = [
    ('base.y', 'from ..data.x import a', 'upward, from layer 0 to layer 1'),
    ('base.y', 'from .. import __version__', 'base imports nothing'),
    ('data.y', 'from ..nets.x import a', 'layer 1 do not import each other'),
    ('data.y', 'from ..losses import a', 'layer 1 do not import each other'),
    ('losses', 'from .metrics import a', 'layer 1 do not import each other'),
    ('optim.y', 'def f():\n    from lamella.loop.x import a', 'lamella.optim.y:2: imports lamella.loop.x: upward'),
    ('nets.y', 'from typing import TYPE_CHECKING\nif TYPE_CHECKING: from ..learner.x import A', 'from layer 1 to layer 4'),
    ('loop.y', 'import lamella.losses.x', 'loop imports only metrics'),
    ('loop.y', 'from ..data.x import a', 'loop imports only metrics'),
    ('loop.y', 'from ..callbacks.x import a', 'upward'),
    ('callbacks.y', 'from .x import a', 'callbacks do not import each other'),
    ('callbacks.y', 'from . import x', 'callbacks do not import each other'),
    ('callbacks.y', 'from lamella.learner.x import Learner', 'from layer 3 to layer 4'),
    ('learner.y', 'from .. import vision', 'imports lamella.vision: upward'),
    ('learner.y', 'from lamella import export as e', 'imports lamella.export: upward'),
    ('learner.y', 'import os, lamella.export.x', 'upward, from layer 4 to layer 5'),
    ('learner.y', 'from importlib import import_module\nimport_module("lamella.vision.x")', 'from layer 4 to layer 6'),
    ('learner.y', 'import importlib\nimportlib.import_module("..vision.x", __package__)', 'from layer 4 to layer 6'),
    ('export.y', 'from ..interpret import a', 'layer 5 do not import each other'),
    ('vision.y', 'from ..tabular.x import a', 'layer 6 do not import each other'),
    ('text.y', 'class A:\n    def f(self):\n        from ..basics.x import a', 'lamella.text.y:3: imports lamella.basics.x: upward'),
    ('text.y', 'async def f():\n    try: import lamella.serve.x\n    except ImportError: pass', 'from layer 6 to layer 7'),
    ('text.y', 'from ..extra import a', 'extra is not in the layer table'),
    ('extra.y', '', 'lamella.extra.y: not covered by the layer table'),
    ('extra', '', 'lamella.extra: not covered by the layer table'),
    ('data.y', 'from ..base.x import *', 'lamella.data.y:1: star import of ..base.x'),
    ('data.y', 'def f(): pass\nfrom numpy import *', 'lamella.data.y:2: star import of numpy'),
    ('data.__init__', 'from .x import *', 'lamella.data:1: star import of .x'),
    ('learner.y', '@patch\ndef fit(self: A): pass', 'lamella.learner.y:2: @patch of fit'),
    ('learner.y', '@patch_to(A, as_prop=True)\ndef fit(self): pass', '@patch of fit'),
    ('learner.y', '@fastcore.basics.patch_property\ndef fit(self): pass', '@patch of fit'),
    ('learner.y', 'from fastcore.all import patch as add\n@add\nasync def fit(self): pass', '@patch of fit'),
]


@pytest.mark.parametrize('name,source', LEGAL)
def test_legal_code_passes(name: str, source: str):
    assert violations({**EMPTY, f'lamella.{name}': source}) == []


@pytest.mark.parametrize('name,source,expected', ILLEGAL)
def test_violation_is_found(name: str, source: str, expected: str):
    found = violations({**EMPTY, f'lamella.{name}': source})
    assert len(found) == 1 and expected in found[0], found


def test_ring_of_modules():
    modules = {'lamella.data.a': 'from .b import x', 'lamella.data.b': 'def f():\n    from . import c',
               'lamella.data.c': 'import lamella.data.a', 'lamella.data.d': 'from .a import y'}
    assert violations(modules) == ['ring of modules: lamella.data.a -> lamella.data.b -> lamella.data.c -> lamella.data.a']


def test_module_that_imports_itself():
    assert violations({'lamella.data.a': 'from .a import x'}) == ['ring of modules: lamella.data.a -> lamella.data.a']


def test_ring_through_a_package():
    modules = {'lamella.nets.__init__': 'from .a import x', 'lamella.nets.a': 'from . import y'}
    assert violations(modules) == ['ring of modules: lamella.nets -> lamella.nets.a -> lamella.nets']


def test_ring_of_folders_without_a_ring_of_modules():
    modules = {'lamella.cli.a': 'from ..integrations.b import x', 'lamella.integrations.b': '',
               'lamella.integrations.c': 'from ..cli.d import y', 'lamella.cli.d': ''}
    assert violations(modules) == ['ring of folders: lamella.cli -> lamella.integrations -> lamella.cli']


def test_files_below_the_root_are_no_folder():
    modules = {'lamella.metrics': 'from .base.x import a', 'lamella.loop.x': 'from ..metrics import a',
               'lamella.serve': 'from .loop.x import b', 'lamella.base.x': '', 'lamella.__init__': '__version__ = "1"'}
    assert violations(modules) == []


def test_root_that_imports_back():
    modules = {'lamella.__init__': 'from .export import x', 'lamella.export': 'from . import __version__'}
    assert violations(modules)[0] == 'ring of modules: lamella -> lamella.export -> lamella'


def test_two_rings_are_two():
    assert rings({('a', 'b'), ('b', 'a'), ('b', 'c'), ('c', 'd'), ('d', 'c')}) == ['a -> b -> a', 'c -> d -> c']


@pytest.mark.parametrize('name,source,target', [
    ('lamella.a.b', 'from . import c', 'lamella.a.c'),
    ('lamella.a.b', 'from . import missing', 'lamella.a'),
    ('lamella.a.b', 'from .c import name', 'lamella.a.c'),
    ('lamella.a.b', 'from ..d.e import name', 'lamella.d.e'),
    ('lamella.a.__init__', 'from .c import name', 'lamella.a.c'),
    ('lamella.__init__', 'from .a.c import name', 'lamella.a.c'),
    ('lamella.a.b', 'from lamella.d import e', 'lamella.d.e'),
    ('lamella.a.b', 'from lamella import d', 'lamella.d'),
    ('lamella.a.b', 'import lamella.d.e as e', 'lamella.d.e')])
def test_imports_are_resolved(name: str, source: str, target: str):
    modules = {'lamella.a.b': '', 'lamella.a.c': '', 'lamella.d.e': ''}
    assert [item.target for item in find_imports(name, source, modules)] == [target]


def test_reading_a_folder(tmp_path: Path):
    (tmp_path/'data').mkdir()
    for name in ('__init__.py', '_modidx.py', 'losses.py', 'data/__init__.py', 'data/core.py', 'data/notes.txt'):
        (tmp_path/name).write_text('x = 1\n')
    assert set(read_modules(tmp_path)) == {'lamella.__init__', 'lamella.losses', 'lamella.data.__init__', 'lamella.data.core'}
