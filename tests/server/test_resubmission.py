"""Runs whose process dies are given to Flower again, at most so often; what was stopped or failed stays as it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cotune.server.fedhome import FedHome
from cotune.server.resubmission import MAX_BARREN, Submission, begin_anew, end_stopped, is_over, resubmit_due
from cotune.shared.errors import ConnectionFailed, JobError, RunFailed
from cotune.shared.keyfile import SigningKey
from cotune.shared.planning import resolve
from cotune.shared.runs import RunFolder, create_run

PROCESS = """
import sys, time
from pathlib import Path
from cotune.shared.runs import RunFolder
run = RunFolder(Path(sys.argv[1]))
with run.held(5.0):
    run.set_state("running", 0)
    print("held", flush=True)
    time.sleep(600)
"""


@dataclass
class Processes:
    """A SuperLink that starts a process for a run, which holds it until somebody ends it."""

    started: list[subprocess.Popen[str]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    fault: Exception | None = None

    def run(self, bundle: Path, config: Mapping[str, str]) -> str:
        assert sorted(path.name for path in bundle.iterdir()) == ["flower_app.py", "pyproject.toml"]
        if self.fault:
            raise self.fault
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, config["run-dir"]], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        self.started.append(process)
        return str(process.pid)

    def stop(self, run_id: str) -> None:
        self.stopped.append(run_id)

    def kill_newest(self) -> None:
        self.started[-1].send_signal(signal.SIGKILL)
        self.started[-1].wait()


@dataclass
class Dying:
    """A SuperLink whose processes die before they have done anything, after a given number of rounds."""

    rounds: Callable[[int], int] = lambda _times: 0
    run_dir: Path | None = None
    times: int = 0

    def run(self, bundle: Path, config: Mapping[str, str]) -> str:
        self.times += 1
        run = RunFolder(Path(config["run-dir"]))
        for number in range(1, self.rounds(self.times) + 1):
            (run.checkpoints / f"round-{number:05d}").mkdir(exist_ok=True)
        run.set_state("running", 0)
        return f"flower-{self.times}"

    def stop(self, run_id: str) -> None:
        assert run_id == f"flower-{self.times - 1}", "the one before"


@pytest.fixture
def home(tmp_path: Path) -> FedHome:
    (tmp_path / "fed" / "runs").mkdir(parents=True)
    return FedHome(tmp_path / "fed", None, SigningKey.create(tmp_path / "key"))  # type: ignore[arg-type]


@pytest.fixture
def run(make_job, home: FedHome) -> RunFolder:
    job = make_job(data={"train": None, "sites": {"site-1": "site:"}, "dataset": "notes", "records_per_site": 30})
    made = create_run(home.runs, resolve(job), b"")
    made.set_engine("deployed")
    return made


@pytest.fixture
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    for process in made.started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time has to pass between two times that a run is given."""
    monkeypatch.setattr(Submission, "wait_s", 0.0)


def at(run: RunFolder) -> str:
    return run.state()["status"]


def test_a_new_run_is_given_once_and_left_alone_while_it_lives(
    home: FedHome, run: RunFolder, processes: Processes
) -> None:
    for _ in range(3):
        resubmit_due(home, processes)
    assert len(processes.started) == 1
    assert at(run) == "running"


def test_a_run_whose_process_was_killed_is_given_again_and_the_old_one_ended(
    home: FedHome, run: RunFolder, processes: Processes, hurried: None
) -> None:
    resubmit_due(home, processes)
    processes.kill_newest()
    resubmit_due(home, processes)
    assert len(processes.started) == 2
    assert processes.stopped == [str(processes.started[0].pid)]
    assert run.is_held()


def test_it_is_not_given_again_before_its_time(home: FedHome, run: RunFolder, processes: Processes) -> None:
    resubmit_due(home, processes)
    processes.kill_newest()
    resubmit_due(home, processes)
    assert len(processes.started) == 1, "five seconds have to pass first"
    assert [Submission(barren=n).wait_s for n in (1, 2, 3, 4, 5, 9)] == [5, 10, 20, 40, 60, 60]


@pytest.mark.parametrize("status", ["paused", "failed", "cancelled"])
def test_what_is_over_stays_over_until_it_is_resumed(
    home: FedHome, run: RunFolder, processes: Processes, hurried: None, status: Any
) -> None:
    run.set_state(status, 1, RunFailed("E-MIN-SITES", "too few"))
    resubmit_due(home, processes)
    assert (processes.started, at(run)) == ([], status)
    begin_anew(run)
    resubmit_due(home, processes)
    assert len(processes.started) == 1


