"""What is public about a round: its learning rates, and seeds for rounding and drawing sites."""

from __future__ import annotations

import hashlib

from cotune.shared.job import Job

FINAL_RATE = 0.1


def learning_rate(job: Job, step: int) -> float:
    """The public learning rate of a step of the run, counted from 0."""
    if job.train.schedule == "constant" or job.steps == 1:
        return job.train.learning_rate
    return job.train.learning_rate * (1 - (1 - FINAL_RATE) * step / (job.steps - 1))


def rates_of(job: Job, round_number: int) -> list[float]:
    """The learning rates of a round's steps; rounds count from 1."""
    first = (round_number - 1) * job.train.local_steps
    return [learning_rate(job, step) for step in range(first, first + job.train.local_steps)]


def public_seed(job: Job, *words: object) -> int:
    """A seed of 64 bits for public randomness, other for other words; never for noise or batches."""
    text = "|".join(map(str, (job.run.seed, *words)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
