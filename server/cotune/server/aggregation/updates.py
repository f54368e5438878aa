"""The admitted updates of a round as every rule reads them: one tensor of one site at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cotune.shared.adapter import Vector
from cotune.shared.aggregation import A, B

Matrix = NDArray[np.float64]
Term = tuple[float, NDArray[np.floating], NDArray[np.floating]]
"""Coefficient c, B (out, r), A (r, in): the product c B A. Ranks r may differ from term to term."""


class Updates(Protocol):
    """The admitted updates of a round, read one tensor at a time, so that memory does not grow with sites x adapter."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in order of names."""
        ...

    @property
    def weights(self) -> Matrix:
        """Shape (k,): public weights of the sites, sum 1."""
        ...

    def before(self, site: str, name: str) -> Vector:
        """The tensor as this site was sent it: at its own rank, and rounded if a codec did."""
        ...

    def delta(self, site: str, name: str) -> Vector:
        """The site's (noised) change of the tensor; zeros where it was not trained this round."""
        ...


Join = Callable[[Mapping[str, Vector], Updates], dict[str, Vector]]
"""State (the adapter's tensors by PEFT name) and updates -> the new values, fp32, of every tensor that changes."""


def weighted_sites(updates: Updates) -> list[tuple[str, float]]:
    """Sites with their weights in order of names: sums are taken so, and the order of arrival changes no bit.

    Raises:
        ValueError: There is no update.
    """
    if not updates.sites:
        raise ValueError("no update was added")
    return sorted(zip(updates.sites, map(float, updates.weights), strict=True))


def padded(array: NDArray[np.floating], shape: tuple[int, ...]) -> Matrix:
    """The array in float64, with zeros at the end of each axis up to `shape`.

    Raises:
        ValueError: The array is larger than `shape`.
    """
    return np.pad(array.astype(np.float64), [(0, n - m) for n, m in zip(shape, array.shape, strict=True)])


def weighted_sum(parts: Iterable[tuple[float, NDArray[np.floating]]]) -> Matrix:
    """Sum of weight x array, in float64 and in the order given; a smaller array is zero where it has no entry."""
    rest = iter(parts)
    weight, part = next(rest)
    total = weight * part.astype(np.float64)
    for weight, part in rest:
        if any(m > n for m, n in zip(part.shape, total.shape, strict=True)):
            total = padded(total, tuple(map(max, part.shape, total.shape)))
        total[tuple(map(slice, part.shape))] += weight * part.astype(np.float64)
    return total


def weighted_mean(updates: Updates, name: str) -> Matrix:
    """The weighted mean change of a tensor, at the largest rank among the sites.

    Ranks are nested: a site of a smaller one counts as zero in the rows of A and columns of B that it lacks.
    """
    return weighted_sum((weight, updates.delta(site, name)) for site, weight in weighted_sites(updates))


def modules_of(state: Mapping[str, Vector]) -> list[str]:
    """Names of the adapted modules, in order: P for each pair of `P.lora_A.weight` and `P.lora_B.weight`."""
    ending = f"{A}weight"
    return sorted(name.removesuffix(ending) for name in state if name.endswith(ending))


def factor_names(module: str) -> tuple[str, str]:
    """Names of a module's B (out, r) and A (r, in)."""
    return f"{module}{B}weight", f"{module}{A}weight"


def products(updates: Updates, module: str) -> Iterator[Term]:
    """Weight, B (out, r_k) and A (r_k, in) of every site as it left them: what it was sent plus its change."""
    for site, weight in weighted_sites(updates):
        b, a = (_after(updates, site, name) for name in factor_names(module))
        yield weight, b, a


def mean_factors(updates: Updates, module: str) -> tuple[Matrix, Matrix]:
    """Weighted means of the B and of the A that the sites left, at the largest rank among them."""
    b, a = (
        weighted_sum((weight, _after(updates, site, name)) for site, weight in weighted_sites(updates))
        for name in factor_names(module)
    )
    return b, a


def _after(updates: Updates, site: str, name: str) -> Matrix:
    return updates.before(site, name).astype(np.float64) + updates.delta(site, name)
