"""Privacy loss distributions of events, by dp-accounting, each on a grid as fine as it has to be and no finer.

Neighbours are `zero-out`, one unit replaced by nothing, or `replace-one`, one unit replaced by another. For
plain Poisson sampling zero-out is add-or-remove-one: a unit that is not there adds nothing to a sum and
changes nobody's chance to be drawn, so both have the same distributions (dp-accounting builds one for both).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, reduce
from typing import Any, Literal

from cotune.shared.errors import PrivacyError
from cotune.shared.privacy.event import DpSgdEvent, PrivateEvent, TruncatedDpSgdEvent

Neighbours = Literal["zero-out", "replace-one"]
INTERVAL = 1e-4
ROUGHEST_INTERVAL = 1e-2
FINEST_INTERVAL = 2e-6
GROUP_INTERVALS = (2e-4, 1e-2)  # a mixture of Gaussians is inverted point by point: seconds at these, minutes below
POINTS = 1_000_000  # an epsilon of hundreds needs no digit more than this
ROUGH_POINTS = 100_000  # a faint event beside a loud one would take minutes on a grid fine enough for itself
LARGEST_LOSS = 10_000.0  # nats


def binding_probability(event: TruncatedDpSgdEvent) -> float:
    """Chance that a unit that was drawn meets a draw as large as the cap already, of the other units alone."""
    from scipy.stats import binom

    return float(binom.sf(event.max_batch_size - 1, event.population - 1, event.sampling_probability))


def kept_probability(event: TruncatedDpSgdEvent) -> float:
    """Chance that a unit is in the batch when the others' draw is as large as the cap; at most the sampling's."""
    from scipy.stats import binom

    above = float(binom.sf(event.max_batch_size, event.population, event.sampling_probability))
    return above * event.max_batch_size / event.population / binding_probability(event)


def joint_noise(events: Sequence[PrivateEvent]) -> float:
    """Noise multiplier of the one Gaussian release that unsampled releases with these noises compose to."""
    precision = sum(event.steps * (1 / event.noise_multiplier) * (1 / event.noise_multiplier) for event in events)
    return 1 / math.sqrt(precision)


def is_sampled(event: PrivateEvent) -> bool:
    """Whether chance decides who is in a batch."""
    return event.sampling_probability < 1 or isinstance(event, TruncatedDpSgdEvent)


def credited(events: tuple[PrivateEvent, ...], records: int = 1) -> tuple[PrivateEvent, ...]:
    """The events, but all as if unsampled where losses reach LARGEST_LOSS.

    Guarantee: what it returns costs at least what it was given: to say who was drawn reveals more, and it is
    then a Gaussian release of sensitivity 1 for each unit.

    Edge cases: a noise so small that a distribution would take gigabytes is priced in no time; such an
    epsilon is in the thousands with sampling or without.
    """
    if _loss(events, records) <= LARGEST_LOSS:
        return events
    return tuple(
        DpSgdEvent(sampling_probability=1.0, noise_multiplier=event.noise_multiplier, steps=event.steps)
        for event in events
    )


@lru_cache(maxsize=8)  # each may take tens of megabytes
def loss_distribution(
    events: tuple[PrivateEvent, ...], neighbours: Neighbours = "zero-out", *, records: int = 1, rough: bool = False
) -> Any:
    """The privacy loss distribution of composed events (Koskela et al. 2020; Doroshenko et al. 2022).

    Guarantee: pessimistic: every delta read from it is at least the true one for these neighbours, on any
    grid; a finer grid only brings it closer. `rough` is for searches: some hundredths of a percent above.

    Edge cases: unsampled events are joined to one Gaussian first; `records` > 1 are neighbours that differ
    in so many records of one person, with each event's unit a record (zero-out only).
    """
    finest, roughest = (INTERVAL, ROUGHEST_INTERVAL) if records == 1 else GROUP_INTERVALS
    spread = min(_spread(event) for event in events) * records
    coarse = max(spread / 16, _loss(events, records) / ROUGH_POINTS)
    interval = min(max(coarse, FINEST_INTERVAL if records == 1 else finest), roughest)
    if rough or records > 1:
        return _composed(events, neighbours, records, interval)
    reached = _composed(events, neighbours, records, interval).get_epsilon_for_delta(1e-12)
    wanted = min(INTERVAL, max(spread / 20, FINEST_INTERVAL))
    return _composed(events, neighbours, records, max(wanted, min(reached, LARGEST_LOSS) / POINTS))


def _loss(events: Sequence[PrivateEvent], records: int) -> float:
    """About the largest loss of all steps together, or of one step if that is larger, in nats."""
    together, largest = 0.0, 0.0
    for event in events:
        reach = records / event.noise_multiplier
        together += event.steps * event.sampling_probability * reach * reach / 2
        largest = max(largest, reach * reach / 2 + 10 * reach)
    return max(together, largest)


def _spread(event: PrivateEvent) -> float:
    """Size of a step's usual loss, in nats: what a grid has to resolve."""
    return event.sampling_probability / event.noise_multiplier


