"""Rounds of the real trainer over a few tiny records, for tests of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cotune.client.clipping import ClippedSum
from cotune.client.data import SiteExamples
from cotune.client.noise import draw_noise, privatise
from cotune.client.randomness import RandomStream, reproducible_stream
from cotune.client.training import Start, Trainer
from cotune.shared.adapter import Vector
from cotune.shared.examples import Example, tokenize
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.methods import attach, read, trainable, write
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.privacy.mechanism import Mechanism, mechanism_of
from cotune.shared.records import read_records
from cotune.shared.schedule import learning_rate

OPEN = {"level": "none"}
PRIVATE = {"noise_multiplier": 2.0, "delta": 1e-3}
OWNERS = np.array([0] * 8 + [1] * 1 + [2] * 5 + [3] * 11 + [4] * 2 + [5] * 3)  # of thirty records


def network_of(job: Job) -> Network:
    return Network(attach(load_model(locate(job), job), job), job)


def examples_of(job: Job) -> list[Example]:
    """Thirty examples of several lengths, so that sorting and padding have something to do."""
    whole = tokenize(read_records(Path(str(job.data.train)))[:30], load_tokenizer(locate(job)), job)
    return [Example(e.ids[i % 5 :], max(0, e.start - i % 5), e.label) for i, e in enumerate(whole)]


def trainer_of(job: Job) -> Trainer:
    return Trainer(network_of(job), job, "0" * 64)


def by_record(examples: list[Example]) -> SiteExamples:
    """Every example its own unit."""
    return SiteExamples(examples, np.arange(len(examples)), len(examples))


def by_person(examples: list[Example]) -> SiteExamples:
    """Thirty examples of six persons."""
    return SiteExamples(examples, OWNERS, 6)


def stream() -> RandomStream:
    return reproducible_stream(1, "site-1", 1)


def nobody(job: Job) -> Mechanism:
    """The job's mechanism, at a rate so small that no record is ever drawn."""
    return replace(mechanism_of(job), sampling_probability=1e-15)


def noise_of(mechanism: Mechanism, size: int, source: RandomStream) -> Vector:
    """What a step with an empty batch releases."""
    return privatise(ClippedSum.zero(size), mechanism, draw_noise(mechanism, size, source)).gradient


def train(
    trainer: Trainer,
    job: Job,
    *,
    number: int = 1,
    mechanism: Mechanism | None = None,
    features: Features | None = None,
    data: SiteExamples | None = None,
) -> dict[str, Vector]:
    """One round over the job's first thirty records, or over other data; the adapter afterwards."""
    data = data or by_record(examples_of(job))
    features = features or Features(trainer.network, data.examples)
    begin = Start(number, read(trainer.network.adapted))
    trainer.train_round(begin, data, features, mechanism or mechanism_of(job), stream(), lambda _step: None)
    return read(trainer.network.adapted)


def by_hand(
    job: Job,
    number: int,
    start: Mapping[str, Vector],
    correction: Mapping[str, Vector] | None = None,
    examples: list[Example] | None = None,
) -> dict[str, Vector]:
    """A round of full batches written out: w <- w - rate (mean gradient + proximal (w - w_start) + correction)."""
    network, examples = network_of(job), examples or examples_of(job)
    write(network.adapted, start)
    weights = trainable(network.adapted)
    for step in range((number - 1) * job.train.local_steps, number * job.train.local_steps):
        loss = network.losses(examples, None).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                pull = job.train.proximal * (weight - torch.from_numpy(start[name]))
                added = torch.from_numpy((correction or {}).get(name, np.zeros(weight.shape, dtype=np.float32)))
                weight.sub_(learning_rate(job, step) * (gradient + pull + added))
    return read(network.adapted)
