"""Does every fault of the kill table to a federation of real processes, one run each, and judges what is left.

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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

if __package__ is None:  # run as a program
    sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.integration.deployed.faults import FAULTS, VICTIM, Fault
from tests.integration.deployed.federation import Federation, federation
from tests.integration.deployed.invariants import History, broken
from tests.integration.deployed.networks import why_not
from tests.integration.deployed.study import SITES, simulated_adapter, write_job, write_records
from tests.integration.killed_study import tiny_model

from cotune.shared.jobfile import load_job
from cotune.shared.model import locate
from cotune.shared.runs import RunFolder

DISKS = {VICTIM: 48, "coordinator/home/runs": 96, "coordinator/home/superlink": 96}
SLOWER = 3.0  # how much longer than on a quiet machine anything may take on this one


@dataclass(frozen=True)
class Result:
    """What came of one fault.

    Attributes:
        name: Of the fault; kind: F1 to F7.
        status: How the run ended.
        resumed: Whether it paused, and was resumed.
        rounds: That it finished.
        recovery_s: From the end of the fault to the next sign of progress.
        seconds: Of the run.
        equal: Whether its adapter is the undisturbed one.
        recharged: Rounds of sites that were charged again.
        faults: What does not hold.
    """

    name: str
    kind: str
    status: str
    resumed: bool
    rounds: int
    recovery_s: float
    seconds: float
    equal: bool
    recharged: int
    faults: tuple[str, ...]


@dataclass
class Figures:
    """All results, in numbers."""

    results: list[Result] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON."""
        recovery = sorted(result.recovery_s for result in self.results) or [0.0]
        faults = [f"{result.name}: {fault}" for result in self.results for fault in result.faults]
        return {
            "faults by kind": dict(sorted(Counter(result.kind for result in self.results).items())),
            "runs completed": f"{sum(r.status == 'succeeded' for r in self.results)}/{len(self.results)}",
            "runs that paused by name and were resumed": sum(result.resumed for result in self.results),
            "rounds": sum(result.rounds for result in self.results),
            "seconds to recover": {"p50": round(statistics.median(recovery), 1), "max": round(recovery[-1], 1)},
            "under-counts": sum("I1:" in fault for fault in faults),
            "over-counts": sum("charged again" in fault for fault in faults),
            "rounds lost in training and charged again": sum(result.recharged for result in self.results),
            "adapters equal": f"{sum(result.equal for result in self.results)}/{len(self.results)}",
            "faults": faults,
        }


def suffer(made: Federation, name: str, fault: Fault, job: Path, expected: bytes) -> Result:
    """Run the job, do the fault to it, and judge what is left."""
    began, before = time.time(), made.ledger_hashes()
    run = made.submit(job)
    fault.strike(made, run)
    struck, resumed = time.time(), False
    status = made.wait(run)
    if status == "paused":
        resumed = True
        made.coordinator.tell("resume", run.run_id)
        status = made.wait(run)
    ended = time.time()
    history = history_of(made, run, before, expected, ended - struck, fault.bound_s * SLOWER)
    charges = [count for count in history.charges().values() if count > 1]
    faults = broken(history) + ([] if fault.may_recharge or not charges else ["a round was charged again"])
    return Result(
        name=name,
        kind=fault.kind,
        status=status,
        resumed=resumed,
        rounds=sum(event["type"] == "round" for event in run.events()),
        recovery_s=recovery(run, struck, ended),
        seconds=ended - began,
        equal=history.succeeded and history.adapter.read_bytes() == expected,
        recharged=len(charges),
        faults=tuple(faults),
    )


def history_of(
    made: Federation,
    run: RunFolder,
    before: Mapping[str, Sequence[str]],
    expected: bytes | None,
    seconds: float,
    bound_s: float,
) -> History:
    """What a finished run left on the disks."""
    enrolled = [json.loads(path.read_bytes()) for path in (made.coordinator.home / "sites").glob("*.json")]
    return History(
        run=run,
        homes={name: made.sites[name].home for name in sorted(run.job().data.sites)},
        keys={site["name"]: site["public_key"] for site in enrolled},
        before=before,
        outside=[made.coordinator.home, made.coordinator.home.parent / "home-up.log"],
        expected=expected,
        seconds=seconds,
        bound_s=bound_s,
    )


def recovery(run: RunFolder, struck: float, ended: float) -> float:
    """Seconds from the end of a fault to the next round that was finished, or to the end of the run."""
    times = [
        datetime.fromisoformat(e["created_at"]).timestamp() for e in run.events() if e["type"] in ("round", "publish")
    ]
    return round(min((at for at in times if at > struck), default=ended) - struck, 1)


def first_run(made: Federation, job: Path, expected: bytes) -> list[str]:
    """The undisturbed run, which the sites' administrators approve; what does not hold of it."""
    before = made.ledger_hashes()
    run = made.submit(job)
    made.approve()
    began = time.time()
    made.wait(run)
    return broken(history_of(made, run, before, expected, time.time() - began, 300 * SLOWER))


def line_of(result: Result) -> str:
    """A result as a line of the table."""
    outcome = "paused, resumed, " * result.resumed + result.status
    marks = f"{'equal' if result.equal else 'OTHER':<6} {result.recharged} again"
    times = f"{result.recovery_s:6.1f} s to recover {result.seconds:6.0f} s in all"
    return f"{result.kind}  {result.name:<48} {outcome:<26} {marks}  {times}  {'; '.join(result.faults) or 'holds'}"


def main() -> int:
    """Do the faults; 0 if everything held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose name holds these words")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    chosen = parser.parse_args()
    if reason := why_not():
        sys.stderr.write(f"skipped: {reason}\n")
        return 0
    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="cotune-faults-") as name:
        folder = Path(name)
        os.environ["COTUNE_CACHE"] = str(folder / "cache")
        records = {site: write_records(folder / "records", site) for site in SITES}
        job = write_job(folder / "job", tiny_model(folder / "model"), records)
        expected = simulated_adapter(job)
        with federation(folder, locate(load_job(job)).sha256, disks=DISKS) as made:
            undisturbed = first_run(made, job, expected)
            sys.stdout.write(f"undisturbed: {'; '.join(undisturbed) or 'holds, adapter as simulated'}\n")
            for fault_name, fault in FAULTS.items():
                if chosen.only not in fault_name:
                    continue
                figures.results.append(suffer(made, fault_name, fault, job, expected))
                sys.stdout.write(line_of(figures.results[-1]) + "\n")
                sys.stdout.flush()
                made.await_online(SITES)
    found = figures.to_dict() | {"load average": os.getloadavg()[1], "undisturbed": undisturbed}
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    if chosen.out:
        chosen.out.write_text(json.dumps(found | {"results": [vars(r) for r in figures.results]}, indent=1) + "\n")
    return bool(found["faults"] or undisturbed)


if __name__ == "__main__":
    sys.exit(main())
