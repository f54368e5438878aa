"""What a run has cost each site so far: events on disk before a site is asked, epsilon computed from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from cotune.shared.files import write_json
from cotune.shared.job import Job
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.event import event_from_dict
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.runs import RunFolder


class Spending:
    """The run's `privacy/accountant.json`: a list of events a site.

    Guarantee: an event is on disk before the site it belongs to is asked for it, and is never removed, only
    marked where the site itself answered that it refused; so after a crash at any moment the file holds at
    least what was released.

    Edge cases: a round that was interrupted stays spent, and the run then has one round less to take, so
    that no site ever spends more than the plan said.
    """

    def __init__(self, run: RunFolder, job: Job) -> None:
        self._path = run.privacy / "accountant.json"
        self._run = run
        self._job = job
        self._delta = job.privacy.delta if job.privacy.delta != "auto" else math.nan
        self._sites: dict[str, list[dict[str, Any]]] = {}
        if self._path.exists():
            self._sites = json.loads(self._path.read_text(encoding="utf-8"))["sites"]

    def reserve(self, number: int, sites: Iterable[str]) -> None:
        """Write down what the round will release at every site that is about to be asked."""
        event = mechanism_of(self._job).event(self._job.train.local_steps).to_dict()
        for site in sites:
            self._sites.setdefault(site, []).append({"round": number, "event": event})
        self._write()

    def refused(self, number: int, site: str) -> None:
        """Note that a site refused a round: a refusal comes before any record is read, so it released nothing."""
        entry = self._sites[site][-1]
        if entry["round"] == number:
            entry["refused"] = True
            self._write()

    def _write(self) -> None:
        delta = None if math.isnan(self._delta) else self._delta
        adjacency = mechanism_of(self._job).adjacency
        write_json(self._path, {"schema": 1, "delta": delta, "adjacency": adjacency, "sites": self._sites})

    def rounds_left(self, finished: int) -> range:
        """Numbers of the rounds still to be taken, after `finished` were checkpointed."""
        reserved = max((len(entries) for entries in self._sites.values()), default=0)
        lost = reserved - finished
        if lost > 0:
            self._run.emit(
                "privacy",
                f"{lost} interrupted round(s) stay spent and are not taken again",
                "warn",
                lost=lost,
            )
        last = self._job.run.rounds - max(0, lost)
        return range(finished + 1, last + 1)

    def epsilon(self, site: str) -> float | None:
        """Epsilon a site has spent so far; None where nothing is promised."""
        events = [event_from_dict(e["event"]) for e in self._sites.get(site, []) if "refused" not in e]
        value = epsilon(events, self._safe_delta)
        return value if math.isfinite(value) else None

    @property
    def _safe_delta(self) -> float:
        return 0.5 if math.isnan(self._delta) else self._delta
