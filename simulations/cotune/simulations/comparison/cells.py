"""What a comparison is asked to run: every combination of rules, epsilons, seeds and varied settings, as jobs."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from cotune.shared.aggregation import RULES
from cotune.shared.cli import job_file
from cotune.shared.errors import JobError, did_you_mean
from cotune.shared.files import file_sha256
from cotune.shared.job import Job
from cotune.shared.jobfile import load_job

TUNING_OFFSET = 1000  # a seed that is far from those people count
RESERVED = {
    "aggregation.rule": "--rules",
    "privacy.epsilon": "--epsilons",
    "privacy.level": "--epsilons",
    "privacy.noise_multiplier": "--epsilons",
    "run.seed": "--seeds",
    "run.name": "--name",
}
Setting = tuple[str, str]  # its name, and its value as it would stand on the command line
Axis = tuple[str, tuple[str, ...]]  # a setting's name and all its values
RowKey = tuple[str, float, tuple[Setting, ...]]


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        job: A job file's absolute path, or recipe:NAME.
        overrides: Settings of every cell, as section.key=value.
        rules: Aggregation rules; empty for the job's own.
        epsilons: Budgets, inf for no privacy; empty for the job's own privacy settings as they are.
        seeds: Of `run.seed`; empty for the job's own.
        vary: Settings to be varied as well.
        own: Settings of one rule alone, as (rule, section.key=value).
        tune: A setting whose best value is looked for first.
    """

    job: str
    overrides: tuple[str, ...]
    rules: tuple[str, ...]
    epsilons: tuple[float, ...]
    seeds: tuple[int, ...]
    vary: tuple[Axis, ...]
    own: tuple[tuple[str, str], ...]
    tune: Axis | None

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON; what is not a number there is a word."""
        return json.loads(json.dumps({**asdict(self), "epsilons": [epsilon_text(e) for e in self.epsilons]}))

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Request:
        """The request that `to_dict` gave."""
        return Request(
            job=data["job"],
            overrides=tuple(data["overrides"]),
            rules=tuple(data["rules"]),
            epsilons=tuple(map(float, data["epsilons"])),
            seeds=tuple(data["seeds"]),
            vary=tuple((name, tuple(values)) for name, values in data["vary"]),
            own=tuple((rule, setting) for rule, setting in data["own"]),
            tune=(data["tune"][0], tuple(data["tune"][1])) if data["tune"] else None,
        )


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        name: Unique in the comparison; the run is named so.
        rule: Its aggregation rule.
        epsilon: Its budget; inf for no privacy.
        seed: Its public seed.
        varied: The varied settings.
        tried: The value it tries, in a run that looks for the best one; None in a run that counts.
    """

    name: str
    rule: str
    epsilon: float
    seed: int
    varied: tuple[Setting, ...]
    tried: str | None = None

    @property
    def row(self) -> RowKey:
        """The row of the table it belongs to: all that it has in common with other seeds."""
        return self.rule, self.epsilon, self.varied


@dataclass(frozen=True)
class Options:
    """The options of the command line as they were written; None or empty where nothing was."""

    rules: str | None = None
    epsilons: str | None = None
    seeds: str | None = None
    vary: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    tune: str | None = None


def parse_request(source: str, overrides: Sequence[str], options: Options) -> Request:
    """Read the options of `cotune compare`.

    Raises:
        JobError: E-COMPARE-RULE, -EPSILON, -SEED, -SETTING or -TWICE: an option names what there is not, or twice.
    """
    vary = tuple(map(_axis, options.vary))
    tune = _axis(options.tune) if options.tune else None
    _once("--vary and --tune", [name for name, _ in (*vary, *([tune] if tune else []))])
    return Request(
        job=source if source.startswith("recipe:") else str(Path(source).resolve()),
        overrides=tuple(overrides),
        rules=_once("--rules", [_rule(text) for text in _parts(options.rules)]),
        epsilons=_once("--epsilons", [_epsilon(text) for text in _parts(options.epsilons)]),
        seeds=_once("--seeds", [_seed(text) for text in _parts(options.seeds)]),
        vary=vary,
        own=tuple(map(_own, options.own)),
        tune=tune,
    )


def _parts(text: str | None) -> list[str]:
    return [] if text is None else [part.strip() for part in text.split(",")]


def _once(option: str, values: list[Any]) -> tuple[Any, ...]:
    twice = next((value for place, value in enumerate(values) if value in values[:place]), None)
    if twice is not None:
        raise JobError("E-COMPARE-TWICE", f"{option} names `{twice}` twice", param=option)
    return tuple(values)


def _rule(text: str) -> str:
    if text not in RULES:
        known = f"there are: {', '.join(RULES)}.{did_you_mean(text, RULES)}"
        raise JobError("E-COMPARE-RULE", f"no aggregation rule `{text}`; {known}", param="--rules")
    return text


