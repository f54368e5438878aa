"""The run folder: everything a run leaves behind, readable while it runs and after.

run.toml resolved.toml plan.json state.json summary.json events.jsonl metrics.jsonl metrics.csv MANIFEST.json
checkpoints/round-00005/   the two newest, each a plain PEFT folder; checkpoints.jsonl: the hash of each
adapter/                   the result, a plain PEFT folder with a filled model card
personal/SITE/             such a folder for each site, by rules that give each an adapter of its own
privacy/                   claim.json accountant.json heads.json statement.txt ledgers/SITE.jsonl
                           claim.schema.json allowed_signers signatures/NAME.sig
sites/                     homes of simulated sites, until the run has ended
inputs/SHA256.jsonl        a deployed run's public rows, which its job names by their hash
attack/canaries.jsonl      what a simulation planted, with the coins; attack/results.json what attacks found
report/index.html          env/hardware.json env/lock.txt env/footprint.json bias.json
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import platform
import secrets
import time
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

from cotune.shared.errors import CotuneError, JobError, RunFailed
from cotune.shared.files import append_line, file_sha256, read_lines, storage_errors, write_atomic, write_json
from cotune.shared.job import Job
from cotune.shared.jobfile import dump_toml, load_job
from cotune.shared.sections import CONTENT

Engine = Literal["flower", "inline", "deployed"]
Status = Literal["queued", "awaiting_approval", "running", "paused", "succeeded", "failed", "cancelled"]
BROKEN = "E-ATTACK-BOUND"  # the error of a run that gave away more than it claims, whenever that is found out
OVER: tuple[Status, ...] = ("paused", "succeeded", "failed", "cancelled")
METRIC_COLUMNS = (
    "round", "site", "valid_loss", "accuracy", "accuracy_low", "accuracy_high", "accuracy_gap", "examples",
    "epsilon", "update_norm", "train_loss", "bytes_up", "bytes_down", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """A run's folder on disk and the only code that knows its layout."""

    path: Path

    @property
    def run_id(self) -> str:
        """Date, random part and name; a prefix that is unique is enough on the command line."""
        return self.path.name

    @property
    def adapter(self) -> Path:
        """The final adapter: a plain PEFT folder."""
        return self.path / "adapter"

    @property
    def personal(self) -> Path:
        """Adapters of single sites, each a plain PEFT folder; there only by rules that make such."""
        return self.path / "personal"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints by round."""
        return self.path / "checkpoints"

    @property
    def privacy(self) -> Path:
        """Claim, accountant's events, statement."""
        return self.path / "privacy"

    @property
    def sites(self) -> Path:
        """Homes of simulated sites, with their keys; gone once the run has succeeded."""
        return self.path / "sites"

    @property
    def inputs(self) -> Path:
        """Public rows of a deployed run, each file named by its SHA-256."""
        return self.path / "inputs"

    @property
    def attack(self) -> Path:
        """What was planted among the records, and what attacks on the run found."""
        return self.path / "attack"

    def ledger(self, site: str) -> Path:
        """A site's ledger as it was when the run ended."""
        return self.privacy / "ledgers" / f"{site}.jsonl"

    def job(self) -> Job:
        """The resolved job."""
        return load_job(self.path / "resolved.toml")

    def local_job(self) -> Job:
        """The job with this folder's own files where the job sites know says only what is in them."""
        job = self.job()

        def here(name: str | None) -> str | None:
            return str(self.input(name.removeprefix(CONTENT))) if name and name.startswith(CONTENT) else name

        return job.replace(eval={"data": here(job.eval.data)}, aggregation={"root": here(job.aggregation.root)})

    def input(self, sha256: str) -> Path:
        """The file of public rows with this hash."""
        return self.inputs / f"{sha256}.jsonl"

    def emit(self, kind: str, message: str, level: str = "info", /, **data: object) -> None:
        """Append one event. Data must be public: no text, no record id, no private count."""
        append_line(
            self.path / "events.jsonl",
            {
                "id": f"ev-{secrets.token_hex(6)}",
                "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "level": level,
                "type": kind,
                "message": message,
                "data": data,
            },
        )

    @contextlib.contextmanager
    def held(self, patience_s: float = 0.0) -> Generator[None]:
        """Hold the run: two processes that continue one run would charge sites for less than they release.

        Args:
            patience_s: Seconds to wait for another process to let go.

        Raises:
            JobError: Another process holds it.
        """
        deadline = time.monotonic() + patience_s
        with (self.path / "events.jsonl").open("rb") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        what = f"{self.run_id} is being run by another process"
                        raise JobError("E-RUN-HELD", what, hint="wait for it, or end it") from None
                    time.sleep(0.2)
            yield

    def set_engine(self, engine: Engine) -> None:
        """Note on which engine the run is, for when it is resumed."""
        write_json(self.path / "env" / "engine.json", {"engine": engine})

    def engine(self) -> Engine:
        """The engine the run was started on; Flower's if it never came to that."""
        path = self.path / "env" / "engine.json"
        said = _read_json(path).get("engine") if path.exists() else None
        return next((engine for engine in get_args(Engine) if engine == said), "flower")

    def ask_to_stop(self) -> None:
        """Ask whoever runs it to stop; it stays asked until the run is resumed."""
        write_json(self.path / "env" / "stop.json", {"stop": True})

    def forget_stop(self) -> None:
        """Let it run again."""
        (self.path / "env" / "stop.json").unlink(missing_ok=True)

    def is_asked_to_stop(self) -> bool:
        """Whether somebody wants it to stop."""
        return (self.path / "env" / "stop.json").exists()

    def require_wanted(self) -> None:
        """End here if somebody wants it to stop.

        Raises:
            RunFailed: E-STOPPED.
        """
        if self.is_asked_to_stop():
            raise RunFailed("E-STOPPED", f"{self.run_id} was stopped", hint=f"cotune resume {self.run_id}")

    def is_held(self) -> bool:
        """Whether a living process runs it."""
        try:
            with self.held():
                return False
        except JobError:
            return True

    def events(self) -> list[dict[str, Any]]:
        """All events so far, oldest first."""
        return read_lines(self.path / "events.jsonl")

    def record_metrics(self, **row: object) -> None:
        """Append one row of public metrics; see `METRIC_COLUMNS`."""
        unknown = row.keys() - set(METRIC_COLUMNS)
        if unknown:
            raise ValueError(f"unknown metric columns {sorted(unknown)}; known: {METRIC_COLUMNS}")
        append_line(self.path / "metrics.jsonl", row)

    def forget_metrics_after(self, round_number: int) -> None:
        """Drop rows of later rounds: a run that goes on takes those again."""
        rows = [row for row in self.metrics() if row["round"] <= round_number]
        write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    def metrics(self) -> list[dict[str, Any]]:
        """All metric rows so far. Rows of the whole federation have no `site`."""
        return read_lines(self.path / "metrics.jsonl")

    def set_state(self, status: Status, round_number: int, error: CotuneError | None = None) -> None:
        """Publish the run's status atomically and as an event."""
        state = {
            "status": status,
            "round": round_number,
            "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "error": {**error.to_dict(), "exit_code": error.exit_code} if error else None,
        }
        write_json(self.path / "state.json", state)
        level = "error" if status == "failed" else "info"
        self.emit("status", f"run {status}" + (f": {error.message}" if error else ""), level, **state)

    def state(self) -> dict[str, Any]:
        """The last published status: status, round, updated_at, error."""
        return _read_json(self.path / "state.json")

    def summary(self) -> dict[str, Any]:
        """The run's result in figures; see `server.coordinator`."""
        return _read_json(self.path / "summary.json")

    def claim(self) -> dict[str, Any]:
        """The privacy claim."""
        return _read_json(self.privacy / "claim.json")

    def write_metrics_csv(self) -> None:
        """Write metrics.csv from metrics.jsonl."""
        buffer = io.StringIO()
        writer: csv.DictWriter[str] = csv.DictWriter(buffer, METRIC_COLUMNS)
        writer.writeheader()
        writer.writerows(self.metrics())
        write_atomic(self.path / "metrics.csv", buffer.getvalue().encode())

    def files(self) -> dict[str, Path]:
        """The run's files by relative name, in order: all but the manifest, the engine's log and sites' homes."""
        files = sorted(p for p in self.path.rglob("*") if p.is_file() and p.suffix != ".log")
        files = [path for path in files if self.sites not in path.parents]
        return {str(p.relative_to(self.path)): p for p in files if p.name != "MANIFEST.json"}

    def write_manifest(self) -> None:
        """Write the SHA-256 of every file of the run, in order of names."""
        write_json(self.path / "MANIFEST.json", {name: file_sha256(path) for name, path in self.files().items()})

    def renew_manifest(self, *files: Path) -> None:
        """Write the hashes of some files of the run anew, and no other's: what was changed elsewhere still shows."""
        path = self.path / "MANIFEST.json"
        if path.exists():
            hashes = _read_json(path) | {str(file.relative_to(self.path)): file_sha256(file) for file in files}
            write_json(path, dict(sorted(hashes.items())))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError("E-RUN-FILE", f"{path}: cannot be read ({error})", hint="cotune simulate run.toml") from None


def create_run(out: Path, job: Job, source: bytes) -> RunFolder:
    """Make a new run folder holding the job as given and as resolved.

    Args:
        out: The folder runs go into; made if it is missing.
        job: The resolved job.
        source: The job file's bytes as the user wrote them.
    """
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}-{job.run.name}"
    folder = RunFolder(out.resolve() / name)
    with storage_errors(folder.path):
        for part in (folder.path, folder.checkpoints, folder.privacy, folder.path / "env"):
            part.mkdir(parents=True)
    write_atomic(folder.path / "run.toml", source)
    write_atomic(folder.path / "resolved.toml", dump_toml(job).encode())
    write_json(folder.path / "env" / "hardware.json", _hardware())
    packages = sorted({f"{d.name}=={d.version}" for d in metadata.distributions()})
    write_atomic(folder.path / "env" / "lock.txt", ("\n".join(packages) + "\n").encode())
    folder.set_state("queued", 0)
    return folder


def _hardware() -> dict[str, object]:
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }
