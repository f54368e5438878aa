"""A site's policy: strict TOML on the site's own disk. What is not allowed there is refused.

No setting is for show: each is a rule of `cotune.client.rules`, or says who the site is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from cotune.shared.job import Job
from cotune.shared.jobfile import SettingsKind, parse_text, validate
from cotune.shared.privacy.crosscheck import REFUSED
from cotune.shared.privacy.mechanism import MIN_NOISE_MULTIPLIER
from cotune.shared.sections import Section, SiteName, Unit, column_of

NO_BUDGET_BY = {
    **REFUSED,
    "rdp": "a valid bound, but a loose one: it is the cross-check of `cotune verify`",
    "prv": "it is the cross-check of `cotune verify`, so it cannot be the figure too",
}


def _priced_by(name: object) -> object:
    """Say why another accountant is not taken, rather than only that it is not."""
    if name != "pld":
        why = NO_BUDGET_BY.get(str(name).lower(), "it is not an accountant of cotune")
        raise ValueError(f'a budget is kept with accountant = "pld", not {str(name)[:40]!r}: {why}')
    return name


DatasetId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
ModelId = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Signer = Annotated[str, StringConstraints(pattern=r"^ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI[A-Za-z0-9+/]{43}( .*)?$")]


class SiteSection(Section):
    """Who the site is."""

    name: SiteName
    org: str = ""
    contact: str = ""
    simulated: bool = False


class Budget(Section):
    """What may ever be spent of a data set, per unit of that data set.

    Attributes:
        epsilon_total: Over all jobs, coordinators and years.
        delta_total: The delta at which all of it is priced; no job may promise a larger one.
        epsilon_per_run: Over all rounds of one run.
        accountant: Only PLD.
    """

    epsilon_total: float = Field(gt=0)
    delta_total: float = Field(1e-5, gt=0, lt=1)
    epsilon_per_run: float = Field(gt=0)
    accountant: Annotated[Literal["pld"], BeforeValidator(_priced_by)] = "pld"

    @model_validator(mode="after")
    def _consistent(self) -> Budget:
        if self.epsilon_per_run > self.epsilon_total:
            raise ValueError("epsilon_per_run must not exceed epsilon_total")
        return self


class DatasetPolicy(Section):
    """One data set, whom its rows belong to, and its budget.

    Attributes:
        id: What jobs call it.
        path: The file of records; relative paths start at the home folder. Never told to anybody.
        unit: ``record``, or ``column:NAME`` for the column that says whose a row is.
        max_per_unit: Most rows of one person a job may use; None: any number.
        budget: What may be spent.
    """

    id: DatasetId
    path: str = Field(min_length=1)
    unit: Unit
    max_per_unit: int | None = Field(None, ge=1)
    budget: Budget

    @property
    def unit_column(self) -> str | None:
        """The column that says whose a row is; None where a row is its own unit."""
        return column_of(self.unit)

    @model_validator(mode="after")
    def _consistent(self) -> DatasetPolicy:
        if self.max_per_unit is not None and self.unit_column is None:
            raise ValueError('max_per_unit needs unit = "column:NAME"')
        return self


class ApproveSection(Section):
    """Who says yes to a job that breaks no rule."""

    mode: Literal["manual", "auto-within-policy"] = "manual"


class AllowSection(Section):
    """What a job may bring. An empty list allows nothing; no `signers` means the coordinators that were joined."""

    models: tuple[ModelId, ...] = ()
    methods: tuple[Literal["lora"], ...] = ("lora",)
    max_lora_rank: int = Field(64, ge=1)
    signers: tuple[Signer, ...] = ()


class RequireSection(Section):
    """What a job must have. `level` is at least "unit" wherever a data set names its persons."""

    min_sites: int = Field(1, ge=1)
    min_records: int = Field(1, ge=1)
    min_noise_multiplier: float = Field(MIN_NOISE_MULTIPLIER, ge=MIN_NOISE_MULTIPLIER)
    level: Literal["unit", "example"] = "example"


class ReleaseSection(Section):
    """What else may leave, beside noised updates."""

    train_metrics: Literal["none", "noised"] = "none"


class Policy(Section):
    """A site's policy file. Frozen: whoever changes the file changes the policy, and the ledger says so."""

    schema_: Literal[1] = Field(1, alias="schema")
    site: SiteSection
    dataset: tuple[DatasetPolicy, ...] = Field(min_length=1)
    approve: ApproveSection = ApproveSection()
    allow: AllowSection = Field(default_factory=lambda: AllowSection.model_validate({}))
    require: RequireSection = Field(default_factory=lambda: RequireSection.model_validate({}))
    release: ReleaseSection = ReleaseSection()

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        ids = [each.id for each in self.dataset]
        if len(set(ids)) < len(ids):
            raise ValueError("two data sets have the same id")
        if self.require.level == "unit" and any(each.unit_column is None for each in self.dataset):
            raise ValueError('require.level = "unit" needs unit = "column:NAME" at every data set')
        if self.approve.mode == "auto-within-policy" and not self.allow.signers:
            raise ValueError('approve.mode = "auto-within-policy" needs allow.signers: whose jobs may start unseen')
        return self

    def find(self, dataset: str | None) -> DatasetPolicy | None:
        """A data set by id. A simulated site has one, whatever a job calls it."""
        if self.site.simulated:
            return self.dataset[0]
        return next((each for each in self.dataset if each.id == dataset), None)


