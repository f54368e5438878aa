"""Seconds a round and memory of a simulation, beside the same task as a plain Flower app (plain_flower/).

python benchmarks/simulation.py [--task llm|encoder] [--sizes 10 100 1000] [--rounds 3] [--cohort 100] [--out FILE]
"""
# pyright: reportPrivateUsage=false
# Both are to be started the same way: by the functions `cotune simulate` starts Flower with.

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from clipping import RESULTS, machine
from cotune.server.control import Control
from cotune.shared.job import Job
from cotune.shared.jobfile import load_job
from cotune.shared.model import locate
from cotune.shared.planning import resolve
from cotune.shared.runs import RunFolder
from cotune.simulations import flower
from studies import PLAIN, TASKS, WORKERS, plain_settings, write_study

MANY_SITES = 1000
MOST_ROUNDS_OF_MANY = 2
POLL_S, ASK_S = 0.5, 20.0
COMPARED = ("wall_median_s", "cpu_median_s", "memory_bytes", "coordinator_bytes")
PLAIN_PARTS = ("load_cpu_s", "train_cpu_s")


@dataclass(frozen=True)
class Case:
    """One federation.

    Attributes:
        sites: How many there are, each with as many rows.
        asked: How many of them a round asks.
        rounds: Measured rounds; one more is run before them.
    """

    sites: int
    asked: int
    rounds: int


@dataclass
class Watch:
    """What a process and all that ever came from it use.

    Attributes:
        samples: Seconds since 1970, CPU seconds used until then, bytes resident in all processes and in the
            coordinator's; what processes share counts in each.
    """

    samples: list[tuple[float, float, int, int]] = field(default_factory=list)
    _used: dict[psutil.Process, float] = field(default_factory=dict)

    def sample(self, root: psutil.Process) -> None:
        """Look once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._used |= {process: self._used.get(process, 0.0) for process in (root, *root.children(recursive=True))}
        memory = coordinator = 0
        for process in self._used:
            with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():
                resident = process.memory_info().rss
                memory += resident
                self._used[process] = sum(process.cpu_times()[:2])
                if any("flwr-simulation" in part for part in process.cmdline()[:2]):  # it runs in there
                    coordinator = resident
        self.samples.append((time.time(), sum(self._used.values()), memory, coordinator))


def main() -> None:
    """Measure both at every size, print them, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="llm", help="what is trained")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000], help="numbers of sites")
    parser.add_argument("--rounds", type=int, default=3, help=f"measured; at most 2 from {MANY_SITES:,} sites up")
    parser.add_argument("--cohort", type=int, default=100, help="a round asks at most so many sites")
    parser.add_argument("--out", type=Path, help="JSON file; default results/simulation-TASK-MACHINE.json")
    options = parser.parse_args()
    found = machine()
    found["versions"] |= {package: version(package) for package in ("flwr", "ray")}
    slug = re.sub(r"[^a-z0-9]+", "-", f"{options.task} {found['name']} {found['cores']} cores".lower())
    out = options.out or RESULTS / f"simulation-{slug}.json"
    report: dict[str, Any] = {"machine": found, "task": options.task, "settings": TASKS[options.task]}
    report |= {"workers": WORKERS, "load_average": [psutil.getloadavg()[0]], "cases": []}
    with tempfile.TemporaryDirectory(prefix="cotune-benchmark-") as name:
        for sites in options.sizes:
            rounds = min(options.rounds, MOST_ROUNDS_OF_MANY) if sites >= MANY_SITES else options.rounds
            case = Case(sites, min(sites, options.cohort), rounds)
            report["cases"].append(asdict(case) | measure(case, options.task, Path(name) / str(sites)))
            report["load_average"].append(psutil.getloadavg()[0])
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _show(report["cases"])


def measure(case: Case, task: str, folder: Path) -> dict[str, Any]:
    """The base model's name, both variants' figures, and their ratios to the plain app's."""
    folder.mkdir()
    path = write_study(task, case.sites, case.asked, case.rounds + 1, folder)
    job = resolve(load_job(path, ()))
    base = locate(job)  # fetched and converted before anything is timed
    variants = {"plain": run_plain(case, job, folder), "cotune": run_cotune(case, path)}
    plain = variants["plain"]
    for found in variants.values():
        found["ratios"] = {of: found[of] / plain[of] for of in COMPARED}
        found["cpu_ms_per_site"] = 1000 * found["cpu_median_s"] / case.asked
    return {"base": base.name, "noise_multiplier": job.privacy.noise_multiplier, "variants": variants}


def run_cotune(case: Case, job: Path) -> dict[str, Any]:
    """`cotune simulate` on Flower's engine."""
    started, out = time.time(), job.parent / "runs"
    command = ["simulate", str(job), "--engine", "flower", "--out", str(out), "--quiet"]
    process = subprocess.Popen([sys.executable, "-m", "cotune.shared.cli", *command], stdout=subprocess.DEVNULL)
    with watched(process.pid) as watch:
        if process.wait():
            raise SystemExit(f"cotune simulate ended with {process.returncode}")
    [state] = out.glob("*/state.json")
    rounds = [event for event in RunFolder(state.parent).events() if event["type"] == "round"]
    _require_answers(case, [int(event["data"]["admitted"]) for event in rounds])
    return figures(started, [datetime.fromisoformat(event["created_at"]).timestamp() for event in rounds], watch)


