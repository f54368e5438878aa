"""One object for what is done and what is accounted."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.shared.errors import PrivacyError
from cotune.shared.privacy.event import DpSgdEvent, NonPrivateEvent, TruncatedDpSgdEvent
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


# Side sums

SIDES = st.tuples(st.booleans(), st.booleans())


@settings(max_examples=300, deadline=None)
@given(
    noise=st.floats(1e-3, 1e4), batch=st.integers(1, 10**6), norm=st.floats(1e-6, 1e6), sides=SIDES,
)  # fmt: skip
def test_all_parts_together_cost_exactly_the_accounted_noise_whatever_they_are(
    noise: float, batch: int, norm: float, sides: tuple[bool, bool]
) -> None:
    """A unit moves each part, over its own noise, by 1 / multiplier at most: the squares add up to the event's."""
    adaptive, metrics = sides
    mechanism = Mechanism(
        **{**GOOD, "noise_multiplier": noise, "expected_batch_size": batch, "clipping_norm": norm},
        adaptive=adaptive,
        metrics=metrics,
    )
    moved = [mechanism.sensitivity / mechanism.noise_standard_deviation]
    moved += [1 / mechanism.side_noise_multiplier] * (adaptive + metrics)
    assert math.sqrt(math.fsum(part**2 for part in moved)) == pytest.approx(1 / noise, rel=1e-12)
    event = mechanism.event(7)
    assert event == DpSgdEvent(sampling_probability=0.25, noise_multiplier=noise, steps=7)
    assert mechanism.noise_standard_deviation >= noise * norm * (1 - 1e-12)


@pytest.mark.parametrize(("adaptive", "metrics"), [(True, False), (False, True), (True, True)])
def test_side_sums_never_cost_the_gradient_more_than_a_little_noise(adaptive: bool, metrics: bool) -> None:
    for noise in (0.2, 1.0, 5.0, 200.0):
        for batch in (1, 8, 64, 4096):
            mechanism = Mechanism(
                **{**GOOD, "noise_multiplier": noise, "expected_batch_size": batch}, adaptive=adaptive, metrics=metrics
            )
            assert 1 < mechanism.gradient_noise_multiplier / noise < 1.05


def test_without_side_sums_the_gradients_noise_is_the_accounted_one_to_the_bit() -> None:
    for noise in (0.1, 1 / 3, 1.7, 1e-300):
        assert Mechanism(**{**GOOD, "noise_multiplier": noise}).gradient_noise_multiplier == noise


@pytest.mark.parametrize("noise", [1e-300, 1e-200, 1e200])
def test_absurdly_little_or_much_noise_is_still_computed_with_side_sums(noise: float) -> None:
    mechanism = Mechanism(**{**GOOD, "noise_multiplier": noise}, adaptive=True, metrics=True)
    assert 1 <= mechanism.gradient_noise_multiplier / noise < 1.05


# A cap

CAPPED: dict[str, Any] = {**GOOD, "max_batch_size": 18, "population": 40}


def test_with_a_cap_neighbours_replace_a_unit_by_nothing_and_the_event_knows_the_population() -> None:
    mechanism = Mechanism(**CAPPED)
    assert mechanism.adjacency == "zero-out-one"
    assert mechanism.event(4) == TruncatedDpSgdEvent(
        sampling_probability=0.25, noise_multiplier=3.0, steps=4, max_batch_size=18, population=40
    )


@pytest.mark.parametrize(("cap", "population"), [(9, 40), (0, 40), (-1, 40), (41, 40), (18, None), (18, 17)], ids=str)
def test_a_cap_below_the_mean_batch_or_above_the_population_is_refused(cap: int, population: int | None) -> None:
    with pytest.raises(PrivacyError) as caught:
        Mechanism(**{**GOOD, "max_batch_size": cap, "population": population})
    assert (caught.value.code, caught.value.param) == ("E-MECHANISM", "train.max_batch_size")


def test_a_cap_of_the_mean_batch_or_of_everybody_is_allowed() -> None:
    for cap in (10, 40):
        assert Mechanism(**{**CAPPED, "max_batch_size": cap}).max_batch_size == cap


# What a job asks for

UNIT = {"level": "unit", "noise_multiplier": 2.0, "delta": 1e-3}
PERSONS = {"unit": "column:person", "units_per_site": 20}


def test_a_job_of_persons_draws_persons(make_job: Any) -> None:
    mechanism = mechanism_of(make_job(privacy=UNIT, data=PERSONS))
    assert (mechanism.sampling_probability, mechanism.population) == (0.5, None)
    rows = mechanism_of(make_job(privacy={**UNIT, "level": "example"}, data=PERSONS))
    assert rows.sampling_probability == 1 / 3


def test_a_jobs_cap_is_over_the_public_number_of_its_units(make_job: Any) -> None:
    mechanism = mechanism_of(make_job(privacy=UNIT, data=PERSONS, train={"max_batch_size": 16}))
    assert (mechanism.max_batch_size, mechanism.population) == (16, 20)


@pytest.mark.parametrize(
    ("clipping", "kind", "adaptive"),
    [("flat", "flat", False), ("normalised", "normalised", False), ("adaptive", "flat", True)],
)
def test_a_jobs_clipping_and_metrics_are_the_mechanisms(
    make_job: Any, clipping: str, kind: str, adaptive: bool
) -> None:
    for metrics in ("none", "noised"):
        asked = {"noise_multiplier": 2.0, "delta": 1e-3, "clipping": clipping, "metrics": metrics}
        mechanism = mechanism_of(make_job(privacy=asked))
        assert (mechanism.clipping, mechanism.adaptive, mechanism.metrics) == (kind, adaptive, metrics == "noised")


def test_a_norm_that_has_moved_takes_the_place_of_the_jobs_own_and_costs_the_same(make_job: Any) -> None:
    job = make_job(privacy={"noise_multiplier": 2.0, "delta": 1e-3, "clipping": "adaptive"})
    moved = mechanism_of(job, 0.125)
    assert moved.clipping_norm == 0.125
    assert moved.event(3) == mechanism_of(job).event(3)


def test_without_privacy_there_are_no_side_sums(make_job: Any) -> None:
    mechanism = mechanism_of(make_job(privacy={"level": "none", "clipping": "adaptive", "metrics": "noised"}))
    assert (mechanism.adaptive, mechanism.metrics, mechanism.noise_standard_deviation) == (False, False, 0.0)
