"""Tokens read off one gradient: the span check of a model's first layer (DAGER, Petrov et al. 2024, section 4).

The gradient of a LoRA B is a sum of (what came back at a token) x (A times the layer's input there), so its rows span
what A makes of the sentence's tokens. With rotary positions the first layer's input depends on the token alone: each
token of the vocabulary is tried, and those that lie in the span are in the sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cotune.client.clipping import clipped_sum, sum_by_unit
from cotune.client.gradients import PerExampleGradients
from cotune.client.noise import draw_noise, privatise
from cotune.client.randomness import RandomStream, secure_stream
from cotune.shared.errors import ModelError
from cotune.shared.evaluation import probe_records
from cotune.shared.examples import Example
from cotune.shared.job import Job
from cotune.shared.methods import attach, trainable
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.privacy.mechanism import Mechanism
from cotune.shared.records import read_records

RANK, TOKENS, TRIALS = 32, 24, 24
FEWEST_TOKENS = 4
MODULE = "v_proj"
NOMINAL_NOISE = 1.0  # for a run that has none


@dataclass(frozen=True)
class FirstLayer:
    """The first layer of a decoder as somebody sees it who is sent gradients; all of it is public.

    Attributes:
        network: The base with an adapter on that layer alone.
        words: What A makes of each token of the vocabulary, shape (vocabulary, rank).
        out: The layer's outputs: the gradient of B is (out, rank).
    """

    network: Network
    words: Tensor
    out: int

    @property
    def rank(self) -> int:
        """The adapter's rank."""
        return self.words.shape[1]


def gradient_leakage(job: Job) -> dict[str, Any]:
    """Share of a sentence's tokens that one gradient gives away, without DP and with the job's clipping and noise.

    The attacker sees the gradient of one sentence alone, the worst a coordinator can be sent, from an adapter on the
    first layer alone, and knows how many different tokens there are.

    Raises:
        ModelError: E-ATTACK-LEAK: the base is no decoder whose first layer can be read like that.
    """
    layer = _first_layer(job)
    sentences = _sentences(job, min(TOKENS, 3 * layer.rank // 4))
    noise = job.privacy.noise_multiplier if job.is_private and job.privacy.noise_multiplier != "auto" else None
    private, plain = (_one_release(job, multiplier) for multiplier in (noise or NOMINAL_NOISE, 0.0))
    stream, gradients = secure_stream(), PerExampleGradients(layer.network)
    without = [_recovered(layer, gradients, one, plain, stream) for one in sentences]
    with_dp = [_recovered(layer, gradients, one, private, stream) for one in sentences]
    return {
        "model": locate(job).name,
        "rank": layer.rank,
        "tokens": max(len(one.ids) for one in sentences),
        "trials": len(sentences),
        "recovered_without_dp": float(np.mean(without)),
        "recovered_with_dp": float(np.mean(with_dp)),
        "noise_multiplier": noise,
        "note": _note(job, noise),
    }


def _first_layer(job: Job) -> FirstLayer:
    base = locate(job)
    if job.task.kind == "classify":
        raise _unreadable("the model is a classifier, whose first layer also reads positions")
    model = load_model(base, job.replace(train={"checkpointing": False, "compile": False}))
    first: Any = next(iter(getattr(model.base_model, "layers", ())), None)
    module = getattr(getattr(first, "self_attn", None), MODULE, None)
    if module is None or not hasattr(first, "input_layernorm") or not hasattr(model.base_model, "rotary_emb"):
        raise _unreadable(f"its first layer has no {MODULE} that reads each token by itself")
    rank = min(RANK, *module.weight.shape)
    changes = {"r": rank, "alpha": float(rank), "target_modules": (MODULE,), "last_layers": "all", "ranks": {}}
    narrow = job.replace(lora=changes, aggregation={"rule": "ffa"}, train={"checkpointing": False, "compile": False})
    adapted = attach(model, narrow)
    for name, parameter in trainable(adapted).items():
        parameter.requires_grad_(".layers.0." in name)
    with torch.no_grad():
        words = first.input_layernorm(model.get_input_embeddings().weight).float()
        inner = first.self_attn.v_proj.lora_A["default"].weight
        return FirstLayer(Network(adapted, narrow), words @ inner.float().T, int(module.weight.shape[0]))


def _unreadable(why: str) -> ModelError:
    return ModelError("E-ATTACK-LEAK", f"gradient leakage was not tried: {why}", param="model.base")


def _one_release(job: Job, noise: float) -> Mechanism:
    """One sentence's gradient as the job would release it, with this noise; with none, it is not clipped either."""
    return Mechanism(
        sampling_probability=1.0,
        expected_batch_size=1,
        clipping_norm=job.privacy.clipping_norm,
        noise_multiplier=noise,
        private=noise > 0,
    )


def _sentences(job: Job, tokens: int) -> list[Example]:
    """Public rows as sentences of so many tokens at most."""
    tokenizer: Any = load_tokenizer(locate(job))
    rows = read_records(Path(job.eval.data))[:500] if job.eval.data else []
    texts = [" ".join(row.contents()) for row in [*rows, *probe_records(job)]]
    ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]) for text in texts]
    longest = sorted(ids, key=lambda one: -len(set(one)))[:TRIALS]
    return [Example(one, 1) for one in longest if len(one) >= FEWEST_TOKENS]


def _recovered(
    layer: FirstLayer, gradients: PerExampleGradients, sentence: Example, mechanism: Mechanism, stream: RandomStream
) -> float:
    """Share of a sentence's different tokens that are among those nearest to the span of its released gradient."""
    per_unit = sum_by_unit(gradients.of([sentence], None), [0], 1)
    noise = draw_noise(mechanism, layer.out * layer.rank, stream)
    released = privatise(clipped_sum(per_unit, mechanism), mechanism, noise)
    found = torch.from_numpy(released.gradient).reshape(layer.out, layer.rank).double()
    count = len(set(sentence.ids[:-1]))  # the last token is only predicted: nothing comes back at it
    span = torch.linalg.svd(found, full_matrices=False).Vh[:count]
    words = layer.words.double()
    apart = (words - words @ span.T @ span).norm(dim=1) / words.norm(dim=1).clamp(min=1e-12)
    nearest = set(torch.topk(apart, count, largest=False).indices.tolist())
    return len(nearest & set(sentence.ids)) / len(set(sentence.ids))


def _note(job: Job, noise: float | None) -> str:
    how = f"clipped to {job.privacy.clipping_norm:g}, noise multiplier {noise or NOMINAL_NOISE:g}"
    whose = "" if noise else f"; this run adds no noise, so {NOMINAL_NOISE:g} was taken for comparison"
    return (
        f"One sentence's gradient of the first layer's {MODULE} alone, {how}{whose}. A rank below the number of tokens"
        " hides a sentence from this attack only."
    )
