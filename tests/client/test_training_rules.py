"""What a rule, FedProx and SCAFFOLD change of a round: which tensors take their turn, and along what they step."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tests.client.rounds import (
    OPEN,
    PRIVATE,
    by_hand,
    by_record,
    examples_of,
    nobody,
    noise_of,
    stream,
    trainer_of,
)

from cotune.client.sampling import draw_batch
from cotune.client.training import RoundResult, Start, Trainer
from cotune.shared.adapter import Vector, nested
from cotune.shared.aggregation import A, B
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.methods import initial_values, read
from cotune.shared.privacy.mechanism import Mechanism, mechanism_of

FULL = {"data": {"records_per_site": 30}, "train": {"batch_size": 30, "local_steps": 3, "learning_rate": 0.2}}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small matrices: threads would only wait for each other."""
    torch.set_num_threads(1)


def somewhere(job: Job, scale: float = 0.1) -> dict[str, Vector]:
    """Adapters of which no number is zero."""
    random = np.random.default_rng(21)
    shapes = trainer_of(job).layout.shapes.items()
    return {name: (random.normal(size=shape) * scale).astype(np.float32) for name, shape in shapes}


def taken(
    trainer: Trainer, job: Job, start: Start, mechanism: Mechanism | None = None
) -> tuple[RoundResult, list[dict[str, Vector]]]:
    """A round's result, and the adapter before it and after each step."""
    data, seen = by_record(examples_of(job)), [dict(start.arrays)]
    features = Features(trainer.network, data.examples)
    result = trainer.train_round(
        start,
        data,
        features,
        mechanism or mechanism_of(job),
        stream(),
        lambda _: seen.append(read(trainer.network.adapted)),
    )
    return result, seen


def factors_moved(before: Mapping[str, Vector], after: Mapping[str, Vector]) -> str:
    """The factors of which anything moved; fails if of those not all numbers did."""
    moved = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert all((before[name] != after[name]).all() for name in moved)
    kinds = {mark for mark in (A, B) if any(mark in name for name in moved)}
    assert moved == {name for name in before if any(mark in name for mark in kinds)}
    return "".join(mark.strip(".")[-1] for mark in (A, B) if mark in kinds)


@pytest.mark.parametrize("optimizer", [{}, {"momentum": 0.9}, {"optimizer": "adamw"}], ids=str)
@pytest.mark.parametrize(
    ("rule", "number", "turns"),
    [
        ("alternating_steps", 1, ["B", "A", "B"]),
        ("alternating_steps", 2, ["A", "B", "A"]),
        ("alternating_steps", 3, ["B", "A", "B"]),
        ("alternating_rounds", 1, ["B", "B", "B"]),
        ("alternating_rounds", 2, ["A", "A", "A"]),
        ("fedavg_ab", 1, ["AB", "AB", "AB"]),
        ("ffa", 2, ["B", "B", "B"]),
    ],
)
def test_only_the_tensors_whose_turn_it_is_move_and_the_others_stay_to_the_bit(
    make_job: Any, rule: str, number: int, turns: list[str], optimizer: dict[str, Any]
) -> None:
    train = {"local_steps": 3, "learning_rate": 0.1, **optimizer}
    job = make_job(run={"rounds": 3}, privacy=PRIVATE, aggregation={"rule": rule}, train=train)
    result, seen = taken(trainer_of(job), job, Start(number, somewhere(job)))
    assert [factors_moved(before, after) for before, after in pairwise(seen)] == turns
    assert all(result.arrays[name].tobytes() == seen[-1][name].tobytes() for name in result.arrays)


@pytest.mark.parametrize("rule", ["alternating_steps", "alternating_rounds"])
@pytest.mark.parametrize("number", [1, 2])
def test_noise_is_drawn_for_the_tensors_whose_turn_it_is_and_no_others(make_job: Any, rule: str, number: int) -> None:
    job = make_job(privacy=PRIVATE, aggregation={"rule": rule}, train={"local_steps": 2})
    trainer, mechanism, source = trainer_of(job), nobody(job), stream()
    _, seen = taken(trainer, job, Start(number, somewhere(job)), mechanism)
    for step, (before, after) in enumerate(pairwise(seen)):
        turn = (number - 1) * 2 + step if rule == "alternating_steps" else number - 1
        part = trainer.layout.only([n for n in trainer.layout.trained if (B if turn % 2 == 0 else A) in n])
        assert 0 < part.size < trainer.layout.size
        draw_batch(mechanism, 30, source)
        moved = (part.flatten(before) - part.flatten(after)) / job.train.learning_rate
        np.testing.assert_allclose(moved, noise_of(mechanism, part.size, source), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["alternating_steps", "alternating_rounds"])
def test_a_step_clips_by_the_norm_of_what_it_trains(make_job: Any, rule: str) -> None:
    """One record and its gradient longer than the norm: each step moves its own factor by just the norm."""
    norm = 1e-2
    job = make_job(
        run={"rounds": 4}, aggregation={"rule": rule}, train={"local_steps": 2, "learning_rate": 10.0},
        privacy={"noise_multiplier": 1e-9, "epsilon": 1e12, "delta": 1e-3, "clipping_norm": norm},
        data={"records_per_site": 10},
    )  # fmt: skip
    trainer, data = trainer_of(job), by_record(examples_of(job)[:1])
    for number in (1, 2):
        seen = [somewhere(job)]
        trainer.train_round(
            Start(number, seen[0]), data, Features(trainer.network, data.examples), mechanism_of(job), stream(),
            lambda _: seen.append(read(trainer.network.adapted)),  # noqa: B023 - called within the round
        )  # fmt: skip
        for before, after in pairwise(seen):
            lengths = [
                float(np.sqrt(sum(np.square(after[n].astype(float) - before[n]).sum() for n in before if mark in n)))
                for mark in (A, B)
            ]
            assert sorted(length * 10 / 10.0 for length in lengths) == pytest.approx([0, norm], rel=1e-3, abs=1e-9)


