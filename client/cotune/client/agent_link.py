"""The courier's end of the agent's socket. It loads no model library: a courier is small, and holds nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
from pydantic import ValidationError

from cotune.client.frames import MAX_FRAME, foreign, pack, plan_frame, read_answer, unpack
from cotune.shared.codec import Payload
from cotune.shared.errors import ConnectionFailed, CotuneError, TimedOut, ended
from cotune.shared.plan import ClaimRequest, LedgerRequest, RoundPlan
from cotune.shared.proposal import JobStanding, Proposal
from cotune.shared.update import Answer, SiteFailure

SERVICE = "cotune.Agent"
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_FRAME),
    ("grpc.max_send_message_length", MAX_FRAME),
    ("grpc.use_local_subchannel_pool", 1),  # another channel's back-off is not ours
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 30_000),  # an agent that is stopped or hangs is away too
    ("grpc.keepalive_timeout_ms", 20_000),
]
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
AT_ONCE_S, SOON_S = 10.0, 120.0
BUSY = grpc.StatusCode.RESOURCE_EXHAUSTED
AWAY = (BUSY, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


class AgentLink:
    """The agent as a courier sees it.

    Edge cases: an agent that is away, starts, or dies while it answers is asked again until `patience_s` have
    passed without a sign of life from it. Asking again is free: a round gives one update, however often it is asked.

    Args:
        socket: Where the agent listens.
        patience_s: How long it may be away.
    """

    def __init__(self, socket: Path, patience_s: float = 300.0) -> None:
        self._socket, self._patience_s = socket, patience_s

    def train(self, plan: RoundPlan, payload: Payload, on_progress: Callable[[int], None]) -> Answer:
        """The site's answer to a plan; never raises.

        Edge cases: an agent that stays away, a message too large for the socket, and an answer that is none
        are failures of the site with a code each.
        """
        try:
            said = b""
            for said in self._ask("Train", plan_frame(plan, payload)):
                step = unpack(said)[0].get("step")
                if step is not None:
                    on_progress(int(step))
            return read_answer(said)
        except CotuneError as error:
            return SiteFailure(site=plan.site, code=error.code, message=error.message, exit_code=error.exit_code)

    def propose(self, proposal: Proposal) -> JobStanding:
        """Where a proposed job stands at the site.

        Raises:
            CotuneError: What the site said instead, or E-AGENT-AWAY.
        """
        header, _ = self._answered("Propose", {"proposal": proposal.model_dump(mode="json", by_alias=True)})
        try:
            return JobStanding.model_validate(header.get("standing"))
        except ValidationError:
            raise foreign("a standing") from None

    def ledger(self, request: LedgerRequest) -> bytes:
        """The site's ledger.

        Raises:
            CotuneError: As `propose`.
        """
        return self._answered("Ledger", {"request": request.model_dump(mode="json")})[1].tobytes()

    def countersign(self, request: ClaimRequest) -> str:
        """The site's signature of a claim.

        Raises:
            CotuneError: As `propose`.
        """
        header, _ = self._answered("Countersign", {"request": request.model_dump(mode="json")})
        return str(header.get("signature"))

    def describe(self) -> dict[str, Any]:
        """Who the agent is, and what it does at the moment.

        Raises:
            CotuneError: As `propose`.
        """
        return self._answered("Describe", {}, AT_ONCE_S)[0]["agent"]

    def _answered(
        self, method: str, header: Mapping[str, Any], within_s: float = SOON_S
    ) -> tuple[dict[str, Any], Payload]:
        """The one answer to a short request; a failure is raised as the error it is."""
        said, payload = unpack(b"".join(self._ask(method, pack(header), within_s)))
        if "failure" in said:
            failure = SiteFailure.model_validate(said["failure"])
            raise ended(failure.code, failure.message, failure.exit_code)
        return said, payload

    def _ask(self, method: str, frame: bytes, within_s: float | None = None) -> Iterator[bytes]:
        """What the agent says, from the first time that it answers to the end."""
        if len(frame) > MAX_FRAME:
            raise ConnectionFailed("E-MESSAGE-SIZE", f"a message of {len(frame):,} bytes; the most is {MAX_FRAME:,}")
        seen, wait_s = time.monotonic(), FIRST_WAIT_S
        while True:
            try:
                with grpc.insecure_channel(f"unix:{self._socket}", OPTIONS) as channel:
                    for said in channel.unary_stream(f"/{SERVICE}/{method}")(frame, timeout=within_s):
                        seen, wait_s = time.monotonic(), FIRST_WAIT_S
                        yield said
                return
            except grpc.RpcError as error:
                self._require_patience(error.code(), seen)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _require_patience(self, code: grpc.StatusCode, seen: float) -> None:
        if code not in AWAY:
            raise ConnectionFailed("E-WIRE", f"the agent ended the call ({code.name})")
        if time.monotonic() - seen >= self._patience_s:
            named = ("E-AGENT-BUSY", "is busy") if code is BUSY else ("E-AGENT-AWAY", "does not answer")
            raise TimedOut(named[0], f"the site's agent {named[1]}", hint="cotune site status")
