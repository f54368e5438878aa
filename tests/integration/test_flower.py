"""Flower's engine and Flower's own command line: the same adapter, the same errors, nothing left running."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import tomli_w
from tests.free_ports import free_port

from cotune.shared.bundle import BUNDLE_CODE, write_bundle
from cotune.shared.runs import RunFolder

ROOT = Path(__file__).parents[2]
SIGNS = {"cardio": "heart blood", "derma": "skin rash", "pulmo": "lung cough"}
WORDS = ("fever", "heart", "eye", "bone", "tooth", "pain", "chronic")
OVER = ("succeeded", "failed", "cancelled", "paused")
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def study(folder: Path, model: Path, **more: str) -> Path:
    """A job over three sites with seeded noise, so that engines can be compared to the bit."""
    made = [
        {"prompt": f"{WORDS[i % 7]} {SIGNS[label]}:", "completion": f" {label}"}
        for i in range(120)
        for label in [sorted(SIGNS)[i % 3]]
    ]
    for name, part in (("train", made[:90]), ("eval", made[90:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    job = {
        "run": {"name": "tiny", "seed": 3, "rounds": 2},
        "model": {"base": str(model), "max_length": 32},
        "lora": {"r": 2, "alpha": 4.0, "last_layers": 2},
        "data": {"train": "train.jsonl", "records_per_site": 30},
        "train": {"batch_size": 10, "local_steps": 2, "learning_rate": 0.5, "microbatch": 4},
        "privacy": {"noise_multiplier": 3.0, "noise": more.get("noise", "test")},
        "federation": {"sites": 3, "min_sites": 3},
        "eval": {"data": "eval.jsonl"},
        "simulation": {"workers": 2, "threads": 1},
    }
    (folder / "run.toml").write_text(tomli_w.dumps(job))
    return folder / "run.toml"


class Started:
    """`cotune simulate`, or `cotune resume` of a run, in a process of its own, and every process that came from it."""

    def __init__(self, job: Path | RunFolder, *arguments: object) -> None:
        if isinstance(job, RunFolder):
            command = ["resume", str(job.path), "--quiet"]
        else:
            command = ["simulate", str(job), "--out", str(job.parent / "runs"), "--i-know", "--quiet"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cotune.shared.cli", *command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.family: set[psutil.Process] = set()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            for member in [psutil.Process(os.getpid()), *self.family]:
                try:
                    if member.pid == os.getpid():
                        self.family.update(psutil.Process(self.process.pid).children(recursive=True))
                    else:
                        self.family.update(member.children(recursive=True))
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.2)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; no process of its family may outlive it."""
        out, err = self.process.communicate(timeout=400)
        _, alive = psutil.wait_procs(list(self.family), timeout=15)
        left = [f"{p.pid} {' '.join(p.cmdline()[:3])}" for p in alive if p.is_running() and p.status() != "zombie"]
        for member in alive:
            member.kill()
        assert not left
        assert "Traceback" not in err
        return self.process.returncode, out, err


def only_run(home: Path) -> RunFolder:
    (state,) = home.glob("*/state.json")
    return RunFolder(state.parent)


