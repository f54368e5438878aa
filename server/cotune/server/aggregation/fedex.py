"""Means of the factors, with what they miss of the mean of the products in the offset: FedEx-LoRA's rule.

    A' = sum w A_k    B' = sum w B_k    offset' = offset + sum_k w_k B_k A_k - B' A'

Singhal et al. 2024, arXiv 2410.09432. It is exact; the offset, most of it noise under differential
privacy, is kept for ever.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cotune.server.aggregation.flora_stack import grown_offset
from cotune.server.aggregation.heads import heads
from cotune.server.aggregation.updates import Updates, factor_names, mean_factors, modules_of, padded
from cotune.shared.adapter import Vector


def fedex(state: Mapping[str, Vector], updates: Updates) -> dict[str, Vector]:
    """The mean factors of every module and the grown offset; heads linearly."""
    means = {module: mean_factors(updates, module) for module in modules_of(state)}
    changed = heads(state, updates) | grown_offset(state, updates, lambda module: [(-1.0, *means[module])])
    for module, factors in means.items():
        for name, mean in zip(factor_names(module), factors, strict=True):
            changed[name] = padded(mean, state[name].shape).astype(np.float32)
    return changed
