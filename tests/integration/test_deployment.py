"""A whole federation on this machine's loopback, by the documented commands alone: the adapter is the simulation's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.free_ports import free_port
from tests.integration.deployed.study import (
    CANARY_PARTS,
    DATASET,
    QUIET,
    SITES,
    leaks,
    simulated_adapter,
    write_job,
    write_records,
)

from cotune.shared.bundle import bundle_sha256
from cotune.shared.chain import read_chain
from cotune.shared.model import folder_sha256
from cotune.shared.runs import OVER, RunFolder

pytestmark = pytest.mark.slow
PATIENCE_S = 900.0


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


class Federation:
    """One coordinator and three sites, up, as their administrators have set them up.

    Args:
        folder: For all homes.
        model: The base model, which every site allows.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.ups: list[subprocess.Popen[bytes]] = []
        self.records = {site: write_records(folder / "records", site) for site in SITES}

    def environment(self, site: str | None = None) -> dict[str, str]:
        homes = {"COTUNE_FED": str(self.folder / "fed"), "COTUNE_CACHE": str(self.folder / "cache")}
        own = {"COTUNE_SITE": str(self.folder / site / "home")} if site else {}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**os.environ, **QUIET, **homes, **own, "PATH": path}

    def ask(self, *words: str, site: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["cotune", *words], env=self.environment(site), cwd=self.folder, capture_output=True, text=True, check=False
        )

    def tell(self, *words: str, site: str | None = None) -> Any:
        done = self.ask(*words, "--json", site=site)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return json.loads(done.stdout.splitlines()[-1])["data"]

    def up(self, *words: str, site: str | None = None) -> None:
        with (self.folder / f"{site or 'fed'}-up.log").open("ab") as log:
            command = ["cotune", *words]
            self.ups.append(
                subprocess.Popen(command, env=self.environment(site), cwd=self.folder, stdout=log, stderr=log)
            )

    def set_up(self) -> None:
        """The coordinator, then each site in four commands; the names of commands are those of the runbook."""
        gateway = f"127.0.0.1:{free_port()}"
        places = ["--address", gateway, "--bind", gateway, "--port", str(free_port())]
        self.tell("fed", "init", "--name", "trial", *places)
        self.up("fed", "up")
        wait_for(self._is_up, "the coordinator did not come up")
        for site in SITES:
            budget = ["--epsilon-total", "2000", "--epsilon-per-run", "100", "--delta-total", "1e-3"]
            data = ["--dataset", DATASET, "--data", str(self.records[site])]
            self.tell("site", "init", "--name", site, *data, *budget, "--simulated", site=site)
            policy = self.folder / site / "home" / "policy.toml"
            allowed = f'models = ["sha256:{folder_sha256(self.model)}"]'
            policy.write_text(policy.read_text().replace("models = []", allowed))
            request = self.folder / site / "home" / "request.json"
            self.tell("site", "join", self.tell("fed", "approve", str(request))["invite"], site=site)
            self.up("site", "up", site=site)
        online = lambda: [s for s in self.tell("fed", "sites")["sites"] if s["courier"] == "online"]  # noqa: E731
        wait_for(lambda: len(online()) == len(SITES), "not all couriers came online")

    def _is_up(self) -> bool:
        state = self.folder / "fed" / "up.json"
        children = json.loads(state.read_text())["children"] if state.exists() else {}
        return len(children) == 3 and all(child["state"] == "running" for child in children.values())

    def submit(self, job: Path, *overrides: str) -> RunFolder:
        return RunFolder(Path(self.tell("submit", str(job), *overrides, "--i-know")["path"]))

    def job_at(self, site: str, run: RunFolder) -> dict[str, Any] | None:
        sha256 = run.job().sha256()
        return next((j for j in self.tell("site", "jobs", site=site)["jobs"] if j["job_sha256"] == sha256), None)

    def approve(self, run: RunFolder) -> None:
        for site in SITES:
            wait_for(lambda site=site: self.job_at(site, run), f"the job did not come to {site}")
            self.tell("site", "approve", run.job().sha256()[:12], site=site)

    def coordinators(self) -> list[psutil.Process]:
        """Flower's processes that run our ServerApp for this federation."""
        family = psutil.Process(self.ups[0].pid).children(recursive=True)
        return [p for p in family if "flwr-serverapp" in " ".join(p.cmdline())]

    def end(self) -> None:
        family = [p for up in self.ups for p in psutil.Process(up.pid).children(recursive=True)]
        for process in self.ups:
            process.terminate()
        for process in self.ups:
            process.wait(timeout=90)
        _, alive = psutil.wait_procs(family, timeout=30)
        left = [p.cmdline() for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        for process in alive:
            process.kill()
        assert not left, "a process outlived its supervisor"


@pytest.fixture(scope="module")
def federation(tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("deployment"), tiny_causal)
    try:
        made.set_up()
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def job(federation: Federation) -> Path:
    return write_job(federation.folder / "job", federation.model, federation.records)


@pytest.fixture(scope="module")
def expected(job: Path) -> bytes:
    return simulated_adapter(job)


def adapter(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def read_since(path: Path, marked: int) -> bool:
    """Whether anybody has read a file since `mark`; the file systems of tests note the first read after a change."""
    return path.stat().st_atime_ns != marked


def mark(path: Path) -> int:
    stat = path.stat()
    os.utime(path, ns=(stat.st_mtime_ns - 10**9, stat.st_mtime_ns))
    return path.stat().st_atime_ns


def test_a_job_is_approved_at_each_site_runs_and_ends_with_the_adapter_of_the_simulation(
    federation: Federation, job: Path, expected: bytes
) -> None:
    run = federation.submit(job)
    cost = json.loads((run.path / "plan.json").read_bytes())["epsilon_by_round"][-1]
    marked = {site: mark(path) for site, path in federation.records.items()}
    for site in SITES:
        wait_for(lambda site=site: federation.job_at(site, run), "the job did not come")
        shown = federation.job_at(site, run)
        assert shown is not None
        assert (shown["state"], shown["bundle_sha256"]) == ("waiting", bundle_sha256())
        assert f"costs epsilon {cost:.3f}" in shown["cost"]
        assert shown["leaves"][0].startswith(f"{run.job().run.rounds} updates of the adapter")
    assert federation.tell("status", run.run_id)["state"] == "awaiting_approval"
    assert not any(read_since(federation.records[site], at) for site, at in marked.items()), "nobody has approved"
    federation.approve(run)
    watched = federation.ask("watch", run.run_id, "--json")
    assert watched.returncode == 0, watched.stderr
    *events, last = [json.loads(line) for line in watched.stdout.splitlines()]
    assert all(event["id"].startswith("ev-") for event in events)
    assert (last["terminal"], last["status"], last["data"]["engine"]) == (True, "ok", "deployed")
    assert all(read_since(federation.records[site], at) for site, at in marked.items()), "the mark shows reads"
    assert adapter(run) == expected
    assert federation.ask("verify", run.run_id).returncode == 0
    assert [row["state"] for row in federation.tell("ls")] == ["succeeded"]


def test_nothing_of_a_record_reached_the_coordinator(federation: Federation) -> None:
    assert leaks([federation.folder / "records"]), "the words are in the records"
    assert not leaks([federation.folder / "fed"], CANARY_PARTS)


def test_a_coordinator_killed_in_the_middle_is_started_again_and_charges_nobody_twice(
    federation: Federation, job: Path
) -> None:
    more = write_job(job.parent / "more", federation.model, federation.records, run={"rounds": 5, "name": "killed"})
    run = federation.submit(more)
    federation.approve(run)
    for number in (1, 3):
        wait_for((run.checkpoints / f"round-{number:05d}").exists, f"round {number} was not finished")
        for process in federation.coordinators():
            process.kill()
    wait_for(lambda: run.state()["status"] in OVER and (run.path / "MANIFEST.json").exists(), "the run did not end")
    assert run.state()["status"] == "succeeded", run.state()
    assert adapter(run) == simulated_adapter(more)
    for site in SITES:
        entries = read_chain((federation.folder / site / "home" / "ledger.jsonl").read_bytes())
        charged = [
            e.fields["round"] for e in entries if e.action == "budget.reserve" and e.fields["run_id"] == run.run_id
        ]
        assert charged == [1, 2, 3, 4, 5]
    assert federation.ask("verify", run.run_id).returncode == 0


def test_a_stopped_run_stays_stopped_until_it_is_resumed(federation: Federation, job: Path) -> None:
    more = write_job(job.parent / "stopped", federation.model, federation.records, run={"rounds": 4, "name": "stopped"})
    run = federation.submit(more)
    federation.approve(run)
    wait_for((run.checkpoints / "round-00001").exists, "round 1 was not finished")
    assert federation.tell("stop", run.run_id)["state"] == "cancelled"
    time.sleep(5)
    assert run.state()["status"] == "cancelled"
    watched = federation.ask("watch", run.run_id, "--json")
    last = json.loads(watched.stdout.splitlines()[-1])
    assert (watched.returncode, last["terminal"], last["error"]["code"]) == (1, True, "E-STOPPED")
    assert federation.tell("resume", run.run_id)["state"] == "queued"
    followed = federation.ask("watch", run.run_id, "--quiet")
    assert followed.returncode == 0, followed.stderr
    assert adapter(run) == simulated_adapter(more)


def test_a_job_that_a_site_denies_ends_with_the_exit_code_of_a_refusal(federation: Federation, job: Path) -> None:
    run = federation.submit(job, "run.name=denied")
    wait_for(lambda: federation.job_at("site-2", run), "the job did not come")
    federation.tell("site", "deny", run.job().sha256()[:12], "--reason", "not now", site="site-2")
    followed = federation.ask("watch", run.run_id, "--quiet")
    assert followed.returncode == 6
    assert "E-NOT-APPROVED" in followed.stderr and "site-2" in followed.stderr
