"""The form of `privacy/claim.json`: what a claim of this version must say, and nothing beside it."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cotune.shared.chain import PublicKey, SignedHead
from cotune.shared.errors import JobError
from cotune.shared.plan import RunId
from cotune.shared.sections import Sha256, SiteName

VERSION = 1
SCHEMA = f"cotune/privacy-claim/{VERSION}"
JSON_SCHEMA = "https://json-schema.org/draft/2020-12/schema"
Cost = Annotated[float, Field(ge=0)]
Delta = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0, le=1)]
Curve = tuple[tuple[Rate, Rate], ...]
Words = Annotated[str, Field(min_length=1)]
Adjacency = Literal["add-or-remove-one", "zero-out-one"]


class Form(BaseModel):
    """A part of a claim."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ReleasedFile(Form):
    """A file the claim is about."""

    name: Words
    sha256: Sha256


class ModelHashes(Form):
    """The model: the base by name and hash, and the released adapter's file of weights, if there is one."""

    base: str
    base_sha256: Sha256
    adapter_sha256: Sha256 | None


class PersonBound(Form):
    """What a person with so many rows is promised where the unit is a row; None: nothing."""

    records: int = Field(ge=1)
    epsilon: Cost | None


class Guarantee(Form):
    """The promise in figures. `tradeoff` is (false positives, true positives), `delta_of_epsilon` (epsilon, delta)."""

    variant: Literal["approximate DP"]
    epsilon: Cost
    delta: Delta
    adjacency: Adjacency
    target_epsilon: Annotated[float, Field(gt=0)]
    epsilon_without_amplification: Cost
    epsilon_replace_one: Cost
    epsilon_second_accountant: Cost
    person: tuple[PersonBound, ...]
    tradeoff: Curve
    delta_of_epsilon: tuple[tuple[Cost, Rate], ...]


class Adversary(Form):
    """Whom it holds against, what that one sees, and the bound on what it can learn; None where nothing is promised."""

    who: Literal["coordinator", "another site", "colluding sites", "reader of the released model"]
    sees: Words
    epsilon: Cost | None
    delta: Delta | None
    epsilon_without_amplification: Cost | None
    tradeoff: Curve
    note: Words


class UnitOfPrivacy(Form):
    """Whom or what the figures are about."""

    level: Literal["example", "unit", "none"]
    column: str | None
    definition: Words
    adjacency: Adjacency
    max_records_per_person: Annotated[int, Field(ge=1)] | None
    person_level: Words


class SiteCost(Form):
    """What a site's entries cost its units, and the signed head of its ledger."""

    id: SiteName
    sampling: Literal["poisson", "truncated poisson"]
    sampling_probability: Annotated[float, Field(gt=0, le=1)]
    noise_multiplier: Annotated[float, Field(gt=0)] | None
    clipping_norm: Annotated[float, Field(gt=0)] | None
    steps: int = Field(ge=0)
    epsilon: Cost | None
    delta: Delta | None
    ledger_head: SignedHead | None


class CoordinatorKey(Form):
    """Who signs for the coordinator; `simulated`: with a key made for this one run."""

    public_key: PublicKey
    simulated: bool


class ReloadCheck(Form):
    """Loss of the adapter when it was saved, and as a fresh process loads it."""

    loss_saved: float
    loss_reloaded: float


class Evidence(Form):
    """What was measured when the claim was made."""

    reload_check: ReloadCheck | None


class PrivacyClaim(Form):
    """A privacy claim."""

    schema_: Literal["cotune/privacy-claim/1"] = Field(alias="schema")
    run_id: RunId
    created: Words
    job_sha256: Sha256
    subject: tuple[ReleasedFile, ...]
    model: ModelHashes
    statement: Words
    guarantee: Guarantee | None
    adversaries: Annotated[tuple[Adversary, ...], Field(min_length=4, max_length=4)]
    unit: UnitOfPrivacy
    sites: tuple[SiteCost, ...]
    releases: Annotated[tuple[Words, ...], Field(min_length=1)]
    composition: dict[str, Words]
    mechanism: dict[str, Words]
    threat_model: dict[str, Words]
    unprotected: Annotated[tuple[Words, ...], Field(min_length=1)]
    coordinator: CoordinatorKey
    evidence: Evidence
    software: dict[str, str]
    claim_id: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


def json_schema() -> str:
    """The form as a JSON schema, for programs that are not ours; kept beside this file and put into every run."""
    schema = {"$schema": JSON_SCHEMA, "$id": SCHEMA, **PrivacyClaim.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


@lru_cache(maxsize=2)  # simulated sites of one process read the same claim
def read_claim(content: bytes) -> dict[str, Any]:
    """A claim from the exact bytes of its file, which must not be changed.

    Guarantee: what is returned has the form of this version, whole, with no key said twice.

    Raises:
        JobError: E-CLAIM-FORM: it is no claim; E-CLAIM-VERSION: it is one of another version.
    """
    try:
        claim = json.loads(content, object_pairs_hook=_once)
        said = str(claim["schema"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = str(error) if isinstance(error, _Twice) else "expected a JSON object with a `schema`"
        raise JobError("E-CLAIM-FORM", f"claim.json is no privacy claim: {why}") from None
    if said != SCHEMA:
        raise _of_another_version(said)
    try:
        PrivacyClaim.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in fault["loc"])[:80]
        raise JobError("E-CLAIM-FORM", f"claim.json has not the form of a claim: `{where}`: {fault['msg']}") from None
    return claim


def _of_another_version(said: str) -> JobError:
    named = re.fullmatch(r"cotune/privacy-claim/([0-9]{1,6})", said)
    if not named:
        return JobError("E-CLAIM-FORM", f"claim.json is no privacy claim: its schema is {said[:60]!a}")
    what = f"this claim is of version {named[1]}; this cotune knows {VERSION}"
    return JobError("E-CLAIM-VERSION", what, hint="pip install -U cotune")


class _Twice(ValueError):
    """A key was said twice: two readers of such a file may read two claims."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice("a key is said twice")
    return found
