"""The accountant's question turned round: the noise for a budget, or the steps a budget allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from cotune.shared.errors import PrivacyError
from cotune.shared.privacy.accounting import check_delta, epsilon, rough_epsilon
from cotune.shared.privacy.event import Event
from cotune.shared.privacy.mechanism import MIN_NOISE_MULTIPLIER

MAX_NOISE_MULTIPLIER = 200.0
TOLERANCE = 1e-3
MAX_STEPS = 1_000_000


def calibrate_noise(
    event: Callable[[float], Event], *, target_epsilon: float, delta: float, spent: Iterable[Event] = ()
) -> float:
    """The least noise multiplier under which an event, after what was spent, costs at most `target_epsilon`.

    Guarantee: `epsilon` of what was spent and the event with the returned noise is <= `target_epsilon`; the
    root is found by Brent's method on an upper bound and raised until that holds, within 0.1 % of the least.

    Edge cases: nothing below MIN_NOISE_MULTIPLIER is searched: a larger target than that costs gets just
    that much noise, which sites accept; a target of 0 or less, or below what was spent, is refused.

    Args:
        event: The event for a noise multiplier.
        target_epsilon: What may be spent in all, at `delta`.
        delta: Of the guarantee.
        spent: Events before it.

    Raises:
        PrivacyError: Even MAX_NOISE_MULTIPLIER does not reach the target (E-BUDGET-IMPOSSIBLE).
    """
    before = tuple(spent)
    check_delta(delta)

    def cost(noise: float) -> float:
        return rough_epsilon([*before, event(noise)], delta)

    if target_epsilon <= 0 or epsilon([*before, event(MAX_NOISE_MULTIPLIER)], delta) > target_epsilon:
        raise PrivacyError(
            "E-BUDGET-IMPOSSIBLE",
            f"privacy.epsilon = {target_epsilon:g} at delta = {delta:g} is too small: noise above"
            f" {MAX_NOISE_MULTIPLIER:g} times the clipping norm would be needed",
            param="privacy.epsilon",
            hint="raise privacy.epsilon, or lower run.rounds, train.local_steps or train.batch_size",
        )
    noise = _root(cost, target_epsilon)
    while epsilon([*before, event(noise)], delta) > target_epsilon:
        noise *= 1 + TOLERANCE / 4
    return noise


def calibrate_steps(
    event: Callable[[int], Event], *, target_epsilon: float, delta: float, spent: Iterable[Event] = ()
) -> int:
    """The most steps that cost at most `target_epsilon` after what was spent; 0 if not even one does.

    Guarantee: so many steps fit, and one more does not; beyond MAX_STEPS nobody looks.

    Edge cases: a target that is spent already gives 0; events without a guarantee give 0.
    """
    before = tuple(spent)
    check_delta(delta)
    sure = _most(lambda steps: rough_epsilon([*before, event(steps)], delta) <= target_epsilon)
    return _most(lambda steps: epsilon([*before, event(steps)], delta) <= target_epsilon, start=sure)


def _most(fits: Callable[[int], bool], start: int = 0) -> int:
    """The most steps that fit, at most MAX_STEPS; looked for above `start`, or from 0 if that does not fit."""
    low, stride = start if start and fits(start) else 0, 1
    while low + stride <= MAX_STEPS and fits(low + stride):
        low, stride = low + stride, 2 * stride
    high = min(low + stride, MAX_STEPS + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _root(cost: Callable[[float], float], target: float) -> float:
    """A noise multiplier whose cost is close to the target; the cost falls as noise grows."""
    from scipy.optimize import brentq

    def excess(log_noise: float) -> float:
        return math.log(max(cost(math.exp(log_noise)), 1e-9) / target)

    high = 1.0
    while high < MAX_NOISE_MULTIPLIER and cost(high) > target:
        high = min(2 * high, MAX_NOISE_MULTIPLIER)
    low = high / 2
    while low > MIN_NOISE_MULTIPLIER and cost(low) <= target:
        low, high = max(low / 2, MIN_NOISE_MULTIPLIER), low
    if cost(low) <= target:
        return low
    if cost(high) > target:  # a rough figure is above the exact one, which was found to fit
        return high
    return math.exp(float(brentq(excess, math.log(low), math.log(high), xtol=1e-4)))  # pyright: ignore[reportArgumentType]
