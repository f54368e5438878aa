"""What the command line loads: names and help are light, and every command in the table is really there."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cotune.shared.cli import COMMANDS

ROOT = Path(__file__).parents[2]
ROOMS = ("shared", "client", "server", "simulations")
HEAVY = ("torch", "transformers", "peft", "flwr", "ray", "matplotlib", "opacus", "dp_accounting")


def _python(code: str) -> subprocess.CompletedProcess[str]:
    """Run a few lines in a fresh interpreter that sees the four roots."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in ROOMS)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _defined(tree: ast.Module) -> set[str]:
    """The names a module binds at its top level."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_the_programs_help_lists_every_command_and_loads_nothing_heavy() -> None:
    done = _python(f"""
import sys
from cotune.shared import cli
code = cli.run(["--help"])
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert code == 0, code
assert not loaded, loaded
""")
    assert done.returncode == 0, done.stderr
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ") and line.split()}
    assert set(COMMANDS) <= listed
    for entry in COMMANDS.values():
        assert " ".join(entry.summary.split()) in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_in_the_table_exists(name: str) -> None:
    module, _, attribute = COMMANDS[name].target.partition(":")
    parts = module.split(".")
    assert parts[0] == "cotune"
    path = ROOT.joinpath(parts[1], *parts).with_suffix(".py")
    assert path.is_file(), f"`cotune {name}` is to live in {path.relative_to(ROOT)}"
    assert attribute in _defined(ast.parse(path.read_text(encoding="utf-8"))), f"{attribute} in {path.name}"


def test_every_commands_help_works_and_loads_nothing_heavy() -> None:
    done = _python(f"""
import sys
from cotune.shared import cli
for name in cli.COMMANDS:
    code = cli.run([name, "--help"])
    loaded = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]
    assert code == 0, (name, code)
    assert not loaded, (name, loaded)
""")
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"cotune {name}" in done.stdout or f"Usage: {name}" in done.stdout


def test_loading_the_server_loads_no_tensor_library() -> None:
    modules = [
        ".".join(path.relative_to(ROOT / "server").with_suffix("").parts)
        for path in sorted((ROOT / "server").rglob("*.py"))
    ]
    assert modules
    done = _python(f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    loaded = [heavy for heavy in ("torch", "transformers", "peft") if heavy in sys.modules]
    assert not loaded, (name, loaded)
""")
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_names_the_nearest_one() -> None:
    done = _python("import sys; from cotune.shared import cli; sys.exit(cli.run(['simulat']))")
    assert done.returncode == 4
    assert "Did you mean `simulate`?" in done.stderr
