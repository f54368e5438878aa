"""The rule by which batches are drawn, word for word; its law is in tests/statistical."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from cotune.client.randomness import RandomStream, reproducible_stream, secure_stream
from cotune.client.sampling import draw_batch
from cotune.shared.privacy.mechanism import Mechanism

UNITS, RATE = 40, 0.25


def mechanism(rate: float, cap: int | None = None, population: int | None = None) -> Mechanism:
    return Mechanism(
        sampling_probability=rate,
        expected_batch_size=1,
        clipping_norm=1.0,
        noise_multiplier=1.0,
        max_batch_size=cap,
        population=population,
    )


class FixedBits(RandomStream):
    """A stream whose words are given: to look at the edge of the rule itself."""

    def __init__(self, words: Sequence[int]) -> None:
        self._words = np.array(words, dtype=np.uint64)

    def uniform_bits(self, count: int) -> NDArray[np.uint64]:
        given, self._words = self._words[:count], self._words[count:]
        assert len(given) == count
        return given


def part(share: float) -> int:
    """The word at this share of all."""
    return int(share * 2**64)


@pytest.mark.parametrize("rate", [0.1, 1 / 3, 0.5, 0.7, 2**-40, 2**-70, 1 - 2**-53])
def test_the_chance_is_never_above_the_rate_and_at_most_a_hair_below(rate: float) -> None:
    # A word below the threshold is in; find the threshold by asking for the words around it.
    edge = int(Fraction(rate) * 2**64)
    words = [word for word in range(edge - 2, edge + 3) if 0 <= word < 2**64]
    taken = draw_batch(mechanism(rate), len(words), FixedBits(words))
    threshold = words[0] + len(taken)
    assert list(taken) == list(range(len(taken)))
    assert 0 <= Fraction(rate) - Fraction(threshold, 2**64) < Fraction(1, 2**63)


def test_a_unit_is_in_by_its_own_word_alone() -> None:
    words = [part(share) for share in (0.1, 0.9, 0.2, 0.3, 0.24)]
    assert draw_batch(mechanism(RATE), 5, FixedBits(words)).tolist() == [0, 2, 4]
    words[0] = part(0.5)
    assert draw_batch(mechanism(RATE), 5, FixedBits(words)).tolist() == [2, 4]


def test_a_batch_is_in_ascending_order_and_each_unit_at_most_once_in_it() -> None:
    for drawn in (mechanism(RATE), mechanism(RATE, 7, UNITS)):
        batch = draw_batch(drawn, UNITS, secure_stream()).tolist()
        assert batch == sorted(set(batch))


def test_a_unit_more_changes_no_other_units_chance() -> None:
    for number in range(50):
        fewer = draw_batch(mechanism(RATE), UNITS, reproducible_stream(number, "a", 1))
        more = draw_batch(mechanism(RATE), UNITS + 1, reproducible_stream(number, "a", 1))
        assert np.array_equal(fewer, more[more < UNITS])


def test_with_a_cap_a_unit_replaced_by_nothing_changes_no_other_units_chance() -> None:
    capped = mechanism(RATE, 8, UNITS)
    for number in range(200):
        fewer = draw_batch(capped, UNITS - 1, reproducible_stream(number, "a", 1))
        whole = draw_batch(capped, UNITS, reproducible_stream(number, "a", 1))
        assert np.array_equal(fewer, whole[whole < UNITS - 1])


def test_no_records_are_an_empty_batch() -> None:
    for drawn in (mechanism(RATE), mechanism(1.0), mechanism(RATE, 3, 9), mechanism(1.0, 3, 9)):
        assert draw_batch(drawn, 0, secure_stream()).tolist() == []


def test_a_batch_may_be_empty() -> None:
    assert draw_batch(mechanism(1e-12), 1000, reproducible_stream(1, "a", 1)).tolist() == []
    assert draw_batch(mechanism(1e-12, 5, 1000), 1000, reproducible_stream(1, "a", 1)).tolist() == []


def test_probability_one_takes_every_unit() -> None:
    assert draw_batch(mechanism(1.0), 7, secure_stream()).tolist() == list(range(7))
    assert draw_batch(mechanism(1.0, 9, 9), 7, secure_stream()).tolist() == list(range(7))


def test_probability_one_with_a_cap_takes_as_many_as_the_cap_allows() -> None:
    batches = {tuple(draw_batch(mechanism(1.0, 3, 7), 7, secure_stream())) for _ in range(200)}
    assert {len(batch) for batch in batches} == {3}
    assert len(batches) > 20, "another part each time"


def test_a_draw_above_the_cap_keeps_those_with_the_lowest_second_words() -> None:
    first = [part(share) for share in (0.1, 0.1, 0.9, 0.1, 0.1)]
    second = [part(share) for share in (0.8, 0.2, 0.6, 0.4)]
    assert draw_batch(mechanism(RATE, 2, 5), 5, FixedBits(first + second)).tolist() == [1, 4]


def test_a_draw_of_the_cap_is_kept_whole_and_needs_no_second_words() -> None:
    words = [part(share) for share in (0.1, 0.9, 0.9, 0.1, 0.9)]
    assert draw_batch(mechanism(RATE, 2, 5), 5, FixedBits(words)).tolist() == [0, 3]


def test_places_nobody_takes_can_be_drawn_and_count_for_the_cap() -> None:
    first = [part(share) for share in (0.1, 0.9, 0.1, 0.1)]
    second = [part(share) for share in (0.9, 0.1, 0.2)]
    assert draw_batch(mechanism(RATE, 2, 4), 2, FixedBits(first + second)).tolist() == []


def test_units_beyond_the_population_are_never_drawn() -> None:
    for _ in range(100):
        assert draw_batch(mechanism(1.0, 5, 5), 50, secure_stream()).tolist() == [0, 1, 2, 3, 4]
        assert all(draw_batch(mechanism(0.9, 4, 5), 50, secure_stream()) < 5)


def test_the_same_test_stream_gives_the_same_batches_and_a_secure_one_never() -> None:
    def batches(stream: RandomStream) -> list[list[int]]:
        return [draw_batch(mechanism(0.5, 15, UNITS), UNITS, stream).tolist() for _ in range(5)]

    assert batches(reproducible_stream(1, "a", 1)) == batches(reproducible_stream(1, "a", 1))
    assert batches(reproducible_stream(1, "a", 1)) != batches(reproducible_stream(1, "a", 2))
    assert batches(secure_stream()) != batches(secure_stream())
