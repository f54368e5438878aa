"""Kills runs again and again, resumes them until they are done, and judges what they leave.

`python tests/integration/run_killed.py --kills 50` prints the figures; test_run_kills.py does fewer. What is killed is
the real command, in a process of its own, at seeded moments over its whole life. A site trains a round that was lost
once more, and no third time: so no round is struck twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from cotune.shared.chain import Entry, SignedHead, read_chain, read_torn_chain
from cotune.shared.runs import RunFolder
from cotune.shared.verification import verify_run

if __package__ is None:  # run as a program
    sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.integration.killed_study import SITES, Study, replayed, tiny_model, write_home_study, write_study
from tests.integration.killing import COMMAND, VICTIMS, Attempt, Moment

SURVIVED = ("actor", "worker")  # the run goes on by itself
Plan = Callable[[random.Random, int], list[Moment]]


@dataclass
class Figures:
    """What came of it, in numbers; `faults` has to be empty."""

    kills: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    restarts: int = 0
    completed: int = 0
    equal: int = 0
    charges: Counter[str] = field(default_factory=Counter)
    recovered_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, other: Figures) -> None:
        """Take in the figures of more runs."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON."""
        seconds = sorted(self.recovered_s) or [0.0]
        return {
            "kills": self.kills.total(),
            "kills by engine, victim and stage": dict(sorted(self.kills.items())),
            "resumes": self.resumes,
            "begun anew, as nothing was there yet": self.restarts,
            "runs completed": self.completed,
            "bitwise equal": f"{self.equal}/{self.completed}",
            "rounds of sites": {what: self.charges[what] for what in ("once", "lost and charged again", "never")},
            "seconds to recover": {"p50": round(statistics.median(seconds), 1), "max": round(seconds[-1], 1)},
            "faults": self.faults,
        }


@dataclass
class History:
    """What the sites and the coordinator of a run had on disk when they were last looked at."""

    run: RunFolder
    homes: Mapping[str, Path]
    ledgers: dict[str, list[str]] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    open: set[tuple[str, int]] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def look(self) -> None:
        """Look again, in the sites' homes; rounds that are charged and not committed are noted."""
        kept = self._kept_heads()  # heads are read before what they cover: a run may go on meanwhile
        for site in SITES:
            home = self.homes.get(site, self.run.sites / site)
            if not (home / "head.json").exists():
                continue
            head = SignedHead.model_validate_json((home / "head.json").read_bytes())
            entries, _ = read_torn_chain((home / "ledger.jsonl").read_bytes(), None, head.seq)
            self._require_growth(site, entries, head.seq, kept.get(site, 0))
            charged, committed = (rounds_of(entries, what, self.run) for what in ("budget.reserve", "budget.commit"))
            self.open |= {(site, number) for number in charged.keys() - committed.keys()}

    def settle(self) -> Counter[str]:
        """How often each site was charged for each round, from the ledgers that a finished run keeps."""
        found, kept = Counter[str](), self._kept_heads()
        for site in SITES:
            entries = read_chain(self.run.ledger(site).read_bytes())
            self._require_growth(site, entries, 0, kept[site])
            charged, committed = (rounds_of(entries, what, self.run) for what in ("budget.reserve", "budget.commit"))
            for number in range(1, self.run.job().run.rounds + 1):
                where = f"{site}, round {number}"
                found[("never", "once", "lost and charged again")[min(charged[number], 2)]] += 1
                if committed[number] != 1 or not charged[number]:
                    self.faults.append(f"{where}: charged {charged[number]}, committed {committed[number]} times")
                if charged[number] > 2 or (charged[number] == 2 and (site, number) not in self.open):
                    self.faults.append(f"{where}: charged {charged[number]} times, and it was not lost")
        return found

    def _kept_heads(self) -> dict[str, int]:
        """Site -> number of the newest ledger head that the coordinator keeps."""
        path = self.run.privacy / "heads.json"
        return {site: head["seq"] for site, head in json.loads(path.read_bytes()).items()} if path.exists() else {}

    def _require_growth(self, site: str, entries: Sequence[Entry], covered: int, kept: int) -> None:
        """A ledger only grows, and neither its own head nor the one that the coordinator keeps goes back."""
        known, now = self.ledgers.get(site, []), [entry.sha256 for entry in entries]
        if now[: len(known)] != known or len(now) < max(covered, kept):
            self.faults.append(f"{site}: its ledger lost entries")
        if kept < self.heads.get(site, 0):
            self.faults.append(f"{site}: its head at the coordinator went back")
        self.ledgers[site], self.heads[site] = now, kept


