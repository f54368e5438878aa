"""What to expect of a private job before any data is touched: its noise beside the most the data can say.

A step's update is the mean of clipped gradients, of norm `clipping_norm` at most, plus noise of a known norm.
Their ratio needs no data. It says nothing of how much there is to learn, but where noise exceeds all signal
over a whole run, nothing is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from cotune.shared.errors import PrivacyError
from cotune.shared.job import Job
from cotune.shared.methods import layout_of
from cotune.shared.model import BaseModel
from cotune.shared.privacy.mechanism import mechanism_of

WORTH = 0.9  # a change that leaves more of the noise than this is not worth naming


@dataclass(frozen=True)
class Advice:
    """Settings that would help, and the noise to signal of a run with them at the same epsilon."""

    settings: str
    noise_to_signal: float


@dataclass(frozen=True)
class Outlook:
    """Noise over the largest possible signal, of the mean over sites; below 1 the signal can win.

    Attributes:
        step: In one step.
        run: In all steps together: signals add up, noises only as the square root of their number.
        advice: What would lower it most, best first.
    """

    step: float
    run: float
    advice: tuple[Advice, ...]


def outlook(job: Job, base: BaseModel, trained: int) -> Outlook | None:
    """The outlook of a resolved job; None for one without privacy.

    Args:
        job: A resolved job.
        base: Its base model, of which only the shapes are used.
        trained: Trained parameters.
    """
    if job.privacy.level == "none":
        return None
    step = _noise_to_signal(job, trained)
    run = step / math.sqrt(job.steps_per_site)
    found = sorted(_tried(job, base), key=lambda advice: advice.noise_to_signal)
    return Outlook(step, run, tuple(advice for advice in found if advice.noise_to_signal <= WORTH * run))


def _noise_to_signal(job: Job, trained: int) -> float:
    """Norm of a step's noise in the mean over sites, over the clipping norm."""
    noise = mechanism_of(job).gradient_noise_multiplier
    return noise * math.sqrt(trained) / (job.train.batch_size * math.sqrt(job.sites))


def _tried(job: Job, base: BaseModel) -> Iterator[Advice]:
    """Each change by itself, with the noise that the same epsilon then needs."""
    from cotune.shared.planning import resolve

    for section, setting, value in _changes(job):
        try:
            changed = job.replace(**{section: {setting: value}})
            if section in ("train", "run"):  # what the accountant charges for has changed
                changed = resolve(changed.replace(privacy={"noise_multiplier": "auto"}))
        except PrivacyError:
            continue
        run = _noise_to_signal(changed, layout_of(changed, base)[0].size) / math.sqrt(changed.steps)
        shown = ",".join(value) if isinstance(value, tuple) else value
        yield Advice(f"{section}.{setting}={shown}", run)


def _changes(job: Job) -> Iterator[tuple[str, str, object]]:
    """Settings to try, one at a time: at the same epsilon none of them costs anybody privacy."""
    if 2 * job.train.batch_size <= job.units_per_site and job.train.max_batch_size is None:
        yield "train", "batch_size", 2 * job.train.batch_size
    if job.lora.r > 1:
        yield "lora", "r", job.lora.r // 2
    if len(job.lora.target_modules) > 1:
        yield "lora", "target_modules", job.lora.target_modules[1:]
    if not job.data.sites:
        yield "federation", "sites", 2 * job.federation.sites
    yield "run", "rounds", 2 * job.run.rounds
