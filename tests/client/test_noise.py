"""How noise joins a step's sums, number for number; its law is in tests/statistical."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from cotune.client.clipping import ClippedSum
from cotune.client.noise import Noise, draw_noise, privatise
from cotune.client.randomness import reproducible_stream, secure_stream
from cotune.shared.privacy.mechanism import LOSS_BOUND, Mechanism

MECHANISM = Mechanism(sampling_probability=0.25, expected_batch_size=16, clipping_norm=0.7, noise_multiplier=1.3)
SIDES = replace(MECHANISM, adaptive=True, metrics=True)
OPEN = replace(MECHANISM, private=False)
SILENT = Noise(np.zeros(5), 0.0, 0.0)
SUMS = ClippedSum(np.array([100.0, -50.0, 0.0, 1e-3, 8.0]), 3.5, -2.25)


def test_every_coordinate_gets_its_own_noise_times_the_accounted_deviation_over_the_public_batch() -> None:
    noise = Noise(np.array([1.0, -2.0, 0.5, 0.0, 3.0]), 9.0, 9.0)
    released = privatise(SUMS, MECHANISM, noise)
    wanted = (SUMS.gradient + 1.3 * 0.7 * noise.gradient) / 16
    np.testing.assert_array_equal(released.gradient, wanted.astype(np.float32))
    assert released.gradient.dtype == np.float32


def test_with_side_sums_the_gradients_noise_is_the_raised_one() -> None:
    noise = Noise(np.ones(5), 0.0, 0.0)
    released = privatise(ClippedSum.zero(5), SIDES, noise)
    raised = (1.3**-2 - 2 * SIDES.side_noise_multiplier**-2) ** -0.5
    np.testing.assert_allclose(released.gradient, np.full(5, raised * 0.7 / 16), rtol=1e-6)
    assert raised > 1.3


@pytest.mark.parametrize("units", [1, 10, 16])
def test_the_share_below_the_norm_is_exact_for_a_batch_of_the_expected_size(units: int) -> None:
    """Each unit adds half, or takes half away; of 16 units `units` are below."""
    sums = ClippedSum(np.zeros(5), units / 2 - (16 - units) / 2, 0.0)
    assert privatise(sums, SIDES, SILENT).below == pytest.approx(units / 16)


def test_the_loss_is_exact_for_a_batch_of_the_expected_size() -> None:
    losses = np.linspace(0.0, LOSS_BOUND, 16)
    sums = ClippedSum(np.zeros(5), 0.0, float((losses / (LOSS_BOUND / 2) - 1).sum()))
    assert privatise(sums, SIDES, SILENT).loss == pytest.approx(losses.mean())


def test_the_noise_of_a_side_sum_is_its_multiplier_over_a_sensitivity_of_one() -> None:
    quiet, loud = (privatise(SUMS, SIDES, replace(SILENT, below=z, loss=z)) for z in (0.0, 2.0))
    added = 2.0 * SIDES.side_noise_multiplier
    assert (loud.below or 0) - (quiet.below or 0) == pytest.approx(added / (2 * 16))
    assert (loud.loss or 0) - (quiet.loss or 0) == pytest.approx(added / 16 * LOSS_BOUND / 2)


def test_side_sums_nobody_asked_for_are_not_released() -> None:
    assert (privatise(SUMS, MECHANISM, SILENT).below, privatise(SUMS, MECHANISM, SILENT).loss) == (None, None)
    assert privatise(SUMS, replace(MECHANISM, adaptive=True), SILENT).loss is None
    assert privatise(SUMS, replace(MECHANISM, metrics=True), SILENT).below is None


def test_an_empty_batch_releases_noise_alone() -> None:
    noise = draw_noise(SIDES, 5, secure_stream())
    released = privatise(ClippedSum.zero(5), SIDES, noise)
    wanted = SIDES.noise_standard_deviation * noise.gradient / 16
    np.testing.assert_array_equal(released.gradient, wanted.astype(np.float32))
    assert released.below == pytest.approx(0.5 + SIDES.side_noise_multiplier * noise.below / 32)


def test_every_number_of_a_steps_noise_is_another_one_of_the_stream() -> None:
    noise = draw_noise(MECHANISM, 5, reproducible_stream(1, "a", 1))
    stream = reproducible_stream(1, "a", 1).normal(7).tolist()
    assert [*noise.gradient, noise.below, noise.loss] == stream
    assert len(set(stream)) == 7


def test_two_steps_of_a_stream_and_two_secure_streams_share_no_number() -> None:
    stream = secure_stream()
    drawn = [draw_noise(MECHANISM, 500, source).gradient for source in (stream, stream, secure_stream())]
    assert len(np.unique(np.concatenate(drawn))) == 1500


def test_the_same_test_stream_gives_the_same_noise() -> None:
    one, other = (draw_noise(MECHANISM, 100, reproducible_stream(3, "site-1", 2)) for _ in range(2))
    assert np.array_equal(one.gradient, other.gradient)
    assert (one.below, one.loss) == (other.below, other.loss)


def test_the_mean_over_many_releases_is_the_sum_over_the_expected_batch_size() -> None:
    stream = secure_stream()
    releases = np.array([privatise(SUMS, MECHANISM, draw_noise(MECHANISM, 5, stream)).gradient for _ in range(4000)])
    error = MECHANISM.noise_standard_deviation / 16 / math.sqrt(4000)
    assert np.abs(releases.mean(0, dtype=np.float64) - SUMS.gradient / 16).max() < 6 * error  # one in 10**8


def test_without_privacy_no_noise_is_drawn_or_added() -> None:
    stream, untouched = reproducible_stream(1, "a", 1), reproducible_stream(1, "a", 1)
    noise = draw_noise(OPEN, 5, stream)
    assert (noise.gradient.tolist(), noise.below, noise.loss) == ([0.0] * 5, 0.0, 0.0)
    assert np.array_equal(stream.normal(3), untouched.normal(3))
    loud = Noise(np.ones(5), 1.0, 1.0)
    assert np.array_equal(privatise(SUMS, OPEN, loud).gradient, (SUMS.gradient / 16).astype(np.float32))


def test_the_sum_itself_is_left_as_it_was() -> None:
    before = SUMS.gradient.copy()
    privatise(SUMS, MECHANISM, draw_noise(MECHANISM, 5, secure_stream()))
    assert np.array_equal(before, SUMS.gradient)


@pytest.mark.parametrize("size", [0, 1, 5, 4096])
def test_the_result_has_the_size_of_the_sum(size: int) -> None:
    noise = draw_noise(MECHANISM, size, secure_stream())
    assert privatise(ClippedSum.zero(size), MECHANISM, noise).gradient.shape == (size,)


def test_noise_is_never_shown() -> None:
    noise = draw_noise(MECHANISM, 3, secure_stream())
    assert str(noise.below) not in repr(noise)
    assert repr(noise).startswith("<cotune.client.noise.Noise object at 0x")
