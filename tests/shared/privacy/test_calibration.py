"""Noise for a budget, and steps for a budget: each meets it, and no more would."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.shared.errors import PrivacyError
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.calibration import MAX_NOISE_MULTIPLIER, MAX_STEPS, calibrate_noise, calibrate_steps
from cotune.shared.privacy.event import DpSgdEvent, Event, NonPrivateEvent, TruncatedDpSgdEvent
from cotune.shared.privacy.mechanism import MIN_NOISE_MULTIPLIER

REFERENCE = json.loads((Path(__file__).parents[2] / "vectors" / "accounting.json").read_text(encoding="utf-8"))
VECTORS: dict[str, dict[str, Any]] = {vector["id"]: vector for vector in REFERENCE["vectors"]}


def event(q: float, noise: float, steps: int) -> DpSgdEvent:
    return DpSgdEvent(sampling_probability=q, noise_multiplier=noise, steps=steps)


def of_noise(q: float, steps: int) -> Callable[[float], Event]:
    return lambda noise: event(q, noise, steps)


def of_steps(q: float, noise: float) -> Callable[[int], Event]:
    return lambda steps: event(q, noise, steps)


def capped(noise: float, steps: int) -> TruncatedDpSgdEvent:
    return TruncatedDpSgdEvent(
        sampling_probability=0.5, noise_multiplier=noise, steps=steps, max_batch_size=26, population=40
    )


# Noise


@pytest.mark.parametrize(
    ("q", "steps", "target", "delta"),
    [
        (0.5, 8, 1.0, 1e-4),
        (1.0, 4, 0.1, 1e-5),
        pytest.param(0.1, 100, 4.0, 1e-5, marks=pytest.mark.slow),
        pytest.param(0.02, 600, 1.0, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_calibrated_noise_meets_the_target_and_a_tenth_of_a_percent_less_does_not(
    q: float, steps: int, target: float, delta: float
) -> None:
    noise = calibrate_noise(of_noise(q, steps), target_epsilon=target, delta=delta)
    assert 0.995 * target <= epsilon([event(q, noise, steps)], delta) <= target
    assert epsilon([event(q, noise * (1 - 1e-3), steps)], delta) > target


@pytest.mark.slow
@pytest.mark.parametrize("name", ["V08", "V10", "V14"])
def test_calibration_finds_the_noise_a_reference_epsilon_was_computed_from(name: str) -> None:
    vector = VECTORS[name]
    noise = calibrate_noise(
        of_noise(vector["q"], vector["steps"]),
        target_epsilon=vector["eps"]["dp_accounting_pld"],
        delta=vector["delta"],
    )
    assert noise == pytest.approx(vector["sigma"], rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(target=st.floats(0.5, 30.0), steps=st.integers(1, 200), exponent=st.floats(2, 6))
def test_noise_for_a_budget_costs_that_budget_without_sampling(target: float, steps: int, exponent: float) -> None:
    delta = 10**-exponent
    noise = calibrate_noise(of_noise(1.0, steps), target_epsilon=target, delta=delta)
    assert epsilon([event(1.0, noise, steps)], delta) <= target
    assert noise == MIN_NOISE_MULTIPLIER or epsilon([event(1.0, noise * (1 - 1e-3), steps)], delta) > target


def test_what_is_spent_already_leaves_less_and_asks_for_more_noise() -> None:
    spent: list[Event] = [event(1.0, 5.0, 2), event(1.0, 9.0, 3)]
    fresh = calibrate_noise(of_noise(1.0, 4), target_epsilon=3.0, delta=1e-5)
    noise = calibrate_noise(of_noise(1.0, 4), target_epsilon=3.0, delta=1e-5, spent=iter(spent))
    assert noise > fresh
    assert 2.99 <= epsilon([*spent, event(1.0, noise, 4)], 1e-5) <= 3.0


def test_noise_is_calibrated_for_an_event_with_a_cap() -> None:
    noise = calibrate_noise(lambda noise: capped(noise, 8), target_epsilon=0.5, delta=1e-4)
    assert 0.49 <= epsilon([capped(noise, 8)], 1e-4) <= 0.5
    assert noise > calibrate_noise(of_noise(0.5, 8), target_epsilon=0.5, delta=1e-4)


@pytest.mark.slow
def test_a_very_loose_target_gets_noise_at_the_floor_and_still_keeps_it() -> None:
    noise = calibrate_noise(of_noise(0.02, 1), target_epsilon=60.0, delta=1e-3)
    assert noise == MIN_NOISE_MULTIPLIER
    assert epsilon([event(0.02, noise, 1)], 1e-3) <= 60.0


@pytest.mark.parametrize(
    ("target", "spent"),
    [(0.01, []), (0.0, []), (-1.0, []), (1.0, [event(1.0, 1.0, 1)]), (8.0, [NonPrivateEvent()])],
    ids=["too small", "zero", "negative", "spent", "open"],
)
def test_an_impossible_budget_is_an_error_that_names_the_setting_and_the_way_out(
    target: float, spent: list[Event]
) -> None:
    with pytest.raises(PrivacyError) as caught:
        calibrate_noise(of_noise(1.0, 10_000), target_epsilon=target, delta=1e-6, spent=spent)
    assert (caught.value.code, caught.value.param) == ("E-BUDGET-IMPOSSIBLE", "privacy.epsilon")
    assert "privacy.epsilon" in str(caught.value.hint)


def test_a_target_just_within_reach_is_met_at_the_largest_noise() -> None:
    target = epsilon([event(1.0, MAX_NOISE_MULTIPLIER, 100)], 1e-6)
    noise = calibrate_noise(of_noise(1.0, 100), target_epsilon=target, delta=1e-6)
    assert noise == pytest.approx(MAX_NOISE_MULTIPLIER, rel=1e-3)
    assert epsilon([event(1.0, noise, 100)], 1e-6) <= target


# Steps


@settings(max_examples=40, deadline=None)
@given(noise=st.floats(2.0, 100.0), target=st.floats(0.1, 8.0), exponent=st.floats(2, 9))
def test_so_many_steps_fit_a_budget_and_one_more_does_not(noise: float, target: float, exponent: float) -> None:
    delta = 10**-exponent
    steps = calibrate_steps(of_steps(1.0, noise), target_epsilon=target, delta=delta)
    assert epsilon([event(1.0, noise, steps)], delta) <= target < epsilon([event(1.0, noise, steps + 1)], delta)


def test_steps_and_noise_are_each_others_inverse() -> None:
    for wanted in (1, 7, 64, 1000):
        noise = calibrate_noise(of_noise(1.0, wanted), target_epsilon=2.0, delta=1e-5)
        assert calibrate_steps(of_steps(1.0, noise), target_epsilon=2.0, delta=1e-5) == wanted


@pytest.mark.parametrize("one", [of_steps(0.4, 8.0), lambda steps: capped(12.0, steps)], ids=["sampled", "with a cap"])
def test_the_boundary_is_exact_with_sampling_too(one: Callable[[int], Event]) -> None:
    steps = calibrate_steps(one, target_epsilon=0.5, delta=1e-4)
    assert steps > 1
    assert epsilon([one(steps)], 1e-4) <= 0.5 < epsilon([one(steps + 1)], 1e-4)


def test_a_target_that_one_event_costs_allows_just_its_steps() -> None:
    target = epsilon([event(1.0, 10.0, 29)], 1e-5)
    assert calibrate_steps(of_steps(1.0, 10.0), target_epsilon=target, delta=1e-5) == 29
    assert calibrate_steps(of_steps(1.0, 10.0), target_epsilon=math.nextafter(target, 0), delta=1e-5) == 28


def test_what_is_spent_already_leaves_fewer_steps_and_in_the_end_none() -> None:
    fresh = calibrate_steps(of_steps(1.0, 10.0), target_epsilon=2.0, delta=1e-5)
    left = calibrate_steps(of_steps(1.0, 10.0), target_epsilon=2.0, delta=1e-5, spent=iter([event(1.0, 10.0, 9)]))
    assert left == fresh - 9
    spent = [event(1.0, 10.0, fresh)]
    assert calibrate_steps(of_steps(1.0, 10.0), target_epsilon=2.0, delta=1e-5, spent=spent) == 0
    assert calibrate_steps(of_steps(1.0, 10.0), target_epsilon=2.0, delta=1e-5, spent=[event(1.0, 1.0, 1)]) == 0


@pytest.mark.parametrize("target", [0.0, -1.0, 1e-6])
def test_a_target_that_not_even_one_step_fits_allows_none(target: float) -> None:
    assert calibrate_steps(of_steps(1.0, 2.0), target_epsilon=target, delta=1e-5) == 0


def test_events_without_a_guarantee_are_allowed_no_step() -> None:
    assert calibrate_steps(lambda _: NonPrivateEvent(), target_epsilon=8.0, delta=1e-5) == 0
    opened = [NonPrivateEvent()]
    assert calibrate_steps(of_steps(1.0, 10.0), target_epsilon=8.0, delta=1e-5, spent=opened) == 0


def test_nobody_looks_beyond_a_million_steps() -> None:
    assert calibrate_steps(of_steps(1.0, 1e6), target_epsilon=8.0, delta=1e-5) == MAX_STEPS == 1_000_000


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_a_delta_outside_0_and_1_is_refused(delta: float) -> None:
    for solve in (
        lambda: calibrate_noise(of_noise(1.0, 1), target_epsilon=1.0, delta=delta),
        lambda: calibrate_steps(of_steps(1.0, 1.0), target_epsilon=1.0, delta=delta),
    ):
        with pytest.raises(PrivacyError) as caught:
            solve()
        assert caught.value.code == "E-DELTA"
