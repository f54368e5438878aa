"""A job put before a site that is to take part, and where it stands there. No record is read for either."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from cotune.shared.job import Job
from cotune.shared.plan import RunId, cotune_version
from cotune.shared.sections import Sha256, SiteName

MAX_TEXT = 500
JobState = Literal["approved", "waiting", "denied", "refused"]


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a stranger's words steer no terminal")
    return text


Words = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_printable)]


class Proposal(BaseModel):
    """A request to take part in a run.

    Attributes:
        run_id: Name of the coordinator's run.
        cotune: Version the coordinator runs; a site refuses another.
        job: The resolved job, as every plan of the run will carry it.
        site: Who is asked.
        bundle_sha256: Of the code that comes with the run; a site refuses any but its own version's.
        signature: SSH signature over the job's hash, namespace `cotune-job`; None for an unsigned job.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    run_id: RunId
    cotune: Annotated[str, Field(default_factory=cotune_version, max_length=40)]
    job: Job
    site: SiteName
    bundle_sha256: Sha256
    signature: str | None = Field(default=None, max_length=2000)


class JobStanding(BaseModel):
    """Where a job stands at a site, in the site's own words.

    Attributes:
        site: Who says so.
        run_id: The proposal's run.
        job_sha256: The proposal's job.
        state: `waiting` for the site's administrator; `denied` by him; `refused` by a rule.
        rule: The rule that refuses it.
        text: Why, in public words.
        signature: SSH signature of all the above by the site's key, namespace `cotune-standing`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: SiteName
    run_id: RunId
    job_sha256: Sha256
    state: JobState
    rule: Words | None = None
    text: Words | None = None
    signature: str = Field(default="", max_length=2000)

    def message(self) -> bytes:
        """What is signed: everything but the signature, as canonical JSON."""
        return self.model_copy(update={"signature": ""}).model_dump_json().encode()
