"""The plain app (plain_flower/) as Flower deploys it: a SuperLink, a SuperNode a site, TLS, a process a message."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from cotune.shared.job import Job
from studies import PLAIN, plain_settings

CONNECTION = "plain"
POLL_S, ASK_S, START_S, STOP_S = 0.2, 20.0, 600.0, 20.0
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
}


@dataclass(frozen=True)
class Stock:
    """A stock federation that is up.

    Attributes:
        folder: Of its logs and of Flower's own home.
        environment: Of the `flwr` program.
        processes: SuperLink and SuperNodes.
    """

    folder: Path
    environment: Mapping[str, str]
    processes: Sequence[subprocess.Popen[bytes]]

    def rounds(self, job: Job, sites: int, rounds: int) -> tuple[list[float], str]:
        """Run the plain app with the noise of the resolved job: when each round ended, and what its server said."""
        times, config = self.folder / "times", self.folder / "run.toml"
        times.touch()
        config.write_text(tomli_w.dumps(plain_settings(job, sites, times)), encoding="utf-8")
        answer = self.flwr("run", str(PLAIN), CONNECTION, "--run-config", str(config))
        if not answer.get("success"):
            raise SystemExit(f"Flower did not accept the plain app: {answer}")
        run_id, asked = str(answer["run-id"]), time.monotonic()
        while len(ends := times.read_text().split()) < rounds + 1:  # the first is the start
            time.sleep(POLL_S)
            if time.monotonic() - asked > ASK_S:
                asked = time.monotonic()
                self._require_running(run_id)
        return [float(end) for end in ends], self.log(run_id)

    def nodes_online(self) -> int:
        """How many SuperNodes the SuperLink can reach."""
        listed = self.flwr("supernode", "list", CONNECTION)
        return sum(node.get("status") == "online" for node in listed.get("nodes", ()))

    def flwr(self, *words: str) -> dict[str, Any]:
        """Ask Flower's own program; what it answers."""
        command = ["flwr", *words, "--format", "json"]
        done = subprocess.run(command, env=dict(self.environment), capture_output=True, text=True, check=False)
        try:
            return json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            return {"said": done.stdout + done.stderr}

    def log(self, run_id: str) -> str:
        """What the run's server said."""
        command = ["flwr", "log", run_id, CONNECTION, "--show"]
        done = subprocess.run(command, env=dict(self.environment), capture_output=True, text=True, check=True)
        return done.stdout

    def _require_running(self, run_id: str) -> None:
        for process in self.processes:
            if process.poll() is not None:
                raise SystemExit(f"{process.args} ended; its words are in {self.folder}")
        listed = self.flwr("list", CONNECTION, "--run-id", run_id)
        if any(str(run["status"]).startswith("finished:failed") for run in listed.get("runs", ())):
            raise SystemExit(f"the plain app failed:\n{self.log(run_id)}")


@contextlib.contextmanager
def stock(folder: Path, tls: Path, sites: int) -> Generator[Stock]:
    """Start a stock federation on this machine, and end all of it afterwards.

    Args:
        folder: For logs and Flower's home; made.
        tls: Holds ca.crt, server.crt and server.key, of a certificate for 127.0.0.1.
        sites: One SuperNode each, with the default isolation: a fresh process for every message.
    """
    (folder / "flwr").mkdir(parents=True)
    address, ca = f"127.0.0.1:{free_port()}", tls / "ca.crt"
    connection = {"address": address, "root-certificates": str(ca)}
    config = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    (folder / "flwr" / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(folder / "flwr"), "PATH": path}
    superlink = [
        "flower-superlink", "--host", "127.0.0.1", "--port", address.split(":")[1],
        "--ssl-certfile", str(tls / "server.crt"), "--ssl-keyfile", str(tls / "server.key"),
        "--ssl-ca-certfile", str(ca), "--disable-runtime-dependency-installation",
        "--database", str(folder / "state.db"),
    ]  # fmt: skip
    commands = {"superlink": superlink} | {
        f"node-{number}": [
            "flower-supernode", "--superlink", address, "--root-certificates", str(ca),
            "--port", str(free_port()), "--node-config", f"partition-id={number} num-partitions={sites}",
        ]
        for number in range(sites)
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(_child(words, folder / name, environment)) for name, words in commands.items()]
        found = Stock(folder, environment, running)
        deadline = time.monotonic() + START_S
        while found.nodes_online() < sites:
            if time.monotonic() > deadline:
                raise SystemExit(f"not all SuperNodes came online; their words are in {folder}")
            time.sleep(1)
        yield found


@contextlib.contextmanager
def _child(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Generator[subprocess.Popen[bytes]]:
    """A process in an empty folder, so that only the bundle's code is found; ended with all that came from it."""
    folder.mkdir()
    with folder.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(words, cwd=folder, env=dict(environment), stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_S)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(said: str) -> list[int]:
    """How many sites answered in each round."""
    return [int(count) for count in re.findall(r":INFO:aggregate_train: Received (\d+) results", said)]