def assert_equal(got: Mapping[str, Vector], wanted: Mapping[str, Vector]) -> None:
    for name in got:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("rule", ["ffa", "fedavg_ab"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_fedprox_pulls_each_step_back_to_where_the_round_began(make_job: Any, rule: str, schedule: str) -> None:
    train = {**FULL["train"], "proximal": 3.0, "schedule": schedule}
    job = make_job(privacy=OPEN, data=FULL["data"], train=train, aggregation={"rule": rule})
    assert mechanism_of(job).sampling_probability == 1
    start = somewhere(job)
    got = taken(trainer_of(job), job, Start(2, start))[0].arrays
    assert_equal(got, by_hand(job, 2, start))
    free = by_hand(job.replace(train={"proximal": 0.0}), 2, start)
    assert max(float(np.abs(got[name] - free[name]).max()) for name in got) > 1e-3


@pytest.mark.parametrize("proximal", [0.0, 0.7])
def test_scaffold_adds_its_correction_to_every_step(make_job: Any, proximal: float) -> None:
    train = {**FULL["train"], "scaffold": True, "proximal": proximal}
    job = make_job(privacy=OPEN, data=FULL["data"], train=train, aggregation={"rule": "fedavg_ab"})
    start, correction = somewhere(job), {name: np.sin(array * 40) for name, array in somewhere(job).items()}
    got = taken(trainer_of(job), job, Start(1, start, correction))[0].arrays
    assert_equal(got, by_hand(job, 1, start, correction))
    plain = by_hand(job, 1, start)
    assert min(float(np.abs(got[name] - plain[name]).max()) for name in got) > 1e-2


@pytest.mark.parametrize("rule", ["ffa", "fedavg_ab", "fed_sb"])
@pytest.mark.parametrize(("proximal", "shift"), [(0.7, 0.0), (0.0, 3.0), (0.7, 3.0)])
def test_pull_and_correction_are_added_to_what_was_noised_and_clipped(
    make_job: Any, rule: str, proximal: float, shift: float
) -> None:
    """Of empty batches everything is known: two steps of noise, the pull to the start, and the correction."""
    train = {"local_steps": 2, "proximal": proximal, "scaffold": shift > 0}
    job = make_job(privacy=PRIVATE, train=train, aggregation={"rule": rule})
    trainer, mechanism, source, start = trainer_of(job), nobody(job), stream(), somewhere(job)
    correction = {name: np.full_like(start[name], shift) for name in trainer.layout.trained if shift}
    result, _ = taken(trainer, job, Start(1, start, correction), mechanism)
    moved = np.zeros(trainer.layout.size)
    for _ in range(2):
        draw_batch(mechanism, 30, source)
        noise = noise_of(mechanism, trainer.layout.size, source)
        moved -= job.train.learning_rate * (noise + proximal * moved + shift)
    got = trainer.layout.flatten(result.arrays) - trainer.layout.flatten(start)
    np.testing.assert_allclose(got, moved, rtol=1e-4, atol=1e-6)


# Ranks


def test_a_smaller_rank_trains_as_a_whole_one_whose_further_rows_are_zero(make_job: Any) -> None:
    job = make_job(privacy=OPEN, data=FULL["data"], train=FULL["train"], lora={"r": 3, "ranks": {"site-1": 2}})
    start = initial_values(trainer_of(job).layout, job.run.seed)
    padded = {name: np.concatenate([a[:2], 0 * a[2:]]) if A in name else a for name, a in start.items()}
    wanted = by_hand(job, 1, padded)
    got = taken(trainer_of(job), job, Start(1, nested(start, 2)))[0].arrays
    for name, array in got.items():
        assert array.shape[1] == 2
        np.testing.assert_allclose(array, wanted[name][:, :2], rtol=1e-4, atol=2e-6, err_msg=name)
        assert not wanted[name][:, 2].any() and array.all()


def test_the_rank_of_who_trained_before_is_forgotten(make_job: Any) -> None:
    """One warm network serves sites of all ranks, also with a trainer that is made after one of a smaller rank."""
    job = make_job(privacy=PRIVATE, aggregation={"rule": "fedavg_ab"}, lora={"r": 3, "ranks": {"site-2": 1}})
    fresh, used = trainer_of(job), trainer_of(job)
    start, small = somewhere(job), nested(somewhere(job), 1)
    taken(used, job, Start(1, small))
    assert {array.shape for name, array in read(used.network.adapted).items() if A in name} == {(1, 32)}
    later = Trainer(used.network, job, "0" * 64)
    assert later.layout == fresh.layout
    wanted = taken(fresh, job, Start(1, start))[0].arrays
    for trainer in (used, later):
        got = taken(trainer, job, Start(1, start))[0].arrays
        assert all(got[name].tobytes() == wanted[name].tobytes() for name in wanted)
