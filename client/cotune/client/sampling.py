"""Poisson sampling: which records are in a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cotune.client.randomness import RandomStream
from cotune.shared.privacy.mechanism import Mechanism


def draw_batch(mechanism: Mechanism, records: int, stream: RandomStream) -> NDArray[np.intp]:
    """Indices of one Poisson batch out of `records`.

    Guarantee: each record is in the batch independently of all others and of all earlier batches, with
    probability at most `mechanism.sampling_probability` and less than 2**-63 below it. Adding or removing
    a record changes no other record's chance. This is the sampling that `Mechanism.event` accounts.

    Edge cases: no record, or none drawn, is an empty batch (the step is then noise alone); probability 1
    takes every record.
    """
    if mechanism.sampling_probability >= 1:
        return np.arange(records)
    threshold = np.uint64(int(mechanism.sampling_probability * 2**64))
    return np.flatnonzero(stream.uniform_bits(records) < threshold)
