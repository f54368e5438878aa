"""Losses: no distribution is below the true one of the mechanism, nor larger than a machine can hold."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, hypergeom, norm

from cotune.shared.privacy.accounting import (
    epsilon,
    epsilon_replace_one,
    gaussian_epsilon,
    rough_epsilon,
    tradeoff_curve,
)
from cotune.shared.privacy.crosscheck import ACCOUNTANTS
from cotune.shared.privacy.event import DpSgdEvent, TruncatedDpSgdEvent
from cotune.shared.privacy.losses import (
    LARGEST_LOSS,
    binding_probability,
    credited,
    joint_noise,
    kept_probability,
    loss_distribution,
)

PRICES = {"replace-one": epsilon_replace_one, "rough": rough_epsilon, **ACCOUNTANTS}


def event(q: float, noise: float, steps: int) -> DpSgdEvent:
    return DpSgdEvent(sampling_probability=q, noise_multiplier=noise, steps=steps)


def capped(q: float, noise: float, steps: int, cap: int, population: int) -> TruncatedDpSgdEvent:
    return TruncatedDpSgdEvent(
        sampling_probability=q, noise_multiplier=noise, steps=steps, max_batch_size=cap, population=population
    )


def gaussian_delta(cost: float, mu: float) -> float:
    """Exact delta of a Gaussian mechanism (Balle and Wang 2018, theorem 8)."""
    return float(norm.cdf(mu / 2 - cost / mu) - math.exp(cost) * norm.cdf(-mu / 2 - cost / mu))


# The true mechanism: figures from its very definition, by quadrature

AXIS: NDArray[np.float64] = np.linspace(-40.0, 40.0, 40_001)
CAPPED_STEPS = [(0.3, 2.0, 4, 12), (0.5, 4.0, 3, 6), (1.0, 2.0, 5, 10), (0.1, 1.0, 2, 8), (0.3, 3.0, 11, 12)]
SEVERAL = [
    pytest.param(shape, records, id=f"{shape}-{records}", marks=[pytest.mark.slow] * (records > 1 and number > 1))
    for number, shape in enumerate(CAPPED_STEPS)
    for records in (1, 2, 3)
]


def worlds(one: TruncatedDpSgdEvent, records: int, others: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Densities of one noised sum with and without a person's records, each of gradient 1; the others' is given.

    The person's records are places like all others: drawn, cut at the cap by chance, worth nothing once zeroed.
    """
    chances: Counter[tuple[float, int]] = Counter()
    rest, q, cap = one.population - records, one.sampling_probability, one.max_batch_size
    for drawn in range(rest + 1):
        for own in range(records + 1):
            places = min(cap, drawn + own)
            for kept in range(min(own, places) + 1):
                chance = float(binom.pmf(drawn, rest, q) * binom.pmf(own, records, q))
                chance *= float(hypergeom.pmf(kept, drawn + own, own, places)) if drawn + own else 1.0
                chances[others * (places - kept), kept] += chance
    with_them, without = np.zeros_like(AXIS), np.zeros_like(AXIS)
    for (theirs, kept), chance in chances.items():
        with_them += chance * norm.pdf(AXIS, theirs + kept, one.noise_multiplier)
        without += chance * norm.pdf(AXIS, theirs, one.noise_multiplier)
    return with_them, without


def true_delta(first: NDArray[np.float64], second: NDArray[np.float64], cost: float) -> float:
    step = float(AXIS[1] - AXIS[0])
    return max(
        float(np.maximum(one - math.exp(cost) * other, 0).sum() * step)
        for one, other in ((first, second), (second, first))
    )


@pytest.mark.parametrize(("shape", "records"), SEVERAL)
def test_no_step_with_a_cap_loses_more_than_its_loss_distribution_says(
    shape: tuple[float, float, int, int], records: int
) -> None:
    q, noise, cap, population = shape
    one = capped(q, noise, 1, cap, population)
    priced: Any = loss_distribution((one,), records=records, rough=True)
    for others in (-1.0, 0.0, 1.0):
        first, second = worlds(one, records, others)
        for cost in (0.0, 0.1, 0.5, 1.0, 2.0):
            assert true_delta(first, second, cost) <= priced.get_delta_for_epsilon(cost) + 1e-7


@pytest.mark.parametrize("price", PRICES.values(), ids=PRICES.keys())
@pytest.mark.parametrize("shape", [(0.5, 4.0, 3, 6), pytest.param((1.0, 4.0, 5, 10), marks=pytest.mark.slow)], ids=str)
def test_no_accountant_prices_one_step_with_a_cap_below_its_true_epsilon(
    price: Any, shape: tuple[float, float, int, int]
) -> None:
    q, noise, cap, population = shape
    one, delta = capped(q, noise, 1, cap, population), 1e-3
    first, second = worlds(one, 1, -1.0)
    true = float(brentq(lambda cost: true_delta(first, second, cost) - delta, 0, 20, xtol=1e-9))
    assert 0.2 < true <= price([one], delta)


