"""The random stream: a published test vector, uniform bits, normal numbers, keys that never meet.

Statistical tests use fixed sample sizes and ALPHA, the chance of a false alarm of each check of a secret
stream; checks of a fixed key always give the same answer.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cotune.client.randomness import RandomStream, reproducible_stream, secure_stream

ALPHA = 1e-6
COUNT = 200_000
Numbers = NDArray[np.float64]


def looks_standard_normal(draws: Numbers) -> bool:
    """Kolmogorov-Smirnov on the law, chi-square on the variance, z on the mean: each at ALPHA / 3."""
    n, level = len(draws), ALPHA / 3
    law = stats.kstest(draws, "norm").pvalue
    spread = stats.chi2.cdf(float(np.square(draws).sum()), n)
    centre = 2 * stats.norm.sf(abs(draws.mean()) * math.sqrt(n))
    return bool(law > level and 2 * min(spread, 1 - spread) > level and centre > level)


def looks_independent(first: Numbers, second: Numbers) -> bool:
    """No correlation between two streams' draws, nor between their squares, nor one draw in common."""
    n, level = len(first), ALPHA / 2
    pairs = ((first, second), (np.square(first), np.square(second)))
    scores = [abs(float(np.corrcoef(a, b)[0, 1])) * math.sqrt(n) for a, b in pairs]
    return all(2 * stats.norm.sf(score) > level for score in scores) and not np.intersect1d(first, second).size


