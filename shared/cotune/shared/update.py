"""What a site answers: a noised update, or why there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cotune.shared.adapter import Vector
from cotune.shared.job import Sha256, SiteName


class UpdateHeader(BaseModel):
    """What comes with an update. No loss, no record count, no timing: those would be releases of their own.

    Attributes:
        site: Who answers.
        round: The plan's round.
        job_sha256: The plan's job.
        base_sha256: The global adapter the update starts from.
        update_sha256: Hash of the update's fp32 bytes.
        event: What the round released, for the accountant.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: SiteName
    round: int = Field(ge=1)
    job_sha256: Sha256
    base_sha256: Sha256
    update_sha256: Sha256
    event: dict[str, Any]


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
