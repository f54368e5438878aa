"""A whole run in which each site keeps a B of its own: what it leaves, what it says, and whether it verifies."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from tests.integration.test_simulate import only_run, simulate, study

from cotune.server.personal import UNSCORED
from cotune.shared.evaluation import Evaluator
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.records import read_records
from cotune.shared.runs import RunFolder
from cotune.shared.scoring import load_adapter
from cotune.shared.verification import verify_run

pytestmark = pytest.mark.slow

SITES = ["site-1", "site-2", "site-3"]


@pytest.fixture(scope="module")
def runs(tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RunFolder]]:
    """The same study by both rules that train A and B alike, with secure noise."""
    found: dict[str, RunFolder] = {}
    with pytest.MonkeyPatch.context() as patch:
        for rule in ("fedsa", "fedavg_ab"):
            folder = tmp_path_factory.mktemp(rule)
            patch.setenv("COTUNE_CACHE", str(folder / "cache"))
            told = simulate(study(folder, tiny_causal), f"aggregation.rule={rule}", "run.rounds=3")
            assert told[0] == 0, told[2]
            found[rule] = only_run(folder / "runs")
        yield found


def test_the_run_verifies_and_its_claim_is_about_every_adapter_it_leaves(runs: dict[str, RunFolder]) -> None:
    run = runs["fedsa"]
    assert [check.detail for check in verify_run(run) if not check.passed] == []
    subjects = {subject["name"] for subject in run.claim()["subject"]}
    assert {f"personal/{site}/adapter_model.safetensors" for site in SITES} < subjects
    assert any("own B" in release for release in run.claim()["releases"])
    weights = run.personal / "site-2" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    failed = {check.name for check in verify_run(run) if not check.passed}
    weights.write_bytes(kept)
    assert {"files", "released adapter"} <= failed


def test_it_costs_what_the_other_rules_of_a_and_b_cost_and_sends_less(runs: dict[str, RunFolder]) -> None:
    one, other = (runs[rule].claim() for rule in ("fedsa", "fedavg_ab"))
    assert one["guarantee"]["epsilon"] == other["guarantee"]["epsilon"]
    for ours, theirs in zip(one["sites"], other["sites"], strict=True):
        assert {**ours, "ledger_head": 0} == {**theirs, "ledger_head": 0}
    ours, theirs = (runs[rule].summary() for rule in ("fedsa", "fedavg_ab"))
    assert ours["bytes_up"] < theirs["bytes_up"]
    assert ours["bytes_down"] < theirs["bytes_down"]


def test_each_sites_adapter_loads_with_peft_alone_and_has_the_score_that_is_said(runs: dict[str, RunFolder]) -> None:
    run = runs["fedsa"]
    job, base, said = run.job(), locate(run.job()), run.summary()["personal"]
    assert said["sites"] == sorted(said["scores"]) == SITES
    losses: list[float] = []
    for site in SITES:
        network = Network(load_adapter(load_model(base, job), run.personal / site), job)
        rows = read_records(Path(str(job.eval.data)))
        losses.append(Evaluator(network, rows, load_tokenizer(base), job).score(None).loss)
        assert said["scores"][site]["loss"] == pytest.approx(losses[-1], rel=1e-4)
    spread = {"mean": sum(losses) / 3, "lowest": min(losses), "highest": max(losses)}
    assert said["loss"] == pytest.approx(spread, rel=1e-4)
    assert len(set(losses)) == 3


def test_the_sites_share_a_and_the_runs_own_adapter_has_the_mean_of_their_bs(runs: dict[str, RunFolder]) -> None:
    run = runs["fedsa"]
    whole = load_file(run.adapter / "adapter_model.safetensors")
    own = [load_file(run.personal / site / "adapter_model.safetensors") for site in SITES]
    for name, array in whole.items():
        if "lora_A" in name:
            assert all(each[name].tobytes() == array.tobytes() for each in own)
        else:
            assert sum(each[name].astype("f8") / 3 for each in own) == pytest.approx(array, rel=1e-5, abs=1e-7)


def test_rounds_before_the_last_are_not_scored_and_card_and_report_say_whose_adapter_it_is(
    runs: dict[str, RunFolder],
) -> None:
    run = runs["fedsa"]
    assert UNSCORED in [event["message"] for event in run.events()]
    assert [row["round"] for row in run.metrics() if not row.get("site")] == [0, 3]
    assert [row["round"] for row in runs["fedavg_ab"].metrics() if not row.get("site")] == [0, 1, 2, 3]
    said: dict[str, Any] = run.summary()["personal"]
    texts = [(run.adapter / "README.md").read_text(), (run.path / "report" / "index.html").read_text()]
    for text in texts:
        assert said["note"] in html.unescape(text)
        assert f"{said['loss']['mean']:.3f} on average" in text
    for site in SITES:
        card = (run.personal / site / "README.md").read_text()
        assert f"adapter of {site}" in card
        assert f"'personal/{site}'" in card
