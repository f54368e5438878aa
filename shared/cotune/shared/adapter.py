"""An adapter's numbers: named arrays with a fixed order, to and from one flat array."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of an adapter's tensors, in order of names; the trained ones travel.

    Attributes:
        shapes: PEFT state-dict name -> shape, every tensor of the adapter.
        trained: Names of the tensors that are trained.
    """

    shapes: Mapping[str, tuple[int, ...]]
    trained: tuple[str, ...]

    @cached_property
    def size(self) -> int:
        """Trained parameters: the length of the flat array."""
        return sum(int(np.prod(self.shapes[name])) for name in self.trained)

    def flatten(self, arrays: Mapping[str, Vector]) -> Vector:
        """The trained tensors as one fp32 array of shape (size,)."""
        return np.concatenate([np.asarray(arrays[name], dtype=np.float32).ravel() for name in self.trained])

    def unflatten(self, flat: Vector) -> dict[str, Vector]:
        """One array of shape (size,) as the trained tensors.

        Raises:
            ValueError: The length is another.
        """
        if flat.shape != (self.size,):
            raise ValueError(f"expected shape ({self.size},), got {flat.shape}")
        arrays: dict[str, Vector] = {}
        start = 0
        for name in self.trained:
            stop = start + int(np.prod(self.shapes[name]))
            arrays[name] = flat[start:stop].reshape(self.shapes[name])
            start = stop
        return arrays


def fingerprint(arrays: Mapping[str, Vector]) -> str:
    """SHA-256 over names, shapes and little-endian fp32 bytes, hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name], dtype="<f4")
        digest.update(f"{name}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def flat_sha256(flat: Vector) -> str:
    """SHA-256 of a flat array's little-endian fp32 bytes, hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(flat, dtype="<f4").tobytes()).hexdigest()
