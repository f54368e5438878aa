"""What a run says of itself to authorities: every figure the claim's, every unknown marked, nothing promised more."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.shared.privacy.test_claim import entries, make_job

from cotune.shared.chain import SignedHead
from cotune.shared.cli import run as command
from cotune.shared.errors import JobError, PrivacyError
from cotune.shared.exports.documents import document
from cotune.shared.exports.facts import BLANK, Facts, read_facts
from cotune.shared.exports.registry import RegistryRecord, registry_yaml
from cotune.shared.exports.tables import csv_text
from cotune.shared.jobfile import dump_toml
from cotune.shared.privacy.claim import ClaimSubject, build_claim, claim_bytes
from cotune.shared.runs import RunFolder

COORDINATOR = {"public_key": "ssh-ed25519 " + "A" * 68, "simulated": False}
SignHead = Callable[[str, int], SignedHead]
NEVER = re.compile(r"anonym|complian|guarantees? that|safe\b", re.IGNORECASE)


def published(folder: Path, sign_head: SignHead, **sections: dict[str, Any]) -> RunFolder:
    """A run folder with what is exported of it."""
    job = make_job(**sections)
    run = RunFolder(folder / "20260101-000000-aaaa-tiny")
    run.privacy.mkdir(parents=True)
    files, heads = {"adapter/adapter_model.safetensors": "a" * 64}, {"site-1": sign_head("site-1", 7).model_dump()}
    subject = ClaimSubject(run.run_id, files, None, heads, ("nowhere/base", "c" * 64), COORDINATOR)
    claim = build_claim(job, {"site-1": entries(job, 2), "site-2": entries(job, 1)}, subject)
    (run.privacy / "claim.json").write_bytes(claim_bytes(claim))
    (run.path / "resolved.toml").write_text(dump_toml(job))
    rows = [{"round": number, "site": "site-1"} for number in (1, 2)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.path / "events.jsonl").touch()
    run.set_state("succeeded", 2)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, sign_head: SignHead) -> RunFolder:
    return published(tmp_path_factory.mktemp("published"), sign_head)


@pytest.fixture(scope="module")
def facts(run: RunFolder) -> Facts:
    return read_facts(run)


def test_the_registry_record_has_the_form_and_the_claims_figures(facts: Facts) -> None:
    record = yaml.safe_load(registry_yaml(facts, "nonprofit"))
    RegistryRecord.model_validate_json(json.dumps(record))
    deployment, guarantee = record["deployment"], facts.guarantee
    parameters = {"epsilon": guarantee["epsilon"], "delta": guarantee["delta"]}
    assert deployment["privacy_loss"]["privacy_parameters"] == parameters
    assert record["url_slug"] == "20260101-000000-aaaa-tiny"
    assert deployment["administrative"]["status"] == "Draft"
    claim = deployment["administrative"]["evidence_sources"]["privacy_claim"]
    assert facts.claim["claim_id"] in claim["misc"]["note"]
    assert {each["data_curator_type"] for each in deployment["basic"]["data_curators"]} == {"Nonprofit"}
    assert [each["data_curator_name"] for each in deployment["basic"]["data_curators"]] == ["site-1", "site-2"]
    assert deployment["basic"]["intended_use"] == deployment["basic"]["data_product_region"] == BLANK
    for item in facts.claim["unprotected"]:
        assert item in deployment["dp_variant"]["unprotected_quantities"]
    for each in facts.claim["adversaries"]:
        assert each["sees"] in deployment["deployment_model"]["actors"]


def test_texts_of_several_lines_are_blocks(facts: Facts) -> None:
    text = registry_yaml(facts, "nonprofit")
    assert "unprotected_quantities: |\n" in text
    assert f"\n      - {facts.claim['unprotected'][0]}\n" in text


def test_no_field_beside_the_registrys_passes(facts: Facts) -> None:
    record = yaml.safe_load(registry_yaml(facts, "nonprofit"))
    record["deployment"]["basic"]["certified"] = True
    with pytest.raises(ValueError, match="certified"):
        RegistryRecord.model_validate_json(json.dumps(record))


def test_the_impact_facts_follow_the_law_and_mark_what_only_a_controller_knows(facts: Facts) -> None:
    text = document("dpia", facts)
    parts = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [part[:3] for part in parts[:4]] == ["(a)", "(b)", "(c)", "(d)"]
    assert text.count(f"**{BLANK}**") >= 10
    assert f"epsilon {facts.epsilon} at delta {facts.delta}" in text
    assert "No attack was run" in text
    for item in (*facts.claim["unprotected"], *facts.claim["releases"]):
        assert item in text


def test_the_record_of_processing_has_every_letter_of_article_30(facts: Facts) -> None:
    text = document("record", facts)
    for letter in "abcdefg":
        row = next(line for line in text.splitlines() if line.startswith(f"| ({letter})"))
        assert f"**{BLANK}**" in row
    assert facts.claim["job_sha256"] in text
    assert facts.claim["model"]["adapter_sha256"] in text


def test_no_export_says_what_nobody_can_say(facts: Facts) -> None:
    for text in (registry_yaml(facts, "nonprofit"), document("dpia", facts), document("record", facts)):
        assert not NEVER.search(text)


def test_results_of_attacks_are_told(run: RunFolder, facts: Facts) -> None:
    results = {"verdict": "holds", "run": {"audit": [{"epsilon_lower": 0.31}, {"epsilon_lower": 0.12}]}}
    told = Facts(facts.claim, facts.job, results, facts.rounds)
    assert "verdict: holds; the largest lower bound of epsilon was 0.31" in document("dpia", told)


@pytest.mark.parametrize("privacy", [{"level": "none"}, {"noise": "test", "noise_multiplier": 6.0}])
def test_a_run_that_promises_nothing_says_so_first_and_is_in_no_registry(
    tmp_path: Path, sign_head: SignHead, privacy: dict[str, Any]
) -> None:
    facts = read_facts(published(tmp_path, sign_head, privacy=privacy))
    with pytest.raises(PrivacyError) as caught:
        registry_yaml(facts, "nonprofit")
    assert caught.value.code == "E-NON-PRIVATE"
    for kind in ("dpia", "record"):
        text = document(kind, facts)
        assert "NO privacy guarantee" in text.split("##")[0]
        assert "epsilon 0" not in text
        assert "; covered" not in text


def test_names_from_a_job_are_text_and_no_markup(tmp_path: Path, sign_head: SignHead) -> None:
    data = {"train": "x.jsonl", "records_per_site": 90, "unit": "column:<b>|`id", "units_per_site": 30}
    facts = read_facts(published(tmp_path, sign_head, data=data, privacy={"level": "unit", "noise_multiplier": 6.0}))
    text = document("record", facts)
    assert "<b>" not in text and "&lt;b&gt;\\|\\`id" in text
    row = next(line for line in text.splitlines() if line.startswith("| (c)"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3


def test_the_command_writes_what_it_is_asked_for(run: RunFolder, tmp_path: Path, capsys: Any) -> None:
    names = {"--registry": "r.yaml", "--dpia": "d.md", "--record": "p.md"}
    files = [part for option, name in names.items() for part in (option, str(tmp_path / name))]
    assert command(["export", str(run.path), *files]) == 4
    assert "--curators" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert command(["export", str(run.path), *files, "--curators", "government", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["data"]
    assert said == {option.strip("-"): str(tmp_path / name) for option, name in names.items()}
    assert all((tmp_path / name).read_text() for name in names.values())
    assert command(["export", str(run.path)]) == 4
    assert "E-EXPORT-WHAT" in capsys.readouterr().err


def test_a_run_without_a_claim_has_nothing_to_export(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.privacy.mkdir(parents=True)
    (run.path / "events.jsonl").touch()
    run.set_state("running", 1)
    with pytest.raises(JobError) as caught:
        read_facts(run)
    assert caught.value.code == "E-NO-CLAIM"


def test_no_cell_of_a_table_is_a_formula() -> None:
    evil = ['=HYPERLINK("http://x")', "+1", "-1+2", "@SUM(A1)", "\t=1", "\r=1", "plain", 'q"uo,te\nd']
    rows = list(csv.DictReader(io.StringIO(csv_text(("a", "b"), [{"a": text, "b": -1.5} for text in evil]))))
    assert [row["a"] for row in rows] == [f"'{text}" for text in evil[:6]] + evil[6:]
    assert {row["b"] for row in rows} == {"-1.5"}
