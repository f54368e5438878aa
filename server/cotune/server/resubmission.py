"""Runs given to Flower: new ones, and those whose coordinator's process died.

The rule: a run that is queued, awaiting approval or running, and that no living process holds, is given to Flower
anew, after 5 s at first and at most 60 s later on. Each finished round begins the count again. After ten times
without a finished round it has failed (E-RUN-BARREN). What paused, failed, was stopped or succeeded stays as it is
until somebody resumes it.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cotune.shared.bundle import write_bundle
from cotune.shared.errors import CotuneError, JobError, RunFailed
from cotune.shared.files import write_json
from cotune.shared.finding import known_runs
from cotune.shared.runs import OVER, RunFolder

if TYPE_CHECKING:
    from cotune.server.fedhome import FedHome

MAX_BARREN = 10
FIRST_WAIT_S, LONGEST_WAIT_S = 5.0, 60.0
START_S = 180.0  # from Flower's taking a run to our process holding it, at most


class SuperLink(Protocol):
    """What runs need of Flower's SuperLink; see `control.Control`."""

    def run(self, bundle: Path, config: Mapping[str, str]) -> str:
        """Start a run of the bundle in this folder; Flower's identifier of it."""
        ...

    def stop(self, run_id: str) -> None:
        """End a run, by Flower's identifier."""
        ...


@dataclass(frozen=True)
class Submission:
    """The newest time a run was given to Flower.

    Attributes:
        flower_run: Flower's identifier; None if it was not taken.
        at: When, in seconds since the epoch.
        round: The newest checkpoint then.
        barren: How often it had been given since the round before was finished.
    """

    flower_run: str | None = None
    at: float = 0.0
    round: int = 0
    barren: int = 0

    @property
    def wait_s(self) -> float:
        """How long after it the run may be given again."""
        return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** max(0, self.barren - 1))


def resubmit_due(home: FedHome, superlink: SuperLink) -> None:
    """Give to Flower what is due, and end what was asked to stop. Called once a second.

    Raises:
        CotuneError: The SuperLink did not take a run; it is tried again.
    """
    for run in known_runs(home.runs):
        with contextlib.suppress(JobError):  # a folder that is being made, or held by a living process
            if run.engine() == "deployed" and not is_over(run):
                _look_after(run, superlink)


def is_over(run: RunFolder) -> bool:
    """Whether nothing more happens to a run by itself; one that succeeded must also have written its last file."""
    status = run.state()["status"]
    return status in OVER and (status != "succeeded" or (run.path / "MANIFEST.json").exists())


def _look_after(run: RunFolder, superlink: SuperLink) -> None:
    last = _last(run)
    if run.is_asked_to_stop():
        _end(run, last, superlink)
        return
    waiting = run.state()["status"] == "queued" and last.flower_run is not None
    if time.time() < last.at + (START_S if waiting else last.wait_s) and last.at:
        return
    with run.held():
        if is_over(run):
            return
        newest = _newest_round(run)
        barren = 1 if newest > last.round else last.barren + 1
        if barren > MAX_BARREN:
            run.set_state("failed", newest, _barren(run, newest))
            return
        if run.state()["status"] != "queued":
            run.set_state("queued", newest)
    _give(run, replace(last, round=newest, barren=barren), superlink)


def _give(run: RunFolder, last: Submission, superlink: SuperLink) -> None:
    refused = replace(last, flower_run=None, at=time.time(), barren=max(1, last.barren - 1))
    _write(run, refused)  # a SuperLink that takes nothing is no fault of the run: that does not count
    with tempfile.TemporaryDirectory(prefix="cotune-bundle-") as folder:
        write_bundle(Path(folder) / "cotune")
        flower_run = superlink.run(Path(folder) / "cotune", {"run-dir": str(run.path)})
    _write(run, replace(last, flower_run=flower_run, at=time.time()))
    run.emit("submission", f"given to Flower as run {flower_run}", round=last.round, time=last.barren)
    if last.flower_run:
        with contextlib.suppress(CotuneError):  # it is mostly over already; if not, its process finds it held
            superlink.stop(last.flower_run)


def _end(run: RunFolder, last: Submission, superlink: SuperLink) -> None:
    """End a run that was asked to stop; its own process does so by itself, unless there is none."""
    if end_stopped(run) and last.flower_run:
        with contextlib.suppress(CotuneError):
            superlink.stop(last.flower_run)


def end_stopped(run: RunFolder) -> bool:
    """Note that a run stopped which no process holds; False if one does, and will note it itself."""
    if run.is_held():
        return False
    with run.held():
        if not is_over(run):
            error = RunFailed("E-STOPPED", f"{run.run_id} was stopped", hint=f"cotune resume {run.run_id}")
            run.set_state("cancelled", _newest_round(run), error)
    return True


def begin_anew(run: RunFolder) -> None:
    """Queue a run that paused, failed or was stopped; it is given to Flower within a second of `cotune fed up`.

    Raises:
        JobError: A living process holds it (E-RUN-HELD), or it has succeeded (E-RUN-OVER).
    """
    with run.held():
        if run.state()["status"] == "succeeded" and is_over(run):
            raise JobError("E-RUN-OVER", f"{run.run_id} has succeeded: there is nothing to go on with", param="RUN")
        run.forget_stop()
        _path(run).unlink(missing_ok=True)
        run.set_state("queued", _newest_round(run))


def _barren(run: RunFolder, newest: int) -> RunFailed:
    return RunFailed(
        "E-RUN-BARREN",
        f"{run.run_id}: its process died {MAX_BARREN} times in round {newest + 1} without finishing it",
        hint=f"cotune logs {run.run_id}; then: cotune resume {run.run_id}",
    )


def _newest_round(run: RunFolder) -> int:
    return max((int(path.name.removeprefix("round-")) for path in run.checkpoints.glob("round-[0-9]*")), default=0)


def _path(run: RunFolder) -> Path:
    return run.path / "env" / "submission.json"


def _last(run: RunFolder) -> Submission:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Submission(**json.loads(_path(run).read_bytes()))
    return Submission()


def _write(run: RunFolder, submission: Submission) -> None:
    write_json(_path(run), asdict(submission))
