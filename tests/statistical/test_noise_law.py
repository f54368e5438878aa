"""The noise of a step has the law that is accounted: through `privatise`, and through a real round of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from tests.statistical.faults import FAULTS
from tests.statistical.real import adapter_of, data_of, here, trainer_of
from tests.statistical.steps import Parts, World, nobody, planted, step, zeros
from tests.statistical.verdict import judge, must_fail

from cotune.client.data import SiteExamples
from cotune.client.randomness import secure_stream
from cotune.client.training import Start, Trainer
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.privacy.event import NonPrivateEvent
from cotune.shared.privacy.mechanism import LOSS_BOUND, Mechanism, mechanism_of

Numbers = NDArray[np.float64]
SIZE, STEPS, UNITS = 2000, 20, 12
FLAT = Mechanism(sampling_probability=1.0, expected_batch_size=10, clipping_norm=0.7, noise_multiplier=0.8)
JOINT = replace(FLAT, noise_multiplier=0.6, adaptive=True, metrics=True)


@dataclass(frozen=True)
class Drawn:
    """Noise in units of its accounted standard deviation: a row for each release, (releases, p) and (releases,)."""

    gradient: Numbers
    below: Numbers | None = None
    loss: Numbers | None = None


def accounted_deviation(mechanism: Mechanism) -> float:
    """What the gradient's noise must be, from the event alone: all parts together have the event's precision."""
    event, sides = mechanism.event(1), int(mechanism.adaptive) + int(mechanism.metrics)
    assert not isinstance(event, NonPrivateEvent)
    precision = event.noise_multiplier**-2 - sides * mechanism.side_noise_multiplier**-2
    return mechanism.clipping_norm / math.sqrt(precision)


def spread(name: str, numbers: Numbers) -> dict[str, float]:
    """Exact tests of independent standard normal numbers: variance on either side, and mean."""
    squares, n = float(np.square(numbers).sum()), numbers.size
    return {
        f"{name}: too little": float(stats.chi2.cdf(squares, n)),
        f"{name}: too much": float(stats.chi2.sf(squares, n)),
        f"{name}: mean": float(2 * stats.norm.sf(abs(numbers.sum()) / math.sqrt(n))),
    }


def correlation(first: Numbers, second: Numbers) -> float:
    """Exact p-value of independence: the second's share along the first is standard normal. Rows against rows.

    The least over all rows of one and rows of the other, times their number; a row is not compared with itself.
    """
    lengths = np.linalg.norm(first, axis=-1, keepdims=True)
    shares = np.abs(first @ second.T) / np.maximum(lengths, 1e-30)
    if first is second:
        shares = shares[np.triu_indices(len(first), 1)]
    return float(shares.size * 2 * stats.norm.sf(shares.max()))


def check_noise(name: str, drawn: Drawn) -> None:
    """Variance, mean, normality, and no dependence between coordinates, releases and parts."""
    rows, flat = drawn.gradient, drawn.gradient.ravel()
    even = flat.size // 2 * 2
    pvalues = {
        **spread("gradient", flat),
        "law": float(stats.kstest(flat, "norm").pvalue),
        "neighbouring coordinates": correlation(flat[None, :even:2], flat[None, 1:even:2]),
        "two releases": correlation(rows, rows),
        "all releases": float(stats.chi2.sf(np.square(rows.sum(0)).sum() / len(rows), rows.shape[1])),
        "coarse numbers": float(np.unique(flat.astype(np.float32)).size > 0.98 * flat.size),
    }
    for side, numbers in (("share below the norm", drawn.below), ("loss", drawn.loss)):
        if numbers is not None:
            pvalues |= spread(side, numbers)
            pvalues[f"{side} and gradient"] = correlation(numbers[None], rows.T)
    judge(f"noise, {name}", pvalues, f"{flat.size:,} numbers, variance {np.square(flat).mean():.4f} of 1")


def drawn_by_steps(make: Callable[[], Parts], mechanism: Mechanism, world: World, microbatch: int = 5) -> Drawn:
    """What the steps of two sites release of a world whose sums are known: all zero, and half a unit within."""
    released = []
    for parts, stream in ((make(), secure_stream()) for _ in range(2)):
        released += [step(parts, mechanism, world, stream, microbatch) for _ in range(STEPS)]
    batch, side, units = mechanism.expected_batch_size, mechanism.side_noise_multiplier, world.units
    gradient = np.array([r.gradient for r in released], dtype=np.float64) * batch / accounted_deviation(mechanism)
    if not mechanism.metrics:
        return Drawn(gradient)
    below = np.array([(r.below - 0.5) * 2 * batch - units for r in released]) / side
    loss = np.array([(r.loss * 2 / LOSS_BOUND - 1) * batch + units for r in released]) / side
    return Drawn(gradient, below, loss)


WORLDS = {"no record": nobody(SIZE), "units that say nothing": zeros(UNITS, SIZE)}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("mechanism", [FLAT, JOINT], ids=["gradient alone", "with both side sums"])
def test_what_is_added_to_the_sums_is_the_accounted_noise(mechanism: Mechanism, world: str) -> None:
    check_noise(world, drawn_by_steps(Parts, mechanism, WORLDS[world]))


@pytest.mark.parametrize(
    ("fault", "mechanism", "world"),
    [
        ("half the noise", FLAT, "no record"),
        ("one noise for all steps", FLAT, "no record"),
        ("a seed all sites share", FLAT, "no record"),
        ("noise in bfloat16", FLAT, "no record"),
        ("noise scaled by the batch drawn", FLAT, "no record"),
        ("noise scaled by the batch drawn", FLAT, "units that say nothing"),
        ("divided by the batch drawn", FLAT, "no record"),
        ("divided by the batch drawn", FLAT, "units that say nothing"),
        ("empty batches skipped", FLAT, "no record"),
        ("noise each microbatch", FLAT, "units that say nothing"),
        ("side sums for free", JOINT, "no record"),
        ("half the noise", JOINT, "no record"),
        ("share counted by record", JOINT, "units of three records"),
    ],
)
def test_a_planted_fault_of_the_noise_is_noticed(fault: str, mechanism: Mechanism, world: str) -> None:
    three = World(np.zeros((36, SIZE)), np.zeros(36), np.arange(36) // 3, UNITS)
    given = {**WORLDS, "units of three records": three}[world]
    must_fail(lambda: check_noise(world, drawn_by_steps(FAULTS[fault], mechanism, given)), fault=fault)


@pytest.mark.parametrize(
    ("factor", "repeats", "least"), [(0.97, 1, 1), (1.03, 1, 1), pytest.param(0.98, 20, 10, marks=pytest.mark.slow)]
)
def test_noise_a_few_percent_off_is_noticed(factor: float, repeats: int, least: int) -> None:
    """With 80,000 numbers a variance 6 % off is 12 standard deviations away; 4 % off is 8, and mostly seen."""
    off = replace(FLAT, noise_multiplier=FLAT.noise_multiplier * factor)

    def check() -> None:
        drawn = drawn_by_steps(Parts, off, WORLDS["no record"])
        check_noise(f"{factor} of it", Drawn(drawn.gradient * factor))

    must_fail(check, fault=f"{factor} of the noise", repeats=repeats, least=least)


# Through the trainer: with plain SGD at rate 1 a step moves the adapter by exactly what it released.


def drawn_by_training(
    parts: Callable[[], Parts], trainer: Trainer, job: Job, data: SiteExamples, known: Numbers
) -> Drawn:
    """What the steps of two sites in two rounds each moved the adapter by, less the clipped sum it must have had."""
    mechanism, adapter, moves = mechanism_of(job), adapter_of(trainer), []
    for exchanged in (parts(), parts()):
        for number in (1, 2):
            before = [adapter.read()]
            features = Features(trainer.network, data.examples)
            with planted(exchanged):
                trainer.train_round(
                    here(trainer, number),
                    data,
                    features,
                    mechanism,
                    secure_stream(),
                    lambda _step, before=before: before.append(adapter.read()),
                )
            moves += [(old - new) / job.train.learning_rate for old, new in pairwise(before)]
    batch = mechanism.expected_batch_size
    return Drawn((np.array(moves) * batch - known) / accounted_deviation(mechanism))


EMPTY = SiteExamples([], np.zeros(0, dtype=np.intp), 0)
WIDE = {"r": 8, "alpha": 4.0, "last_layers": "all", "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]}


@pytest.fixture
def empty_site(unit_job: Callable[..., Job]) -> tuple[Trainer, Job]:
    job = unit_job({"a": 1}, lora=WIDE, train={"local_steps": 10})
    return trainer_of(job), job


def test_a_round_at_a_site_without_records_is_the_accounted_noise(empty_site: tuple[Trainer, Job]) -> None:
    trainer, job = empty_site
    check_noise("a round without records", drawn_by_training(Parts, trainer, job, EMPTY, np.zeros(1)))


@pytest.mark.parametrize(
    "fault",
    [
        "half the noise",
        "one noise for all steps",
        "a seed all sites share",
        "noise in bfloat16",
        "noise scaled by the batch drawn",
        "empty batches skipped",
        "divided by the batch drawn",
    ],
)
def test_a_fault_planted_in_the_trainer_is_noticed_without_any_record(
    empty_site: tuple[Trainer, Job], fault: str
) -> None:
    trainer, job = empty_site
    must_fail(
        lambda: check_noise(fault, drawn_by_training(FAULTS[fault], trainer, job, EMPTY, np.zeros(1))), fault=fault
    )


def test_a_round_taken_twice_for_one_charge_is_noticed(
    empty_site: tuple[Trainer, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, job = empty_site
    once = Trainer.train_round

    def twice(self: Trainer, start: Start, *given: Any) -> object:
        *others, progress = given
        once(self, start, *others, lambda _step: None)
        return once(self, here(self, start.round), *others, progress)

    def moved() -> None:
        mechanism, adapter, rounds = mechanism_of(job), adapter_of(trainer), []
        for number in range(1, 9):
            before = adapter.read()
            features = Features(trainer.network, [])
            trainer.train_round(here(trainer, number), EMPTY, features, mechanism, secure_stream(), lambda _step: None)
            rounds.append((before - adapter.read()) * mechanism.expected_batch_size)
        scale = accounted_deviation(mechanism) * math.sqrt(job.train.local_steps)
        check_noise("whole rounds", Drawn(np.array(rounds) / scale))

    moved()
    monkeypatch.setattr(Trainer, "train_round", twice)
    must_fail(moved, fault="a round taken twice")


@pytest.mark.parametrize("microbatch", [1, 4, 50])
def test_noise_is_added_once_however_many_microbatches_there_are(unit_job: Callable[..., Job], microbatch: int) -> None:
    """Every person in every step, each with 1 to 3 rows: the sum is known from a round without noise."""
    rows_of = {f"p{i}": 1 + i % 3 for i in range(6)}
    job = unit_job(
        rows_of,
        lora=WIDE,
        data={"units_per_site": 6},
        train={"batch_size": 6, "microbatch": microbatch, "learning_rate": 1e-3},
    )
    trainer, data = trainer_of(job), data_of(job)
    adapter, silent = adapter_of(trainer), replace(mechanism_of(job), noise_multiplier=1e-9)
    start = adapter.read()

    def move(mechanism: Mechanism) -> Numbers:
        adapter.write(start)
        features = Features(trainer.network, data.examples)
        trainer.train_round(here(trainer), data, features, mechanism, secure_stream(), lambda _step: None)
        return (start - adapter.read()) / job.train.learning_rate * mechanism.expected_batch_size

    def check() -> None:
        rows = np.array([move(mechanism_of(job)) for _ in range(6)])
        check_noise(f"microbatches of {microbatch}", Drawn((rows - known) / accounted_deviation(mechanism_of(job))))

    known = move(silent)
    assert np.linalg.norm(known) > 1
    check()
    with planted(FAULTS["noise each microbatch"]()):
        must_fail(check, fault="noise each microbatch")


def test_the_noise_of_the_released_loss_and_of_the_moving_norm_is_accounted_too(
    unit_job: Callable[..., Job],
) -> None:
    """What leaves besides the adapter: from each, the noise of its sum is found back."""
    privacy = {"noise_multiplier": 0.6, "clipping": "adaptive", "metrics": "noised"}
    job = unit_job({"a": 1}, lora=WIDE, privacy=privacy)
    trainer, mechanism = trainer_of(job), mechanism_of(job)
    adapter = adapter_of(trainer)
    assert mechanism.gradient_noise_multiplier > 1.03 * mechanism.noise_multiplier

    def check(make: Callable[[], Parts]) -> None:
        parts, moves, below, loss = make(), [], [], []
        for _ in range(40):
            before = adapter.read()
            with planted(parts):
                features = Features(trainer.network, [])
                result = trainer.train_round(
                    here(trainer), EMPTY, features, mechanism, secure_stream(), lambda _step: None
                )
            moves.append(before - adapter.read())
            assert result.clipping_norm is not None and result.loss is not None
            moved = -math.log(result.clipping_norm / mechanism.clipping_norm) / job.privacy.clipping_rate
            below.append((moved + job.privacy.clipping_quantile - 0.5) * 2)
            loss.append(result.loss * 2 / LOSS_BOUND - 1)
        scale = mechanism.expected_batch_size / mechanism.side_noise_multiplier
        gradient = np.array(moves) * mechanism.expected_batch_size / accounted_deviation(mechanism)
        check_noise("all that leaves", Drawn(gradient, np.array(below) * scale, np.array(loss) * scale))

    check(Parts)
    for fault in ("side sums for free", "half the noise"):
        must_fail(lambda fault=fault: check(FAULTS[fault]), fault=fault)
