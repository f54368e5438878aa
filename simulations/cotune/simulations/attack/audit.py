"""How much a run must have given away: lower bounds of epsilon from one run's canaries.

m canaries are each put in by a fair coin; from scores, r of the coins are guessed, v of them rightly. More right
guesses than a mechanism lets anybody have, but for a chance of 5 %, refute the mechanism.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cotune.shared.privacy.accounting import epsilon, tradeoff_curve
from cotune.shared.privacy.event import DpSgdEvent, Event, NonPrivateEvent

CONFIDENCE = 0.95
GUESSED = 0.2  # share of the coins that is guessed, fixed in advance: to try several would need a correction
LARGEST_EPSILON = 50.0
EPSILON_HALVINGS = 32
HALVINGS = 7  # of an octave of noise: to half a percent
QUIETEST = 2.0**6  # times the noise, or that noise, from which a refuted mechanism is looked for
STEPS_OF_CURVE = np.geomspace(1e-4, 1.0, 500)

Floats = NDArray[np.floating]
Hypothesis = Callable[[float], Sequence[Event]]


@dataclass(frozen=True)
class Guesses:
    """Of `candidates` coins `made` were guessed, `right` of them rightly."""

    candidates: int
    made: int
    right: int


def guess(scores: Floats, coins: Sequence[bool]) -> Guesses:
    """Guess that the canaries with the highest scores are in and those with the lowest are not; abstain from the rest.

    Args:
        scores: Higher for what is likelier in, shape (m,). Equal ones are taken in order, which says nothing.
        coins: What is true.
    """
    each = max(1, round(len(scores) * GUESSED / 2))
    order = np.argsort(scores, kind="stable")
    truth = np.asarray(coins, dtype=bool)[order]
    return Guesses(len(scores), 2 * each, int(truth[-each:].sum() + (~truth[:each]).sum()))


def p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Chance of as many right guesses or more under (epsilon, delta)-DP, at most (Steinke et al. 2023, appendix D).

    Guarantee: for neighbours that differ in one unit, added or removed, whatever gave the scores.

    Edge cases: no guess is no evidence: 1.
    """
    from scipy.stats import binom

    made, right = guesses.made, guesses.right
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, made, chance))
    fewer = np.arange(1, right + 1)
    between = binom.sf(right - fewer - 1, made, chance) - tail
    correction = max(float((between / fewer).max()), 0.0) if right else 0.0
    return min(1.0, tail + correction * 2 * guesses.candidates * delta)


def lower_bound(guesses: Guesses, delta: float) -> float:
    """The largest epsilon that the guesses refute with 95 % confidence; 0 if they refute none."""
    low, high = 0.0, LARGEST_EPSILON
    if p_value(guesses, low, delta) > 1 - CONFIDENCE:
        return 0.0
    for _ in range(EPSILON_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(guesses, middle, delta) <= 1 - CONFIDENCE else (low, middle)
    return low


def refuted(guesses: Guesses, events: Sequence[Event]) -> bool:
    """Whether the guesses refute a whole trade-off curve with 95 % confidence (Mahloujifar et al. 2024, algorithm 3).

    Guarantee: the curve is met from below, at steps, so that none is refuted that need not be.
    """
    made, right, share = guesses.made, guesses.right, (1 - CONFIDENCE) / guesses.candidates
    least = 1 - np.array([power for _, power in tradeoff_curve(events, [*(1 - STEPS_OF_CURVE)])])
    r, h = share * right, share * (made - right)
    for i in range(right - 1, -1, -1):
        step = int(np.searchsorted(STEPS_OF_CURVE, r, side="right")) - 1
        grown = max(h, float(least[step]) if step >= 0 else 0.0)
        r, h = r + i / (made - i) * (grown - h), grown
    return r + h > made / guesses.candidates


def lower_bound_of(guesses: Guesses, hypothesis: Hypothesis, delta: float) -> float:
    """The epsilon of the loudest mechanism of a family that the guesses refute; 0 if they refute none.

    Args:
        guesses: What was guessed.
        hypothesis: The mechanism with so many times the noise; see `as_claimed` and `gaussian`.
        delta: Of the epsilon.
    """
    noise, loudest = QUIETEST, 1 / QUIETEST  # quiet ones are priced faster
    if not refuted(guesses, hypothesis(noise)):
        return 0.0
    while noise > loudest and refuted(guesses, hypothesis(noise / 2)):
        noise /= 2
    unrefuted = noise / 2
    for _ in range(HALVINGS):
        middle = math.sqrt(unrefuted * noise)
        unrefuted, noise = (unrefuted, middle) if refuted(guesses, hypothesis(middle)) else (middle, noise)
    return epsilon(hypothesis(noise), delta)


def gaussian(factor: float) -> Sequence[Event]:
    """One Gaussian release of everybody with this noise: the family of trade-off curves where nothing is claimed."""
    return [DpSgdEvent(sampling_probability=1.0, noise_multiplier=factor, steps=1)]


def as_claimed(events: Sequence[Event]) -> Hypothesis:
    """A run's own events, with noise that is so many times what it says: at 1 the claim itself.

    Guarantee: the curve of every factor is that of a mechanism of the run's kind, so a bound above the run's
    epsilon and a refuted claim are one and the same.
    """
    return lambda factor: [
        event
        if isinstance(event, NonPrivateEvent)
        else replace(event, noise_multiplier=event.noise_multiplier * factor)
        for event in events
    ]
