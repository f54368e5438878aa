"""The sites of a deployed run: enrolled, approved, each at a node of its own, and waited for while they are away."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from cotune.server.fleet import CRASHED, Request
from cotune.shared.plan import ClaimRequest, LedgerRequest
from cotune.shared.proposal import JobStanding, Proposal
from cotune.shared.update import Answer, SiteFailure

if TYPE_CHECKING:
    from cotune.server.enrolment import Enrolled
    from cotune.server.grid import Exchange, Place

POLL_S = 0.5
AGAIN_S = 120.0  # a courier whose call hangs on a dead line gives it up by then
LEDGERS_S = 600.0
SIGNATURES_S = 300.0
NODES_AGE_S = 1.0


class Proposing(Protocol):
    """Sites that can be asked whether they take part."""

    def propose(self, proposals: Sequence[Proposal], seconds: float) -> Iterator[JobStanding | SiteFailure]:
        """Put a job before sites; yield where it stands at each, or why that is not known within these seconds."""
        ...

    def admit(self, sites: Collection[str]) -> None:
        """Take these sites, which have approved, as those of the run."""
        ...


class DeployedFleet:
    """A `Fleet` of enrolled sites, and `Proposing`.

    Guarantee: a message for a site goes to the node of that site's enrolment alone, and only while it is not
    revoked; what a site answers after it was revoked counts as no answer.

    Edge cases: a site that is away is waited for until the round's time is over, as is one that goes away while it
    is asked: it is asked again when it is back, and answers with the bytes it wrote down. The collector hears of
    the first such loss in a round, since nobody knows what was sent before it. A run that goes on asks all that
    have approved, not those that happen to be there, so it asks whom it asked before.

    Args:
        exchange: Carries the messages.
        enrolled: Asked anew at every message: whom the coordinator knows now.
        round_timeout_s: From the first time a round is asked for.
    """

    def __init__(
        self, exchange: Exchange, enrolled: Callable[[], Mapping[str, Enrolled]], round_timeout_s: float
    ) -> None:
        self._exchange, self._enrolled, self._timeout = exchange, enrolled, round_timeout_s
        self._admitted: tuple[str, ...] = ()
        self._deadlines: dict[int, float] = {}
        self._lost: set[tuple[int, str]] = set()
        self._nodes: tuple[float, frozenset[int]] = (0.0, frozenset())

    def admit(self, sites: Collection[str]) -> None:
        """Take these sites, which have approved, as those of the run."""
        self._admitted = tuple(sorted(sites))

    def sites(self) -> Sequence[str]:
        """Names of the sites that approved and are not revoked, in order."""
        known = self._enrolled()
        return [site for site in self._admitted if _revoked(site, known) is None]

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Send the requests; yield answers as they come, and a failure for who has not answered in the round's time."""
        left = {request.plan.site: request for request in requests}
        for number in {request.plan.round for request in requests}:
            deadline = self._deadlines.setdefault(number, time.monotonic() + self._timeout)
            while left:
                again: dict[str, Request] = {}
                for site, answer in self._exchange.answers(list(left.values()), deadline, self._place):
                    lost = isinstance(answer, SiteFailure) and answer.code == CRASHED
                    if lost and (number, site) in self._lost:
                        again[site] = left[site]
                        continue
                    if lost:
                        self._lost.add((number, site))
                    yield _revoked(site, self._enrolled()) or answer
                left = again

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        """Ask sites for their ledgers; yield those that come within ten minutes."""
        deadline = self._deadlines.setdefault(0, time.monotonic() + min(self._timeout, LEDGERS_S))
        yield from self._exchange.ledgers(requests, deadline, self._place)

    def countersign(self, requests: Sequence[ClaimRequest]) -> Iterator[tuple[str, str | SiteFailure]]:
        """Ask sites to sign a claim; yield by site the signature, or why there is none within five minutes."""
        deadline = time.monotonic() + min(self._timeout, SIGNATURES_S)
        yield from self._exchange.signatures(requests, deadline, self._place)

    def propose(self, proposals: Sequence[Proposal], seconds: float) -> Iterator[JobStanding | SiteFailure]:
        """Put a job before sites; yield where it stands at each, or why that is not known within these seconds."""
        yield from self._exchange.standings(proposals, time.monotonic() + seconds, self._place)

    def _place(self, site: str) -> Place:
        known = self._enrolled()
        revoked = _revoked(site, known)
        if revoked:
            return revoked
        node = known[site].node_id
        return node if node in self._present() else None

    def _present(self) -> frozenset[int]:
        now = time.monotonic()
        if now - self._nodes[0] > NODES_AGE_S:
            self._nodes = now, frozenset(self._exchange.nodes())
        return self._nodes[1]


def _revoked(site: str, known: Mapping[str, Enrolled]) -> SiteFailure | None:
    """Why a site is no longer one of this coordinator's; it may have trained before, so it is no refusal of its own."""
    if site in known and known[site].state == "approved":
        return None
    return SiteFailure(site=site, code="E-REVOKED", message="is not enrolled here any more")
