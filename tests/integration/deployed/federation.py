"""A federation over machines of its own, started with the documented commands and with nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tests.integration.deployed.networks import Machine, machines
from tests.integration.deployed.study import DATASET, QUIET, SITES, write_records
from tests.integration.deployed.wire import Wire, wire

from cotune.client.courier_folder import courier_folder
from cotune.shared.chain import read_chain, read_torn_chain
from cotune.shared.runs import RunFolder

PORT = 8443
NAME = "trial"
PATIENCE_S = 900.0
LOOK_S = 0.2
JOB_ENTRIES = ("received", "approved")
OVER = ("succeeded", "failed", "cancelled", "paused")
FAST = {"poll_s": "0.2", "heartbeat_s": "10"}  # settings of courier.toml: a lease is two heartbeats
VICTIMS = {
    "fed up": "fed up",
    "superlink": "flower-superlink",
    "superexec": "flower-superexec",
    "coordinator": "flwr-serverapp",
    "gateway": "cotune.server.gateway",
    "site up": "site up",
    "agent": "cotune.client.agent",
    "courier": "cotune.client.courier_process",
}


class Refused(Exception):
    """A command that ended with another code than 0."""

    def __init__(self, words: Sequence[str], code: int, said: str) -> None:
        super().__init__(f"cotune {' '.join(words)} ended with {code}: {said}")
        self.code, self.said = code, said


@dataclass(frozen=True)
class Party:
    """A machine, and whose it is.

    Attributes:
        machine: Where it runs.
        home: Of the coordinator, or of the site.
        kind: "fed" or "site".
    """

    machine: Machine
    home: Path
    kind: str

    @property
    def environment(self) -> dict[str, str]:
        """What its processes are started with: its home, and quiet."""
        own = {f"COTUNE_{self.kind.upper()}": str(self.home), "COTUNE_CACHE": str(self.home.parent / "cache")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**os.environ, **QUIET, **own, "PATH": path}

    def tell(self, *words: str) -> dict[str, Any]:
        """Give a command; its answer.

        Raises:
            Refused: It ended with another code than 0.
        """
        command = self.machine.command("cotune", *words, "--json")
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise Refused(words, done.returncode, done.stdout + done.stderr)
        return json.loads(done.stdout.strip().splitlines()[-1])["data"]

    def let_in(self, site: Party, patience_s: float = PATIENCE_S) -> str:
        """A coordinator's `cotune fed approve`, again while its SuperLink starts; the invitation."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return self.tell("fed", "approve", str(site.home / "request.json"))["invite"]
            except Refused as refused:
                if "E-SUPERLINK" not in refused.said or time.monotonic() > deadline:
                    raise
            time.sleep(LOOK_S)

    def up(self) -> subprocess.Popen[Any]:
        """`cotune fed up` or `cotune site up`, as a process of its own."""
        log = self.home.parent / f"{self.home.name}-up.log"
        return self.machine.start(["cotune", self.kind, "up"], log, self.environment)

    def victims(self, who: str) -> list[psutil.Process]:
        """The processes of a kind that run on this machine; not those that only watch over one."""
        found: list[psutil.Process] = []
        for process in running_in(self.machine):
            with contextlib.suppress(psutil.NoSuchProcess):
                line = " ".join(process.cmdline())
                if VICTIMS[who] in line and "shared.tether" not in line:
                    found.append(process)
        return found

    def log(self) -> str:
        """The end of what its processes said."""
        logs = [self.home.parent / f"{self.home.name}-up.log", *sorted(self.home.glob("logs/*.log"))]
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs if log.exists())


def running_in(machine: Machine) -> Iterator[psutil.Process]:
    """The processes of a machine."""
    listed = subprocess.run(["ip", "netns", "pids", machine.namespace], capture_output=True, text=True, check=False)
    for pid in listed.stdout.split():
        with contextlib.suppress(psutil.NoSuchProcess):
            yield psutil.Process(int(pid))


