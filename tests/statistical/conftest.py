"""Statistical tests: what a step does is the random experiment that the accountant prices.

A test here draws from the real code with secret randomness, so no seed is fixed and no run repeats another. It
computes p-values under the law that is accounted and fails if one is below its share of ALPHA = 1e-6, so a check
of sound code raises a false alarm once in a million runs; some forty of them run in the suite. Sample sizes are
fixed in advance. Every check is a function of a component, and is also given components with a planted fault,
which it must refuse: a check that cannot fail shows nothing. Where a fault is not caught every time, the share of
twenty repeats in which it was is printed. `pytest -s` shows one line of figures a check.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.shared.job import Job

SMALL = {"r": 2, "alpha": 4.0, "last_layers": 1, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small matrices: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def unit_job(make_job: Callable[..., Job], tmp_path: Path) -> Callable[..., Job]:
    """A resolved job that protects persons; each row says whose it is."""

    def make(rows_of: dict[str, int], **sections: dict[str, Any]) -> Job:
        from tests.conftest import rows, write_rows

        persons = [person for person, count in rows_of.items() for _ in range(count)]
        made = [{**row, "person": person} for row, person in zip(rows(len(persons)), persons, strict=True)]
        path = write_rows(tmp_path / f"{len(rows_of)}-persons-{len(made)}-rows.jsonl", made)
        settings: dict[str, dict[str, Any]] = {
            "run": {"rounds": 50},
            "lora": SMALL,
            "data": {"train": str(path), "unit": "column:person", "units_per_site": 20},
            "train": {"batch_size": 10, "local_steps": 1, "learning_rate": 1.0, "microbatch": 4},
            "privacy": {"level": "unit", "noise_multiplier": 1.0, "delta": 1e-3, "epsilon": 100.0},
        }
        for section, changes in sections.items():
            settings[section] = {**settings.get(section, {}), **changes}
        return make_job(**settings)

    return make
