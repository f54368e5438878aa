"""The rooms keep their doors: who may import whom, what may not be called where, and how large things get.

Everything is read from the source by `ast`; nothing is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("shared", "client", "server", "simulations")
MAY_IMPORT = {
    "shared": {"shared"},
    "client": {"client", "shared"},
    "server": {"server", "shared"},
    "simulations": set(ROOMS),
}
FLOWER_DOORS = {
    "flower_app.py",
    "shared/cotune/shared/wire.py",
    "client/cotune/client/courier.py",
    "client/cotune/client/courier_process.py",
    "client/cotune/client/bounded_sending.py",
    "client/cotune/client/fleet_link.py",
    "server/cotune/server/app.py",
    "server/cotune/server/grid.py",
}
COMMAND_TABLE = "shared/cotune/shared/cli.py"  # names commands of every room as text, imported when called
SERVER_NEVER_AT_IMPORT = {"torch", "transformers", "peft"}

CODE_CARRIERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CODE_RUNNERS = {
    "eval", "exec", "builtins.eval", "builtins.exec", "torch.load", "numpy.load", "os.system", "os.popen",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load",
}  # fmt: skip
TRUE_IS_FORBIDDEN = {"shell", "trust_remote_code", "allow_pickle"}
NUMPY_GENERATORS = {
    "Generator",
    "default_rng",
    "SeedSequence",
    "BitGenerator",
    "Philox",
    "PCG64",
    "PCG64DXSM",
}
TORCH_GLOBAL_SEEDS = {"torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.cuda.manual_seed"}
CATCH_ALL_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "core", "base", "other"}

MAX_FUNCTION_LINES = 40
MAX_FILE_LINES = 300
MAX_PARAMETERS = 7

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _sources() -> list[str]:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in [*files, ROOT / "flower_app.py"])


SOURCES = _sources()
IN_ROOMS = [source for source in SOURCES if "/" in source]
PRIVATE = [s for s in SOURCES if s.startswith(("client/", "shared/cotune/shared/privacy/"))]
every_source = pytest.mark.parametrize("source", SOURCES)


@cache
def _tree(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(encoding="utf-8"), filename=source)


def _package(source: str) -> list[str]:
    """The dotted package a file of a room lies in, without the root folder."""
    return list(Path(source).parts[1:-1])


def _names(node: ast.Import | ast.ImportFrom, package: list[str]) -> list[tuple[str, str]]:
    """What one import statement binds: (local name, qualified name)."""
    if isinstance(node, ast.Import):
        return [
            (a.asname, a.name) if a.asname else (a.name.partition(".")[0], a.name.partition(".")[0]) for a in node.names
        ]
    base = package[: len(package) - node.level + 1] if node.level else []
    module = ".".join([*base, *([node.module] if node.module else [])])
    return [(a.asname or a.name, f"{module}.{a.name}") for a in node.names]


def _imported(tree: ast.AST, package: list[str]) -> list[tuple[str, int]]:
    """Every dotted name imported anywhere below a node, with its line."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(name, node.lineno) for _, name in _names(node, package)]
    return found


def _imported_at_load(tree: ast.Module, package: list[str]) -> list[tuple[str, int]]:
    """What loading the module imports: not what stands in functions or under `if TYPE_CHECKING`."""
    found: list[tuple[str, int]] = []
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, Function | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += _imported(node, package)
        waiting += ast.iter_child_nodes(node)
    return found


