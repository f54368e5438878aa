"""Peak memory and time of a coordinator's round with few sites and with many, beside Flower's FedAvg.

python benchmarks/memory.py [--only VARIANT ...] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from cotune.server.collecting import Collector, require_enough
from cotune.server.fleet import Request
from cotune.server.joining import Joiner
from cotune.server.sending import sending
from cotune.server.spool import Spool
from cotune.server.witness import Witness
from cotune.shared.methods import initial_values
from cotune.shared.runs import create_run
from rounds import Case, Stored, Variant, job_of, plan_of, stored, write_numbers

TARGET = 1.15  # peak with many sites over peak with few
FEW, MANY = 4, 64
ROBUST_FEW = 5  # median and Multi-Krum refuse a round of four
Seconds = dict[str, float]
VARIANTS = {
    "flower FedAvg": Variant(None),
    "fedavg_ab": Variant("fedavg_ab"),
    "fedavg_ab, int8": Variant("fedavg_ab", codec="int8"),
    "fedavg_ab, records": Variant("fedavg_ab", wire=True),
    "ffa": Variant("ffa"),
    "ffa, int8": Variant("ffa", codec="int8"),
    "ffa, median": Variant("ffa", "median"),
    "ffa, multi_krum": Variant("ffa", "multi_krum"),
    "product_svd": Variant("product_svd"),
}


def main() -> None:
    """Measure, print a line a case, write the figures."""
    from clipping import RESULTS, machine  # here: it loads torch, which the measured processes are to be without

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="these variants; nothing written")
    parser.add_argument("--quick", action="store_true", help="updates of 2 MiB; nothing written")
    parser.add_argument("--out", type=Path, help="JSON file; default results/memory-MACHINE.json")
    options = parser.parse_args()
    found = machine()
    found["versions"] |= {package: version(package) for package in ("flwr", "numpy", "scipy")}
    report: dict[str, Any] = {"machine": found, "load_average": [psutil.getloadavg()[0]], "variants": {}}
    with tempfile.TemporaryDirectory(prefix="cotune-benchmark-") as name:
        for title in options.only or VARIANTS:
            case = Case(VARIANTS[title], FEW if VARIANTS[title].robust == "none" else ROBUST_FEW)
            if options.quick:
                case = replace(case, modules=16, width=1024, numbers=2**19)
            both = [in_own_process(one, Path(name)) for one in (case, replace(case, sites=MANY))]
            report["variants"][title] = asdict(case.variant) | compared(*both)
            report["load_average"].append(psutil.getloadavg()[0])
            _show(title, report["variants"][title])
    if not options.quick:
        missed = [title for title, of in report["variants"].items() if of["rule"] and of["ratio"] > TARGET]
        sys.stdout.write(
            f"target: cotune's ratio {TARGET:.2f}: {'MISSED by ' + '; '.join(missed) if missed else 'met'}\n"
        )
    slug = re.sub(r"[^a-z0-9]+", "-", f"{found['name']} {found['cores']} cores".lower())
    out = options.out or (None if options.quick or options.only else RESULTS / f"memory-{slug}.json")
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def in_own_process(case: Case, folder: Path) -> dict[str, float]:
    """Write the sites' numbers, then measure the round in a process that has done nothing else."""
    os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        processes.submit(write_numbers, case, folder).result()
        return processes.submit(measure, case, folder).result()


def measure(case: Case, folder: Path) -> dict[str, float]:
    """Bytes resident before the round and at its peak, and seconds of it."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    tiny = replace(case, sites=ROBUST_FEW, modules=2, width=64, numbers=2**12)
    write_numbers(tiny, folder)
    work = _cotune if case.variant.rule else _flower
    work(tiny, folder)  # loads whatever code a round loads
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    before, seconds = _resident("VmRSS"), work(case, folder)
    return {"before_bytes": before, "peak_bytes": _resident("VmHWM"), **seconds}


def _cotune(case: Case, folder: Path) -> Seconds:
    """What `Coordinator` does in a round, but for evaluation and checkpoint."""
    job, layout = job_of(case), case.layout
    run = create_run(folder / "runs", job, b"")
    state = initial_values(layout, job.run.seed)
    fleet = Stored(stored(case, folder), case.variant.wire)
    sent = sending(job, layout, state, case.rank, 1)
    requests = {site: Request(plan_of(job, run.run_id, site, sent.sha256), sent.payload) for site in fleet.sites()}
    clocks = [_clock()]
    with Spool(run.path / ".spool", {case.rank: sent.up}, {case.rank: sent.arrays}, {}) as spool:
        sizes = dict.fromkeys(requests, sent.up.size)
        found = Collector(run, requests, sizes, Witness(run.privacy / "heads.json"), spool).collect(fleet, case.sites)
        require_enough(found, case.sites, 1, run.run_id)
        clocks.append(_clock())
        Joiner(job, layout).join(state, {}, spool, 1)
        clocks.append(_clock())
    return _between(clocks)


def _flower(case: Case, folder: Path) -> Seconds:
    """Flower's FedAvg on the list of all replies, which is what a grid gives it."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # no message can be made without
    clocks, replies = [_clock()], list[Message]()
    for path in sorted(stored(case, folder).iterdir()):
        arrays = case.layout.unflatten(np.fromfile(path, dtype=np.float32))
        records = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        content = RecordDict({"arrays": records, "metrics": MetricRecord({"num-examples": 1000})})
        replies.append(Message(content, dst_node_id=1, message_type=MessageType.TRAIN))
    clocks.append(_clock())
    FedAvg().aggregate_train(1, replies)
    return _between([*clocks, _clock()])


def _clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _between(clocks: Sequence[tuple[float, float]]) -> Seconds:
    (start, start_cpu), (middle, middle_cpu), (end, end_cpu) = clocks
    return {
        "collect_wall_s": middle - start,
        "collect_cpu_s": middle_cpu - start_cpu,
        "join_wall_s": end - middle,
        "join_cpu_s": end_cpu - middle_cpu,
    }


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def compared(few: Mapping[str, float], many: Mapping[str, float]) -> dict[str, Any]:
    """Both rounds' figures and the ratio of their peaks: of the process, and of what the round added to it."""
    added = [found["peak_bytes"] - found["before_bytes"] for found in (few, many)]
    return {
        "few": dict(few),
        "many": dict(many),
        "ratio": many["peak_bytes"] / few["peak_bytes"],
        "ratio_of_round": added[1] / added[0],
    }


def _show(title: str, found: Mapping[str, Any]) -> None:
    few, many = found["few"], found["many"]
    peaks = " -> ".join(f"{side['peak_bytes'] / 2**20:.0f}" for side in (few, many))
    own = " -> ".join(f"{(side['peak_bytes'] - side['before_bytes']) / 2**20:.0f}" for side in (few, many))
    sys.stdout.write(
        f"{title:<20} {peaks} MiB ({found['ratio']:.2f}), of the round {own} MiB ({found['ratio_of_round']:.2f});"
        f" CPU collect {many['collect_cpu_s']:.1f} s, join {many['join_cpu_s']:.1f} s\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
