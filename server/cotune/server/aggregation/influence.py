"""How much one site moves the joined update: the figure to report instead of the word robust."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cotune.server.aggregation.coordinatewise import chunks
from cotune.server.aggregation.robust import (
    Geometry,
    RobustName,
    RobustSettings,
    cut_of,
    factors_of,
    geometry,
    require_sites,
)
from cotune.server.aggregation.updates import Updates

Matrix = NDArray[np.float64]


def measured_influence(
    name: RobustName,
    updates: Updates,
    tensors: Sequence[str],
    settings: RobustSettings,
    found: Geometry | None = None,
) -> float:
    """Largest change of the joined update, in L2 over all tensors, when one site is left out.

    The rule is applied to the other k - 1 sites with their weights made to sum to 1 again, even where these are
    fewer than it asks for; nothing is joined without the only site. It is exact for any k, and nothing is joined k
    times: the new factors, or the new window of sorted numbers, follow from what is known with all sites.

    Args:
        name: The rule.
        updates: Admitted updates of k sites.
        tensors: Every tensor that was trained.
        settings: The rule's numbers.
        found: What `geometry` says of them, if it has been asked already.

    Raises:
        CotuneError, ValueError: As `robust.combine` does.
    """
    require_sites(name, updates, settings)
    changes = _changes(name, updates, settings, found or geometry(name, updates, tensors, settings))
    squares = np.zeros(len(updates.sites))
    for tensor in tensors:
        for chunk in chunks(updates, tensor):
            moved = changes(chunk)
            squares += np.einsum("ij,ij->i", moved, moved)
    return float(np.sqrt(squares.max()))


def influence_bound(
    name: RobustName, settings: RobustSettings, weights: Matrix, max_update_norm: float
) -> float | None:
    """Largest part w_k * update_k any site can have in the joined update, in L2; None where no bound is known.

    Leaving the site out also moves the mean of the others to its place, so `measured_influence` may reach
    twice this: with two sites of opposite updates it does.

    Args:
        name: The rule.
        settings: The rule's numbers.
        weights: (k,), public, of sum 1.
        max_update_norm: L2 norm above which an update is not admitted.
    """
    largest = {"none": max_update_norm, "norm_bound": min(settings.bound, max_update_norm)}.get(name)
    return None if largest is None else largest * float(weights.max())


def _changes(
    name: RobustName, updates: Updates, settings: RobustSettings, found: Geometry
) -> Callable[[Matrix], Matrix]:
    """From a chunk (k, c) to what is joined less what is joined without site k: (k, c)."""
    count = len(updates.sites)
    cut, fewer = cut_of(name, count, settings), cut_of(name, count - 1, settings)
    if cut is not None and fewer is not None:
        return partial(_trimmed_changes, cut, fewer)
    factors = factors_of(name, found, settings)
    if name in {"none", "norm_bound"}:
        return partial(_mean_changes, factors, found.weights)
    without = [np.insert(factors_of(name, found.without(row), settings), row, 0.0) for row in range(count)]
    return partial(np.matmul, factors - np.array(without))


def _mean_changes(factors: Matrix, weights: Matrix, chunk: Matrix) -> Matrix:
    """w_k (update_k - mean) / (1 - w_k), updates scaled as the rule scales them; the mean itself where w_k is 1."""
    parts = factors[:, None] * chunk
    joined, rest = parts.sum(axis=0), 1 - weights[:, None]
    alone = np.broadcast_to(joined, parts.shape).copy()
    return np.divide(parts - weights[:, None] * joined, rest, out=alone, where=rest > 0)


def _trimmed_changes(cut: int, fewer: int, chunk: Matrix) -> Matrix:
    """Trimmed means: without site k, the window of sorted numbers loses the site's own or the nearer end of it."""
    count = len(chunk)
    ordered = np.sort(chunk, axis=0)
    window = ordered[fewer : count - fewer]
    lost = np.clip(chunk, window[0], window[-1])
    return ordered[cut : count - cut].mean(axis=0) - (window.sum(axis=0) - lost) / (count - 1 - 2 * fewer)
