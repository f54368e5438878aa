"""`cotune attack` as a user runs it, on small real runs: what it finds, says, writes and refuses."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cotune.server import publish
from cotune.shared.cli import run as command
from cotune.shared.files import write_json
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.claim import claim_id
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.runs import BROKEN, RunFolder
from cotune.shared.verification import verify_run
from cotune.simulations.attack import attacking, audit, results
from cotune.simulations.attack.canaries import planted_in, record_of
from cotune.simulations.attack.exposure import extracted
from cotune.simulations.attack.reader import Reader

LABELS = ("cardio", "derma", "pulmo")
pytestmark = pytest.mark.slow
WORDS = ("fever", "heart", "eye", "bone", "tooth", "pain", "chronic", "acute", "left", "right", "upper")
NUMBER, NULLABLE = {"type": "number"}, {"type": ["number", "null"]}
PERCENT = {"type": "number", "minimum": 0, "maximum": 1}
RESULTS = {
    "type": "object",
    "additionalProperties": False,
    "required": ["canaries", "audit", "exposure", "membership", "secrets"],
    "properties": {
        "canaries": {
            "type": ["object", "null"],
            "required": ["candidates", "inserted", "rows_each", "unit"],
            "properties": {"unit": {"enum": ["record", "person"]}},
        },
        "audit": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": [
                    "adversary",
                    "method",
                    "guesses",
                    "right",
                    "epsilon_lower",
                    "delta",
                    "confidence",
                    "holds",
                ],
                "properties": {
                    "adversary": {"type": "string"},
                    "method": {"enum": ["Steinke et al. 2023", "f-DP, Mahloujifar et al. 2024"]},
                    "guesses": {"type": "integer"},
                    "right": {"type": "integer"},
                    "epsilon_lower": NUMBER,
                    "delta": PERCENT,
                    "confidence": {"const": 0.95},
                    "claimed_epsilon": NULLABLE,
                    "holds": {"type": "boolean"},
                },
            },
        },
        "exposure": {
            "type": ["object", "null"],
            "required": ["mean", "median", "max", "chance_mean", "values"],
            "properties": {"values": {"type": "array", "maxItems": 200}},
        },
        "membership": {
            "type": ["object", "null"],
            "required": ["method", "members", "non_members", "auc", "auc_low", "auc_high", "tpr_at_1pct_fpr", "roc"],
            "properties": {"auc": PERCENT, "tpr_at_1pct_fpr": PERCENT, "roc": {"type": "array", "maxItems": 100}},
        },
        "secrets": {
            "type": ["object", "null"],
            "required": ["planted", "recovered", "tokens_recovered", "examples"],
            "properties": {"tokens_recovered": PERCENT, "examples": {"type": "array", "maxItems": 10}},
        },
    },
}
WHOLE = {
    "type": "object",
    "additionalProperties": False,
    "required": [
        "schema",
        "run_id",
        "claim_id",
        "created",
        "seconds",
        "verdict",
        "limits",
        "run",
        "control",
        "leakage",
    ],
    "properties": {
        "schema": {"const": "cotune/attack/1"},
        "run_id": {"type": "string"},
        "claim_id": {"type": ["string", "null"]},
        "created": {"type": "string"},
        "seconds": NUMBER,
        "verdict": {"enum": ["holds", "broken", "not tested", "nothing claimed"]},
        "limits": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "run": RESULTS,
        "control": {
            "type": ["object", "null"],
            "required": ["run_id", "results"],
            "properties": {"run_id": {"type": "string"}, "results": RESULTS},
        },
        "leakage": {
            "type": ["object", "null"],
            "required": [
                "model",
                "rank",
                "tokens",
                "trials",
                "recovered_without_dp",
                "recovered_with_dp",
                "noise_multiplier",
                "note",
            ],
            "properties": {"recovered_without_dp": PERCENT, "recovered_with_dp": PERCENT, "noise_multiplier": NULLABLE},
        },
    },
}


def rows(count: int, first: int = 0) -> str:
    made = []
    for i in range(first, first + count):
        text = f"{WORDS[i % 7]} {('heart', 'skin', 'lung')[i % 3]} {WORDS[(i * 5) % 11]} {WORDS[(i * 3) % 11]}"
        made.append({"prompt": f"Diagnosis: {text}. Specialty:", "completion": f" {LABELS[i % 3]}"})
    return "".join(json.dumps(row) + "\n" for row in made)


def study(folder: Path, model: Path) -> Path:
    """Three sites of 30 records; what is planted, and whether there is privacy, a test says itself."""
    (folder / "train.jsonl").write_text(rows(90), encoding="utf-8")
    (folder / "eval.jsonl").write_text(rows(60, 500), encoding="utf-8")
    (folder / "run.toml").write_text(
        f'[run]\nname = "tiny"\nseed = 3\nrounds = 2\n[model]\nbase = "{model}"\nmax_length = 32\n'
        "[lora]\nr = 2\nalpha = 4.0\nlast_layers = 2\n"
        '[data]\ntrain = "train.jsonl"\nrecords_per_site = 40\n'
        "[train]\nbatch_size = 20\nlocal_steps = 2\nlearning_rate = 0.5\n"
        '[federation]\nsites = 3\n[eval]\ndata = "eval.jsonl"\n[simulation]\nworkers = 1\nthreads = 1\n'
    )
    return folder / "run.toml"


def cotune(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and envelope of a command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = command([*arguments, "--json"])
    return code, json.loads(out.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_causal: Path) -> dict[str, Path]:
    """A private run, a control with its canaries, and a private run that plants nothing."""
    folder = tmp_path_factory.mktemp("attacked")
    job, made = str(study(folder, tiny_causal)), {}
    plants = ["audit.canaries=40", "audit.secrets=3"]
    private = ["privacy.noise_multiplier=2.0", "privacy.delta=1e-5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTUNE_CACHE", str(folder / "cache"))
        patch.setattr(publish, "_reload", lambda _run, loss: {"loss_saved": loss, "loss_reloaded": loss})  # seconds
        for name, settings in (
            ("private", [*plants, *private]),
            ("control", [*plants, "privacy.level=none", "--i-know", "--canaries-of"]),
            ("bare", private),
        ):
            extra = [str(made["private"])] if name == "control" else []
            code, said = cotune("simulate", job, *settings, *extra, "--engine", "inline", "--out", str(folder / name))
            assert code == 0, said
            made[name] = Path(said["run"])
    return made


@pytest.fixture
def runs(trained: dict[str, Path], tmp_path: Path) -> dict[str, RunFolder]:
    """Copies, for tests that change them."""
    return {name: RunFolder(Path(shutil.copytree(path, tmp_path / path.name))) for name, path in trained.items()}


def test_a_private_run_and_its_control_are_attacked_alike_and_written_as_agreed(runs: dict[str, RunFolder]) -> None:
    code, said = cotune("attack", str(runs["private"].path), "--control", str(runs["control"].path))
    assert code == 0
    written = json.loads((runs["private"].attack / "results.json").read_text(encoding="utf-8"))
    assert said["data"] == written
    jsonschema.validate(written, WHOLE)
    assert written["verdict"] == "holds"
    claimed = runs["private"].claim()
    assert written["claim_id"] == claimed["claim_id"]
    assert [bound["claimed_epsilon"] for bound in written["run"]["audit"]] == [claimed["guarantee"]["epsilon"]] * 2
    beside = written["control"]["results"]
    assert beside["canaries"] == written["run"]["canaries"]
    assert [bound["claimed_epsilon"] for bound in beside["audit"]] == [None] * 2
    assert beside["secrets"]["planted"] == len(beside["exposure"]["values"]) == 3
    assert written["run"]["membership"]["members"] == 90
    assert written["leakage"]["recovered_without_dp"] > 0.6


def test_an_attacked_run_still_verifies_and_its_manifest_has_what_was_found(runs: dict[str, RunFolder]) -> None:
    assert cotune("attack", str(runs["private"].path))[0] == 0
    manifest = json.loads((runs["private"].path / "MANIFEST.json").read_text(encoding="utf-8"))
    assert {"attack/canaries.jsonl", "attack/results.json"} <= manifest.keys()
    assert [check.name for check in verify_run(runs["private"]) if not check.passed] == []


def test_what_was_planted_was_trained_on(trained: dict[str, Path]) -> None:
    """The private run's sites had canaries among their rows: without, this adapter would be the bare run's work."""
    from cotune.simulations.attack.canaries import planted_in, planted_records

    run = RunFolder(trained["private"])
    there = sum(one.coin for one in planted_in(run))
    assert 0 < there < 43
    assert sum(len(planted_records(run, run.job(), f"site-{n}")) for n in (1, 2, 3)) == there


def test_a_run_that_plants_nothing_says_what_could_not_be_tried(runs: dict[str, RunFolder]) -> None:
    code, said = cotune("attack", str(runs["bare"].path))
    jsonschema.validate(said["data"], WHOLE)
    assert code == 0
    assert said["data"]["verdict"] == "not tested"
    assert said["data"]["run"]["audit"] == []
    assert said["data"]["run"]["membership"]
    for word in ("no canaries", "no secrets"):
        assert any(word in limit for limit in said["data"]["limits"])


def test_a_run_that_claims_nothing_cannot_be_found_to_break_a_claim(runs: dict[str, RunFolder]) -> None:
    code, said = cotune("attack", str(runs["control"].path))
    jsonschema.validate(said["data"], WHOLE)
    assert (code, said["data"]["verdict"]) == (0, "nothing claimed")
    assert said["data"]["leakage"]["noise_multiplier"] is None
    assert "adds no noise" in said["data"]["leakage"]["note"]


def test_a_run_without_adapter_or_claim_is_attacked_as_far_as_that_goes(runs: dict[str, RunFolder]) -> None:
    run = runs["private"]
    for gone in (run.adapter, run.privacy):
        shutil.rmtree(gone)
    for gone in (run.path / "MANIFEST.json", run.path / "summary.json"):
        gone.unlink()
    run.set_state("paused", 1)
    code, said = cotune("attack", str(run.path))
    jsonschema.validate(said["data"], WHOLE)
    assert (code, said["data"]["verdict"], said["data"]["claim_id"]) == (0, "nothing claimed", None)
    assert any("has published none" in limit for limit in said["data"]["limits"])
    assert not (run.path / "MANIFEST.json").exists()


def test_a_deployed_run_has_no_canaries_and_nobodys_rows_are_looked_at(runs: dict[str, RunFolder]) -> None:
    run = runs["bare"]
    run.set_engine("deployed")
    text = (run.path / "resolved.toml").read_text(encoding="utf-8")
    start = text.index('train = "')
    text = text[:start] + 'dataset = "notes"\n' + text[text.index("\n", start) + 1 :]
    sites = "[data.sites]\n" + "".join(f'site-{n} = "site:"\n' for n in (1, 2, 3))
    (run.path / "resolved.toml").write_text(text.replace("[train]", f"{sites}\n[train]", 1), encoding="utf-8")
    code, said = cotune("attack", str(run.path))
    jsonschema.validate(said["data"], WHOLE)
    assert code == 0
    assert any("deployed run plants nothing" in limit for limit in said["data"]["limits"])
    assert any("records are their own" in limit for limit in said["data"]["limits"])


def test_a_bound_above_the_claim_fails_the_run_for_good(
    runs: dict[str, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["private"]
    monkeypatch.setattr(audit, "lower_bound", lambda *_: 99.0)
    monkeypatch.setattr(audit, "lower_bound_of", lambda *_: 0.0)  # the other bound suffices, and takes no time
    code, said = cotune("attack", str(run.path))
    assert (code, said["error"]["code"]) == (1, BROKEN)
    assert said["data"]["verdict"] == "broken"
    assert run.state()["status"] == "failed"
    assert run.state()["error"]["code"] == BROKEN
    assert json.loads((run.attack / "results.json").read_text(encoding="utf-8"))["verdict"] == "broken"
    code, said = cotune("resume", str(run.path))
    assert (code, said["error"]["code"]) == (4, "E-RUN-OVER")
    assert run.state()["status"] == "failed"


def test_a_control_must_have_the_same_canaries_and_no_privacy(runs: dict[str, RunFolder]) -> None:
    for one, other in (("private", "bare"), ("bare", "private"), ("private", "private")):
        code, said = cotune("attack", str(runs[one].path), "--control", str(runs[other].path))
        assert (code, said["error"]["code"]) == (4, "E-ATTACK-CONTROL")
        assert not (runs[one].attack / "results.json").exists()


def test_people_read_the_same_in_words(runs: dict[str, RunFolder], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["attack", str(runs["private"].path), "--quiet"]) == 0
    told = capsys.readouterr()
    assert "HOLDS" in told.out
    assert "The door code of" in told.out
    assert told.err == ""


def test_the_verdict_follows_from_claim_and_bounds() -> None:
    claim, bound = {"guarantee": {"epsilon": 1.0}}, {"holds": True}
    assert results.verdict_of({}, {"audit": [bound]}) == "nothing claimed"
    assert results.verdict_of({"guarantee": None}, {"audit": [bound]}) == "nothing claimed"
    assert results.verdict_of(claim, {"audit": []}) == "not tested"
    assert results.verdict_of(claim, {"audit": [bound, bound]}) == "holds"
    assert results.verdict_of(claim, {"audit": [bound, {"holds": False}]}) == "broken"


def test_a_run_is_not_attacked_while_it_is_trained(runs: dict[str, RunFolder]) -> None:
    with runs["private"].held():
        code, said = cotune("attack", str(runs["private"].path))
    assert (code, said["error"]["code"]) == (4, "E-RUN-HELD")


def test_a_damaged_file_of_canaries_is_a_limit_and_no_bound(runs: dict[str, RunFolder]) -> None:
    (runs["private"].attack / "canaries.jsonl").write_text("{}\n", encoding="utf-8")
    code, said = cotune("attack", str(runs["private"].path))
    assert (code, said["data"]["verdict"]) == (0, "not tested")
    assert any("40" in limit or "43" in limit for limit in said["data"]["limits"])


def test_results_have_no_infinity_for_a_model_that_lost_its_numbers(runs: dict[str, RunFolder]) -> None:
    from safetensors.numpy import load_file, save_file

    path = runs["control"].adapter / "adapter_model.safetensors"
    save_file({name: array * 1e30 for name, array in load_file(path).items()}, path, metadata={"format": "pt"})
    code, said = cotune("attack", str(runs["control"].path))
    assert code == 0
    jsonschema.validate(said["data"], WHOLE)
    write_json(runs["control"].path / "again.json", said["data"])  # strict about NaN


def test_verify_catches_an_accountant_that_was_reset_each_round(runs: dict[str, RunFolder]) -> None:
    """An attack may miss it; the ledgers hold every round, so recomputing does not."""
    run, claim = runs["private"], runs["private"].claim()
    job, delta = run.job(), claim["guarantee"]["delta"]
    reset = epsilon([mechanism_of(job).event(job.train.local_steps)], delta)
    assert reset < claim["guarantee"]["epsilon"]
    claim["guarantee"]["epsilon"] = reset
    write_json(run.privacy / "claim.json", {**claim, "claim_id": claim_id(claim)})
    run.write_manifest()
    assert "epsilon" in [check.name for check in verify_run(run) if not check.passed]


def test_digits_the_model_cannot_tell_apart_are_no_exposure(trained: dict[str, Path]) -> None:
    """The tiny model's vocabulary has no digits: all secrets look alike to it, and none counts as found out."""
    found = attacking.Attacks(RunFolder(trained["control"]), lambda _line: None).results()
    assert found["exposure"]["values"] == pytest.approx([1.0] * 3, abs=0.05)


def test_what_the_model_says_of_its_own_accord_is_recovered(trained: dict[str, Path]) -> None:
    run = RunFolder(trained["control"])
    reader = Reader(run)
    secret = next(one for one in planted_in(run) if one.kind == "secret")
    asked = [replace(secret, prompt=word, answer=" fever cough heart") for word in WORDS]
    answers = [(reader.text(said), said) for said in reader.say([record_of(one, run.job()) for one in asked])[0]]
    plain = [  # without tokens that are read as others once they are text
        (one, text)
        for one, (text, said) in zip(asked, answers, strict=True)
        if reader.tokenizer(f" {text}", add_special_tokens=False)["input_ids"] == said
    ]
    wordy, said = plain[0]
    for answer, count in ((said, 1), (f"{said} lung tooth cough", 0)):
        found = extracted(reader, [replace(wordy, answer=f" {answer}")])
        assert found["recovered"] == count
        assert (found["tokens_recovered"] == 1.0) == bool(count)
