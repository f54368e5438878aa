"""What a run has cost each site so far: events on disk before a site is asked, epsilon computed from them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from operator import itemgetter
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
    marked where the site itself refused when it was first asked; so after a crash at any moment the file holds at
    least what was released. A round that is asked for again is the same release: the site answers with the same
    bytes, or says how often it had to charge itself. At the end the sites' own signed ledgers say what happened.

    Edge cases: a round a site lost in a crash and trained again is in it twice; a site that never answered keeps
    the event it was asked for.
    """

    def __init__(self, run: RunFolder, job: Job) -> None:
        self._path = run.privacy / "accountant.json"
        self._job = job
        self._delta = job.privacy.delta if job.privacy.delta != "auto" else math.nan
        self._sites: dict[str, list[dict[str, Any]]] = {}
        self._asked_before: set[str] = set()  # may have released what the round asks of them now
        if self._path.exists():
            self._sites = json.loads(self._path.read_text(encoding="utf-8"))["sites"]

    def reserve(self, number: int, sites: Iterable[str]) -> None:
        """Write down what the round will release at every site that is about to be asked."""
        self._asked_before.clear()
        for site in sites:
            entries = self._sites.setdefault(site, [])
            asked = [entry for entry in entries if entry["round"] == number]
            if not asked:
                entries.append(self._entry(number))
            for entry in asked:
                if not entry.pop("refused", False):  # one that refused is asked again, and may agree
                    self._asked_before.add(site)
        self._write()

    def answered(self, number: int, refused: Iterable[str], charges: Mapping[str, int]) -> None:
        """Note what a round's answers said.

        Args:
            number: The round.
            refused: Sites that refused: a refusal comes before any record is read, so it released nothing.
            charges: How often each site that gave an update charged itself for the round.
        """
        for site in set(refused) - self._asked_before:
            for entry in self._sites.get(site, []):
                if entry["round"] == number:
                    entry["refused"] = True
        for site, count in charges.items():
            self._settle(site, number, count)
        self._write()

    def settle(self, site: str, rounds: Iterable[int]) -> None:
        """Take over what a site's own ledger says: the round of each charge of this run."""
        found = Counter(rounds)
        for number in sorted(found.keys() | {entry["round"] for entry in self._sites.get(site, [])}):
            self._settle(site, number, found[number])
        self._write()

    def _settle(self, site: str, number: int, count: int) -> None:
        entries = self._sites.setdefault(site, [])
        others = [entry for entry in entries if entry["round"] != number]
        refused = [entry for entry in entries if entry["round"] == number and "refused" in entry]
        charged = [self._entry(number)] * count if count else [dict(self._entry(number), refused=True)]
        self._sites[site] = sorted(others + (charged if count or not refused else refused), key=itemgetter("round"))

    def taken(self, before: int) -> dict[str, int]:
        """How many rounds before this one each site took, as far as is known here."""
        return {
            site: len({e["round"] for e in entries if e["round"] < before and "refused" not in e})
            for site, entries in self._sites.items()
        }

    def _entry(self, number: int) -> dict[str, Any]:
        return {"round": number, "event": mechanism_of(self._job).event(self._job.train.local_steps).to_dict()}

    def _write(self) -> None:
        delta = None if math.isnan(self._delta) else self._delta
        adjacency = mechanism_of(self._job).adjacency
        write_json(self._path, {"schema": 1, "delta": delta, "adjacency": adjacency, "sites": self._sites})

    def epsilon(self, site: str) -> float | None:
        """Epsilon a site has spent so far; None where nothing is promised."""
        events = [event_from_dict(e["event"]) for e in self._sites.get(site, []) if "refused" not in e]
        value = epsilon(events, self._safe_delta)
        return value if math.isfinite(value) else None

    @property
    def _safe_delta(self) -> float:
        return 0.5 if math.isnan(self._delta) else self._delta
