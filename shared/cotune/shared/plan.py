"""What the coordinator asks of one site in one round; public by construction."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from cotune.shared.chain import SignedHead
from cotune.shared.job import Job
from cotune.shared.sections import Sha256, SiteName


@cache
def cotune_version() -> str:
    """The version of cotune that is installed here."""
    return version("cotune")


RunId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class RoundPlan(BaseModel):
    """A request to train.

    Attributes:
        run_id: Name of the coordinator's run, for the site's own records.
        cotune: Version the coordinator runs; a site refuses another.
        job: The resolved job.
        site: Who is asked.
        round: Counted from 1.
        base_sha256: Hash of the flat global adapter that comes with the plan, as decoded.
        rank: At which the site trains.
        offset_rank: Of the frozen addition to the base weights that comes with the adapter; 0 for none.
        frozen_sha256: Fingerprint of the adapter's initial values, which the site must arrive at too.
        clipping_norm: Where adaptive clipping has got to; the job's own norm otherwise.
        heads: Newest signed ledger heads the coordinator knows: this site's own, and some to witness.
        notice: Why this site's last update was not used, in public words; None if it was, or there was none.
        signature: SSH signature over the job's hash, namespace `cotune-job`; None for an unsigned job.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    run_id: RunId
    cotune: Annotated[str, Field(default_factory=cotune_version, max_length=40)]
    job: Job
    site: SiteName
    round: int = Field(ge=1)
    base_sha256: Sha256
    rank: int = Field(ge=1, le=1024)
    offset_rank: int = Field(default=0, ge=0, le=1_000_000)
    frozen_sha256: Sha256
    clipping_norm: float = Field(gt=0)
    heads: tuple[SignedHead, ...] = ()
    notice: str | None = Field(default=None, max_length=500)
    signature: str | None = Field(default=None, max_length=2000)


MAX_CLAIM = 8_000_000  # characters: a claim of some thousand sites


class ClaimRequest(BaseModel):
    """A request, at the end of a run, to sign its claim.

    Attributes:
        run_id: The run.
        site: Who is asked.
        claim: claim.json, exactly as it is; what is signed are these bytes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: RunId
    site: SiteName
    claim: str = Field(max_length=MAX_CLAIM)


class LedgerRequest(BaseModel):
    """A request, at the end of a run, for a site's ledger: the proof of what the run cost there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: RunId
    site: SiteName
