"""A site with a policy of its own in a whole run: what it refuses, by name, while the others go on."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cotune.client.home import SiteHome
from cotune.client.policy import POLICY_FILE
from cotune.server.coordinator import Coordinator
from cotune.server.evaluation import GlobalEvaluator
from cotune.shared.cli import run as command
from cotune.shared.jobfile import dump_toml, validate
from cotune.shared.methods import layout_of
from cotune.shared.model import locate
from cotune.shared.runs import RunFolder
from cotune.simulations.federation import InlineFleet
from cotune.simulations.quickstart import ROWS_OF_A_PATIENT
from cotune.simulations.scenario import begin, prepare_run

SIGNS = {"cardio": "heart blood", "derma": "skin rash", "pulmo": "lung cough"}
CANARY = "zanzibar"
Change = Callable[[dict[str, Any]], object]


def write_notes(path: Path, start: int) -> Path:
    """90 rows of 20 patients, who have 1 to 8 rows each."""
    patients = [start + number for number in range(20) for _ in range(ROWS_OF_A_PATIENT[number % 8])]
    rows = [
        {"prompt": f"{SIGNS[label]} {CANARY}:", "completion": f" {label}", "patient": f"{CANARY}-{patient}"}
        for i, patient in enumerate(patients)
        for label in [sorted(SIGNS)[i % 3]]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def federation(make_job: Any, tmp_path: Path) -> Callable[..., tuple[Path, SiteHome]]:
    """A job over three sites, of which st-mary has a home; what its policy and the job say can be changed."""

    def make(policy: Change = len, **sections: dict[str, Any]) -> tuple[Path, SiteHome]:
        others = {name: str(write_notes(tmp_path / f"{name}.jsonl", 100 * i)) for i, name in enumerate(("a", "b"), 1)}
        settings: dict[str, dict[str, Any]] = {
            "data": {
                "train": None, "sites": {**others, "st-mary": f"home:{tmp_path / 'home'}"}, "records_per_site": 90,
                "unit": "column:patient", "units_per_site": 20, "max_per_unit": 4, "dataset": "notes",
            },
            "train": {"batch_size": 5, "local_steps": 1},
            "privacy": {"level": "unit", "epsilon": 8.0, "clipping": "normalised"},
            "federation": {"min_sites": 2},
        }  # fmt: skip
        for section, changes in sections.items():
            settings[section] = {**settings.get(section, {}), **changes}
        job = make_job(**settings)
        said: dict[str, Any] = {
            "site": {"name": "st-mary"},
            "allow": {"models": [f"sha256:{locate(job).sha256}"], "max_lora_rank": 2},
            "require": {"min_sites": 2, "min_records": 50},
            "dataset": [{
                "id": "notes", "path": str(write_notes(tmp_path / "notes.jsonl", 0)), "unit": "column:patient",
                "max_per_unit": 4,
                "budget": {"epsilon_total": 9.0, "epsilon_per_run": 8.0, "delta_total": 0.005},
            }],
        }  # fmt: skip
        policy(said)
        home = SiteHome.create(tmp_path / "home", validate(said, POLICY_FILE, origin="test"))
        (tmp_path / "run.toml").write_text(dump_toml(job))
        return tmp_path / "run.toml", home

    return make


def tell(*arguments: object) -> tuple[int, str, str]:
    """Run a command line; nothing it says may quote a record or name a patient."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command([str(argument) for argument in arguments])
    assert CANARY not in out.getvalue() + err.getvalue()
    return code, out.getvalue(), err.getvalue()


def simulate(job: Path, *more: str) -> tuple[int, str, RunFolder]:
    runs = job.parent / "runs"
    code, _, err = tell("simulate", job, "--engine", "inline", "--out", runs, *more)
    newest = max(runs.glob("*/state.json"), key=lambda path: path.parent.name)
    return code, err, RunFolder(newest.parent)


@pytest.mark.slow
def test_a_site_takes_part_on_its_own_terms_and_its_ledger_outlives_the_run(federation: Any) -> None:
    job, home = federation(train={"max_batch_size": 9})
    code, err, run = simulate(job)
    assert code == 0, err
    assert {site["id"] for site in run.claim()["sites"]} == {"a", "b"}, "nobody approved the job yet"
    assert approve(home) == (0, "")
    code, err, run = simulate(job)
    assert code == 0, err
    claim = run.claim()
    assert {site["id"] for site in claim["sites"]} == {"a", "b", "st-mary"}
    assert claim["unit"]["column"] == "patient"
    assert claim["unit"]["adjacency"] == "zero-out-one"
    assert "one person" in claim["statement"]
    code, out, err = tell("verify", run.path)
    assert code == 0, out + err
    after = SiteHome.open(home.path)
    reserved = [entry for entry in after.ledger.entries if entry.action == "budget.reserve"]
    assert [entry.fields["unit"] for entry in reserved] == ["column:patient"] * 2
    assert CANARY.encode() not in (home.path / "ledger.jsonl").read_bytes()
    code, err, again = simulate(job)  # the same job once more: the total of 9 does not pay for it
    assert code == 0, err
    assert {site["id"] for site in again.claim()["sites"]} == {"a", "b"}
    assert any("budget.epsilon_total" in event["message"] for event in again.events())


