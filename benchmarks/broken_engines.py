"""Engines that are broken on purpose: does an audit notice, and how often?

    python benchmarks/broken_engines.py
    python benchmarks/broken_engines.py --runs 5 --canaries 1000

White box: canaries go through our own sampling, clipping and noise with one part replaced, and the auditor knows what
every step releases. Three auditors: each canary has a coordinate of its own; or a data set of its own, whose other
records all pull the other way; or is a digit of the training loss.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cotune.client.clipping import PerUnit, clipped_sum
from cotune.client.noise import Noise, draw_noise, privatise
from cotune.client.randomness import RandomStream, secure_stream
from cotune.client.sampling import draw_batch
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.calibration import calibrate_noise
from cotune.shared.privacy.event import DpSgdEvent, Event
from cotune.shared.privacy.mechanism import LOSS_BOUND, Mechanism
from cotune.simulations.attack.audit import CONFIDENCE, Guesses, guess, p_value, refuted

DELTA = 1e-5
STEPS, ROUNDS = 20, 10
SHARE, SHARE_OF_LOSSES = 0.1, 0.5  # of the canaries in a batch, where gradients are looked at, and losses
OTHERS, BLOCK = 49, 100  # records beside a canary in its own data set; data sets that share a vector
DIGITS, GROUPS = 40, 5  # a sum in float64 has room for so many binary digits; groups of canaries take turns
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Engine:
    """A step of DP-SGD in its two parts that chance decides, and what its accountant says of all steps."""

    batch: Callable[[Mechanism, int, RandomStream], NDArray[np.intp]] = draw_batch
    noise: Callable[[Mechanism, int, RandomStream], Noise] = draw_noise
    accounted_steps: int = STEPS


def half_noise(mechanism: Mechanism, size: int, stream: RandomStream) -> Noise:
    """Noise of half the deviation."""
    noise = draw_noise(mechanism, size, stream)
    return replace(noise, gradient=noise.gradient / 2)


def no_side_noise(mechanism: Mechanism, size: int, stream: RandomStream) -> Noise:
    """The training loss as it is."""
    return replace(draw_noise(mechanism, size, stream), loss=0.0)


def shuffled() -> Engine:
    """Batches of one size, dealt out from a shuffled list."""
    queue: list[int] = []

    def batch(mechanism: Mechanism, units: int, stream: RandomStream) -> NDArray[np.intp]:
        size = max(1, round(mechanism.sampling_probability * units))
        if len(queue) < size:
            queue[:] = np.argsort(stream.uniform_bits(units)).tolist()
        drawn, queue[:size] = np.sort(queue[:size]), []
        return drawn

    return Engine(batch=batch)


def mechanism_for(target: float, *, metrics: bool) -> Mechanism:
    """The mechanism whose steps cost the target at DELTA."""

    share = SHARE_OF_LOSSES if metrics else SHARE

    def event(noise: float) -> Event:
        return DpSgdEvent(sampling_probability=share, noise_multiplier=noise, steps=STEPS)

    return Mechanism(
        sampling_probability=share,
        expected_batch_size=100,
        clipping_norm=1.0,
        noise_multiplier=calibrate_noise(event, target_epsilon=target, delta=DELTA),
        private=True,
        metrics=metrics,
    )


def summed(engine: Engine, mechanism: Mechanism, columns: NDArray[np.intp], signs: Floats, size: int) -> Floats:
    """What a step releases, in clipping norms, shape (size,): a record's gradient is one coordinate, with a sign."""
    own = torch.zeros(len(columns), size)
    own[torch.arange(len(columns)), torch.from_numpy(columns)] = torch.from_numpy(signs).float() * 2.0
    per_unit = PerUnit({"all": own * mechanism.clipping_norm}, torch.ones(len(columns)), torch.ones(len(columns)))
    noise = engine.noise(mechanism, size, secure_stream())
    said = privatise(clipped_sum(per_unit, mechanism), mechanism, noise).gradient
    return said.astype(np.float64) * mechanism.expected_batch_size / mechanism.clipping_norm


def step_score(sums: Floats, shift: float, mechanism: Mechanism) -> Floats:
    """Log likelihood ratio of a step: a Poisson batch with a canary that shifts the sum, against one without."""
    precision = 1 / mechanism.gradient_noise_multiplier**2
    return np.log1p(mechanism.sampling_probability * np.expm1(shift * (sums - shift / 2) * precision))


def coordinates_said(make: Callable[[], Engine], mechanism: Mechanism, coins: NDArray[np.bool_]) -> Floats:
    """The auditor's score of each canary from its own coordinate of all steps; shape (m,)."""
    engine, stream, inside = make(), secure_stream(), np.flatnonzero(coins)
    scores = np.zeros(len(coins))
    for _ in range(STEPS):
        drawn = inside[engine.batch(mechanism, len(inside), stream)]
        scores += step_score(summed(engine, mechanism, drawn, np.ones(len(drawn)), len(coins)), 1.0, mechanism)
    return scores


