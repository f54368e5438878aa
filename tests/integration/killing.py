"""One process of the command that is watched, and killed at a moment of its life."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import psutil
from tests.integration.killed_study import Study

from cotune.shared.runs import RunFolder

PATIENCE_S = 900.0
ORPHAN_S = 5.0
LOOK_S = 0.2
COMMAND = "command"  # the command itself; other victims are known by a word of their command lines
VICTIMS = {
    "superlink": "flower-superlink",
    "coordinator": "flwr-simulation",
    "actor": "ray::ClientAppActor",
    "worker": "cotune.simulations.worker",
}


@dataclass(frozen=True)
class Moment:
    """When, and which process.

    Attributes:
        stage: start, round, checkpoint, publish or end: what has to have begun.
        share: How much of the stage's usual duration later.
        number: The round, for `round` and `checkpoint`.
        victim: COMMAND, or one of VICTIMS.
    """

    stage: str
    share: float
    number: int = 0
    victim: str = COMMAND


class Attempt:
    """One process of the command, with all that comes from it, until it has ended.

    Args:
        study: What is run.
        out: The folder of its runs; one that has begun there is resumed.
        floor: The newest round that was struck: it is not struck again.
    """

    def __init__(self, study: Study, out: str, floor: int) -> None:
        self.run = study.begun(out)
        self.resumes = self.run is not None
        self.recovered_s: list[float] = []
        self._study, self._out, self._floor = study, out, floor
        self._published = self._publications()
        self._family: set[psutil.Process] = set()
        self._began, self._looked = time.time(), 0.0
        self._waits_since = self._began if self.resumes else None
        self._process = study.start(out, self.run)

    @property
    def round(self) -> int:
        """The newest round that may be under way."""
        return max(self._floor, int(self.run.state()["round"]) if self.run else 0)

    def sees(self, moment: Moment, pace: Mapping[str, float]) -> bool:
        """Wait for a moment; False if the process ends before."""
        while not self._reached(moment):
            if not self._goes_on():
                return False
            time.sleep(0.005)
        until = time.time() + moment.share * pace[moment.stage]
        while time.time() < until and self._goes_on():
            time.sleep(0.005)
        return self._process.poll() is None

    def strike(self, victim: str) -> bool:
        """End one process as a power cut would; False if there is none of the kind."""
        if victim == COMMAND:
            self._process.kill()
            return True
        self._take_in()
        for member in sorted(self._family, key=lambda member: -member.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                words = " ".join(member.cmdline())
                if VICTIMS[victim] in words and "shared.tether" not in words:
                    member.kill()
                    self._floor, self._waits_since = self.round, time.time()
                    return True
        return False

    def end(self) -> tuple[int, list[str]]:
        """Wait for the end: the exit code, and what was still there seconds later (and is ended now)."""
        while self._goes_on():
            time.sleep(0.01)
        psutil.wait_procs(self._family, timeout=ORPHAN_S)
        orphans: list[str] = []
        for member in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                if member.is_running() and member.status() != psutil.STATUS_ZOMBIE:
                    orphans.append(" ".join(member.cmdline())[:80])
                    member.kill()
        return self._process.wait(), orphans

    def _reached(self, moment: Moment) -> bool:
        if moment.stage == "start":
            return True
        self.run = self.run or self._study.begun(self._out)
        if self.run is None:
            return False
        number = max(moment.number, self._floor + 1)
        if moment.stage == "end":
            claim = self.run.privacy / "claim.json"
            return claim.exists() and claim.stat().st_mtime > self._began
        if moment.stage == "publish" or number > self._study.rounds:
            return self._publications() > self._published
        if moment.stage == "checkpoint":
            folders = (self.run.checkpoints / f"{dot}round-{number:05d}{end}" for dot, end in ((".", ".tmp"), ("", "")))
            return any(folder.exists() for folder in folders)
        state = self.run.state()
        return state["status"] == "running" and state["round"] >= number

    def _goes_on(self) -> bool:
        """Whether it is still there; takes in new processes and progress now and then."""
        now = time.time()
        if now - self._began > PATIENCE_S:
            self._process.kill()
            raise AssertionError(f"not done in time; see {self._study.said(self._out)}")
        if now - self._looked > LOOK_S:
            self._looked = now
            self._take_in()
            if self._waits_since and self.run and self._got_on(self.run, self._waits_since):
                self.recovered_s.append(now - self._waits_since)
                self._waits_since = None
        return self._process.poll() is None

    def _take_in(self) -> None:
        if self._study.engine == "flower":  # on the other engine, only `cotune eval`, which ends by itself
            with contextlib.suppress(psutil.NoSuchProcess):
                self._family.update(psutil.Process(self._process.pid).children(recursive=True))

    def _publications(self) -> int:
        return sum(event["type"] == "publish" for event in self.run.events()) if self.run else 0

    def _got_on(self, run: RunFolder, since: float) -> bool:
        """Whether a round or the publication began since then."""
        for event in reversed(run.events()):
            if datetime.fromisoformat(event["created_at"]).timestamp() <= since:
                return False
            begun = event["type"] == "status" and event["data"]["status"] == "running" and event["data"]["round"]
            if begun or event["type"] == "publish":
                return True
        return False
