"""Events to epsilon: the figure. Privacy loss distributions (PLD) by dp-accounting; crosscheck.py doubts it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from cotune.shared.errors import PrivacyError
from cotune.shared.privacy.event import DpSgdEvent, Event, NonPrivateEvent, PrivateEvent
from cotune.shared.privacy.losses import Neighbours, credited, is_sampled, joint_noise, loss_distribution


def compose(events: Iterable[Event]) -> tuple[Event, ...]:
    """Events with equal parameters joined, in one fixed order: no accountant minds the order of composition.

    Guarantee: the result costs exactly what the events cost.

    Edge cases: a single non-private event is all that is left of events with one; events without steps
    vanish; a cap as large as the population never binds and is dropped.
    """
    steps: Counter[PrivateEvent] = Counter()
    for event in events:
        if isinstance(event, NonPrivateEvent):
            return (event,)
        steps[_uncapped(replace(event, steps=1))] += event.steps
    return tuple(sorted((replace(one, steps=count) for one, count in steps.items() if count), key=repr))


def private_events(events: Iterable[Event]) -> tuple[PrivateEvent, ...] | None:
    """The composed events, or None if one of them has no guarantee and everything is lost."""
    private: list[PrivateEvent] = []
    for event in compose(events):
        if isinstance(event, NonPrivateEvent):
            return None
        private.append(event)
    return tuple(private)


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Epsilon of everything released, by privacy loss distributions (Koskela et al. 2020; Google's PLD).

    Guarantee: an upper bound of the true epsilon at `delta`, adaptive composition included; without sampling
    it is exact. Neighbours differ in one unit: added or removed, or with a cap, whose population is public,
    replaced by nothing (zero-out, Chua et al. 2025, arXiv 2508.15089). The two are one and the same for
    events without a cap, so any mixture of events has the zero-out guarantee.

    Edge cases: no event is 0; a non-private event is infinite; delta outside (0, 1) is refused; with losses
    above 10,000 nats sampling is not credited.
    """
    return _price(compose(events), check_delta(delta), "zero-out", rough=False)


def rough_epsilon(events: Iterable[Event], delta: float) -> float:
    """As `epsilon`, for searches: also an upper bound, a few hundredths of a percent above, ten times as fast."""
    return _price(compose(events), check_delta(delta), "zero-out", rough=True)


def epsilon_replace_one(events: Iterable[Event], delta: float) -> float:
    """As `epsilon`, for neighbours in which one unit is replaced by another: always the larger figure."""
    return _price(compose(events), check_delta(delta), "replace-one", rough=False)


@lru_cache(maxsize=4096)  # every simulated site asks the same question
def _price(events: tuple[Event, ...], delta: float, neighbours: Neighbours, *, rough: bool) -> float:
    private = private_events(events)
    if private is None:
        return math.inf
    if not private:
        return 0.0
    private = credited(private, 1 if neighbours == "zero-out" else 2)
    if not any(map(is_sampled, private)):
        return gaussian_epsilon(joint_noise(private) / (1 if neighbours == "zero-out" else 2), delta)
    return max(0.0, float(loss_distribution(private, neighbours, rough=rough).get_epsilon_for_delta(delta)))


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Exact epsilon of one Gaussian release of everybody (Balle and Wang 2018, theorem 8)."""
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    return float(get_epsilon_gaussian(noise_multiplier, delta))


def tradeoff_curve(events: Iterable[Event], false_positive_rates: Sequence[float]) -> list[tuple[float, float]]:
    """Highest true positive rate any attacker reaches at each false positive rate (Kairouz et al. 2015).

    Guarantee: no test for one unit's presence does better at that rate; the least over delta(epsilon) of the
    pessimistic PLD, in both directions, hence an upper bound. Without sampling it is the exact Gaussian curve
    (Dong et al. 2022, section 2.2).

    Edge cases: nothing released is guessing; a non-private release is certainty.
    """
    private = private_events(events)
    if not private:
        return [(rate, 1.0 if private is None else rate) for rate in false_positive_rates]
    private = credited(private)
    powers = _powers if any(map(is_sampled, private)) else _gaussian_powers
    return list(zip(false_positive_rates, powers(private, false_positive_rates), strict=True))


def _powers(events: tuple[PrivateEvent, ...], rates: Sequence[float]) -> list[float]:
    import numpy as np

    grid = np.arange(401) / 20
    deltas = np.array(_deltas(events, tuple(grid.tolist())))
    powers: list[float] = []
    for rate in rates:
        upper = float(np.min(np.exp(grid) * rate + deltas))
        lower = float(np.min(1 - np.exp(-grid) * (1 - rate - deltas)))
        powers.append(min(1.0, upper, lower))
    return powers


def _gaussian_powers(events: tuple[PrivateEvent, ...], rates: Sequence[float]) -> list[float]:
    from scipy.special import ndtr, ndtri

    return ndtr(ndtri(rates) + 1 / joint_noise(events)).tolist()


def delta_profile(events: Iterable[Event], epsilons: Sequence[float]) -> list[tuple[float, float]]:
    """The delta of everything released at each epsilon: the guarantee as a whole, of which one pair is a point.

    Guarantee: an upper bound of the true delta, for the neighbours of `epsilon`; without sampling it is exact
    (Balle and Wang 2018, theorem 8).

    Edge cases: nothing released is 0; a non-private release is 1.
    """
    private = private_events(events)
    if not private:
        return [(each, 1.0 if private is None else 0.0) for each in epsilons]
    private = credited(private)
    if not any(map(is_sampled, private)):
        noise = joint_noise(private)
        return [(each, _gaussian_delta(each, noise)) for each in epsilons]
    return list(zip(epsilons, _deltas(private, tuple(epsilons)), strict=True))


@lru_cache(maxsize=256)  # a claim is made once, and checked by every site and again by whoever verifies it
def _deltas(events: tuple[PrivateEvent, ...], epsilons: tuple[float, ...]) -> tuple[float, ...]:
    found: Any = loss_distribution(events).get_delta_for_epsilon(list(epsilons))
    return tuple(float(delta) for delta in found)


def _gaussian_delta(epsilon_: float, noise_multiplier: float) -> float:
    from scipy.stats import norm

    half, shift = 1 / (2 * noise_multiplier), epsilon_ * noise_multiplier
    return max(0.0, float(norm.cdf(half - shift) - math.exp(epsilon_ + norm.logcdf(-half - shift))))


def check_delta(delta: float) -> float:
    """The delta itself.

    Raises:
        PrivacyError: It is not between 0 and 1.
    """
    if not 0 < delta < 1:
        raise PrivacyError("E-DELTA", f"expected 0 < delta < 1, got {delta}", param="privacy.delta")
    return delta


def _uncapped(event: PrivateEvent) -> PrivateEvent:
    if isinstance(event, DpSgdEvent) or event.max_batch_size < event.population:
        return event
    return DpSgdEvent(
        sampling_probability=event.sampling_probability, noise_multiplier=event.noise_multiplier, steps=event.steps
    )
