"""The figure: PLD accounting against recorded reference values, and the laws an epsilon has to obey."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from cotune.shared.errors import PrivacyError
from cotune.shared.privacy.accounting import (
    compose,
    epsilon,
    epsilon_replace_one,
    private_events,
    rough_epsilon,
    tradeoff_curve,
)
from cotune.shared.privacy.crosscheck import ACCOUNTANTS
from cotune.shared.privacy.event import DpSgdEvent, Event, NonPrivateEvent, TruncatedDpSgdEvent

REFERENCE = json.loads((Path(__file__).parents[2] / "vectors" / "accounting.json").read_text(encoding="utf-8"))
VECTORS: list[dict[str, Any]] = REFERENCE["vectors"]
ALL: list[dict[str, Any]] = [*VECTORS, *REFERENCE["heterogeneous"]]
CAPS: dict[str, float] = REFERENCE["extra_vectors"]["truncated_poisson_pld"]["cap_to_eps"]
LONG = {"V01", "V02", "V04", "V05", "V07", "V10", "V11", "V12", "V14", "V15", "H01", "H02"}  # a second or so each


def ids(vectors: list[dict[str, Any]]) -> Any:
    """Each vector as a parameter; the long ones are for the slow tier."""
    marked = [pytest.param(v, id=v["id"], marks=[pytest.mark.slow] * (v["id"] in LONG)) for v in vectors]
    return pytest.mark.parametrize("vector", marked)


every_vector, single_vector = ids(ALL), ids(VECTORS)
full_batch = ids([v for v in VECTORS if v["q"] == 1])
PRICES = {"replace-one": epsilon_replace_one, "rough": rough_epsilon, **ACCOUNTANTS}
every_epsilon = pytest.mark.parametrize("price", PRICES.values(), ids=PRICES.keys())
every_accountant = pytest.mark.parametrize("price", ACCOUNTANTS.values(), ids=ACCOUNTANTS.keys())


def event(q: float, noise: float, steps: int) -> DpSgdEvent:
    return DpSgdEvent(sampling_probability=q, noise_multiplier=noise, steps=steps)


def capped(q: float, noise: float, steps: int, cap: int, population: int) -> TruncatedDpSgdEvent:
    return TruncatedDpSgdEvent(
        sampling_probability=q, noise_multiplier=noise, steps=steps, max_batch_size=cap, population=population
    )


def reference_with_cap(cap: str) -> TruncatedDpSgdEvent:
    return capped(0.02, 1.0, 600, int(cap), 3200)


def events_of(vector: dict[str, Any]) -> list[Event]:
    return [event(part["q"], part["sigma"], part["steps"]) for part in vector.get("phases", [vector])]


@cache
def figure(vector_id: str) -> float:
    vector = next(v for v in ALL if v["id"] == vector_id)
    return epsilon(events_of(vector), vector["delta"])


def gaussian_delta(cost: float, mu: float) -> float:
    """Exact delta of a Gaussian mechanism (Balle and Wang 2018, theorem 8)."""
    return float(norm.cdf(mu / 2 - cost / mu) - math.exp(cost) * norm.cdf(-mu / 2 - cost / mu))


def exact_epsilon(mu: float, delta: float) -> float:
    return float(brentq(lambda cost: gaussian_delta(cost, mu) - delta, 0, 200, xtol=1e-12))


# Reference values


@every_vector
def test_the_figure_is_that_of_the_reference_pld_accountant(vector: dict[str, Any]) -> None:
    assert figure(vector["id"]) == pytest.approx(vector["eps"]["dp_accounting_pld"], rel=1e-6)


@every_vector
def test_the_figure_lies_in_the_bracket_of_the_independent_prv_accountant(vector: dict[str, Any]) -> None:
    bracket, cost = vector["eps"]["msr_prv"], figure(vector["id"])
    assert bracket["low"] <= cost <= bracket["up"]
    assert abs(cost - bracket["est"]) <= 1e-3 * max(1, cost)


@single_vector
def test_replacing_a_record_costs_the_reference_and_more_than_adding_one(vector: dict[str, Any]) -> None:
    replaced = epsilon_replace_one(events_of(vector), vector["delta"])
    assert replaced == pytest.approx(vector["eps"]["dp_accounting_pld_replace_one"], rel=1e-6)
    assert replaced > figure(vector["id"])


@full_batch
def test_without_sampling_the_figure_is_the_exact_gaussian(vector: dict[str, Any]) -> None:
    exact = exact_epsilon(math.sqrt(vector["steps"]) / vector["sigma"], vector["delta"])
    assert exact == pytest.approx(vector["eps"]["exact_gaussian_balle_wang"], abs=1e-7)
    assert figure(vector["id"]) == pytest.approx(exact, abs=1e-7)


@every_vector
def test_the_figure_for_searches_is_above_the_figure_and_hardly(vector: dict[str, Any]) -> None:
    rough = rough_epsilon(events_of(vector), vector["delta"])
    assert figure(vector["id"]) * (1 - 1e-9) <= rough <= figure(vector["id"]) * (1 + 1e-3)


@pytest.mark.parametrize(
    ("cap", "reference"),
    [pytest.param(cap, cost, marks=[pytest.mark.slow] * (cap not in {"72", "96"})) for cap, cost in CAPS.items()],
)
def test_a_cap_costs_the_reference_also_on_the_grid_for_searches(cap: str, reference: float) -> None:
    rough = rough_epsilon([reference_with_cap(cap)], 1e-5)
    assert reference - 5e-4 <= rough <= reference * (1 + 3e-4) + 5e-4


@pytest.mark.slow
@pytest.mark.parametrize(("cap", "reference"), CAPS.items())
def test_a_cap_costs_the_reference_to_its_last_digit(cap: str, reference: float) -> None:
    assert epsilon([reference_with_cap(cap)], 1e-5) == pytest.approx(reference, abs=5.1e-4)


def test_a_tighter_cap_costs_more_and_a_loose_one_nothing() -> None:
    free = rough_epsilon([event(0.02, 1.0, 600)], 1e-5)
    costs = [rough_epsilon([reference_with_cap(cap)], 1e-5) for cap in ("72", "96", "128")]
    assert all(tight > loose for tight, loose in pairwise(costs))
    assert costs[-1] == pytest.approx(free, rel=1e-6)


# Composition

CAPPED = capped(0.5, 12.0, 8, 26, 40)
MIXED: list[Event] = [event(0.2, 8.0, 10), CAPPED, event(1.0, 30.0, 4), event(0.2, 8.0, 5)]


def test_rounds_composed_cost_exactly_what_one_run_of_as_many_steps_costs() -> None:
    rounds = [event(0.1, 1.0, 10)] * 10
    assert epsilon(rounds, 1e-5) == epsilon([event(0.1, 1.0, 100)], 1e-5)
    assert compose(rounds) == (event(0.1, 1.0, 100),)


def test_runs_composed_cost_more_than_either_and_less_than_their_sum() -> None:
    first, second = [event(0.2, 6.0, 20)], [event(0.3, 8.0, 20)]
    alone = [epsilon(run, 1e-5) for run in (first, second)]
    assert max(alone) < epsilon([*first, *second], 1e-5) < sum(alone)


def test_events_with_equal_parameters_are_joined_and_those_without_steps_vanish() -> None:
    assert compose([*MIXED, event(0.3, 1.0, 0)]) == compose([event(0.2, 8.0, 15), CAPPED, event(1.0, 30.0, 4)])
    assert len(compose(MIXED)) == 3
    assert compose([event(0.3, 1.0, 0)]) == () == private_events([])


def test_one_event_without_privacy_is_all_that_is_left() -> None:
    assert compose([*MIXED, NonPrivateEvent()]) == (NonPrivateEvent(),)
    assert private_events([*MIXED, NonPrivateEvent()]) is None


def test_a_cap_of_everybody_never_binds_and_is_dropped() -> None:
    assert compose([capped(0.3, 2.0, 5, 40, 40)]) == (event(0.3, 2.0, 5),)
    assert compose([capped(0.3, 2.0, 5, 39, 40)]) != (event(0.3, 2.0, 5),)


def test_adding_the_epsilons_of_rounds_would_say_fourteen_times_as_much() -> None:
    rounds = 30
    one = epsilon([event(0.02, 1.0, 20)], 1e-5 / rounds)
    assert rounds * one == pytest.approx(41.7, abs=0.05)
    assert epsilon([event(0.02, 1.0, 20)] * rounds, 1e-5) == pytest.approx(3.03, abs=0.005)


def test_a_site_in_every_round_spends_more_than_was_planned_for_one_in_every_second() -> None:
    """Noise for 500 expected steps at epsilon 6: what counts is the 1000 steps that were taken."""
    noise = 1.12947
    assert epsilon([event(0.05, noise, 500)], 1e-5) == pytest.approx(6.0, abs=2e-3)
    assert epsilon([event(0.05, noise, 1000)], 1e-5) == pytest.approx(8.77, abs=5e-3)


@pytest.mark.slow
def test_accuracies_released_on_private_records_are_not_free() -> None:
    """Twenty counts of right answers, each a Gaussian release of everybody."""
    training, releases = event(0.02, 1.10205, 600), 20
    assert epsilon([training], 1e-5) == pytest.approx(2.50, abs=5e-3)
    costs = [epsilon([training, event(1.0, noise, releases)], 1e-5) for noise in (10.0, 20.0)]
    assert costs == [pytest.approx(3.11, abs=0.03), pytest.approx(2.66, abs=0.01)]


# The contract of every accountant


@every_accountant
def test_the_order_of_events_does_not_change_the_cost(price: Any) -> None:
    assert price(MIXED, 1e-5) == price(MIXED[::-1], 1e-5)


@every_epsilon
def test_more_steps_less_noise_more_sampling_or_less_delta_cost_more(price: Any) -> None:
    cost = price([event(0.2, 6.0, 50)], 1e-5)
    for worse in (event(0.2, 6.0, 100), event(0.2, 5.0, 50), event(0.4, 6.0, 50)):
        assert price([worse], 1e-5) > cost
    assert price([event(0.2, 6.0, 50)], 1e-7) > cost


@every_epsilon
def test_no_event_costs_nothing(price: Any) -> None:
    assert price([], 1e-5) == 0
    assert price([event(0.1, 1.0, 0)], 1e-5) == 0


@every_epsilon
def test_one_release_without_privacy_makes_everything_infinite(price: Any) -> None:
    assert price([event(0.1, 1.0, 5), NonPrivateEvent(), CAPPED], 1e-5) == math.inf


@every_epsilon
@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("events", [[], [NonPrivateEvent()], [event(0.1, 1.0, 5)]], ids=["none", "open", "dp"])
def test_a_delta_outside_0_and_1_is_refused_whatever_was_released(
    price: Any, delta: float, events: list[Event]
) -> None:
    with pytest.raises(PrivacyError) as caught:
        price(events, delta)
    assert caught.value.code == "E-DELTA"


@every_accountant
@pytest.mark.parametrize(("noise", "steps"), [(20.0, 1), (5.0, 30), (2.0, 1), (0.5, 3)])
def test_no_accountant_is_below_the_exact_gaussian(price: Any, noise: float, steps: int) -> None:
    assert price([event(1.0, noise, steps)], 1e-5) >= exact_epsilon(math.sqrt(steps) / noise, 1e-5) - 1e-9


@every_accountant
def test_a_sampled_release_costs_less_than_one_of_everybody(price: Any) -> None:
    assert price([event(0.2, 6.0, 20)], 1e-5) < price([event(1.0, 6.0, 20)], 1e-5)


@pytest.mark.parametrize("events", [MIXED, [event(0.2, 8.0, 10)], [event(1.0, 5.0, 2)]], ids=["mixed", "dp", "all"])
def test_replacing_a_unit_costs_more_than_zeroing_it(events: list[Event]) -> None:
    assert epsilon_replace_one(events, 1e-5) > epsilon(events, 1e-5)


# What an attacker can do

RATES = [0.0, 0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 0.99, 1.0]


@pytest.mark.parametrize("events", [[event(0.2, 8.0, 100)], [event(1.0, 5.0, 100)], MIXED], ids=["dp", "all", "mixed"])
def test_an_attackers_best_rates_rise_stay_above_guessing_and_end_at_one(events: list[Event]) -> None:
    curve = tradeoff_curve(events, RATES)
    assert [rate for rate, _ in curve] == RATES
    powers = [power for _, power in curve]
    assert all(earlier <= later for earlier, later in pairwise(powers))
    assert all(rate <= power <= 1 for rate, power in curve)
    assert powers[-1] == 1
    assert powers[0] < 0.01


@pytest.mark.parametrize("one", [event(1.0, 5.0, 100), event(1.0, 10.0, 30), event(1.0, 2.0, 1)], ids=str)
def test_without_sampling_the_curve_is_the_exact_gaussian_one(one: DpSgdEvent) -> None:
    mu = math.sqrt(one.steps) / one.noise_multiplier
    rates = [float(rate) for rate in np.linspace(0.001, 0.999, 40)]
    for rate, power in tradeoff_curve([one], rates):
        assert power == pytest.approx(float(norm.cdf(norm.ppf(rate) + mu)), abs=1e-12)


@pytest.mark.slow
def test_the_curve_of_almost_everybody_bounds_the_gaussian_curve_from_below_and_hugs_it() -> None:
    exact = dict(tradeoff_curve([event(1.0, 10.0, 30)], RATES))
    for rate, power in tradeoff_curve([event(1 - 1e-9, 10.0, 30)], RATES):
        assert exact[rate] - 1e-6 <= power <= exact[rate] + 2e-3


def test_the_curve_bounds_what_its_own_epsilon_and_delta_allow() -> None:
    one, delta = event(0.2, 6.0, 50), 1e-5
    cost = epsilon([one], delta)
    for rate, power in tradeoff_curve([one], RATES):
        assert power <= min(1, math.exp(cost) * rate + delta) + 1e-6 + 0.06 * rate * math.exp(cost)


def test_the_curve_of_nothing_is_guessing_and_of_an_open_release_is_certainty() -> None:
    assert tradeoff_curve([], RATES) == [(rate, rate) for rate in RATES]
    assert tradeoff_curve([NonPrivateEvent()], RATES) == [(rate, 1.0) for rate in RATES]
