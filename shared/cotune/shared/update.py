"""What a site answers: a noised, encoded and signed update, or why there is none."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cotune.shared.adapter import Vector
from cotune.shared.chain import WITNESSES, SignedHead
from cotune.shared.codec import Payload, decode
from cotune.shared.sections import Sha256, SiteName

MAX_CHARGES = 2  # of one round: it may be lost once


class UpdateHeader(BaseModel):
    """What comes with an update. No record count, no timing, no loss in the clear: those would be releases too.

    Attributes:
        site: Who answers.
        run_id: The plan's run.
        round: The plan's round.
        job_sha256: The plan's job.
        base_sha256: The global adapter the update starts from.
        update_sha256: Hash of the payload.
        event: What the round released, for the accountant.
        charges: How often the round was charged: more than once if it was lost in a crash.
        head: The site's signed ledger head, after the round was charged and committed.
        witnessed: Newest heads this site holds of the other sites its plan named.
        clipping_norm: Where adaptive clipping has got to at this site, from noised counts.
        train_loss: Noised mean training loss of the round, in nats; accounted in the event.
        signature: SSH signature of all the above by the site's key, namespace `cotune-update`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    site: SiteName
    run_id: str = Field(max_length=100)
    round: int = Field(ge=1)
    job_sha256: Sha256
    base_sha256: Sha256
    update_sha256: Sha256
    event: dict[str, Any]
    charges: int = Field(default=1, ge=1, le=1000)
    head: SignedHead
    witnessed: tuple[SignedHead, ...] = Field(default=(), max_length=WITNESSES)
    clipping_norm: float | None = Field(default=None, gt=0)
    train_loss: float | None = None
    signature: str = Field(default="", max_length=2000)

    def message(self) -> bytes:
        """What is signed: everything but the signature, as canonical JSON."""
        return self.model_copy(update={"signature": ""}).model_dump_json().encode()


class AdapterUpdate:
    """A header and the encoded difference new - old of the tensors a round trains.

    Attributes:
        header: What is said of it.
        payload: Its numbers in the job's `transport.codec_up`.
    """

    def __init__(self, header: UpdateHeader, payload: Payload) -> None:
        self.header = header
        self.payload = payload

    @property
    def bytes(self) -> int:
        """Size on the wire: payload and header."""
        return int(self.payload.nbytes) + len(self.header.model_dump_json())

    def delta(self, codec: str, size: int) -> Vector:
        """The difference, shape (size,), fp32.

        Raises:
            ConnectionFailed: E-CODEC: the payload is not `size` numbers in this codec.
        """
        return decode(self.payload, codec, size)


def payload_sha256(payload: Payload) -> str:
    """SHA-256 of a payload's bytes, hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(payload).tobytes()).hexdigest()


class SiteFailure(BaseModel):
    """A site's answer when it cannot or will not train: a code and a public message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: str
    code: str = Field(pattern=r"^[A-Z][A-Z0-9-]{0,39}$")
    message: str
    exit_code: int = Field(default=1, ge=1, le=255)  # 0 would end a run of failures as a success


Answer = AdapterUpdate | SiteFailure
