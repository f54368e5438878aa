"""What is planted: by a fair secret coin, once, one unit each, and never at a real site."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy.stats import binomtest

from cotune.client.data import prepare
from cotune.shared.errors import JobError
from cotune.shared.job import Job
from cotune.shared.jobfile import dump_toml
from cotune.shared.model import load_tokenizer, locate
from cotune.shared.runs import RunFolder, create_run
from cotune.simulations.attack.canaries import (
    DIGITS,
    canaries_sha256,
    draw,
    plant,
    planted_in,
    planted_records,
    vocabulary,
)
from cotune.simulations.scenario import site_names, site_records

MakeJob = Callable[..., Job]
SITES = ["site-1", "site-2", "site-3"]
PERSONS = {"unit": "column:ward", "units_per_site": 30}


def run_of(job: Job, folder: Path) -> RunFolder:
    return create_run(folder / "runs", job, dump_toml(job).encode())


def test_coins_are_fair_and_candidates_spread_over_the_sites(make_job: MakeJob) -> None:
    job = make_job(audit={"canaries": 60, "secrets": 6})
    tokenizer = load_tokenizer(locate(job))
    heads = sum(one.coin for _ in range(30) for one in draw(job, SITES, tokenizer) if one.kind == "canary")
    assert binomtest(heads, 1800).pvalue > 1e-6
    planted = draw(job, SITES, tokenizer)
    assert Counter(one.site for one in planted) == dict.fromkeys(SITES, 22)
    assert len({one.id for one in planted}) == len(planted) == 66


def test_no_two_draws_agree_and_words_are_the_models_own(make_job: MakeJob) -> None:
    job = make_job(audit={"canaries": 20, "secrets": 3})
    tokenizer = load_tokenizer(locate(job))
    first, second = draw(job, SITES, tokenizer), draw(job, SITES, tokenizer)
    assert not {one.prompt for one in first if one.kind == "canary"} & {one.prompt for one in second}
    known = set(vocabulary(tokenizer))
    assert all(set(one.prompt.split()) <= known for one in first if one.kind == "canary")
    secrets = [one for one in first if one.kind == "secret"]
    assert all(one.coin and one.answer.strip().isdigit() and len(one.answer.strip()) == DIGITS for one in secrets)


def test_a_class_is_the_answer_of_a_canary_where_classes_are_learnt(make_job: MakeJob, tiny_encoder: Path) -> None:
    labels = ("cardio", "derma", "pulmo")
    job = make_job(
        model={"base": str(tiny_encoder)},
        task={"kind": "classify", "labels": labels},
        lora={"target_modules": ("query",), "last_layers": 1},
        audit={"canaries": 30},
    )
    assert {one.answer for one in draw(job, SITES, load_tokenizer(locate(job)))} == set(labels)


def test_the_file_is_written_once_and_read_by_whoever_goes_on(make_job: MakeJob, tmp_path: Path) -> None:
    run = run_of(make_job(audit={"canaries": 12, "secrets": 2}), tmp_path)
    plant(run, SITES)
    once = planted_in(run)
    assert len(once) == 14
    assert planted_in(RunFolder(run.path)) == once


def test_a_canary_is_one_unit_however_many_rows_it_has(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(
        data={"unit": "column:label", "units_per_site": 50},
        privacy={"level": "unit"},
        audit={"canaries": 40, "rows_each": 5},
        federation={"sites": 1},
        train={"batch_size": 3},
    )
    run = run_of(job, tmp_path)
    plant(run, site_names(job))
    rows = site_records(job, "site-1")
    extra = planted_records(run, job, "site-1")
    there = [one for one in planted_in(run) if one.coin]
    assert len(extra) == 5 * len(there)
    before = prepare(rows, load_tokenizer(locate(job)), job)
    after = prepare([*rows, *extra], load_tokenizer(locate(job)), job)
    assert after.units == before.units + len(there)
    assert all(len(after.rows(unit)) == 5 for unit in range(before.units, after.units))


def test_a_control_has_the_very_canaries_of_the_run_it_is_compared_with(make_job: MakeJob, tmp_path: Path) -> None:
    settings = {"canaries": 12, "secrets": 2}
    run = run_of(make_job(audit=settings), tmp_path)
    plant(run, SITES)
    control = run_of(make_job(audit=settings, privacy={"level": "none"}), tmp_path)
    plant(control, SITES, run)
    assert canaries_sha256(control) == canaries_sha256(run) is not None
    other = run_of(make_job(audit=settings), tmp_path)
    plant(other, SITES)
    assert canaries_sha256(other) != canaries_sha256(run)


def test_canaries_of_a_run_with_other_settings_sites_or_none_are_refused(make_job: MakeJob, tmp_path: Path) -> None:
    run = run_of(make_job(audit={"canaries": 12}), tmp_path)
    plant(run, SITES)
    bare = run_of(make_job(), tmp_path)
    plant(bare, SITES)
    for like, audit, sites in (
        (run, {"canaries": 14}, SITES),
        (run, {"canaries": 12}, ["site-1", "site-2"]),
        (bare, {"canaries": 12}, SITES),
    ):
        with pytest.raises(JobError, match="plants nothing, or other things"):
            plant(run_of(make_job(audit=audit), tmp_path), sites, like)


def test_a_damaged_file_is_named_and_never_taken_for_a_smaller_one(make_job: MakeJob, tmp_path: Path) -> None:
    run = run_of(make_job(audit={"canaries": 12}), tmp_path)
    plant(run, SITES)
    path = run.attack / "canaries.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for damaged in ("".join(lines[:-1]), "".join(lines)[:-9], '{"id": 1}\n' * 12, ""):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(JobError, match="12 planted units"):
            planted_in(run)
    path.unlink()
    with pytest.raises(JobError, match="found 0"):
        planted_records(run, run.job(), "site-1")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"data": {"train": None, "sites": {"a": "site:"}, "dataset": "notes"}, "federation": {}}, "simulated sites"),
        ({"data": {"train": None, "sites": {"a": "home:/nowhere"}}}, "simulated sites"),
        ({"audit": {"canaries": 9}}, "fewer than 10"),
        ({"audit": {"canaries": 20, "rows_each": 2}}, "a canary is one unit"),
        ({"data": PERSONS, "audit": {"canaries": 20, "rows_each": 2}}, "a canary is one unit"),
        (
            {
                "data": {**PERSONS, "max_per_unit": 2},
                "privacy": {"level": "unit"},
                "audit": {"canaries": 20, "rows_each": 3},
            },
            "2 rows that are used",
        ),
        ({"audit": {"canaries": 91}}, "exceed the 30 units"),
    ],
)
def test_what_cannot_be_planted_is_refused_by_name(make_job: MakeJob, settings: dict, word: str) -> None:
    with pytest.raises(JobError, match=word):
        make_job(**{"audit": {"canaries": 20}, **settings, "federation": {"sites": 3, "min_sites": 1}})


def test_secrets_are_refused_where_nothing_is_written(make_job: MakeJob, tiny_encoder: Path) -> None:
    with pytest.raises(JobError, match="a class says no secret"):
        make_job(
            model={"base": str(tiny_encoder)}, task={"kind": "classify", "labels": ("a", "b")}, audit={"secrets": 2}
        )
