"""Checkpoints by round: plain PEFT folders, and the state a run goes on from; whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from cotune.shared.adapter import Vector, fingerprint
from cotune.shared.errors import JobError, StorageError
from cotune.shared.files import append_line, storage_errors, sync_folder, write_atomic, write_json
from cotune.shared.folding import folded_config
from cotune.shared.methods import save
from cotune.shared.runs import RunFolder

KEPT = 2
STATE, FACTS, MEMORY = "state.safetensors", "progress.json", "memory/"


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a round.

    Attributes:
        round: The last finished round; 0 before the first.
        arrays: The whole state by name: the adapter, an offset and control variates if the rule has them.
        clipping_norm: Where adaptive clipping has got to; the job's own norm otherwise.
        memory: What server optimiser and moving average go on with.
        traffic: Bytes so far: site -> (up, down).
        absent: Sites that did not answer when last asked.
        notices: Site -> why its last update was not used, to be told.
    """

    round: int
    arrays: Mapping[str, Vector]
    clipping_norm: float
    memory: Mapping[str, Vector] = field(default_factory=dict)
    traffic: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    notices: Mapping[str, str] = field(default_factory=dict)


def save_checkpoint(
    run: RunFolder, progress: Progress, published: Mapping[str, Vector], config: Mapping[str, Any]
) -> None:
    """Write a round's checkpoint atomically; the two newest stay.

    Args:
        run: Whose.
        progress: What the run goes on from.
        published: The plain adapter it stands for.
        config: The PEFT configuration of the adapter.

    Raises:
        StorageError: The disk is full; earlier checkpoints are untouched.
    """
    target = run.checkpoints / f"round-{progress.round:05d}"
    staging = run.checkpoints / f".{target.name}.tmp"
    with storage_errors(target):
        shutil.rmtree(staging, ignore_errors=True)
        try:
            card = f"# Checkpoint after round {progress.round} of {run.run_id}\n"
            save(staging, published, folded_config(config, published), card)
            _write_state(staging, run.job().sha256(), progress)
            shutil.rmtree(target, ignore_errors=True)  # there only if it was found damaged
            staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        sync_folder(run.checkpoints)
    append_line(run.path / "checkpoints.jsonl", {"round": progress.round, "sha256": fingerprint(progress.arrays)})
    for old in _newest_first(run)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def _write_state(folder: Path, job_sha256: str, progress: Progress) -> None:
    tensors = {**progress.arrays, **{MEMORY + name: array for name, array in progress.memory.items()}}
    content = save_tensors({name: np.ascontiguousarray(array) for name, array in tensors.items()})
    write_atomic(folder / STATE, content)
    facts = {
        "job_sha256": job_sha256,
        "round": progress.round,
        "state_sha256": hashlib.sha256(content).hexdigest(),
        "clipping_norm": progress.clipping_norm,
        "traffic": dict(progress.traffic),
        "absent": list(progress.absent),
        "notices": dict(progress.notices),
    }
    write_json(folder / FACTS, {"facts": facts, "sha256": _sha256_of(facts)})


def _sha256_of(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load_checkpoint(run: RunFolder) -> Progress | None:
    """The newest checkpoint that verifies, or None; a damaged one is said and passed over.

    Raises:
        JobError: E-CHECKPOINT-JOB: there is one of another job.
    """
    for folder in _newest_first(run):
        try:
            return _read(folder, run.job().sha256())
        except StorageError as error:
            run.emit("checkpoint", f"{error.message}; falling back to the one before", "warn")
    return None


def _newest_first(run: RunFolder) -> list[Path]:
    return sorted(run.checkpoints.glob("round-[0-9]*"), reverse=True)


def _read(folder: Path, job_sha256: str) -> Progress:
    try:
        written = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        facts, content = written["facts"], (folder / STATE).read_bytes()
        if (_sha256_of(facts), hashlib.sha256(content).hexdigest()) != (written["sha256"], facts["state_sha256"]):
            raise ValueError("hash")
        tensors = load_tensors(content)
        progress = Progress(
            round=int(facts["round"]),
            arrays={name: array for name, array in tensors.items() if not name.startswith(MEMORY)},
            clipping_norm=float(facts["clipping_norm"]),
            memory={n.removeprefix(MEMORY): array for n, array in tensors.items() if n.startswith(MEMORY)},
            traffic={site: (up, down) for site, (up, down) in facts["traffic"].items()},
            absent=tuple(facts["absent"]),
            notices=dict(facts["notices"]),
        )
        said = str(facts["job_sha256"])
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, it is not a checkpoint
        raise StorageError("E-CHECKPOINT", f"{folder.name} is damaged ({type(error).__name__})") from None
    if said != job_sha256:
        raise JobError(
            "E-CHECKPOINT-JOB",
            f"{folder}: expected a checkpoint of job {job_sha256[:12]}, found one of job {said[:12]}",
            hint="remove that folder, or put the run's own resolved.toml back",
        )
    return progress
