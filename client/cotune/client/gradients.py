"""Per-example gradients in one backward pass.

Each trained linear layer gets its weight as one leaf per example, `[n, out, in]`, multiplied by `bmm`. One
backward pass of the sum of losses then leaves exactly each example's own gradient in its slice: for low-rank
adapters this costs the same operations as the batch gradient. It is plain autograd: no hook, no second pass,
nothing that `torch.compile` or gradient checkpointing would have to know of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] - the base of all of them

from cotune.shared.adapter import Vector
from cotune.shared.errors import ModelError
from cotune.shared.examples import Example
from cotune.shared.methods import trainable
from cotune.shared.network import Network, passes

MIXING_SETTINGS = ("output_router_logits", "expert_capacity")  # of a mixture of experts: a loss, a limit a batch
POOLED = ".modules_to_save."  # where PEFT puts a head
PROBES = (range(3, 11), range(10, 2, -1), [4] * 8)  # public token ids, as any vocabulary has
PROBE_TOLERANCE = 1e-3


@dataclass(frozen=True, repr=False)
class PerExample:
    """What each of n examples says by itself. As sensitive as the examples: it has no repr.

    Attributes:
        gradients: Parameter name -> (n, *shape), fp32, in the layout's order.
        losses: Each example's mean loss, shape (n,), fp32, in nats.
    """

    gradients: dict[str, Tensor]
    losses: Tensor


class PerExampleLinear(nn.Module):
    """A linear layer that can hold one copy of its parameters per example.

    Args:
        linear: The layer whose parameters it takes over.
        pooled: Whether an input of one vector an example is expected beside one of tokens.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, *, pooled: bool = False) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.copies: dict[str, Tensor] = {}
        self.pooled = pooled

    def expand(self, count: int) -> None:
        """Make `count` leaves of every trained parameter; 0 goes back to the plain layer."""
        trained = {name: p for name, p in self.named_parameters(recurse=False) if p.requires_grad}
        self.copies = {
            name: p.detach().expand(count, *p.shape).requires_grad_() for name, p in trained.items() if count
        }

    def forward(self, x: Tensor) -> Tensor:
        """x (n, tokens, in), or (n, in) if pooled, to (n, tokens, out) or (n, out).

        Guarantee: while expanded, row i of x meets copy i alone.

        Edge cases: an input that has not one row an example is refused, as when a layer sees the tokens of
        all examples in one list: nobody could say whose gradient is whose.

        Raises:
            ModelError: E-LORA-MIX.
        """
        x = x.to(self.weight.dtype)
        if not self.copies:
            return functional.linear(x, self.weight, self.bias)
        count = len(next(iter(self.copies.values())))
        if len(x) != count or x.dim() not in ((2, 3) if self.pooled else (3,)):
            raise _mixes(f"a trained layer gets an input of shape {tuple(x.shape)} for {count} examples")
        rows = x if x.dim() == 3 else x.unsqueeze(1)
        weight = self.copies.get("weight", self.weight.expand(count, *self.weight.shape))
        y = torch.bmm(rows, weight.transpose(1, 2))
        if self.bias is not None:
            y = y + self.copies.get("bias", self.bias.expand(count, *self.bias.shape)).unsqueeze(1)
        return y if x.dim() == 3 else y.squeeze(1)


