"""Does every fault of the kill table to a federation of real processes, a few to each run, and judges what is left.

`python tests/integration/deployed/run_faults.py` prints the table and the figures; `--only WORDS` takes those whose
name holds the words. Needs root, for machines and small disks of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

if __package__ is None:  # run as a program
    sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.integration.deployed.faults import FAULTS, VICTIM, await_round
from tests.integration.deployed.federation import OVER, Federation, federation
from tests.integration.deployed.invariants import History, broken
from tests.integration.deployed.keeping import keeping
from tests.integration.deployed.networks import why_not
from tests.integration.deployed.study import SITES, simulated_adapter, write_job, write_records
from tests.integration.killed_study import tiny_model

from cotune.shared.jobfile import load_job
from cotune.shared.model import locate
from cotune.shared.runs import RunFolder

DISKS = {VICTIM: 48, "coordinator/home/runs": 96, "coordinator/home/superlink": 96}
SLOWER = 4.0  # how much longer than on a quiet machine anything may take on this one


@dataclass(frozen=True)
class Struck:
    """A fault that was done.

    Attributes:
        name: Of the fault.
        first: The round that had begun; last: the round that the run was in when it was over.
        over: When it was over, in seconds since the epoch.
    """

    name: str
    first: int
    last: int
    over: float


@dataclass
class Figures:
    """What came of it, in numbers; `faults` has to be empty."""

    kinds: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    equal: int = 0
    recharged: int = 0
    recovery_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON."""
        seconds = sorted(self.recovery_s) or [0.0]
        completed = self.runs["succeeded"]
        return {
            "faults": self.kinds.total(),
            "faults by kind": dict(sorted(self.kinds.items())),
            "runs completed": f"{completed}/{self.runs.total() - self.runs['resumed']}",
            "of them paused by name, and resumed": self.runs["resumed"],
            "rounds": self.rounds,
            "seconds to recover": {"p50": round(statistics.median(seconds), 1), "max": round(seconds[-1], 1)},
            "under-counts": sum("I1:" in fault for fault in self.faults),
            "over-counts": sum("charged again" in fault for fault in self.faults),
            "rounds of sites lost in training and charged again": self.recharged,
            "adapters equal": f"{self.equal}/{completed}",
            "what does not hold": self.faults,
        }


def campaign(made: Federation, names: Sequence[str], job: Path, expected: bytes) -> Figures:
    """Do faults, one to each round of as many runs of the job as it takes, and judge every run."""
    left, figures = deque(names), Figures()
    while left:
        before, run = made.ledger_hashes(), made.submit(job)
        with keeping(made, run, made.folder / "kept" / run.run_id) as kept:
            struck = strike(made, run, left)
            status = made.wait(run)
            if status == "paused":
                figures.runs["resumed"] += 1
                made.coordinator.tell("resume", run.run_id)
                status = made.wait(run)
        ended = time.time()
        figures.runs[status] += 1
        recovered = {each.name: recovery(run, each.over, ended) for each in struck}
        history = history_of(made, run, before, expected, kept, struck, recovered)
        found = broken(history)
        count(figures, history, struck, recovered, found)
        made.await_online(SITES)
        if not struck or status != "succeeded":
            figures.faults += [f"not done: {name}" for name in left]
            return figures
    return figures


def strike(made: Federation, run: RunFolder, left: deque[str]) -> list[Struck]:
    """Do faults to a run, each to a round that has just begun, until none is left or the run is over."""
    done: list[Struck] = []
    while left:
        floor = done[-1].last if done else 0  # a run that goes on after its process died counts from 0 again
        number = max(floor, int(run.state()["round"])) + 1
        if number > run.job().run.rounds:
            break
        await_round(made, run, number)
        if run.state()["status"] in OVER:
            break
        name = left.popleft()
        FAULTS[name].strike(made, run, number)
        done.append(Struck(name, number, max(number, int(run.state()["round"])), time.time()))
    return done


