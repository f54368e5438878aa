"""Coordinate by coordinate: the trimmed mean and the median, its extreme case.

Yin et al. 2018 (arXiv 1803.01498), definitions 1 and 2. Every site counts the same, whatever its weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cotune.server.aggregation.updates import Updates

CHUNK_NUMBERS = 2**20  # held at once, 8 MiB in float64: memory does not grow with the number of sites


def median_cut(sites: int) -> int:
    """How many of a coordinate's numbers go at each end so that its median is left: one, or the middle two."""
    return (sites - 1) // 2


def trimmed_cut(sites: int, trim: float) -> int:
    """floor(trim * sites) numbers go at each end; at least one, and never the last number."""
    return min(max(1, math.floor(trim * sites + 1e-9)), median_cut(sites))  # 0.29 * 100 is 28.999999999999996


def chunks(updates: Updates, tensor: str) -> Iterator[NDArray[np.float64]]:
    """One tensor of all sites side by side: (k, c), rows in order of sites, the next c numbers each time.

    k * c is at most `CHUNK_NUMBERS`, in the same memory each time. Each site's delta is read again for each chunk,
    so it should be cheap to read.

    Raises:
        ValueError: Sites have different shapes of it.
    """
    shape = updates.delta(updates.sites[0], tensor).shape
    size, width = math.prod(shape), max(1, CHUNK_NUMBERS // len(updates.sites))
    held = np.empty((len(updates.sites), min(width, size)))
    for start in range(0, size, width):
        chunk = held[:, : size - start]
        for row, site in enumerate(updates.sites):
            chunk[row] = of_shape(updates.delta(site, tensor), shape, site, tensor).ravel()[start : start + width]
        yield chunk


def of_shape(array: NDArray[np.float32], shape: tuple[int, ...], owner: str, tensor: str) -> NDArray[np.float32]:
    """The array itself; numpy would stretch one of another shape without a word.

    Raises:
        ValueError: It has another shape.
    """
    if array.shape != shape:
        raise ValueError(f"{tensor}: expected shape {shape} as of the first site, got {array.shape} of {owner}")
    return array


def trimmed_mean(updates: Updates, tensor: str, cut: int) -> NDArray[np.float64]:
    """Each coordinate's mean without its `cut` smallest and `cut` largest numbers.

    Args:
        updates: Finite updates of k sites, k > 2 * cut.
        tensor: Whose coordinates.
        cut: `trimmed_cut` or `median_cut` of k.

    Raises:
        ValueError: Sites have different shapes of the tensor.
    """
    joined = np.empty(updates.delta(updates.sites[0], tensor).shape)
    flat, start = joined.reshape(-1), 0
    for chunk in chunks(updates, tensor):
        chunk.sort(axis=0)
        stop = start + chunk.shape[1]
        flat[start:stop] = chunk[cut : len(chunk) - cut].mean(axis=0)
        start = stop
    return joined
