"""The commands of deployed runs: what they print, where they look, and how they end."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.conftest import rows, write_rows
from tests.server.grids import enrolled_as

from cotune.shared import cli
from cotune.shared.bundle import bundle_sha256
from cotune.shared.errors import RunFailed
from cotune.shared.files import write_json
from cotune.shared.planning import resolve
from cotune.shared.runs import RunFolder, create_run

SITES = ("site-1", "site-2")


@pytest.fixture
def fed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A coordinator's home with two enrolled sites; it is not up."""
    home = tmp_path / "fed"
    monkeypatch.setenv("COTUNE_FED", str(home))
    monkeypatch.chdir(tmp_path)
    assert cli.run(["fed", "init", "--name", "trial", "--address", "localhost:8443"]) == 0
    for number, site in enumerate(SITES):
        public = ec.generate_private_key(ec.SECP384R1()).public_key()
        node_key = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        known = enrolled_as(site, 100 + number).model_copy(update={"node_key": node_key})
        (home / "sites" / f"{site}.json").write_text(known.model_dump_json())
    capsys.readouterr()
    return home


@pytest.fixture
def run(fed: Path, make_job) -> RunFolder:
    job = make_job(
        data={"train": None, "sites": dict.fromkeys(SITES, "site:"), "dataset": "notes", "records_per_site": 30}
    )
    made = create_run(fed / "runs", resolve(job), b"")
    made.set_engine("deployed")
    return made


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]):
    """Give a command; its exit code and its last JSON line."""

    def give(*words: str) -> tuple[int, dict[str, Any]]:
        code = cli.run([*words, "--json"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return give


def test_submit_says_what_each_site_will_see_and_that_nobody_is_up(
    fed: Path, tiny_causal: Path, tmp_path: Path, tell, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {
        "model": {"base": str(tiny_causal), "max_length": 32},
        "data": {"sites": dict.fromkeys(SITES, "site:"), "records_per_site": 30, "dataset": "notes"},
        "train": {"batch_size": 10},
        "eval": {"data": str(write_rows(tmp_path / "eval.jsonl", rows(6)))},
    }
    (tmp_path / "run.toml").write_text(tomli_w.dumps(job))
    code, said = tell("submit", "run.toml", "run.rounds=2")
    assert code == 0, said
    data = said["data"]
    assert (data["sites"], data["bundle_sha256"], data["up"]) == (list(SITES), bundle_sha256(), False)
    assert data["epsilon"] <= 8
    assert Path(data["path"]).parent == fed / "runs"
    assert cli.run(["submit", "--quiet"]) == 0
    text = capsys.readouterr()
    assert "cotune fed up" in text.out and "cotune site approve" in text.out and text.err == ""


def test_submit_names_the_nearest_site(fed: Path, tmp_path: Path, tell) -> None:
    data = {"sites": {"site-11": "site:"}, "records_per_site": 300, "dataset": "notes"}
    (tmp_path / "run.toml").write_text(tomli_w.dumps({"model": {"base": "nowhere"}, "data": data}))
    code, said = tell("submit")
    assert (code, said["error"]["code"]) == (4, "E-SUBMIT-SITES")
    assert "Did you mean `site-1`?" in said["error"]["message"]


def test_without_a_coordinators_home_every_command_says_how_to_make_one_or_that_there_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell
) -> None:
    monkeypatch.setenv("COTUNE_FED", str(tmp_path / "nowhere"))
    code, said = tell("submit", "run.toml")
    assert (code, said["error"]["code"]) == (1, "E-FED-HOME")
    assert "cotune fed init" in said["error"]["hint"]
    for command in ("status", "watch", "logs", "stop"):
        code, said = tell(command, "anything")
        assert (code, said["error"]["code"]) == (4, "E-RUN-UNKNOWN"), command
    assert tell("ls") == (0, {"schema_version": 1, "status": "ok", "data": []})


def test_status_shows_what_each_site_said_and_spent(run: RunFolder, tell, capsys: pytest.CaptureFixture[str]) -> None:
    assert [site["standing"] for site in tell("status", "latest")[1]["data"]["sites"]] == ["not asked", "not asked"]
    standings = {"site-1": {"state": "approved"}, "site-2": {"state": "refused", "rule": "allow.models", "text": "no"}}
    write_json(run.privacy / "approvals.json", standings)
    run.set_state("running", 1)
    run.record_metrics(round=1, site="site-1", epsilon=1.25)
    run.record_metrics(round=1, valid_loss=2.0, accuracy=None, epsilon=1.25)
    code, said = tell("status", run.run_id)
    data = said["data"]
    assert (code, data["state"], data["round"], data["rounds"], data["held"]) == (0, "running", 1, 2, False)
    assert data["sites"][0] == {
        "site": "site-1", "standing": "approved", "rule": None, "text": None, "rounds": 1, "epsilon": 1.25,
    }  # fmt: skip
    assert data["sites"][1]["rule"] == "allow.models"
    assert cli.run(["status", "latest"]) == 0
    text = capsys.readouterr().out
    assert "refused by rule allow.models: no" in text and "epsilon 1.250 so far" in text


def test_ls_lists_deployed_runs_oldest_first(fed: Path, run: RunFolder, make_job, tell) -> None:
    create_run(fed / "runs", resolve(make_job()), b"")  # a simulation, or one that is being made
    time.sleep(1.1)  # names are of one second
    later = create_run(fed / "runs", run.job(), b"")
    later.set_engine("deployed")
    listed = tell("ls")[1]["data"]
    assert [row["run_id"] for row in listed] == [run.run_id, later.run_id]
    assert listed[0]["state"] == "queued"


def test_logs_follow_a_run_to_its_end(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    def end() -> None:
        run.emit("round", "round 1: 2 updates joined", round=1)
        run.set_state("failed", 1, RunFailed("E-RUN", "no"))

    timer = threading.Timer(0.7, end)
    timer.start()
    assert cli.run(["logs", "latest", "--follow", "--json"]) == 0
    timer.join()
    kinds = [json.loads(line)["type"] for line in capsys.readouterr().out.splitlines()]
    assert kinds == ["status", "round", "status"]


def test_watch_ends_with_an_envelope_that_says_it_is_the_last_and_with_the_runs_own_exit_code(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    error = RunFailed("E-NOT-APPROVED", "two said no")
    error.exit_code = 6
    timer = threading.Timer(0.7, lambda: run.set_state("failed", 0, error))
    timer.start()
    assert cli.run(["watch", run.run_id, "--json"]) == 6
    timer.join()
    *events, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["type"] for event in events] == ["status", "status"]
    assert (last["status"], last["terminal"], last["error"]["code"]) == ("error", True, "E-NOT-APPROVED")
    assert cli.run(["watch", run.run_id, "--quiet"]) == 6
    assert "E-NOT-APPROVED  two said no" in capsys.readouterr().err


def test_stop_ends_a_run_that_no_process_holds_and_resume_queues_it(run: RunFolder, tell) -> None:
    code, said = tell("stop", "latest")
    assert (code, said["data"]["state"]) == (0, "cancelled")
    code, said = tell("stop", "latest")
    assert (code, said["error"]["code"]) == (4, "E-RUN-OVER")
    code, said = tell("resume", run.run_id)
    assert (code, said["data"]["state"]) == (0, "queued")
    assert not run.is_asked_to_stop()


def test_a_living_run_is_asked_to_stop_and_waited_for(run: RunFolder, tell) -> None:
    held, stopped = threading.Event(), threading.Event()

    def coordinator() -> None:
        with run.held():
            run.set_state("running", 1)
            held.set()
            while not run.is_asked_to_stop():
                time.sleep(0.05)
            run.set_state("cancelled", 1, RunFailed("E-STOPPED", "stopped"))
            stopped.set()

    thread = threading.Thread(target=coordinator)
    thread.start()
    held.wait()
    code, said = tell("stop", run.run_id)
    thread.join()
    assert (code, said["data"]["state"], stopped.is_set()) == (0, "cancelled", True)


def test_a_simulation_is_not_stopped_from_here(make_job, tmp_path: Path, tell) -> None:
    run = create_run(tmp_path / "runs", resolve(make_job()), b"")
    code, said = tell("stop", str(run.path))
    assert (code, said["error"]["code"]) == (4, "E-RUN-ENGINE")


def test_a_run_of_the_coordinator_is_found_by_every_command_that_takes_a_run(run: RunFolder, tell) -> None:
    code, said = tell("export", "latest", "--out", "out")
    assert (code, said["error"]["code"]) == (4, "E-ADAPTER")
    assert run.run_id in said["error"]["message"]
