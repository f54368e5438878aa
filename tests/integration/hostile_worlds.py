"""Federations with a hostile site, each trained once for all tests of a process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.task_identity import TaskIdentity
from tests.conftest import MakeJob
from tests.integration.hostile import NAMES, Attack, Federation, Ran, failing, honest

from cotune.server import grid
from cotune.shared.planning import resolve

RICH = {"transport": {"codec_up": "int8"}, "privacy": {"clipping": "adaptive", "metrics": "noised"}}
# World -> first hostile round, what the site does in the run that others are held against, settings.
WORLDS: dict[str, tuple[int, Attack, dict[str, dict[str, Any]]]] = {
    "plain": (1, failing, {}),
    "late": (2, failing, {}),
    "rich": (1, failing, RICH),
    "trusted": (1, honest, {}),
    "published": (1, failing, {"eval": {}}),
    "single": (1, honest, {"run": {"rounds": 1}, **RICH}),
}
FOUND: dict[str, tuple[Federation, Ran]] = {}  # worlds and their runs without an attack, made once
World = Callable[[str], tuple[Federation, Ran]]


def skip(_descriptor: int) -> None:
    """Instead of `os.fsync`: no power is cut here."""


def worlds(make_job: MakeJob, folder: Path, patch: pytest.MonkeyPatch) -> World:
    """Finds, by name, a federation and the run of it that others are held against."""
    patch.setattr(os, "fsync", skip)
    patch.setattr(grid, "POLL_S", 0.01)
    for name in ("run_id", "node_id", "task_id"):  # Flower sets them in a process that it starts
        patch.setattr(TaskIdentity, f"_{name}", 1)

    def find(name: str) -> tuple[Federation, Ran]:
        if name not in FOUND:
            since, attack, more = WORLDS[name]
            sections = {
                "run": {"rounds": since + 1},
                "lora": {"last_layers": 1},
                "data": {"records_per_site": 20},
                "train": {"batch_size": 5},
                "federation": {"sites": len(NAMES)},
                "eval": {"data": None},
                **more,
                "privacy": {"noise": "test", "noise_multiplier": 1.0, **more.get("privacy", {})},
            }
            federation = Federation(resolve(make_job(**sections)), folder / name, since)
            FOUND[name] = federation, federation.run(attack)
        return FOUND[name]

    return find