def _epsilon(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        what = f"expected numbers above 0, or inf for no privacy, got `{text}`.{did_you_mean(text, ['inf'])}"
        raise JobError("E-COMPARE-EPSILON", what, param="--epsilons", hint="--epsilons 1,3,8,inf")
    return value


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        what = f"expected whole numbers from 0 to 2^63 - 1, got `{text}`"
        raise JobError("E-COMPARE-SEED", what, param="--seeds", hint="--seeds 1,2,3")
    return int(text)


def _own(text: str) -> tuple[str, str]:
    """A rule and a setting that only its cells have."""
    rule, colon, setting = (part.strip() for part in text.partition(":"))
    if not colon or "=" not in setting:
        raise JobError("E-COMPARE-SETTING", f"expected RULE:section.key=VALUE, got `{text}`", param="--for")
    return _rule(rule), setting


def _axis(text: str) -> Axis:
    """A setting and its values; as a TOML list without its brackets, else whatever stands between commas."""
    name, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not values:
        raise JobError("E-COMPARE-SETTING", f"expected section.key=V1,V2,..., got `{text}`", param=name)
    if name in RESERVED:
        raise JobError("E-COMPARE-SETTING", f"{name} is what {RESERVED[name]} says", param=name)
    try:
        found = [json.dumps(value) for value in tomllib.loads(f"x = [{values}]")["x"]]
    except (ValueError, TypeError):
        found = _parts(values)
    return name, _once(name, found)


def epsilon_text(epsilon: float) -> str:
    """An epsilon as it is written on the command line."""
    return f"{epsilon:.12g}"


def own_job(request: Request) -> Job:
    """The job that the comparison starts from.

    Raises:
        JobError: It cannot be read, or has nothing to score models on.
    """
    job = load_job(job_file(request.job), request.overrides)
    if not job.eval.data:
        raise JobError("E-COMPARE-EVAL", "a comparison needs public rows to score models on", param="eval.data")
    return job


def cells_of(request: Request) -> list[Cell]:
    """Every cell in the order it is run: those that tune, then all rows of one seed after the other."""
    job = own_job(request)
    epsilons = request.epsilons or (math.inf if job.privacy.level == "none" else job.privacy.epsilon,)
    variants = [
        tuple(zip([n for n, _ in request.vary], v, strict=True)) for v in product(*(v for _, v in request.vary))
    ]
    rows = list(product(request.rules or (job.aggregation.rule,), epsilons, variants))
    seeds = request.seeds or (job.run.seed,)
    tried = [(row, tuning_seed(seeds), value) for row in rows for value in (request.tune[1] if request.tune else ())]
    counted = [(row, seed, None) for seed in seeds for row in rows]
    return [*_named("t", tried), *_named("c", counted)]


def _named(letter: str, parts: Iterable[tuple[RowKey, int, str | None]]) -> Iterator[Cell]:
    for number, ((rule, epsilon, varied), seed, tried) in enumerate(parts, 1):
        budget = epsilon_text(epsilon).replace("+", "")
        yield Cell(f"{letter}{number:04d}-{rule}-eps{budget}-seed{seed}", rule, epsilon, seed, varied, tried)


def tuning_seed(seeds: Sequence[int]) -> int:
    """The seed of cells that tune: none of those that count."""
    seed = seeds[0] + TUNING_OFFSET
    while seed in seeds or seed >= 2**63:
        seed = (seed + 1) % 2**63
    return seed


def settings_of(request: Request, cell: Cell, tuned: str | None, threads: int) -> list[str]:
    """A cell's settings, as section.key=value.

    Args:
        request: The comparison's.
        cell: The cell.
        tuned: The value of the tuned setting.
        threads: Of torch; only one site trains at a time, so it may have them all.

    Raises:
        JobError: The settings do not go together; the cell is named.
    """
    settings = ["simulation.workers=1", f"simulation.threads={threads}", *request.overrides]
    settings += [setting for rule, setting in request.own if rule == cell.rule]
    settings += [f"{name}={value}" for name, value in cell.varied]
    settings += [f"{request.tune[0]}={tuned}"] if request.tune else []
    settings += [f"aggregation.rule={cell.rule}", f"run.seed={cell.seed}", f"run.name={cell.name}"]
    try:
        settings += _privacy(cell, load_job(job_file(request.job), settings)) if request.epsilons else []
        load_job(job_file(request.job), settings)
    except JobError as error:
        what = f"rule {cell.rule}, epsilon {epsilon_text(cell.epsilon)}: {error.message}"
        raise JobError(error.code, what, param=error.param, hint=error.hint) from None
    return settings


def _privacy(cell: Cell, job: Job) -> list[str]:
    if job.privacy.level == "none":
        if math.isinf(cell.epsilon):
            return []
        hint = "privacy.level=example"
        raise JobError("E-COMPARE-EPSILON", "privacy.level = none has no epsilon", param="--epsilons", hint=hint)
    if math.isinf(cell.epsilon):
        # Without clipping a gradient keeps its own length, so the rate that suits clipped ones is scaled back.
        rate = job.train.learning_rate * job.privacy.clipping_norm
        return ["privacy.level=none", f"train.learning_rate={rate!r}"]
    return [f"privacy.epsilon={cell.epsilon!r}", "privacy.noise_multiplier=auto"]


def inputs_of(request: Request) -> dict[str, str]:
    """SHA-256 of the job file and of every data file it names, by path."""
    path, job = job_file(request.job), own_job(request)
    named = [str(path), job.data.train, *job.data.sites.values(), job.eval.data, job.aggregation.root]
    return {name: file_sha256(Path(name)) for name in named if name and Path(name).is_file()}
