"""DP-SGD over one round's local steps: sample, clip, noise, step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cotune.client.clipping import PerExampleGradients, clipped_sum
from cotune.client.noise import privatise
from cotune.client.randomness import RandomStream
from cotune.client.sampling import draw_batch
from cotune.shared.adapter import Layout
from cotune.shared.examples import Example
from cotune.shared.features import Features
from cotune.shared.job import Job, TrainSettings
from cotune.shared.methods import layout, trainable
from cotune.shared.network import Network
from cotune.shared.privacy.mechanism import Mechanism

FINAL_RATE = 0.1


class Trainer:
    """A network ready for DP-SGD; holds no site's data."""

    def __init__(self, network: Network, job: Job) -> None:
        self.network = network
        self.layout: Layout = layout(network.adapted)
        self.job_sha256 = job.sha256()
        self._job = job
        self._gradients = PerExampleGradients(network)

    def train_round(
        self,
        round_number: int,
        examples: Sequence[Example],
        features: Features,
        mechanism: Mechanism,
        stream: RandomStream,
        progress: Callable[[int], None],
    ) -> None:
        """Take the round's local steps on the network's adapter, in place.

        Guarantee: what the adapter becomes depends on the examples only through `train.local_steps` calls
        of `privatise`, each on the clipped sum of one fresh Poisson batch: the event
        `mechanism.event(local_steps)` is all that is released. Everything the optimiser does is
        post-processing; it starts anew each round.

        Edge cases: an empty batch is a step of noise alone, taken like any other.
        """
        parameters = trainable(self.network.adapted)
        optimiser = _optimiser(list(parameters.values()), self._job.train)
        for step in range(self._job.train.local_steps):
            batch = draw_batch(mechanism, len(examples), stream)
            gradient = privatise(self._sum(batch, examples, features, mechanism), mechanism, stream)
            for name, values in self.layout.unflatten(gradient).items():
                parameters[name].grad = torch.from_numpy(values.copy())
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(self._job, (round_number - 1) * self._job.train.local_steps + step)
            optimiser.step()
            optimiser.zero_grad()
            progress(step + 1)

    def _sum(
        self, batch: NDArray[np.intp], examples: Sequence[Example], features: Features, mechanism: Mechanism
    ) -> NDArray[np.float64]:
        """Clipped sum over one Poisson batch, in microbatches of like length; no noise in between."""
        total = np.zeros(self.layout.size)
        rows = sorted((int(row) for row in batch), key=lambda row: len(examples[row].ids))
        for start in range(0, len(rows), self._job.train.microbatch):
            chunk = rows[start : start + self._job.train.microbatch]
            gradients = self._gradients.of([examples[row] for row in chunk], features.of(chunk))
            total += clipped_sum(gradients, mechanism)
        return total


def learning_rate(job: Job, step: int) -> float:
    """The public learning rate of a global step, counted from 0."""
    if job.train.schedule == "constant" or job.steps == 1:
        return job.train.learning_rate
    return job.train.learning_rate * (1 - (1 - FINAL_RATE) * step / (job.steps - 1))


def _optimiser(parameters: list[Any], settings: TrainSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    return torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=settings.momentum)
