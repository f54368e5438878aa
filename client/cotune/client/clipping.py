"""From gradients of examples to one clipped sum over units: what noise is then added to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.client.gradients import PerExample
from cotune.shared.privacy.mechanism import LOSS_BOUND, Mechanism

# The factor is rounded down by more than float64 arithmetic can round it up, so the bound holds as computed.
SAFETY = 1 - 1e-6
NORMALISED_OFFSET = 0.01  # gamma of AUTO-S, Bu et al. 2023 (arXiv 2206.07136), section 3.3


@dataclass(frozen=True, repr=False)
class PerUnit:
    """What each unit says by itself. As sensitive as its examples: it has no repr.

    Attributes:
        gradients: Parameter name -> (units, *shape): the sum over the unit's examples, in float64 where there
            may be several.
        losses: Mean of the unit's examples' losses, shape (units,), in nats; 0 for a unit without example.
        counts: Examples of each unit in here, shape (units,).
    """

    gradients: dict[str, Tensor]
    losses: Tensor
    counts: Tensor

    def __add__(self, other: PerUnit) -> PerUnit:
        """The same units with further examples of theirs."""
        counts = self.counts + other.counts
        sums = self.losses * self.counts + other.losses * other.counts
        gradients = {name: gradient + other.gradients[name] for name, gradient in self.gradients.items()}
        return PerUnit(gradients, sums / counts.clamp(min=1), counts)


@dataclass(frozen=True, repr=False)
class ClippedSum:
    """Sums over units, each of a bounded share. Not yet private: noise makes it so.

    Attributes:
        gradient: Sum of clipped gradients, flat, shape (p,), in the layout's order.
        below: Sum of 1/2 for a unit whose gradient was within the clipping norm, -1/2 for another.
        loss: Sum of each unit's loss, brought from 0..LOSS_BOUND to -1..1.
    """

    gradient: NDArray[np.float64]
    below: float
    loss: float

    @staticmethod
    def zero(size: int) -> ClippedSum:
        """The sum over no unit."""
        return ClippedSum(np.zeros(size), 0.0, 0.0)

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """The sum over these units and others."""
        return ClippedSum(self.gradient + other.gradient, self.below + other.below, self.loss + other.loss)


def sum_by_unit(per_example: PerExample, owners: Sequence[int] | NDArray[np.integer], units: int) -> PerUnit:
    """Sum the gradients of each unit's examples; clipping comes after, so it bounds the unit as a whole.

    Args:
        per_example: Of n examples.
        owners: The unit of each example, shape (n,), values 0 to units - 1.
        units: How many units there are.

    Guarantee: row u of every result is a function of the examples whose owner is u, and of nothing else.

    Edge cases: a unit without example has a zero gradient and loss; NaN or infinity stay in their own unit;
    an owner outside 0 to units - 1, or a number of owners other than n, is an IndexError, never a guess.
    """
    losses = per_example.losses
    unit_of = np.asarray(owners, dtype=np.int64)
    if unit_of.shape != losses.shape or not ((unit_of >= 0) & (unit_of < units)).all():
        raise IndexError(f"expected {len(losses)} owners from 0 to {units - 1}")
    counts = torch.from_numpy(np.bincount(unit_of, minlength=units)).to(losses)
    if np.array_equal(unit_of, np.arange(units)):
        return PerUnit(per_example.gradients, losses, counts)  # every example is a unit: no copy
    index = torch.from_numpy(unit_of).to(losses.device)

    def summed(values: Tensor) -> Tensor:
        # In float64: which examples share a pass changes the order of a sum, and must not change the sum.
        total = values.new_zeros(units, *values.shape[1:], dtype=torch.float64)
        return total.index_add_(0, index, values.double())

    gradients = {name: summed(gradient) for name, gradient in per_example.gradients.items()}
    return PerUnit(gradients, summed(losses) / counts.clamp(min=1), counts)


def clipped_sum(per_unit: PerUnit, mechanism: Mechanism) -> ClippedSum:
    """Sum over units of their gradients, each scaled down to an L2 norm of at most `clipping_norm`.

    A factor is min(1, C / norm) for flat clipping (Abadi et al. 2016, algorithm 1) and C / (norm + 0.01) for
    normalised clipping (AUTO-S, Bu et al. 2023, section 3.3).

    Guarantee: for neighbours that differ by one unit, however many examples it has, the results' gradients
    differ by at most `mechanism.sensitivity` in L2 norm, `below` by 1/2 and `loss` by 1. The norm is taken
    over all parameters together, in float64, and the factor depends on that unit alone.

    Edge cases: a unit with NaN or infinity anywhere adds no gradient, -1/2 to `below` and 0 to `loss`, and
    leaves the others as they are; a zero gradient stays zero; a loss outside 0..LOSS_BOUND counts as the
    nearer end; no unit gives zero. Without privacy nothing is scaled, but NaN and infinity are still left out.
    """
    rows = [gradient.flatten(1) for gradient in per_unit.gradients.values()]
    parts = torch.stack([torch.linalg.vector_norm(row, dim=1, dtype=torch.float64) for row in rows])
    norms, losses = torch.linalg.vector_norm(parts, dim=0), per_unit.losses.double()
    whole = norms.isfinite() & losses.isfinite()
    factors = torch.where(whole, _factors(norms, mechanism), 0.0)
    if not whole.all():  # 0 times NaN would be NaN
        rows = [torch.where(whole[:, None], row, 0.0) for row in rows]
    gradient = torch.cat([factors @ row.double() for row in rows])
    below = torch.where(whole & (norms <= mechanism.clipping_norm), 0.5, -0.5).sum()
    loss = torch.where(whole, losses.clamp(0, LOSS_BOUND) / (LOSS_BOUND / 2) - 1, 0.0).sum()
    return ClippedSum(gradient.cpu().numpy(), float(below), float(loss))


def _factors(norms: Tensor, mechanism: Mechanism) -> Tensor:
    """What each unit's gradient is multiplied by, shape (units,); 0 to 1 unless clipping is normalised."""
    if not mechanism.private:
        return torch.ones_like(norms)
    bound = mechanism.clipping_norm * SAFETY
    if mechanism.clipping == "normalised":
        return bound / (norms + NORMALISED_OFFSET)
    return (bound / norms).clamp(max=1.0)
