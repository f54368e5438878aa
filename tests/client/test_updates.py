"""The files of updates: which are kept, and what the site finds in them of its own rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotune.client.guard import Guard
from cotune.client.updates import Updates
from cotune.shared.adapter import Vector


@pytest.fixture
def updates(guard: Guard) -> Updates:
    return guard.home.updates


@pytest.fixture
def write(guard: Guard, desk: Any, ask_job: Any) -> Any:
    """Keeps an update of a round that says its number, with a memory that says it too."""
    job = ask_job(run={"rounds": 99})

    def keep(number: int, run_id: str = "run-1", said: int | None = None) -> bool:
        value = number if said is None else said
        update = desk.update(guard, desk.plan(job, number, run_id=run_id), fill=value)
        return guard.home.updates.write(run_id, number, update, {"m": vector(value)})

    return keep


def vector(value: float) -> Vector:
    return np.array([value, -value], dtype=np.float32)


def said(updates: Updates, number: int, run_id: str = "run-1") -> float | None:
    update = updates.read(run_id, number)
    return None if update is None else float(update.delta("fp32", 5)[0])


def remembered(updates: Updates, before: int, run_id: str = "run-1") -> float | None:
    found = updates.memory(run_id, before)
    return float(found["m"][0]) if found else None


def kept(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(".safetensors") for path in folder.iterdir())


def test_a_round_has_one_update_and_one_memory_and_the_first_stands(updates: Updates, write: Any) -> None:
    assert write(1, said=5)
    assert not write(1, said=6)
    assert (said(updates, 1), remembered(updates, 2)) == (5, 5)
    assert kept(updates.folder) == ["run-1-1"], "no draft is left"


def test_the_memory_is_that_of_the_last_round_before_however_long_ago(updates: Updates, write: Any) -> None:
    assert remembered(updates, 1) is None
    for number in (2, 9, 10):
        write(number)
    found = {before: remembered(updates, before) for before in (1, 2, 3, 9, 10, 11, 50)}
    assert found == {1: None, 2: None, 3: 2, 9: 2, 10: 9, 11: 10, 50: 10}


def test_three_rounds_stay_of_each_run_whatever_their_numbers(updates: Updates, write: Any) -> None:
    for run_id in ("run-1", "run-1-2", "run"):
        for number in (1, 2, 5, 10):
            write(number, run_id, said=number + len(run_id))
    assert kept(updates.folder) == sorted(f"{run}-{n}" for run in ("run-1", "run-1-2", "run") for n in (2, 5, 10))
    assert [remembered(updates, 6, run_id) for run_id in ("run-1", "run-1-2", "run")] == [10, 12, 8]


def test_an_earlier_round_that_comes_late_is_kept_too(updates: Updates, write: Any) -> None:
    """A coordinator that fell back to an older checkpoint asks a site for a round it was not asked for before."""
    for number in (3, 4, 5):
        write(number)
    assert write(1)
    assert said(updates, 1) == 1
    assert remembered(updates, 2) == 1
    assert [said(updates, number) for number in (3, 4, 5)] == [3, 4, 5]


@pytest.mark.parametrize("harm", ["cut", "edited", "of another kind"])
def test_a_damaged_update_is_none_and_its_memory_is_not_used(updates: Updates, write: Any, harm: str) -> None:
    for number in (1, 2):
        write(number)
    path = updates.path("run-1", 2)
    content = bytearray(path.read_bytes())
    if harm == "cut":
        path.write_bytes(content[:-3])
    elif harm == "edited":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.write_text("{}")
    assert said(updates, 2) is None
    assert remembered(updates, 3) == 1
