"""Every accountant against recorded reference values, and the laws an epsilon has to obey."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opacus.accountants.analysis import rdp as opacus_rdp
from scipy.optimize import brentq
from scipy.stats import norm

from cotune.shared.errors import PrivacyError
from cotune.shared.privacy.accounting import (
    ACCOUNTANTS,
    MIN_NOISE_MULTIPLIER,
    calibrate_noise,
    compose,
    epsilon,
    epsilon_by_prv,
    epsilon_by_rdp,
    epsilon_replace_one,
    tradeoff_curve,
)
from cotune.shared.privacy.event import DpSgdEvent, Event, NonPrivateEvent

REFERENCE = json.loads((Path(__file__).parents[2] / "vectors" / "accounting.json").read_text(encoding="utf-8"))
VECTORS: list[dict[str, Any]] = REFERENCE["vectors"]
ALL: list[dict[str, Any]] = [*VECTORS, *REFERENCE["heterogeneous"]]
every_vector = pytest.mark.parametrize("vector", ALL, ids=lambda vector: vector["id"])
single_vector = pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
full_batch = pytest.mark.parametrize("vector", [v for v in VECTORS if v["q"] == 1], ids=lambda vector: vector["id"])
PRICES = {f.__name__: f for f in (epsilon, epsilon_replace_one, epsilon_by_prv, epsilon_by_rdp)}
every_epsilon = pytest.mark.parametrize("price", PRICES.values(), ids=PRICES.keys())


def event(q: float, noise: float, steps: int) -> DpSgdEvent:
    return DpSgdEvent(sampling_probability=q, noise_multiplier=noise, steps=steps)


def events_of(vector: dict[str, Any]) -> list[Event]:
    return [event(part["q"], part["sigma"], part["steps"]) for part in vector.get("phases", [vector])]


@cache
def figure(name: str, vector_id: str) -> float:
    """What an accountant of ours says of a vector, computed once for all tests."""
    vector = next(v for v in ALL if v["id"] == vector_id)
    return PRICES[name](events_of(vector), vector["delta"])


def gaussian_delta(cost: float, mu: float) -> float:
    """Exact delta of a Gaussian mechanism (Balle and Wang 2018, theorem 8)."""
    return float(norm.cdf(mu / 2 - cost / mu) - math.exp(cost) * norm.cdf(-mu / 2 - cost / mu))


def gaussian_epsilon(mu: float, delta: float) -> float:
    return float(brentq(lambda cost: gaussian_delta(cost, mu) - delta, 0, 200, xtol=1e-12))


@every_vector
def test_the_figure_is_that_of_the_reference_pld_accountant(vector: dict[str, Any]) -> None:
    assert figure("epsilon", vector["id"]) == pytest.approx(vector["eps"]["dp_accounting_pld"], rel=1e-6)


@every_vector
def test_the_figure_lies_in_the_bracket_of_the_independent_prv_accountant(vector: dict[str, Any]) -> None:
    bracket, cost = vector["eps"]["msr_prv"], figure("epsilon", vector["id"])
    assert bracket["low"] <= cost <= bracket["up"]
    assert abs(cost - bracket["est"]) <= 1e-3 * max(1, cost)


@every_vector
def test_the_second_opinion_is_opacus_prv_and_its_upper_end(vector: dict[str, Any]) -> None:
    second = figure("epsilon_by_prv", vector["id"])
    assert second == pytest.approx(vector["eps"]["opacus_prv"], abs=1e-6)
    # The two PRV programs choose their domains apart; 7e-4 is the largest difference seen between them.
    assert second == pytest.approx(vector["eps"]["msr_prv"]["up"], abs=7e-4)


@every_vector
def test_the_second_opinion_is_above_the_figure_by_no_more_than_its_stated_errors(
    vector: dict[str, Any],
) -> None:
    cost, second = (figure(name, vector["id"]) for name in ("epsilon", "epsilon_by_prv"))
    assert cost <= second <= cost + 2 * 0.01


@every_vector
def test_renyi_accounting_gives_the_reference_and_is_never_below_the_figure(vector: dict[str, Any]) -> None:
    loose = figure("epsilon_by_rdp", vector["id"])
    assert loose == pytest.approx(vector["eps"]["dp_accounting_rdp"], rel=1e-6)
    assert loose >= vector["eps"]["opacus_rdp"] * (1 - 2e-3)
    assert loose >= figure("epsilon", vector["id"]) - 1e-9


@single_vector
def test_replacing_a_record_costs_the_reference_and_more_than_adding_one(vector: dict[str, Any]) -> None:
    replaced = figure("epsilon_replace_one", vector["id"])
    assert replaced == pytest.approx(vector["eps"]["dp_accounting_pld_replace_one"], rel=1e-6)
    assert replaced > figure("epsilon", vector["id"])


@full_batch
def test_without_sampling_the_figure_is_the_exact_gaussian_from_above(vector: dict[str, Any]) -> None:
    exact = gaussian_epsilon(math.sqrt(vector["steps"]) / vector["sigma"], vector["delta"])
    assert exact == pytest.approx(vector["eps"]["exact_gaussian_balle_wang"], abs=1e-7)
    assert exact - 1e-9 <= figure("epsilon", vector["id"]) <= exact + 1e-4


@pytest.mark.parametrize("vector", REFERENCE["extra_vectors"]["rdp_orders"], ids=lambda v: f"q={v['q']}")
def test_the_renyi_accountants_agree_with_quadrature_at_the_recorded_orders(vector: dict[str, float]) -> None:
    from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant([vector["alpha"]])
    accountant.compose(PoissonSampledDpEvent(vector["q"], GaussianDpEvent(vector["sigma"])))
    ours = accountant._rdp[0]
    theirs = opacus_rdp.compute_rdp(q=vector["q"], noise_multiplier=vector["sigma"], steps=1, orders=vector["alpha"])
    assert float(theirs) == pytest.approx(vector["rdp_quadrature"], rel=1e-6)
    assert ours == pytest.approx(vector["dp_accounting"], rel=1e-9)
    assert vector["rdp_quadrature"] <= ours <= vector["rdp_quadrature"] * 1.002


def test_rounds_composed_cost_exactly_what_one_run_of_as_many_steps_costs() -> None:
    rounds = [event(0.1, 1.0, 10)] * 10
    assert epsilon(rounds, 1e-5) == pytest.approx(epsilon([event(0.1, 1.0, 100)], 1e-5), rel=1e-12)
    assert compose(rounds) == (event(0.1, 1.0, 100),)


def test_rounds_composed_cost_far_less_than_the_sum_of_their_epsilons() -> None:
    one = epsilon([event(0.1, 1.0, 10)], 1e-5)
    assert epsilon([event(0.1, 1.0, 10)] * 10, 1e-5) < 0.4 * 10 * one


@every_epsilon
def test_the_order_of_events_does_not_change_the_cost(price: Any) -> None:
    events = [event(0.05, 2.0, 20), event(0.2, 3.0, 10), event(0.05, 2.0, 10)]
    assert price(events, 1e-5) == pytest.approx(price(events[::-1], 1e-5), rel=1e-9)


@every_epsilon
def test_more_steps_less_noise_or_more_sampling_cost_more(price: Any) -> None:
    cost = price([event(0.05, 2.0, 50)], 1e-5)
    for worse in (event(0.05, 2.0, 100), event(0.05, 1.5, 50), event(0.1, 2.0, 50)):
        assert price([worse], 1e-5) > cost
    assert price([event(0.05, 2.0, 50)], 1e-7) > cost


@every_epsilon
def test_no_event_costs_nothing(price: Any) -> None:
    assert price([], 1e-5) == 0
    assert price([event(0.1, 1.0, 0)], 1e-5) == 0


@every_epsilon
def test_one_release_without_privacy_makes_everything_infinite(price: Any) -> None:
    assert price([event(0.1, 1.0, 5), NonPrivateEvent(), event(0.1, 1.0, 5)], 1e-5) == math.inf


@every_epsilon
@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("events", [[], [NonPrivateEvent()], [event(0.1, 1.0, 5)]], ids=["none", "open", "dp"])
def test_a_delta_outside_0_and_1_is_refused_whatever_was_released(
    price: Any, delta: float, events: list[Event]
) -> None:
    with pytest.raises(PrivacyError) as caught:
        price(events, delta)
    assert caught.value.code == "E-DELTA"


def test_the_approximation_that_is_no_bound_cannot_be_named() -> None:
    assert set(ACCOUNTANTS) == {"pld", "prv", "rdp"}
    with pytest.raises(KeyError):
        ACCOUNTANTS["gdp"]
    below = [v for v in VECTORS if v["eps"]["opacus_gdp_NOT_A_BOUND"] < 0.99 * v["eps"]["dp_accounting_pld"]]
    assert len(below) >= 8, "the reason for leaving it out is gone"


@pytest.mark.parametrize(
    ("q", "steps", "target", "delta"),
    [(0.1, 100, 4.0, 1e-5), (0.02, 600, 1.0, 1e-5), (0.5, 8, 1.0, 1e-4), (1.0, 4, 0.1, 1e-5)],
)
def test_calibrated_noise_meets_the_target_within_half_a_percent_and_never_exceeds_it(
    q: float, steps: int, target: float, delta: float
) -> None:
    noise = calibrate_noise(sampling_probability=q, steps=steps, target_epsilon=target, delta=delta)
    assert 0.995 * target <= epsilon([event(q, noise, steps)], delta) <= target
    assert epsilon([event(q, noise * (1 - 1e-3), steps)], delta) > target, "a smaller multiplier would do"


@pytest.mark.parametrize("vector", [VECTORS[5], VECTORS[11]], ids=lambda vector: vector["id"])
def test_calibration_finds_the_noise_a_reference_epsilon_was_computed_from(vector: dict[str, Any]) -> None:
    noise = calibrate_noise(
        sampling_probability=vector["q"],
        steps=vector["steps"],
        target_epsilon=vector["eps"]["dp_accounting_pld"],
        delta=vector["delta"],
    )
    assert noise == pytest.approx(vector["sigma"], rel=1e-3)


@pytest.mark.slow
def test_a_very_loose_target_gets_noise_at_the_floor_and_still_keeps_it() -> None:
    noise = calibrate_noise(sampling_probability=0.02, steps=1, target_epsilon=60.0, delta=1e-3)
    assert 0 < noise <= MIN_NOISE_MULTIPLIER
    assert epsilon([event(0.02, noise, 1)], 1e-3) <= 60.0


def test_an_impossible_budget_is_an_error_that_names_the_setting_and_the_way_out() -> None:
    with pytest.raises(PrivacyError) as caught:
        calibrate_noise(sampling_probability=1.0, steps=10_000, target_epsilon=0.01, delta=1e-6)
    assert (caught.value.code, caught.value.param) == ("E-BUDGET-IMPOSSIBLE", "privacy.epsilon")
    assert "privacy.epsilon" in str(caught.value.hint)


RATES = [0.0, 0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 0.99, 1.0]


@pytest.mark.parametrize("one", [event(0.1, 2.0, 100), event(1.0, 5.0, 100)], ids=str)
def test_an_attackers_best_rates_rise_stay_above_guessing_and_end_at_one(one: DpSgdEvent) -> None:
    curve = tradeoff_curve([one], RATES)
    assert [rate for rate, _ in curve] == RATES
    powers = [power for _, power in curve]
    assert all(earlier <= later for earlier, later in pairwise(powers))
    assert all(rate <= power <= 1 for rate, power in curve)
    assert powers[-1] == 1
    assert powers[0] < 0.01


@pytest.mark.parametrize("one", [event(1.0, 5.0, 100), event(1.0, 10.0, 30), event(1.0, 2.0, 1)], ids=str)
def test_the_curve_bounds_the_exact_gaussian_curve_and_hugs_it(one: DpSgdEvent) -> None:
    mu = math.sqrt(one.steps) / one.noise_multiplier
    rates = [float(rate) for rate in np.linspace(0.001, 0.999, 40)]
    for rate, power in tradeoff_curve([one], rates):
        exact = float(norm.cdf(norm.ppf(rate) + mu))
        assert exact - 1e-9 <= power <= exact + 2e-3


def test_the_curve_bounds_what_its_own_epsilon_and_delta_allow() -> None:
    one, delta = event(0.1, 2.0, 100), 1e-5
    cost = epsilon([one], delta)
    for rate, power in tradeoff_curve([one], RATES):
        assert power <= min(1, math.exp(cost) * rate + delta) + 1e-6 + 0.06 * rate * math.exp(cost)


def test_the_curve_of_nothing_is_guessing_and_of_an_open_release_is_certainty() -> None:
    assert tradeoff_curve([], RATES) == [(rate, rate) for rate in RATES]
    assert tradeoff_curve([NonPrivateEvent()], RATES) == [(rate, 1.0) for rate in RATES]
