"""Seconds a round of a deployed federation, beside the plain app (plain_flower/) as Flower deploys it, in one run.

python benchmarks/deployment.py [--sites 2] [--rounds 3] [--out FILE]

Both are on this machine, over TLS, with the same base model, rows, noise and local steps. Every message to the plain
app starts a process, which loads the model; cotune's agent keeps it, and the report says how often it was loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from clipping import RESULTS, machine
from cotune.client.agent_link import AgentLink
from cotune.client.courier_folder import courier_folder
from cotune.shared.job import Job
from cotune.shared.jobfile import load_job
from cotune.shared.model import locate
from cotune.shared.planning import resolve
from cotune.shared.runs import OVER, RunFolder
from simulation import watched
from stock_deployment import ENVIRONMENT, answers, free_port, stock
from studies import TASKS, write_study

TASK = "llm"
DATASET = "rows"
LOOK_S, START_S, RUN_S = 0.2, 600.0, 3600.0
BAR = 3.0


@dataclass(frozen=True)
class Party:
    """The coordinator, or a site: its home, and the variable that names it."""

    home: Path
    variable: str

    def tell(self, *words: str) -> dict[str, Any]:
        """Give a command; its answer."""
        command = [sys.executable, "-m", "cotune.shared.cli", *words, "--json"]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"cotune {' '.join(words)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return json.loads(done.stdout.strip().splitlines()[-1])["data"]

    @contextlib.contextmanager
    def up(self, kind: str) -> Generator[None]:
        """`cotune fed up` or `cotune site up`, until it is no longer needed."""
        with (self.home.parent / f"{self.home.name}.log").open("ab") as log:
            command = [sys.executable, "-m", "cotune.shared.cli", kind, "up"]
            process = subprocess.Popen(command, env=self.environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            process.terminate()
            process.wait()

    def environment(self) -> dict[str, str]:
        """What its processes are started with."""
        return {**os.environ, **ENVIRONMENT, self.variable: str(self.home)}


def main() -> None:
    """Measure both, print them, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="measured; one more is run before them")
    parser.add_argument("--out", type=Path, help="JSON file; default results/deployment-MACHINE.json")
    options = parser.parse_args()
    found = machine()
    found["versions"] |= {"flwr": version("flwr")}
    slug = re.sub(r"[^a-z0-9]+", "-", f"{found['name']} {found['cores']} cores".lower())
    out = options.out or RESULTS / f"deployment-{slug}.json"
    report: dict[str, Any] = {"machine": found, "settings": TASKS[TASK], "sites": options.sites, "load_average": []}
    with tempfile.TemporaryDirectory(prefix="cotune-benchmark-") as name:
        folder = Path(name)
        study = write_study(TASK, options.sites, options.sites, options.rounds + 1, folder)
        job = resolve(load_job(study, ()))
        report |= {"base": locate(job).name, "variants": {}}  # fetched and converted before anything is timed
        coordinator = Party(folder / "fed", "COTUNE_FED")
        ports = (free_port(), free_port())
        address = f"127.0.0.1:{ports[0]}"
        coordinator.tell(
            "fed", "init", "--name", "bench", "--address", address, "--bind", address, "--port", str(ports[1])
        )
        for variant, run in (("plain", run_plain), ("cotune", run_cotune)):
            report["load_average"].append(os.getloadavg()[0])
            report["variants"][variant] = run(job, coordinator, options.rounds, folder)
        report["load_average"].append(os.getloadavg()[0])
    plain, cotune = (report["variants"][variant] for variant in ("plain", "cotune"))
    report["times_faster"] = {of: plain[of] / cotune[of] for of in ("wall_median_s", "cpu_median_s")}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _show(report)
    if report["times_faster"]["wall_median_s"] < BAR or set(cotune["model_loads"].values()) != {1}:
        raise SystemExit(f"expected rounds at least {BAR:g} times as fast, and one load of the model a site")


def run_plain(job: Job, coordinator: Party, rounds: int, folder: Path) -> dict[str, Any]:
    """The plain app under the coordinator's own certificate."""
    sites, started = job.sites, time.time()
    with watched(os.getpid()) as watch, stock(folder / "plain", coordinator.home / "tls", sites) as plain:
        up = time.time()
        ends, said = plain.rounds(job, sites, rounds + 1)
    _require_answers(answers(said), sites, rounds)
    loads = sum(answers(said))  # each message is a process, and each process loads the model
    return figures(ends[1:], watch.samples) | {"start_s": up - started, "model_loads": {"all sites": loads}}


