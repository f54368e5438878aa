"""One object from which sampler, clipping, noise, adjacency and accounting event all come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cotune.shared.errors import PrivacyError
from cotune.shared.job import Job
from cotune.shared.privacy.event import DpSgdEvent, Event, NonPrivateEvent


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The Poisson-sampled Gaussian mechanism on clipped per-example gradients, or none of it.

    Every field is public. A site draws batches, clips and adds noise with this very object, and the ledger
    receives `event`: what is done and what is accounted cannot drift apart.

    Guarantee: with `noise_multiplier` > 0, one step is a Gaussian mechanism of L2 sensitivity
    `clipping_norm` on a Poisson sample, for neighbours that differ by adding or removing one record;
    its cost is exactly `event(1)`. Dividing by `expected_batch_size` is post-processing, because that
    number is public and does not depend on the batch drawn.

    Edge cases: a `clipping_norm` or `noise_multiplier` that is NaN, infinite, zero or negative is refused;
    `sampling_probability` 1 takes every record each step; `private=False` has no bound and its event makes
    epsilon infinite.
    """

    sampling_probability: float
    expected_batch_size: int
    clipping_norm: float
    noise_multiplier: float
    private: bool = True
    adjacency: ClassVar[str] = "add-or-remove-one"

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

    @property
    def sensitivity(self) -> float:
        """Largest L2 change of a step's sum when one record is added or removed."""
        return self.clipping_norm

    @property
    def noise_standard_deviation(self) -> float:
        """Standard deviation of the noise on each coordinate of a step's sum; 0 without privacy."""
        return self.noise_multiplier * self.sensitivity if self.private else 0.0

    def event(self, steps: int) -> Event:
        """What `steps` steps release."""
        if not self.private:
            return NonPrivateEvent()
        return DpSgdEvent(
            sampling_probability=self.sampling_probability,
            noise_multiplier=self.noise_multiplier,
            steps=steps,
        )


def mechanism_of(job: Job) -> Mechanism:
    """The mechanism a resolved job asks for.

    Raises:
        PrivacyError: The noise multiplier is still `auto` in a private job.
    """
    private = job.privacy.level != "none"
    noise = job.privacy.noise_multiplier
    if private and noise == "auto":
        raise PrivacyError("E-UNRESOLVED", "privacy.noise_multiplier is still `auto`: resolve the job first")
    return Mechanism(
        sampling_probability=job.sampling_probability,
        expected_batch_size=job.train.batch_size,
        clipping_norm=job.privacy.clipping_norm,
        noise_multiplier=0.0 if noise == "auto" else noise,
        private=private,
    )
