"""What an optimiser moves: the adapter's own tensors, or an r x r core between its frozen factors."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cotune.shared.adapter import Layout, Vector
from cotune.shared.aggregation import CORE, OFFSET_A, OFFSET_B, B
from cotune.shared.methods import trainable


class Leaves:
    """The trained tensors of a network by the names they travel under.

    Guarantee: each tensor's per-example gradient is a fixed linear function of that example's own gradient, so
    what clipping bounds is what is added up.

    Args:
        adapted: The network's adapter, at the values a round starts from.
        layout: Names of what is trained.
        arrays: The values by name; only a core's are needed, the rest is in the adapter.
    """

    def __init__(self, adapted: Any, layout: Layout, arrays: Mapping[str, Vector]) -> None:
        live = trainable(adapted)
        self._outer: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for name in layout.trained:
            if CORE not in name:
                self.parameters[name] = live[name]
                continue
            factor = live[name.replace(CORE, B)]
            core = nn.Parameter(torch.from_numpy(arrays[name].copy()).to(factor))
            frozen = torch.from_numpy(arrays[name.replace(CORE, B)].copy()).to(factor)
            self.parameters[name], self._outer[name] = core, (factor, frozen)

    def gradients(self, found: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Per-example gradients (n, *shape) of some of the tensors, in the order of `names`.

        With W + s B R A, the gradient for the core R is that for B, times B from the left.
        """
        return {
            name: torch.einsum("or,nos->nrs", self._outer[name][1], found[name.replace(CORE, B)])
            if name in self._outer
            else found[name]
            for name in names
        }

    def settle(self) -> None:
        """Bring the network up to date after a step."""
        with torch.no_grad():
            for name, (factor, frozen) in self._outer.items():
                factor.copy_(frozen @ self.parameters[name])

    def values(self) -> dict[str, Vector]:
        """Copies of all trained tensors."""
        return {name: p.detach().cpu().numpy().copy() for name, p in self.parameters.items()}


@contextlib.contextmanager
def merged(adapted: Any, arrays: Mapping[str, Vector]) -> Generator[None]:
    """Add an offset, s offset_B offset_A, to the base weights for as long as the block runs.

    The base weights are the very same afterwards: they are put back, not computed back.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for name in arrays:
                if OFFSET_A not in name:
                    continue
                layer = adapted.get_submodule(name.partition(OFFSET_A)[0])
                weight = layer.get_base_layer().weight
                inner, outer = (
                    torch.from_numpy(array).to(weight.device)
                    for array in (arrays[name], arrays[name.replace(OFFSET_A, OFFSET_B)])
                )
                kept.append((weight, weight.data))
                weight.data = (weight.data.float() + layer.scaling["default"] * (outer @ inner)).to(weight.dtype)
        yield
    finally:
        for weight, values in kept:
            weight.data = values
