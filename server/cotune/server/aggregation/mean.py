"""The equally weighted mean of updates."""

from __future__ import annotations

import numpy as np

from cotune.shared.adapter import Vector


class Mean:
    """Equal weights: no site counts for more than 1/k, and no record count is needed.

    Sums are float64 and in the order of site names, so that the order of arrival does not change a bit.
    Exact for the product B A when only B is trained; with A trained too it is FedAvg of the factors.
    """

    def __init__(self) -> None:
        self._updates: dict[str, Vector] = {}

    def add(self, site: str, delta: Vector) -> None:
        """Take one admitted update; a second one of the same site is an error."""
        if site in self._updates:
            raise ValueError(f"{site} was already counted")
        self._updates[site] = delta

    def result(self) -> Vector:
        """The mean update, fp32; at least one must have been added."""
        if not self._updates:
            raise ValueError("no update was added")
        deltas = [self._updates[site].astype(np.float64) for site in sorted(self._updates)]
        return (sum(deltas[1:], start=deltas[0]) / len(deltas)).astype(np.float32)


AGGREGATORS = {"mean": Mean}
