"""DP-SGD over one round's local steps: sample, clip, noise, step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cotune.client.clipping import ClippedSum, PerUnit, clipped_sum, sum_by_unit
from cotune.client.data import SiteExamples
from cotune.client.gradients import PerExampleGradients
from cotune.client.leaves import Leaves, merged
from cotune.client.noise import draw_noise, privatise
from cotune.client.randomness import RandomStream
from cotune.client.sampling import draw_batch
from cotune.shared.adapter import Layout, Vector
from cotune.shared.aggregation import OFFSET_A, OFFSET_B, trained_at
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.methods import layout as layout_of_adapter
from cotune.shared.methods import write
from cotune.shared.network import Network, padded_length
from cotune.shared.privacy.mechanism import Mechanism
from cotune.shared.schedule import learning_rate
from cotune.shared.sections import TrainSettings

HELD_BYTES = 2**28  # of gradients of units with several examples


@dataclass(frozen=True)
class Start:
    """Where a round starts; all of it public or noised before.

    Attributes:
        round: Counted from 1.
        arrays: The whole adapter by name, at the site's rank, with an offset if the rule keeps one.
        correction: By name of a trained tensor: what SCAFFOLD adds to each of its gradients.
        personal: By name: the tensors that are the site's own, instead of what `arrays` has there.
    """

    round: int
    arrays: Mapping[str, Vector]
    correction: Mapping[str, Vector] = field(default_factory=dict)
    personal: Mapping[str, Vector] = field(default_factory=dict)

    @property
    def own(self) -> dict[str, Vector]:
        """The adapter without the offset, which is merged into the base."""
        whole = {**self.arrays, **self.personal}
        return {name: array for name, array in whole.items() if OFFSET_A not in name and OFFSET_B not in name}


@dataclass(frozen=True)
class RoundResult:
    """What a round gives away; all of it noised and accounted.

    Attributes:
        arrays: The trained tensors as they are now, by name.
        clipping_norm: Where adaptive clipping has got to; None for a norm that does not move.
        loss: Mean training loss over the round's steps, in nats; None if the job does not ask for it.
    """

    arrays: Mapping[str, Vector]
    clipping_norm: float | None
    loss: float | None


class Trainer:
    """A network ready for DP-SGD; holds no site's data."""

    def __init__(self, network: Network, job: Job, model_sha256: str) -> None:
        self.network = network
        # At the job's rank, whatever the rank of whoever used the network before.
        self.layout: Layout = layout_of_adapter(network.adapted, job.rule).at_rank(job.lora.r)
        self.job_sha256 = job.sha256()
        self.model_sha256 = model_sha256
        self._job = job
        self._gradients = PerExampleGradients(network)

    def train_round(
        self,
        start: Start,
        data: SiteExamples,
        features: Features,
        mechanism: Mechanism,
        stream: RandomStream,
        progress: Callable[[int], None],
    ) -> RoundResult:
        """Take the round's local steps on the network's adapter.

        Guarantee: what the adapter becomes and what is returned depend on the examples only through
        `train.local_steps` calls of `privatise`, each on the clipped sums of one fresh Poisson batch of units
        with noise of its own: the event `mechanism.event(local_steps)` is all that is released. The optimiser,
        the pull of FedProx, the correction of SCAFFOLD and the moving clipping norm are post-processing; the
        optimiser starts anew each round. A step clips and noises the tensors it trains, and releases no others.

        Edge cases: an empty batch is a step of noise alone, taken like any other.
        """
        job, adapted = self._job, self.network.adapted
        layout = Layout({name: array.shape for name, array in start.own.items()}, self.layout.trained)
        first = (start.round - 1) * job.train.local_steps
        losses: list[float] = []
        write(adapted, start.own)
        leaves = Leaves(adapted, layout, start.arrays)
        optimiser = _optimiser(list(leaves.parameters.values()), job.train)
        with merged(adapted, start.arrays), ThreadPoolExecutor(1) as side:  # noise is made beside the gradients
            for step in range(first, first + job.train.local_steps):
                part = layout.only(trained_at(job.rule, layout.trained, start.round, step))
                batch = draw_batch(mechanism, data.units, stream)
                noise = side.submit(draw_noise, mechanism, part.size, stream)
                clipped = self._sum(batch, data, features, mechanism, leaves, part)
                released = privatise(clipped, mechanism, noise.result())
                _step(optimiser, leaves, part.unflatten(released.gradient), start, learning_rate(job, step), job)
                mechanism = _moved(mechanism, released.below, job)
                losses += [] if released.loss is None else [released.loss]
                progress(step - first + 1)
        loss = sum(losses) / len(losses) if losses else None
        return RoundResult(leaves.values(), mechanism.clipping_norm if mechanism.adaptive else None, loss)

    def _sum(
        self,
        batch: NDArray[np.intp],
        data: SiteExamples,
        features: Features,
        mechanism: Mechanism,
        leaves: Leaves,
        part: Layout,
    ) -> ClippedSum:
        """Clipped sums over one Poisson batch, some units at a time; no noise in between."""
        at_once = self._job.train.microbatch
        if data.units < len(data.examples):  # gradients are held until a unit's last example
            at_once = max(1, HELD_BYTES // (8 * part.size))
        units = sorted(
            (int(unit) for unit in batch), key=lambda unit: padded_length(len(data.examples[data.rows(unit)[-1]].ids))
        )
        total = ClippedSum.zero(part.size)
        for start in range(0, len(units), at_once):
            found = self._per_unit(units[start : start + at_once], data, features, leaves, part)
            total = total + clipped_sum(found, mechanism)
        return total

    def _per_unit(
        self, units: Sequence[int], data: SiteExamples, features: Features, leaves: Leaves, part: Layout
    ) -> PerUnit:
        """A step's gradients of some units, each the sum over all its examples, however many passes that takes.

        Guarantee: what a unit adds depends on its own examples alone, but for less than a millionth of it: an
        example is padded by its own length, and shares a pass only with examples padded alike, so that others
        change nothing but the number of rows of a matrix product.

        Edge cases: a unit with more examples than a pass holds is summed over several.
        """
        rows = np.concatenate([data.rows(unit) for unit in units])
        owners = np.repeat(np.arange(len(units)), [len(data.rows(unit)) for unit in units])
        order = np.argsort([padded_length(len(data.examples[row].ids)) for row in rows], kind="stable")
        total: PerUnit | None = None
        for start in range(0, len(rows), self._job.train.microbatch):
            places = order[start : start + self._job.train.microbatch]
            some = [int(row) for row in rows[places]]
            found = self._gradients.of([data.examples[row] for row in some], features.of(some))
            found = replace(found, gradients=leaves.gradients(found.gradients, part.trained))
            summed = sum_by_unit(found, owners[places], len(units))
            total = summed if total is None else total + summed
        assert total is not None  # noqa: S101 - a chunk has a unit, and a unit an example
        return total


def _step(
    optimiser: torch.optim.Optimizer,
    leaves: Leaves,
    gradients: Mapping[str, Vector],
    start: Start,
    rate: float,
    job: Job,
) -> None:
    """One step of the optimiser along noised gradients; tensors without one stay.

    FedProx adds proximal x (w - w_start), Li et al. 2020, equation 2. SCAFFOLD adds c - c_i, Karimireddy et al.
    2020, algorithm 1; its c_i is made from updates that were noised before (option II), so both cost nothing.
    """
    origins = start.own
    for name, values in gradients.items():
        parameter = leaves.parameters[name]
        gradient = torch.from_numpy(values.copy()).to(parameter.device)
        if job.train.proximal:
            origin = torch.from_numpy(np.array(origins[name])).to(parameter.device)
            gradient += job.train.proximal * (parameter.detach() - origin)
        if name in start.correction:
            gradient += torch.from_numpy(np.array(start.correction[name])).to(parameter.device)
        parameter.grad = gradient
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    optimiser.zero_grad()
    leaves.settle()


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
