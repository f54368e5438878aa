"""Events to epsilon, and back: calibration. The figure is PLD by dp-accounting; RDP and PRV check it.

The CLT ("GDP") accountant is not here and cannot be named: it is no bound (it reports as little as 0.43 of
the true epsilon on the reference vectors).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from cotune.shared.errors import PrivacyError
from cotune.shared.privacy.event import DpSgdEvent, Event, NonPrivateEvent

MAX_NOISE_MULTIPLIER = 200.0
MIN_NOISE_MULTIPLIER = 0.2  # below it a step costs epsilon over 25, and its distribution takes minutes to compute
CALIBRATION_TOLERANCE = 1e-3


def compose(events: Iterable[Event]) -> tuple[Event, ...]:
    """Events with equal parameters joined: the order of composition does not matter to any accountant."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        if isinstance(event, NonPrivateEvent):
            return (event,)
        key = (event.sampling_probability, event.noise_multiplier)
        steps[key] = steps.get(key, 0) + event.steps
    return tuple(
        DpSgdEvent(sampling_probability=q, noise_multiplier=noise, steps=n) for (q, noise), n in steps.items() if n
    )


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Epsilon of everything released, by privacy loss distributions (Koskela et al. 2020; Google's PLD).

    Guarantee: an upper bound of the true epsilon at `delta` for add-or-remove-one neighbours, adaptive
    composition included; the discretisation is pessimistic. Without sampling the figure is exact.

    Edge cases: no event is 0; a non-private event is infinite; delta outside (0, 1) is refused.
    """
    composed = compose(events)
    _check_delta(delta)
    if any(isinstance(event, NonPrivateEvent) for event in composed):
        return math.inf
    if not composed:
        return 0.0
    private = _private(composed)
    if all(event.sampling_probability == 1 for event in private):
        return _epsilon_unsampled(private, delta)
    return max(0.0, float(_pld(private).get_epsilon_for_delta(delta)))


def _epsilon_unsampled(events: tuple[DpSgdEvent, ...], delta: float) -> float:
    """Exact (Balle and Wang 2018): Gaussian releases of all records compose to one with less noise."""
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    precision = sum(event.steps / event.noise_multiplier**2 for event in events)
    return float(get_epsilon_gaussian(1 / math.sqrt(precision), delta))


def epsilon_replace_one(events: Iterable[Event], delta: float) -> float:
    """As `epsilon`, for neighbours in which one record is replaced by another: always the larger figure."""
    from dp_accounting import dp_event
    from dp_accounting.pld import pld_privacy_accountant
    from dp_accounting.privacy_accountant import NeighboringRelation

    composed = compose(events)
    _check_delta(delta)
    if any(isinstance(event, NonPrivateEvent) for event in composed):
        return math.inf
    accountant = pld_privacy_accountant.PLDAccountant(NeighboringRelation.REPLACE_ONE)
    for event in _private(composed):
        accountant.compose(_to_dp_accounting(event, dp_event), event.steps)
    return float(accountant.get_epsilon(delta))


def epsilon_by_prv(events: Iterable[Event], delta: float, *, error: float = 0.01) -> float:
    """The second opinion: Opacus' PRV accountant (Gopi et al. 2021), an upper bound within `error` above."""
    from opacus.accountants import PRVAccountant

    composed = compose(events)
    _check_delta(delta)
    if any(isinstance(event, NonPrivateEvent) for event in composed):
        return math.inf
    if not composed:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = [(e.noise_multiplier, e.sampling_probability, e.steps) for e in _private(composed)]
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # Opacus masks its own log(1 - q) at q = 1, and warns of the RDP orders by which it chooses its grid.
        warnings.simplefilter("ignore", UserWarning)
        return float(accountant.get_epsilon(delta, eps_error=error))


def epsilon_by_rdp(events: Iterable[Event], delta: float) -> float:
    """The loose third opinion: Renyi differential privacy by dp-accounting; never below PLD."""
    from dp_accounting import dp_event, rdp

    composed = compose(events)
    _check_delta(delta)
    if any(isinstance(event, NonPrivateEvent) for event in composed):
        return math.inf
    accountant = rdp.RdpAccountant()
    for event in _private(composed):
        accountant.compose(_to_dp_accounting(event, dp_event), event.steps)
    return float(accountant.get_epsilon(delta))


ACCOUNTANTS: dict[str, Callable[[Iterable[Event], float], float]] = {
    "pld": epsilon,
    "prv": epsilon_by_prv,
    "rdp": epsilon_by_rdp,
}


def tradeoff_curve(events: Iterable[Event], false_positive_rates: Sequence[float]) -> list[tuple[float, float]]:
    """Highest true positive rate any attacker reaches at each false positive rate (Kairouz et al. 2015).

    Computed as the least over delta(epsilon) of the PLD, so a valid upper bound; both directions covered.
    """
    composed = compose(events)
    if not composed or any(isinstance(event, NonPrivateEvent) for event in composed):
        bound = 0.0 if not composed else math.inf
        return [(rate, rate if bound == 0 else 1.0) for rate in false_positive_rates]
    pld = _pld(_private(composed))
    grid = [i / 20 for i in range(401)]
    deltas = [float(delta) for delta in pld.get_delta_for_epsilon(np.array(grid))]

    def bound_at(rate: float) -> float:
        upper = min(math.exp(e) * rate + d for e, d in zip(grid, deltas, strict=True))
        lower = min(1 - math.exp(-e) * (1 - rate - d) for e, d in zip(grid, deltas, strict=True))
        return min(1.0, upper, lower)

    return [(rate, bound_at(rate)) for rate in false_positive_rates]


def calibrate_noise(*, sampling_probability: float, steps: int, target_epsilon: float, delta: float) -> float:
    """The least noise multiplier under which `steps` steps cost at most `target_epsilon` at `delta`.

    Guarantee: `epsilon` of the returned multiplier is <= `target_epsilon`; the root is found by
    Brent's method and raised until that holds, within 0.1 % of the least. Nothing below
    MIN_NOISE_MULTIPLIER is searched: a larger target than that costs gets just that much noise, which sites accept.

    Raises:
        PrivacyError: Even MAX_NOISE_MULTIPLIER does not reach the target: no step can be taken under it.
    """

    def cost(noise: float) -> float:
        event = DpSgdEvent(sampling_probability=sampling_probability, noise_multiplier=noise, steps=steps)
        return epsilon([event], delta)

    if cost(MAX_NOISE_MULTIPLIER) > target_epsilon:
        raise PrivacyError(
            "E-BUDGET-IMPOSSIBLE",
            f"privacy.epsilon = {target_epsilon:g} at delta = {delta:g} is too small for {steps} steps at"
            f" sampling probability {sampling_probability:.4g}: noise above {MAX_NOISE_MULTIPLIER:g} times"
            " the clipping norm would be needed",
            param="privacy.epsilon",
            hint="raise privacy.epsilon, or lower run.rounds, train.local_steps or train.batch_size",
        )
    safe = _root(cost, target_epsilon)
    while cost(safe) > target_epsilon:
        safe *= 1 + CALIBRATION_TOLERANCE / 4
    return safe


def _root(cost: Callable[[float], float], target: float) -> float:
    """A noise multiplier whose cost is close to the target; the cost falls as noise grows."""
    from scipy.optimize import brentq

    def excess(log_noise: float) -> float:
        return math.log(max(cost(math.exp(log_noise)), 1e-9) / target)

    high = 1.0
    while cost(high) > target:
        high *= 2
    low = high / 2
    while low > MIN_NOISE_MULTIPLIER and cost(low) <= target:
        low, high = max(low / 2, MIN_NOISE_MULTIPLIER), low
    if cost(low) <= target:
        return low
    root: Any = brentq(excess, math.log(low), math.log(high), xtol=1e-4)
    return math.exp(root)


def _private(events: tuple[Event, ...]) -> tuple[DpSgdEvent, ...]:
    return tuple(event for event in events if isinstance(event, DpSgdEvent))


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise PrivacyError("E-DELTA", f"expected 0 < delta < 1, got {delta}", param="privacy.delta")


def _to_dp_accounting(event: DpSgdEvent, dp_event: Any) -> Any:
    gaussian = dp_event.GaussianDpEvent(event.noise_multiplier)
    return dp_event.PoissonSampledDpEvent(event.sampling_probability, gaussian)


@lru_cache(maxsize=8)  # each may take tens of megabytes
def _pld(events: tuple[DpSgdEvent, ...]) -> Any:
    """Privacy loss distribution of composed events; interval 1e-4, pessimistic."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    total = None
    for event in events:
        one = pld.from_gaussian_mechanism(
            event.noise_multiplier,
            sampling_prob=event.sampling_probability,
            value_discretization_interval=1e-4,
            use_connect_dots=True,
        ).self_compose(event.steps)
        total = one if total is None else total.compose(one)
    return total
