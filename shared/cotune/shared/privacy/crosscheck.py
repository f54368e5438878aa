"""Second opinions on the figure, by other programs: PRV (Opacus) and Renyi (dp-accounting).

The CLT ("GDP") accountant is not here and cannot be named: it is no bound (it reports as little as 0.43 of
the true epsilon on the reference vectors).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.shared.errors import PrivacyError, did_you_mean
from cotune.shared.privacy.accounting import check_delta, compose, epsilon, private_events
from cotune.shared.privacy.event import Event, PrivateEvent, TruncatedDpSgdEvent
from cotune.shared.privacy.losses import binding_probability, credited, kept_probability

PRV_ERROR = 0.01
PRV_POINTS_PER_NAT = 20_000  # of the largest loss, for each standard error of the composition
PRV_LARGEST_LOSS = 650.0  # nats; Opacus takes its exponential over the sampling probability, and floats end at 709

Accountant = Callable[[Iterable[Event], float], float]


def epsilon_by_prv(events: Iterable[Event], delta: float, *, error: float = PRV_ERROR) -> float:
    """The second opinion: numerical composition of privacy random variables by Opacus (Gopi et al. 2021).

    Guarantee: an upper bound, at most `error` above the least that can be shown this way, for the neighbours
    of `epsilon`. A step with a cap is a mixture of two that everybody can tell apart: the other units' draw
    leaves room, or it does not, which does not depend on the unit in question. With room it is the plain
    sampled step, which Opacus has. Without room the unit, if kept, takes another's place, and its neighbour,
    nothing, takes it too: at most 2 norms from the sum without either, which is the sampled Gaussian of two
    opposite shifts of 2 (Chua et al. 2025, section 4), written here on its own.
    Opacus looks at a unit removed; that adding one is no worse at any epsilon >= 0 is known of one step and
    conjectured of many (Lebeda et al. 2024, arXiv 2405.20769). The figure looks at both.

    Edge cases: no event is 0; a non-private event is infinite; delta outside (0, 1) is refused; epsilons in
    the hundreds carry a larger error, still above; where losses pass PRV_LARGEST_LOSS it is `epsilon_by_rdp`.
    """
    return _prv(compose(events), check_delta(delta), error)


def epsilon_by_rdp(events: Iterable[Event], delta: float) -> float:
    """The loose third opinion: Renyi differential privacy by dp-accounting (Mironov et al. 2019).

    Guarantee: an upper bound for the neighbours of `epsilon`. A step with a cap has the moments of its two
    cases, as in `epsilon_by_prv`, mixed; where there is no room, whether the unit is kept is shown too, and
    then it is a Gaussian release of sensitivity 1.

    Edge cases: as `epsilon_by_prv`.
    """
    private = private_events(events)
    check_delta(delta)
    if not private:
        return math.inf if private is None else 0.0
    return _renyi_epsilon(credited(private), delta)


ACCOUNTANTS: dict[str, Accountant] = {"pld": epsilon, "prv": epsilon_by_prv, "rdp": epsilon_by_rdp}
REFUSED = {
    "gdp": "the central-limit approximation is no bound: it reports as little as 0.43 of the true epsilon",
    "clt": "the central-limit approximation is no bound: it reports as little as 0.43 of the true epsilon",
    "ma": "the moments accountant is the Renyi one: say rdp",
}


def accountant(name: str) -> Accountant:
    """The accountant of that name.

    Raises:
        PrivacyError: There is none, or it may not be used because it is no bound.
    """
    if name in ACCOUNTANTS:
        return ACCOUNTANTS[name]
    known = ", ".join(ACCOUNTANTS)
    reason = REFUSED.get(name.lower()) or f"it is not known.{did_you_mean(name.lower(), ACCOUNTANTS)}"
    raise PrivacyError(
        "E-ACCOUNTANT",
        f"accountant: expected one of {known}, got {name!r}: {reason}",
        param="accountant",
        hint='write accountant = "pld", the figure every claim is made with',
    )


def _renyi_epsilon(events: tuple[PrivateEvent, ...], delta: float, shift: float = 1.0) -> float:
    from dp_accounting import rdp

    orders: NDArray[np.float64] = np.asarray(rdp.RdpAccountant().orders, dtype=np.float64)
    return float(rdp.compute_epsilon(orders.tolist(), _renyi(events, orders, shift).tolist(), delta)[0])


def _renyi(events: tuple[PrivateEvent, ...], orders: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    """Renyi divergence of composed events at some orders; `shift`: of a kept unit where a cap binds."""
    from absl import logging
    from dp_accounting import dp_event, rdp

    logging.set_verbosity(logging.ERROR)  # an order it cannot sum is left out, which is safe, and said each time
    total = np.zeros_like(orders)
    for event in events:
        q, noise = event.sampling_probability, event.noise_multiplier
        plain = rdp.RdpAccountant(orders.tolist())
        plain.compose(dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(noise)))
        one: NDArray[np.float64] = np.asarray(plain.rdp, dtype=np.float64)
        one = np.minimum.accumulate(one[::-1])[::-1]  # it grows with the order: the next one bounds one left out
        if isinstance(event, TruncatedDpSgdEvent):
            one = _with_cap(one, orders, event, shift)
        total += event.steps * one
    return total


def _with_cap(
    plain: NDArray[np.float64], orders: NDArray[np.float64], event: TruncatedDpSgdEvent, shift: float
) -> NDArray[np.float64]:
    full, kept = binding_probability(event), event.sampling_probability
    kept_moment = orders * (orders - 1) * (shift / event.noise_multiplier) ** 2 / 2
    with np.errstate(divide="ignore"):  # a chance of 0 has the logarithm of -inf, as it should
        moments = np.logaddexp.reduce(
            [
                np.log1p(-full) + (orders - 1) * plain,
                np.full_like(orders, np.log(full) + np.log1p(-kept)),
                np.log(full) + np.log(kept) + kept_moment,
            ]
        )
    return moments / (orders - 1)


class _StepWithCap:
    """Distribution of the privacy loss of one step with a cap, in the form Opacus composes."""

    def __init__(self, event: TruncatedDpSgdEvent, plain: Any) -> None:
        self._plain = plain
        self._full = binding_probability(event)
        self._kept = kept_probability(event)
        self._noise = event.noise_multiplier

    def cdf(self, t: Any) -> Any:
        """Chance of a loss of at most `t` nats, element by element."""
        return (1 - self._full) * self._plain.cdf(t) + self._full * self._opposite(np.asarray(t, dtype=np.float64))

    def _opposite(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        # log((1 - p + k u) / (1 - p + k / u)) = t with u = exp(2 x / noise^2) and k = p exp(-2 / noise^2) is
        # quadratic in u; in hyperbolic form nothing overflows.
        from scipy.special import ndtr

        p, noise = self._kept, self._noise
        k = p * math.exp(-2 / noise**2)
        x = noise**2 / 2 * (t / 2 + np.arcsinh((1 - p) * np.sinh(np.clip(t / 2, -350, 350)) / k))
        return (1 - p) * ndtr(x / noise) + p * ndtr((x - 2) / noise)


@lru_cache(maxsize=256)
def _prv(events: tuple[Event, ...], delta: float, error: float) -> float:
    from opacus.accountants.analysis import prv

    private = private_events(events)
    if not private:
        return math.inf if private is None else 0.0
    private, delta_error = credited(private), delta / 1000
    largest = _largest_loss(private, delta_error)
    if largest > PRV_LARGEST_LOSS:
        return epsilon_by_rdp(private, delta)
    error = max(error, largest / PRV_POINTS_PER_NAT)
    steps = [event.steps for event in private]
    mesh = error / math.sqrt(sum(steps) * math.log(12 / delta_error) / 2)
    domain = prv.Domain.create_aligned(-largest, largest, mesh)
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # Opacus masks its own log(1 - q) at q = 1.
        warnings.simplefilter("ignore", UserWarning)
        parts = [prv.TruncatedPrivacyRandomVariable(_variable(event), -largest, largest) for event in private]
        composed = prv.compose_heterogeneous([prv.discretize(part, domain) for part in parts], steps)
        return max(0.0, float(composed.compute_epsilon(delta, delta_error, error)[2]))


def _variable(event: PrivateEvent) -> Any:
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

    plain = PoissonSubsampledGaussianPRV(event.sampling_probability, event.noise_multiplier)
    if isinstance(event, TruncatedDpSgdEvent) and binding_probability(event):
        return _StepWithCap(event, plain)
    return plain


def _largest_loss(events: tuple[PrivateEvent, ...], delta_error: float) -> float:
    """A loss exceeded with less than `delta_error`, by all steps or by one (Gopi et al. 2021, remark 5.6)."""
    steps = sum(event.steps for event in events)
    single = [(replace(event, steps=1),) for event in events]
    one = max(_renyi_epsilon(event, delta_error / (8 * steps), shift=4.0) for event in single)
    return max(_renyi_epsilon(events, delta_error / 4, shift=4.0), one, PRV_ERROR) + 3
