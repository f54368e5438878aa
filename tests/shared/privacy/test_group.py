"""A person with several records, where the unit is a record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cotune.shared.errors import PrivacyError
from cotune.shared.privacy.accounting import epsilon, gaussian_epsilon
from cotune.shared.privacy.event import DpSgdEvent, Event, NonPrivateEvent, TruncatedDpSgdEvent
from cotune.shared.privacy.group import epsilon_group

REFERENCE = json.loads((Path(__file__).parents[2] / "vectors" / "accounting.json").read_text(encoding="utf-8"))
PERSONS: dict[str, float] = REFERENCE["extra_vectors"]["user_level_ELS_mog"]["k_to_eps"]
LONG = {"4", "8", "16"}


def event(q: float, noise: float, steps: int) -> DpSgdEvent:
    return DpSgdEvent(sampling_probability=q, noise_multiplier=noise, steps=steps)


def capped(q: float, noise: float, steps: int, cap: int, population: int) -> TruncatedDpSgdEvent:
    return TruncatedDpSgdEvent(
        sampling_probability=q, noise_multiplier=noise, steps=steps, max_batch_size=cap, population=population
    )


QUIET = event(0.3, 12.0, 10)
MIXED: list[Event] = [QUIET, event(1.0, 40.0, 4), event(0.3, 12.0, 5)]


@pytest.mark.parametrize(
    ("records", "reference"),
    [pytest.param(int(k), e, id=k, marks=[pytest.mark.slow] * (k in LONG)) for k, e in PERSONS.items()],
)
def test_a_person_costs_the_reference_or_hardly_more(records: int, reference: float) -> None:
    cost = epsilon_group([event(0.02, 1.0, 600)], 1e-5, records)
    assert reference - 5e-4 <= cost <= reference * (1 + 4e-4) + 5e-4


@pytest.mark.parametrize("events", [MIXED, [capped(0.5, 12.0, 8, 26, 40)], [event(1.0, 9.0, 3)]], ids=str)
def test_a_person_with_one_record_costs_what_a_record_does(events: list[Event]) -> None:
    assert epsilon_group(events, 1e-5, 1) == epsilon(events, 1e-5)


def test_more_records_cost_more() -> None:
    costs = [epsilon_group([QUIET], 1e-5, records) for records in (1, 2, 3, 5)]
    assert costs == sorted(costs)
    assert costs[-1] > 2 * costs[0]


@pytest.mark.parametrize("records", [2, 7])
def test_without_sampling_a_person_is_one_gaussian_release_of_that_sensitivity(records: int) -> None:
    together = 1 / math.sqrt(3 / 81 + 2 / 400)
    events = [event(1.0, 9.0, 3), event(1.0, 20.0, 2)]
    assert epsilon_group(events, 1e-5, records) == pytest.approx(gaussian_epsilon(together / records, 1e-5), rel=1e-12)


def test_releases_of_everybody_beside_sampled_ones_count_with_all_records() -> None:
    everybody = event(1.0, 10.0, 4)
    cost = epsilon_group([QUIET, everybody], 1e-5, 3)
    assert gaussian_epsilon(10 / 2 / 3, 1e-5) < cost < gaussian_epsilon(10 / 2 / 3, 1e-5) * 1.2


@pytest.mark.parametrize("records", [2, 4])
def test_the_price_is_not_above_what_follows_from_one_records_guarantee_alone(records: int) -> None:
    """A person's k records at once: k epsilon at delta times the sum of e^(i epsilon) (Dwork and Roth 2014, 2.2)."""
    one, small = [event(0.3, 20.0, 10)], 1e-7
    cost = epsilon(one, small)
    delta = small * math.fsum(math.exp(i * cost) for i in range(records))
    assert epsilon_group(one, delta, records) <= records * cost


def test_no_event_is_free_and_an_open_release_is_infinite() -> None:
    assert epsilon_group([], 1e-5, 4) == 0
    assert epsilon_group([event(0.3, 12.0, 0)], 1e-5, 4) == 0
    assert epsilon_group([QUIET, NonPrivateEvent()], 1e-5, 4) == math.inf


def test_the_order_of_events_does_not_change_the_cost_and_each_counts() -> None:
    cost = epsilon_group(MIXED, 1e-5, 3)
    assert epsilon_group(MIXED[::-1], 1e-5, 3) == cost
    assert epsilon_group((one for one in MIXED), 1e-5, 3) == cost, "a generator is read once"
    assert cost > epsilon_group([QUIET], 1e-5, 3)


@pytest.mark.parametrize("records", [0, -1])
def test_a_person_without_records_is_refused(records: int) -> None:
    with pytest.raises(PrivacyError, match="at least 1 record") as caught:
        epsilon_group(MIXED, 1e-5, records)
    assert caught.value.code == "E-GROUP"


@pytest.mark.parametrize("events", [[], [NonPrivateEvent()], MIXED], ids=["none", "open", "dp"])
@pytest.mark.parametrize("records", [1, 3])
def test_a_delta_outside_0_and_1_is_refused(events: list[Event], records: int) -> None:
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(PrivacyError) as caught:
            epsilon_group(events, delta, records)
        assert caught.value.code == "E-DELTA"


def test_next_to_no_noise_is_priced_as_a_release_of_everybody() -> None:
    loud = epsilon_group([event(0.1, 0.01, 20)], 1e-5, 4)
    assert loud == pytest.approx(gaussian_epsilon(0.01 / math.sqrt(20) / 4, 1e-5), rel=1e-12)


# With a cap. That a step's loss is never below the true one is shown in test_accounting.py by quadrature.


def test_a_cap_nobody_meets_costs_a_person_nothing_and_a_tight_one_more() -> None:
    free = epsilon_group([QUIET], 1e-5, 3)
    loose, tight = (epsilon_group([capped(0.3, 12.0, 10, cap, 100)], 1e-5, 3) for cap in (60, 34))
    assert loose == pytest.approx(free, rel=1e-3)
    assert tight > free * 1.01


@pytest.mark.parametrize("cap", [1, 2])
def test_a_person_with_more_records_than_the_cap_is_priced(cap: int) -> None:
    cost = epsilon_group([capped(0.5, 12.0, 4, cap, 8)], 1e-5, 3)
    assert epsilon_group([event(0.5, 12.0, 4)], 1e-5, 3) < cost <= gaussian_epsilon(12 / 2 / 3, 1e-5)


def test_where_everybody_is_drawn_a_person_is_shown_and_costs_a_release_of_everybody() -> None:
    cost = epsilon_group([capped(1.0, 12.0, 4, 5, 10)], 1e-5, 3)
    assert cost == pytest.approx(gaussian_epsilon(12 / 2 / 3, 1e-5), rel=1e-3)


def test_a_person_may_have_every_place_and_no_more() -> None:
    tiny = [capped(0.5, 12.0, 2, 3, 4)]
    assert 0 < epsilon_group(tiny, 1e-5, 4) < math.inf
    with pytest.raises(PrivacyError, match="5 records among 4") as caught:
        epsilon_group(tiny, 1e-5, 5)
    assert caught.value.code == "E-GROUP"


def test_a_mixture_of_kinds_costs_a_person_more_than_either_and_less_than_their_sum() -> None:
    parts: list[list[Any]] = [[QUIET], [capped(0.3, 12.0, 10, 34, 100)]]
    alone = [epsilon_group(part, 1e-5, 2) for part in parts]
    assert max(alone) < epsilon_group([*parts[0], *parts[1]], 1e-5, 2) < sum(alone)
