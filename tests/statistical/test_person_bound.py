"""One person, whatever their one to eight records say, moves no sum by more than its sensitivity.

Not statistics but search: hypothesis looks for gradients that break the bound, and the whole trainer is given
persons whose gradients overflow. It stands here because the two-worlds tests rest on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tests.statistical.faults import FAULTS
from tests.statistical.real import adapter_of, data_of, here, trainer_of
from tests.statistical.steps import Parts, World, planted
from tests.statistical.verdict import must_fail

from cotune.client.clipping import ClippedSum
from cotune.client.data import SiteExamples
from cotune.client.noise import Noise
from cotune.client.randomness import secure_stream
from cotune.client.training import Trainer
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.privacy.mechanism import LOSS_BOUND, Mechanism, mechanism_of

SIZE = 10
FLAT = Mechanism(sampling_probability=1.0, expected_batch_size=10, clipping_norm=1.0, noise_multiplier=0.6)
KINDS = {
    "flat": FLAT,
    "normalised": replace(FLAT, clipping="normalised"),
    "adaptive": replace(FLAT, adaptive=True, metrics=True),
}
HARD = st.sampled_from([0.0, 1e-45, -1e-38, 1e-30, 1.0, -1e8, 1e19, 3e38, -3e38, np.nan, np.inf, -np.inf])
NUMBERS = st.one_of(st.floats(-10, 10, width=32), HARD)
LOSSES = st.one_of(st.floats(0, 20, width=32), st.sampled_from([0.0, -1.0, 1e30, np.nan, np.inf]))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Up to four persons with one to eight records each."""
    records = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    owners = np.repeat(np.arange(len(records)), records)
    gradients = draw(arrays.arrays(np.float32, (len(owners), SIZE), elements=NUMBERS, fill=NUMBERS))
    losses = draw(arrays.arrays(np.float32, len(owners), elements=LOSSES))
    return World(gradients, losses, owners, len(records))


def summed(parts: Parts, mechanism: Mechanism, world: World, persons: list[int], pieces: int) -> ClippedSum:
    """Clipped sums over some persons, one by one; a person's records come in pieces of so many."""
    total = ClippedSum.zero(SIZE)
    for person in persons:
        rows, held = world.rows(person), None
        for start in range(0, len(rows), pieces):
            piece = rows[start : start + pieces]
            found = parts.sum_by_unit(world.per_example(piece), np.zeros(len(piece), dtype=int), 1)
            held = found if held is None else held + found
        total = total + parts.clipped_sum(held, mechanism)
    return total


def together(parts: Parts, mechanism: Mechanism, world: World, persons: list[int]) -> ClippedSum:
    """The same of all of them in one go."""
    if not persons:
        return ClippedSum.zero(SIZE)
    rows = [world.rows(person) for person in persons]
    owners = np.repeat(np.arange(len(persons)), [len(own) for own in rows])
    per_unit = parts.sum_by_unit(world.per_example(np.concatenate(rows)), owners, len(persons))
    return parts.clipped_sum(per_unit, mechanism)


def assert_bounded(one: ClippedSum, other: ClippedSum, mechanism: Mechanism) -> float:
    """How far the gradient sum moved; fails if it, or a side sum, moved further than its sensitivity."""
    assert np.isfinite(one.gradient).all() and np.isfinite([one.below, one.loss]).all()
    moved = float(np.linalg.norm(one.gradient - other.gradient))
    assert moved <= mechanism.sensitivity, moved
    assert 2 * abs(one.below - other.below) <= 1 + 1e-9
    assert abs(one.loss - other.loss) <= 1 + 1e-9
    return moved


def check_bound(parts: Parts, kind: str, examples: int = 120) -> None:
    """For every person of many worlds: with and without them, in pieces and in one go."""
    most = [0.0]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(world=worlds(), norm=st.sampled_from([1e-6, 1 / 3, 1.0, 1e3]), pieces=st.integers(1, 8))
    def search(world: World, norm: float, pieces: int) -> None:
        mechanism = replace(KINDS[kind], clipping_norm=norm)
        everybody = list(range(world.units))
        for person in everybody:
            others = [p for p in everybody if p != person]
            for way in (together, lambda *given: summed(*given, pieces)):
                moved = assert_bounded(
                    way(parts, mechanism, world, everybody), way(parts, mechanism, world, others), mechanism
                )
                most[0] = max(most[0], moved / norm)

    search()
    print(f"\nperson bound, {kind}: {examples} worlds, furthest {most[0]:.6f} of 1", end="")  # noqa: T201
    assert most[0] > 0.9, "the search never came near the bound: it would not see it broken"


@pytest.mark.parametrize("kind", KINDS)
def test_no_person_moves_a_sum_further_than_its_sensitivity(kind: str) -> None:
    check_bound(Parts(), kind)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("clipped by record", "flat"),
        ("clipped by record", "normalised"),
        ("clipped by record", "adaptive"),
        ("clipped by tensor", "flat"),
        ("clipped by tensor", "normalised"),
        ("clipped as a batch", "flat"),
        ("not clipped", "flat"),
        ("NaN goes through", "flat"),
        ("loss not bounded", "adaptive"),
        ("share counted by record", "adaptive"),
    ],
)
def test_clipping_done_wrong_is_noticed(fault: str, kind: str) -> None:
    must_fail(lambda: check_bound(FAULTS[fault](), kind, 200), fault=fault)