def test_a_run_that_dies_again_and_again_without_finishing_a_round_has_failed(
    home: FedHome, run: RunFolder, hurried: None
) -> None:
    superlink = Dying()
    for _ in range(3 * MAX_BARREN):
        resubmit_due(home, superlink)
    assert superlink.times == MAX_BARREN
    assert run.state()["error"]["code"] == "E-RUN-BARREN"
    assert at(run) == "failed"
    begin_anew(run)
    resubmit_due(home, superlink)
    assert superlink.times == MAX_BARREN + 1, "resuming begins the count again"


def test_each_finished_round_begins_the_count_again(home: FedHome, run: RunFolder, hurried: None) -> None:
    superlink = Dying(rounds=lambda times: times // 4)
    for _ in range(3 * MAX_BARREN):
        resubmit_due(home, superlink)
    assert at(run) == "running"
    assert superlink.times == 3 * MAX_BARREN


def test_a_superlink_that_takes_nothing_is_asked_again_and_the_run_is_not_blamed(
    home: FedHome, run: RunFolder, processes: Processes, hurried: None
) -> None:
    processes.fault = ConnectionFailed("E-SUPERLINK", "away")
    for _ in range(3 * MAX_BARREN):
        with pytest.raises(ConnectionFailed):
            resubmit_due(home, processes)
    assert at(run) == "queued"
    processes.fault = None
    resubmit_due(home, processes)
    assert at(run) == "running"


def test_a_run_that_flower_took_is_waited_for_until_its_process_is_there(
    home: FedHome, run: RunFolder, hurried: None
) -> None:
    class Slow(Dying):
        def run(self, bundle: Path, config: Mapping[str, str]) -> str:
            self.times += 1
            return f"flower-{self.times}"

    superlink = Slow()
    for _ in range(5):
        resubmit_due(home, superlink)
    assert (superlink.times, at(run)) == (1, "queued")


def test_a_stopped_run_is_not_given_again(home: FedHome, run: RunFolder, processes: Processes, hurried: None) -> None:
    resubmit_due(home, processes)
    run.ask_to_stop()
    resubmit_due(home, processes)
    assert at(run) == "running", "its own process ends it"
    processes.kill_newest()
    for _ in range(3):
        resubmit_due(home, processes)
    assert (at(run), len(processes.started)) == ("cancelled", 1)
    assert processes.stopped == [str(processes.started[0].pid)]
    assert run.state()["error"]["code"] == "E-STOPPED"
    begin_anew(run)
    resubmit_due(home, processes)
    assert len(processes.started) == 2


def test_a_living_run_is_neither_ended_nor_begun_anew_from_outside(
    home: FedHome, run: RunFolder, processes: Processes
) -> None:
    resubmit_due(home, processes)
    assert not end_stopped(run)
    with pytest.raises(JobError) as caught:
        begin_anew(run)
    assert caught.value.code == "E-RUN-HELD"
    assert at(run) == "running"


def test_a_run_killed_between_its_success_and_its_manifest_is_finished(
    home: FedHome, run: RunFolder, processes: Processes, hurried: None
) -> None:
    run.set_state("succeeded", 2)
    assert not is_over(run)
    resubmit_due(home, processes)
    assert len(processes.started) == 1
    processes.kill_newest()
    run.set_state("succeeded", 2)
    run.write_manifest()
    assert is_over(run)
    with pytest.raises(JobError) as caught:
        begin_anew(run)
    assert caught.value.code == "E-RUN-OVER"


def test_simulations_and_folders_that_are_being_made_are_nobodys_business_here(
    home: FedHome, make_job, processes: Processes
) -> None:
    create_run(home.runs, resolve(make_job()), b"")
    (home.runs / "half").mkdir()
    (home.runs / "half" / "state.json").write_text("{")
    resubmit_due(home, processes)
    assert not processes.started


def test_what_was_written_of_the_last_time_may_be_damaged(home: FedHome, run: RunFolder, processes: Processes) -> None:
    (run.path / "env" / "submission.json").write_text('{"at": "yesterday"')
    os.utime(run.path / "env" / "submission.json", (time.time(), time.time()))
    resubmit_due(home, processes)
    assert len(processes.started) == 1
