"""Running a model on examples: the frozen lower layers once a record, the adapted top as often as needed.

The layers below the first adapter never change, so their output for a record is a constant of that record.
It is computed alone or beside other records; no value of one record enters another's (attention and norms
act within a row), which is what per-example clipping rests on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.shared.adapter import Vector
from cotune.shared.examples import Example
from cotune.shared.job import Job


class Network:
    """A base model with its adapter, and how to compute per-example losses with it."""

    def __init__(self, adapted: Any, job: Job) -> None:
        self.adapted = adapted
        self.inner = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
        self.classify = job.task.kind == "classify"
        self.hidden_size = int(self.inner.config.hidden_size)
        self._parts = None if self.classify else _split(self.inner, job)

    @property
    def splits(self) -> bool:
        """Whether the frozen lower layers can be run on their own."""
        return self._parts is not None

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> list[Vector]:
        """Lower layers' output of each example, shape (tokens, hidden_size). Needs `splits`."""
        assert self._parts is not None  # noqa: S101 - callers ask `splits` first
        hidden = self._parts[0](input_ids=_pad_ids(examples), use_cache=False).last_hidden_state
        return [hidden[row, : len(example.ids)].numpy() for row, example in enumerate(examples)]

    def logits(self, examples: Sequence[Example], hidden: Sequence[Vector] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits wherever something is learnt.

        Args:
            examples: n examples.
            hidden: Their `encode` outputs, or None to run the whole model.

        Returns:
            Logits (m, classes), targets (m,) and the row each belongs to (m,).
        """
        if self.classify:
            ids = _pad_ids(examples)
            mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(e.ids)] for e in examples])).long()
            targets = torch.tensor([example.label for example in examples])
            return self.inner(input_ids=ids, attention_mask=mask).logits, targets, torch.arange(len(examples))
        rows = torch.tensor([row for row, e in enumerate(examples) for _ in e.ids[e.start :]])
        columns = torch.tensor([i for e in examples for i in range(e.start - 1, len(e.ids) - 1)])
        targets = torch.tensor([token for e in examples for token in e.ids[e.start :]])
        if hidden is None or self._parts is None:
            # Padding is on the right and attention is causal: no real token ever sees it.
            return (
                self.inner(input_ids=_pad_ids(examples), use_cache=False).logits[rows, columns],
                targets,
                rows,
            )
        top = self._parts[1](inputs_embeds=_pad_hidden(hidden), use_cache=False).last_hidden_state
        return self.inner.lm_head(top[rows, columns]), targets, rows

    def losses(self, examples: Sequence[Example], hidden: Sequence[Vector] | None) -> Tensor:
        """Mean cross-entropy of each example over its own learnt tokens, shape (n,), in nats."""
        logits, targets, rows = self.logits(examples, hidden)
        return mean_by_row(functional.cross_entropy(logits.float(), targets, reduction="none"), rows, len(examples))


def mean_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Mean of the values that belong to each of `count` rows."""
    sums = torch.zeros(count, dtype=values.dtype).index_add(0, rows, values)
    return sums / torch.bincount(rows, minlength=count).clamp(min=1)


def _split(inner: Any, job: Job) -> tuple[Any, Any] | None:
    """Lower and upper part of a decoder, sharing its weights; None where that does not give the same logits."""
    backbone: Any = getattr(inner, "model", None)
    layers = getattr(backbone, "layers", None)
    if job.lora.last_layers == "all" or not isinstance(layers, nn.ModuleList) or not hasattr(backbone, "norm"):
        return None
    cut = len(layers) - job.lora.last_layers
    if cut < 1:
        return None
    lower = _with(backbone, layers=layers[:cut], norm=nn.Identity())
    upper = _with(backbone, layers=layers[cut:])
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        try:
            hidden = lower(input_ids=ids, use_cache=False).last_hidden_state
            split = inner.lm_head(upper(inputs_embeds=hidden, use_cache=False).last_hidden_state)
        except (TypeError, AttributeError, IndexError, KeyError):
            return None
        whole = inner(input_ids=ids, use_cache=False).logits
    return (lower, upper) if torch.allclose(split, whole, rtol=1e-4, atol=1e-4) else None


def _with(module: nn.Module, **children: nn.Module) -> nn.Module:
    """A shallow copy with some children replaced; all weights stay shared."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}  # pyright: ignore[reportPrivateUsage]
    return twin


def _pad_ids(examples: Sequence[Example]) -> Tensor:
    """Token ids (n, longest), zeros on the right: no padding token is needed."""
    ids = np.zeros((len(examples), max(len(e.ids) for e in examples)), dtype=np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
    return torch.from_numpy(ids)


def _pad_hidden(hidden: Sequence[Vector]) -> Tensor:
    padded = np.zeros((len(hidden), max(len(h) for h in hidden), hidden[0].shape[1]), dtype=np.float32)
    for row, values in enumerate(hidden):
        padded[row, : len(values)] = values
    return torch.from_numpy(padded)
