"""A job's cost before any data is touched: noise, epsilon by round, steps, bytes, memory, time."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cotune.shared.adapter import Layout
from cotune.shared.aggregation import returned, sent
from cotune.shared.chain import WITNESSES
from cotune.shared.codec import encoded_bytes
from cotune.shared.errors import PrivacyError
from cotune.shared.job import Job
from cotune.shared.methods import layout_of
from cotune.shared.model import BaseModel, load_model
from cotune.shared.plan import RoundPlan, cotune_version
from cotune.shared.privacy.accounting import epsilon, epsilon_replace_one
from cotune.shared.privacy.calibration import calibrate_noise, calibrate_steps
from cotune.shared.privacy.event import Event
from cotune.shared.privacy.group import epsilon_group
from cotune.shared.privacy.mechanism import MIN_NOISE_MULTIPLIER, mechanism_of

RESERVE = 1 - 1e-9
ACTIVATION_COPIES = 20  # measured: hidden-sized fp32 arrays a layer keeps for its backward pass
PERSONS = (1, 2, 4, 8)  # records of a person, as shown
HEAD_BYTES = 540  # a signed ledger head as JSON
EFFICIENCY = 0.8  # measured: share of a matrix product's speed that training on batches of 32 short rows reaches


@dataclass(frozen=True)
class Plan:
    """What `cotune plan` says. Bytes are of one site and round, without an offset; times are upper estimates."""

    noise_multiplier: float | None
    delta: float | None
    epsilon_by_round: tuple[float, ...]
    sampling_probability: float
    steps: int
    trained_parameters: int
    base_parameters: int
    bytes_up: int
    bytes_down: int
    memory_bytes: int
    seconds_estimate: float

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        return asdict(self)


def resolve(job: Job) -> Job:
    """Fill every `auto` that needs no data: delta, noise multiplier, workers, threads.

    Raises:
        PrivacyError: delta lets one record leak whole, or no noise reaches the budget.
    """
    cores = os.cpu_count() or 1
    workers = min(cores, job.sites) if job.simulation.workers == "auto" else job.simulation.workers
    threads = max(1, cores // workers) if job.simulation.threads == "auto" else job.simulation.threads
    job = job.replace(simulation={"workers": workers, "threads": threads})
    return job if job.privacy.level == "none" else _resolve_privacy(job)


def _resolve_privacy(job: Job) -> Job:
    limit = 1 / job.units_per_site
    delta = _delta(job)
    if not 0 < delta < limit:
        raise PrivacyError(
            "E-DELTA",
            f"privacy.delta: expected above 0 and below 1 over the {job.units_per_site:,} units of a site,"
            f" {limit:.3g}, got {delta:g}: at that value one of them could be published whole",
            param="privacy.delta",
            hint='set privacy.delta = "auto" (1 over 10 times the units of a site)',
        )
    noise = job.privacy.noise_multiplier
    if noise != "auto" and noise < MIN_NOISE_MULTIPLIER:
        raise _too_little(f"is below {MIN_NOISE_MULTIPLIER:g}: no budget allows that", noise)
    if noise == "auto":
        noise = _least_noise(job, delta)
    resolved = job.replace(privacy={"delta": delta, "noise_multiplier": noise})
    cost = epsilon([run_event(resolved)], delta)
    if cost > job.privacy.epsilon:
        what = f"costs epsilon {cost:.3f} over {job.steps_per_site} steps,"
        what += f" more than privacy.epsilon = {job.privacy.epsilon:g}"
        raise _too_little(what, noise)
    return resolved


def _delta(job: Job) -> float:
    return 1 / (10 * job.units_per_site) if job.privacy.delta == "auto" else job.privacy.delta


def _least_noise(job: Job, delta: float) -> float:
    target = job.privacy.epsilon * RESERVE
    return calibrate_noise(lambda noise: run_event(job, noise), target_epsilon=target, delta=delta)


def _too_little(what: str, noise: float) -> PrivacyError:
    return PrivacyError(
        "E-BUDGET-IMPOSSIBLE",
        f"privacy.noise_multiplier = {noise:g} {what}",
        param="privacy.noise_multiplier",
        hint='set privacy.noise_multiplier = "auto"',
    )


def run_event(job: Job, noise_multiplier: float | None = None) -> Event:
    """What a whole run releases of one unit, at all the sites it may be at.

    Args:
        job: A job; resolved, unless the noise is given.
        noise_multiplier: To be tried instead of the job's own.
    """
    if noise_multiplier is not None:
        job = job.replace(privacy={"noise_multiplier": noise_multiplier})
    return mechanism_of(job).event(job.steps_per_site * job.data.sites_per_unit)


def solve(job: Job, what: Literal["noise", "rounds", "epsilon"]) -> str:
    """The one setting that follows from the others, as `section.setting=value`.

    Raises:
        PrivacyError: Two of epsilon, rounds and noise do not fix the third, or nothing fits.
    """
    if job.privacy.level == "none":
        raise PrivacyError("E-SOLVE", "privacy.level = none: there is no budget to solve for", param="privacy.level")
    delta = _delta(job)
    if what == "noise":
        return f"privacy.noise_multiplier={_least_noise(job, delta):.6g}"
    if job.privacy.noise_multiplier == "auto":
        raise PrivacyError(
            "E-SOLVE", f"--solve {what} needs a noise multiplier", param="privacy.noise_multiplier",
            hint=f"cotune plan run.toml --solve {what} privacy.noise_multiplier=1.0",
        )  # fmt: skip
    if what == "epsilon":
        return f"privacy.epsilon={math.ceil(epsilon([run_event(job)], delta) * 1e4) / 1e4:g}"
    per_round = job.train.local_steps * job.data.sites_per_unit
    mechanism = mechanism_of(job)
    most = calibrate_steps(
        lambda rounds: mechanism.event(rounds * per_round), target_epsilon=job.privacy.epsilon, delta=delta
    )
    return f"run.rounds={most}"


def costs_by_person(job: Job) -> dict[int, float]:
    """Epsilon of a whole resolved run for a person with so many records; the same for all where persons are units."""
    delta, event = _number(job.privacy.delta), run_event(job)
    if job.privacy.level == "unit":
        return dict.fromkeys(PERSONS, epsilon([event], delta))
    most = job.data.max_per_unit or max(PERSONS)
    return {count: epsilon_group([event], delta, count) for count in PERSONS if count <= most}


def cost_of_replacing(job: Job) -> float:
    """Epsilon of a whole resolved run for neighbours in which one unit is replaced by another."""
    return epsilon_replace_one([run_event(job)], _number(job.privacy.delta))


def make_plan(job: Job, base: BaseModel) -> Plan:
    """The plan of a resolved job on a base model; reads the model's configuration, never any data."""
    model = load_model(base, job, weights=False)
    parameters = sum(p.numel() for p in model.parameters())
    config = model.config
    layers = int(config.num_hidden_layers)
    top = layers if job.lora.last_layers == "all" else job.lora.last_layers
    layout = layout_of(job, base)[0]
    size, up = layout.size, _largest_update(job, layout)
    down = sent(job.rule, layout, 0, job.train.scaffold).size
    header = len(_sample_plan(job).model_dump_json())
    heads = HEAD_BYTES * min(job.sites, WITNESSES + 1)
    tokens = job.train.microbatch * job.model.max_length
    activations = tokens * (int(config.hidden_size) * ACTIVATION_COPIES * top + int(getattr(config, "vocab_size", 0)))
    return Plan(
        noise_multiplier=None if job.privacy.level == "none" else _number(job.privacy.noise_multiplier),
        delta=None if job.privacy.level == "none" else _number(job.privacy.delta),
        epsilon_by_round=epsilon_by_round(job),
        sampling_probability=job.sampling_probability,
        steps=job.steps_per_site,
        trained_parameters=size,
        base_parameters=parameters,
        bytes_up=encoded_bytes(job.transport.codec_up, up) + 700 + heads,
        bytes_down=encoded_bytes(job.transport.codec_down, down) + header + heads,
        memory_bytes=4 * (parameters + activations + job.train.microbatch * size),
        seconds_estimate=_seconds(job, parameters, top / layers),
    )


