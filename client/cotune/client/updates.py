"""The updates a site gave, one file a round, so that whoever asks again gets the same numbers."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cotune.shared.adapter import flat_sha256
from cotune.shared.files import storage_errors, sync_folder, write_atomic
from cotune.shared.update import AdapterUpdate, UpdateHeader

KEPT_ROUNDS = 3


@dataclass(frozen=True)
class Updates:
    """A folder of updates: noised, so no secret, but nobody else's to read."""

    folder: Path

    def path(self, run_id: str, round_number: int) -> Path:
        """Where a round's update is."""
        return self.folder / f"{run_id}-{round_number}.safetensors"

    def write(self, run_id: str, round_number: int, update: AdapterUpdate) -> bool:
        """Keep a round's update, durably; False if the round has one, which then stands.

        The run's updates of more than three rounds ago are let go.

        Raises:
            StorageError: The disk is full, read-only or gone.
        """
        path = self.path(run_id, round_number)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        write_atomic(draft, save({"delta": update.delta}, {"header": update.header.model_dump_json()}))
        with storage_errors(path):
            try:
                os.link(draft, path)
            except FileExistsError:
                return False
            finally:
                draft.unlink()
            sync_folder(self.folder)
            self.path(run_id, round_number - KEPT_ROUNDS).unlink(missing_ok=True)
        return True

    def read(self, run_id: str, round_number: int) -> AdapterUpdate | None:
        """A round's update; None if there is none, or its file is damaged."""
        path = self.path(run_id, round_number)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                header = UpdateHeader.model_validate_json((file.metadata() or {})["header"])
                delta = file.get_tensor("delta")
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        return AdapterUpdate(header, delta) if flat_sha256(delta) == header.update_sha256 else None
