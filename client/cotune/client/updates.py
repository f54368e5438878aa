"""The updates a site gave, one file a round, so that whoever asks again gets the same numbers."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cotune.shared.adapter import Vector
from cotune.shared.files import storage_errors, sync_folder, write_atomic
from cotune.shared.update import AdapterUpdate, UpdateHeader, payload_sha256

KEPT_ROUNDS = 3
PAYLOAD, MEMORY = "payload", "memory/"


@dataclass(frozen=True)
class Updates:
    """A folder of updates: noised, so no secret, but nobody else's to read."""

    folder: Path

    def path(self, run_id: str, round_number: int) -> Path:
        """Where a round's update is."""
        return self.folder / f"{run_id}-{round_number}.safetensors"

    def write(self, run_id: str, round_number: int, update: AdapterUpdate, memory: Mapping[str, Vector]) -> bool:
        """Keep a round's update, durably; False if the round has one, which then stands.

        Of the rounds before it the two newest stay.

        Args:
            run_id: The coordinator's run.
            round_number: From 1.
            update: What is sent.
            memory: What the site itself goes on with, all of it made from noised numbers.

        Raises:
            StorageError: The disk is full, read-only or gone.
        """
        path = self.path(run_id, round_number)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        tensors = {PAYLOAD: update.payload, **{MEMORY + name: array for name, array in memory.items()}}
        write_atomic(draft, save(tensors, {"header": update.header.model_dump_json()}))
        with storage_errors(path):
            try:
                os.link(draft, path)
            except FileExistsError:
                return False
            finally:
                draft.unlink()
            sync_folder(self.folder)
            before = [number for number in self._rounds(run_id) if number <= round_number]
            for old in before[:-KEPT_ROUNDS]:
                self.path(run_id, old).unlink(missing_ok=True)
        return True

    def read(self, run_id: str, round_number: int) -> AdapterUpdate | None:
        """A round's update; None if there is none, or its file is damaged."""
        found = self._read(run_id, round_number)
        return None if found is None else found[0]

    def memory(self, run_id: str, before: int) -> dict[str, Vector]:
        """What the site kept for itself in its last whole round before this one; empty if there was none."""
        for number in reversed([number for number in self._rounds(run_id) if number < before]):
            found = self._read(run_id, number)
            if found is not None:
                return found[1]
        return {}

    def _rounds(self, run_id: str) -> list[int]:
        """Rounds of a run of which there is a file, in order."""
        ends = [path.name.removeprefix(f"{run_id}-").removesuffix(".safetensors") for path in self.folder.iterdir()]
        return sorted(int(end) for end in ends if end.isdigit())

    def _read(self, run_id: str, round_number: int) -> tuple[AdapterUpdate, dict[str, Vector]] | None:
        path = self.path(run_id, round_number)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                header = UpdateHeader.model_validate_json((file.metadata() or {})["header"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                payload = tensors.pop(PAYLOAD)
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        if payload_sha256(payload) != header.update_sha256:
            return None
        return AdapterUpdate(header, payload), {n.removeprefix(MEMORY): array for n, array in tensors.items()}
