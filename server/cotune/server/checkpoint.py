"""Checkpoints by round: plain PEFT folders that appear whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from cotune.shared.adapter import Vector, fingerprint
from cotune.shared.errors import StorageError
from cotune.shared.files import append_line, storage_errors, sync_folder, write_json
from cotune.shared.methods import save
from cotune.shared.runs import RunFolder

KEPT = 2


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a round.

    Attributes:
        round: The last finished round; 0 before the first.
        arrays: The whole global adapter by PEFT name.
        clipping_norm: Where adaptive clipping has got to; the job's own norm otherwise.
        traffic: Bytes so far: site -> (up, down).
    """

    round: int
    arrays: Mapping[str, Vector]
    clipping_norm: float
    traffic: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def save_checkpoint(run: RunFolder, progress: Progress, config: Mapping[str, Any]) -> None:
    """Write a round's checkpoint atomically; the two newest stay.

    Raises:
        StorageError: The disk is full; earlier checkpoints are untouched.
    """
    target = run.checkpoints / f"round-{progress.round:05d}"
    staging = run.checkpoints / f".{target.name}.tmp"
    with storage_errors(target):
        shutil.rmtree(staging, ignore_errors=True)
        try:
            save(
                staging,
                progress.arrays,
                config,
                f"# Checkpoint after round {progress.round} of {run.run_id}\n",
            )
            write_json(
                staging / "progress.json",
                {
                    "round": progress.round,
                    "sha256": fingerprint(progress.arrays),
                    "clipping_norm": progress.clipping_norm,
                    "traffic": dict(progress.traffic),
                },
            )
            shutil.rmtree(target, ignore_errors=True)  # there only if it was found damaged
            staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        sync_folder(run.checkpoints)
    append_line(run.path / "checkpoints.jsonl", {"round": progress.round, "sha256": fingerprint(progress.arrays)})
    for old in _newest_first(run)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(run: RunFolder) -> Progress | None:
    """The newest checkpoint that verifies, or None; a damaged one is said and passed over."""
    for folder in _newest_first(run):
        try:
            return _read(folder)
        except StorageError as error:
            run.emit("checkpoint", f"{error.message}; falling back to the one before", "warn")
    return None


def _newest_first(run: RunFolder) -> list[Path]:
    return sorted(run.checkpoints.glob("round-[0-9]*"), reverse=True)


def _read(folder: Path) -> Progress:
    try:
        state = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        arrays = load_file(folder / "adapter_model.safetensors")
        if fingerprint(arrays) != state["sha256"]:
            raise ValueError("hash")
        traffic = {site: (up, down) for site, (up, down) in state["traffic"].items()}
        return Progress(int(state["round"]), arrays, float(state["clipping_norm"]), traffic)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, it is not a checkpoint
        raise StorageError("E-CHECKPOINT", f"{folder.name} is damaged ({type(error).__name__})") from None