def _largest_update(job: Job, layout: Layout) -> int:
    """Numbers in the largest of a site's updates; their order is public, so two and the last tell them all."""
    rounds = job.run.rounds
    return max(returned(job.rule, layout, number, rounds).size for number in {1, min(2, rounds), rounds})


def epsilon_by_round(job: Job) -> tuple[float, ...]:
    """Epsilon of a unit after each round its site takes, at the job's delta; empty without privacy."""
    if job.privacy.level == "none":
        return ()
    mechanism, delta = mechanism_of(job), _number(job.privacy.delta)
    steps = job.train.local_steps * job.data.sites_per_unit
    return tuple(epsilon([mechanism.event(number * steps)], delta) for number in range(1, job.rounds_per_site + 1))


def _number(value: float | str) -> float:
    return value if isinstance(value, float) else math.nan


def _sample_plan(job: Job) -> RoundPlan:
    zero = "0" * 64
    return RoundPlan(
        run_id="0" * 40,
        cotune=cotune_version(),
        job=job,
        site="site-1",
        round=1,
        rank=job.lora.r,
        base_sha256=zero,
        frozen_sha256=zero,
        clipping_norm=job.privacy.clipping_norm,
    )


def _seconds(job: Job, parameters: int, top: float) -> float:
    """Upper estimate, every record at full length: the lower layers once a record, the top forward and back."""
    import torch

    workers, threads = job.simulation.workers, job.simulation.threads
    torch.set_num_threads(1 if threads == "auto" else threads)
    a = torch.randn(512, 512)
    started = time.perf_counter()
    for _ in range(20):
        torch.mm(a, a)
    rate = 20 * 2 * 512**3 / (time.perf_counter() - started) * (1 if workers == "auto" else workers)
    drawn = job.steps_per_site * job.train.batch_size
    distinct = job.data.records_per_site * (1 - (1 - job.sampling_probability) ** job.steps_per_site)
    passes = job.sites * job.model.max_length * (drawn * 2 * top + distinct * (1 - top))
    return passes * parameters * 2 / (rate * EFFICIENCY)
