"""The only code that talks to Flower's Grid: plans out, answers in, one at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from cotune.shared.adapter import Vector
from cotune.shared.errors import TimedOut
from cotune.shared.plan import LedgerRequest, RoundPlan
from cotune.shared.update import Answer, SiteFailure
from cotune.shared.wire import answer_from_records, ledger_from_records, plan_to_records, request_to_records

POLL_S = 0.5
NODE_TIMEOUT_S = 120.0


class GridFleet:
    """A `Fleet` over Flower nodes: each site's plan goes to one node, sites spread evenly over nodes."""

    def __init__(self, grid: Grid, sites: Sequence[str], round_timeout_s: float) -> None:
        self._grid = grid
        self._sites = tuple(sorted(sites))
        self._timeout = round_timeout_s

    def sites(self) -> Sequence[str]:
        """Names of the sites of this run, in order."""
        return self._sites

    def ask(self, plans: Sequence[RoundPlan], adapter: Vector) -> Iterator[Answer]:
        """Send the plans; yield answers as they come. A site that is late or lost is a failure, not a wait."""
        sent = {plan.site: plan_to_records(plan, adapter) for plan in plans}
        for site, reply in self._exchange(sent, MessageType.TRAIN):
            yield reply if isinstance(reply, SiteFailure) else answer_from_records(reply, site)

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        """Ask sites for their ledgers; yield those that come."""
        sent = {request.site: request_to_records(request) for request in requests}
        for site, reply in self._exchange(sent, MessageType.QUERY):
            ledger = None if isinstance(reply, SiteFailure) else ledger_from_records(reply)
            if ledger is not None:
                yield site, ledger

    def _exchange(self, sent: Mapping[str, RecordDict], kind: str) -> Iterator[tuple[str, RecordDict | SiteFailure]]:
        """One message a site; each site's reply as it comes, or why there is none."""
        nodes = self._nodes()
        messages = [
            Message(records, nodes[i % len(nodes)], kind, ttl=self._timeout) for i, records in enumerate(sent.values())
        ]
        waiting = dict(zip(self._grid.push_messages(messages), sent, strict=True))
        deadline = time.monotonic() + self._timeout
        while waiting and time.monotonic() < deadline:
            arrived = [answer for identifier in list(waiting) for answer in self._pull(identifier, waiting)]
            yield from arrived
            if not arrived:
                time.sleep(POLL_S)
        for site in waiting.values():
            message = f"no answer within {self._timeout:.0f} s"
            yield site, SiteFailure(site=site, code="E-TIMEOUT", message=message, exit_code=3)

    def _pull(self, identifier: str, waiting: dict[str, str]) -> Iterator[tuple[str, RecordDict | SiteFailure]]:
        for reply in self._grid.pull_messages([identifier]):
            site = waiting.pop(identifier)
            if reply.has_error():
                # Flower's error text may quote a record; only its number is passed on.
                message = f"failed (Flower code {reply.error.code})"
                yield site, SiteFailure(site=site, code="E-SITE-CRASH", message=message)
            else:
                yield site, reply.content

    def _nodes(self) -> list[int]:
        deadline = time.monotonic() + NODE_TIMEOUT_S
        while time.monotonic() < deadline:
            nodes = sorted(self._grid.get_node_ids())
            if nodes:
                return nodes
            time.sleep(POLL_S)
        raise TimedOut("E-NODES", f"no Flower node appeared within {NODE_TIMEOUT_S:.0f} s")
