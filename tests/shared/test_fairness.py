from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from scipy.stats import binomtest
from tests.conftest import rows, write_rows

from cotune.shared.errors import DataError, JobError
from cotune.shared.evaluation import Evaluator, settle_scoring
from cotune.shared.fairness import MAX_GROUPS, by_group, groups_of
from cotune.shared.methods import attach
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.records import read_records


def records_of(path: Path, *columns: dict[str, object]):
    made = [{**row, **column} for row, column in zip(rows(len(columns)), columns, strict=True)]
    return read_records(write_rows(path, made))


def test_each_group_has_its_share_of_right_answers_and_its_interval():
    groups = ["a"] * 10 + ["b"] * 20 + ["c"]
    hits = [1.0] * 4 + [0.0] * 6 + [1.0] * 18 + [0.0] * 2 + [0.0]
    found = by_group("ward", groups, hits)
    assert found["column"] == "ward" and found["gap"] == pytest.approx(0.9)
    figures = {row["group"]: row for row in found["rows"]}
    assert [(row["examples"], row["accuracy"]) for row in figures.values()] == [(10, 0.4), (20, 0.9), (1, 0.0)]
    wilson = binomtest(18, 20).proportion_ci(method="wilson")
    assert (figures["b"]["accuracy_low"], figures["b"]["accuracy_high"]) == (wilson.low, wilson.high)
    assert json.loads(json.dumps(found)) == found


def test_a_row_without_a_value_is_a_group_of_its_own_and_numbers_are_names(tmp_path):
    records = records_of(tmp_path / "e.jsonl", {"ward": 3}, {"ward": "3"}, {}, {"ward": ""}, {"ward": None})
    assert groups_of(records, "ward") == ["3", "3", "(none)", "(none)", "(none)"]


def test_a_column_that_no_row_has_is_named(tmp_path):
    with pytest.raises(DataError, match="column `ward`") as caught:
        groups_of(records_of(tmp_path / "e.jsonl", {}, {}), "ward")
    assert (caught.value.code, caught.value.param) == ("E-GROUP-COLUMN", "eval.group_column")


def test_a_column_of_names_is_no_column_of_groups(tmp_path):
    records = records_of(tmp_path / "e.jsonl", *({"id": f"p{i}"} for i in range(MAX_GROUPS + 1)))
    with pytest.raises(DataError, match=f"{MAX_GROUPS + 1} values"):
        groups_of(records, "id")


def test_without_fairlearn_the_way_to_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fairlearn", None)
    with pytest.raises(JobError, match="not installed") as caught:
        groups_of(records_of(tmp_path / "e.jsonl", {"ward": "a"}), "ward")
    assert "cotune[fairness]" in (caught.value.hint or "")


def test_scores_by_group_are_those_of_the_rows_that_were_scored(make_job, tmp_path):
    made = [{**row, "ward": ("north", "south")[i % 3 == 0]} for i, row in enumerate(rows(30, start=1000))]
    write_rows(tmp_path / "eval.jsonl", made)
    job = make_job(eval={"data": str(tmp_path / "eval.jsonl"), "group_column": "ward"})
    records = read_records(tmp_path / "eval.jsonl")
    job, base = settle_scoring(job, records), locate(job)
    network = Network(attach(load_model(base, job), job), job)
    evaluator = Evaluator(network, records, load_tokenizer(base), job)
    for limit, counts in ((None, {"north": 20, "south": 10}), (6, {"north": 4, "south": 2})):
        scores = evaluator.score(limit)
        groups = scores.groups or {}
        assert {row["group"]: row["examples"] for row in groups["rows"]} == counts
        right = sum(row["examples"] * row["accuracy"] for row in groups["rows"])
        assert right / sum(counts.values()) == pytest.approx(scores.accuracy)
        assert scores.to_dict()["groups"] == groups


def test_a_group_column_without_public_rows_is_refused(make_job):
    with pytest.raises(JobError, match=r"eval\.group_column"):
        make_job(eval={"data": None, "group_column": "ward"})
