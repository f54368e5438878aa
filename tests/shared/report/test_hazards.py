from __future__ import annotations

from collections import Counter

import pytest
from tests.shared.report.conftest import attacked
from tests.shared.report.test_page import Page

from cotune.shared.errors import RunFailed
from cotune.shared.files import write_json
from cotune.shared.report.evidence import read_evidence
from cotune.shared.report.hazards import build_hazards, build_pyramid
from cotune.shared.report.page import render


def statuses(run):
    return {hazard.name: hazard.status for hazard in build_hazards(read_evidence(run))}


def blocks(run):
    return {b.name: b.status for level in build_pyramid(read_evidence(run)) for b in level.blocks}


def test_there_are_twelve_hazards_each_with_its_reason(whole_run):
    hazards = build_hazards(read_evidence(whole_run))
    assert len(hazards) == 12
    assert all(len(hazard.why) > 20 for hazard in hazards)
    text = Page(render(whole_run)).text
    assert all(hazard.name in text and hazard.why in text for hazard in hazards)
    assert next(level.name for level in build_pyramid(read_evidence(whole_run))) == "What is promised"


def test_a_private_run_is_proven_only_in_what_follows_from_its_events(whole_run):
    found = statuses(whole_run)
    assert found["Delta above one over the number protected"] == "proven"
    assert found["The coordinator sees single updates"] == "proven"
    assert found["The unit is smaller than a person"] == "not covered"
    assert found["Batches are not sampled as accounted"] == "declared"
    assert found["The same people at several sites"] == "declared"
    assert found["The base model remembers"] == "not covered"
    assert blocks(whole_run)["Algorithm"] == "declared"


def test_an_audit_counts_as_a_test_only_if_it_could_have_refuted_the_claim(build):
    builder = build().rounds(3).finished().claimed().attacked()
    assert statuses(builder.run)["Batches are not sampled as accounted"] == "declared"
    enough = attacked(3.0, 0.6, 0, 7.7991)
    enough["audit"][0] |= {"guesses": 20_000, "right": 19_000}
    run = builder.attacked(run=enough).run
    assert statuses(run)["Batches are not sampled as accounted"] == "tested"
    assert blocks(run)["Algorithm"] == "tested"
    assert "The claim held." in Page(render(run)).text


@pytest.mark.parametrize("privacy", [{"level": "none"}, {"noise": "test"}])
def test_a_run_without_privacy_is_proven_in_nothing(build, privacy):
    run = build(privacy=privacy).rounds(3).finished().claimed().run
    assert "proven" not in {*statuses(run).values(), *blocks(run).values()}
    assert statuses(run)["Weak or seeded randomness"] == "not covered"


def test_a_broken_claim_is_proven_in_nothing(build):
    builder = build().rounds(3).finished().claimed().attacked(verdict="broken")
    builder.run.set_state("failed", 3, RunFailed("E-ATTACK-BOUND", "measured 9.1, claimed 7.8"))
    assert "proven" not in {*statuses(builder.run).values(), *blocks(builder.run).values()}


def test_persons_at_all_sites_are_proven_and_a_large_delta_is_not_covered(build):
    unit = {"unit": "column:patient", "units_per_site": 300, "sites_per_unit": 2}
    builder = build(data=unit, privacy={"level": "unit", "delta": 0.01}).rounds(3).finished()
    guarantee = {"epsilon": 3.0, "delta": 0.01, "tradeoff": [[0.01, 0.05]], "adjacency": "zero-out-one", "person": []}
    found = statuses(builder.claimed(guarantee=guarantee, unit={"level": "unit"}).run)
    assert found["The unit is smaller than a person"] == "proven"
    assert found["The same people at several sites"] == "proven"
    assert found["Delta above one over the number protected"] == "not covered"


def test_a_training_loss_in_the_clear_is_found(build):
    builder = build().rounds(3).finished().claimed()
    assert statuses(builder.run)["Metrics or logs in the clear"] == "tested"
    builder.run.record_metrics(round=3, site="hospital-1", train_loss=0.5)
    assert statuses(builder.run)["Metrics or logs in the clear"] == "not covered"


def test_a_checkpoint_with_a_strange_file_is_found(whole_run):
    assert statuses(whole_run)["Checkpoints or optimizer state released"] == "tested"
    write_json(whole_run.checkpoints / "optimizer.json", {})
    assert statuses(whole_run)["Checkpoints or optimizer state released"] == "not covered"


def test_every_status_is_said_in_words_not_by_colour_alone(whole_run):
    words = Counter(h.status for h in build_hazards(read_evidence(whole_run)))
    text = Page(render(whole_run)).text
    for status, count in words.items():
        assert text.count(status) >= count
