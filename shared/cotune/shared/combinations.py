"""Which settings of a job do not go together; each fault says what to change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cotune.shared.aggregation import RULES
from cotune.shared.sections import HOME, SITE

if TYPE_CHECKING:
    from cotune.shared.job import Job

FEWEST_CANARIES = 10  # a fifth of them is guessed, and one guess shows nothing


def faults(job: Job) -> Iterator[str]:
    """Every fault of a job, the most basic first."""
    yield from _task(job)
    yield from _batch(job)
    yield from _sites(job)
    yield from _rule(job)
    yield from _joining(job)
    yield from _transport(job)
    yield from _audit(job)


def least_sites(robust: str, trim: float, hostile: int) -> int:
    """Fewest updates a robust rule protects; with fewer, the job or the round is refused.

    - none, norm_bound, fltrust: 1. They judge each update alone; fltrust's root stands for the majority
      (Cao et al. 2021).
    - median: 5. It outvotes one hostile site of 3 already (share under 1/2: Yin et al. 2018), but may then be any
      one honest site's number; of 5, it lies between the middle two of four honest ones.
    - trimmed_mean: so many that floor(trim * k) >= 1, and 3: a number is cut at each end and one is left.
    - multi_krum: 2 f + 3 (Blanchard et al. 2017, arXiv 1703.02757: their condition is 2 f + 2 < n).
    """
    if robust == "trimmed_mean":
        return max(3, math.ceil((1 - 1e-9) / trim))
    return {"median": 5, "multi_krum": 2 * hostile + 3}.get(robust, 1)


def _task(job: Job) -> Iterator[str]:
    if job.task.kind == "classify" and len(set(job.task.labels)) < 2:
        yield 'task.kind = "classify" needs task.labels: the public list of at least two classes'
    if job.task.kind == "completion" and job.task.labels:
        yield 'task.labels belongs to task.kind = "classify"'
    if job.privacy.level == "unit" and not (job.data.unit_column and job.data.units_per_site):
        yield (
            'privacy.level = "unit" needs data.unit = "column:NAME" and data.units_per_site, the public number'
            " of persons at a site; without, only single rows can be protected"
        )


def _batch(job: Job) -> Iterator[str]:
    units, train = job.units_per_site, job.train
    if train.batch_size > units:
        yield f"train.batch_size must not exceed the {units:,} units of a site"
    if train.max_batch_size is not None and not train.batch_size <= train.max_batch_size <= units:
        yield f"train.max_batch_size must be from train.batch_size to the {units:,} units of a site"
    if train.optimizer != "sgd" and train.momentum:
        yield 'train.momentum belongs to train.optimizer = "sgd"'


def _sites(job: Job) -> Iterator[str]:
    settings, known = job.federation, set(job.data.sites)
    for name in ("min_sites", "sites_per_round", "quorum"):
        value = getattr(settings, name)
        if value is not None and value > job.sites:
            yield f"federation.{name} exceeds the {job.sites} sites there are"
    if settings.min_sites > min(job.sites_per_round, settings.quorum or job.sites):
        yield "federation.min_sites exceeds what sites_per_round or quorum let answer"
    if settings.sites_per_round and settings.selection == "all":
        yield 'federation.sites_per_round belongs to federation.selection = "random" or "available"'
    # At worst the rounds before the last use up whole sites, one after the other.
    spent = job.sites_per_round * (job.run.rounds - 1) // job.rounds_per_site
    if job.rounds_per_site < job.run.rounds and job.sites - spent < settings.min_sites:
        yield (
            "federation.max_rounds_per_site leaves too few sites for the last rounds:"
            " ask fewer a round by federation.sites_per_round, or let each take more"
        )
    if job.data.sites_per_unit > job.sites:
        yield f"data.sites_per_unit exceeds the {job.sites} sites there are"
    for where, table in (("lora.ranks", job.lora.ranks), ("aggregation.weights", job.aggregation.weights)):
        strangers = sorted(table.keys() - known)
        if strangers and known:
            yield f"{where} names {', '.join(strangers)}; the sites are {', '.join(sorted(known)[:20])}"


def _rule(job: Job) -> Iterator[str]:
    name, rule = job.aggregation.rule, job.rule
    if job.federation.secure_aggregation:
        robust = job.aggregation.robust
        if rule.needs_individual_updates or robust != "none":
            who = f'aggregation.robust = "{robust}"' if robust != "none" else f'aggregation.rule = "{name}"'
            able = ", ".join(other for other, facts in RULES.items() if not facts.needs_individual_updates)
            yield (
                f"{who} needs every update by itself, secure aggregation shows their sum alone; without a robust"
                f" rule, these can: {able}"
            )
        yield "federation.secure_aggregation: this version has none; updates are noised at the site instead"
    if job.lora.ranks and not rule.mixed_ranks:
        able = ", ".join(other for other, facts in RULES.items() if facts.mixed_ranks)
        yield f'lora.ranks: aggregation.rule = "{name}" needs one rank for all sites; these can mix them: {able}'
    if any(rank > job.lora.r for rank in job.lora.ranks.values()):
        yield f"lora.ranks must not exceed lora.r = {job.lora.r}"
    fewest = min(job.sites_per_round, job.federation.quorum or job.sites)
    if rule.personal and fewest < job.sites:
        yield (
            f'aggregation.rule = "{name}" needs every site in the last round, when it returns its own B:'
            " remove federation.sites_per_round and quorum"
        )
    if rule.offset and job.model.quantize != "none":
        yield f'aggregation.rule = "{name}" adds to the base weights, which model.quantize keeps rounded'


def _joining(job: Job) -> Iterator[str]:
    settings, rule = job.aggregation, job.rule
    able = ", ".join(name for name, facts in RULES.items() if facts.linear)
    for what, used in (
        (f'aggregation.robust = "{settings.robust}"', settings.robust != "none"),
        (f'aggregation.optimizer = "{settings.optimizer}"', settings.optimizer != "none"),
        ("aggregation.ema", settings.ema > 0),
        ("train.scaffold", job.train.scaffold),
    ):
        if used and not rule.linear:
            yield f'{what} needs updates that add up, not aggregation.rule = "{settings.rule}"; try {able}'
        if used and what != "aggregation.ema" and job.lora.ranks:
            yield f"{what} needs one rank for all sites: remove lora.ranks"
    least = least_sites(settings.robust, settings.trim, settings.hostile)
    if job.federation.min_sites < least:
        yield (
            f'aggregation.robust = "{settings.robust}" cannot tell honest from hostile below {least} updates:'
            f" federation.min_sites must be at least {least}"
        )
    if settings.optimizer in ("fedadam", "fedyogi") and settings.learning_rate >= 1:
        yield (
            f'aggregation.optimizer = "{settings.optimizer}" moves each number by about aggregation.learning_rate,'
            " however small the update: set one well below 1, such as 0.01"
        )
    if (settings.robust == "fltrust") != (settings.root is not None):
        yield 'aggregation.root belongs to aggregation.robust = "fltrust", which needs it'
    if settings.robust == "fltrust" and (rule.core or rule.alternates == "step"):
        yield f'aggregation.robust = "fltrust" does not go with aggregation.rule = "{settings.rule}"; try ffa'
    if settings.weights and settings.robust not in ("none", "norm_bound"):
        yield f'aggregation.weights has no meaning with aggregation.robust = "{settings.robust}"'
    if job.train.scaffold and (job.train.optimizer != "sgd" or job.train.momentum or rule.alternates):
        yield "train.scaffold needs plain sgd without momentum, and a rule that does not alternate"


def _transport(job: Job) -> Iterator[str]:
    if job.transport.codec_down == "topk":
        yield "transport.codec_down: topk keeps the largest changes, a whole adapter needs all its numbers; try int8"
    if job.transport.error_feedback and job.transport.codec_up == "fp32":
        yield "transport.error_feedback: nothing is lost by fp32; choose another transport.codec_up"
    if job.transport.error_feedback and (job.rule.alternates == "round" or not job.rule.linear):
        name = job.aggregation.rule
        yield f'transport.error_feedback needs tensors that mean the same each round, not aggregation.rule = "{name}"'


def _audit(job: Job) -> Iterator[str]:
    settings, data = job.audit, job.data
    if not settings.planted:
        return
    if any(source.startswith((HOME, SITE)) for source in data.sites.values()):
        yield (
            "audit.canaries and audit.secrets are for simulated sites: nothing is ever added to the records of a site"
            " that has a home of its own, or is enrolled"
        )
    if 0 < settings.canaries < FEWEST_CANARIES:
        yield f"audit.canaries: fewer than {FEWEST_CANARIES} candidates cannot show anything"
    if settings.secrets and job.task.kind == "classify":
        yield "audit.secrets needs a model that writes text: a class says no secret; audit.canaries does"
    if settings.rows_each > 1 and (data.unit_column is None or job.privacy.level == "example"):
        yield (
            'audit.rows_each: a canary is one unit, and here that is one row; more need data.unit = "column:NAME"'
            ' and privacy.level = "unit"'
        )
    if data.max_per_unit is not None and settings.rows_each > data.max_per_unit:
        yield f"audit.rows_each exceeds the {data.max_per_unit} rows that are used of a person"
    if settings.planted > job.sites * job.units_per_site:
        yield f"audit: {settings.planted} planted units exceed the {job.units_per_site} units of each site"