@dataclass
class Federation:
    """A federation that is up.

    Attributes:
        folder: Of everything.
        coordinator: With the gateway behind `relay`.
        sites: By name.
        relay: The line between sites and coordinator.
        others: Machines that are nobody's yet, by name.
        model_sha256: The base model that every site allows.
        ups: What keeps each party up, by machine name.
    """

    folder: Path
    coordinator: Party
    sites: dict[str, Party]
    relay: Wire
    others: dict[str, Machine]
    model_sha256: str
    ups: dict[str, subprocess.Popen[Any]] = field(default_factory=dict)

    def run_folder(self, run_id: str) -> RunFolder:
        """A run's folder at the coordinator."""
        return RunFolder(self.coordinator.home / "runs" / run_id)

    def up(self, party: Party) -> None:
        """Bring a party up, or up again."""
        self.ups[party.machine.name] = party.up()

    def join(self, name: str, records: Path, **budget: str) -> Party:
        """A site from nothing to its place in the federation, with the commands of the runbook."""
        site = Party(self.others[name], self.folder / name / "home", "site")
        site.home.parent.mkdir(parents=True, exist_ok=True)
        options = {"epsilon-total": "2000", "epsilon-per-run": "100", "delta-total": "1e-3", **budget}
        chosen = [word for option, value in options.items() for word in (f"--{option}", value)]
        what = ["--name", name, "--dataset", DATASET, "--data", str(records), "--simulated"]
        site.tell("site", "init", *what, "--model", f"sha256:{self.model_sha256}", *chosen)
        site.tell("site", "join", self.coordinator.let_in(site))
        self.sites[name] = site
        return site

    def submit(self, job: Path) -> RunFolder:
        """`cotune submit`; the run's folder."""
        return self.run_folder(self.coordinator.tell("submit", str(job), "--i-know")["run_id"])

    def approve(self, sites: Collection[Party] = (), patience_s: float = PATIENCE_S) -> None:
        """The administrators of sites, of all if none is named, say yes to the job that waits, once it is there."""
        for site in sites or self.sites.values():
            await_until(lambda site=site: _has_come(site), "no job came to be approved", patience_s, self)
            for job in _waiting(site):
                site.tell("site", "approve", job["job_sha256"][:12])

    def wait(self, run: RunFolder, patience_s: float = PATIENCE_S) -> str:
        """Wait until a run is over; its status."""

        def is_over() -> bool:
            status = run.state()["status"]
            return status in OVER and (status != "succeeded" or (run.path / "MANIFEST.json").exists())

        await_until(is_over, f"{run.run_id} did not end", patience_s, self)
        return run.state()["status"]

    def await_online(self, names: Sequence[str], patience_s: float = PATIENCE_S) -> None:
        """Wait until the couriers of these sites say that the coordinator knows them."""
        couriers = [courier_folder(self.sites[name].home) / NAME / "courier.json" for name in names]

        def are_online() -> bool:
            return all(path.exists() and json.loads(path.read_bytes())["state"] == "online" for path in couriers)

        await_until(are_online, f"not all of {names} came online", patience_s, self)

    def ledger_hashes(self) -> dict[str, list[str]]:
        """Each site's ledger as it is now."""
        ledgers = {name: site.home / "ledger.jsonl" for name, site in self.sites.items()}
        return {name: [e.sha256 for e in read_chain(path.read_bytes())] for name, path in ledgers.items()}

    def logs(self) -> str:
        """The ends of all logs, for whoever looks into a failure."""
        return "\n".join(f"#### {p.machine.name}\n{p.log()}" for p in (self.coordinator, *self.sites.values()))


def _has_come(site: Party) -> bool:
    """Whether a job came that nobody decided on; as the file says, which costs less than to ask again and again."""
    entries, _ = read_torn_chain((site.home / "ledger.jsonl").read_bytes(), None, 0)
    of_jobs = {kind: {e.fields["job_sha256"] for e in entries if e.action == f"job.{kind}"} for kind in JOB_ENTRIES}
    return bool(of_jobs["received"] - of_jobs["approved"])


