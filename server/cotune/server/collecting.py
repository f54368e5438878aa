"""One round's answers: asked for, admitted or rejected by name, and put aside on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cotune.server.admission import admitted_delta, reason_by_header
from cotune.server.fleet import CRASHED, Fleet, Request
from cotune.server.spool import Spool
from cotune.server.witness import Witness
from cotune.shared.adapter import Vector
from cotune.shared.errors import RefusedError, RunFailed, ended
from cotune.shared.runs import RunFolder
from cotune.shared.update import AdapterUpdate, SiteFailure

UNUSED = ("E-WIRE", "E-TIMEOUT", CRASHED)  # failures that no site speaks of itself
MAX_BARREN = 3  # passes in which nobody but crashed sites answers


class Received(NamedTuple):
    """One admitted update, in figures."""

    bytes_up: int
    bytes_down: int
    norm: float
    clipping_norm: float | None
    train_loss: float | None
    charges: int
    seconds: float


@dataclass
class Collected:
    """What came of a round.

    Attributes:
        received: Site -> its admitted update, in figures.
        failures: Answers of sites that gave no update.
        rejected: Site -> why its answer was not admitted.
        crashed: Sites that died over it at least once: nobody knows what of it had been sent.
    """

    received: dict[str, Received] = field(default_factory=dict)
    failures: list[SiteFailure] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    crashed: set[str] = field(default_factory=set)

    @property
    def refused(self) -> list[str]:
        """Sites that refused by a rule of their own, the first time they were asked in the round."""
        refused = [failure.site for failure in self.failures if failure.exit_code == RefusedError.exit_code]
        return [site for site in refused if site not in self.crashed]

    @property
    def notices(self) -> dict[str, str]:
        """Site -> why what it sent was not used, where it cannot know."""
        unread = [f for f in self.failures if f.code in UNUSED and f.site not in self.received]
        return {f.site: f.message for f in unread} | self.rejected


class Collector:
    """Asks the sites of one round and keeps what they may count with.

    Args:
        run: Whose events say what happened.
        requests: Site -> what it is asked.
        sizes: Site -> how many numbers its update holds.
        witness: Knows the sites' ledger heads and keys.
        spool: Where admitted updates go.
    """

    def __init__(
        self, run: RunFolder, requests: Mapping[str, Request], sizes: Mapping[str, int], witness: Witness, spool: Spool
    ) -> None:
        self._run, self._requests, self._sizes, self._witness, self._spool = run, requests, sizes, witness, spool
        self._started = time.monotonic()
        self._found = Collected()
        self._heard: set[str] = set()

    def collect(self, fleet: Fleet, quorum: int) -> Collected:
        """Ask, and ask those again that crashed, until all have answered or `quorum` updates are in.

        A crash costs its site nothing but time: it answers with the bytes it wrote down before. Asking again goes
        on while it helps, so that one dead worker does not fail everybody who meets it.
        """
        waiting, barren = list(self._requests.values()), 0
        while waiting and barren < MAX_BARREN:
            crashed: list[SiteFailure] = []
            answered = 0
            for answer in fleet.ask(waiting):
                if isinstance(answer, SiteFailure) and answer.code == CRASHED:
                    crashed.append(answer)
                    self._found.crashed.add(answer.site)
                    continue
                answered += 1
                self._take(answer)
                if len(self._found.received) >= quorum:
                    return self._found
            barren = 0 if answered else barren + 1
            again = {failure.site for failure in crashed} - self._heard
            waiting = [request for site, request in self._requests.items() if site in again]
            if barren == MAX_BARREN:
                for failure in crashed:
                    self._take(failure)
        return self._found

    def _take(self, answer: AdapterUpdate | SiteFailure) -> None:
        self._heard.add(answer.site if isinstance(answer, SiteFailure) else answer.header.site)
        if isinstance(answer, SiteFailure):
            if answer.site in self._requests and answer.site not in self._found.received:
                self._found.failures.append(answer)
            self._run.emit("site", f"{answer.site}: {answer.message}", "warn", failure=answer.model_dump())
            return
        site = answer.header.site
        result = self._admitted(answer)
        if isinstance(result, str):
            if site not in self._found.received:  # a second answer does not spoil the first
                self._found.rejected[site] = result
            number = next(iter(self._requests.values())).plan.round
            self._run.emit("site", f"{site}: update rejected: {result}", "warn", site=site, round=number)
            return
        delta, received = result
        self._spool.add(site, self._requests[site].plan.rank, delta)
        self._found.rejected.pop(site, None)
        self._found.received[site] = received

    def _admitted(self, update: AdapterUpdate) -> tuple[Vector, Received] | str:
        """The update's numbers and figures, or why it does not count."""
        header = update.header
        request = self._requests.get(header.site)
        if request is None:
            return "nobody asked it"
        if header.site in self._found.received:
            return "it has answered already"
        reason = reason_by_header(update, request.plan) or self._witness.reason(header)
        if reason:
            return reason
        delta = admitted_delta(update, request.plan, self._sizes[header.site])
        if isinstance(delta, str):
            return delta
        self._witness.keep(header)
        down = int(request.adapter.nbytes) + len(request.plan.model_dump_json())
        seconds = round(time.monotonic() - self._started, 3)
        norm = float((delta.astype("f8") ** 2).sum() ** 0.5)
        return delta, Received(
            update.bytes, down, norm, header.clipping_norm, header.train_loss, header.charges, seconds
        )


def require_enough(found: Collected, least: int, number: int, run_id: str) -> None:
    """End the run, to be resumed, if too few updates came.

    Raises:
        CotuneError: None came, and all for the same reason: that reason.
        RunFailed: E-MIN-SITES.
    """
    if len(found.received) >= max(1, least):
        return
    failures: Sequence[SiteFailure] = found.failures
    if not found.received and not found.rejected and len({(f.code, f.exit_code) for f in failures}) == 1:
        hint = f"cotune resume {run_id}" if failures[0].code in UNUSED else None
        raise ended(failures[0].code, failures[0].message, failures[0].exit_code, hint)
    reasons = [f"{f.site}: {f.message}" for f in failures] + [f"{s}: {reason}" for s, reason in found.rejected.items()]
    raise RunFailed(
        "E-MIN-SITES",
        f"round {number}: {len(found.received)} of at least {least} sites gave an update. {'; '.join(reasons[:3])}",
        param="federation.min_sites",
        hint=f"mend the sites, then: cotune resume {run_id}",
    )
