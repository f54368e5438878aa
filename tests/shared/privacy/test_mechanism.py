"""One object for what is done and what is accounted."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cotune.shared.errors import PrivacyError
from cotune.shared.privacy.event import DpSgdEvent, NonPrivateEvent
from cotune.shared.privacy.mechanism import Mechanism, mechanism_of

GOOD: dict[str, Any] = {
    "sampling_probability": 0.25,
    "expected_batch_size": 10,
    "clipping_norm": 0.5,
    "noise_multiplier": 3.0,
}


def test_the_noise_is_the_multiplier_times_the_sensitivity_which_is_the_clipping_norm() -> None:
    mechanism = Mechanism(**GOOD)
    assert mechanism.sensitivity == 0.5
    assert mechanism.noise_standard_deviation == 1.5
    assert mechanism.adjacency == "add-or-remove-one"


def test_steps_are_accounted_with_the_very_numbers_that_are_used() -> None:
    event = DpSgdEvent(sampling_probability=0.25, noise_multiplier=3.0, steps=4)
    assert Mechanism(**GOOD).event(4) == event


def test_clipping_norm_and_batch_size_change_no_cost() -> None:
    other = Mechanism(**{**GOOD, "clipping_norm": 7.0, "expected_batch_size": 99})
    assert other.event(4) == Mechanism(**GOOD).event(4)


@pytest.mark.parametrize("name", ["clipping_norm", "noise_multiplier"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_clipping_or_noise_that_is_no_positive_number_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(PrivacyError) as caught:
        Mechanism(**{**GOOD, name: value})
    assert (caught.value.code, caught.value.param) == ("E-MECHANISM", name)


@pytest.mark.parametrize("value", [0, -3])
def test_an_expected_batch_of_nothing_is_refused(value: int) -> None:
    with pytest.raises(PrivacyError) as caught:
        Mechanism(**{**GOOD, "expected_batch_size": value})
    assert caught.value.param == "expected_batch_size"


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, math.nan])
def test_a_sampling_probability_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(PrivacyError) as caught:
        Mechanism(**{**GOOD, "sampling_probability": value})
    assert caught.value.param == "sampling_probability"


def test_every_record_in_every_step_is_allowed() -> None:
    assert Mechanism(**{**GOOD, "sampling_probability": 1.0}).event(1) == DpSgdEvent(
        sampling_probability=1.0, noise_multiplier=3.0, steps=1
    )


def test_without_privacy_there_is_no_noise_and_the_event_says_so() -> None:
    open_one = Mechanism(**{**GOOD, "noise_multiplier": 0.0, "private": False})
    assert open_one.noise_standard_deviation == 0
    assert open_one.event(4) == NonPrivateEvent()
    assert Mechanism(**{**GOOD, "private": False}).noise_standard_deviation == 0


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_clipping_norm_is_checked_without_privacy_too(value: float) -> None:
    with pytest.raises(PrivacyError):
        Mechanism(**{**GOOD, "clipping_norm": value, "private": False})


def test_a_job_gives_the_mechanism_it_describes(make_job: Any) -> None:
    job = make_job(privacy={"epsilon": 8.0, "noise_multiplier": 2.0, "clipping_norm": 0.3, "delta": 1e-3})
    assert mechanism_of(job) == Mechanism(
        sampling_probability=1 / 3, expected_batch_size=10, clipping_norm=0.3, noise_multiplier=2.0
    )


def test_a_job_without_privacy_needs_no_noise_multiplier(make_job: Any) -> None:
    mechanism = mechanism_of(make_job(privacy={"level": "none"}))
    assert not mechanism.private
    assert mechanism.event(1) == NonPrivateEvent()


def test_seeded_test_noise_is_still_as_large_as_the_accounted_noise(make_job: Any) -> None:
    job = make_job(privacy={"noise": "test", "noise_multiplier": 2.0, "clipping_norm": 0.5})
    assert mechanism_of(job).noise_standard_deviation == 1.0


def test_a_private_job_whose_noise_is_unresolved_is_refused(make_job: Any) -> None:
    with pytest.raises(PrivacyError) as caught:
        mechanism_of(make_job())
    assert caught.value.code == "E-UNRESOLVED"