def rounds_of(entries: Sequence[Entry], action: str, run: RunFolder) -> Counter[int]:
    """How many entries of a kind a run has, by round."""
    return Counter(e.fields["round"] for e in entries if e.action == action and e.fields["run_id"] == run.run_id)


def finished(run: RunFolder) -> bool:
    """Whether a run is done: its manifest is the last that it writes."""
    return run.state()["status"] == "succeeded" and (run.path / "MANIFEST.json").exists()


def torment(
    study: Study, out: str, plan: Sequence[Moment], pace: Mapping[str, float], figures: Figures
) -> History | None:
    """Run a job to its end through the kills of a plan; None, and a fault, if it does not get there."""
    left, floor, history = deque(plan), 0, None
    for number in range(2 * len(plan) + 2):
        attempt, struck, fatal = Attempt(study, out, floor), False, False
        figures.resumes += attempt.resumes
        figures.restarts += number > 0 and not attempt.resumes
        while left and attempt.sees(left[0], pace):
            moment = left.popleft()
            if not attempt.strike(moment.victim):
                continue
            struck = True
            figures.kills[f"{study.engine}, {moment.victim}, {moment.stage}"] += 1
            if moment.victim not in SURVIVED:
                fatal = True
                break
            history = look(history, attempt.run, study)
            if history and moment.victim == "actor":  # its child trains on, while the site is asked again
                history.open |= {(site, attempt.round) for site in SITES}
        code, orphans = attempt.end()
        figures.recovered_s += attempt.recovered_s
        figures.faults += [f"{out}: still there: {orphan}" for orphan in orphans]
        floor, run = attempt.round, study.begun(out)
        if run is not None and finished(run):
            return history or History(run, study.homes)
        history = look(history, run, study)
        if struck and not fatal:
            figures.faults.append(
                f"{out}: ended with {code} of what it is to survive: {study.said(out).read_text()[-400:]}"
            )
        if not struck:
            figures.faults.append(f"{out}: ended with {code}: {study.said(out).read_text()[-400:]}")
            return None
    figures.faults.append(f"{out}: did not get done")
    return None


def look(history: History | None, run: RunFolder | None, study: Study) -> History | None:
    """The history of a run, looked at once more; None as long as there is no run."""
    if run is None:
        return None
    history = history or History(run, study.homes)
    history.look()
    return history


def judge(study: Study, out: str, history: History, expected: bytes | None, figures: Figures) -> None:
    """Hold a finished run against the adapter of the undisturbed one; without one, against its sites' updates."""
    run = history.run
    if run.sites.exists():  # killed after its last file: resuming has nothing to do but this
        code, _ = Attempt(study, out, 0).end()
        history.faults += [] if (code, run.sites.exists()) == (4, False) else ["homes of simulated sites are left"]
    adapter = run.adapter / "adapter_model.safetensors"
    if expected is None:
        found, by_hand = load_file(adapter), replayed(run, study.homes)
        same = found.keys() == by_hand.keys() and all(found[n].tobytes() == by_hand[n].tobytes() for n in found)
    else:
        same = adapter.read_bytes() == expected
    figures.completed += 1
    figures.equal += same
    figures.charges += history.settle() if all(run.ledger(site).exists() for site in SITES) else {}
    history.faults += [] if same else ["another adapter"]
    history.faults += [f"verify: {check.name}: {check.detail}" for check in verify_run(run) if not check.passed]
    figures.faults += [f"{out}: {fault}" for fault in history.faults]


