"""What the run cost each site beside what its data had paid for before: from the ledgers the sites handed over."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cotune.shared.errors import CotuneError
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.event import Event, NonPrivateEvent, event_from_dict

RESERVED, BORN = "budget.reserve", "site.init"
WANTED = (RESERVED.encode(), BORN.encode())  # in a line that is worth reading


@dataclass(frozen=True)
class Budget:
    """One site's account as its ledger had it when the run ended.

    Attributes:
        site: The site.
        this_run: Epsilon of this run, as the claim has it; None without a bound.
        before: Epsilon of all other runs on the same data; None without a bound.
        together: Epsilon of both; None without a bound.
        other_runs: How many other runs there were.
        simulated: Whether the site was made for this run alone, so that its ledger knows of no other.
        fault: Why the ledger says nothing; empty if it does.
    """

    site: str
    this_run: float | None
    before: float | None
    together: float | None
    other_runs: int
    simulated: bool
    fault: str = ""


@dataclass
class _Reading:
    """What a ledger holds: by data set, the events of this run and of others, each with how often it was reserved."""

    simulated: bool = False
    ours: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    others: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    runs: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])


def read_budget(path: Path, run_id: str, site: Mapping[str, Any]) -> Budget:
    """A site's account, read line by line; nothing of it is checked here, which is what `cotune verify` does.

    Args:
        path: The site's ledger, as it was when the run ended.
        run_id: The run.
        site: What the claim says of the site.
    """
    name, this_run, delta = str(site.get("id", "")), site.get("epsilon"), site.get("delta")
    nothing = Budget(name, this_run, None, None, 0, simulated=False)
    try:
        if not path.is_file():
            return replace(nothing, fault="its ledger is not in the run folder")
        reading = _read(path, run_id)
        datasets = {dataset for dataset, _ in reading.ours}
        found = replace(
            nothing, simulated=reading.simulated, other_runs=sum(dataset in datasets for dataset, _ in reading.runs)
        )
        if this_run is None or delta is None:
            return found
        others = _events(reading.others, datasets)
        if not others:
            return replace(found, before=0.0, together=this_run)
        both = epsilon([*others, *_events(reading.ours, datasets)], delta)
        return replace(found, before=_finite(epsilon(others, delta)), together=_finite(both))
    except (CotuneError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return replace(nothing, fault="its ledger cannot be read")


def _read(path: Path, run_id: str) -> _Reading:
    reading = _Reading()
    with path.open("rb") as file:
        for line in file:
            if not any(word in line for word in WANTED):
                continue
            entry = json.loads(line)
            if entry["action"] == BORN:
                reading.simulated = entry["simulated"] is True
            elif entry["action"] == RESERVED:
                what = (str(entry["dataset"]), json.dumps(entry["event"], sort_keys=True))
                if entry["run_id"] == run_id:
                    reading.ours[what] += 1
                else:
                    reading.others[what] += 1
                    reading.runs.add((what[0], str(entry["run_id"])))
    return reading


def _events(counted: Counter[tuple[str, str]], datasets: set[str]) -> list[Event]:
    """The events of some data sets; one reserved many times has that many times the steps."""
    events: list[Event] = []
    for (dataset, text), times in counted.items():
        if dataset in datasets:
            event = event_from_dict(json.loads(text))
            events.append(event if isinstance(event, NonPrivateEvent) else replace(event, steps=event.steps * times))
    return events


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None
