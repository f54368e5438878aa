"""Batches are the Poisson samples, plain or capped, that are accounted: never shuffled, never at another rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from tests.statistical.faults import FAULTS
from tests.statistical.steps import Parts
from tests.statistical.verdict import judge, must_fail

from cotune.client.randomness import RandomStream, secure_stream
from cotune.shared.privacy.mechanism import Mechanism

Drawn = NDArray[np.bool_]
UNITS, STEPS, RATE = 40, 20_000, 0.25


def plain(rate: float) -> Mechanism:
    return Mechanism(sampling_probability=rate, expected_batch_size=10, clipping_norm=1.0, noise_multiplier=1.0)


def capped(rate: float, cap: int, population: int, mean: int = 1) -> Mechanism:
    return Mechanism(
        sampling_probability=rate,
        expected_batch_size=mean,
        clipping_norm=1.0,
        noise_multiplier=1.0,
        max_batch_size=cap,
        population=population,
    )


def drawn_by(parts: Parts, mechanism: Mechanism, units: int, steps: int) -> NDArray[np.int64]:
    """How often each unit was in each of so many batches, shape (steps, units)."""
    table, stream = np.zeros((steps, units), dtype=np.int64), secure_stream()
    for row in table:
        np.add.at(row, parts.draw_batch(mechanism, units, stream), 1)
    return table


def frequencies(counts: NDArray[np.int64], trials: int, rate: float) -> float:
    """Whether each of these counts is Binomial(trials, rate): the least p-value, times their number."""
    return len(counts) * min(float(stats.binomtest(int(count), trials, rate).pvalue) for count in counts)


def fits(values: NDArray[np.int64], law: NDArray[np.float64]) -> float:
    """Whether these values follow the law: an exact test of how often each came, as `frequencies`.

    Chi-square would join them, but its tail cannot be trusted at a millionth where a value is rare.
    """
    seen = np.bincount(values, minlength=len(law))
    if len(seen) > len(law):
        return 0.0
    law = np.clip(law, 0.0, 1.0)
    return len(law) * min(float(stats.binomtest(int(n), len(values), p).pvalue) for n, p in zip(seen, law, strict=True))


def normal(score: float) -> float:
    return float(2 * stats.norm.sf(abs(score)))


def check_poisson(parts: Parts, rate: float = RATE, units: int = UNITS, steps: int = STEPS) -> None:
    """Each unit by itself, at the rate, in batches that know nothing of each other."""
    table = drawn_by(parts, plain(rate), units, steps)
    scaled = (table - rate) / math.sqrt(rate * (1 - rate))
    pairs = (scaled.T @ scaled / math.sqrt(steps))[np.triu_indices(units, 1)]
    later = (scaled[1:] * scaled[:-1]).sum(0) / math.sqrt(steps - 1)
    epoch = round(1 / rate)
    within = table[: steps // epoch * epoch].reshape(-1, epoch, units).sum(1).ravel()
    pvalues = {
        "twice in a batch": float(table.max() <= 1),
        "rate": frequencies(table.sum()[None], table.size, rate),
        "inclusion": frequencies(table.sum(0), steps, rate),
        "batch size": fits(table.sum(1), stats.binom.pmf(np.arange(units + 1), units, rate)),
        "pairs of units": len(pairs) * normal(float(np.abs(pairs).max())),
        # Negative dependence too weak for one pair adds up over all of them.
        "all pairs": normal(float(pairs.sum()) / math.sqrt(len(pairs))),
        "the next batch": units * normal(float(np.abs(later).max())),
        "visits in n/B batches": fits(within, stats.binom.pmf(np.arange(epoch + 1), epoch, rate)),
    }
    absent = float((within == 0).mean())
    figures = f"{table.mean():.4f} of {rate}; in {epoch} batches {absent:.3f} never drawn of {(1 - rate) ** epoch:.3f}"
    judge("sampler, Poisson", pvalues, figures)


def capped_law(units: int, rate: float, cap: int, population: int) -> NDArray[np.float64]:
    """Probability of each batch size: places drawn, cut to the cap, and so many of them the site's own."""
    law = np.zeros(units + 1)
    for drawn, chance in enumerate(stats.binom.pmf(np.arange(population + 1), population, rate)):
        kept = min(drawn, cap)
        law += chance * stats.hypergeom.pmf(np.arange(units + 1), population, units, kept)
    return law


def check_capped(parts: Parts, units: int, rate: float, cap: int, population: int, steps: int = 12_000) -> None:
    """At most the cap, a uniform part of what was drawn, and absent units hold their places."""
    table = drawn_by(parts, capped(rate, cap, population), units, steps)
    sizes, law = table.sum(1), capped_law(units, rate, cap, population)
    places = np.arange(population + 1)
    mean_kept = float(stats.binom.pmf(places, population, rate) @ np.minimum(places, cap))
    full = table[sizes == cap]
    scaled = (table - table.mean(0)) / np.maximum(table.std(0), 1e-9)
    later = (scaled[1:] * scaled[:-1]).sum(0) / math.sqrt(steps - 1)
    pvalues = {
        "above the cap": float(sizes.max() <= cap),
        "inclusion": frequencies(table.sum(0), steps, mean_kept / population),
        "batch size": fits(sizes, law),
        "who is kept of a full batch": frequencies(full.sum(0), len(full), min(1.0, cap / units)) if len(full) else 1.0,
        "the next batch": units * normal(float(np.abs(later).max())),
    }
    expected = law[cap] if cap < len(law) else 0.0
    figures = f"cap {cap}, {units} of {population} places taken, {len(full) / steps:.3f} full of {expected:.3f}"
    judge("sampler, capped", pvalues, figures)


