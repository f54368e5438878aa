from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tests.shared.report.test_page import Page

from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.event import DpSgdEvent
from cotune.shared.report.budgets import read_budget
from cotune.shared.report.page import render

EVENT = DpSgdEvent(sampling_probability=0.1, noise_multiplier=1.0, steps=4)
OURS = epsilon([EVENT, EVENT], 1e-5)
SITE = {"id": "north", "epsilon": OURS, "delta": 1e-5}


def ledger(path: Path, *runs: str, simulated: bool = False, dataset: str = "notes") -> Path:
    lines = [{"action": "site.init", "simulated": simulated}]
    lines += [{"action": "budget.reserve", "dataset": dataset, "run_id": run, "event": EVENT.to_dict()} for run in runs]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_what_other_runs_cost_is_composed_and_not_added(tmp_path):
    found = read_budget(ledger(tmp_path / "l", "old", "old", "mine", "mine", "older"), "mine", SITE)
    assert (found.other_runs, found.simulated, found.fault) == (2, False, "")
    assert found.before == pytest.approx(epsilon([EVENT] * 3, 1e-5))
    assert found.together == pytest.approx(epsilon([EVENT] * 5, 1e-5))
    assert found.this_run == OURS
    assert found.together < found.before + found.this_run


def test_a_ledger_without_another_run_begins_at_nothing(tmp_path):
    found = read_budget(ledger(tmp_path / "l", "mine", "mine", simulated=True), "mine", SITE)
    assert (found.before, found.together, found.simulated) == (0.0, OURS, True)


def test_other_data_sets_of_the_site_are_not_this_ones(tmp_path):
    path = ledger(tmp_path / "l", "mine", "mine")
    ledger(tmp_path / "other", "old", dataset="letters")
    path.write_text(path.read_text() + (tmp_path / "other").read_text().split("\n", 1)[1])
    assert read_budget(path, "mine", SITE).other_runs == 0


def test_a_release_without_privacy_leaves_no_bound(tmp_path):
    path = ledger(tmp_path / "l", "mine")
    spoilt = {"action": "budget.reserve", "dataset": "notes", "run_id": "old", "event": {"kind": "non-private"}}
    path.write_text(path.read_text() + json.dumps(spoilt) + "\n")
    found = read_budget(path, "mine", SITE)
    assert (found.before, found.together) == (None, None)


@pytest.mark.parametrize("content", ["budget.reserve\n", '{"action": "budget.reserve"}\n', '["budget.reserve"]\n'])
def test_a_ledger_nobody_can_read_is_said_to_be_one(tmp_path, content):
    (tmp_path / "l").write_text(content)
    assert read_budget(tmp_path / "l", "mine", SITE).fault == "its ledger cannot be read"
    assert read_budget(tmp_path / "none", "mine", SITE).fault == "its ledger is not in the run folder"


def test_a_long_ledger_is_read_line_by_line(tmp_path):
    path = tmp_path / "l"
    line = json.dumps({"action": "budget.commit", "run_id": "old", "note": "x" * 100}) + "\n"
    path.write_text(line * 200_000)
    started = time.process_time()
    read_budget(path, "mine", SITE)
    assert time.process_time() - started < 5


def test_the_page_shows_before_this_run_and_together(build):
    run = build().rounds(3).finished().claimed().run
    run.ledger("hospital-1").parent.mkdir()
    ledger(run.ledger("hospital-1"), "old", run.run_id)
    text = Page(render(run)).text
    assert "hospital-1" in text and "1 other runs" in text and "its ledger is not in the run folder" in text
    assert "cotune site budget" in text
