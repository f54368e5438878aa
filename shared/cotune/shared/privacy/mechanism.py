"""One object from which sampler, clipping, noise, adjacency and accounting event all come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cotune.shared.errors import PrivacyError
from cotune.shared.job import Job
from cotune.shared.privacy.event import DpSgdEvent, Event, NonPrivateEvent, TruncatedDpSgdEvent

Adjacency = Literal["add-or-remove-one", "zero-out-one"]
MIN_NOISE_MULTIPLIER = 0.2  # below it a step costs epsilon over 25: nobody is promised anything, and sites refuse
SIDE_NOISE_SHARE = 0.1  # noise of a side sum, as a share of the expected batch (Andrew et al. 2021, section 3)
SIDE_NOISE_RATIO = 5.0  # and at least this many times the joint noise, so that a side sum costs 4 % of the noise
LOSS_BOUND = 8.0  # nats; a unit's mean loss above it is reported as this


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The Poisson-sampled Gaussian mechanism on clipped per-unit gradients, or none of it.

    Every field is public. A site draws batches, clips and adds noise with this very object, and the ledger
    receives `event`: what is done and what is accounted cannot drift apart.

    Guarantee: with `noise_multiplier` > 0, one step is a Gaussian mechanism on a Poisson sample of units, for
    neighbours that differ in one unit. It releases the sum of gradients, of L2 sensitivity `clipping_norm`,
    and with `adaptive` or `metrics` a side sum each, of sensitivity 1. Each part divided by its own noise is
    one vector; one unit moves it by at most sqrt(sum of multiplier^-2) = 1 / `noise_multiplier`, because the
    gradient's own multiplier is raised to make it so (Andrew et al. 2021, theorem 1). So its cost is exactly
    `event(1)`. Dividing by `expected_batch_size` is post-processing: the number is public and does not
    depend on the batch drawn. With `max_batch_size` a batch keeps at most so many units, chosen at random,
    neighbours replace a unit by nothing, and a site gives at most `population` units.

    Edge cases: a `clipping_norm` or `noise_multiplier` that is NaN, infinite, zero or negative is refused; a
    cap below the expected batch is refused, as is one without a population; side sums are noised so much
    that both together never take more than 8 % of the precision; `sampling_probability` 1 takes every unit each
    step; `private=False` has no bound and its event makes epsilon infinite.
    """

    sampling_probability: float
    expected_batch_size: int
    clipping_norm: float
    noise_multiplier: float
    private: bool = True
    clipping: Literal["flat", "normalised"] = "flat"
    adaptive: bool = False
    metrics: bool = False
    max_batch_size: int | None = None
    population: int | None = None

    def __post_init__(self) -> None:
        positive = {"clipping_norm": self.clipping_norm, "expected_batch_size": self.expected_batch_size}
        if self.private:
            positive["noise_multiplier"] = self.noise_multiplier
        for name, value in positive.items():
            if not 0 < value < float("inf"):
                raise PrivacyError("E-MECHANISM", f"expected a finite {name} > 0, got {value}", param=name)
        if not 0 < self.sampling_probability <= 1:
            raise PrivacyError(
                "E-MECHANISM",
                f"expected 0 < sampling_probability <= 1, got {self.sampling_probability}",
                param="sampling_probability",
            )
        _check_cap(self.max_batch_size, self.population, self.expected_batch_size)

    @property
    def adjacency(self) -> Adjacency:
        """Which data sets are neighbours."""
        return "add-or-remove-one" if self.max_batch_size is None else "zero-out-one"

    @property
    def sensitivity(self) -> float:
        """Largest L2 change of a step's sum of gradients when one unit is added, removed or zeroed."""
        return self.clipping_norm

    @property
    def side_noise_multiplier(self) -> float:
        """Standard deviation of the noise on a side sum, whose sensitivity is 1."""
        return max(SIDE_NOISE_SHARE * self.expected_batch_size, SIDE_NOISE_RATIO * self.noise_multiplier)

    @property
    def gradient_noise_multiplier(self) -> float:
        """Noise on the sum of gradients over its sensitivity; above `noise_multiplier` if there are side sums."""
        sides = int(self.adaptive) + int(self.metrics)
        if sides == 0:
            return self.noise_multiplier
        taken = sides * (self.noise_multiplier / self.side_noise_multiplier) ** 2
        return self.noise_multiplier / math.sqrt(1 - taken)

    @property
    def noise_standard_deviation(self) -> float:
        """Standard deviation of the noise on each coordinate of a step's sum of gradients; 0 without privacy."""
        return self.gradient_noise_multiplier * self.sensitivity if self.private else 0.0

    def event(self, steps: int) -> Event:
        """What `steps` steps release."""
        if not self.private:
            return NonPrivateEvent()
        q, noise = self.sampling_probability, self.noise_multiplier
        if self.max_batch_size is None or self.population is None:
            return DpSgdEvent(sampling_probability=q, noise_multiplier=noise, steps=steps)
        return TruncatedDpSgdEvent(
            sampling_probability=q,
            noise_multiplier=noise,
            steps=steps,
            max_batch_size=self.max_batch_size,
            population=self.population,
        )


def mechanism_of(job: Job, clipping_norm: float | None = None) -> Mechanism:
    """The mechanism a resolved job asks for.

    Args:
        job: A resolved job.
        clipping_norm: Where adaptive clipping has got to; None: the job's own.

    Raises:
        PrivacyError: The noise multiplier is still `auto` in a private job, or the parameters are impossible.
    """
    private = job.privacy.level != "none"
    noise = job.privacy.noise_multiplier
    if private and noise == "auto":
        raise PrivacyError("E-UNRESOLVED", "privacy.noise_multiplier is still `auto`: resolve the job first")
    return Mechanism(
        sampling_probability=job.sampling_probability,
        expected_batch_size=job.train.batch_size,
        clipping_norm=job.privacy.clipping_norm if clipping_norm is None else clipping_norm,
        noise_multiplier=0.0 if noise == "auto" else noise,
        private=private,
        clipping="normalised" if job.privacy.clipping == "normalised" else "flat",
        adaptive=private and job.privacy.clipping == "adaptive",
        metrics=private and job.privacy.metrics == "noised",
        max_batch_size=job.train.max_batch_size,
        population=None if job.train.max_batch_size is None else job.units_per_site,
    )


def _check_cap(cap: int | None, population: int | None, expected: int) -> None:
    if cap is None:
        return
    if population is None or not expected <= cap <= population:
        raise PrivacyError(
            "E-MECHANISM",
            f"train.max_batch_size: expected between the mean batch {expected} and the public number of units"
            f" {population}, got {cap}",
            param="train.max_batch_size",
            hint=f"set train.max_batch_size = {min(population or expected, math.ceil(1.75 * expected))}",
        )
