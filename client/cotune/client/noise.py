"""Gaussian noise on what a step releases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.client.clipping import ClippedSum
from cotune.client.randomness import RandomStream
from cotune.shared.adapter import Vector
from cotune.shared.privacy.mechanism import LOSS_BOUND, Mechanism


@dataclass(frozen=True, repr=False)
class Noise:
    """Independent standard normal numbers for one step, to be used once: (p,) for the gradient, two more."""

    gradient: NDArray[np.float64]
    below: float
    loss: float


@dataclass(frozen=True)
class Released:
    """What one step gives away, all of it noised.

    Attributes:
        gradient: Mean gradient, fp32, shape (p,).
        below: Estimated share of units whose gradient was within the clipping norm; None if not asked for.
        loss: Estimated mean loss of the units, in nats; None if not asked for.
    """

    gradient: Vector
    below: float | None
    loss: float | None


def draw_noise(mechanism: Mechanism, size: int, stream: RandomStream) -> Noise:
    """Noise for one step of `size` trained numbers; none is drawn for a mechanism without privacy."""
    if not mechanism.private:
        return Noise(np.zeros(size), 0.0, 0.0)
    drawn = stream.normal(size + 2)
    return Noise(drawn[:size], float(drawn[size]), float(drawn[size + 1]))


def privatise(clipped: ClippedSum, mechanism: Mechanism, noise: Noise) -> Released:
    """Add a step's noise to its clipped sums and divide by the public expected batch size.

    Guarantee: Gaussian noise of standard deviation gradient_noise_multiplier x sensitivity is added to every
    coordinate of the gradient, and side_noise_multiplier to each side sum that is released (sensitivity 1),
    in float64, once, whatever the batch. For neighbours that differ in one unit this is the Gaussian
    mechanism of `mechanism.event(1)`; division and rounding to fp32 are post-processing.

    Edge cases: the sums of an empty batch are zero and what is released is noise alone; a side sum the
    mechanism does not have is not released; a mechanism without privacy adds no noise.
    """
    batch = mechanism.expected_batch_size
    gradient = clipped.gradient + mechanism.noise_standard_deviation * noise.gradient
    side = mechanism.side_noise_multiplier
    below = 0.5 + (2 * clipped.below + side * noise.below) / (2 * batch) if mechanism.adaptive else None
    loss = (1 + (clipped.loss + side * noise.loss) / batch) * LOSS_BOUND / 2 if mechanism.metrics else None
    return Released((gradient / batch).astype(np.float32), below, loss)