def count(
    figures: Figures, history: History, struck: Sequence[Struck], recovered: Mapping[str, float], found: Sequence[str]
) -> None:
    """Take the results of a run into the figures, and print its lines of the table."""
    figures.rounds += sum(event["type"] == "round" for event in history.run.events())
    figures.equal += history.succeeded and history.adapter.read_bytes() == history.expected
    figures.recharged += sum(charges > 1 for charges in history.charges().values())
    figures.faults += [f"{history.run.run_id}: {fault}" for fault in found]
    for each in struck:
        kind = FAULTS[each.name].kind
        figures.kinds[kind] += 1
        figures.recovery_s.append(recovered[each.name])
        again = sum(history.charges()[VICTIM, n] > 1 for n in range(each.first, each.last + 1))
        words = f"round {each.first}, a round finished {recovered[each.name]:5.1f} s after it, {again} charged again"
        sys.stdout.write(f"{kind}  {each.name:<46} {words}\n")
    outcome = history.run.state()["status"]
    same = "adapter as simulated" if history.succeeded and not found else "; ".join(found) or "no adapter"
    sys.stdout.write(f"    run of {history.run.job().run.rounds} rounds {outcome}: {same}\n")
    sys.stdout.flush()


def history_of(
    made: Federation,
    run: RunFolder,
    before: Mapping[str, Sequence[str]],
    expected: bytes | None,
    kept: Mapping[str, Path],
    struck: Sequence[Struck] = (),
    recovered: Mapping[str, float] | None = None,
) -> History:
    """What a finished run left on the disks."""
    enrolled = [json.loads(path.read_bytes()) for path in (made.coordinator.home / "sites").glob("*.json")]
    lost = [each for each in struck if FAULTS[each.name].may_recharge]
    return History(
        run=run,
        homes={name: made.sites[name].home for name in sorted(run.job().data.sites)},
        kept=kept,
        keys={site["name"]: site["public_key"] for site in enrolled},
        before=before,
        outside=[made.coordinator.home, made.coordinator.home.parent / "home-up.log"],
        expected=expected,
        may_be_lost={(VICTIM, number) for each in lost for number in range(each.first, each.last + 1)},
        recovered={name: (s, FAULTS[name].bound_s * SLOWER) for name, s in (recovered or {}).items()},
    )


def recovery(run: RunFolder, struck: float, ended: float) -> float:
    """Seconds from the end of a fault to the next round that was finished, or to the end of the run."""
    times = [datetime.fromisoformat(e["created_at"]).timestamp() for e in run.events() if e["type"] == "round"]
    return round(min((at for at in times if at > struck), default=ended) - struck, 1)


def undisturbed(made: Federation, job: Path, expected: bytes) -> list[str]:
    """A run that nothing happens to, which the sites' administrators approve; what does not hold of it."""
    before, run = made.ledger_hashes(), made.submit(job)
    with keeping(made, run, made.folder / "kept" / run.run_id) as kept:
        made.approve()
        made.wait(run)
    return broken(history_of(made, run, before, expected, kept))


def main() -> int:
    """Do the faults; 0 if everything held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="faults whose name holds one of these words")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    chosen = parser.parse_args()
    if reason := why_not():
        sys.stderr.write(f"skipped: {reason}\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="cotune-faults-") as name:
        folder = Path(name)
        os.environ["COTUNE_CACHE"] = str(folder / "cache")
        records = {site: write_records(folder / "records", site) for site in SITES}
        job = write_job(folder / "job", tiny_model(folder / "model"), records)
        expected = simulated_adapter(job)
        with federation(folder, locate(load_job(job)).sha256, disks=DISKS) as made:
            first = undisturbed(made, job, expected)
            sys.stdout.write(f"undisturbed: {'; '.join(first) or 'adapter as simulated, all invariants hold'}\n")
            sys.stdout.flush()
            figures = campaign(
                made, [name for name in FAULTS if any(word in name for word in chosen.only)], job, expected
            )
    figures.faults = [f"undisturbed: {fault}" for fault in first] + figures.faults
    found = figures.to_dict() | {"load average": os.getloadavg()[1]}
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")
    return bool(figures.faults)


if __name__ == "__main__":
    sys.exit(main())
