"""Poisson sampling is what the accountant assumes. False alarms of each check: ALPHA at these sizes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cotune.client.randomness import RandomStream, reproducible_stream, secure_stream
from cotune.client.sampling import draw_batch
from cotune.shared.privacy.mechanism import Mechanism

ALPHA = 1e-6
RECORDS, STEPS, RATE = 40, 20_000, 0.25
Drawn = NDArray[np.bool_]


def mechanism(rate: float) -> Mechanism:
    return Mechanism(sampling_probability=rate, expected_batch_size=10, clipping_norm=1.0, noise_multiplier=1.0)


def drawn_by(draw: Callable[[], NDArray[np.intp]], steps: int = STEPS) -> Drawn:
    """Which of RECORDS records were in each of so many batches, shape (steps, RECORDS)."""
    table = np.zeros((steps, RECORDS), dtype=bool)
    for row in table:
        row[draw()] = True
    return table


def faults(table: Drawn, rate: float) -> list[str]:
    """What about these batches is not Poisson sampling at `rate`; each check at ALPHA / 5."""
    steps, records = table.shape
    found: list[str] = []
    level = ALPHA / 5

    def check(name: str, pvalue: float) -> None:
        if not pvalue > level:
            found.append(name)

    counts = table.sum(0)
    check("inclusion", records * min(stats.binomtest(int(c), steps, rate).pvalue for c in counts))
    sizes = np.bincount(table.sum(1), minlength=records + 1)
    expected = stats.binom.pmf(np.arange(records + 1), records, rate) * steps
    keep = expected >= 5
    observed = np.append(sizes[keep], sizes[~keep].sum())
    wanted = np.append(expected[keep], expected[~keep].sum())
    check("batch size", float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue))
    scaled = (table - rate) / math.sqrt(rate * (1 - rate))
    pairs = (scaled.T @ scaled / math.sqrt(steps))[np.triu_indices(records, 1)]
    check("pairs of records", len(pairs) * float(2 * stats.norm.sf(np.abs(pairs).max())))
    # Negative dependence too weak for one pair adds up over all of them.
    check("all pairs", float(2 * stats.norm.sf(abs(pairs.sum()) / math.sqrt(len(pairs)))))
    successive = (scaled[1:] * scaled[:-1]).sum(0) / math.sqrt(steps - 1)
    check("successive batches", records * float(2 * stats.norm.sf(np.abs(successive).max())))
    return found


def test_batches_are_poisson_samples() -> None:
    stream = secure_stream()
    assert faults(drawn_by(lambda: draw_batch(mechanism(RATE), RECORDS, stream)), RATE) == []


def test_shuffled_batches_of_a_fixed_size_are_noticed() -> None:
    """The usual data loader: right frequency, but sizes never vary and records exclude each other."""
    random = np.random.default_rng(5)
    queue: list[int] = []

    def shuffled() -> NDArray[np.intp]:
        if not queue:
            queue.extend(random.permutation(RECORDS).tolist())
        return np.array([queue.pop() for _ in range(int(RECORDS * RATE))])

    found = faults(drawn_by(shuffled), RATE)
    assert {"batch size", "all pairs", "successive batches"} <= set(found)


def test_fixed_size_samples_drawn_anew_each_step_are_noticed() -> None:
    random = np.random.default_rng(6)
    size = int(RECORDS * RATE)
    found = faults(drawn_by(lambda: random.choice(RECORDS, size, replace=False)), RATE)
    assert "batch size" in found
    assert "all pairs" in found


@pytest.mark.parametrize("rate", [RATE * 1.1, RATE * 0.9])
def test_another_rate_than_the_accounted_one_is_noticed(rate: float) -> None:
    stream = secure_stream()
    assert "inclusion" in faults(drawn_by(lambda: draw_batch(mechanism(rate), RECORDS, stream)), RATE)


def test_one_record_drawn_more_often_is_noticed() -> None:
    stream, random = secure_stream(), np.random.default_rng(7)

    def favoured() -> NDArray[np.intp]:
        batch = draw_batch(mechanism(RATE), RECORDS, stream)
        return np.append(batch, 7) if random.random() < 0.1 else batch

    assert "inclusion" in faults(drawn_by(favoured), RATE)


def test_a_batch_used_twice_is_noticed() -> None:
    stream, held = secure_stream(), []

    def twice() -> NDArray[np.intp]:
        if held:
            return held.pop()
        held.append(draw_batch(mechanism(RATE), RECORDS, stream))
        return held[0]

    assert "successive batches" in faults(drawn_by(twice), RATE)


def same_batches(first: RandomStream, second: RandomStream) -> bool:
    """Whether two sites draw alike; the chance for independent sites is below ALPHA."""
    draw = mechanism(0.5)
    return all(np.array_equal(draw_batch(draw, RECORDS, first), draw_batch(draw, RECORDS, second)) for _ in range(3))


def test_two_sites_draw_different_batches_and_one_key_at_both_is_noticed() -> None:
    assert not same_batches(secure_stream(), secure_stream())
    assert not same_batches(reproducible_stream(1, "site-1", 1), reproducible_stream(1, "site-2", 1))
    assert same_batches(reproducible_stream(1, "site-1", 1), reproducible_stream(1, "site-1", 1))


def test_a_record_more_changes_no_other_records_chance() -> None:
    for number in range(50):
        fewer = draw_batch(mechanism(RATE), RECORDS, reproducible_stream(number, "a", 1))
        more = draw_batch(mechanism(RATE), RECORDS + 1, reproducible_stream(number, "a", 1))
        assert np.array_equal(fewer, more[more < RECORDS])


class FixedBits(RandomStream):
    """A stream whose words are given: to look at the edge of the rule itself."""

    def __init__(self, words: list[int]) -> None:
        self._words = np.array(words, dtype=np.uint64)

    def uniform_bits(self, count: int) -> NDArray[np.uint64]:
        return self._words[:count]


@pytest.mark.parametrize("rate", [0.1, 1 / 3, 0.5, 2**-40, 1 - 2**-53])
def test_the_chance_is_never_above_the_rate_and_at_most_a_hair_below(rate: float) -> None:
    from fractions import Fraction

    # A word below the threshold is in; find the threshold by asking for the words around it.
    edge = int(Fraction(rate) * 2**64)
    words = [word for word in range(edge - 2, edge + 3) if 0 <= word < 2**64]
    taken = draw_batch(mechanism(rate), len(words), FixedBits(words))
    threshold = words[0] + len(taken)
    assert list(taken) == list(range(len(taken)))
    assert 0 <= Fraction(rate) - Fraction(threshold, 2**64) < Fraction(1, 2**63)


def test_no_records_are_an_empty_batch() -> None:
    for rate in (RATE, 1.0):
        assert draw_batch(mechanism(rate), 0, secure_stream()).tolist() == []


def test_a_batch_may_be_empty() -> None:
    assert draw_batch(mechanism(1e-12), 1000, reproducible_stream(1, "a", 1)).tolist() == []


def test_probability_one_takes_every_record() -> None:
    assert draw_batch(mechanism(1.0), 7, secure_stream()).tolist() == list(range(7))
