"""The job file: strict TOML (YAML and JSON by extension) read once into frozen models.

`auto` values are filled by `planning.resolve`, so that the resolved job holds plain values only; its SHA-256
names the job everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from cotune.shared.aggregation import RULES, Rule
from cotune.shared.combinations import faults
from cotune.shared.errors import JobError
from cotune.shared.sections import (
    CONTENT,
    HOME,
    SITE,
    AggregationSettings,
    AuditSettings,
    DataSettings,
    EvalSettings,
    FederationSettings,
    LoraSettings,
    ModelSettings,
    PrivacySettings,
    RunSettings,
    Section,
    SimulationSettings,
    TaskSettings,
    TrainSettings,
    TransportSettings,
)


class Job(Section):
    """A whole job. Public by construction: it is shown to every site and to the coordinator."""

    schema_: Literal[1] = Field(1, alias="schema")
    run: RunSettings = Field(default_factory=lambda: RunSettings.model_validate({}))
    model: ModelSettings
    task: TaskSettings = Field(default_factory=lambda: TaskSettings.model_validate({}))
    lora: LoraSettings = Field(default_factory=lambda: LoraSettings.model_validate({}))
    data: DataSettings
    train: TrainSettings = Field(default_factory=lambda: TrainSettings.model_validate({}))
    privacy: PrivacySettings = Field(default_factory=lambda: PrivacySettings.model_validate({}))
    federation: FederationSettings = Field(default_factory=lambda: FederationSettings.model_validate({}))
    aggregation: AggregationSettings = Field(default_factory=lambda: AggregationSettings.model_validate({}))
    transport: TransportSettings = Field(default_factory=lambda: TransportSettings.model_validate({}))
    eval: EvalSettings = Field(default_factory=lambda: EvalSettings.model_validate({}))
    audit: AuditSettings = Field(default_factory=lambda: AuditSettings.model_validate({}))
    simulation: SimulationSettings = Field(default_factory=lambda: SimulationSettings.model_validate({}))

    @model_validator(mode="after")
    def _consistent(self) -> Job:
        for fault in faults(self):
            raise ValueError(fault)
        return self

    @property
    def sites(self) -> int:
        """How many sites the job is about."""
        return len(self.data.sites) or self.federation.sites

    @property
    def steps(self) -> int:
        """Noisy steps of the whole run."""
        return self.run.rounds * self.train.local_steps

    @property
    def rounds_per_site(self) -> int:
        """The most rounds a site takes."""
        return min(self.run.rounds, self.federation.max_rounds_per_site or self.run.rounds)

    @property
    def steps_per_site(self) -> int:
        """The most noisy steps a site takes over the whole run: what its people are charged for."""
        return self.rounds_per_site * self.train.local_steps

    @property
    def sites_per_round(self) -> int:
        """The most sites a round asks."""
        return min(self.sites, self.federation.sites_per_round or self.sites)

    @property
    def rule(self) -> Rule:
        """What the job's aggregation rule asks of sites and coordinator."""
        return RULES[self.aggregation.rule]

    def rank_of(self, site: str) -> int:
        """The rank a site trains at."""
        return self.lora.ranks.get(site, self.lora.r)

    @property
    def units_per_site(self) -> int:
        """The public number of units of a site: persons where they are protected, rows otherwise."""
        persons = self.data.units_per_site
        return persons if self.privacy.level == "unit" and persons else self.data.records_per_site

    @property
    def sampling_probability(self) -> float:
        """Chance of each unit to be in a batch: expected batch size over the public number of units."""
        return self.train.batch_size / self.units_per_site

    @property
    def is_private(self) -> bool:
        """Whether the run may claim anything: an accounted level and noise nobody can reproduce."""
        return self.privacy.level != "none" and self.privacy.noise == "secure"

    def to_json(self) -> str:
        """Canonical JSON: what is sent to sites and hashed."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))

    def sha256(self) -> str:
        """SHA-256 of `to_json`, hexadecimal: the job's name for sites, ledgers and claims."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def replace(self, **sections: Mapping[str, object]) -> Job:
        """A validated copy with some settings changed, given as section=dict of settings."""
        data = self.model_dump(by_alias=True)
        for section, settings in sections.items():
            data[section] = {**data[section], **settings}
        return Job.model_validate(data)


def absolute(path: str, folder: Path) -> str:
    """A data path of a job file as an absolute one; what is no path stays, and `home:` keeps its word.

    Raises:
        JobError: No file can have that name.
    """
    if path.startswith(("dataset:", SITE, CONTENT)):
        return path
    kind = HOME if path.startswith(HOME) else ""
    try:
        return kind + str((folder / Path(path.removeprefix(kind)).expanduser()).resolve())
    except (OSError, ValueError, RuntimeError):
        raise JobError("E-CONFIG-VALUE", "a data path is not one a file can have", param="data") from None