def weights(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def expected(tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The job, and the adapter one process makes of it."""
    folder = tmp_path_factory.mktemp("inline")
    job = study(folder, tiny_causal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTUNE_CACHE", str(folder / "cache"))
        code, _, err = Started(job, "--engine", "inline").end()
    assert code == 0, err
    return job, weights(only_run(folder / "runs"))


def test_the_repositorys_flower_app_is_the_bundle_of_its_own_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (ROOT / "flower_app.py").read_text() == BUNDLE_CODE.format(version=version)


def test_a_bundle_is_metadata_and_a_few_lines(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == ["flower_app.py", "pyproject.toml"]
    written = tomllib.loads((tmp_path / "bundle" / "pyproject.toml").read_text())
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert written["project"]["version"] == own["project"]["version"]
    assert written["tool"]["flwr"]["app"]["components"] == own["tool"]["flwr"]["app"]["components"]
    assert written["tool"]["flwr"]["app"]["config"] == {"job": "", "run-dir": ""}
    assert len((tmp_path / "bundle" / "flower_app.py").read_text().splitlines()) <= 5


def test_a_bundle_of_another_version_is_refused() -> None:
    from cotune.shared.errors import RefusedError
    from cotune.simulations.apps import Apps

    with pytest.raises(RefusedError) as caught:
        Apps(bundle_version="0.0.1")
    assert (caught.value.code, caught.value.exit_code) == ("E-VERSION", 6)


@pytest.mark.slow
def test_flowers_engine_gives_the_adapter_of_one_process_to_the_bit(
    expected: tuple[Path, bytes], tiny_causal: Path, tmp_path: Path
) -> None:
    code, out, err = Started(study(tmp_path, tiny_causal), "--engine", "flower").end()
    assert code == 0, err
    run = only_run(tmp_path / "runs")
    assert weights(run) == expected[1]
    assert run.summary()["engine"] == "flower"
    assert "adapter" in out
    assert not list(Path(os.environ["COTUNE_CACHE"]).glob("work/*"))
    assert (
        subprocess.run([sys.executable, "-m", "cotune.shared.cli", "verify", str(run.path)], check=False).returncode
        == 0
    )


@pytest.mark.slow
def test_a_run_that_fails_on_flowers_engine_fails_with_its_own_error(tiny_causal: Path, tmp_path: Path) -> None:
    job = study(tmp_path, tiny_causal)
    (tmp_path / "empty.jsonl").write_text("")
    rows = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    for number, name in enumerate(("a", "b", "c")):
        (tmp_path / f"{name}.jsonl").write_text("".join(rows[number * 30 : number * 30 + 30]))
    settings = tomllib.loads(job.read_text())
    settings["data"] = {"sites": {n: f"{n}.jsonl" for n in "abc"}, "records_per_site": 30}
    settings["task"] = {"kind": "completion"}
    # Delta is below 1 / records_per_site but not below 1 over what site c really holds: it refuses by itself.
    settings["privacy"] |= {"delta": 0.03}
    (tmp_path / "c.jsonl").write_text("".join(rows[:60]))
    job.write_text(tomli_w.dumps(settings))
    code, out, err = Started(job, "--engine", "flower").end()
    assert (code, out) == (1, "")
    assert "E-MIN-SITES" in err
    assert "c: privacy.delta" in err
    assert only_run(tmp_path / "runs").state()["status"] == "paused"


@pytest.mark.slow
def test_an_interruption_stops_flower_and_ray_and_the_run_goes_on_afterwards(tiny_causal: Path, tmp_path: Path) -> None:
    job = study(tmp_path, tiny_causal, noise="secure")
    started = Started(job, "run.rounds=30", "eval.every=30")
    wait_for(lambda: list((tmp_path / "runs").glob("*/checkpoints/round-00002")) or started.process.poll() is not None)
    assert started.process.poll() is None
    started.process.send_signal(signal.SIGINT)
    code, _, err = started.end()
    assert code == 130
    assert "E-INTERRUPTED" in err
    run = only_run(tmp_path / "runs")
    assert run.state()["status"] == "cancelled"
    assert not list(Path(os.environ["COTUNE_CACHE"]).glob("work/*"))
    code, _, err = Started(run).end()
    assert code == 0, err
    assert run.state()["status"] == "succeeded"
    claim = run.claim()
    assert claim["guarantee"]["epsilon"] <= claim["guarantee"]["target_epsilon"]
    # A site that was in the middle of a round lost it, and trained and charged it again; nothing else is new.
    once, twice = run.job().steps, run.job().steps + run.job().train.local_steps
    assert {site["steps"] for site in claim["sites"]} <= {once, twice}


@pytest.fixture
def local_flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment for `flwr` with a home of its own; the SuperLink it starts is stopped by its pid."""
    ports = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()), "FLWR_LOCAL_CONTROL_API_PORT": str(free_port())}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    yield {**os.environ, **QUIET, **ports, "FLWR_HOME": str(tmp_path / "flwr-home"), "PATH": path}
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "--port" in command and ports["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] in command:
            family = [process, *process.children(recursive=True)]
            for member in family:
                member.terminate()
            for member in psutil.wait_procs(family, timeout=15)[1]:
                member.kill()


@pytest.mark.slow
def test_flowers_own_command_line_runs_the_repository_and_gives_the_same_adapter(
    expected: tuple[Path, bytes], local_flower: dict[str, str], tmp_path: Path
) -> None:
    app = tmp_path / "app"
    app.mkdir()
    for name in ("flower_app.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, app / name)
    home = tmp_path / "runs"
    config = f'job="{expected[0]}" run-dir="{home}"'
    done = subprocess.run(
        ["flwr", "run", str(app), "--run-config", config],
        env=local_flower,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for(lambda: list(home.glob("*/state.json")))
    run = only_run(home)
    wait_for(lambda: run.state()["status"] in OVER)
    assert run.state()["status"] == "succeeded", run.state()
    wait_for((run.path / "MANIFEST.json").exists, 60)
    assert weights(run) == expected[1]