@pytest.mark.parametrize(("cap", "records"), [(4, 2), (5, 3), (2, 3)])
def test_a_persons_step_with_a_cap_is_the_mixture_of_its_two_public_cases(cap: int, records: int) -> None:
    """A hockey-stick divergence is linear in what everybody sees: room, or none and how many were drawn."""
    q, noise, population = 0.4, 4.0, 9
    full = math.fsum(
        float(binom.pmf(drawn, population - records, q))
        for drawn in range(population - records + 1)
        if drawn + records > cap
    )
    priced, room = (
        loss_distribution((one,), records=records, rough=True)
        for one in (capped(q, noise, 1, cap, population), event(q, noise, 1))
    )
    for cost in (0.0, 0.1, 0.3):
        shown = math.fsum(
            float(binom.pmf(own, records, q)) * gaussian_delta(cost, own / noise) for own in range(1, records + 1)
        )
        mixed = (1 - full) * room.get_delta_for_epsilon(cost) + full * shown
        assert priced.get_delta_for_epsilon(cost) == pytest.approx(mixed, rel=2e-3)


def test_that_measure_sees_a_price_that_is_too_low() -> None:
    """A place among five of ten is kept with chance 1/2: a sampling probability of 0.1 says too little."""
    first, second = worlds(capped(1.0, 2.0, 1, 5, 10), 1, -1.0)
    wrong: Any = loss_distribution((event(0.1, 2.0, 1),), rough=True)
    assert true_delta(first, second, 0.5) > wrong.get_delta_for_epsilon(0.5) + 1e-3


@pytest.mark.parametrize("shape", CAPPED_STEPS, ids=str)
def test_the_chances_at_a_cap_are_those_counted_out(shape: tuple[float, float, int, int]) -> None:
    q, noise, cap, population = shape
    one, others = capped(q, noise, 1, cap, population), range(cap, population)
    full = math.fsum(float(binom.pmf(drawn, population - 1, q)) for drawn in others)
    kept = math.fsum(float(binom.pmf(drawn, population - 1, q)) * q * cap / (drawn + 1) for drawn in others) / full
    assert binding_probability(one) == pytest.approx(full, rel=1e-9)
    assert kept_probability(one) == pytest.approx(kept, rel=1e-9)
    assert kept_probability(one) <= q


@pytest.mark.parametrize("cost", [0.0, 0.1, 0.5])
def test_without_a_cap_zeroing_a_unit_is_adding_or_removing_one(cost: float) -> None:
    from dp_accounting.pld import privacy_loss_distribution as pld
    from dp_accounting.privacy_accountant import NeighboringRelation

    both = [
        pld.from_gaussian_mechanism(8.0, sampling_prob=0.2, neighboring_relation=relation)
        .self_compose(50)
        .get_delta_for_epsilon(cost)
        for relation in (NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_SPECIAL)
    ]
    assert both[0] == both[1]


@pytest.mark.slow
def test_no_test_of_one_capped_step_beats_the_curve() -> None:
    one = capped(0.3, 4.0, 1, 4, 12)
    first, second = worlds(one, 1, -1.0)
    order = np.argsort(second / first)
    step = float(AXIS[1] - AXIS[0])
    wrong, right = np.cumsum(second[order]) * step, np.cumsum(first[order]) * step
    for rate, power in tradeoff_curve([one], [0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 0.99]):
        assert float(np.interp(rate, wrong, right)) <= power + 1e-6


# Releases of everybody, and large losses


def test_releases_of_everybody_are_one_with_their_precisions_added() -> None:
    several = [event(1.0, 10.0, 3), event(1.0, 20.0, 4)]
    one = 1 / math.sqrt(3 / 100 + 4 / 400)
    assert joint_noise((several[0], several[1])) == pytest.approx(one, rel=1e-15)
    assert gaussian_epsilon(one, 1e-5) == epsilon(several, 1e-5)


@pytest.mark.parametrize("price", [epsilon, rough_epsilon, epsilon_replace_one], ids=["pld", "rough", "replace-one"])
def test_next_to_no_noise_is_priced_as_a_release_of_everybody(price: Any) -> None:
    loud = price([event(0.5, 1e-3, 1000)], 1e-5)
    everybody = price([event(1.0, 1e-3, 1000)], 1e-5)
    assert LARGEST_LOSS < loud == everybody < math.inf


QUIET = (event(0.2, 8.0, 10), capped(0.5, 12.0, 8, 26, 40))


def test_sampling_is_credited_up_to_the_largest_loss_and_then_for_no_event() -> None:
    assert credited(QUIET) is QUIET
    loud = (*QUIET, event(0.02, 1e-3, 1))
    assert credited(loud) == (event(1.0, 8.0, 10), event(1.0, 12.0, 8), event(1.0, 1e-3, 1))
    assert epsilon(credited(loud), 1e-5) >= epsilon(QUIET, 1e-5)


def test_persons_with_more_records_reach_the_largest_loss_earlier() -> None:
    events = (event(0.5, 0.1, 10),)
    assert credited(events, 1) is events
    assert credited(events, 16) == (event(1.0, 0.1, 10),)


def test_what_credits_no_sampling_costs_more() -> None:
    shown = [event(1.0, one.noise_multiplier, one.steps) for one in QUIET]
    assert epsilon(shown, 1e-5) > epsilon(QUIET, 1e-5)


def test_a_faint_event_beside_a_loud_one_is_priced_on_a_grid_for_both() -> None:
    """On the faint one's own grid this took minutes and gigabytes."""
    faint, loud = event(1e-4, 1.0, 10), event(0.1, 0.8, 20)
    both: Any = loss_distribution((faint, loud), rough=True)
    assert both._pmf_remove.size < 1_000_000
    assert rough_epsilon([faint, loud], 1e-5) == pytest.approx(rough_epsilon([loud], 1e-5), rel=1e-3)
