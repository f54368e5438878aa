"""A run under examination: its files, each read once, and nothing in them believed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cotune.shared.chain import Entry, SignedHead, ledger_lines, reserved, walk_chain
from cotune.shared.checking.checks import Failed, require
from cotune.shared.job import Job
from cotune.shared.privacy.claim import charged
from cotune.shared.privacy.claim_form import read_claim
from cotune.shared.privacy.event import Event
from cotune.shared.runs import RunFolder

UNPUBLISHED = "there is none yet: the run published nothing"


@dataclass(frozen=True)
class LedgerFacts:
    """What one pass over a site's ledger, each line held against the one before, has found.

    Attributes:
        lines: How many there are.
        first: The first entry's fields.
        at_head: Hash of the line whose number the head names; None if it has none.
        released: Round and event of everything reserved for the run, in order.
    """

    lines: int
    first: Mapping[str, Any]
    at_head: str | None
    released: tuple[tuple[int, Event], ...]


class Examined:
    """A run under examination.

    Args:
        run: Its folder.
        signers: Who may sign claims, by an officer's own file; None if there is none.
    """

    def __init__(self, run: RunFolder, signers: Mapping[str, Collection[str]] | None = None) -> None:
        self.run, self.signers = run, signers
        self._ledgers: dict[str, LedgerFacts] = {}

    @cached_property
    def claim_bytes(self) -> bytes:
        """The exact bytes of the claim."""
        return self._content(self.run.privacy / "claim.json")

    @property
    def claim(self) -> Mapping[str, Any]:
        """The claim, which has its form."""
        return read_claim(self.claim_bytes)

    @cached_property
    def job(self) -> Job:
        """The job of the run."""
        return self.run.job()

    @cached_property
    def accounts(self) -> Mapping[str, list[dict[str, Any]]]:
        """The coordinator's account, by site, without what was refused."""
        return charged(json.loads(self._content(self.run.privacy / "accountant.json"))["sites"])

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics."""
        return self.run.metrics()

    @cached_property
    def named(self) -> tuple[str, ...]:
        """The sites the claim names."""
        return tuple(site["id"] for site in self.claim["sites"])

    @cached_property
    def took_part(self) -> tuple[str, ...]:
        """The sites that gave an update, by metrics or claim."""
        used = {str(row["site"]) for row in self.metrics if row.get("site")}
        named = {site["id"] for site in self.claim["sites"] if site["ledger_head"]}
        return tuple(sorted(used | named))

    def head(self, site: str) -> SignedHead:
        """The ledger head the claim names for a site."""
        for said in self.claim["sites"]:
            if said["id"] == site and said["ledger_head"]:
                return SignedHead.model_validate(said["ledger_head"])
        raise Failed(f"{site}: the claim names no ledger head")

    def ledger(self, site: str) -> LedgerFacts:
        """What a site's ledger says of the run.

        Guarantee: its lines are one chain of hashes, to the last; memory does not grow with its length, only with
        the rounds of the run.
        """
        if site not in self._ledgers:
            head, path = self.head(site), self.run.ledger(site)  # a site of the claim has a name that is no path
            require(path.is_file(), f"{site}: its ledger is missing")
            self._ledgers[site] = _facts(walk_chain(ledger_lines(path)), head.seq, self.run.run_id)
        return self._ledgers[site]

    def released(self, site: str) -> tuple[tuple[int, Event], ...]:
        """Round and event of all that a site's own ledger says it released in this run; a silent site has none."""
        return self.ledger(site).released if self.run.ledger(site).exists() else ()

    @staticmethod
    def _content(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise Failed(f"{path.parent.name}/{path.name}: {UNPUBLISHED}") from None


def _facts(entries: Iterable[Entry], head: int, run_id: str) -> LedgerFacts:
    first: Mapping[str, Any] = {}
    at_head: str | None = None
    released: list[tuple[int, Event]] = []
    count = 0
    for entry in entries:
        count += 1
        if entry.seq == 1:
            first = entry.fields
        if entry.seq == head:
            at_head = entry.sha256
        if entry.action == "budget.reserve":
            released += [(int(e.fields["round"]), event) for e, event in reserved([entry], run_id=run_id)]
    return LedgerFacts(count, first, at_head, tuple(released))
