"""How far the product of the mean factors is from the mean of the products: the error of averaging A and B apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cotune.server.aggregation.lowrank import norms_of_sums
from cotune.server.aggregation.updates import Updates, mean_factors, products


def aggregation_bias(updates: Updates, modules: Sequence[str]) -> float:
    """|| mean(B_k A_k) - mean(B_k) mean(A_k) ||_F / || mean(B_k A_k) ||_F, over all modules together.

    Means are weighted; a factor of a smaller rank counts as zero where it has no entry.

    Args:
        updates: Of a round; none at all has no bias.
        modules: Names of the adapted modules.

    Returns:
        0 if exact, infinite if the mean of the products is zero and the product of the means is not.
    """
    if not (updates.sites and modules):
        return 0.0
    norms = (norms_of_sums(products(updates, module), (-1.0, *mean_factors(updates, module))) for module in modules)
    mean, error = (math.hypot(*of_modules) for of_modules in zip(*norms, strict=True))
    if not mean:
        return math.inf if error else 0.0
    return error / mean
