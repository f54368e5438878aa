"""DP-SGD over one round's local steps: sample, clip, noise, step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cotune.client.clipping import ClippedSum, PerUnit, clipped_sum, sum_by_unit
from cotune.client.data import SiteExamples
from cotune.client.gradients import PerExampleGradients
from cotune.client.noise import draw_noise, privatise
from cotune.client.randomness import RandomStream
from cotune.client.sampling import draw_batch
from cotune.shared.adapter import Layout
from cotune.shared.features import Features
from cotune.shared.job import Job, TrainSettings
from cotune.shared.methods import layout, trainable
from cotune.shared.network import Network, padded_length, passes
from cotune.shared.privacy.mechanism import Mechanism

FINAL_RATE = 0.1
HELD_BYTES = 2**28  # of gradients of units with several examples


@dataclass(frozen=True)
class RoundResult:
    """What a round gives away besides the adapter; all of it noised and accounted.

    Attributes:
        clipping_norm: Where adaptive clipping has got to; None for a norm that does not move.
        loss: Mean training loss over the round's steps, in nats; None if the job does not ask for it.
    """

    clipping_norm: float | None
    loss: float | None


class Trainer:
    """A network ready for DP-SGD; holds no site's data."""

    def __init__(self, network: Network, job: Job, model_sha256: str) -> None:
        self.network = network
        self.layout: Layout = layout(network.adapted)
        self.job_sha256 = job.sha256()
        self.model_sha256 = model_sha256
        self._job = job
        self._gradients = PerExampleGradients(network)

    def train_round(
        self,
        round_number: int,
        data: SiteExamples,
        features: Features,
        mechanism: Mechanism,
        stream: RandomStream,
        progress: Callable[[int], None],
    ) -> RoundResult:
        """Take the round's local steps on the network's adapter, in place.

        Guarantee: what the adapter becomes and what is returned depend on the examples only through
        `train.local_steps` calls of `privatise`, each on the clipped sums of one fresh Poisson batch of units
        with noise of its own: the event `mechanism.event(local_steps)` is all that is released. The optimiser
        and the moving clipping norm are post-processing; the optimiser starts anew each round.

        Edge cases: an empty batch is a step of noise alone, taken like any other.
        """
        parameters = trainable(self.network.adapted)
        optimiser = _optimiser(list(parameters.values()), self._job.train)
        losses: list[float] = []
        with ThreadPoolExecutor(1) as side:  # noise is made while gradients are computed
            for step in range(self._job.train.local_steps):
                batch = draw_batch(mechanism, data.units, stream)
                noise = side.submit(draw_noise, mechanism, self.layout.size, stream)
                clipped = self._sum(batch, data, features, mechanism)
                released = privatise(clipped, mechanism, noise.result())
                for name, values in self.layout.unflatten(released.gradient).items():
                    parameters[name].grad = torch.from_numpy(values.copy()).to(parameters[name].device)
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(self._job, (round_number - 1) * self._job.train.local_steps + step)
                optimiser.step()
                optimiser.zero_grad()
                mechanism = _moved(mechanism, released.below, self._job)
                losses += [] if released.loss is None else [released.loss]
                progress(step + 1)
        loss = sum(losses) / len(losses) if losses else None
        return RoundResult(mechanism.clipping_norm if mechanism.adaptive else None, loss)

    def _sum(self, batch: NDArray[np.intp], data: SiteExamples, features: Features, mechanism: Mechanism) -> ClippedSum:
        """Clipped sums over one Poisson batch, some units at a time; no noise in between."""
        at_once = self._job.train.microbatch
        if data.units < len(data.examples):  # gradients are held until a unit's last example
            at_once = max(1, HELD_BYTES // (8 * self.layout.size))
        units = sorted(
            (int(unit) for unit in batch), key=lambda unit: padded_length(len(data.examples[data.rows(unit)[-1]].ids))
        )
        total = ClippedSum.zero(self.layout.size)
        for start in range(0, len(units), at_once):
            total = total + clipped_sum(self._per_unit(units[start : start + at_once], data, features), mechanism)
        return total

    def _per_unit(self, units: Sequence[int], data: SiteExamples, features: Features) -> PerUnit:
        """Gradients of some units, each the sum over all its examples, however many passes that takes.

        Guarantee: what a unit adds depends on its own examples alone, but for less than a millionth of it: an
        example is padded by its own length, and shares a pass only with examples padded alike, so that others
        change nothing but the number of rows of a matrix product.

        Edge cases: a unit with more examples than a pass holds is summed over several.
        """
        rows = np.concatenate([data.rows(unit) for unit in units])
        owners = np.repeat(np.arange(len(units)), [len(data.rows(unit)) for unit in units])
        total: PerUnit | None = None
        for places in passes([data.examples[row] for row in rows], self._job.train.microbatch):
            some = [int(row) for row in rows[places]]
            found = self._gradients.of([data.examples[row] for row in some], features.of(some))
            part = sum_by_unit(found, owners[places], len(units))
            total = part if total is None else total + part
        assert total is not None  # noqa: S101 - a chunk has a unit, and a unit an example
        return total


def learning_rate(job: Job, step: int) -> float:
    """The public learning rate of a global step, counted from 0."""
    if job.train.schedule == "constant" or job.steps == 1:
        return job.train.learning_rate
    return job.train.learning_rate * (1 - (1 - FINAL_RATE) * step / (job.steps - 1))


def _moved(mechanism: Mechanism, below: float | None, job: Job) -> Mechanism:
    """The clipping norm after a step's noised share of units below it (Andrew et al. 2021, section 2.2)."""
    if below is None:
        return mechanism
    factor = math.exp(-job.privacy.clipping_rate * (below - job.privacy.clipping_quantile))
    return replace(mechanism, clipping_norm=mechanism.clipping_norm * factor)


def _optimiser(parameters: list[Any], settings: TrainSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    return torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=settings.momentum)
