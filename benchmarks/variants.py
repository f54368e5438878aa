"""The training steps that are compared: plain PEFT, what a site runs, a control, and Opacus three ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from cotune.client.data import SiteExamples
from cotune.client.randomness import secure_stream
from cotune.client.training import Start, Trainer
from cotune.shared.examples import Example
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.methods import attach, read, trainable, write
from cotune.shared.network import Network
from cotune.shared.placement import device
from cotune.shared.privacy.mechanism import mechanism_of

# So little noise that gradients can be compared; drawing and adding it costs what any noise costs.
NOISE_MULTIPLIER = 1e-12
LEARNING_RATE = 1e-9  # every step then starts from the same adapter
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Model:
    """A Llama-shaped model with random weights; its adapter has rank 8, and both A and B are trained.

    Attributes:
        heads: Attention heads, and heads of keys and values.
    """

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: tuple[int, int]
    targets: tuple[str, ...] = ALL_LINEAR
    dtype: str = "float32"

    def build(self) -> Any:
        """The frozen base model, the same one each time."""
        torch.manual_seed(17)
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads[0],
            num_key_value_heads=self.heads[1],
            tie_word_embeddings=True,
        )
        model: Any = LlamaForCausalLM(config)
        return model.to(device(), getattr(torch, self.dtype)).requires_grad_(False).eval()


MODELS = {
    "llama-9m-random": Model(4096, 384, 1024, 4, (6, 6)),
    "smollm2-135m-shape": Model(49152, 576, 1536, 30, (9, 3), targets=("q_proj", "v_proj")),
    "llama-1b-shape": Model(128256, 2048, 8192, 16, (32, 8), dtype="bfloat16"),
}


@dataclass(frozen=True)
class Case:
    """One model on batches of one length.

    Attributes:
        tokens: Of every example; all but the first are learnt.
        batch: Examples, each its own unit.
        repeats: How often PEFT and cotune are timed.
        others: In how many of these repeats the other variants are timed too.
    """

    model: str
    tokens: int
    batch: int
    repeats: int = 1
    others: int = 1

    @property
    def ids(self) -> Tensor:
        """Token ids, shape (batch, tokens)."""
        drawn = torch.randint(4, 4000, (self.batch, self.tokens), generator=torch.Generator().manual_seed(3))
        return drawn.to(device())

    def job(self, clipping_norm: float) -> Job:
        """One private step in which every unit is drawn: the sampling probability is 1."""
        model, batch = MODELS[self.model], self.batch
        settings = {
            "schema": 1,
            "model": {"base": "random", "dtype": model.dtype},
            "lora": {"r": 8, "target_modules": model.targets},
            "aggregation": {"rule": "fedavg_ab"},
            "data": {"train": "random.jsonl", "records_per_site": batch},
            "train": {"batch_size": batch, "microbatch": batch, "local_steps": 1, "learning_rate": LEARNING_RATE},
            "privacy": {"clipping_norm": clipping_norm, "noise_multiplier": NOISE_MULTIPLIER},
        }
        return Job.model_validate(settings)

    def adapted(self) -> Any:
        """The model with a PEFT adapter in which nothing is zero."""
        adapted = attach(MODELS[self.model].build(), self.job(1.0))
        random = np.random.default_rng(5)
        write(
            adapted, {name: (random.normal(size=a.shape) * 0.02).astype(a.dtype) for name, a in read(adapted).items()}
        )
        return adapted


@dataclass(frozen=True)
class Variant:
    """A model ready to train, and one training step on the case's batch."""

    adapted: Any
    step: Callable[[], None]


def peft(case: Case, clipping_norm: float) -> Variant:
    """The reference: plain PEFT, nothing clipped, no noise."""
    del clipping_norm
    adapted, ids = case.adapted(), case.ids
    optimiser = _sgd(adapted)

    def step() -> None:
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return Variant(adapted, step)


def cotune(case: Case, clipping_norm: float) -> Variant:
    """What a site runs: batch, per-example gradients, sums by unit, clipping, noise, optimiser."""
    job = case.job(clipping_norm)
    network = Network(case.adapted(), job)
    examples = [Example(tuple(ids), 1) for ids in case.ids.tolist()]
    data = SiteExamples(examples, np.arange(case.batch), case.batch)
    trainer, features = Trainer(network, job, ""), Features(network, examples)
    mechanism, stream = mechanism_of(job), secure_stream()
    start = Start(1, read(network.adapted))

    def step() -> None:
        trainer.train_round(start, data, features, mechanism, stream, lambda _: None)

    return Variant(network.adapted, step)


def cotune_plain(case: Case, clipping_norm: float) -> Variant:
    """The control: cotune's way to the losses, but the batch's gradient, nothing clipped, no noise."""
    network = Network(case.adapted(), case.job(clipping_norm))
    examples = [Example(tuple(ids), 1) for ids in case.ids.tolist()]
    optimiser = _sgd(network.adapted)

    def step() -> None:
        network.losses(examples, None).mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return Variant(network.adapted, step)


def opacus_hooks(case: Case, clipping_norm: float) -> Variant:
    """Opacus, every per-example gradient kept until the optimiser clips."""
    adapted, ids = case.adapted(), case.ids
    module = GradSampleModule(adapted.train(), strict=False)  # no layer has dropout, and the hooks only work then
    optimiser = DPOptimizer(_sgd(adapted), **_opacus(case, clipping_norm))

    def step() -> None:
        module(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return Variant(adapted, step)


def opacus_twice(case: Case, clipping_norm: float, *, ghost: bool) -> Variant:
    """Opacus with two backward passes, one for the norms and one for the clipped gradients."""
    adapted, ids = case.adapted(), case.ids
    targets = functional.pad(ids[:, 1:], (0, 1), value=-100)  # as transformers does: the logits are not copied
    module = GradSampleModuleFastGradientClipping(
        adapted.train(),
        strict=False,
        max_grad_norm=clipping_norm,  # pyright: ignore[reportArgumentType] - its default is an int, a float is meant
        use_ghost_clipping=ghost,
    )
    optimiser = DPOptimizerFastGradientClipping(_sgd(adapted), **_opacus(case, clipping_norm))
    loss = DPLossFastGradientClipping(module, optimiser, nn.CrossEntropyLoss())

    def step() -> None:
        logits = module(input_ids=ids, use_cache=False).logits.float()
        loss(logits.flatten(0, 1), targets.flatten(), shape=logits.shape).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return Variant(adapted, step)


UNCLIPPED = ("peft", "cotune-plain")
VARIANTS: dict[str, Callable[[Case, float], Variant]] = {
    "peft": peft,
    "cotune": cotune,
    "cotune-plain": cotune_plain,
    "opacus-hooks": opacus_hooks,
    "opacus-ghost": lambda case, norm: opacus_twice(case, norm, ghost=True),
    "opacus-fgc": lambda case, norm: opacus_twice(case, norm, ghost=False),
}


def _sgd(adapted: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(adapted).values(), lr=LEARNING_RATE)


def _opacus(case: Case, clipping_norm: float) -> dict[str, Any]:
    return {
        "noise_multiplier": NOISE_MULTIPLIER,
        "max_grad_norm": clipping_norm,
        "expected_batch_size": case.batch,
    }
