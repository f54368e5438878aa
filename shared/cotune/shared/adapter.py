"""An adapter's numbers: named arrays with a fixed order, to and from one flat array."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

    def only(self, names: Sequence[str]) -> Layout:
        """The same adapter with only these of its trained tensors."""
        return replace(self, trained=tuple(name for name in self.trained if name in set(names)))

    def at_rank(self, rank: int) -> Layout:
        """The same adapter at another rank: (rank, in) for each A, (out, rank) for each B, heads as they are."""

        def resized(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
            if ".lora_A." in name:
                return (rank, shape[1])
            return (shape[0], rank) if ".lora_B." in name else shape

        return replace(self, shapes={name: resized(name, shape) for name, shape in self.shapes.items()})

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


def nested(arrays: Mapping[str, Vector], rank: int) -> dict[str, Vector]:
    """The first `rank` rows of each A and columns of each B; everything else as it is."""

    def part(name: str, array: Vector) -> Vector:
        if ".lora_A." in name:
            return np.ascontiguousarray(array[:rank])
        return np.ascontiguousarray(array[:, :rank]) if ".lora_B." in name else array

    return {name: part(name, array) for name, array in arrays.items()}
