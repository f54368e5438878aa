"""Gaussian noise on a clipped sum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cotune.client.randomness import RandomStream
from cotune.shared.adapter import Vector
from cotune.shared.privacy.mechanism import Mechanism


def privatise(clipped_sum: NDArray[np.float64], mechanism: Mechanism, stream: RandomStream) -> Vector:
    """The noised mean gradient of one step, fp32, shape as given.

    Guarantee: Gaussian noise of standard deviation noise_multiplier x sensitivity is added to every
    coordinate of the sum in float64, once, whatever the batch; then the result is divided by the public
    expected batch size. With a sum of L2 sensitivity `mechanism.sensitivity` this is the Gaussian mechanism
    of `mechanism.event(1)`; division and rounding to fp32 are post-processing.

    Edge cases: the sum of an empty batch is zero and the result is noise alone; a mechanism without privacy
    adds none.
    """
    noised = clipped_sum
    if mechanism.private:
        noised = clipped_sum + mechanism.noise_standard_deviation * stream.normal(clipped_sum.size).reshape(
            clipped_sum.shape
        )
    return (noised / mechanism.expected_batch_size).astype(np.float32)
