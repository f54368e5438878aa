"""Rules for joining updates of which a few may be hostile or broken.

They act on deltas of the same tensors at the same rank, admitted before and so finite. One tensor is read at a time,
sums are float64 in the order of site names: neither the order of arrival nor the number of sites changes bits or
memory. No rule makes a federation safe: report `influence.measured_influence`, not the rule's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cotune.server.aggregation.coordinatewise import chunks, median_cut, of_shape, trimmed_cut, trimmed_mean
from cotune.server.aggregation.updates import Updates, weighted_mean
from cotune.shared.adapter import Vector
from cotune.shared.combinations import least_sites
from cotune.shared.errors import JobError, RunFailed

RobustName = Literal["none", "norm_bound", "median", "trimmed_mean", "multi_krum", "fltrust"]
Combine = Callable[[str], NDArray[np.float64]]
"""Tensor name -> the joined delta of that tensor, in its shape."""


@dataclass(frozen=True)
class RobustSettings:
    """What the rules need to know; each uses its own part.

    Attributes:
        bound: norm_bound: largest L2 norm of an update over all tensors together.
        trim: trimmed_mean: share of the sites cut at each end of a coordinate.
        hostile: multi_krum: how many hostile sites are expected, its f.
        root: fltrust: the coordinator's own update on a public root set, by tensor.

    Raises:
        JobError: A number is not possible.
    """

    bound: float
    trim: float = 0.2
    hostile: int = 1
    root: Mapping[str, Vector] | None = None

    def __post_init__(self) -> None:
        for name, possible, expected in (
            ("bound", 0 < self.bound < math.inf, "a finite number > 0"),
            ("trim", 0 < self.trim < 0.5, "a share over 0 and under 0.5"),
            ("hostile", self.hostile >= 0, "a number of sites >= 0"),
        ):
            if not possible:
                raise JobError("E-ROBUST", f"{name}: expected {expected}, got {getattr(self, name)}", param=name)


@dataclass(frozen=True)
class Geometry:
    """What the rules that weigh whole updates know of them, over all tensors together; only the rule's part is filled.

    Attributes:
        weights: (k,), the public weights, of sum 1.
        norms: (k,), L2 norms.
        distances: (k, k), squared L2 distances.
        along: (k,), inner products with the root update.
        root_norm: L2 norm of the root update.
    """

    weights: NDArray[np.float64]
    norms: NDArray[np.float64]
    distances: NDArray[np.float64]
    along: NDArray[np.float64]
    root_norm: float

    def without(self, row: int) -> Geometry:
        """The same without one site, for rules where every site is one vote: weights stay as they were."""
        return replace(
            self,
            norms=np.delete(self.norms, row),
            distances=np.delete(np.delete(self.distances, row, axis=0), row, axis=1),
            along=np.delete(self.along, row),
        )


def combine(
    name: RobustName,
    updates: Updates,
    tensors: Sequence[str],
    settings: RobustSettings,
    found: Geometry | None = None,
) -> Combine:
    """The joined delta by a rule, one tensor at a time; none is the weighted mean, for which ranks may differ.

    - norm_bound scales each update to at most `bound`, then takes the weighted mean: a site adds at most
      bound * w_k to it (Sun et al. 2019, arXiv 1911.07963).
    - median, trimmed_mean: see `coordinatewise`.
    - multi_krum averages the k - f updates of the least sum of squared distances to their k - f - 2 nearest; ties go
      by site name (Blanchard et al. 2017). An update of zeros lies closer to noisy updates than they lie to each
      other: a site that does nothing may well be chosen, so watch norms besides.
    - fltrust scales each update to the root's norm and weighs it by the cosine to the root, negative ones by 0;
      without any trust the joined update is zero (Cao et al. 2021, arXiv 2012.13995, algorithm 2).

    Weights count for none and norm_bound; for the others every site is one vote.

    Args:
        name: The rule.
        updates: Admitted updates.
        tensors: Every tensor that was trained: norms, distances and angles are over all of them together.
        settings: The rule's numbers.
        found: What `geometry` says of them, if it has been asked already.

    Raises:
        JobError: fltrust without a root update of these tensors.
        RunFailed: Fewer updates than `least_sites`.
        ValueError: Shapes of a tensor differ between sites, or from the root's.
    """
    require_sites(name, updates, settings)
    if name == "none":
        return partial(weighted_mean, updates)
    cut = cut_of(name, len(updates.sites), settings)
    if cut is not None:
        return partial(trimmed_mean, updates, cut=cut)
    factors = factors_of(name, found or geometry(name, updates, tensors, settings), settings)
    return partial(_weighted_sum, updates, factors)


def require_sites(name: RobustName, updates: Updates, settings: RobustSettings) -> None:
    """Refuse a round too small for the rule: it would be no protection there.

    Raises:
        RunFailed: Fewer updates than `least_sites`.
    """
    came, least = len(updates.sites), least_sites(name, settings.trim, settings.hostile)
    if came < least:
        raise RunFailed(
            "E-ROBUST-SITES",
            f"{name}: expected updates of at least {least} sites, got {came}",
            param="federation.min_sites",
            hint=f"set federation.min_sites = {least}, or choose another rule",
        )


def cut_of(name: RobustName, sites: int, settings: RobustSettings) -> int | None:
    """How many numbers a coordinate-wise rule cuts at each end; None for a rule that weighs whole updates."""
    if name == "median":
        return median_cut(sites)
    return trimmed_cut(sites, settings.trim) if name == "trimmed_mean" else None


def geometry(name: RobustName, updates: Updates, tensors: Sequence[str], settings: RobustSettings) -> Geometry:
    """Measure what a rule that weighs whole updates needs; raises as `combine` does."""
    count, root = len(updates.sites), _root(name, updates, tensors, settings)
    squares, along, distances = np.zeros(count), np.zeros(count), np.zeros((count, count))
    for tensor in tensors:
        if name in {"norm_bound", "fltrust"}:
            shape = updates.delta(updates.sites[0], tensor).shape
            for row, site in enumerate(updates.sites):
                delta = of_shape(updates.delta(site, tensor), shape, site, tensor)
                squares[row] += _product(delta, delta)
                along[row] += _product(delta, root[tensor]) if root else 0.0
        elif name == "multi_krum":
            for chunk in chunks(updates, tensor):
                for row in range(count):
                    gaps = chunk[row + 1 :] - chunk[row]  # no expanded square: that cancels where updates are alike
                    distances[row, row + 1 :] += np.einsum("ij,ij->i", gaps, gaps)
    root_norm = math.sqrt(sum(_product(root[tensor], root[tensor]) for tensor in tensors)) if root else 0.0
    return Geometry(updates.weights, np.sqrt(squares), distances + distances.T, along, root_norm)


def factors_of(name: RobustName, found: Geometry, settings: RobustSettings) -> NDArray[np.float64]:
    """(k,): what each update is multiplied by in the joined one."""
    if name == "norm_bound":
        return found.weights * (settings.bound / np.maximum(found.norms, settings.bound))
    if name == "multi_krum":
        return _krum_factors(found.distances, settings.hostile)
    if name == "fltrust":
        scales = np.divide(found.root_norm, found.norms, out=np.zeros_like(found.norms), where=found.norms > 0)
        trusts = np.maximum(found.along * scales, 0.0)  # cosines, times the root's squared norm
        return trusts / (trusts.sum() or 1.0) * scales
    return found.weights


def _krum_factors(distances: NDArray[np.float64], hostile: int) -> NDArray[np.float64]:
    kept = len(distances) - hostile
    scores = np.sort(distances, axis=1)[:, 1 : kept - 1].sum(axis=1)  # the first is the distance to itself
    factors = np.zeros(len(distances))
    factors[np.argsort(scores, kind="stable")[:kept]] = 1 / kept
    return factors


def _root(
    name: RobustName, updates: Updates, tensors: Sequence[str], settings: RobustSettings
) -> Mapping[str, Vector] | None:
    if name != "fltrust":
        return None
    missing = sorted(set(tensors) - set(settings.root or ()))
    if settings.root is None or missing:
        raise JobError(
            "E-ROBUST-ROOT",
            f"fltrust: expected the coordinator's own update of {len(tensors)} tensors on a public root set,"
            f" got none of {', '.join(missing[:3])}",
            param="root",
        )
    for tensor in tensors:
        of_shape(settings.root[tensor], updates.delta(updates.sites[0], tensor).shape, "the root", tensor)
    return settings.root


def _product(one: Vector, other: Vector) -> float:
    return float(np.einsum("i,i->", one.ravel().astype(np.float64), other.ravel().astype(np.float64)))


def _weighted_sum(updates: Updates, factors: NDArray[np.float64], tensor: str) -> NDArray[np.float64]:
    shape = updates.delta(updates.sites[0], tensor).shape
    total = np.zeros(shape)
    for site, factor in zip(updates.sites, factors, strict=True):
        if factor:
            total += factor * of_shape(updates.delta(site, tensor), shape, site, tensor).astype(np.float64)
    return total
