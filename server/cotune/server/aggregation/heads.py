"""Tensors that are no factor of a low-rank product, such as a classifier's head."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cotune.server.aggregation.updates import Updates, padded, weighted_mean
from cotune.shared.adapter import Vector
from cotune.shared.aggregation import CONTROL, OFFSET_A, OFFSET_B, factor_of


def heads(state: Mapping[str, Vector], updates: Updates) -> dict[str, Vector]:
    """Tensors that are no factor, offset or control variate, moved by their weighted mean change, if anybody's."""
    changed: dict[str, Vector] = {}
    for name in sorted(state):
        if factor_of(name) or any(mark in name for mark in (OFFSET_A, OFFSET_B, CONTROL)):
            continue
        mean = weighted_mean(updates, name)
        if mean.any():
            changed[name] = (state[name] + padded(mean, state[name].shape)).astype(np.float32)
    return changed
