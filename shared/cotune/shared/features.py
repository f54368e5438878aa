"""What the frozen lower layers make of each record, computed when first needed and kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cotune.shared.adapter import Vector
from cotune.shared.examples import Example
from cotune.shared.network import Network

MAX_BYTES = 8 * 2**30
CHUNK = 16


class Features:
    """Kept lower-layer outputs of a fixed list of examples; as sensitive as the examples are.

    Args:
        network: The model; where it cannot be split, nothing is kept and the whole model runs each time.
        examples: The examples, in an order that does not change.
        folder: Keep them in files there, so that other processes of this site find them; None for memory.
    """

    def __init__(self, network: Network, examples: Sequence[Example], folder: Path | None = None) -> None:
        self._network = network
        self._examples = examples
        self._ends = np.cumsum([len(example.ids) for example in examples])
        folder = folder / _digest(examples) if folder else None
        shape = (int(self._ends[-1]) if len(examples) else 0, network.hidden_size)
        self._kept = network.splits and 0 < shape[0] * shape[1] * 4 <= MAX_BYTES
        if self._kept:
            self._values = _array(folder, "features.npy", shape, np.float32)
            self._known = _array(folder, "known.npy", (len(examples),), np.uint8)

    def of(self, rows: Sequence[int]) -> list[Vector] | None:
        """Outputs of these rows, shape (tokens, hidden_size) each, or None when nothing is kept."""
        if not self._kept:
            return None
        missing = sorted((row for row in rows if not self._known[row]), key=self._length)
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            for row, hidden in zip(chunk, self._network.encode([self._examples[r] for r in chunk]), strict=True):
                self._values[self._span(row)] = hidden
                self._known[row] = 1
        return [self._values[self._span(row)] for row in rows]

    def _length(self, row: int) -> int:
        return len(self._examples[row].ids)

    def _span(self, row: int) -> slice:
        end = int(self._ends[row])
        return slice(end - self._length(row), end)


def _array(folder: Path | None, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    if folder is None:
        return np.zeros(shape, dtype)
    path = folder / name
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
            np.lib.format.open_memmap(part.name, mode="w+", dtype=dtype, shape=shape).flush()
        with contextlib.suppress(FileExistsError):  # another process of this site was first: its file counts
            os.link(part.name, path)
        Path(part.name).unlink()
    return np.lib.format.open_memmap(path, mode="r+")


def _digest(examples: Sequence[Example]) -> str:
    """Names exactly these examples in this order: other records never meet kept values of these."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([len(example.ids), *example.ids], dtype="<u4").tobytes())
    return digest.hexdigest()[:16]
