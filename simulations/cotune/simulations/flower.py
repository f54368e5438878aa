"""Flower's simulation engine: a SuperLink of our own, from an empty folder on a free port, stopped afterwards."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import tomli_w

from cotune.server.control import CONNECTION, Control
from cotune.shared.bundle import write_bundle
from cotune.shared.errors import ConnectionFailed, JobError, RunFailed
from cotune.shared.runs import RunFolder
from cotune.simulations.scenario import site_names

START_TIMEOUT_S = 120.0
POLL_S = 0.5
ASK_FLOWER_S = 60.0
STOP_S = 20.0
NODES_PER_WORKER = 4
PUBLISH_TIMEOUT_S = 60.0
OVER = ("succeeded", "failed", "cancelled", "paused")


def run_on_flower(run: RunFolder) -> None:
    """Run a prepared run on Flower's simulation engine and wait for its end.

    Raises:
        RunFailed: Flower ended the run without our coordinator having said how.
        ConnectionFailed: The SuperLink did not start, or the run was not accepted.
    """
    with tempfile.TemporaryDirectory(prefix="cotune-flower-") as name:
        home = Path(name)
        port = _free_port()
        environment = engine_environment(home, port)
        log = run.path / "env" / "flower.log"
        with _superlink(home, port, environment, log) as superlink:
            run_id = _submit(run, home, environment)
            _wait(run, superlink, run_id, environment)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def engine_environment(home: Path, port: int) -> dict[str, str]:
    """The environment of Flower's processes, whose SuperLink listens on this port; makes Flower's folder in home."""
    flower_home = home / "flwr"
    flower_home.mkdir()
    config = {"superlink": {"default": CONNECTION, CONNECTION: {"address": f"127.0.0.1:{port}", "insecure": True}}}
    (flower_home / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    return {
        **os.environ,
        "FLWR_HOME": str(flower_home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": os.environ.get("RAY_ADDRESS") or "local",  # unsaid, Ray joins any cluster it finds here
        "RAY_memory_monitor_refresh_ms": "0",  # it would kill couriers, which hold nothing, for what workers hold
        "OPENBLAS_NUM_THREADS": "1",  # its threads, when Ray forks beside them, are waited for without end
        "MALLOC_MMAP_THRESHOLD_": "1048576",  # memory of large arrays goes back to the system at once
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_COLOR": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


@contextlib.contextmanager
def _superlink(home: Path, port: int, environment: dict[str, str], log: Path) -> Generator[subprocess.Popen[bytes]]:
    """A SuperLink, started in an empty folder so that only the bundle's code is found.

    It and all it starts end with this process, however that dies: the tether holds our end of a pipe.
    """
    empty = home / "empty"
    empty.mkdir()
    command = [
        sys.executable, "-m", "cotune.shared.tether",
        "flower-superlink", "--insecure", "--simulation", "--disable-runtime-dependency-installation",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=empty,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _await_health(process, port, log)
            yield process
        finally:
            assert process.stdin is not None  # noqa: S101 - made with a pipe
            process.stdin.close()
            process.wait(timeout=STOP_S)


def _await_health(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    health = f"http://127.0.0.1:{port}/health"
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(URLError, ConnectionError, TimeoutError), urlopen(health, timeout=5):
            return
        time.sleep(POLL_S)
    raise ConnectionFailed("E-SUPERLINK", f"Flower's SuperLink did not start on port {port}; its words are in {log}")


def _submit(run: RunFolder, home: Path, environment: dict[str, str]) -> str:
    job = run.job()
    app = home / "cotune"
    write_bundle(app)
    # Sites are spread over few nodes: each node is a thread's worth of bookkeeping in Flower, a site needs none.
    nodes = min(len(site_names(job)), NODES_PER_WORKER * int(job.simulation.workers))
    engine = {"num-supernodes": nodes, "client-resources-num-cpus": 1, "client-resources-num-gpus": 0.0}
    if environment["RAY_ADDRESS"] == "local":  # a cluster that is there already has a size of its own
        engine |= {"init-args-num-cpus": int(job.simulation.workers), "init-args-num-gpus": 0}
    return Control(environment).run(app, {"run-dir": str(run.path)}, engine)


def _wait(run: RunFolder, superlink: subprocess.Popen[bytes], run_id: str, environment: dict[str, str]) -> None:
    """Wait for our own coordinator's word; Flower is asked now and then whether it still runs at all."""
    asked = time.monotonic()
    while run.state()["status"] not in OVER:
        time.sleep(POLL_S)
        if superlink.poll() is not None:
            raise RunFailed("E-FLOWER", "Flower's SuperLink ended", hint=f"see {run.path}/env/flower.log")
        if _was_left(run):  # Flower itself would notice after a minute
            _keep_log(run, run_id, environment)
            raise RunFailed("E-FLOWER", "the process of the coordinator died", hint=f"cotune resume {run.run_id}")
        if time.monotonic() - asked > ASK_FLOWER_S:
            asked = time.monotonic()
            if _is_finished(run_id, environment) and run.state()["status"] not in OVER:
                _keep_log(run, run_id, environment)
                raise RunFailed(
                    "E-FLOWER", "Flower ended the run without a result", hint=f"see {run.path}/env/flower.log"
                )
    deadline = time.monotonic() + PUBLISH_TIMEOUT_S
    # The manifest is the last thing a successful run writes, after it has said so.
    while run.state()["status"] == "succeeded" and not (run.path / "MANIFEST.json").exists():
        if time.monotonic() > deadline:
            raise RunFailed("E-FLOWER", "the run succeeded but did not finish its folder", hint="cotune verify RUN")
        time.sleep(POLL_S)


def _was_left(run: RunFolder) -> bool:
    """Whether a run is under way and nobody holds it: its coordinator does as long as it lives."""
    if run.state()["status"] != "running":
        return False
    try:
        with run.held():
            return run.state()["status"] == "running"
    except JobError:
        return False


def _is_finished(run_id: str, environment: dict[str, str]) -> bool:
    try:
        return Control(environment).runs().get(run_id, "").startswith("finished")
    except ConnectionFailed:  # it may be busy; it is asked again
        return False


def _keep_log(run: RunFolder, run_id: str, environment: dict[str, str]) -> None:
    """Append what Flower's processes said, which the SuperLink keeps only while it runs."""
    Control(environment).log(run_id, run.path / "env" / "flower.log")
