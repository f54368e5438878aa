"""Poisson sampling: which units are in a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cotune.client.randomness import RandomStream
from cotune.shared.privacy.mechanism import Mechanism


def draw_batch(mechanism: Mechanism, units: int, stream: RandomStream) -> NDArray[np.intp]:
    """Indices of one Poisson batch out of `units`, ascending.

    Guarantee: each unit is in the draw independently of all others and of all earlier draws, with
    probability at most `mechanism.sampling_probability` and less than 2**-63 below it. Without a cap, adding
    or removing a unit changes no other unit's chance. With `max_batch_size`, `population` places are drawn
    from, of which the site's units take the first and nothing takes the rest; of a draw above the cap a
    uniformly random part of that size is kept. Replacing a unit by nothing leaves every place's chance
    as it was. This is the sampling that `Mechanism.event` accounts.

    Edge cases: no unit, or none drawn, is an empty batch (the step is then noise alone); probability 1
    takes every unit, or as many as the cap allows; units beyond a capped mechanism's population are never
    drawn.
    """
    places = units if mechanism.population is None else mechanism.population
    drawn = np.arange(places)
    if mechanism.sampling_probability < 1:
        threshold = np.uint64(int(mechanism.sampling_probability * 2**64))
        drawn = np.flatnonzero(stream.uniform_bits(places) < threshold)
    if mechanism.max_batch_size is not None and len(drawn) > mechanism.max_batch_size:
        order = np.argsort(stream.uniform_bits(len(drawn)), kind="stable")
        drawn = np.sort(drawn[order[: mechanism.max_batch_size]])
    return drawn[drawn < units]
