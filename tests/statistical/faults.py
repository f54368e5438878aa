"""Faults that DP-SGD code has been found with, each planted in one step's parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tests.statistical.steps import Parts

from cotune.client.clipping import ClippedSum, PerUnit, clipped_sum, sum_by_unit
from cotune.client.gradients import PerExample
from cotune.client.noise import Noise, Released, draw_noise, privatise
from cotune.client.randomness import RandomStream, reproducible_stream, secure_stream
from cotune.client.sampling import draw_batch
from cotune.shared.privacy.mechanism import LOSS_BOUND, Mechanism


def _scaled(noise: Noise, factor: float) -> Noise:
    return Noise(noise.gradient * factor, noise.below * factor, noise.loss * factor)


def _half_the_noise() -> Parts:
    return Parts(draw_noise=lambda m, size, stream: _scaled(draw_noise(m, size, stream), 0.5))


def _noise_each_microbatch() -> Parts:
    stream = secure_stream()

    def clip(per_unit: PerUnit, m: Mechanism) -> ClippedSum:
        clipped = clipped_sum(per_unit, m)
        extra = m.noise_standard_deviation * stream.normal(len(clipped.gradient))
        return replace(clipped, gradient=clipped.gradient + extra)

    return Parts(clipped_sum=clip)


def _one_noise_for_all_steps() -> Parts:
    held: list[Noise] = []

    def draw(m: Mechanism, size: int, stream: RandomStream) -> Noise:
        held.append(draw_noise(m, size, stream))
        return held[0]

    return Parts(draw_noise=draw)


def _a_seed_all_sites_share() -> Parts:
    own = reproducible_stream(42, "site", 1)
    return Parts(draw_noise=lambda m, size, _stream: draw_noise(m, size, own))


def _noise_in_bfloat16() -> Parts:
    def draw(m: Mechanism, size: int, stream: RandomStream) -> Noise:
        noise = draw_noise(m, size, stream)
        return replace(noise, gradient=torch.from_numpy(noise.gradient).bfloat16().double().numpy())

    return Parts(draw_noise=draw)


def _side_sums_for_free() -> Parts:
    def release(clipped: ClippedSum, m: Mechanism, noise: Noise) -> Released:
        share = m.noise_multiplier / m.gradient_noise_multiplier
        return privatise(clipped, m, replace(noise, gradient=noise.gradient * share))

    return Parts(privatise=release)


def _side_sums_not_noised() -> Parts:
    return Parts(draw_noise=lambda m, size, stream: replace(draw_noise(m, size, stream), below=0.0, loss=0.0))


def _knowing_the_batch(change: Callable[[Released, Noise, int, Mechanism], Released]) -> Parts:
    """A release that is changed knowing how many units were drawn."""
    drawn: list[int] = [0]

    def draw(m: Mechanism, units: int, stream: RandomStream) -> np.ndarray:
        batch = draw_batch(m, units, stream)
        drawn[0] = len(batch)
        return batch

    def release(clipped: ClippedSum, m: Mechanism, noise: Noise) -> Released:
        return change(privatise(clipped, m, noise), noise, drawn[0], m)

    return Parts(draw_batch=draw, privatise=release)


def _noise_scaled_by_the_batch_drawn() -> Parts:
    def change(released: Released, noise: Noise, drawn: int, m: Mechanism) -> Released:
        wanted = m.noise_standard_deviation * noise.gradient / m.expected_batch_size
        scaled = released.gradient + wanted * (drawn / m.expected_batch_size - 1)
        return replace(released, gradient=scaled.astype(np.float32))

    return _knowing_the_batch(change)


def _divided_by_the_batch_drawn() -> Parts:
    def change(released: Released, _noise: Noise, drawn: int, m: Mechanism) -> Released:
        return replace(released, gradient=released.gradient * np.float32(m.expected_batch_size / max(drawn, 1)))

    return _knowing_the_batch(change)


def _empty_batches_skipped() -> Parts:
    def change(released: Released, _noise: Noise, drawn: int, _m: Mechanism) -> Released:
        return replace(released, gradient=released.gradient * np.float32(drawn > 0))

    return _knowing_the_batch(change)


def _shuffled() -> Parts:
    random, queue = np.random.default_rng(), list[int]()

    def draw(m: Mechanism, units: int, _stream: RandomStream) -> np.ndarray:
        size = max(1, round(m.sampling_probability * units))
        if len(queue) < size:
            queue[:] = random.permutation(units).tolist()
        batch, queue[:size] = np.sort(queue[:size]), []
        return batch

    return Parts(draw_batch=draw)


def _fixed_size() -> Parts:
    random = np.random.default_rng()

    def draw(m: Mechanism, units: int, _stream: RandomStream) -> np.ndarray:
        return np.sort(random.choice(units, max(1, round(m.sampling_probability * units)), replace=False))

    return Parts(draw_batch=draw)


def _rate_of_the_loader() -> Parts:
    def draw(m: Mechanism, units: int, stream: RandomStream) -> np.ndarray:
        return draw_batch(replace(m, sampling_probability=1 / int(np.ceil(1 / m.sampling_probability))), units, stream)

    return Parts(draw_batch=draw)


def _two_batches_a_step() -> Parts:
    return Parts(draw_batch=lambda m, n, stream: np.append(draw_batch(m, n, stream), draw_batch(m, n, stream)))


def _a_batch_used_twice() -> Parts:
    held: list[np.ndarray] = []

    def draw(m: Mechanism, units: int, stream: RandomStream) -> np.ndarray:
        if held:
            return held.pop()
        held.append(draw_batch(m, units, stream))
        return held[0]

    return Parts(draw_batch=draw)


def _cap_ignored() -> Parts:
    return Parts(draw_batch=lambda m, n, s: draw_batch(replace(m, max_batch_size=None, population=None), n, s))


def _cap_keeps_the_first() -> Parts:
    def draw(m: Mechanism, units: int, stream: RandomStream) -> np.ndarray:
        batch = draw_batch(replace(m, max_batch_size=None, population=None), m.population or units, stream)
        return batch[: m.max_batch_size][batch[: m.max_batch_size] < units]

    return Parts(draw_batch=draw)


def _cap_drawn_again() -> Parts:
    def draw(m: Mechanism, units: int, stream: RandomStream) -> np.ndarray:
        while True:
            batch = draw_batch(replace(m, max_batch_size=None, population=None), m.population or units, stream)
            if len(batch) <= (m.max_batch_size or units):
                return batch[batch < units]

    return Parts(draw_batch=draw)


def _absent_places_left_out() -> Parts:
    def draw(m: Mechanism, units: int, stream: RandomStream) -> np.ndarray:
        return draw_batch(replace(m, population=max(units, m.max_batch_size or 0)), units, stream)

    return Parts(draw_batch=draw)


def _clipped_by_record() -> Parts:
    records: list[PerUnit] = []

    def by_unit(per_example: PerExample, owners: Any, units: int) -> PerUnit:
        ones = torch.ones_like(per_example.losses)
        records.append(PerUnit(per_example.gradients, per_example.losses, ones))
        return sum_by_unit(per_example, owners, units)

    def clip(per_unit: PerUnit, m: Mechanism) -> ClippedSum:
        total = ClippedSum.zero(sum(g[0].numel() for g in per_unit.gradients.values()))
        while records:
            total = total + clipped_sum(records.pop(), m)
        return total

    return Parts(sum_by_unit=by_unit, clipped_sum=clip)


def _clipped_by_tensor() -> Parts:
    def clip(per_unit: PerUnit, m: Mechanism) -> ClippedSum:
        parts = [clipped_sum(replace(per_unit, gradients={n: g}), m) for n, g in per_unit.gradients.items()]
        return replace(clipped_sum(per_unit, m), gradient=np.concatenate([part.gradient for part in parts]))

    return Parts(clipped_sum=clip)


def _clipped_as_a_batch() -> Parts:
    def clip(per_unit: PerUnit, m: Mechanism) -> ClippedSum:
        whole = {name: g.sum(0, keepdim=True) for name, g in per_unit.gradients.items()}
        joined = clipped_sum(PerUnit(whole, per_unit.losses.mean()[None], per_unit.counts.sum()[None]), m)
        scaled = joined.gradient * len(per_unit.losses)
        return replace(clipped_sum(per_unit, m), gradient=scaled)

    return Parts(clipped_sum=clip)


def _nan_goes_through() -> Parts:
    def clip(per_unit: PerUnit, m: Mechanism) -> ClippedSum:
        rows = torch.cat([g.double().flatten(1) for g in per_unit.gradients.values()], 1)
        factors = (m.clipping_norm * (1 - 1e-6) / rows.norm(dim=1)).clamp(max=1)
        return replace(clipped_sum(per_unit, m), gradient=(rows * factors[:, None]).sum(0).numpy())

    return Parts(clipped_sum=clip)


def _not_clipped() -> Parts:
    return Parts(clipped_sum=lambda per_unit, m: clipped_sum(per_unit, replace(m, private=False)))


def _loss_not_bounded() -> Parts:
    def clip(per_unit: PerUnit, m: Mechanism) -> ClippedSum:
        return replace(clipped_sum(per_unit, m), loss=float((per_unit.losses / (LOSS_BOUND / 2) - 1).sum()))

    return Parts(clipped_sum=clip)


def _share_counted_by_record() -> Parts:
    def clip(per_unit: PerUnit, m: Mechanism) -> ClippedSum:
        clipped = clipped_sum(per_unit, m)
        return replace(clipped, below=float(per_unit.counts.sum()) / 2)

    return Parts(clipped_sum=clip)


FAULTS: dict[str, Callable[[], Parts]] = {
    "half the noise": _half_the_noise,
    "noise each microbatch": _noise_each_microbatch,
    "one noise for all steps": _one_noise_for_all_steps,
    "a seed all sites share": _a_seed_all_sites_share,
    "noise in bfloat16": _noise_in_bfloat16,
    "side sums for free": _side_sums_for_free,
    "side sums not noised": _side_sums_not_noised,
    "noise scaled by the batch drawn": _noise_scaled_by_the_batch_drawn,
    "divided by the batch drawn": _divided_by_the_batch_drawn,
    "empty batches skipped": _empty_batches_skipped,
    "shuffled": _shuffled,
    "fixed size": _fixed_size,
    "rate of the loader": _rate_of_the_loader,
    "two batches a step": _two_batches_a_step,
    "a batch used twice": _a_batch_used_twice,
    "cap ignored": _cap_ignored,
    "cap keeps the first": _cap_keeps_the_first,
    "cap drawn again": _cap_drawn_again,
    "absent places left out": _absent_places_left_out,
    "clipped by record": _clipped_by_record,
    "clipped by tensor": _clipped_by_tensor,
    "clipped as a batch": _clipped_as_a_batch,
    "NaN goes through": _nan_goes_through,
    "not clipped": _not_clipped,
    "loss not bounded": _loss_not_bounded,
    "share counted by record": _share_counted_by_record,
}
