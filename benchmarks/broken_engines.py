"""Engines that are broken on purpose: does an audit notice, and how often?

    python benchmarks/broken_engines.py                 # 20 runs of each; some minutes on one core
    python benchmarks/broken_engines.py --runs 5 --canaries 1000

White box: canaries, each with a gradient in its own direction, go through our own sampling, clipping and noise with
one part replaced. From what a step releases, the auditor knows each canary's own coordinate.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
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


ENGINES: Mapping[str, Callable[[], Engine]] = {
    "none (as it is)": Engine,
    "half the noise": lambda: Engine(noise=half_noise),
    "shuffled, not Poisson": shuffled,
    "accountant reset each round": lambda: Engine(accounted_steps=STEPS // ROUNDS),
    "training loss without noise": lambda: Engine(noise=no_side_noise),
}


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


def gradients_said(engine: Engine, mechanism: Mechanism, coins: NDArray[np.bool_]) -> Floats:
    """The auditor's score of each canary: the likelihood ratio of its coordinate, were batches Poisson; shape (m,)."""
    stream, inside = secure_stream(), np.flatnonzero(coins)
    scores, q = np.zeros(len(coins)), mechanism.sampling_probability
    precision = 1 / mechanism.gradient_noise_multiplier**2
    for _ in range(STEPS):
        drawn = inside[engine.batch(mechanism, len(inside), stream)]
        own = torch.zeros(len(drawn), len(coins))
        own[torch.arange(len(drawn)), torch.from_numpy(drawn)] = 2.0 * mechanism.clipping_norm
        per_unit = PerUnit({"all": own}, torch.ones(len(drawn)), torch.ones(len(drawn)))
        noise = engine.noise(mechanism, len(coins), stream)
        said = privatise(clipped_sum(per_unit, mechanism), mechanism, noise).gradient
        sums = said.astype(np.float64) * mechanism.expected_batch_size / mechanism.clipping_norm
        scores += np.log1p(q * np.expm1((sums - 0.5) * precision))
    return scores


def losses_said(engine: Engine, mechanism: Mechanism, coins: NDArray[np.bool_]) -> Floats:
    """Score of each of GROUPS x DIGITS canaries from the training loss: how often its own binary digit was set.

    Whoever sends the adapter can choose what a record's loss is in a step; a canary's is a digit, or zero.
    """
    stream, inside = secure_stream(), np.flatnonzero(coins)
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


def audited(name: str, target: float, canaries: int) -> tuple[Guesses, Sequence[Event]]:
    """One run of a broken engine: what its auditor guessed, and what its accountant says it released."""
    engine, metrics = ENGINES[name](), name == "training loss without noise"
    mechanism = mechanism_for(target, metrics=metrics)
    coins = np.frombuffer(np.random.default_rng().bytes(GROUPS * DIGITS if metrics else canaries), np.uint8) % 2 == 1
    scores = (losses_said if metrics else gradients_said)(engine, mechanism, coins)
    return guess(scores, coins.tolist()), [mechanism.event(engine.accounted_steps)]


def power(name: str, target: float, canaries: int, runs: int) -> dict[str, object]:
    """In how many runs each audit refutes what the accountant says."""
    began, found = time.process_time(), [audited(name, target, canaries) for _ in range(runs)]
    claimed = epsilon(found[0][1], DELTA)
    return {
        "engine": name,
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
    """Every engine at every claim; a JSON line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--canaries", type=int, default=5000)
    parser.add_argument("--claims", type=float, nargs="+", default=[1.0, 2.0, 8.0])
    parser.add_argument("--out", type=Path, help="also write all of it there")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for name in ENGINES:
        for target in settings.claims:
            rows.append(power(name, target, settings.canaries, settings.runs))
            print(json.dumps(rows[-1]), flush=True)  # noqa: T201
    if settings.out:
        settings.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
