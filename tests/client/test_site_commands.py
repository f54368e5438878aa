"""`cotune site` as the person who looks after a site uses it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cotune.client.guard import Guard
from cotune.client.home import SiteHome
from cotune.client.policy import policy_text
from cotune.shared.cli import run
from cotune.shared.invitation import read_request
from cotune.shared.jobfile import dump_toml
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.event import DpSgdEvent

MODEL = "ab" * 32
CANARY = "kumquat-7731"
Told = Callable[..., tuple[int, str, str]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """Run `cotune site ...` for the home at tmp_path/home: exit code and outputs."""
    monkeypatch.setenv("COTUNE_SITE", str(tmp_path / "home"))

    def tell(*arguments: object) -> tuple[int, str, str]:
        code = run(["site", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert CANARY not in out + err
        return code, out, err

    return tell


def init(notes: Path, **changes: object) -> list[object]:
    options: dict[str, object] = {
        "name": "st-mary", "dataset": "notes", "data": notes, "unit": "column:patient", "max-per-unit": 4,
        "epsilon-total": 4, "epsilon-per-run": 2,
    }  # fmt: skip
    given = {**options, **changes}
    return ["init", *(part for name, value in given.items() if value is not None for part in (f"--{name}", value))]


def data_of(out: str) -> dict[str, Any]:
    envelope = json.loads(out)
    assert envelope["status"] == "ok"
    return envelope["data"]


def write_rows(path: Path, owners: list[Any]) -> Path:
    rows = [{"prompt": f"{CANARY} {i}:", "completion": f" {i % 3}", "patient": owner} for i, owner in enumerate(owners)]
    for row in rows:
        if row["patient"] == "absent":
            del row["patient"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_init_makes_a_home_and_says_what_comes_next(told: Told, notes: Path, tmp_path: Path) -> None:
    code, out, err = told(*init(notes))
    assert (code, err) == (0, "")
    assert "10 persons by their rows: 3-4: 10" in out
    assert "`notes`, unit column:patient: epsilon 4 in all, 2 a run, at delta 1e-05" in out
    assert "cotune site policy check JOB" in out
    home = SiteHome.open(tmp_path / "home")
    assert home.policy.dataset[0].path == str(notes)
    assert (home.policy.allow.models, home.policy.approve.mode) == ((), "manual"), "default deny"


def test_init_allows_the_base_models_it_is_told(told: Told, notes: Path, tmp_path: Path) -> None:
    allowed = tuple(f"sha256:{digit * 64}" for digit in "ab")
    assert told(*init(notes), *(word for model in allowed for word in ("--model", model)))[0] == 0
    assert SiteHome.open(tmp_path / "home").policy.allow.models == allowed


def test_init_with_a_model_that_is_no_hash_makes_nothing(told: Told, notes: Path, tmp_path: Path) -> None:
    code, _, err = told(*init(notes), "--model", "SmolLM2")
    assert (code, err.split()[0]) == (4, "E-POLICY-VALUE")
    assert not (tmp_path / "home").exists()


def test_init_as_json_is_one_envelope(told: Told, notes: Path, tmp_path: Path) -> None:
    data = data_of(told(*init(notes), "--json")[1])
    assert (data["site"], data["simulated"], data["home"]) == ("st-mary", False, str(tmp_path / "home"))
    assert [finding["code"] for finding in data["findings"]] == ["I-UNIT"]


def test_a_simulated_site_lets_seeded_noise_in_and_says_what_it_is(told: Told, notes: Path, tmp_path: Path) -> None:
    code, out, err = told(*init(notes), "--simulated")
    assert (code, err) == (0, "")
    assert out.startswith("st-mary  SIMULATED: not for real records")
    home = SiteHome.open(tmp_path / "home")
    assert home.is_simulated
    assert home.ledger.entries[0].fields["simulated"] is True
    for command in (["budget"], ["policy"], ["log"], ["jobs"], ["request"]):
        assert "SIMULATED" in told(*command)[1]


def test_init_writes_the_request_for_a_coordinator(told: Told, notes: Path, tmp_path: Path) -> None:
    out = told(*init(notes))[1]
    assert f"send {tmp_path / 'home' / 'request.json'} to a coordinator" in out
    assert read_request(tmp_path / "home" / "request.json").site == "st-mary"


def test_init_never_overwrites_a_home(told: Told, notes: Path, tmp_path: Path) -> None:
    told(*init(notes))
    before = (tmp_path / "home" / "ledger.jsonl").read_bytes()
    code, _, err = told(*init(notes, name="charite"))
    assert (code, err.split()[0]) == (4, "E-SITE-EXISTS")
    assert (tmp_path / "home" / "ledger.jsonl").read_bytes() == before


def test_init_names_every_missing_option_when_nobody_can_be_asked(told: Told, notes: Path) -> None:
    code, _, err = told("init", "--data", notes)
    assert code == 4
    assert "missing: --name, --dataset, --epsilon-total, --epsilon-per-run" in err


def test_init_asks_for_what_is_missing_where_somebody_can_answer(
    told: Told, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal(f"notes\n{notes}\n4\n2\ncolumn:patient\n"))
    code, out, err = told("init", "--name", "st-mary")
    assert (code, err) == (0, "")
    assert "Public name" not in out
    assert SiteHome.open(tmp_path / "home").policy.dataset[0].unit == "column:patient"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"name": "St Mary"}, "E-POLICY-VALUE"),
        ({"unit": "person"}, "E-POLICY-VALUE"),
        ({"epsilon-per-run": 5}, "E-POLICY-VALUE"),
        ({"epsilon-total": "nan"}, "E-POLICY-VALUE"),
        ({"max-per-unit": 0}, "E-POLICY-VALUE"),
        ({"delta-total": 0.1}, "E-DELTA"),
        ({"data": "/nowhere.jsonl"}, "E-DATA-FILE"),
    ],
    ids=str,
)
def test_init_with_an_impossible_setting_makes_nothing(
    changes: dict[str, Any], code: str, told: Told, notes: Path, tmp_path: Path
) -> None:
    status, _, err = told(*init(notes, **changes))
    assert (status, err.split()[0]) == (4, code)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("owner", ["absent", None, "", "  ", {"id": 1}], ids=str)
def test_a_row_of_nobody_makes_no_home(owner: Any, told: Told, tmp_path: Path) -> None:
    code, _, err = told(*init(write_rows(tmp_path / "a.jsonl", ["p1", "p2", owner, "p3", owner])))
    assert (code, err.split()[0]) == (4, "E-UNIT")
    assert "2 rows with nothing in the unit column `patient`" in err
    assert not (tmp_path / "home").exists()


def test_a_bad_row_makes_no_home(told: Told, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ["p1"])
    path.write_bytes(path.read_bytes() + b"{\n")
    code, _, err = told(*init(path))
    assert (code, err.split()[0]) == (4, "E-DATA-ROW")
    assert not (tmp_path / "home").exists()


def test_one_person_with_half_of_the_rows_is_told_and_nobody_named(told: Told, tmp_path: Path) -> None:
    owners = [*(f"p{i}" for i in range(20)), *([CANARY] * 20)]
    code, out, _ = told(*init(write_rows(tmp_path / "a.jsonl", owners)))
    assert code == 0
    assert "W-UNIT-SHARE  one person owns 50% of the rows" in out
    assert "W-UNIT-MAX  1 of 21 persons have more than 4 rows, up to 20: 4 of them are used" in out
    assert "1: 20, 17-32: 1" in out


def test_data_check_tells_the_same_of_units(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "a.jsonl", [7, "7", 7.0, " 7", "8", "absent"])
    code = run(["data", "check", str(path), "--unit", "column:patient", "--json"])
    out, _ = capsys.readouterr()
    envelope = json.loads(out)
    assert (code, envelope["error"]["code"]) == (4, "E-UNIT")
    found = {each["code"]: each for each in envelope["data"]["files"][0]["findings"]}
    assert found["E-UNIT"]["rows"] == [6]
    assert "2 persons by their rows: 1: 1, 3-4: 1" in found["I-UNIT"]["message"], "7 and '7' are one person"
    assert run(["data", "check", str(path)]) == 0, "without a unit, nobody asks whose a row is"
    assert run(["data", "check", str(path), "--unit", "patient"]) == 4


def test_the_policy_is_shown_as_it_is_in_force(told: Told, notes: Path, tmp_path: Path) -> None:
    told(*init(notes))
    code, out, _ = told("policy")
    assert code == 0
    assert (tmp_path / "home" / "policy.toml").read_text().strip() in out
    data = data_of(told("policy", "show", "--json")[1])
    assert data["policy"]["dataset"][0]["budget"]["epsilon_total"] == 4.0
    assert data["policy_sha256"] in out


def test_a_policy_with_a_fault_is_told_with_its_line(told: Told, notes: Path, tmp_path: Path) -> None:
    told(*init(notes))
    path = tmp_path / "home" / "policy.toml"
    path.write_text(path.read_text().replace("min_records", "min_recrods"))
    code, _, err = told("budget")
    assert code == 4
    assert "`require.min_recrods` is not a setting. Did you mean `require.min_records`? (policy.toml line " in err


@pytest.fixture
def site(make_home: Any) -> SiteHome:
    """A home in which model MODEL is allowed."""
    return make_home()


def test_jobs_are_listed_with_cost_and_what_leaves_then_approved_then_denied(
    told: Told, site: SiteHome, desk: Any, ask_job: Any
) -> None:
    assert "no job came yet" in told("jobs")[1]
    job = ask_job()
    desk.refused(Guard(site).admit, desk.plan(job), MODEL)
    sha256 = job.sha256()
    out = told("jobs")[1]
    cost = epsilon([DpSgdEvent(sampling_probability=0.1, noise_multiplier=1.5, steps=6)], 1e-5)
    assert f"{sha256[:12]}  waiting  study" in out
    assert f"costs epsilon {cost:.3f} of `notes` at delta 1e-05" in out
    assert "leaves  3 updates of the adapter, one a round (noised)" in out
    code, out, _ = told("approve", sha256[:8])
    assert code == 0
    assert f"approved {sha256}" in out
    assert Guard(SiteHome.open(site.path)).admit(desk.plan(job), MODEL).id == "notes"
    assert told("deny", sha256[:12], "--reason", "withdrawn")[0] == 0
    assert data_of(told("jobs", "--json")[1])["jobs"][0]["state"] == "denied"
    entries = SiteHome.open(site.path).ledger.entries
    assert [(e.action, e.fields.get("by")) for e in entries[-2:]] == [
        ("job.approved", "admin"),
        ("job.denied", "admin"),
    ]


def test_a_refused_job_is_listed_with_the_rule(told: Told, site: SiteHome, desk: Any, ask_job: Any) -> None:
    desk.refused(Guard(site).admit, desk.plan(ask_job(lora={"r": 99})), MODEL)
    assert "refused by allow.max_lora_rank  study" in told("jobs")[1]


def test_an_approval_is_no_way_round_the_policy(told: Told, site: SiteHome, ask_job: Any) -> None:
    job = ask_job(privacy={"level": "none"})
    site.jobs.receive(job)
    code, _, err = told("approve", job.sha256())
    assert code == 6
    assert err.startswith("E-POLICY  st-mary: rule privacy.none:")
    expensive = ask_job(run={"rounds": 300})
    site.jobs.receive(expensive)
    code, _, err = told("approve", expensive.sha256())
    assert code == 6
    assert "rule budget.epsilon_per_run" in err
    assert "job.approved" not in [e.action for e in SiteHome.open(site.path).ledger.entries]


@pytest.mark.parametrize("reference", ["", "zz", "../../etc/passwd.json", "missing.toml"])
def test_a_job_that_is_not_there_is_an_error(reference: str, told: Told, site: SiteHome) -> None:
    code, _, err = told("approve", reference)
    assert code == 4
    assert err.startswith("E-")


def test_a_prefix_of_two_jobs_is_refused(told: Told, site: SiteHome, ask_job: Any) -> None:
    by_digit: dict[str, str] = {}
    for seed in range(40):
        job = ask_job(run={"seed": seed})
        site.jobs.receive(job)
        digit = job.sha256()[0]
        if digit in by_digit:
            break
        by_digit[digit] = job.sha256()
    code, _, err = told("deny", digit)
    assert code == 4
    assert "found 2" in err


def test_a_job_file_is_held_against_every_rule(
    told: Told, site: SiteHome, ask_job: Any, tmp_path: Path, make_policy: Any, tiny_causal: Path
) -> None:
    from cotune.shared.model import folder_sha256

    job = ask_job(model={"base": str(tiny_causal)}, simulation={"workers": 1, "threads": 1})
    path = tmp_path / "resolved.toml"
    path.write_text(dump_toml(job))
    sha256 = folder_sha256(tiny_causal)
    code, out, err = told("policy", "check", path)
    assert code == 6
    assert f"REFUSED allow.models: the base model is sha256:{sha256}" in out
    assert err.startswith("E-POLICY  st-mary: rule allow.models:")
    code, out, _ = told("policy", "check", path, "--json")
    envelope = json.loads(out)
    assert (code, envelope["status"], envelope["data"]["refused_by"]["rule"]) == (6, "error", "allow.models")
    policy = make_policy(allow={"models": [f"sha256:{sha256}"]})
    (site.path / "policy.toml").write_text(policy_text(policy))
    code, out, err = told("policy", "check", path)
    assert (code, err) == (0, "")
    assert "REFUSED" not in out
    assert "ok      budget.epsilon_total" in out
    assert "later   allow.signers" in out
    code, out, _ = told("approve", path, "--json")
    approved = data_of(out)
    assert approved["state"] == "approved"
    assert SiteHome.open(site.path).jobs.standings()[approved["job_sha256"]].state == "approved"


def test_a_model_that_cannot_be_located_leaves_its_rule_open(
    told: Told, site: SiteHome, ask_job: Any, tmp_path: Path
) -> None:
    path = tmp_path / "resolved.toml"
    path.write_text(dump_toml(ask_job(model={"base": "./nowhere"})))
    code, out, _ = told("policy", "check", path)
    assert code == 0
    assert "later   allow.models: the base model could not be located (E-MODEL-MISSING)" in out


def test_budgets_are_shown_with_runs_and_how_many_more_fit(told: Told, site: SiteHome, desk: Any, ask_job: Any) -> None:
    job = ask_job()
    site.jobs.approve(job, by="admin")
    for number in (1, 2, 3):
        desk.take(Guard(site), desk.plan(job, number))
    desk.take(Guard(site), desk.plan(job, 1, run_id="run-2"))
    row = data_of(told("budget", "--json")[1])["datasets"][0]
    step = {"sampling_probability": 0.1, "noise_multiplier": 1.5}
    assert row["epsilon_spent"] == epsilon([DpSgdEvent(**step, steps=8)], 1e-5)
    assert row["runs"] == {
        "run-1": epsilon([DpSgdEvent(**step, steps=6)], 1e-5), "run-2": epsilon([DpSgdEvent(**step, steps=2)], 1e-5)
    }  # fmt: skip
    code, out, _ = told("budget")
    assert code == 0
    assert f"spent {row['epsilon_spent']:.3f} of 4  [=" in out
    assert "9 or more runs like the last one would fit" in out


def test_the_log_is_shown_checked_and_written_as_csv(
    told: Told, site: SiteHome, desk: Any, ask_job: Any, tmp_path: Path
) -> None:
    guard, job = Guard(site), ask_job()
    site.jobs.approve(job, by="admin")
    dataset = guard.admit(desk.plan(job), MODEL)
    desk.refused(lambda: guard.check_records(desk.plan(job), dataset, rows=0, units=0))
    code, out, _ = told("log", "--csv", tmp_path / "log.csv")
    assert code == 0
    assert "4 entries: each names the one before it, and the last is signed by this site's key" in out
    assert "own checks of records (never leave this home)" in out
    assert "require.min_records" in out
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["action"] for row in rows] == ["site.init", "data.register", "job.approved", "job.refused"]
    assert "require.min_records" not in (tmp_path / "log.csv").read_text(), "the file is for others"
    data = data_of(told("log", "--verify", "--json")[1])
    assert (data["proof"]["entries"], data["proof"]["chain"], data["entries"]) == (4, "valid", [])


def test_the_exported_log_comes_as_a_table_too_in_which_no_text_is_a_formula(
    told: Told, site: SiteHome, ask_job: Any, tmp_path: Path
) -> None:
    evil = '=HYPERLINK("http://evil.example","click")'
    site.jobs.approve(ask_job(), by="admin")
    site.jobs.deny(ask_job().sha256(), evil)
    code, out, _ = told("log", "export", tmp_path / "ledger.json", "--csv", tmp_path / "log.csv", "--json")
    assert code == 0
    assert data_of(out)["csv"] == str(tmp_path / "log.csv")
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(site.ledger.entries)
    assert rows[-1]["reason"] == f"'{evil}"
    assert (rows[-1]["action"], rows[-1]["by"]) == ("job.denied", "admin")
    assert json.loads(rows[-1]["fields"])["reason"] == evil
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())


def test_an_edited_ledger_is_told_with_its_line(told: Told, site: SiteHome) -> None:
    path = site.path / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"dataset": "notes"', b'"dataset": "mates"'))
    code, _, err = told("log", "--verify")
    assert code == 1
    assert err.startswith("E-LEDGER-")


@pytest.mark.parametrize("command", ["policy", "budget", "log", "jobs"])
def test_every_listing_of_a_simulated_site_says_so(
    command: str, told: Told, tmp_path: Path, desk: Any, ask_job: Any
) -> None:
    job = ask_job(privacy={"level": "none"})
    home = SiteHome.simulated(tmp_path / "home", "st-mary", job, MODEL)
    desk.take(Guard(home), desk.plan(job))
    code, out, _ = told(command)
    assert code == 0
    assert "SIMULATED" in out
    assert data_of(told(command, "--json")[1])["simulated"] is True
    if command == "budget":
        assert "spent without bound of 32" in out
    if command == "jobs":
        assert "(NOT PRIVATE)" in out


@pytest.mark.parametrize("command", ["policy", "budget", "log", "jobs"])
def test_without_a_home_a_site_is_told_to_make_one(command: str, told: Told) -> None:
    code, _, err = told(command)
    assert (code, err.split()[0]) == (1, "E-SITE-HOME")
    assert "mend it: cotune site init" in err
