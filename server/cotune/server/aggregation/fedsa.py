"""Sites share A and keep a B each: FedSA-LoRA's rule. In the last round they return their B, and each has an adapter.

Guo et al. 2024, arXiv 2410.01463. There the Bs never leave; here each was noised in every step, jointly with A, and
costs no more when it does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cotune.server.aggregation.heads import heads
from cotune.server.aggregation.updates import Updates, factor_names, modules_of, padded, weighted_mean
from cotune.shared.adapter import Vector
from cotune.shared.aggregation import factor_of


def fedsa(state: Mapping[str, Vector], updates: Updates) -> dict[str, Vector]:
    """Every factor moved by its weighted mean change, and every head; what no site returned has none.

    In the last round B becomes the mean of the sites' Bs, which stands in for a site that has none of its own.
    """
    factors = [name for module in modules_of(state) for name in factor_names(module)]
    moved = {name: state[name] + padded(weighted_mean(updates, name), state[name].shape) for name in factors}
    return heads(state, updates) | {name: array.astype(np.float32) for name, array in moved.items()}


def own_adapter(joined: Mapping[str, Vector], updates: Updates, site: str) -> dict[str, Vector]:
    """What a site has in the end: all that is shared, as joined in the last round, and the B that it returned."""
    return {
        name: updates.before(site, name) + updates.delta(site, name) if factor_of(name) == "B" else array
        for name, array in joined.items()
    }
