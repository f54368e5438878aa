"""Flower's grid in this process: messages and replies are Flower's own, the nodes behind it are as each test says."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Literal

from flwr.app import Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from tests.server.answers import key_of

from cotune.server.enrolment import Enrolled
from cotune.shared.proposal import JobStanding, Proposal
from cotune.shared.signing import public_key_line, sign
from cotune.shared.wire import query_from_records, standing_to_records

Answerer = Callable[[RecordDict], RecordDict | Error | None]
State = Literal["approved", "revoked"]


def within_a_run() -> None:
    """Say which run this process belongs to, as Flower does in the processes it starts."""
    for name in ("node_id", "run_id", "task_id"):
        setattr(TaskIdentity, f"_{name}", 1)


class Nodes:
    """What an `Exchange` needs of Flower's grid.

    Args:
        answers: Node -> what it replies; None for a message that it keeps to itself.
        there: The nodes that are online, asked anew each time.
    """

    def __init__(self, answers: dict[int, Answerer], there: Callable[[], Iterable[int]] | None = None) -> None:
        self._answers, self._there = answers, there or (lambda: answers)
        self._sent: dict[str, Message] = {}
        self.reached: list[int] = []

    def get_node_ids(self) -> list[int]:
        return list(self._there())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        made = {uuid.uuid4().hex: message for message in messages}
        for identifier, message in made.items():
            message.metadata.__dict__["_message_id"] = identifier  # as Flower's own grids do
            self.reached.append(message.metadata.dst_node_id)
        self._sent |= made
        return list(made)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        pulled: list[Message] = []
        for identifier in message_ids:
            message = self._sent.get(identifier)
            reply = self._answers[message.metadata.dst_node_id](message.content) if message else None
            if message is not None and reply is not None:
                del self._sent[identifier]
                pulled.append(Message(reply, reply_to=message))
        return pulled


def enrolled_as(site: str, node_id: int, state: State = "approved") -> Enrolled:
    """A site that is enrolled with the key that `answers.key_of` gives it."""
    return Enrolled.model_construct(
        name=site,
        public_key=public_key_line(key_of(site).public_key()),
        node_key="",
        node_id=node_id,
        policy_sha256="0" * 64,
        cotune="",
        state=state,
        approved=datetime.now(UTC),
    )


def standing_of(proposal: Proposal, state: str = "approved", **changes: object) -> JobStanding:
    """Where a proposed job stands, signed by its site's key."""
    facts = {
        "site": proposal.site,
        "run_id": proposal.run_id,
        "job_sha256": proposal.job.sha256(),
        "state": state,
        **changes,
    }
    said = JobStanding.model_validate(facts)
    return said.model_copy(update={"signature": sign(key_of(said.site), "cotune-standing", said.message())})


def standing_at(records: RecordDict, state: str = "approved", **changes: object) -> RecordDict:
    """The reply of a site that is shown a job."""
    proposal = query_from_records(records)
    assert isinstance(proposal, Proposal)
    return standing_to_records(standing_of(proposal, state, **changes))
