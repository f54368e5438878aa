"""The only code that talks to Flower's Grid: plans out, answers in, one at a time."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait

import httpx
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from cotune.server.collecting import MAX_BARREN
from cotune.server.conduct import LOST
from cotune.server.fleet import CRASHED, Request
from cotune.shared.errors import ConnectionFailed, TimedOut
from cotune.shared.plan import ClaimRequest, LedgerRequest
from cotune.shared.proposal import JobStanding, Proposal
from cotune.shared.update import Answer, SiteFailure
from cotune.shared.wire import (
    adapter_to_record,
    answer_from_records,
    ledger_from_records,
    plan_to_records,
    proposal_to_records,
    request_to_records,
    signature_from_records,
    standing_from_records,
)

POLL_S = 0.1
NODE_TIMEOUT_S = 120.0
PULL_S = 5.0  # a reply that takes longer to fetch is fetched beside the others'

Place = int | SiteFailure | None  # a site's node; why it never has one; None: not now
PlaceOf = Callable[[str], Place]
Reply = RecordDict | SiteFailure
Fetching = dict[str, Future[Iterable[Message]]]


def _unwatched() -> None:
    """Nobody wants the exchange to end."""


class Exchange:
    """Messages to sites and their replies, over Flower's Grid.

    Args:
        grid: Flower's.
        at_once: How many sites are asked at a time; what they answer is held until it is its turn.
        poll_s: Seconds between looks for answers, for each hundred sites that are waited for.
        watch: Called at each look; raises to end the exchange.
        again_s: After which a site that has not answered is sent its message again, then after twice that, and so on:
            Flower hands a message out once, and a line may lose it. A site that has it answers with the same bytes.
    """

    def __init__(
        self,
        grid: Grid,
        at_once: int,
        poll_s: float = POLL_S,
        watch: Callable[[], None] = _unwatched,
        again_s: float = math.inf,
    ) -> None:
        self._grid, self._at_once, self._poll_s, self._watch = grid, at_once, poll_s, watch
        self._again_s = again_s

    def nodes(self) -> list[int]:
        """The nodes that are there now, in order."""
        with _superlink_errors():
            return sorted(self._grid.get_node_ids())

    def answers(self, requests: Sequence[Request], deadline: float, place_of: PlaceOf) -> Iterator[tuple[str, Answer]]:
        """Each site's answer to its plan, as it comes. A site that is late or lost is a failure, not a wait."""
        # Sites that share an adapter share its record, so it is held once.
        adapters = {id(request.adapter): adapter_to_record(request.adapter) for request in requests}
        sent = {plan.site: plan_to_records(plan, adapters[id(adapter)]) for plan, adapter in requests}
        for site, reply in self._replies(sent, MessageType.TRAIN, deadline, place_of):
            yield site, reply if isinstance(reply, SiteFailure) else _said(answer_from_records(reply, site))

    def ledgers(
        self, requests: Sequence[LedgerRequest], deadline: float, place_of: PlaceOf
    ) -> Iterator[tuple[str, bytes]]:
        """The ledgers that come, those of crashed sites asked for again while that helps."""
        for site, reply in self._answered(requests, deadline, place_of):
            if not isinstance(reply, SiteFailure) and (ledger := ledger_from_records(reply)) is not None:
                yield site, ledger

    def signatures(
        self, requests: Sequence[ClaimRequest], deadline: float, place_of: PlaceOf
    ) -> Iterator[tuple[str, str | SiteFailure]]:
        """Each site's signature of a claim, or why there is none; crashed sites are asked again while that helps."""
        for site, reply in self._answered(requests, deadline, place_of):
            yield site, reply if isinstance(reply, SiteFailure) else signature_from_records(reply, site)

    def standings(
        self, proposals: Sequence[Proposal], deadline: float, place_of: PlaceOf
    ) -> Iterator[JobStanding | SiteFailure]:
        """Where a proposed job stands at each site, as they say it."""
        sent = {proposal.site: proposal_to_records(proposal) for proposal in proposals}
        for site, reply in self._replies(sent, MessageType.QUERY, deadline, place_of):
            yield reply if isinstance(reply, SiteFailure) else standing_from_records(reply, site)

    def _answered(
        self, requests: Sequence[LedgerRequest | ClaimRequest], deadline: float, place_of: PlaceOf
    ) -> Iterator[tuple[str, Reply]]:
        """One reply of each site to a query, those that crashed asked again while that helps."""
        left, barren = {request.site: request_to_records(request) for request in requests}, 0
        while left:
            crashed: dict[str, SiteFailure] = {}
            for site, reply in self._replies(left, MessageType.QUERY, deadline, place_of):
                if isinstance(reply, SiteFailure) and reply.code == CRASHED:
                    crashed[site] = reply
                else:
                    yield site, reply
            barren = barren + 1 if len(crashed) == len(left) else 0
            if barren == MAX_BARREN:
                yield from crashed.items()
                return
            left = {site: left[site] for site in crashed}

    def _replies(
        self, sent: Mapping[str, RecordDict], kind: str, deadline: float, place_of: PlaceOf
    ) -> Iterator[tuple[str, Reply]]:
        """One reply of each site, as it comes, or why there is none."""
        began = time.monotonic()
        left, waiting = deque(sent), dict[str, str]()
        due, patience_s = dict[str, float](), dict.fromkeys(sent, self._again_s)
        late: Fetching = {}
        while (left or waiting) and time.monotonic() < deadline:
            self._watch()
            asked = set(waiting.values()) - set(left)
            left.extend(sorted(site for site in asked if due[site] <= time.monotonic()))
            before = len(left), len(waiting)
            for _ in range(min(len(left), self._at_once - len(asked - set(left)))):
                site = left.popleft()
                place = place_of(site)
                pushed = place if not isinstance(place, int) else self._push(sent[site], place, kind, deadline)
                if isinstance(pushed, SiteFailure):
                    _forget(waiting, site)
                    yield site, pushed.model_copy(update={"site": site})
                elif pushed is None:
                    left.append(site)
                else:
                    waiting[pushed] = site
                    due[site] = time.monotonic() + patience_s[site]
                    patience_s[site] *= 2
            for identifier in list(waiting):  # one at a time: what is pulled is held whole
                for site, reply in self._pull(identifier, waiting, late):
                    left = deque(other for other in left if other != site)
                    yield site, reply
            if (len(left), len(waiting)) == before:
                time.sleep(self._poll_s * (1 + len(waiting) // 100))
        for site in dict.fromkeys([*waiting.values(), *left]):
            message = f"no answer within {deadline - began:.0f} s"
            yield site, SiteFailure(site=site, code="E-TIMEOUT", message=message, exit_code=3)

    def _push(self, records: RecordDict, node: int, kind: str, deadline: float) -> str | SiteFailure | None:
        """The message's identifier; None if Flower takes none for that node now."""
        message = Message(records, node, kind, ttl=max(1.0, deadline - time.monotonic()))
        with _superlink_errors():
            pushed = list(self._grid.push_messages([message]))
        if not pushed:
            return SiteFailure(site="", code="E-TOO-LARGE", message="the message is larger than Flower carries")
        return pushed[0] or None

    def _pull(self, identifier: str, waiting: dict[str, str], late: Fetching) -> Iterator[tuple[str, Reply]]:
        if (site := waiting.get(identifier)) is None:
            return
        with _superlink_errors():
            replies = self._fetch(identifier, late)
        for reply in replies:
            _forget(waiting, site)  # of two replies, whoever reads them says what becomes of each
            if reply.has_error():
                # Flower's error text may quote a record; only its number is passed on.
                message = f"failed (Flower code {reply.error.code})"
                yield site, SiteFailure(site=site, code=CRASHED, message=message)
            else:
                yield site, reply.content

    def _fetch(self, identifier: str, late: Fetching) -> Iterable[Message]:
        """The replies to a message that are whole.

        Flower waits for every part of a reply that was begun, for minutes: a site that withholds one would hold
        up all others. So after PULL_S the wait goes on in a thread of its own, which ends with Flower's patience.
        """
        pulled = late.pop(identifier, None)
        if pulled is None:
            pulled = Future[Iterable[Message]]()
            threading.Thread(target=self._fetch_into, args=(pulled, identifier), daemon=True).start()
            wait([pulled], PULL_S)
        if pulled.done():
            return pulled.result()
        late[identifier] = pulled
        return ()

    def _fetch_into(self, pulled: Future[Iterable[Message]], identifier: str) -> None:
        try:
            pulled.set_result(self._grid.pull_messages([identifier]))
        except Exception as error:  # noqa: BLE001 - whoever waits for the future raises it
            pulled.set_exception(error)


class GridFleet:
    """A `Fleet` over Flower nodes: each site's plan goes to one node, sites spread evenly over nodes."""

    def __init__(self, grid: Grid, sites: Sequence[str], round_timeout_s: float, at_once: int) -> None:
        self._exchange = Exchange(grid, at_once)
        self._sites = tuple(sorted(sites))
        self._timeout = round_timeout_s

    def sites(self) -> Sequence[str]:
        """Names of the sites of this run, in order."""
        return self._sites

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Send the requests; yield answers as they come. A site that is late or lost is a failure, not a wait."""
        places = self._places([request.plan.site for request in requests])
        for _, answer in self._exchange.answers(requests, time.monotonic() + self._timeout, places):
            yield answer

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        """Ask sites for their ledgers, again while that helps those that crashed; yield those that come."""
        places = self._places([request.site for request in requests])
        yield from self._exchange.ledgers(requests, time.monotonic() + self._timeout, places)

    def countersign(self, requests: Sequence[ClaimRequest]) -> Iterator[tuple[str, str | SiteFailure]]:
        """Ask sites to sign a claim; yield by site the signature, or why there is none."""
        places = self._places([request.site for request in requests])
        yield from self._exchange.signatures(requests, time.monotonic() + self._timeout, places)

    def _places(self, sites: Sequence[str]) -> PlaceOf:
        deadline = time.monotonic() + NODE_TIMEOUT_S
        while not (nodes := self._exchange.nodes()):
            if time.monotonic() > deadline:
                raise TimedOut("E-NODES", f"no Flower node appeared within {NODE_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)
        places = {site: nodes[number % len(nodes)] for number, site in enumerate(sites)}
        return places.__getitem__


@contextlib.contextmanager
def _superlink_errors() -> Generator[None]:
    """Whatever stands between us and the SuperLink is no fault of the run.

    Raises:
        ConnectionFailed: E-SUPERLINK-LOST.
    """
    try:
        yield
    except httpx.HTTPError as error:
        raise ConnectionFailed(LOST, f"Flower's SuperLink takes no more messages ({type(error).__name__})") from None


def _forget(waiting: dict[str, str], site: str) -> None:
    """Wait for none of a site's messages any more."""
    for identifier in [identifier for identifier, other in waiting.items() if other == site]:
        del waiting[identifier]


def _said(answer: Answer) -> Answer:
    """What a site says. Of a crash only Flower can tell; a site that does would be asked again and again."""
    if isinstance(answer, SiteFailure) and answer.code == CRASHED:
        return answer.model_copy(update={"code": "E-WIRE"})
    return answer
