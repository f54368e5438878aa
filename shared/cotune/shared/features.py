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
from cotune.shared.files import storage_errors
from cotune.shared.network import Network, passes

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
        shape = (int(self._ends[-1]) if len(examples) else 0, network.hidden_size)
        self._kept = network.splits and 0 < shape[0] * shape[1] * 4 <= MAX_BYTES
        if self._kept:
            folder = _own(folder, examples)
            self._values = _array(folder, "features.npy", shape, np.float32)
            self._known = _array(folder, "known.npy", (len(examples),), np.uint8)

    def of(self, rows: Sequence[int]) -> list[Vector] | None:
        """Outputs of these rows, shape (tokens, hidden_size) each, or None when nothing is kept."""
        if not self._kept:
            return None
        missing = [row for row in rows if not self._known[row]]
        for places in passes([self._examples[row] for row in missing], CHUNK):
            chunk = [missing[place] for place in places]
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
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
            np.lib.format.open_memmap(part.name, mode="w+", dtype=dtype, shape=shape).flush()
            with storage_errors(path):  # take the space now: a full disk met through a memory map kills the process
                os.posix_fallocate(part.fileno(), 0, Path(part.name).stat().st_size)
        with contextlib.suppress(FileExistsError):  # another process of this site was first: its file counts
            os.link(part.name, path)
        Path(part.name).unlink()
    return np.lib.format.open_memmap(path, mode="r+")


def _own(folder: Path | None, examples: Sequence[Example]) -> Path | None:
    """A private folder named by exactly these examples: other records never meet kept values of these."""
    if folder is None:
        return None
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([len(example.ids), *example.ids], dtype="<u4").tobytes())
    own = folder / digest.hexdigest()[:16]
    with storage_errors(own):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        own.mkdir(mode=0o700, exist_ok=True)
    return own
