"""A run's state as a plain LoRA adapter: a core is multiplied into B, an offset becomes further ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cotune.shared.adapter import Vector
from cotune.shared.aggregation import CORE, OFFSET_A, OFFSET_B, A, B


def folded(arrays: Mapping[str, Vector]) -> dict[str, Vector]:
    """The same function as plain factors A (R, in) and B (out, R), by PEFT name.

    A core [r, r] gives B core; an offset of rank Q gives rank R = r + Q, because its factors are stacked below A
    and beside B. Control variates belong to training and are left out.
    """
    plain: dict[str, Vector] = {}
    for name, array in arrays.items():
        if "|" in name or any(mark in name for mark in (CORE, OFFSET_A, OFFSET_B)):
            continue
        core = arrays.get(name.replace(B, CORE)) if B in name else None
        value = array if core is None else array @ core
        for mark, offset, axis in ((A, OFFSET_A, 0), (B, OFFSET_B, 1)):
            if mark in name and (more := arrays.get(name.replace(mark, offset))) is not None:
                value = np.concatenate([value, more], axis=axis)
        plain[name] = np.ascontiguousarray(value, dtype=np.float32)
    return plain


def folded_config(config: Mapping[str, Any], plain: Mapping[str, Vector]) -> dict[str, Any]:
    """The PEFT configuration for folded arrays: their rank, and alpha so that the scale alpha / r stays."""
    rank = next((array.shape[0] for name, array in plain.items() if A in name), config["r"])
    return {**config, "r": rank, "lora_alpha": config["lora_alpha"] / config["r"] * rank}
