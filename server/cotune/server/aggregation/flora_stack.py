"""The mean of the products, kept whole in a frozen addition to the base weights, the offset: FLoRA's rule.

    offset + sum_k w_k B_k A_k        Wang et al. 2024, arXiv 2409.05976

The offset is a pair of factors, `P.offset_B.weight` (out, R) and `P.offset_A.weight` (R, in), of one rank R for all
modules. It is exact and keeps every round's noise for ever: without differential privacy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from cotune.server.aggregation.heads import heads
from cotune.server.aggregation.lowrank import lossless
from cotune.server.aggregation.updates import Term, Updates, factor_names, modules_of, padded, products
from cotune.shared.adapter import Vector
from cotune.shared.aggregation import OFFSET_A, OFFSET_B


def flora_stack(state: Mapping[str, Vector], updates: Updates, fresh_a: Callable[[str], Vector]) -> dict[str, Vector]:
    """The grown offset, B = 0 and A drawn anew; heads linearly.

    Args:
        state: The adapter; B is zero in it. Before the first round it has no offset.
        updates: Of this round; ranks may differ.
        fresh_a: A tensor's name -> its next A (r, in), orthonormal rows from the public seed and the round.
    """
    changed = heads(state, updates) | grown_offset(state, updates, lambda _: [])
    for b, a in map(factor_names, modules_of(state)):
        changed |= {b: np.zeros_like(state[b]), a: fresh_a(a)}
    return changed


def grown_offset(state: Mapping[str, Vector], updates: Updates, more: Callable[[str], list[Term]]) -> dict[str, Vector]:
    """Offset + sum_k w_k B_k A_k + what `more` gives for the module, without loss.

    Returns:
        Factors for every module, padded with zeros to the largest rank among them: at least 1, and at most the
        largest min(out, in).
    """

    def terms(module: str) -> Iterator[Term]:
        if (b := state.get(f"{module}{OFFSET_B}weight")) is not None:
            yield 1.0, b, state[f"{module}{OFFSET_A}weight"]
        yield from products(updates, module)
        yield from more(module)

    factors = {module: lossless(terms(module)) for module in modules_of(state)}
    rank = max([1, *(a.shape[0] for _, a in factors.values())])
    grown: dict[str, Vector] = {}
    for module, (b, a) in factors.items():
        grown[f"{module}{OFFSET_B}weight"] = padded(b, (b.shape[0], rank)).astype(np.float32)
        grown[f"{module}{OFFSET_A}weight"] = padded(a, (rank, a.shape[1])).astype(np.float32)
    return grown
