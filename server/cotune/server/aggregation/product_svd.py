"""The mean of the products, cut to the adapter's rank: FlexLoRA's rule with balanced factors.

    B A = SVD_r( B_g A_g + sum_k w_k (B_k1 A_k1 - B_k0 A_k0) )        B = U S^1/2, A = S^1/2 V^T

Bai et al. 2024 (arXiv 2402.11505) without the changes: SVD_r(sum_k w_k B_k1 A_k1). That is the same
where every site was sent the state itself. Where one was sent less, a lower rank or rounded numbers, only its
change counts, so that what it was not sent is not lost. The cut is post-processing of what sites released.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from cotune.server.aggregation.heads import heads
from cotune.server.aggregation.lowrank import best_of_rank, truncate
from cotune.server.aggregation.updates import Term, Updates, factor_names, modules_of, weighted_sites
from cotune.shared.adapter import Vector


def product_svd(state: Mapping[str, Vector], updates: Updates) -> dict[str, Vector]:
    """New factors of every module at the state's rank, by the best approximation of the mean; heads linearly."""
    changed = heads(state, updates)
    for module in modules_of(state):
        factors = best_of_rank(_terms(state, updates, module), state[factor_names(module)[1]].shape[0])
        changed |= dict(zip(factor_names(module), factors, strict=True))
    return changed


def at_rank(state: Mapping[str, Vector], rank: int) -> dict[str, Vector]:
    """What a site of this rank is sent: each product's best approximation of it; the state where that is no cut."""
    cut = dict(state)
    for names in map(factor_names, modules_of(state)):
        b, a = (state[name] for name in names)
        if rank < a.shape[0]:
            cut |= dict(zip(names, truncate(b, a, rank), strict=True))
    return cut


def _terms(state: Mapping[str, Vector], updates: Updates, module: str) -> Iterator[Term]:
    """The sum above without what cancels: a site that was sent the state takes its share of it along."""
    names = factor_names(module)
    rest = 0.0
    for site, weight in weighted_sites(updates):
        (b0, a0), (db, da) = ([read(site, name) for name in names] for read in (updates.before, updates.delta))
        a1 = a0.astype(np.float64) + da
        if np.array_equal(b0, state[names[0]]) and np.array_equal(a0, state[names[1]]):
            yield weight, b0.astype(np.float64) + db, a1
            continue
        rest += weight
        # B1 A1 - B0 A0 = (B1 - B0) A1 + B0 (A1 - A0): nothing large is subtracted.
        if db.any():
            yield weight, db, a1
        if da.any():
            yield weight, b0, da
    if rest:
        yield rest, state[names[0]], state[names[1]]