def _waiting(site: Party) -> list[dict[str, Any]]:
    return [job for job in site.tell("site", "jobs")["jobs"] if job["state"] == "waiting"]


def await_until(holds: Callable[[], object], otherwise: str, patience_s: float, told: Federation | None) -> None:
    """Wait until something holds.

    Raises:
        TimeoutError: It did not come to that.
    """
    deadline = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{otherwise} within {patience_s:.0f} s\n{told.logs() if told else ''}")
        time.sleep(LOOK_S)


@contextlib.contextmanager
def small_disk(place: Path, mib: int) -> Generator[None]:
    """A file system of its own, so that it can be filled; it holds what the folder held."""
    place.mkdir(parents=True, exist_ok=True)
    options = f"size={mib}m,mode=0700"
    held = {file.name: file.read_bytes() for file in place.iterdir()}
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True, capture_output=True)
    try:
        for name, content in held.items():
            (place / name).write_bytes(content)
            (place / name).chmod(0o600)
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


@contextlib.contextmanager
def federation(
    folder: Path,
    model_sha256: str,
    sites: Sequence[str] = SITES,
    spare: Sequence[str] = (),
    record: Path | None = None,
    disks: Mapping[str, int] | None = None,
    records_of: Callable[[Path, str], Path] = write_records,
    **budget: str,
) -> Generator[Federation]:
    """A coordinator, a line in front of it and sites that joined it, all up; ended afterwards, whatever happened.

    Args:
        folder: For all homes.
        model_sha256: The base model that the sites' administrators allow.
        sites: Their names; each has a machine.
        spare: More machines.
        record: A folder for all that passes between sites and gateway, in clear.
        disks: Folders below `folder` that are small disks, and their size in MiB.
        records_of: Writes a site's records into a folder.
        budget: As of `Federation.join`.
    """
    names = ["coordinator", "relay", *sites, *spare]
    disks = disks or {}
    with machines(names) as made, contextlib.ExitStack() as mounted:
        coordinator = Party(made["coordinator"], folder / "coordinator" / "home", "fed")
        coordinator.home.parent.mkdir(parents=True)
        public = f"{made['relay'].address}:{PORT}"
        coordinator.tell("fed", "init", "--name", NAME, "--address", public)
        for place, mib in disks.items():
            mounted.enter_context(small_disk(folder / place, mib))
        tls = coordinator.home / "tls"
        ends = [tls / "server.crt", tls / "server.key", tls / "ca.crt", record] if record else []
        behind = f"{made['coordinator'].address}:{PORT}"
        with wire(made["relay"], public, behind, ends) as relay:
            others = {name: made[name] for name in (*sites, *spare)}
            made_up = Federation(folder, coordinator, {}, relay, others, model_sha256)
            try:
                made_up.up(coordinator)
                for name in sites:
                    made_up.up(speed_up(made_up.join(name, records_of(folder / "records", name), **budget)))
                made_up.await_online(sites)
                yield made_up
            finally:
                end(made_up)


def speed_up(site: Party, settings: Mapping[str, str] = FAST) -> Party:
    """Set a site's courier to short intervals, as its administrator may."""
    path = courier_folder(site.home) / NAME / "courier.toml"
    kept = [line for line in path.read_text().splitlines() if line.partition(" ")[0] not in settings]
    path.write_text("\n".join([*kept, *(f"{name} = {value}" for name, value in settings.items())]) + "\n")
    return site


def end(made: Federation) -> None:
    """Stop every party as a service manager would, then whatever is left."""
    for process in made.ups.values():
        process.terminate()
    for process in made.ups.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
    left = [p for party in (made.coordinator, *made.sites.values()) for p in running_in(party.machine)]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in made.ups.values():
        process.wait(timeout=10)
