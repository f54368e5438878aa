"""What joining a round holds in memory, with updates that are made when they are read."""

import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from zlib import crc32

import numpy as np
import pytest
from tests.server.aggregation.sites import TRAINED, Plan, joined, state_of

from cotune.server.aggregation import coordinatewise
from cotune.server.aggregation.bias import aggregation_bias
from cotune.server.aggregation.updates import Matrix, modules_of
from cotune.shared.adapter import Vector
from cotune.shared.aggregation import RuleName

# Four sites reach the largest rank an offset may have, so that more sites do not make the result itself larger;
# the arrays outweigh the 100 kB of freed tuples that Python keeps for reuse.
SHAPE = Plan(12, 1500, 4, (), (), modules=12)
NUMBERS = np.random.default_rng(0).normal(size=60_000).astype(np.float32)


@dataclass(frozen=True)
class Made:
    """Updates of any number of sites that hold nothing."""

    state: Mapping[str, Vector]
    trained: tuple[str, ...]
    count: int

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(f"site-{n:03}" for n in range(self.count))

    @property
    def weights(self) -> Matrix:
        return np.full(self.count, 1 / self.count)

    def before(self, site: str, name: str) -> Vector:
        return self.state[name].copy()

    def delta(self, site: str, name: str) -> Vector:
        if not any(mark in name for mark in self.trained):
            return np.zeros_like(self.state[name])
        shape = self.state[name].shape
        start = crc32(f"{site} {name}".encode()) % 50_000
        return NUMBERS[start : start + prod(shape)].reshape(shape).copy()


def peak_of(work: Callable[[], object]) -> int:
    """The most that was held at once while working, in bytes; what was held before is not counted."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rule", ["fedavg_ab", "product_svd", "fedex"])  # the others read in one of these ways
def test_sixty_four_sites_need_no_more_memory_than_four(rule: RuleName, monkeypatch: pytest.MonkeyPatch) -> None:
    # The influence of a site is measured on a fixed count of numbers at once: no more than four sites have here.
    monkeypatch.setattr(coordinatewise, "CHUNK_NUMBERS", 4 * SHAPE.rank * SHAPE.wide)
    state = state_of(SHAPE)
    few, many = (
        peak_of(lambda count=count: joined(rule, state, Made(state, TRAINED[rule], count))) for count in (4, 64)
    )
    assert many < 1.5 * few


def test_the_bias_of_sixty_four_sites_needs_no_more_memory_than_that_of_four() -> None:
    state = state_of(replace(SHAPE, modules=8))  # one at a time, whatever their number
    both = ("lora_A", "lora_B")
    few, many = (
        peak_of(lambda count=count: aggregation_bias(Made(state, both, count), modules_of(state))) for count in (4, 64)
    )
    assert many < 1.5 * few