def undisturbed(study: Study) -> tuple[bytes, dict[str, float]]:
    """The adapter of a run that nobody kills, and how long its stages take here, in seconds."""
    began, process = time.time(), study.start("undisturbed", None)
    assert process.wait(timeout=300) == 0, study.said("undisturbed").read_text()
    ended, run = time.time(), study.begun("undisturbed")
    assert run is not None
    times = [(datetime.fromisoformat(event["created_at"]).timestamp(), event) for event in run.events()]
    first = next(at for at, event in times if event["type"] == "status" and event["data"]["round"] == 1)
    last = next(at for at, event in times if event["type"] == "publish")
    claim = (run.privacy / "claim.json").stat().st_mtime
    pace = {
        "start": first - began,
        "round": (last - first) / study.rounds,
        "checkpoint": 0.03,
        "publish": claim - last,
        "end": ended - claim,
    }
    return (run.adapter / "adapter_model.safetensors").read_bytes(), pace


def inline_plan(chance: random.Random, rounds: int) -> list[Moment]:
    """Kills from before the run is there until after its last file, in order."""
    first, second, third = sorted(chance.sample(range(1, rounds + 1), 3))
    return [
        Moment("start", chance.random()),
        Moment("round", chance.random(), first),
        Moment("start", chance.uniform(0, 0.5)),
        Moment("round", chance.random(), second),
        Moment("checkpoint", chance.random(), third),
        Moment("publish", chance.random()),
        Moment("end", chance.random()),
    ]


def flower_plan(chance: random.Random, rounds: int) -> list[Moment]:
    """One of each kind of process, in any order, in different rounds."""
    victims = [COMMAND, *VICTIMS]
    chance.shuffle(victims)
    return [Moment("round", chance.random(), number % rounds + 1, who) for number, who in enumerate(victims)]


def series(
    study: Study, kills: int, plan_of: Plan, chance: random.Random, undone: tuple[bytes | None, Mapping[str, float]]
) -> Figures:
    """Run a job again and again until so many kills were made; `undone` is the adapter to expect, and the pace."""
    expected, pace, figures = *undone, Figures()
    for number in range(kills):
        missing = kills - figures.kills.total()
        if missing <= 0:
            break
        plan = plan_of(chance, study.rounds)
        plan = [plan[i] for i in sorted(chance.sample(range(len(plan)), min(missing, len(plan))))]
        out = f"{study.engine}-{number}"
        history = torment(study, out, plan, pace, figures)
        if history is not None:
            judge(study, out, history, expected, figures)
        sys.stderr.write(f"{out}: {figures.kills.total()} kills, {figures.equal} equal, faults {figures.faults}\n")
    return figures


def main() -> int:
    """Kill runs on one process (72 in 100), on Flower's engine (20) and under real noise (8); 0 if all was well."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--only", choices=["inline", "flower", "real"], help="one of the three parts, with its share")
    chosen = parser.parse_args()
    real, flower = chosen.kills * 8 // 100, chosen.kills * 20 // 100
    with tempfile.TemporaryDirectory(prefix="cotune-kills-") as name:
        folder = Path(name)
        os.environ |= {"COTUNE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        model = tiny_model(folder / "model")
        study, homes = write_study(folder / "seeded", model, 5), write_home_study(folder / "homes", model)
        whole, figures = undisturbed(study), Figures()
        parts = {
            "inline": (study, chosen.kills - flower - real, inline_plan, whole),
            "flower": (replace(study, engine="flower"), flower, flower_plan, whole),
            "real": (homes, real, inline_plan, (None, whole[1])),
        }
        for part, (killed, kills, plan_of, undone) in parts.items():
            chance = random.Random(f"{chosen.seed} {part}")  # noqa: S311 - when to kill is no secret
            if chosen.only in (None, part):
                figures.add(series(killed, kills, plan_of, chance, undone))
    sys.stdout.write(json.dumps(figures.to_dict(), indent=2) + "\n")
    return bool(figures.faults)


if __name__ == "__main__":
    sys.exit(main())