def protected_unit(job: Job) -> str:
    """Whom a job protects: ``record``, or ``column:NAME`` for all rows of one person."""
    return job.data.unit if job.privacy.level == "unit" else "record"


POLICY_FILE = SettingsKind(Policy, "E-POLICY", "policy file", "cotune site init", "cotune site policy")
CRASHES = 4  # times the planned epsilon that a simulated site grants: lost rounds are charged again


def parse_policy(text: str, path: Path) -> Policy:
    """Read a policy's text.

    Raises:
        JobError: E-POLICY-SYNTAX, E-POLICY-KEY or E-POLICY-VALUE: the setting, its line, the nearest known name.
    """
    return validate(parse_text(text, path, POLICY_FILE), POLICY_FILE, origin=path.name, text=text)


def granting(name: str, job: Job, model_sha256: str) -> Policy:
    """The policy of a simulated site: it allows what this job asks for, and some rounds more.

    A round that is lost in a crash and trained again is charged twice; the claim says what came of it.
    """
    unit, delta = protected_unit(job), job.privacy.delta
    most = CRASHES * job.privacy.epsilon
    budget = {"epsilon_total": most, "epsilon_per_run": most}
    dataset = {
        "id": "records",
        "path": "simulated",
        "unit": unit,
        "max_per_unit": None if unit == "record" else job.data.max_per_unit,
        "budget": budget if delta == "auto" else {**budget, "delta_total": delta},
    }
    data = {
        "site": {"name": name, "simulated": True},
        "dataset": [dataset],
        "allow": {"models": [f"sha256:{model_sha256}"], "max_lora_rank": job.lora.r},
        "release": {"train_metrics": job.privacy.metrics},
    }
    return validate(data, POLICY_FILE, origin="simulated site")


def policy_text(policy: Policy) -> str:
    """The policy as the file a site's administrator edits: every setting, and what each section is for."""
    data: dict[str, Any] = policy.model_dump(mode="json", by_alias=True, exclude_none=True)
    if not policy.site.simulated:
        del data["site"]["simulated"]
    parts = ["# What this site allows. Everything else is refused. Each change of this file goes into the ledger.\n"]
    for name, said in COMMENTS.items():
        parts.append(f"{said}{tomli_w.dumps({name: data[name]})}")
    return "\n".join(parts)


COMMENTS = {
    "schema": "",
    "site": "",
    "dataset": "# epsilon_total is for ever and never refilled; id and unit stay once anything was spent.\n",
    "approve": '# manual: `cotune site approve JOB` starts a job; "auto-within-policy": a listed signer does.\n',
    "allow": '# models = ["sha256:..."]: `cotune site policy check JOB` prints it; signers = ["ssh-ed25519 AAAA..."]\n',
    "require": "",
    "release": '# train_metrics = "noised": the mean training loss may leave, noised and accounted.\n',
}
