"""What a person with several records is promised when the unit is a record."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cotune.shared.errors import PrivacyError
from cotune.shared.privacy.accounting import check_delta, epsilon, gaussian_epsilon, private_events
from cotune.shared.privacy.event import Event
from cotune.shared.privacy.losses import credited, is_sampled, joint_noise, loss_distribution


def epsilon_group(events: Iterable[Event], delta: float, records: int) -> float:
    """Epsilon for one person who has `records` records, each a unit of its own in these events.

    Guarantee: an upper bound for neighbours that differ in all records of that person at once, added or
    removed (zeroed with a cap). Without a cap the number of their records in a batch is binomial and the loss
    that of a mixture of Gaussians, which is tight (Charles et al. 2024, arXiv 2407.07737); with a cap,
    `losses.py` proves a bound in which a binding cap is shown to everybody, a little above. It also holds
    for every person with fewer records.

    Edge cases: one record costs `epsilon`; no event is 0; a non-private event is infinite; fewer than one
    record is refused, as is a person with more records than a capped event's population.
    """
    if records < 1:
        raise PrivacyError("E-GROUP", f"expected a person with at least 1 record, got {records}")
    events = list(events)
    if records == 1:
        return epsilon(events, delta)
    private = private_events(events)
    check_delta(delta)
    if not private:
        return math.inf if private is None else 0.0
    private = credited(private, records)
    if not any(map(is_sampled, private)):
        return gaussian_epsilon(joint_noise(private) / records, delta)
    return max(0.0, float(loss_distribution(private, records=records).get_epsilon_for_delta(delta)))
