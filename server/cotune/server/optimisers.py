"""What the coordinator does with a joined update: server optimisers, and the average of past adapters.

All of it works on what was released already: post-processing, which costs no privacy (Dwork and Roth 2014, proposition
2.1). It remembers single coordinates, so it is meant for rules whose coordinates stay the same from round to
round: not for `product_svd` or `flora_stack`, which choose new factors each round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cotune.shared.adapter import Vector
from cotune.shared.errors import JobError

ServerOptimiser = Literal["none", "fedavgm", "fedadam", "fedyogi"]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class OptimiserSettings:
    """A server optimiser and its numbers.

    Attributes:
        name: Which.
        learning_rate: Of the server. fedadam and fedyogi move every coordinate whose updates are well above
            `tau` by about this much a round, whatever their size: they need one far below 1.
        momentum: Share of the last direction that stays, beta1.
        beta2: Share of the last squares that stays.
        tau: Smallest scale of a coordinate: the larger, the less adaptive.

    Raises:
        JobError: A number is not possible.
    """

    name: ServerOptimiser
    learning_rate: float = 1.0
    momentum: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        for name, possible, expected in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "a finite number > 0"),
            ("momentum", 0 <= self.momentum < 1, "a share of at least 0 and under 1"),
            ("beta2", 0 <= self.beta2 < 1, "a share of at least 0 and under 1"),
            ("tau", 0 < self.tau < math.inf, "a finite number > 0"),
        ):
            if not possible:
                raise JobError("E-OPTIMISER", f"{name}: expected {expected}, got {getattr(self, name)}", param=name)


def step(
    settings: OptimiserSettings, delta: Mapping[str, Vector], memory: Mapping[str, Vector]
) -> tuple[dict[str, Vector], dict[str, Vector]]:
    """One step of the server along the joined update d, the negative of its pseudo-gradient.

    - none: adds lr d; with lr 1 bit by bit d.
    - fedavgm: m = beta1 m + d, adds lr m (Hsu et al. 2019, arXiv 1909.06335).
    - fedadam, fedyogi: m = beta1 m + (1 - beta1) d, adds lr m / (sqrt(v) + tau), where v starts at tau^2 and is
      beta2 v + (1 - beta2) d^2, or for fedyogi v - (1 - beta2) d^2 sign(v - d^2). There is no bias
      correction (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

    Args:
        settings: Which optimiser.
        delta: The joined update by tensor; of tensors that were not trained this round it has none.
        memory: What the last step returned; empty before the first.

    Returns:
        What to add to the state, by the names of `delta`; and the new memory, `NAME|m` and `NAME|v`, with that of
        other tensors as it was. Both fp32: a run that reads them back goes on bit by bit.

    Raises:
        ValueError: A tensor has another shape than its memory.
    """
    added: dict[str, Vector] = {}
    kept = dict(memory)
    for name in sorted(delta):
        change = delta[name].astype(np.float64)
        if settings.name == "none":
            added[name] = (settings.learning_rate * change).astype(np.float32)
            continue
        share = 1.0 if settings.name == "fedavgm" else 1 - settings.momentum
        direction = settings.momentum * _remembered(memory, f"{name}|m", change.shape, 0.0) + share * change
        kept[f"{name}|m"] = direction.astype(np.float32)
        if settings.name != "fedavgm":
            squares = _squares(settings, _remembered(memory, f"{name}|v", change.shape, settings.tau**2), change)
            kept[f"{name}|v"] = squares.astype(np.float32)
            direction /= np.sqrt(squares) + settings.tau
        added[name] = (settings.learning_rate * direction).astype(np.float32)
    return added, kept


def average(
    decay: float, state: Mapping[str, Vector], averaged: Mapping[str, Vector], rounds: int
) -> dict[str, Vector]:
    """The exponential moving average of the adapters after each round, corrected for its start.

    After t rounds an adapter of s rounds ago has the weight (1 - decay) decay^s / (1 - decay^t), so the weights sum
    to 1 and the first average is the first adapter (Kingma and Ba 2015, section 3, on the adapter itself).

    Args:
        decay: How slowly it follows, at least 0 and under 1; 0 gives the state.
        state: The adapter after this round.
        averaged: What the last call returned; not read in the first.
        rounds: How many adapters are averaged, this one included: 1 in the first call.

    Raises:
        JobError: The decay is not possible.
        ValueError: `rounds` is below 1, or a tensor of `averaged` is missing or has another shape.
    """
    if not 0 <= decay < 1:
        raise JobError("E-OPTIMISER", f"decay: expected a share of at least 0 and under 1, got {decay}", param="decay")
    if rounds < 1:
        raise ValueError(f"expected at least the first round, got {rounds}")
    newest = (1 - decay) / (1 - decay**rounds)
    result: dict[str, Vector] = {}
    for name in sorted(state):
        if rounds > 1 and name not in averaged:
            raise ValueError(f"{name}: expected its average of the {rounds - 1} rounds before, got none")
        now = state[name].astype(np.float64)
        before = _remembered(averaged if rounds > 1 else {}, name, now.shape, 0.0)
        result[name] = (before + newest * (now - before)).astype(np.float32)
    return result


def _squares(settings: OptimiserSettings, before: Numbers, change: Numbers) -> Numbers:
    """The running second moment v, by the optimiser's rule."""
    new = change**2
    if settings.name == "fedyogi":
        return before - (1 - settings.beta2) * new * np.sign(before - new)
    return settings.beta2 * before + (1 - settings.beta2) * new


def _remembered(memory: Mapping[str, Vector], name: str, shape: tuple[int, ...], start: float) -> Numbers:
    if name not in memory:
        return np.full(shape, start)
    if memory[name].shape != shape:  # numpy would stretch it without a word
        raise ValueError(f"{name}: expected shape {shape}, got {memory[name].shape}")
    return memory[name].astype(np.float64)
