"""A round's admitted updates on disk, so that memory does not grow with their number."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from cotune.shared.adapter import Layout, Vector
from cotune.shared.files import storage_errors


class Spool:
    """An `Updates` read from files, one tensor at a time, in the order of site names.

    The folder is there for one round: what is in it was noised and can be asked for again.

    Args:
        folder: Made anew, and removed at the end of the block.
        layouts: Rank -> what an update at that rank holds.
        before: Rank -> the arrays that sites of that rank were sent.
        weights: Public weights by site; 1 for a site that has none.
    """

    def __init__(
        self,
        folder: Path,
        layouts: Mapping[int, Layout],
        before: Mapping[int, Mapping[str, Vector]],
        weights: Mapping[str, float],
    ) -> None:
        self._folder, self._layouts, self._before, self._weights = folder, layouts, before, weights
        self._starts = {rank: _starts(layout) for rank, layout in layouts.items()}
        self._ranks: dict[str, int] = {}

    def __enter__(self) -> Spool:
        shutil.rmtree(self._folder, ignore_errors=True)  # what a crash left behind
        with storage_errors(self._folder):
            self._folder.mkdir(mode=0o700, parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, site: str, rank: int, delta: Vector) -> None:
        """Take one admitted update; a second one of the same site is an error.

        Raises:
            StorageError: The disk is full.
        """
        if site in self._ranks:
            raise ValueError(f"{site} was already counted")
        with storage_errors(self._folder / site):
            delta.astype("<f4").tofile(self._folder / site)
        self._ranks[site] = rank

    @property
    def sites(self) -> tuple[str, ...]:
        """Who is in it, in order of names."""
        return tuple(sorted(self._ranks))

    @property
    def weights(self) -> NDArray[np.float64]:
        """Public weights, shape (sites,), that add up to 1."""
        weights = np.array([self._weights.get(site, 1.0) for site in self.sites])
        return weights / weights.sum()

    def before(self, site: str, name: str) -> Vector:
        """A tensor as this site was sent it."""
        return self._before[self._ranks[site]][name]

    def delta(self, site: str, name: str) -> Vector:
        """The site's change of a tensor; zeros where the round did not train it."""
        rank = self._ranks[site]
        start = self._starts[rank].get(name)
        if start is None:
            return np.zeros_like(self.before(site, name))
        shape = self._layouts[rank].shapes[name]
        values = np.fromfile(self._folder / site, dtype="<f4", count=math.prod(shape), offset=4 * start)
        return values.reshape(shape)


def _starts(layout: Layout) -> dict[str, int]:
    """Where each trained tensor begins in an update, in numbers."""
    sizes = [math.prod(layout.shapes[name]) for name in layout.trained]
    return dict(zip(layout.trained, accumulate(sizes, initial=0), strict=False))