def check_rate(parts: Parts, batch: int, units: int, steps: int) -> None:
    """The rate is the public one, batch over units, whatever number of batches that makes an epoch."""
    stream, mechanism, count = secure_stream(), plain(batch / units), 0
    for _ in range(steps):
        count += len(parts.draw_batch(mechanism, units, stream))
    pvalue = float(stats.binomtest(count, steps * units, batch / units).pvalue)
    judge("sampler, rate", {"rate": pvalue}, f"{count / steps / units:.5f} of {batch}/{units} = {batch / units}")


def test_batches_are_poisson_samples() -> None:
    check_poisson(Parts())


@pytest.mark.parametrize(
    "fault",
    ["shuffled", "fixed size", "two batches a step", "a batch used twice"],
)
def test_a_sampler_that_is_not_poisson_is_noticed(fault: str) -> None:
    must_fail(lambda: check_poisson(FAULTS[fault]()), fault=fault)


def _with_a_friend(rate: float) -> Parts:
    """Unit 1 comes along with unit 0 in one of ten batches more than by chance: every frequency stays as it was."""

    def draw(mechanism: Mechanism, units: int, stream: RandomStream) -> NDArray[np.intp]:
        chosen = Parts().draw_batch(mechanism, units, stream)
        inside = np.isin(np.arange(units), chosen)
        if stream.uniform_bits(1)[0] < np.uint64(2**64 // 10):
            inside[1] = inside[0]
        return np.flatnonzero(inside)

    assert 0 < rate < 1
    return Parts(draw_batch=draw)


def _a_rate(factor: float) -> Parts:
    def draw(mechanism: Mechanism, units: int, stream: RandomStream) -> NDArray[np.intp]:
        return Parts().draw_batch(plain(mechanism.sampling_probability * factor), units, stream)

    return Parts(draw_batch=draw)


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ("rate 2 % up", lambda: _a_rate(1.02)),
        ("rate 2 % down", lambda: _a_rate(0.98)),
        ("two units together", lambda: _with_a_friend(RATE)),
    ],
)
def test_a_wrong_rate_or_company_is_noticed(fault: str, parts: Callable[[], Parts]) -> None:
    must_fail(lambda: check_poisson(parts()), fault=fault)


def test_two_percent_of_the_rate_are_noticed_in_most_runs() -> None:
    def check() -> None:
        check_rate(_a_rate(1.02), 250, 1000, 300)

    must_fail(check, fault="rate 2 % up, 300 batches", repeats=20, least=8)


@pytest.mark.parametrize(
    ("units", "rate", "cap", "population"),
    [(24, 0.25, 6, 24), (24, 0.25, 9, 24), (16, 0.25, 6, 24), (5, 0.5, 4, 24), (24, 1.0, 10, 24), (6, 1.0, 3, 24)],
    ids=["cap at the mean", "cap above", "a third absent", "most absent", "rate 1", "rate 1, most absent"],
)
def test_a_cap_keeps_a_uniform_part_and_absent_units_hold_their_places(
    units: int, rate: float, cap: int, population: int
) -> None:
    check_capped(Parts(), units, rate, cap, population)


@pytest.mark.parametrize(
    ("fault", "units"),
    [
        ("cap ignored", 24),
        ("cap keeps the first", 24),
        ("cap drawn again", 24),
        ("absent places left out", 16),
        ("shuffled", 24),
        ("a batch used twice", 24),
    ],
)
def test_a_cap_done_wrong_is_noticed(fault: str, units: int) -> None:
    must_fail(lambda: check_capped(FAULTS[fault](), units, 0.25, 6, 24), fault=fault)


@pytest.mark.parametrize(("batch", "units", "steps"), [(700, 1000, 400), (64, 1000, 4000), (62, 500, 2000)])
def test_the_rate_is_exact_for_batches_that_do_not_divide_the_records(batch: int, units: int, steps: int) -> None:
    check_rate(Parts(), batch, units, steps)
    fault = "rate of the loader"
    must_fail(lambda: check_rate(FAULTS[fault](), batch, units, steps), fault=fault)


def test_two_sites_draw_apart_and_one_seed_at_both_is_noticed() -> None:
    from cotune.client.randomness import reproducible_stream

    def check(streams: tuple[RandomStream, RandomStream]) -> None:
        tables = []
        for stream in streams:
            rows = [np.isin(np.arange(UNITS), Parts().draw_batch(plain(0.5), UNITS, stream)) for _ in range(500)]
            tables.append(np.concatenate(rows) * 2.0 - 1)
        together = float((tables[0] * tables[1]).sum()) / math.sqrt(tables[0].size)
        judge("sampler, two sites", {"together": normal(together)}, f"{together:+.2f} standard deviations together")

    check((secure_stream(), secure_stream()))
    check((reproducible_stream(1, "site-1", 1), reproducible_stream(1, "site-2", 1)))
    check((reproducible_stream(1, "site-1", 1), reproducible_stream(1, "site-1", 2)))
    same = (reproducible_stream(1, "site-1", 1), reproducible_stream(1, "site-1", 1))
    must_fail(lambda: check(same), fault="a seed all sites share")
