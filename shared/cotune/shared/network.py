"""Running a model on examples: the frozen lower layers once a record, the adapted top as often as needed.

The layers below the first adapter never change, so their output for a record is a constant of that record.
It is computed alone or beside other records; no value of one record enters another's (attention and norms
act within a row), which is what per-example clipping rests on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed
from transformers.modeling_layers import GradientCheckpointingLayer

from cotune.shared.adapter import Vector
from cotune.shared.errors import ModelError
from cotune.shared.examples import Example
from cotune.shared.job import Job


class Network:
    """A base model with its adapter, and how to compute per-example losses with it.

    With `train.checkpointing` it keeps one activation a layer, with `train.compile` it runs compiled; neither
    changes what is computed.

    Raises:
        ModelError: E-MODEL-CHECKPOINTING: the job asks for it and the architecture has none.
    """

    def __init__(self, adapted: Any, job: Job) -> None:
        self.adapted = adapted
        self.inner = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
        self.classify = job.task.kind == "classify"
        self.hidden_size = int(self.inner.config.hidden_size)
        self.device = next(self.inner.parameters()).device
        self._dtype: torch.dtype = self.inner.dtype
        self._body = None if self.classify else _body(self.inner)
        parts = None if self._body is None else _split(self.inner, job)
        self._lower, self._upper = parts or (None, None)
        if job.train.checkpointing:
            checkpoint(self.inner)
        if job.train.compile:
            for part in filter(None, (self._body or self.inner, self._upper)):
                part.compile()

    @property
    def splits(self) -> bool:
        """Whether the frozen lower layers can be run on their own."""
        return self._lower is not None

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> list[Vector]:
        """Lower layers' output of each example, shape (tokens, hidden_size), fp32. Needs `splits`."""
        assert self._lower is not None  # noqa: S101 - callers ask `splits` first
        hidden = self._lower(input_ids=self._ids(examples), use_cache=False).last_hidden_state.float().cpu()
        return [hidden[row, : len(example.ids)].numpy() for row, example in enumerate(examples)]

    def logits(self, examples: Sequence[Example], hidden: Sequence[Vector] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits wherever something is learnt, on the model's device.

        Args:
            examples: n examples.
            hidden: Their `encode` outputs, or None to run the whole model.

        Returns:
            Logits (m, classes), targets (m,) and the row each belongs to (m,).
        """
        return self._logits_from(self.states(examples, hidden), examples)

    def losses(self, examples: Sequence[Example], hidden: Sequence[Vector] | None) -> Tensor:
        """Mean cross-entropy of each example over its own learnt tokens, shape (n,), fp32, in nats."""
        return self.losses_from(self.states(examples, hidden), examples)

    def states(self, examples: Sequence[Example], hidden: Sequence[Vector] | None) -> Tensor:
        """What the output layer reads wherever something is learnt, shape (m, width); of a classifier the logits."""
        if self.classify:
            ids = self._ids(examples)
            lengths = self._tensor([[len(e.ids)] for e in examples])
            mask = (torch.arange(ids.shape[1], device=self.device) < lengths).long()
            return self.inner(input_ids=ids, attention_mask=mask).logits
        rows = self._tensor([row for row, e in enumerate(examples) for _ in e.ids[e.start :]])
        columns = self._tensor([i for e in examples for i in range(e.start - 1, len(e.ids) - 1)])
        # Padding is on the right and attention is causal: no real token ever sees it.
        if self._body is None:
            return self.inner(input_ids=self._ids(examples), use_cache=False).logits[rows, columns]
        if hidden is None or self._upper is None:
            states = self._body(input_ids=self._ids(examples), use_cache=False)
        else:
            states = self._upper(inputs_embeds=self._states(hidden), use_cache=False)
        return states.last_hidden_state[rows, columns]

    def losses_from(self, states: Tensor, examples: Sequence[Example]) -> Tensor:
        """As `losses`, from the states of any number of passes one after the other."""
        logits, targets, rows = self._logits_from(states, examples)
        return mean_by_row(functional.cross_entropy(logits.float(), targets, reduction="none"), rows, len(examples))

    def _logits_from(self, states: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
        if self.classify:
            targets = self._tensor([example.label for example in examples])
            return states, targets, torch.arange(len(examples), device=self.device)
        rows = self._tensor([row for row, e in enumerate(examples) for _ in e.ids[e.start :]])
        targets = self._tensor([token for e in examples for token in e.ids[e.start :]])
        # The vocabulary is wide: only the places where something is learnt meet it.
        return states if self._body is None else self.inner.get_output_embeddings()(states), targets, rows

    def _tensor(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def _ids(self, examples: Sequence[Example]) -> Tensor:
        """Token ids (n, padded length of the longest), zeros on the right: no padding token is needed."""
        ids = np.zeros((len(examples), self._width(max(len(e.ids) for e in examples))), dtype=np.int64)
        for row, example in enumerate(examples):
            ids[row, : len(example.ids)] = example.ids
        return torch.from_numpy(ids).to(self.device)

    def _states(self, hidden: Sequence[Vector]) -> Tensor:
        width = self._width(max(len(h) for h in hidden))
        padded = np.zeros((len(hidden), width, hidden[0].shape[1]), dtype=np.float32)
        for row, values in enumerate(hidden):
            padded[row, : len(values)] = values
        return torch.from_numpy(padded).to(self.device, self._dtype)

    def _width(self, longest: int) -> int:
        """What rows are padded to; no wider than the model has positions, unless a row is."""
        positions = getattr(self.inner.config, "max_position_embeddings", None) or math.inf
        return max(longest, int(min(padded_length(longest), positions)))


def padded_length(tokens: int) -> int:
    """The length a row of so many tokens is padded to: 8, 16, 24, 32, then two to an octave.

    How a sum is rounded depends on the padding. So that no row's rounding depends on another row, examples that
    are trained on share a pass only with those of their own padded length.
    """
    step = max(8, 2 ** ((tokens - 1).bit_length() - 2))
    return -(-tokens // step) * step


def passes(examples: Sequence[Example], most: int) -> Iterator[list[int]]:
    """Places of examples that are padded alike, at most so many together: what may share a pass."""
    places: dict[int, list[int]] = {}
    for place, example in enumerate(examples):
        places.setdefault(padded_length(len(example.ids)), []).append(place)
    for group in places.values():
        for start in range(0, len(group), most):
            yield group[start : start + most]


def mean_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Mean of the values that belong to each of `count` rows."""
    sums = torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, rows, values)
    return sums / torch.bincount(rows, minlength=count).clamp(min=1)


