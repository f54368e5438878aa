"""The README's annotated file tree is the disk's: every module and top-level entry, each with its role."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("shared", "client", "server", "simulations")
ENTRY = re.compile(r"^(?P<indent> *)(?P<name>\S+)(?: {2,}(?P<role>\S.*))?$")
NEVER_LISTED = {".git"}


def _block() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    trees = [block for block in re.findall(r"```text\n(.*?)```", text, re.S) if "pyproject.toml" in block]
    assert len(trees) == 1, "the README holds one ```text block with the file tree"
    return [line for line in trees[0].splitlines() if line.strip()]


def _listed() -> dict[str, str]:
    """The tree as path -> role; folders end with a slash; two spaces a level."""
    folders: list[str] = []
    found: dict[str, str] = {}
    for line in _block():
        entry = ENTRY.match(line)
        assert entry, f"not `name  role`: {line!r}"
        depth, odd = divmod(len(entry["indent"]), 2)
        assert not odd, f"levels are two spaces: {line!r}"
        assert depth <= len(folders), f"deeper than its folder: {line!r}"
        folders = folders[:depth]
        path = "".join(folders) + entry["name"]
        assert path not in found, f"listed twice: {path}"
        found[path] = entry["role"] or ""
        if path.endswith("/"):
            folders.append(entry["name"])
    return found


def _ignored(name: str) -> bool:
    patterns = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    return name in NEVER_LISTED or any(fnmatch.fnmatch(name, pattern.strip("/")) for pattern in patterns)


def _on_disk() -> set[str]:
    """What must be listed: top-level entries, and every module and folder of the rooms."""
    top = {p.name + "/" * p.is_dir() for p in ROOT.iterdir() if not _ignored(p.name) and p.name not in ROOMS}
    rooms: set[str] = set()
    for room in ROOMS:
        home = ROOT / room / "cotune" / room
        for path in home.rglob("*"):
            inside = path.relative_to(ROOT).as_posix()
            if path.is_dir() and path.name != "__pycache__" and any(path.iterdir()):
                rooms.add(inside + "/")
            elif path.suffix == ".py":
                rooms.add(inside)
        rooms.add(f"{room}/cotune/{room}/")
    return top | rooms


def test_the_tree_lists_every_module_and_top_level_entry() -> None:
    # A parent such as `.ci/` is listed through its file: `.ci/run`.
    listed = _listed()
    absent = [p for p in sorted(_on_disk()) if p not in listed and not (p == ".ci/" and ".ci/run" in listed)]
    assert not absent, "not in the README's tree"


def test_the_tree_lists_nothing_that_is_not_there() -> None:
    wrong = [p for p in _listed() if not ((ROOT / p).is_dir() if p.endswith("/") else (ROOT / p).is_file())]
    assert not wrong, "in the README's tree, not on the disk"


def test_every_entry_of_the_tree_has_a_role() -> None:
    assert not [path for path, role in _listed().items() if not role]
