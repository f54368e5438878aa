"""The noise that is added is the noise that is accounted. False alarms of each check: ALPHA at SIZE."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cotune.client.noise import privatise
from cotune.client.randomness import reproducible_stream, secure_stream
from cotune.shared.privacy.mechanism import Mechanism

ALPHA = 1e-6
SIZE = 100_000
GOOD: dict[str, Any] = {
    "sampling_probability": 0.25,
    "expected_batch_size": 16,
    "clipping_norm": 0.7,
    "noise_multiplier": 1.3,
}
MECHANISM = Mechanism(**GOOD)


def has_the_accounted_noise(
    released: NDArray[np.float32], clipped_sum: NDArray[np.float64], mechanism: Mechanism
) -> bool:
    """Whether a release is its sum over the public batch size with noise of the accounted law."""
    noise = released.astype(np.float64) * mechanism.expected_batch_size - clipped_sum
    scaled = noise / (mechanism.noise_multiplier * mechanism.clipping_norm)
    n, level = len(scaled), ALPHA / 3
    law = stats.kstest(scaled, "norm").pvalue
    spread = stats.chi2.cdf(float(np.square(scaled).sum()), n)
    centre = 2 * stats.norm.sf(abs(scaled.mean()) * math.sqrt(n))
    return bool(law > level and 2 * min(spread, 1 - spread) > level and centre > level)


def shares_no_noise(first: NDArray[np.float32], second: NDArray[np.float32]) -> bool:
    """Whether two releases of the same sum are uncorrelated."""
    score = abs(float(np.corrcoef(first, second)[0, 1])) * math.sqrt(len(first))
    return bool(2 * stats.norm.sf(score) > ALPHA)


@pytest.fixture
def clipped_sum() -> NDArray[np.float64]:
    return np.random.default_rng(3).normal(size=SIZE) * 0.01


def test_a_release_has_exactly_the_accounted_noise(clipped_sum: NDArray[np.float64]) -> None:
    released = privatise(clipped_sum, MECHANISM, secure_stream())
    assert has_the_accounted_noise(released, clipped_sum, MECHANISM)
    assert released.dtype == np.float32
    assert released.shape == clipped_sum.shape


def test_an_empty_batch_releases_noise_alone_of_the_same_law() -> None:
    nothing = np.zeros(SIZE)
    released = privatise(nothing, MECHANISM, secure_stream())
    assert has_the_accounted_noise(released, nothing, MECHANISM)


@pytest.mark.parametrize("factor", [0.5, 2.0, 0.97, 1.03])
def test_too_little_or_too_much_noise_is_noticed(factor: float, clipped_sum: NDArray[np.float64]) -> None:
    faulty = Mechanism(**{**GOOD, "noise_multiplier": GOOD["noise_multiplier"] * factor})
    released = privatise(clipped_sum, faulty, secure_stream())
    assert not has_the_accounted_noise(released, clipped_sum, MECHANISM)


def test_noise_added_twice_or_not_at_all_is_noticed(clipped_sum: NDArray[np.float64]) -> None:
    once = privatise(clipped_sum, MECHANISM, secure_stream())
    twice = privatise(once.astype(np.float64) * 16, MECHANISM, secure_stream())
    assert not has_the_accounted_noise(twice, clipped_sum, MECHANISM)
    bare = (clipped_sum / 16).astype(np.float32)
    assert not has_the_accounted_noise(bare, clipped_sum, MECHANISM)


def test_dividing_by_the_batch_that_was_drawn_is_noticed(clipped_sum: NDArray[np.float64]) -> None:
    released = privatise(clipped_sum, MECHANISM, secure_stream()) * np.float32(16 / 13)
    assert not has_the_accounted_noise(released, clipped_sum, MECHANISM)


def test_noise_that_scales_with_the_batch_is_noticed() -> None:
    full = np.full(SIZE, 5.0)
    released = privatise(full, MECHANISM, secure_stream()) * np.float32(1.05)
    assert not has_the_accounted_noise(released, full, MECHANISM)


def test_two_sites_and_two_steps_share_no_noise_and_one_key_at_both_is_noticed(
    clipped_sum: NDArray[np.float64],
) -> None:
    nothing = np.zeros(SIZE)
    stream = secure_stream()
    first, second = (privatise(nothing, MECHANISM, stream) for _ in range(2))
    other = privatise(nothing, MECHANISM, secure_stream())
    assert shares_no_noise(first, second)
    assert shares_no_noise(first, other)
    tests = [privatise(nothing, MECHANISM, reproducible_stream(1, s, 1)) for s in ("site-1", "site-2", "site-1")]
    assert shares_no_noise(tests[0], tests[1])
    assert not shares_no_noise(tests[0], tests[2])


def test_the_mean_over_many_releases_is_the_sum_over_the_expected_batch_size() -> None:
    clipped_sum = np.array([100.0, -50.0, 0.0])
    stream = secure_stream()
    releases = np.array([privatise(clipped_sum, MECHANISM, stream) for _ in range(4000)], dtype=np.float64)
    error = MECHANISM.noise_standard_deviation / 16 / math.sqrt(4000)
    score = np.abs(releases.mean(0) - clipped_sum / 16) / error
    assert 3 * 2 * stats.norm.sf(score.max()) > ALPHA


def test_without_privacy_no_noise_is_added(clipped_sum: NDArray[np.float64]) -> None:
    bare = Mechanism(**{**GOOD, "private": False})
    released = privatise(clipped_sum, bare, secure_stream())
    assert np.array_equal(released, (clipped_sum / 16).astype(np.float32))


def test_the_sum_itself_is_left_as_it_was(clipped_sum: NDArray[np.float64]) -> None:
    before = clipped_sum.copy()
    privatise(clipped_sum, MECHANISM, secure_stream())
    assert np.array_equal(before, clipped_sum)


@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (4, 3), (4, 1)], ids=str)
def test_the_result_has_the_shape_of_the_sum(shape: tuple[int, ...]) -> None:
    assert privatise(np.zeros(shape), MECHANISM, secure_stream()).shape == shape
