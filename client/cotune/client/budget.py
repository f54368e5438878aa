"""What a data set's budget has paid for, what is left, and what a job would take: always from the ledger's events."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cotune.client.policy import DatasetPolicy
from cotune.shared.chain import Entry, reserved
from cotune.shared.job import Job
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.event import Event, NonPrivateEvent
from cotune.shared.privacy.mechanism import mechanism_of

STAGE = 8  # factor between the numbers of steps at which an event's price is looked at
FAR = 4  # times a cap: beyond it no exact figure helps anybody
MOST_MORE_RUNS = 9


@dataclass(frozen=True)
class Account:
    """A data set's budget beside everything that was ever reserved of it.

    Attributes:
        dataset: Its policy.
        events: All its reservations in order, committed or not.
        runs: The same by run, in the order in which runs began.
        units: Units they were reserved under.
    """

    dataset: DatasetPolicy
    events: tuple[Event, ...]
    runs: dict[str, tuple[Event, ...]]
    units: frozenset[str]

    @property
    def spent(self) -> float:
        """Epsilon of everything reserved so far."""
        return self.price(self.events)

    @property
    def left(self) -> float:
        """What the total exceeds the spent epsilon by; 0 if an edit of the policy put it below.

        Two epsilons do not add up exactly, so a run that costs a little more than this may still fit.
        """
        return max(0.0, self.dataset.budget.epsilon_total - self.spent)

    def price(self, events: Iterable[Event]) -> float:
        """Epsilon of some events at the data set's one delta.

        Guarantee: an upper bound for neighbours that differ in one unit of this data set, whatever jobs,
        rounds and coordinators the events belong to, each chosen after the ones before were seen; see
        `cotune.shared.privacy.accounting.epsilon`.

        Edge cases: no event is 0; a release without privacy is infinite.
        """
        return epsilon(events, self.dataset.budget.delta_total)

    def more_runs(self, events: Sequence[Event], most: int = MOST_MORE_RUNS) -> int:
        """How many more runs that release the same as these events the total allows; counts up to `most`."""
        taken = list(self.events)
        for number in range(most):
            taken += events
            if self.price(taken) > self.dataset.budget.epsilon_total:
                return number
        return most


def account(entries: Sequence[Entry], dataset: DatasetPolicy) -> Account:
    """A data set's account.

    Guarantee: every reservation the ledger holds for the data set is in it, also of rounds that crashed, were
    lost or were never answered: what is counted is never less than what was released.

    Edge cases: reservations under another unit are in it too (rule `dataset.unit` then refuses new ones);
    those of other data sets are not.
    """
    found = reserved(entries, dataset=dataset.id)
    runs: dict[str, list[Event]] = {}
    for entry, event in found:
        runs.setdefault(entry.fields["run_id"], []).append(event)
    return Account(
        dataset=dataset,
        events=tuple(event for _, event in found),
        runs={run: tuple(events) for run, events in runs.items()},
        units=frozenset(entry.fields["unit"] for entry, _ in found),
    )


def job_event(job: Job, rounds: int) -> Event:
    """What so many rounds of a resolved job release.

    Raises:
        PrivacyError: The job is not resolved, or its mechanism is impossible.
    """
    return mechanism_of(job).event(job.train.local_steps * rounds)


def bounded_price(event: Event, delta: float, cap: float) -> float:
    """Epsilon of an event, or infinity where a part of its steps already costs far more than a cap.

    Guarantee: the event's `epsilon` itself, or infinity, and infinity only where it costs more than `cap`:
    fewer steps never cost more.

    Edge cases: an absurd event (next to no noise, over a million steps) is infinite: the distribution of all
    its steps, which could take all memory, is never computed. No step is 0.
    """
    if isinstance(event, NonPrivateEvent):
        return math.inf
    steps = 1
    while steps < event.steps:
        if epsilon([replace(event, steps=steps)], delta) > FAR * cap:
            return math.inf
        steps *= STAGE
    return epsilon([event], delta)