def run_cotune(job: Job, coordinator: Party, rounds: int, folder: Path) -> dict[str, Any]:
    """The same rows behind agents of their own."""
    started = time.time()
    with watched(os.getpid()) as watch, contextlib.ExitStack() as stack:
        stack.enter_context(coordinator.up("fed"))
        _await(lambda: is_up(coordinator), START_S, "the coordinator did not come up")
        deployed, sites = write_deployed(job, folder)
        for name, rows in sites.items():
            stack.enter_context(join(coordinator, folder / name, rows, locate(job).sha256).up("site"))
        _await(lambda: online(coordinator) >= sites.keys(), START_S, "the sites did not come online")
        up = time.time()
        run = RunFolder(coordinator.home / "runs" / coordinator.tell("submit", str(deployed))["run_id"])
        for name in sites:
            _approve(Party(folder / name, "COTUNE_SITE"), run)
        _await(lambda: run.state()["status"] in OVER, RUN_S, "the run did not end")
        if run.state()["status"] != "succeeded":
            raise SystemExit(f"the run ended: {run.state()}")
        loads = {name: AgentLink(courier_folder(folder / name) / "agent.sock").describe() for name in sites}
    events = [event for event in run.events() if event["type"] == "round"]
    _require_answers([int(event["data"]["admitted"]) for event in events], job.sites, rounds)
    ends = [datetime.fromisoformat(event["created_at"]).timestamp() for event in events]
    counted = {name: int(said["model_loads"]) for name, said in loads.items()}
    return figures(ends, watch.samples) | {"start_s": up - started, "model_loads": counted}


def write_deployed(job: Job, folder: Path) -> tuple[Path, dict[str, Path]]:
    """The study as a job over sites with a file each: its file, and the sites' files."""
    rows = Path(str(job.data.train)).read_text(encoding="utf-8").splitlines(keepends=True)
    each = int(job.data.records_per_site)
    sites: dict[str, Path] = {}
    for number in range(job.sites):
        path = folder / f"site-{number + 1}.jsonl"
        path.write_text("".join(rows[number * each : (number + 1) * each]), encoding="utf-8")
        sites[path.stem] = path
    said = tomllib.loads((folder / "run.toml").read_text(encoding="utf-8"))
    said["data"] = {"records_per_site": each, "dataset": DATASET, "sites": dict.fromkeys(sites, "site:")}
    del said["federation"]
    # What a simulation may leave to itself, real sites want said.
    said["privacy"] |= {"delta": float(job.privacy.delta)}
    path = folder / "deployed.toml"
    path.write_text(tomli_w.dumps(said), encoding="utf-8")
    return path, sites


def join(coordinator: Party, home: Path, rows: Path, model_sha256: str) -> Party:
    """A site that has joined, and allows the base model."""
    site = Party(home, "COTUNE_SITE")
    budget = ["--epsilon-total", "20", "--epsilon-per-run", "10", "--delta-total", "2e-2"]
    site.tell("site", "init", "--name", home.name, "--dataset", DATASET, "--data", str(rows), *budget)
    policy = home / "policy.toml"
    policy.write_text(policy.read_text().replace("models = []", f'models = ["sha256:{model_sha256}"]'))
    site.tell("site", "join", coordinator.tell("fed", "approve", str(home / "request.json"))["invite"])
    return site


def is_up(coordinator: Party) -> bool:
    """Whether its SuperLink answers."""
    from cotune.server.fedhome import FedHome
    from cotune.server.up import is_open

    return is_open(FedHome.open(coordinator.home))


def online(coordinator: Party) -> set[str]:
    """The sites whose couriers are there."""
    return {site["site"] for site in coordinator.tell("fed", "sites")["sites"] if site["courier"] == "online"}


def _approve(site: Party, run: RunFolder) -> None:
    def waiting() -> list[dict[str, Any]]:
        return [job for job in site.tell("site", "jobs")["jobs"] if job["state"] == "waiting"]

    _await(lambda: waiting() or run.state()["status"] in OVER, START_S, f"no job came to {site.home.name}")
    for job in waiting():
        site.tell("site", "approve", job["job_sha256"][:12])


def _await(holds: Any, patience_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(otherwise)
        time.sleep(LOOK_S)


def _require_answers(found: list[int], sites: int, rounds: int) -> None:
    """A round in which somebody failed measures something else."""
    if found != [sites] * (rounds + 1):
        raise SystemExit(f"expected {sites} answers in each of {rounds + 1} rounds, got {found}")


def figures(ends: list[float], samples: list[tuple[float, float, int, int]]) -> dict[str, Any]:
    """Time and CPU time of each round after the first."""
    times, cpu, _, _ = np.array(samples).T
    wall_s, cpu_s = np.diff(ends).tolist(), np.diff(np.interp(ends, times, cpu)).tolist()
    medians = {"wall_median_s": statistics.median(wall_s), "cpu_median_s": statistics.median(cpu_s)}
    return {"wall_s": wall_s, "cpu_s": cpu_s, **medians}


def _show(report: Mapping[str, Any]) -> None:
    for name, found in report["variants"].items():
        loads = ", ".join(f"{site}: {count}" for site, count in found["model_loads"].items())
        seconds = f"{found['wall_median_s']:7.1f} s a round  {found['cpu_median_s']:7.1f} CPU s"
        sys.stdout.write(f"{name:<8} {seconds}   loads of the model: {loads}\n")
    wall, cpu = report["times_faster"].values()
    sys.stdout.write(f"cotune's rounds are {wall:.1f} times as fast, and take {cpu:.1f} times less CPU time\n")


if __name__ == "__main__":
    main()
