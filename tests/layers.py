"""The checker of the layer table (design section 1): pure functions over a dictionary of module name to source.

A package is named `lamella.data.__init__` in that dictionary, so that its relative imports can be resolved."""
import ast
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = 'lamella'
LAYERS = dict(base=0, data=1, nets=1, optim=1, losses=1, metrics=1, loop=2, callbacks=3, learner=4, interpret=5, export=5,
              vision=6, tabular=6, text=6, cli=7, serve=7, integrations=7, basics=7, demo=7)
TOP_LAYER = 7
OF_LAYER_1 = dict(loop={'metrics'}) # who may import only these of layer 1
STARS_ALLOWED = 'all', 'basics'     # the user's doors
PATCHES = 'patch', 'patch_to', 'patch_property'
UNCOVERED = f'{ROOT}.__init__', f'{ROOT}._modidx'


@dataclass(frozen=True)
class Import:
    "That `source` imports `target`, where"
    source: str
    line: int
    target: str


def read_modules(
    folder: Path, # the folder of the package `lamella`
) -> dict[str, str]:
    "Module name to source, of every module below `folder` but nbdev's index"
    files = sorted(folder.rglob('*.py'))
    modules = {'.'.join([ROOT, *file.relative_to(folder).with_suffix('').parts]): file for file in files}
    return {name: file.read_text(encoding='utf-8') for name, file in modules.items() if name != f'{ROOT}._modidx'}


def violations(modules: dict[str, str]) -> list[str]:
    "Everything that breaks the table, a line each"
    imports = [item for name, source in modules.items() for item in find_imports(name, source, modules)]
    rings = module_rings(imports) + folder_rings(imports)
    return uncovered(modules) + illegal_imports(imports) + rings + star_imports(modules) + patches(modules)


# Names

def short(name: str) -> str:
    "The name without `.__init__`: how it is imported"
    return name.removesuffix('.__init__')


def part_of(name: str) -> str:
    "The row of the table that a module belongs to: its folder or file right below the root, '' for the root"
    return (short(name).split('.') + [''])[1]


def folder_of(name: str) -> str:
    "The folder that a module lies in; a file right below the root stands for itself"
    parts = name.split('.')
    return name if len(parts) < 3 else '.'.join(parts[:-1])


# Imports

def find_imports(
    name: str,               # the importing module
    source: str,
    modules: dict[str, str],
) -> list[Import]:
    "What `name` imports of lamella, anywhere in its source: functions and `if TYPE_CHECKING:` count too"
    found = [(node.lineno, target) for node in ast.walk(ast.parse(source)) for target in targets(node, name, modules)]
    return [Import(name, line, target) for line, target in found if target.split('.')[0] == ROOT]


def targets(node: ast.AST, name: str, modules: dict[str, str]) -> list[str]:
    "The full names of the modules that `node` imports, if it imports any"
    if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom): names = from_targets(node, name, modules)
    elif isinstance(node, ast.Call): names = call_targets(node, name)
    else: names = []
    return [existing(target, modules) for target in names]


def existing(name: str, modules: dict[str, str]) -> str:
    "The key of `modules` for an imported name: a package's is its `__init__`; unknown names stay"
    return f'{name}.__init__' if name not in modules and f'{name}.__init__' in modules else name


def from_targets(node: ast.ImportFrom, name: str, modules: dict[str, str]) -> list[str]:
    "For each name of a `from` import: the submodule of that name, otherwise the module it is taken from"
    base = absolute(node.module or '', node.level, name)
    known = modules.keys() | {prefix for module in modules for prefix in folders_above(module)}
    names = [f'{base}.{alias.name}' for alias in node.names]
    return [target if target in known or is_part(target) else base for target in names]


def folders_above(name: str) -> list[str]:
    "Every package that `name` lies in"
    parts = name.split('.')
    return ['.'.join(parts[:i]) for i in range(1, len(parts))]


def is_part(name: str) -> bool:
    "Is `name` a row of the table?"
    return name.count('.') == 1 and name.split('.')[0] == ROOT and part_of(name) in LAYERS


def call_targets(node: ast.Call, name: str) -> list[str]:
    "The target of `import_module('...')` or `__import__('...')` of a constant"
    called = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
    if called not in ('import_module', '__import__') or not node.args: return []
    value = getattr(node.args[0], 'value', None)
    if not isinstance(value, str): return []
    module = value.lstrip('.')
    return [absolute(module, len(value) - len(module), name)]


def absolute(module: str, level: int, name: str) -> str:
    "The absolute name of the module that `from {level dots}{module} import` means in module `name`"
    if not level: return module
    return '.'.join([*name.split('.')[:-level], *filter(None, [module])])


# The table

def uncovered(modules: dict[str, str]) -> list[str]:
    "The modules that the table does not know"
    unknown = [name for name in modules if name not in UNCOVERED and part_of(name) not in LAYERS]
    return [f'{short(name)}: not covered by the layer table' for name in unknown]


