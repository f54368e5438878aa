"""Per-example gradients in one backward pass, and their clipped sum.

Each trained linear layer gets its weight as one leaf per example, `[n, out, in]`, multiplied by `bmm`. One
backward pass of the sum of losses then leaves exactly each example's own gradient in its slice: for low-rank
adapters this costs the same operations as the batch gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cotune.shared.adapter import Vector
from cotune.shared.errors import ModelError
from cotune.shared.examples import Example
from cotune.shared.methods import trainable
from cotune.shared.network import Network
from cotune.shared.privacy.mechanism import Mechanism

# The factor is rounded down by more than fp32 arithmetic can round it up, so the bound holds as computed.
SAFETY = 1 - 1e-6


class PerExampleLinear(nn.Module):
    """A linear layer that can hold one copy of its parameters per example."""

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.copies: dict[str, Tensor] = {}

    def expand(self, count: int) -> None:
        """Make `count` leaves of every trained parameter; 0 goes back to the plain layer."""
        trained = {name: p for name, p in self.named_parameters(recurse=False) if p.requires_grad}
        self.copies = {
            name: p.detach().expand(count, *p.shape).requires_grad_() for name, p in trained.items() if count
        }

    def forward(self, x: Tensor) -> Tensor:
        """x (n, in) or (n, tokens, in) to (n, out) or (n, tokens, out)."""
        if not self.copies:
            return functional.linear(x, self.weight, self.bias)
        rows = x if x.dim() == 3 else x.unsqueeze(1)
        count = len(rows)
        weight = self.copies.get("weight", self.weight.expand(count, *self.weight.shape))
        y = torch.bmm(rows, weight.transpose(1, 2))
        if self.bias is not None:
            y = y + self.copies.get("bias", self.bias.expand(count, *self.bias.shape)).unsqueeze(1)
        return y if x.dim() == 3 else y.squeeze(1)


class PerExampleGradients:
    """Gives per-example gradients of a network's trained parameters.

    Guarantee: slice i of every gradient depends on example i alone. Only parameters of instrumented linear
    layers may be trained; any other trained parameter is refused, so nothing escapes clipping.

    Edge cases: parameters shared by two layers are refused (their gradients would have to be joined before
    clipping); a network without trained parameters is refused.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._layers = _instrument(network.adapted)
        covered = {id(p): layer for layer in self._layers for p in layer.parameters(recurse=False)}
        self._owners: dict[str, tuple[PerExampleLinear, str]] = {}
        for name, parameter in trainable(network.adapted).items():
            if id(parameter) not in covered:
                raise ModelError("E-LORA-LAYER", f"{name}: only linear layers can be trained with per-example clipping")
            self._owners[name] = (covered[id(parameter)], name.rpartition(".")[2])
        if not self._owners:
            raise ModelError("E-LORA-NONE", "no parameter is trained")

    def of(self, examples: Sequence[Example], hidden: Sequence[Vector] | None) -> dict[str, Tensor]:
        """Gradients of each example's own mean loss: name -> (n, *shape), fp32, in the layout's order."""
        for layer in self._layers:
            layer.expand(len(examples))
        try:
            self._network.losses(examples, hidden).sum().backward()
            return {name: _grad(layer.copies[part]) for name, (layer, part) in self._owners.items()}
        finally:
            for layer in self._layers:
                layer.expand(0)


def clipped_sum(gradients: Mapping[str, Tensor], mechanism: Mechanism) -> NDArray[np.float64]:
    """Sum over examples of their gradients, each scaled down to L2 norm `clipping_norm` at most; flat.

    Guarantee: for neighbours that differ by one example, the results differ by at most
    `mechanism.sensitivity` in L2 norm: the norm is taken over all parameters together, and the factor
    depends on that example's gradient alone (Abadi et al. 2016, algorithm 1).

    Edge cases: an example whose gradient has NaN or infinity anywhere counts as zero, and leaves the others
    as they are; a zero gradient stays zero; no example gives zero. Without privacy nothing is scaled, but
    NaN and infinity are still left out.
    """
    squares = sum((g.double().flatten(1).square().sum(1) for g in gradients.values()), start=torch.zeros(()))
    norms = torch.as_tensor(squares).sqrt()
    finite = torch.isfinite(norms)
    factors = torch.ones_like(norms)
    if mechanism.private:
        factors = (mechanism.clipping_norm * SAFETY / norms).clamp(max=1.0)
    factors = torch.where(finite, factors, 0.0)
    parts = [
        factors @ torch.where(finite[:, None], gradient.double().flatten(1), 0.0) for gradient in gradients.values()
    ]
    return torch.cat(parts).numpy()


def _grad(leaf: Tensor) -> Tensor:
    # A layer no loss depends on has no gradient: its per-example gradient is zero.
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)


def _instrument(adapted: Any) -> list[PerExampleLinear]:
    """Replace every linear layer with trained parameters, once; returns the replacements."""
    found: dict[int, PerExampleLinear] = {}
    for parent in list(adapted.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PerExampleLinear):
                found[id(child)] = child
            elif isinstance(child, nn.Linear) and any(p.requires_grad for p in child.parameters(recurse=False)):
                setattr(parent, name, PerExampleLinear(child))
                found[id(getattr(parent, name))] = getattr(parent, name)
    layers = list(found.values())
    owned = [id(p) for layer in layers for p in layer.parameters(recurse=False)]
    if len(owned) != len(set(owned)):
        raise ModelError("E-LORA-TIED", "two trained layers share a parameter; per-example clipping refuses that")
    return layers
