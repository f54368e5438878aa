"""One step of DP-SGD as the trainer takes it, of parts that can be exchanged."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch

from cotune.client import training
from cotune.client.clipping import ClippedSum, clipped_sum, sum_by_unit
from cotune.client.gradients import PerExample
from cotune.client.noise import Released, draw_noise, privatise
from cotune.client.randomness import RandomStream
from cotune.client.sampling import draw_batch
from cotune.shared.privacy.mechanism import Mechanism

Step = Callable[..., Any]


@dataclass(frozen=True)
class Parts:
    """What a step is made of, under the names by which the trainer knows it."""

    draw_batch: Step = draw_batch
    sum_by_unit: Step = sum_by_unit
    clipped_sum: Step = clipped_sum
    draw_noise: Step = draw_noise
    privatise: Step = privatise


@dataclass(frozen=True)
class World:
    """Rows with gradients that are given: gradients (n, p), losses (n,), and the unit of each row (n,)."""

    gradients: np.ndarray
    losses: np.ndarray
    owners: np.ndarray
    units: int

    def per_example(self, rows: np.ndarray) -> PerExample:
        """These rows' gradients as two parameters, the first a matrix."""
        found = torch.from_numpy(self.gradients[rows].astype(np.float32))
        half = found.shape[1] // 2
        tensors = {"a": found[:, :half].unsqueeze(1), "b": found[:, half:]}
        return PerExample(tensors, torch.from_numpy(self.losses[rows].astype(np.float32)))

    def rows(self, unit: int) -> np.ndarray:
        """The rows of a unit."""
        return np.flatnonzero(self.owners == unit)


def nobody(size: int) -> World:
    """A site without records."""
    return World(np.zeros((0, size)), np.zeros(0), np.zeros(0, dtype=int), 0)


def zeros(units: int, size: int) -> World:
    """A site whose units all have a zero gradient and no loss."""
    return World(np.zeros((units, size)), np.zeros(units), np.arange(units), units)


def step(parts: Parts, mechanism: Mechanism, world: World, stream: RandomStream, microbatch: int = 1000) -> Released:
    """One step in the trainer's order, in microbatches of so many units."""
    batch = parts.draw_batch(mechanism, world.units, stream)
    noise = parts.draw_noise(mechanism, world.gradients.shape[1], stream)
    total = ClippedSum.zero(world.gradients.shape[1])
    for start in range(0, len(batch), microbatch):
        total = total + _clip(parts, mechanism, world, batch[start : start + microbatch])
    return parts.privatise(total, mechanism, noise)


def _clip(parts: Parts, mechanism: Mechanism, world: World, units: np.ndarray) -> ClippedSum:
    rows = [world.rows(int(unit)) for unit in units]
    owners = np.repeat(np.arange(len(units)), [len(own) for own in rows])
    per_unit = parts.sum_by_unit(world.per_example(np.concatenate(rows)), owners, len(units))
    return parts.clipped_sum(per_unit, mechanism)


@contextmanager
def planted(parts: Parts) -> Generator[None]:
    """The real trainer with these parts in it."""
    with pytest.MonkeyPatch.context() as patch:
        for part in fields(Parts):
            patch.setattr(training, part.name, getattr(parts, part.name))
        yield