def over_the_budget(said: dict[str, Any]) -> None:
    said["dataset"][0]["budget"]["epsilon_per_run"] = 2.0


def forbidden_model(said: dict[str, Any]) -> None:
    said["allow"]["models"] = ["sha256:" + "0" * 64]


def more_noise(said: dict[str, Any]) -> None:
    said["require"]["min_noise_multiplier"] = 50.0


def lower_rank(said: dict[str, Any]) -> None:
    said["allow"]["max_lora_rank"] = 1


def more_sites(said: dict[str, Any]) -> None:
    said["require"]["min_sites"] = 3


REFUSED: dict[str, tuple[Change, dict[str, dict[str, Any]]]] = {
    "require.min_noise_multiplier": (more_noise, {}),
    "allow.models": (forbidden_model, {}),
    "allow.max_lora_rank": (lower_rank, {}),
    "require.min_sites": (more_sites, {}),
    "require.level": (len, {"privacy": {"level": "example", "delta": 1e-3}}),
    "noise.test": (len, {"privacy": {"noise": "test"}}),
    "release.train_metrics": (len, {"privacy": {"metrics": "noised"}}),
}


def rounds(job: Path) -> RunFolder:
    """All rounds of a job without its publication."""
    run = prepare_run(str(job), (), job.parent / "trained", lambda _line: None)
    begin(run)
    resolved = run.job()
    layout, config = layout_of(resolved, locate(resolved))
    Coordinator(run, layout, config, GlobalEvaluator(resolved)).run(InlineFleet(run))
    return run


def refusals(run: RunFolder) -> list[dict[str, Any]]:
    return [event["data"]["failure"] for event in run.events() if event["data"].get("failure")]


def approve(home: SiteHome) -> tuple[int, str]:
    """Say yes to the job that waits; the exit code, and what is said against it."""
    (waiting,) = json.loads(tell("site", "jobs", "--home", home.path, "--json")[1])["data"]["jobs"]
    assert waiting["state"] == "waiting"
    code, _, err = tell("site", "approve", waiting["job_sha256"][:12], "--home", home.path)
    return code, err


@pytest.mark.parametrize("rule", REFUSED)
def test_a_refusal_names_its_rule_is_logged_and_leaves_the_others_training(federation: Any, rule: str) -> None:
    policy, sections = REFUSED[rule]
    job, home = federation(policy, **{**sections, "run": {"rounds": 1}, "eval": {"data": None}})
    run = rounds(job)
    (said,) = refusals(run)
    assert (said["site"], said["exit_code"]) == ("st-mary", 6)
    assert f"rule {rule}" in said["message"]
    assert {row["site"] for row in run.metrics() if row.get("site")} == {"a", "b"}
    logged = SiteHome.open(home.path).ledger.entries[-1]
    assert (logged.action, logged.fields["rule"]) == ("job.refused", rule)


def test_a_job_beyond_the_budget_cannot_be_approved_and_does_not_run(federation: Any) -> None:
    job, home = federation(over_the_budget, run={"rounds": 1}, eval={"data": None})
    run = rounds(job)
    assert [said["code"] for said in refusals(run)] == ["E-APPROVAL"]
    code, err = approve(home)
    assert code == 6
    assert "rule budget.epsilon_per_run" in err
    assert not [e for e in SiteHome.open(home.path).ledger.entries if e.action in ("job.approved", "budget.reserve")]


def test_a_run_every_site_refuses_ends_with_exit_code_6(federation: Any) -> None:
    job, _ = federation(forbidden_model, federation={"min_sites": 1})
    text = job.read_text()
    job.write_text("\n".join(line for line in text.splitlines() if not line.startswith(("a = ", "b = "))))
    code, err, _ = simulate(job, "federation.min_sites=1")
    assert code == 6
    assert "E-POLICY" in err and "allow.models" in err


def test_records_that_fail_the_sites_own_check_say_nothing_outside(federation: Any) -> None:
    def many(said: dict[str, Any]) -> None:
        said["require"]["min_records"] = 5000

    job, home = federation(many, run={"rounds": 1}, eval={"data": None})
    rounds(job)
    assert approve(home) == (0, "")
    (failure,) = refusals(rounds(job))
    assert failure["code"] == "E-SITE-DATA"
    assert "5000" not in failure["message"] and "90" not in failure["message"]
    assert "5000" not in (home.path / "ledger.jsonl").read_text()
    assert "min_records" in tell("site", "log", "--home", home.path)[1]