def opposed_said(make: Callable[[], Engine], mechanism: Mechanism, coins: NDArray[np.bool_]) -> Floats:
    """Score of each canary in a data set of its own, where OTHERS records pull the other way.

    In a batch of one size a canary shows twice: it pulls its way, and takes the place of one that would not.
    """
    stream, size = secure_stream(), round(mechanism.sampling_probability * (OTHERS + 1))
    scores = np.zeros(len(coins))
    for block in np.split(np.arange(len(coins)), range(BLOCK, len(coins), BLOCK)):
        engines = [make() for _ in block]
        for _ in range(STEPS):
            batches = [
                engine.batch(mechanism, OTHERS + int(coins[at]), stream)
                for engine, at in zip(engines, block, strict=True)
            ]
            columns = np.repeat(np.arange(len(block)), [len(batch) for batch in batches])
            signs = np.where(np.concatenate(batches) == OTHERS, 1.0, -1.0)  # a canary is its data set's last
            sums = summed(engines[0], mechanism, columns, signs, len(block))
            scores[block] += step_score(sums + size, 2.0, mechanism)
    return scores


def losses_said(make: Callable[[], Engine], mechanism: Mechanism, coins: NDArray[np.bool_]) -> Floats:
    """Score of each of GROUPS x DIGITS canaries from the training loss: how often its own binary digit was set.

    Whoever sends the adapter can choose what a record's loss is in a step; a canary's is a digit, or zero.
    """
    engine, stream, inside = make(), secure_stream(), np.flatnonzero(coins)
    places, groups = np.arange(len(coins)) % DIGITS, np.arange(len(coins)) // DIGITS
    digits, scores = 2.0 ** -(places + 1), np.zeros(len(coins))
    for step in range(STEPS):
        drawn = inside[engine.batch(mechanism, len(inside), stream)]
        turn = groups == step % GROUPS
        losses = torch.from_numpy(np.where(turn, digits, 0.0)[drawn] * LOSS_BOUND / 2).float()
        per_unit = PerUnit({"all": torch.zeros(len(drawn), 1)}, losses, torch.ones(len(drawn)))
        noise = engine.noise(mechanism, 1, stream)
        said = privatise(clipped_sum(per_unit, mechanism), mechanism, noise).loss or 0.0
        total = (said * 2 / LOSS_BOUND - 1) * mechanism.expected_batch_size
        fraction = total - np.floor(total)
        scores += turn * (np.floor(fraction / digits) % 2)
    return scores


Auditor = Callable[[Callable[[], Engine], Mechanism, NDArray[np.bool_]], Floats]
TRIALS: Sequence[tuple[str, Callable[[], Engine], Auditor]] = (
    ("as it is", Engine, coordinates_said),
    ("as it is", Engine, opposed_said),
    ("half the noise", lambda: Engine(noise=half_noise), coordinates_said),
    ("shuffled, not Poisson", shuffled, coordinates_said),
    ("shuffled, not Poisson", shuffled, opposed_said),
    ("accountant reset each round", lambda: Engine(accounted_steps=STEPS // ROUNDS), coordinates_said),
    ("training loss without noise", lambda: Engine(noise=no_side_noise), losses_said),
)


def audited(
    make: Callable[[], Engine], auditor: Auditor, target: float, canaries: int
) -> tuple[Guesses, Sequence[Event]]:
    """One run of an engine: what its auditor guessed, and what its accountant says it released."""
    metrics = auditor is losses_said
    mechanism = mechanism_for(target, metrics=metrics)
    coins = np.frombuffer(np.random.default_rng().bytes(GROUPS * DIGITS if metrics else canaries), np.uint8) % 2 == 1
    return guess(auditor(make, mechanism, coins), coins.tolist()), [mechanism.event(make().accounted_steps)]


def power(
    trial: tuple[str, Callable[[], Engine], Auditor], target: float, canaries: int, runs: int
) -> dict[str, object]:
    """In how many runs each audit refutes what the accountant says."""
    name, make, auditor = trial
    began, found = time.process_time(), [audited(make, auditor, target, canaries) for _ in range(runs)]
    claimed = epsilon(found[0][1], DELTA)
    return {
        "engine": name,
        "auditor": auditor.__name__.removesuffix("_said"),
        "target": target,
        "claimed": round(claimed, 3),
        "canaries": found[0][0].candidates,
        "runs": runs,
        "caught_by_steinke": sum(p_value(g, claimed, DELTA) <= 1 - CONFIDENCE for g, _ in found),
        "caught_by_f_dp": sum(refuted(g, events) for g, events in found),
        "right": round(float(np.mean([g.right / g.made for g, _ in found])), 3),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    """Every trial at every claim; a JSON line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--canaries", type=int, default=5000)
    parser.add_argument("--claims", type=float, nargs="+", default=[1.0, 2.0, 8.0])
    parser.add_argument("--out", type=Path, help="also write all of it there")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for trial in TRIALS:
        for target in settings.claims:
            rows.append(power(trial, target, settings.canaries, settings.runs))
            print(json.dumps(rows[-1]), flush=True)  # noqa: T201
    if settings.out:
        settings.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
