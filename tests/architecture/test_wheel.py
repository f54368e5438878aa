"""The wheel carries what the commands need and takes no name but its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("shared", "client", "server", "simulations")
SHIPPED = ("LICENSE", "README.md", "pyproject.toml", ".gitignore")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel built from a copy of this checkout."""
    copy = tmp_path_factory.mktemp("wheel") / "cotune"
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SHIPPED:
        shutil.copy(ROOT / name, copy / name)
    out = copy.parent / "out"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(copy), "--no-deps", "--wheel-dir", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = out.glob("cotune-*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_cotune_is_the_only_top_level_package(wheel: set[str]) -> None:
    top = {name.partition("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"cotune"}


def test_the_wheel_leaves_the_namespace_open(wheel: set[str]) -> None:
    assert "cotune/__init__.py" not in wheel
    assert {name.split("/")[1] for name in wheel if name.startswith("cotune/")} == set(ROOMS)


def test_every_file_of_the_rooms_is_in_the_wheel(wheel: set[str]) -> None:
    """Modules, recipes and the report's templates alike."""
    files = {
        path.relative_to(ROOT / room).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(name.startswith("cotune/simulations/recipes/") and name.endswith(".toml") for name in files)
    assert any(name.startswith("cotune/shared/report/") and not name.endswith(".py") for name in files)
    assert files <= wheel, sorted(files - wheel)


def test_the_wheel_carries_its_licence_and_its_command(wheel: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)