# The same of whole rounds of the real trainer, on a model whose gradients are too long or broken.

ROWS_OF = {f"p{count}": count for count in range(1, 9)}
NORM, BATCH, BROKEN = 0.01, 8, 4
ROUNDING = 1e-4  # of the fp32 adapter that the sums are read off


def without_noise(parts: Parts) -> Parts:
    """The same parts, so that the sums can be seen."""
    return replace(parts, draw_noise=lambda _mechanism, size, _stream: Noise(np.zeros(size), 0.0, 0.0))


def sums_of_a_round(trainer: Trainer, job: Job, data: SiteExamples, persons: list[int]) -> ClippedSum:
    """What one step with all of these persons summed up, read off what leaves; one of them overflows."""
    adapter, start = adapter_of(trainer), np.random.default_rng(4).normal(size=trainer.layout.size) * 0.3
    rows = np.concatenate([data.rows(person) for person in persons])
    owners = np.repeat(np.arange(len(persons)), [len(data.rows(person)) for person in persons])
    some = SiteExamples([data.examples[row] for row in rows], owners, len(persons))
    features = Features(trainer.network, some.examples)
    kept = features.of(range(len(rows)))
    assert kept is not None
    for values, owner in zip(kept, owners, strict=True):
        np.multiply(values, np.nan if persons[owner] == BROKEN else 1.0, out=values)
    adapter.write(start)
    begun = adapter.read()
    result = trainer.train_round(here(trainer), some, features, mechanism_of(job), secure_stream(), lambda _step: None)
    gradient = (begun - adapter.read()) / job.train.learning_rate * BATCH
    below, loss = 0.0, 0.0
    if result.clipping_norm is not None and result.loss is not None:
        share = job.privacy.clipping_quantile - math.log(result.clipping_norm / NORM) / job.privacy.clipping_rate
        below, loss = (share - 0.5) * BATCH, (result.loss * 2 / LOSS_BOUND - 1) * BATCH
    return ClippedSum(gradient, below, loss)


def check_rounds(parts: Parts, trainer: Trainer, job: Job, data: SiteExamples) -> None:
    """A round with everybody, and one without each person in turn."""
    everybody, mechanism = list(range(data.units)), mechanism_of(job)
    with planted(without_noise(parts)):
        whole = sums_of_a_round(trainer, job, data, everybody)
        less = [sums_of_a_round(trainer, job, data, [p for p in everybody if p != gone]) for gone in everybody]
    loosely = replace(mechanism, clipping_norm=NORM * (1 + ROUNDING))
    moved = [assert_bounded(whole, one, loosely) / NORM for one in less]
    figures = ", ".join(f"{far:.4f}" for far in moved)
    print(f"\nperson bound, rounds, 1 to 8 records: {figures} of 1", end="")  # noqa: T201
    assert moved.pop(BROKEN) < ROUNDING, "who overflows counts as zero"
    assert min(moved) > 0.9, "the gradients were short: nothing was shown"
    if mechanism.metrics:
        assert max(abs(whole.loss - one.loss) for one in less) > 0.1
        assert max(2 * abs(whole.below - one.below) for one in less) > 0.99


@pytest.fixture
def persons(unit_job: Callable[..., Job]) -> Callable[[str], tuple[Trainer, Job, SiteExamples]]:
    def make(clipping: str) -> tuple[Trainer, Job, SiteExamples]:
        privacy = {"clipping": clipping, "clipping_norm": NORM, "noise_multiplier": 0.5}
        job = unit_job(
            ROWS_OF,
            data={"units_per_site": BATCH},
            train={"batch_size": BATCH, "microbatch": 3, "learning_rate": 100.0},
            privacy={**privacy, "metrics": "noised" if clipping == "adaptive" else "none"},
        )
        data = data_of(job)
        assert [len(data.rows(person)) for person in range(data.units)] == list(ROWS_OF.values())
        return trainer_of(job), job, data

    return make


@pytest.mark.parametrize("clipping", KINDS)
def test_no_person_moves_what_leaves_a_round_further_than_its_sensitivity(persons: Any, clipping: str) -> None:
    check_rounds(Parts(), *persons(clipping))


@pytest.mark.parametrize(
    ("fault", "clipping"),
    [
        ("clipped by record", "flat"),
        ("clipped by tensor", "flat"),
        ("clipped as a batch", "flat"),
        ("NaN goes through", "flat"),
        ("clipped by record", "adaptive"),
        ("share counted by record", "adaptive"),
    ],
)
def test_clipping_done_wrong_in_the_trainer_is_noticed(persons: Any, fault: str, clipping: str) -> None:
    given = persons(clipping)
    must_fail(lambda: check_rounds(FAULTS[fault](), *given), fault=fault)