def run_plain(case: Case, job: Job, folder: Path) -> dict[str, Any]:
    """The plain app, with the noise of the resolved job."""
    started, home = time.time(), folder / "plain"
    home.mkdir()
    times = home / "times"
    times.touch()
    port = flower._free_port()
    environment = flower.engine_environment(home, port)
    with flower._superlink(home, port, environment, home / "flower.log") as process, watched(process.pid) as watch:
        run_id = _submit(case, job, times, Control(environment))
        asked = time.monotonic()
        while len(ends := times.read_text().split()) < case.rounds + 2:  # the first is the start
            time.sleep(POLL_S)
            if process.poll() is not None:
                raise SystemExit(f"Flower's SuperLink ended: {(home / 'flower.log').read_text()}")
            if time.monotonic() - asked > ASK_S:
                asked = time.monotonic()
                _require_running(run_id, Control(environment), home)
        said = _log(run_id, Control(environment), home)
    _require_answers(case, [int(n) for n in re.findall(r":INFO:aggregate_train: Received (\d+) results", said)])
    return figures(started, [float(end) for end in ends[1:]], watch) | _parts(said)


def _parts(said: str) -> dict[str, float]:
    """CPU seconds of loading and of training in a site's call: the measured rounds' means over sites, their median."""
    found = {part: re.findall(rf"Aggregated MetricRecord: .*'{part}': ([0-9.e-]+)", said) for part in PLAIN_PARTS}
    return {part: statistics.median(map(float, values[1:])) for part, values in found.items()}


def _submit(case: Case, job: Job, times: Path, control: Control) -> str:
    engine = {"num-supernodes": case.sites, "client-resources-num-cpus": 1, "client-resources-num-gpus": 0.0}
    engine |= {"init-args-num-cpus": WORKERS, "init-args-num-gpus": 0}
    return control.run(PLAIN, plain_settings(job, case.asked, times), engine)


def _require_running(run_id: str, control: Control, home: Path) -> None:
    if control.runs().get(run_id) == "finished:failed":
        raise SystemExit(f"the plain app failed:\n{_log(run_id, control, home)}")


def _log(run_id: str, control: Control, home: Path) -> str:
    file = home / "run.log"
    control.log(run_id, file)
    return file.read_text(encoding="utf-8")


def _require_answers(case: Case, answers: Sequence[int]) -> None:
    """A round in which somebody failed measures something else."""
    if list(answers) != [case.asked] * (case.rounds + 1):
        raise SystemExit(f"expected {case.asked} answers in each of {case.rounds + 1} rounds, got {answers}")


@contextlib.contextmanager
def watched(root: int) -> Generator[Watch]:
    """Sample a process and all that comes from it, twice a second."""
    watch, over, process = Watch(), threading.Event(), psutil.Process(root)

    def look() -> None:
        while not over.wait(POLL_S):
            watch.sample(process)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def figures(started: float, ends: Sequence[float], watch: Watch) -> dict[str, Any]:
    """A run's figures until its last round has ended.

    Args:
        started: When the command was given, in seconds since 1970.
        ends: When each round ended; up to the first one processes, Ray and models are started too.
        watch: What was seen of its processes.
    """
    times, cpu, memory, coordinator = np.array(watch.samples).T
    wall_s = np.diff(ends).tolist()
    cpu_s = np.diff(np.interp(ends, times, cpu)).tolist()
    return {
        "until_first_round_s": ends[0] - started,
        "until_first_round_cpu_s": float(np.interp(ends[0], times, cpu)),
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "wall_median_s": statistics.median(wall_s),
        "cpu_median_s": statistics.median(cpu_s),
        "memory_bytes": int(memory[times <= ends[-1]].max()),
        "coordinator_bytes": int(coordinator[times <= ends[-1]].max()),
    }


def _show(cases: Sequence[dict[str, Any]]) -> None:
    titles = (
        "sites",
        "a round",
        "app",
        "s a round",
        "CPU s",
        "ms a site",
        "GB",
        "coordinator GB",
        "time",
        "CPU",
        "memory",
    )
    rows: list[tuple[str, ...]] = [titles]
    for case in cases:
        for name, found in case["variants"].items():
            ratios = [f"{found['ratios'][of]:.2f}" for of in COMPARED[:3]]
            times = [f"{found['wall_median_s']:.2f}", f"{found['cpu_median_s']:.2f}", f"{found['cpu_ms_per_site']:.0f}"]
            sizes = [f"{found[of] / 1e9:.2f}" for of in ("memory_bytes", "coordinator_bytes")]
            rows.append((f"{case['sites']:,}", f"{case['asked']:,}", name, *times, *sizes, *ratios))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        sys.stdout.write("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) + "\n")


if __name__ == "__main__":
    main()