def _composed(events: tuple[PrivateEvent, ...], neighbours: Neighbours, records: int, interval: float) -> Any:
    sampled = [event for event in events if is_sampled(event)]
    unsampled = [event for event in events if not is_sampled(event)]
    parts = [
        _one_step(replace(event, steps=1), neighbours, records, interval).self_compose(event.steps) for event in sampled
    ]
    if unsampled:
        parts.append(_gaussian(joint_noise(unsampled) / records, 1.0, neighbours, interval))
    return reduce(lambda one, other: one.compose(other), parts)


@lru_cache(maxsize=16)
def _one_step(event: PrivateEvent, neighbours: Neighbours, records: int, interval: float) -> Any:
    if records > 1:
        return _one_step_of_person(event, records, interval)
    if isinstance(event, DpSgdEvent):
        return _gaussian(event.noise_multiplier, event.sampling_probability, neighbours, interval)
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_truncated_subsampled_gaussian_mechanism(
        dataset_size=event.population,
        sampling_probability=event.sampling_probability,
        truncated_batch_size=event.max_batch_size,
        noise_multiplier=event.noise_multiplier,
        value_discretization_interval=interval,
        neighboring_relation=_relation(neighbours),
    )


def _gaussian(noise: float, probability: float, neighbours: Neighbours, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        noise,
        sampling_prob=probability,
        value_discretization_interval=interval,
        neighboring_relation=_relation(neighbours),
    )


def _relation(neighbours: Neighbours) -> Any:
    from dp_accounting.privacy_accountant import NeighboringRelation

    return {
        "zero-out": NeighboringRelation.REPLACE_SPECIAL,
        "replace-one": NeighboringRelation.REPLACE_ONE,
    }[neighbours]


def _one_step_of_person(event: PrivateEvent, records: int, interval: float) -> Any:
    """One step for neighbours that differ in all `records` records of one person.

    Guarantee: without a cap, the number of these records in the batch is binomial and moves the sum by at
    most that many norms: a mixture of Gaussians (Charles et al. 2024, arXiv 2407.07737, section 4). With a
    cap, let everybody see whether the other records' draw alone would leave no room for all of these; that
    does not depend on them. If there is room the step is the mixture. If not, let everybody also see how
    many of these were drawn: that is again binomial, and all they still add is a Gaussian release of that
    sensitivity, for the same places are kept whether they hold records or nothing. To show more costs more.

    Edge cases: one person with more records than there are places is refused.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld
    from scipy.stats import binom

    q, noise = event.sampling_probability, event.noise_multiplier
    drawn = [float(share) for share in binom.pmf(range(records + 1), records, q)]
    mixture = pld.from_mixture_gaussian_mechanism(
        noise, range(records + 1), drawn, value_discretization_interval=interval
    )
    if isinstance(event, DpSgdEvent):
        return mixture
    if records > event.population:
        raise PrivacyError("E-GROUP", f"a person cannot have {records} records among {event.population}")
    full = float(binom.sf(event.max_batch_size - records, event.population - records, q))
    shown, weight = pld.identity(value_discretization_interval=interval), drawn[0]
    for count in range(1, records + 1):
        weight += drawn[count]
        if drawn[count]:
            shown = _gaussian(noise / count, 1.0, "zero-out", interval).compute_mixture(shown, drawn[count] / weight)
    return shown.compute_mixture(mixture, full)
