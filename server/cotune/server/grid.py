"""The only code that talks to Flower's Grid: plans out, answers in, one at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from cotune.server.collecting import MAX_BARREN
from cotune.server.fleet import CRASHED, Request
from cotune.shared.errors import TimedOut
from cotune.shared.plan import LedgerRequest
from cotune.shared.update import Answer, SiteFailure
from cotune.shared.wire import (
    adapter_to_record,
    answer_from_records,
    ledger_from_records,
    plan_to_records,
    request_to_records,
)

POLL_S = 0.1
NODE_TIMEOUT_S = 120.0


class GridFleet:
    """A `Fleet` over Flower nodes: each site's plan goes to one node, sites spread evenly over nodes."""

    def __init__(self, grid: Grid, sites: Sequence[str], round_timeout_s: float, at_once: int) -> None:
        self._grid = grid
        self._sites = tuple(sorted(sites))
        self._timeout = round_timeout_s
        self._at_once = at_once

    def sites(self) -> Sequence[str]:
        """Names of the sites of this run, in order."""
        return self._sites

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Send the requests; yield answers as they come. A site that is late or lost is a failure, not a wait."""
        # Sites that share an adapter share its record, so it is held once.
        adapters = {id(request.adapter): adapter_to_record(request.adapter) for request in requests}
        sent = {plan.site: plan_to_records(plan, adapters[id(adapter)]) for plan, adapter in requests}
        for site, reply in self._exchange(sent, MessageType.TRAIN):
            yield reply if isinstance(reply, SiteFailure) else _said(answer_from_records(reply, site))

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        """Ask sites for their ledgers, again while that helps those that crashed; yield those that come."""
        left, barren = {request.site: request_to_records(request) for request in requests}, 0
        while left and barren < MAX_BARREN:
            crashed: dict[str, RecordDict] = {}
            for site, reply in self._exchange(left, MessageType.QUERY):
                if isinstance(reply, SiteFailure):
                    crashed |= {site: left[site]} if reply.code == CRASHED else {}
                elif (ledger := ledger_from_records(reply)) is not None:
                    yield site, ledger
            barren = barren + 1 if len(crashed) == len(left) else 0
            left = crashed

    def _exchange(self, sent: Mapping[str, RecordDict], kind: str) -> Iterator[tuple[str, RecordDict | SiteFailure]]:
        """One message a site; each site's reply as it comes, or why there is none."""
        nodes, deadline = self._nodes(), time.monotonic() + self._timeout
        left, waiting = deque(enumerate(sent)), dict[str, str]()
        while (left or waiting) and time.monotonic() < deadline:
            while left and len(waiting) < self._at_once:
                place, site = left.popleft()
                ttl = deadline - time.monotonic()
                message = Message(sent[site], nodes[place % len(nodes)], kind, ttl=max(1.0, ttl))
                [identifier] = self._grid.push_messages([message])
                waiting[identifier] = site
            before = len(waiting)
            for identifier in list(waiting):  # one at a time: what is pulled is held whole
                yield from self._pull(identifier, waiting)
            if len(waiting) == before:
                time.sleep(POLL_S)
        for site in [*waiting.values(), *(site for _, site in left)]:
            message = f"no answer within {self._timeout:.0f} s"
            yield site, SiteFailure(site=site, code="E-TIMEOUT", message=message, exit_code=3)

    def _pull(self, identifier: str, waiting: dict[str, str]) -> Iterator[tuple[str, RecordDict | SiteFailure]]:
        site = waiting[identifier]
        for reply in self._grid.pull_messages([identifier]):
            waiting.pop(identifier, None)  # of two replies, whoever reads them says what becomes of each
            if reply.has_error():
                # Flower's error text may quote a record; only its number is passed on.
                message = f"failed (Flower code {reply.error.code})"
                yield site, SiteFailure(site=site, code=CRASHED, message=message)
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


def _said(answer: Answer) -> Answer:
    """What a site says. Of a crash only Flower can tell; a site that does would be asked again and again."""
    if isinstance(answer, SiteFailure) and answer.code == CRASHED:
        return answer.model_copy(update={"code": "E-WIRE"})
    return answer