def looks_uniform(words: NDArray[np.uint64]) -> bool:
    """Each of the 64 bits is set half of the time: binomial, at ALPHA over all 64."""
    ones = [int(((words >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(64)]
    return all(stats.binomtest(count, len(words)).pvalue > ALPHA / 64 for count in ones)


def test_the_stream_is_chacha20_as_published() -> None:
    # RFC 8439, appendix A.1, test vector 1: zero key, zero nonce, counter 0.
    block = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert RandomStream(b"\0" * 32).uniform_bits(4).tobytes() == block


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="key"):
        RandomStream(b"\0" * 16 + b"\0")


def test_secret_bits_are_uniform() -> None:
    assert looks_uniform(secure_stream().uniform_bits(COUNT))


@pytest.mark.parametrize(
    "fault",
    [lambda words: words >> np.uint64(1), lambda words: words | np.uint64(4), lambda words: words & words[::-1]],
    ids=["top bit never set", "one bit always set", "bits set a quarter of the time"],
)
def test_the_uniformity_check_notices_a_planted_fault(fault: object) -> None:
    words = secure_stream().uniform_bits(COUNT)
    assert not looks_uniform(fault(words))  # pyright: ignore[reportCallIssue]


def test_secret_normal_numbers_are_standard_normal() -> None:
    assert looks_standard_normal(secure_stream().normal(COUNT))


@pytest.mark.parametrize(
    "fault",
    [
        lambda draws: draws / 2,
        lambda draws: draws * 2,
        lambda draws: draws * 1.02,
        lambda draws: draws + 0.02,
        lambda draws: np.clip(draws, -3, 3) * (1 / np.std(np.clip(draws, -3, 3))) - 0.05,
        lambda draws: np.sign(draws) * np.sqrt(np.abs(draws)),
    ],
    ids=["halved", "doubled", "2 % too wide", "shifted", "cut at 3 and shifted", "another law"],
)
def test_the_normal_check_notices_a_planted_fault(fault: object) -> None:
    draws = secure_stream().normal(COUNT)
    assert not looks_standard_normal(fault(draws))  # pyright: ignore[reportCallIssue]


def test_the_tails_of_the_normal_numbers_are_there_and_finite() -> None:
    draws = secure_stream().normal(1_000_000)
    assert np.isfinite(draws).all()
    for bound in (3.0, 4.0):
        expected = 2 * stats.norm.sf(bound)
        assert stats.binomtest(int((abs(draws) > bound).sum()), len(draws), expected).pvalue > ALPHA


def test_neighbouring_draws_and_both_halves_of_a_pair_are_uncorrelated() -> None:
    draws = secure_stream().normal(COUNT)
    assert looks_independent(draws[:-1:2], draws[1::2])
    assert looks_independent(draws[: COUNT // 2], draws[COUNT // 2 :])


def test_two_secret_streams_never_repeat_or_follow_each_other() -> None:
    streams = [secure_stream().normal(50_000) for _ in range(4)]
    assert all(looks_independent(a, b) for a, b in combinations(streams, 2))


def test_two_sites_rounds_and_seeds_have_uncorrelated_test_streams() -> None:
    keys = [(3, "site-1", 1), (3, "site-2", 1), (3, "site-1", 2), (4, "site-1", 1), (3, "site-11", 1)]
    streams = [reproducible_stream(*key).normal(50_000) for key in keys]
    assert all(looks_independent(a, b) for a, b in combinations(streams, 2))


def test_the_independence_check_notices_one_key_at_two_sites() -> None:
    first, second = (reproducible_stream(3, "site-1", 1).normal(50_000) for _ in range(2))
    assert not looks_independent(first, second)
    other = reproducible_stream(3, "site-2", 1).normal(50_000)
    assert not looks_independent(first, 0.05 * first + other)
    assert not looks_independent(first, np.abs(first) * np.sign(other) + 1e-9)


def test_a_test_stream_is_the_same_for_the_same_seed_site_and_round() -> None:
    first, second = (reproducible_stream(3, "site-1", 2) for _ in range(2))
    assert np.array_equal(first.normal(1001), second.normal(1001))
    assert np.array_equal(first.uniform_bits(9), second.uniform_bits(9))


def test_drawing_in_pieces_continues_the_stream() -> None:
    whole, pieces = (reproducible_stream(3, "site-1", 2) for _ in range(2))
    parts = [pieces.uniform_bits(count) for count in (1, 0, 7, 100)]
    assert np.array_equal(whole.uniform_bits(108), np.concatenate(parts))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000, 1001])
def test_as_many_numbers_come_as_were_asked_for(count: int) -> None:
    stream = secure_stream()
    assert stream.uniform_bits(count).shape == stream.normal(count).shape == (count,)
    assert stream.normal(count).dtype == np.float64


def test_no_global_generator_matters_or_is_moved() -> None:
    import random

    import torch

    np.random.seed(1)
    random.seed(1)
    torch.manual_seed(1)
    before = (np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist())  # pyright: ignore
    first = secure_stream().normal(1000)
    test = reproducible_stream(1, "a", 1).normal(1000)
    after = (np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist())  # pyright: ignore
    assert before == after
    np.random.seed(1)
    random.seed(1)
    torch.manual_seed(1)
    assert not np.array_equal(first, secure_stream().normal(1000))
    assert np.array_equal(test, reproducible_stream(1, "a", 1).normal(1000))


def test_a_secret_key_is_not_readable_from_the_stream() -> None:
    stream = secure_stream()
    held = [value for value in vars(stream).values() if isinstance(value, bytes | bytearray)]
    assert held == []
    assert repr(stream).startswith("<cotune.client.randomness.RandomStream object at 0x")


def test_a_normal_number_is_half_the_sum_of_four_box_muller_draws() -> None:
    words = reproducible_stream(3, "site-1", 2).uniform_bits(9)
    pairs = (words[:8].reshape(4, 2) >> np.uint64(11)).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log((pairs[:, 0] + 1) / 2**53)), 2 * np.pi * pairs[:, 1] / 2**53
    stream = reproducible_stream(3, "site-1", 2)
    wanted = [(radius * np.cos(angle)).sum() / 2, (radius * np.sin(angle)).sum() / 2]
    np.testing.assert_allclose(stream.normal(2), wanted, rtol=1e-12)
    assert stream.uniform_bits(1)[0] == words[8], "eight words make two numbers"