def _aliases(source: str) -> dict[str, str]:
    package = _package(source)
    return dict(
        pair
        for node in ast.walk(_tree(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for pair in _names(node, package)
    )


def _used(source: str) -> Iterator[tuple[str, int]]:
    """Every name or dotted name a file uses, with its imports' aliases undone: `np.x` is `numpy.x`."""
    aliases = _aliases(source)
    for node in ast.walk(_tree(source)):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if (
            isinstance(inner, ast.Name)
            and isinstance(node, ast.Attribute | ast.Name)
            and isinstance(node.ctx, ast.Load)  # a field that is called `eval` is a definition, no use
        ):
            yield ".".join([aliases.get(inner.id, inner.id), *reversed(parts)]), node.lineno


def _functions(source: str) -> list[tuple[Function, bool]]:
    """Every function of a file, and whether it is a method with `self` or `cls`."""
    tree = _tree(source)
    bound = {
        id(item)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, Function) and "staticmethod" not in map(ast.unparse, item.decorator_list)
    }
    return [(node, id(node) in bound) for node in ast.walk(tree) if isinstance(node, Function)]


def _room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "cotune" else None


def test_there_is_code_in_every_room() -> None:
    assert {source.partition("/")[0] for source in IN_ROOMS} == set(ROOMS)
    assert PRIVATE


def test_every_file_of_a_root_lies_in_its_own_room() -> None:
    astray = [s for s in IN_ROOMS if _package(s)[:2] != ["cotune", s.partition("/")[0]]]
    assert not astray


@pytest.mark.parametrize("source", IN_ROOMS)
def test_a_room_imports_only_the_rooms_it_may(source: str) -> None:
    allowed = MAY_IMPORT[source.partition("/")[0]]
    wrong = [
        f"{source}:{line} imports {name}"
        for name, line in _imported(_tree(source), _package(source))
        if name == "cotune" or (name.startswith("cotune.") and _room_of(name) not in allowed)
    ]
    assert not wrong


@pytest.mark.parametrize("source", IN_ROOMS)
def test_a_room_names_no_forbidden_module_as_text(source: str) -> None:
    """`importlib` must not be a way round the rule; the table of commands is the one exception."""
    if source == COMMAND_TABLE:
        return
    allowed = MAY_IMPORT[source.partition("/")[0]]
    wrong = [
        f"{source}:{node.lineno} names {node.value!r}"
        for node in ast.walk(_tree(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and (match := re.fullmatch(r"cotune\.(\w+)[\w.:]*", node.value))
        and match[1] in ROOMS
        and match[1] not in allowed
    ]
    assert not wrong


@every_source
def test_flower_is_imported_at_its_doors_only(source: str) -> None:
    if source in FLOWER_DOORS:
        return
    wrong = [
        f"{source}:{line} imports {name}"
        for name, line in _imported(_tree(source), _package(source))
        if name.partition(".")[0] in {"flwr", "flwr_datasets"}
    ]
    assert not wrong


def test_every_door_of_flower_is_there_and_used() -> None:
    """A door that no longer imports flwr must leave the list."""
    for source in sorted(FLOWER_DOORS):
        assert source in SOURCES, f"{source} is missing"
        if source != "flower_app.py":  # it names the rooms' apps; they import flwr
            names = [name for name, _ in _imported(_tree(source), _package(source))]
            assert any(name.partition(".")[0] == "flwr" for name in names), source


@pytest.mark.parametrize("source", [s for s in SOURCES if s.startswith("server/")])
def test_the_server_imports_no_tensor_library_when_it_is_loaded(source: str) -> None:
    wrong = [
        f"{source}:{line} imports {name}"
        for name, line in _imported_at_load(_tree(source), _package(source))
        if name.partition(".")[0] in SERVER_NEVER_AT_IMPORT
    ]
    assert not wrong


@every_source
def test_nothing_can_carry_or_run_foreign_code(source: str) -> None:
    imports = [
        f"{source}:{line} imports {name}"
        for name, line in _imported(_tree(source), _package(source))
        if name.partition(".")[0] in CODE_CARRIERS or name in CODE_RUNNERS
    ]
    uses = [f"{source}:{line} uses {name}" for name, line in _used(source) if name in CODE_RUNNERS]
    switches = [
        f"{source}:{node.value.lineno} sets {node.arg}=True"
        for node in ast.walk(_tree(source))
        if isinstance(node, ast.keyword)
        and node.arg in TRUE_IS_FORBIDDEN
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    assert not imports + uses + switches


@pytest.mark.parametrize("source", PRIVATE)
def test_no_global_random_numbers_where_privacy_is_made(source: str) -> None:
    """Randomness is a parameter: a global generator can be seeded or read from elsewhere."""
    imports = [
        f"{source}:{line} imports {name}"
        for name, line in _imported(_tree(source), _package(source))
        if name.partition(".")[0] == "random" or name in TORCH_GLOBAL_SEEDS
    ]
    uses = [
        f"{source}:{line} uses {name}"
        for name, line in _used(source)
        if name in TORCH_GLOBAL_SEEDS
        or (name.startswith("numpy.random.") and name.split(".")[2] not in NUMPY_GENERATORS)
    ]
    assert not imports + uses


@every_source
def test_functions_and_files_stay_small(source: str) -> None:
    lines = len((ROOT / source).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{source}: {lines} lines, at most {MAX_FILE_LINES}"
    long = [
        f"{source}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node, _ in _functions(source)
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, f"at most {MAX_FUNCTION_LINES} lines a function"


@pytest.mark.parametrize("source", [s for s in SOURCES if "commands" not in s])  # there they are options
def test_functions_take_few_parameters(source: str) -> None:
    wide: list[str] = []
    for node, is_method in _functions(source):
        every = node.args
        count = len(every.posonlyargs) + len(every.args) + len(every.kwonlyargs) - is_method
        count += (every.vararg is not None) + (every.kwarg is not None)
        if count > MAX_PARAMETERS:
            wide.append(f"{source}:{node.lineno} {node.name}: {count} parameters")
    assert not wide, f"at most {MAX_PARAMETERS} parameters, self and cls not counted"


@every_source
def test_every_function_says_what_it_returns(source: str) -> None:
    silent = [f"{source}:{node.lineno} {node.name}" for node, _ in _functions(source) if node.returns is None]
    assert not silent


@every_source
def test_no_module_has_a_catch_all_name(source: str) -> None:
    assert not CATCH_ALL_NAMES & set(Path(source).with_suffix("").parts)
