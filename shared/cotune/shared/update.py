"""What a site answers: a noised update, or why there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cotune.shared.adapter import Vector
from cotune.shared.chain import SignedHead
from cotune.shared.job import Sha256, SiteName


class UpdateHeader(BaseModel):
    """What comes with an update. No record count, no timing, no loss in the clear: those would be releases too.

    Attributes:
        site: Who answers.
        round: The plan's round.
        job_sha256: The plan's job.
        base_sha256: The global adapter the update starts from.
        update_sha256: Hash of the update's fp32 bytes.
        event: What the round released, for the accountant.
        head: The site's signed ledger head, after the round was charged and committed.
        witnessed: Newest heads this site holds of the other sites its plan named.
        clipping_norm: Where adaptive clipping has got to at this site, from noised counts.
        train_loss: Noised mean training loss of the round, in nats; accounted in the event.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    site: SiteName
    round: int = Field(ge=1)
    job_sha256: Sha256
    base_sha256: Sha256
    update_sha256: Sha256
    event: dict[str, Any]
    head: SignedHead
    witnessed: tuple[SignedHead, ...] = ()
    clipping_norm: float | None = Field(default=None, gt=0)
    train_loss: float | None = None


class AdapterUpdate:
    """A header and the flat fp32 difference new - old, shape (trained parameters,)."""

    def __init__(self, header: UpdateHeader, delta: Vector) -> None:
        self.header = header
        self.delta = delta

    @property
    def bytes(self) -> int:
        """Size on the wire: array and header."""
        return int(self.delta.nbytes) + len(self.header.model_dump_json())

    @property
    def norm(self) -> float:
        """L2 norm of the (already noised) update."""
        return float(np.linalg.norm(self.delta.astype(np.float64)))


class SiteFailure(BaseModel):
    """A site's answer when it cannot or will not train: a code and a public message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: str
    code: str
    message: str
    exit_code: int = 1


Answer = AdapterUpdate | SiteFailure
