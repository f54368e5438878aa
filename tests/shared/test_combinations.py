"""Settings that do not go together: each fault by its words, and gone once its advice is followed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest

from cotune.shared.aggregation import RULES
from cotune.shared.combinations import least_sites
from cotune.shared.errors import JobError
from cotune.shared.job import Job
from cotune.shared.jobfile import parse_job

Sections = dict[str, dict[str, Any]]
LEAST: Sections = {"model": {"base": "owner/name"}, "data": {"train": "/a.jsonl", "records_per_site": 100}}
NAMED = {"train": None, "sites": {"north": "/n.jsonl", "south": "/s.jsonl"}}
FIVE: Sections = {"federation": {"sites": 5, "min_sites": 5}}


class Fault(NamedTuple):
    """Settings, what is said of them, and a change after which they go together."""

    settings: Sections
    words: str
    mended: Sections


def merged(*parts: Sections) -> Sections:
    whole: Sections = {}
    for part in parts:
        for section, settings in part.items():
            whole[section] = {**whole.get(section, {}), **settings}
    return whole


def job_of(*parts: Sections) -> Job:
    return parse_job(merged(LEAST, *parts), origin="test")


def aggregation(**settings: Any) -> Sections:
    return {"aggregation": settings}


def federation(**settings: Any) -> Sections:
    return {"federation": settings}


RANKS: Sections = {"lora": {"ranks": {"site-1": 4}}}
SCAFFOLD: Sections = {"train": {"scaffold": True}}
FAULTS = {
    "classes missing": Fault(
        {"task": {"kind": "classify", "labels": ["a"]}},
        'task.kind = "classify" needs task.labels: the public list of at least two classes',
        {"task": {"labels": ["a", "b"]}},
    ),
    "classes of a text": Fault(
        {"task": {"labels": ["a", "b"]}}, 'task.labels belongs to task.kind = "classify"', {"task": {"labels": []}}
    ),
    "persons unknown": Fault(
        {"privacy": {"level": "unit"}},
        'privacy.level = "unit" needs data.unit = "column:NAME" and data.units_per_site, the public number of persons',
        {"data": {"unit": "column:patient", "units_per_site": 70}},
    ),
    "batch of more than all": Fault(
        {"train": {"batch_size": 101}}, "train.batch_size must not exceed the 100 units", {"train": {"batch_size": 100}}
    ),
    "cap below the batch": Fault(
        {"train": {"max_batch_size": 63}},
        "train.max_batch_size must be from train.batch_size to the 100 units of a site",
        {"train": {"max_batch_size": 64}},
    ),
    "cap above all": Fault(
        {"train": {"max_batch_size": 101}},
        "train.max_batch_size must be from train.batch_size to the 100 units of a site",
        {"train": {"max_batch_size": 100}},
    ),
    "momentum of adam": Fault(
        {"train": {"optimizer": "adamw", "momentum": 0.5}},
        'train.momentum belongs to train.optimizer = "sgd"',
        {"train": {"momentum": 0.0}},
    ),
    "least above all sites": Fault(
        federation(min_sites=5), "federation.min_sites exceeds the 4 sites there are", federation(min_sites=4)
    ),
    "cohort above all sites": Fault(
        federation(selection="random", sites_per_round=5),
        "federation.sites_per_round exceeds the 4 sites there are",
        federation(sites_per_round=4),
    ),
    "quorum above all sites": Fault(
        federation(quorum=5), "federation.quorum exceeds the 4 sites there are", federation(quorum=4)
    ),
    "least above the cohort": Fault(
        federation(selection="random", sites_per_round=2, min_sites=3),
        "federation.min_sites exceeds what sites_per_round or quorum let answer",
        federation(min_sites=2),
    ),
    "least above the quorum": Fault(
        federation(quorum=2, min_sites=3),
        "federation.min_sites exceeds what sites_per_round or quorum let answer",
        federation(quorum=3),
    ),
    "cohort of all": Fault(
        federation(sites_per_round=2),
        'federation.sites_per_round belongs to federation.selection = "random" or "available"',
        federation(selection="available"),
    ),
    "sites used up": Fault(
        federation(max_rounds_per_site=3),
        "federation.max_rounds_per_site leaves too few sites for the last rounds: ask fewer a round by"
        " federation.sites_per_round",
        federation(selection="random", sites_per_round=3),
    ),
    "persons at more sites than there are": Fault(
        {"data": {"sites_per_unit": 5}}, "data.sites_per_unit exceeds the 4 sites there are", federation(sites=5)
    ),
    "rank of a stranger": Fault(
        {"data": NAMED, "lora": {"ranks": {"north": 4, "west": 4}}},
        "lora.ranks names west; the sites are north, south",
        {"lora": {"ranks": {"north": 4}}},
    ),
    "weight of a stranger": Fault(
        {"data": NAMED, "aggregation": {"weights": {"west": 2.0}}},
        "aggregation.weights names west; the sites are north, south",
        aggregation(weights={"south": 2.0}),
    ),
    "secure sums for a robust rule": Fault(
        merged(FIVE, federation(secure_aggregation=True), aggregation(robust="median")),
        'aggregation.robust = "median" needs every update by itself, secure aggregation shows their sum alone',
        federation(secure_aggregation=False),
    ),
    "secure sums for products": Fault(
        merged(federation(secure_aggregation=True), aggregation(rule="fedex")),
        'aggregation.rule = "fedex" needs every update by itself, secure aggregation shows their sum alone;'
        " without a robust rule, these can: ffa, alternating_rounds, alternating_steps, fedavg_ab, fed_sb",
        federation(secure_aggregation=False),
    ),
    "secure sums at all": Fault(
        federation(secure_aggregation=True),
        "federation.secure_aggregation: this version has none; updates are noised at the site instead",
        federation(secure_aggregation=False),
    ),
    "ranks for a core": Fault(
        merged(RANKS, aggregation(rule="fed_sb")),
        'lora.ranks: aggregation.rule = "fed_sb" needs one rank for all sites; these can mix them: ffa, product_svd,'
        " alternating_rounds, alternating_steps, fedavg_ab, flora_stack",
        aggregation(rule="flora_stack"),
    ),
    "rank above the job's": Fault(
        {"lora": {"ranks": {"site-1": 9}}}, "lora.ranks must not exceed lora.r = 8", {"lora": {"r": 9}}
    ),
    "offset on rounded weights": Fault(
        merged({"model": {"quantize": "4bit"}}, aggregation(rule="flora_stack")),
        'aggregation.rule = "flora_stack" adds to the base weights, which model.quantize keeps rounded',
        {"model": {"quantize": "none"}},
    ),
    "robust products": Fault(
        merged(FIVE, aggregation(robust="median", rule="product_svd")),
        'aggregation.robust = "median" needs updates that add up, not aggregation.rule = "product_svd"; try ffa,',
        aggregation(rule="ffa"),
    ),
    "optimiser of products": Fault(
        aggregation(optimizer="fedavgm", rule="fedex"),
        'aggregation.optimizer = "fedavgm" needs updates that add up, not aggregation.rule = "fedex"; try ffa,',
        aggregation(rule="fedavg_ab"),
    ),
    "average of products": Fault(
        aggregation(ema=0.5, rule="flora_stack"),
        'aggregation.ema needs updates that add up, not aggregation.rule = "flora_stack"; try ffa,',
        aggregation(rule="alternating_rounds"),
    ),
    "scaffold of products": Fault(
        merged(SCAFFOLD, aggregation(rule="fedex")),
        'train.scaffold needs updates that add up, not aggregation.rule = "fedex"; try ffa,',
        aggregation(rule="fed_sb"),
    ),
    "robust over ranks": Fault(
        merged(RANKS, aggregation(robust="norm_bound")),
        'aggregation.robust = "norm_bound" needs one rank for all sites: remove lora.ranks',
        {"lora": {"ranks": {}}},
    ),
    "optimiser over ranks": Fault(
        merged(RANKS, aggregation(optimizer="fedavgm")),
        'aggregation.optimizer = "fedavgm" needs one rank for all sites: remove lora.ranks',
        {"lora": {"ranks": {}}},
    ),
    "scaffold over ranks": Fault(
        merged(RANKS, SCAFFOLD),
        "train.scaffold needs one rank for all sites: remove lora.ranks",
        {"lora": {"ranks": {}}},
    ),
    "median of few": Fault(
        merged(FIVE, federation(min_sites=4), aggregation(robust="median")),
        'aggregation.robust = "median" cannot tell honest from hostile below 5 updates',
        federation(min_sites=5),
    ),
    "trimmed mean of few": Fault(
        merged(FIVE, federation(min_sites=3), aggregation(robust="trimmed_mean", trim=0.25)),
        'aggregation.robust = "trimmed_mean" cannot tell honest from hostile below 4 updates',
        federation(min_sites=4),
    ),
    "krum of few": Fault(
        merged(FIVE, federation(sites=7), aggregation(robust="multi_krum", hostile=2)),
        'aggregation.robust = "multi_krum" cannot tell honest from hostile below 7 updates',
        federation(min_sites=7),
    ),
    "adam at the rate of a mean": Fault(
        aggregation(optimizer="fedadam"),
        'aggregation.optimizer = "fedadam" moves each number by about aggregation.learning_rate',
        aggregation(learning_rate=0.01),
    ),
    "yogi at the rate of a mean": Fault(
        aggregation(optimizer="fedyogi"),
        'aggregation.optimizer = "fedyogi" moves each number by about aggregation.learning_rate',
        aggregation(learning_rate=0.99),
    ),
    "root for nobody": Fault(
        aggregation(root="/r.jsonl"),
        'aggregation.root belongs to aggregation.robust = "fltrust", which needs it',
        aggregation(robust="fltrust"),
    ),
    "trust without a root": Fault(
        aggregation(robust="fltrust"),
        'aggregation.root belongs to aggregation.robust = "fltrust", which needs it',
        aggregation(root="/r.jsonl"),
    ),
    "trust in a core": Fault(
        aggregation(robust="fltrust", root="/r.jsonl", rule="fed_sb"),
        'aggregation.robust = "fltrust" does not go with aggregation.rule = "fed_sb"; try ffa',
        aggregation(rule="ffa"),
    ),
    "trust step by step": Fault(
        aggregation(robust="fltrust", root="/r.jsonl", rule="alternating_steps"),
        'aggregation.robust = "fltrust" does not go with aggregation.rule = "alternating_steps"; try ffa',
        aggregation(rule="alternating_rounds"),
    ),
    "weighted median": Fault(
        merged(FIVE, aggregation(robust="median", weights={"site-1": 2.0})),
        'aggregation.weights has no meaning with aggregation.robust = "median"',
        aggregation(robust="norm_bound"),
    ),
    "scaffold with momentum": Fault(
        merged(SCAFFOLD, {"train": {"momentum": 0.9}}),
        "train.scaffold needs plain sgd without momentum, and a rule that does not alternate",
        {"train": {"momentum": 0.0}},
    ),
    "scaffold with adam": Fault(
        merged(SCAFFOLD, {"train": {"optimizer": "adamw"}}),
        "train.scaffold needs plain sgd without momentum, and a rule that does not alternate",
        {"train": {"optimizer": "sgd"}},
    ),
    "scaffold in turn": Fault(
        merged(SCAFFOLD, aggregation(rule="alternating_steps")),
        "train.scaffold needs plain sgd without momentum, and a rule that does not alternate",
        aggregation(rule="fedavg_ab"),
    ),
    "a whole adapter by its largest numbers": Fault(
        {"transport": {"codec_down": "topk"}},
        "transport.codec_down: topk keeps the largest changes, a whole adapter needs all its numbers; try int8",
        {"transport": {"codec_down": "int8"}},
    ),
    "a robust mean of what is each site's own": Fault(
        aggregation(rule="fedsa", robust="norm_bound"),
        'aggregation.robust = "norm_bound" needs updates that add up, not aggregation.rule = "fedsa"',
        aggregation(robust="none"),
    ),
    "a sum of what is each site's own": Fault(
        merged(aggregation(rule="fedsa"), federation(secure_aggregation=True)),
        'aggregation.rule = "fedsa" needs every update by itself, secure aggregation shows their sum alone',
        federation(secure_aggregation=False),
    ),
    "ranks of what is shared": Fault(
        merged(aggregation(rule="fedsa"), RANKS),
        'lora.ranks: aggregation.rule = "fedsa" needs one rank for all sites',
        {"lora": {"ranks": {}}},
    ),
    "an adapter for each of some sites": Fault(
        merged(aggregation(rule="fedsa"), federation(selection="random", sites_per_round=3)),
        'aggregation.rule = "fedsa" needs every site in the last round, when it returns its own B: remove'
        " federation.sites_per_round and quorum",
        federation(sites_per_round=4),
    ),
    "an adapter for each of the fastest": Fault(
        merged(aggregation(rule="fedsa"), federation(quorum=3)),
        'aggregation.rule = "fedsa" needs every site in the last round, when it returns its own B',
        federation(quorum=4),
    ),
    "feedback of nothing": Fault(
        {"transport": {"error_feedback": True}},
        "transport.error_feedback: nothing is lost by fp32; choose another transport.codec_up",
        {"transport": {"codec_up": "topk"}},
    ),
    "feedback to other tensors": Fault(
        merged({"transport": {"error_feedback": True, "codec_up": "int8"}}, aggregation(rule="alternating_rounds")),
        "transport.error_feedback needs tensors that mean the same each round, not"
        ' aggregation.rule = "alternating_rounds"',
        aggregation(rule="alternating_steps"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_go_together_is_refused_by_its_words_until_it_is_mended(name: str) -> None:
    fault = FAULTS[name]
    with pytest.raises(JobError) as caught:
        job_of(fault.settings)
    assert (caught.value.code, caught.value.exit_code) == ("E-CONFIG-VALUE", 4)
    assert caught.value.message.startswith(fault.words)
    job_of(fault.settings, fault.mended)


def test_a_bare_job_and_every_rule_by_itself_have_no_fault() -> None:
    assert job_of().aggregation.rule == "ffa"
    for rule in RULES:
        assert job_of(aggregation(rule=rule)).rule is RULES[rule]


@pytest.mark.parametrize("trim", [0.01, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.49])
def test_a_trimmed_mean_of_the_least_sites_cuts_one_at_each_end_and_keeps_one(trim: float) -> None:
    least = least_sites("trimmed_mean", trim, 1)
    assert math.floor(trim * least + 1e-9) >= 1
    assert least - 2 * math.floor(trim * least + 1e-9) >= 1
    assert least == 3 or math.floor(trim * (least - 1) + 1e-9) < 1
