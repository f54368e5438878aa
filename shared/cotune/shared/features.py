"""What the frozen lower layers make of each record, computed when first needed and kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cotune.shared.adapter import Vector
from cotune.shared.examples import Example
from cotune.shared.files import storage_errors
from cotune.shared.network import Network, passes

MAX_BYTES = 8 * 2**30
CHUNK = 16


class Features:
    """Kept lower-layer outputs of a fixed list of examples; as sensitive as the examples are.

    Args:
        network: The model; where it cannot be split, nothing is kept and the whole model runs each time.
        examples: The examples, in an order that does not change.
        folder: Keep them in files there, one an example and named by its tokens, so that other processes of its
            owner find them; None for memory. It belongs to one model.
    """

    def __init__(self, network: Network, examples: Sequence[Example], folder: Path | None = None) -> None:
        self._network = network
        self._examples = examples
        size = sum(len(example.ids) for example in examples) * network.hidden_size * 4
        self._kept = network.splits and 0 < size <= MAX_BYTES
        self._memory: dict[int, Vector] = {}
        self._folder = folder
        if self._kept and folder is not None:
            with storage_errors(folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def of(self, rows: Sequence[int]) -> list[Vector] | None:
        """Outputs of these rows, shape (tokens, hidden_size) each, or None when nothing is kept."""
        if not self._kept:
            return None
        found = {row: self._read(row) for row in set(rows)}
        found.update(self._make([row for row in dict.fromkeys(rows) if found[row] is None]))
        return [hidden for row in rows if (hidden := found[row]) is not None]

    def fill(self) -> None:
        """Keep the outputs of all rows: full passes take less time than what each batch is short of."""
        if self._kept:
            for _ in self._make([row for row in range(len(self._examples)) if not self._has(row)]):
                pass

    def _make(self, rows: Sequence[int]) -> Iterator[tuple[int, Vector]]:
        """Compute and keep these rows' outputs."""
        for places in passes([self._examples[row] for row in rows], CHUNK):
            chunk = [rows[place] for place in places]
            for row, hidden in zip(chunk, self._network.encode([self._examples[r] for r in chunk]), strict=True):
                self._keep(row, hidden)
                yield row, hidden

    def _has(self, row: int) -> bool:
        return row in self._memory if self._folder is None else self._path(self._folder, row).exists()

    def _read(self, row: int) -> Vector | None:
        if self._folder is None:
            return self._memory.get(row)
        shape = (len(self._examples[row].ids), self._network.hidden_size)
        try:
            values = np.fromfile(self._path(self._folder, row), dtype=np.float32)
        except FileNotFoundError:
            return None
        return values.reshape(shape) if values.size == shape[0] * shape[1] else None

    def _keep(self, row: int, hidden: Vector) -> None:
        if self._folder is None:
            self._memory[row] = hidden
            return
        with storage_errors(self._folder):
            descriptor, draft = tempfile.mkstemp(dir=self._folder)  # another process may be at the same example
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(np.ascontiguousarray(hidden, dtype=np.float32).tobytes())
                Path(draft).replace(self._path(self._folder, row))
            finally:
                with contextlib.suppress(FileNotFoundError):
                    Path(draft).unlink()

    def _path(self, folder: Path, row: int) -> Path:
        ids = np.array(self._examples[row].ids, dtype="<u4")
        return folder / f"{hashlib.sha256(ids.tobytes()).hexdigest()}.f4"