def checkpoint(inner: Any, *, reentrant: bool = False) -> None:
    """Keep one activation a layer, and compute the others again in the backward pass. Stays in evaluation mode.

    Raises:
        ModelError: E-MODEL-CHECKPOINTING: no layer of this architecture can be run again by itself.
    """
    layers: list[Any] = [module for module in inner.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            "E-MODEL-CHECKPOINTING",
            f"{type(inner).__name__} has no layers that can be checkpointed",
            param="train.checkpointing",
            hint="set train.checkpointing = false and a smaller train.microbatch",
        )
    for layer in layers:
        layer.forward = partial(_run_again, layer.forward, reentrant)


def _run_again(forward: Any, reentrant: bool, *inputs: Any, **settings: Any) -> Any:
    # Nothing in a layer is random: there is no generator's state to keep.
    run = partial(forward, **settings)
    return recomputed(run, *inputs, use_reentrant=reentrant, preserve_rng_state=False)


def _body(inner: Any) -> Any:
    """The decoder without its output layer; None where the two one after the other do not give the same logits."""
    body, ids = inner.base_model, torch.arange(3, 11, device=next(inner.parameters()).device)[None]
    with torch.no_grad():
        whole = inner(input_ids=ids, use_cache=False).logits
        try:
            apart = inner.get_output_embeddings()(body(input_ids=ids, use_cache=False).last_hidden_state)
        except (TypeError, AttributeError):
            return None
    return body if _alike(apart, whole) else None


def _split(inner: Any, job: Job) -> tuple[Any, Any] | None:
    """Lower and upper part of a decoder, sharing its weights; None where that does not give the same logits."""
    body = inner.base_model
    layers = getattr(body, "layers", None)
    if job.lora.last_layers == "all" or not isinstance(layers, nn.ModuleList) or not hasattr(body, "norm"):
        return None
    cut = len(layers) - job.lora.last_layers
    if cut < 1:
        return None
    lower = _with(body, layers=layers[:cut], norm=nn.Identity())
    upper = _with(body, layers=layers[cut:])
    ids = torch.arange(3, 11, device=next(inner.parameters()).device)[None]
    with torch.no_grad():
        try:
            hidden = lower(input_ids=ids, use_cache=False).last_hidden_state
            split = upper(inputs_embeds=hidden, use_cache=False).last_hidden_state
        except (TypeError, AttributeError, IndexError, KeyError):
            return None
        whole = body(input_ids=ids, use_cache=False).last_hidden_state
    return (lower, upper) if _alike(split, whole) else None


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def _with(module: nn.Module, **children: nn.Module) -> nn.Module:
    """A shallow copy with some children replaced; all weights stay shared."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}  # pyright: ignore[reportPrivateUsage]
    return twin