class PerExampleGradients:
    """Gives per-example gradients of a network's trained parameters.

    Guarantee: slice i of every gradient, and loss i, depend on example i alone. Only parameters of
    instrumented linear layers may be trained; any other trained parameter is refused, so nothing escapes
    clipping.

    Edge cases: parameters shared by two layers are refused (their gradients would have to be joined before
    clipping); so is a network without trained parameters; a network in which examples meet is refused, be it
    by a batch norm that takes its mean over the batch, by a mixture of experts with a loss or a limit over
    the batch, or by anything else that shows when two public examples are tried beside each other.

    Raises:
        ModelError: E-LORA-TIED, E-LORA-LAYER, E-LORA-NONE or E-LORA-MIX.
    """

    def __init__(self, network: Network) -> None:
        _refuse_mixing(network.inner)
        self._network = network
        self._layers = _instrument(network.adapted)
        covered = {id(p): place for place, layer in enumerate(self._layers) for p in layer.parameters(recurse=False)}
        self._owners: dict[str, tuple[int, str]] = {}
        for name, parameter in trainable(network.adapted).items():
            if id(parameter) not in covered:
                raise ModelError("E-LORA-LAYER", f"{name}: only linear layers can be trained with per-example clipping")
            self._owners[name] = (covered[id(parameter)], name.rpartition(".")[2])
        if not self._owners:
            raise ModelError("E-LORA-NONE", "no parameter is trained")
        self._try_side_by_side()

    def of(self, examples: Sequence[Example], hidden: Sequence[Vector] | None) -> PerExample:
        """Gradients of each example's own mean loss.

        Args:
            examples: n examples.
            hidden: Their `Network.encode` outputs, or None to run the whole model.
        """
        places = list(passes(examples, len(examples)))
        order = [place for some in places for place in some]
        try:
            forward = [
                self._forward([examples[p] for p in some], hidden and [hidden[p] for p in some]) for some in places
            ]
            # The output layer reads the vocabulary, most of a small step: once for examples of all lengths.
            joined = torch.cat([states.detach() for states, _ in forward]).requires_grad_()
            losses = self._network.losses_from(joined, [examples[place] for place in order])
            losses.sum().backward()
            sizes = [len(states) for states, _ in forward]
            for (states, copies), gradient in zip(forward, _grad(joined).split(sizes), strict=True):
                self._use(copies)  # with checkpointing, layers run again
                states.backward(gradient)
        finally:
            self._use([{} for _ in self._layers])
        found = {
            name: _in_order([_grad(copies[layer].pop(part)) for _, copies in forward], places)
            for name, (layer, part) in self._owners.items()
        }
        return PerExample(found, _in_order([losses.detach()], [order]))

    def _forward(
        self, examples: Sequence[Example], hidden: Sequence[Vector] | None
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """One pass up to the output layer: the states it reads, and each layer's leaves."""
        for layer in self._layers:
            layer.expand(len(examples))
        return self._network.states(examples, hidden), [layer.copies for layer in self._layers]

    def _use(self, copies: Sequence[dict[str, Tensor]]) -> None:
        for layer, leaves in zip(self._layers, copies, strict=True):
            layer.copies = leaves

    def _try_side_by_side(self) -> None:
        """Refuse a network that says something else of an example when another stands beside it."""
        one, other, third = (Example(tuple(ids), 1, 0) for ids in PROBES)
        with torch.compiler.set_stance("force_eager"):
            found = [self.of([one, neighbour], None) for neighbour in (other, third)]
        first, second = (torch.cat([p.losses[:1], *(g[0].flatten() for g in p.gradients.values())]) for p in found)
        if not (second - first).norm() <= PROBE_TOLERANCE * first.norm():
            raise _mixes("an example's gradient changes with the example beside it")


def _grad(leaf: Tensor) -> Tensor:
    # A layer no loss depends on has no gradient: its per-example gradient is zero.
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)


def _in_order(parts: Sequence[Tensor], places: Sequence[list[int]]) -> Tensor:
    """The rows of all parts, each at its place."""
    if len(parts) == 1 and places[0] == sorted(places[0]):
        return parts[0]
    whole = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype, device=parts[0].device)
    for part, at in zip(parts, places, strict=True):
        whole[at] = part
    return whole


def _mixes(what: str) -> ModelError:
    return ModelError(
        "E-LORA-MIX", f"{what}; per-example clipping needs a model that keeps examples apart", param="model.base"
    )


def _refuse_mixing(inner: Any) -> None:
    for name, module in inner.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise _mixes(f"{name} is a batch norm over the batch")
    for setting in MIXING_SETTINGS:
        if getattr(inner.config, setting, None):
            raise _mixes(f"the model's {setting} joins the examples of a batch")


def _instrument(adapted: Any) -> list[PerExampleLinear]:
    """Replace every linear layer with trained parameters, once; returns the replacements."""
    found: dict[int, PerExampleLinear] = {}
    for path, parent in list(adapted.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PerExampleLinear):
                found[id(child)] = child
            elif isinstance(child, nn.Linear) and any(p.requires_grad for p in child.parameters(recurse=False)):
                layer = PerExampleLinear(child, pooled=POOLED in f".{path}.")
                setattr(parent, name, layer)
                found[id(layer)] = layer
    layers = list(found.values())
    owned = [id(p) for layer in layers for p in layer.parameters(recurse=False)]
    if len(owned) != len(set(owned)):
        raise ModelError("E-LORA-TIED", "two trained layers share a parameter; per-example clipping refuses that")
    return layers
