"""The mean of updates: exact for B A, the same whatever the order of arrival."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.server.aggregation.mean import AGGREGATORS, Mean


def mean_of(updates: list[tuple[str, np.ndarray]]) -> np.ndarray:
    mean = Mean()
    for site, delta in updates:
        mean.add(site, delta)
    return mean.result()


def test_every_order_of_arrival_gives_the_same_bits() -> None:
    generator = np.random.default_rng(1)
    updates = [(f"site-{n}", (generator.standard_normal(50) * 10.0**n).astype(np.float32)) for n in range(-2, 3)]
    first = mean_of(updates)
    assert first.dtype == np.float32
    for order in itertools.permutations(updates):
        assert mean_of(list(order)).tobytes() == first.tobytes()


def test_the_mean_of_the_factors_b_is_the_mean_of_the_products_where_a_is_shared() -> None:
    generator = np.random.default_rng(2)
    out, rank, wide, sites = 24, 4, 32, 5
    a = np.linalg.qr(generator.standard_normal((wide, rank)))[0].T.astype(np.float32)
    factors = [generator.standard_normal((out, rank)).astype(np.float32) for _ in range(sites)]
    dense = np.mean([b.astype(np.float64) @ a.astype(np.float64) for b in factors], axis=0)
    joined = mean_of([(f"s{n}", b.ravel()) for n, b in enumerate(factors)]).reshape(out, rank)
    product = joined.astype(np.float64) @ a.astype(np.float64)
    assert np.abs(product - dense).max() <= 1e-6


def test_one_update_is_its_own_mean_and_equal_updates_theirs() -> None:
    delta = np.array([1 / 3, -2e-30, 1e30], dtype=np.float32)
    assert mean_of([("a", delta)]).tobytes() == delta.tobytes()
    assert mean_of([("a", delta), ("b", delta), ("c", delta)]).tobytes() == delta.tobytes()


def test_sums_do_not_overflow_or_cancel_in_single_precision() -> None:
    large = np.array([3e38], dtype=np.float32)
    assert mean_of([("a", large), ("b", large)])[0] == large[0]
    parts = [("a", [1e8]), ("b", [1.0]), ("c", [-1e8])]
    assert mean_of([(s, np.array(v, dtype=np.float32)) for s, v in parts])[0] == np.float32(1 / 3)


def test_an_update_that_was_counted_is_not_counted_again() -> None:
    mean = Mean()
    mean.add("a", np.ones(2, dtype=np.float32))
    with pytest.raises(ValueError, match="a was already counted"):
        mean.add("a", np.ones(2, dtype=np.float32))
    assert mean.result().tolist() == [1.0, 1.0]


def test_no_update_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no update"):
        Mean().result()


def test_updates_given_are_left_as_they_were() -> None:
    delta = np.ones(3, dtype=np.float32)
    result = mean_of([("a", delta)])
    result += 1
    assert delta.tolist() == [1.0, 1.0, 1.0]


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3), min_size=1, max_size=8))
def test_the_mean_lies_between_the_smallest_and_the_largest(values: list[list[float]]) -> None:
    arrays = np.array(values, dtype=np.float32)
    result = mean_of([(f"s{n}", row) for n, row in enumerate(arrays)])
    assert (result >= arrays.min(axis=0)).all()
    assert (result <= arrays.max(axis=0)).all()


def test_the_jobs_setting_names_it() -> None:
    assert list(AGGREGATORS.items()) == [("mean", Mean)]
