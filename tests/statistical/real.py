"""The real trainer on a tiny model, and the adapter it moves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cotune.client.data import SiteExamples, prepare
from cotune.client.training import Start, Trainer
from cotune.shared.job import Job
from cotune.shared.methods import attach, read, trainable
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.records import read_records


def trainer_of(job: Job) -> Trainer:
    """A trainer of the job's own model, its adapter at the public initial values."""
    return Trainer(Network(attach(load_model(locate(job), job), job), job), job, "0" * 64)


def here(trainer: Trainer, number: int = 1) -> Start:
    """A round that starts where the trainer's adapter is."""
    return Start(number, read(trainer.network.adapted))


def data_of(job: Job) -> SiteExamples:
    """The job's file as one site's examples."""
    return prepare(read_records(Path(str(job.data.train))), load_tokenizer(locate(job)), job)


@dataclass(frozen=True)
class Adapter:
    """The trained numbers of a trainer, flat, to read and write many times a second."""

    parameters: dict[str, torch.Tensor]

    def read(self) -> NDArray[np.float64]:
        return torch.cat([p.detach().flatten() for p in self.parameters.values()]).double().numpy()

    def write(self, values: NDArray[np.float64]) -> None:
        start = 0
        with torch.no_grad():
            for p in self.parameters.values():
                p.copy_(torch.from_numpy(values[start : start + p.numel()]).reshape(p.shape))
                start += p.numel()


def adapter_of(trainer: Trainer) -> Adapter:
    """The adapter that the trainer moves, in the order in which it is sent."""
    parameters = trainable(trainer.network.adapted)
    assert tuple(parameters) == trainer.layout.trained
    return Adapter(parameters)
