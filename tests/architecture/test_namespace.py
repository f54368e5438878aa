"""One open namespace over four roots: no root may close it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("shared", "client", "server", "simulations")


@pytest.mark.parametrize("room", ROOMS)
def test_no_root_closes_the_namespace(room: str) -> None:
    assert (ROOT / room / "cotune" / room).is_dir()
    assert not (ROOT / room / "__init__.py").exists()
    assert not (ROOT / room / "cotune" / "__init__.py").exists()


@pytest.mark.parametrize("room", ROOMS)
def test_a_root_holds_its_own_room_and_nothing_else(room: str) -> None:
    assert [p.name for p in (ROOT / room).iterdir() if p.name != "__pycache__"] == ["cotune"]
    assert [p.name for p in (ROOT / room / "cotune").iterdir() if p.name != "__pycache__"] == [room]


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_can_be_imported_from_this_checkout(room: str) -> None:
    package = importlib.import_module(f"cotune.{room}")
    assert str(ROOT / room / "cotune" / room) in [str(Path(p).resolve()) for p in package.__path__]


def test_the_namespace_spans_all_four_roots() -> None:
    cotune = importlib.import_module("cotune")
    assert getattr(cotune, "__file__", None) is None
    assert {str(ROOT / room / "cotune") for room in ROOMS} <= {str(Path(p).resolve()) for p in cotune.__path__}