def illegal_imports(imports: list[Import]) -> list[str]:
    "The imports that the table does not allow"
    found = [(item, objection(item.source, item.target)) for item in imports]
    return [f'{short(item.source)}:{item.line}: imports {short(item.target)}: {why}' for item, why in found if why]


def objection(source: str, target: str) -> str | None:
    "Why `source` may not import `target`; None if it may"
    mine, other = part_of(source), part_of(target)
    if mine == other: return callbacks_objection(source, target)
    if not mine: return None # the root's `__init__`: rings are all that it could make
    if not other: return 'base imports nothing of lamella outside base' if mine == 'base' else None
    if other not in LAYERS: return f'{other} is not in the layer table'
    return layer_objection(mine, other)


def callbacks_objection(source: str, target: str) -> str | None:
    "One callbacks module does not import another"
    if part_of(source) == 'callbacks' and source != target: return 'callbacks do not import each other'


def layer_objection(mine: str, other: str) -> str | None:
    "Two different rows of the table: why the first may not import the second; None if it may"
    layer, below = LAYERS.get(mine, TOP_LAYER), LAYERS[other]
    if layer == TOP_LAYER: return None
    if below > layer: return f'upward, from layer {layer} to layer {below}'
    if below == layer: return f'the parts of layer {layer} do not import each other'
    if below == 1 and other not in OF_LAYER_1.get(mine, {other}): return f'{mine} imports only metrics of layer 1'


# Rings

def module_rings(imports: list[Import]) -> list[str]:
    "The rings of modules"
    edges = {(short(item.source), short(item.target)) for item in imports}
    return [f'ring of modules: {ring}' for ring in rings(edges)]


def folder_rings(imports: list[Import]) -> list[str]:
    "The rings of folders; an import within a folder is none, nor is what a door (`all`) brings along"
    edges = {(folder_of(item.source), folder_of(item.target)) for item in imports if not item.source.endswith('.all')}
    return [f'ring of folders: {ring}' for ring in rings({(a, b) for a, b in edges if a != b})]


def rings(edges: set[tuple[str, str]]) -> list[str]:
    "One shortest ring, such as 'a -> b -> a', for each strongly connected component"
    graph = defaultdict(set)
    for source, target in edges: graph[source].add(target)
    return [' -> '.join(ring_through(min(group), graph)) for group in components(graph)]


def components(graph: dict[str, set[str]]) -> list[set[str]]:
    "The strongly connected components that hold a ring: nodes that reach each other, or themselves"
    reach = {node: reachable(node, graph) for node in list(graph)}
    cyclic = [node for node in sorted(reach) if node in reach[node]]
    groups = {frozenset(other for other in cyclic if other in reach[node] and node in reach[other]) for node in cyclic}
    return sorted(map(set, groups), key=min)


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    "The nodes at the end of a path of one or more edges from `start`"
    seen, todo = set(), [start]
    while todo:
        new = graph.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


def ring_through(start: str, graph: dict[str, set[str]]) -> list[str]:
    "A shortest path from `start` to itself"
    paths, seen = [[start]], {start}
    for path in paths: # breadth first: the list grows while it is read
        following = graph.get(path[-1], set())
        if start in following: return [*path, start]
        paths += [[*path, node] for node in sorted(following - seen)]
        seen |= following


# What no module does

def star_imports(modules: dict[str, str]) -> list[str]:
    "The star imports outside the user's doors"
    inside = {name: source for name, source in modules.items() if name.split('.')[-1] not in STARS_ALLOWED}
    return [f'{short(name)}:{node.lineno}: star import of {"."*node.level}{node.module or ""}'
            for name, source in inside.items() for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and node.names[0].name == '*']


def patches(modules: dict[str, str]) -> list[str]:
    "The public functions that fastcore's `patch` and its kin add to a class from outside"
    found = [(name, node) for name, source in modules.items() for node in patched(ast.parse(source))]
    return [f'{short(name)}:{node.lineno}: @patch of {node.name}' for name, node in found]


def patched(tree: ast.Module) -> list[ast.FunctionDef]:
    "The public functions with a patching decorator, also under another name"
    names = {*PATCHES, *patch_aliases(tree)}
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [node for node in functions if not node.name.startswith('_')
            and any(decorator_name(item) in names for item in node.decorator_list)]


def patch_aliases(tree: ast.Module) -> set[str]:
    "What the module calls the patching decorators that it imports"
    aliases = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    return {alias.asname for alias in aliases if alias.name in PATCHES and alias.asname}


def decorator_name(node: ast.expr) -> str:
    "The last name of `@a.name` or `@name(...)`"
    node = node.func if isinstance(node, ast.Call) else node
    return getattr(node, 'attr', getattr(node, 'id', ''))
