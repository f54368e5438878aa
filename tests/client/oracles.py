"""Networks, examples and other people's gradients of them: what per-example gradients are held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cotune.shared.examples import Example, tokenize
from cotune.shared.job import Job
from cotune.shared.methods import attach, read, trainable, write
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.records import read_records

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT = ("query", "key", "value", "dense")
CLASSIFY: dict[str, Any] = {"kind": "classify", "labels": ["cardio", "derma", "pulmo"]}
BOTH = {"rule": "fedavg_ab"}  # A and B are trained
WAYS = ("B, lower layers kept", "A and B, lower layers kept", "seven projections", "encoder")
OWNERS = (0, 2, 0, 1, 2, 0, 2)  # seven examples of three persons
TEXTS = (
    "The patient complains of chest pain since two days.",
    "Skin rash on the left arm, itching, no fever, seen by the nurse on Monday.",
    "Chronic cough.",
    "Acute pain in the upper tooth, swelling, sent home with antibiotics.",
    "No complaints.",
    "Blurred vision of the right eye since the morning, no headache.",
    "Follow-up after surgery of the knee.",
)


def job_of(way: str, make_job: Any, tiny_encoder: Path) -> Job:
    """A job that trains in one of the ways that there are."""
    match way:
        case "B, lower layers kept":
            return make_job()
        case "A and B, lower layers kept":
            return make_job(aggregation=BOTH)
        case "seven projections":
            return make_job(aggregation=BOTH, lora={"last_layers": "all", "target_modules": LLAMA})
        case _:
            lora = {"target_modules": BERT}
            return make_job(model={"base": str(tiny_encoder)}, task=CLASSIFY, aggregation=BOTH, lora=lora)


def network_of(job: Job, scale: float = 0.1) -> Network:
    """The job's network, with an adapter in which nothing is zero."""
    network = Network(attach(load_model(locate(job), job), job), job)
    random = np.random.default_rng(5)
    values = {name: random.normal(size=a.shape) * scale for name, a in read(network.adapted).items()}
    write(network.adapted, {name: value.astype(np.float32) for name, value in values.items()})
    return network


def examples_of(job: Job, count: int = 7) -> list[Example]:
    """Examples of several lengths, so that some of a batch are padded."""
    records = read_records(Path(str(job.data.train)))[:count]
    whole = tokenize(records, load_tokenizer(locate(job)), job)
    return [Example(e.ids[i % 5 :], max(0, e.start - i % 5), e.label) for i, e in enumerate(whole)]


def real_examples(job: Job) -> list[Example]:
    """Seven sentences in the tokens of a real model."""
    tokenizer, start = load_tokenizer(locate(job)), int(job.task.kind == "completion")
    return [Example(tuple(tokenizer(text)["input_ids"]), start, row % 3) for row, text in enumerate(TEXTS)]


def hidden_of(network: Network, examples: Sequence[Example]) -> list[Any] | None:
    """The lower layers' output, where there is such a thing."""
    return network.encode(examples) if network.splits else None


def one_by_one(network: Network, groups: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
    """Plain autograd: of each group, every example alone, none of them padded; the gradients add up."""
    found: dict[str, list[Tensor]] = {name: [] for name in trainable(network.adapted)}
    for group in groups:
        for example in group:
            network.losses([example], None).sum().backward()
        for name, parameter in trainable(network.adapted).items():
            found[name].append(parameter.grad.clone())
            parameter.grad = None
    return {name: torch.stack(grads) for name, grads in found.items()}


def of_opacus(network: Network, examples: Sequence[Example]) -> dict[str, Tensor]:
    """What the hooks of Opacus find; the network is of no use afterwards."""
    from opacus import GradSampleModule

    network.adapted.train()  # Opacus' hooks only work then
    for module in network.adapted.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    GradSampleModule(network.adapted, loss_reduction="sum", strict=False)
    network.losses(examples, hidden_of(network, examples)).sum().backward()
    return {name: p.grad_sample.detach() for name, p in trainable(network.adapted).items()}


def persons(examples: Sequence[Example], owners: Sequence[int] = OWNERS) -> list[list[Example]]:
    """The examples of each person."""
    return [[e for e, owner in zip(examples, owners, strict=True) if owner == unit] for unit in range(max(owners) + 1)]


def summed(gradients: dict[str, Tensor], owners: Sequence[int] = OWNERS) -> dict[str, Tensor]:
    """Gradients of examples added up by person, one after the other."""
    units = range(max(owners) + 1)
    rows = [[row for row, owner in enumerate(owners) if owner == unit] for unit in units]
    return {name: torch.stack([g[own].sum(0) for own in rows]) for name, g in gradients.items()}


def errors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """Relative distance of each row, all parameters together: what clipping sees."""
    one, other = (torch.cat([values[name].flatten(1) for name in wanted], 1) for values in (got, wanted))
    return (one - other).norm(dim=1) / other.norm(dim=1)


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every parameter of every row, relative to its own length; none of them is zero."""
    assert got.keys() == wanted.keys()
    for name, reference in wanted.items():
        size = reference.flatten(1).norm(dim=1)
        assert got[name].shape == reference.shape
        assert float(size.min()) > 1e-6, f"{name}: nothing to compare"
        assert float(((got[name] - reference).flatten(1).norm(dim=1) / size).max()) <= tolerance, name
