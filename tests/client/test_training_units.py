"""Rounds in which a unit is a person with several rows, and what leaves a round besides the adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.client.rounds import (
    OPEN,
    PRIVATE,
    by_person,
    by_record,
    examples_of,
    network_of,
    nobody,
    stream,
    train,
    trainer_of,
)

from cotune.client.clipping import ClippedSum
from cotune.client.data import SiteExamples, prepare
from cotune.client.leaves import Leaves
from cotune.client.noise import draw_noise, privatise
from cotune.client.sampling import draw_batch
from cotune.client.training import RoundResult, Start, Trainer
from cotune.shared.adapter import Vector
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.methods import attach, read, trainable
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network, padded_length
from cotune.shared.privacy.mechanism import Mechanism, mechanism_of
from cotune.shared.records import Record


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small matrices: threads would only wait for each other."""
    torch.set_num_threads(1)


def clipped_by_hand(job: Job, data: SiteExamples, units: list[int], norm: float) -> dict[str, Vector]:
    """The reference: plain autograd over all of a person's rows at once, scaled to the norm, summed."""
    network, total = network_of(job), dict.fromkeys(trainable(network_of(job).adapted), 0.0)
    for unit in units:
        network.losses([data.examples[row] for row in data.rows(unit)], None).sum().backward()
        own = {name: p.grad.double().numpy().copy() for name, p in trainable(network.adapted).items()}
        for parameter in trainable(network.adapted).values():
            parameter.grad = None
        length = np.sqrt(sum(np.square(gradient).sum() for gradient in own.values()))
        total = {name: total[name] + own[name] * min(1.0, norm / length) for name in own}
    return {name: np.asarray(value, dtype=np.float32) for name, value in total.items()}


@pytest.mark.parametrize("microbatch", [1, 4, 7, 64])
@pytest.mark.parametrize("norm", [1e-3, 0.05, 1e3])
def test_a_persons_rows_are_summed_before_the_person_is_clipped_however_many_passes_that_takes(
    make_job: Any, microbatch: int, norm: float
) -> None:
    job = make_job(
        privacy={"noise_multiplier": 1.0, "delta": 1e-3, "clipping_norm": norm},
        train={"microbatch": microbatch, "local_steps": 1, "batch_size": 10},
    )
    trainer, data = trainer_of(job), by_person(examples_of(job))
    everybody = replace(mechanism_of(job), sampling_probability=1.0, noise_multiplier=1e-12)
    before = read(trainer.network.adapted)
    got = train(trainer, job, mechanism=everybody, data=data)
    wanted = clipped_by_hand(job, data, list(range(6)), norm)
    for name, total in wanted.items():
        moved = (before[name] - got[name]) * 10 / job.train.learning_rate
        np.testing.assert_allclose(moved, total, rtol=1e-3, atol=1e-4 * float(np.abs(total).max()))


def test_a_batch_is_of_persons_and_the_rate_is_theirs(make_job: Any) -> None:
    job = make_job(privacy=OPEN, train={"local_steps": 1})
    trainer, data = trainer_of(job), by_person(examples_of(job))
    batch = draw_batch(mechanism_of(job), 6, stream())
    assert 0 < len(batch) < 6
    got = train(trainer, job, data=data)
    wanted = clipped_by_hand(job, data, [int(unit) for unit in batch], 1e9)
    for name, total in wanted.items():
        np.testing.assert_allclose(got[name], -total * job.train.learning_rate / 10, rtol=1e-3, atol=1e-6)


# What leaves besides the adapter

SIDES = {"noise_multiplier": 0.5, "delta": 1e-3, "clipping": "adaptive", "metrics": "noised"}


def result_of(job: Job, data: SiteExamples, mechanism: Mechanism, number: int = 1) -> RoundResult:
    trainer = trainer_of(job)
    features = Features(trainer.network, data.examples)
    begin = Start(number, read(trainer.network.adapted))
    return trainer.train_round(begin, data, features, mechanism, stream(), lambda _step: None)


def test_without_being_asked_for_nothing_else_leaves(make_job: Any) -> None:
    for privacy in (PRIVATE, OPEN, {**OPEN, "clipping": "adaptive", "metrics": "noised"}):
        job = make_job(privacy=privacy)
        result = result_of(job, by_record(examples_of(job)), mechanism_of(job))
        assert {name for name, value in vars(result).items() if value is not None} == {"arrays"}
        assert tuple(result.arrays) == trainer_of(job).layout.trained


def test_the_released_loss_is_the_mean_over_the_steps_and_the_noise_it_has_is_the_streams(make_job: Any) -> None:
    job = make_job(privacy=SIDES, train={"local_steps": 3})
    mechanism, source, wanted = nobody(job), stream(), []
    for _ in range(3):
        draw_batch(mechanism, 30, source)
        released = privatise(ClippedSum.zero(192), mechanism, draw_noise(mechanism, 192, source))
        wanted.append(released.loss or 0.0)
    assert trainer_of(job).layout.size == 192
    result = result_of(job, by_record(examples_of(job)), mechanism)
    assert result.loss == pytest.approx(np.mean(wanted))


def test_the_loss_of_a_full_batch_is_the_models_own(make_job: Any) -> None:
    job = make_job(privacy={**SIDES, "clipping": "flat"}, train={"local_steps": 1, "batch_size": 30})
    data = by_record(examples_of(job))
    true = float(network_of(job).losses(data.examples, None).detach().clamp(0, 8).mean())
    mechanism = mechanism_of(job)
    assert mechanism.sampling_probability == 1
    result = result_of(job, data, mechanism)
    assert result.loss == pytest.approx(true, abs=6 * mechanism.side_noise_multiplier / 30 * 4)
    assert result.clipping_norm is None


@pytest.mark.parametrize(("norm", "moves"), [(1e-6, 1), (1e6, -1)])
def test_the_norm_moves_towards_the_quantile_and_the_noise_with_it(make_job: Any, norm: float, moves: int) -> None:
    job = make_job(privacy={**SIDES, "clipping_norm": norm}, train={"local_steps": 20, "batch_size": 30})
    result = result_of(job, by_record(examples_of(job)), mechanism_of(job))
    expected = norm * np.exp(moves * 0.5 * job.privacy.clipping_rate * 20)
    assert result.clipping_norm == pytest.approx(expected, rel=0.5)


def test_a_norm_that_has_moved_is_the_norm_of_the_next_step(make_job: Any) -> None:
    """Of empty batches everything is known: the second step's noise is of the norm the first one left."""
    job = make_job(privacy=SIDES, train={"local_steps": 2})
    mechanism, source, trainer = nobody(job), stream(), trainer_of(job)
    moved, norm = np.zeros(trainer.layout.size), mechanism.clipping_norm
    for _ in range(2):
        draw_batch(mechanism, 30, source)
        here = replace(mechanism, clipping_norm=norm)
        released = privatise(ClippedSum.zero(192), here, draw_noise(here, 192, source))
        moved -= job.train.learning_rate * released.gradient
        norm *= np.exp(-job.privacy.clipping_rate * ((released.below or 0.0) - job.privacy.clipping_quantile))
    data = by_record(examples_of(job))
    features = Features(trainer.network, data.examples)
    begin = Start(1, read(trainer.network.adapted))
    result = trainer.train_round(begin, data, features, mechanism, stream(), lambda _step: None)
    assert result.clipping_norm == pytest.approx(norm)
    assert norm != mechanism.clipping_norm
    np.testing.assert_allclose(trainer.layout.flatten(read(trainer.network.adapted)), moved, rtol=1e-4, atol=1e-6)


def test_a_normalised_round_is_trained_at_nearly_the_norm(make_job: Any) -> None:
    job = make_job(privacy={**PRIVATE, "clipping": "normalised", "clipping_norm": 1e-3}, train={"local_steps": 1})
    one = SiteExamples(examples_of(job)[:1], np.zeros(1, dtype=np.intp), 1)
    quiet = replace(mechanism_of(job), sampling_probability=1.0, noise_multiplier=1e-12)
    moved = trainer_of(job).layout.flatten(train(trainer_of(job), job, mechanism=quiet, data=one))
    length = float(np.linalg.norm(moved)) * 10 / job.train.learning_rate
    assert 0.8e-3 < length <= 1e-3


def test_a_round_neither_uses_nor_moves_the_global_generators(make_job: Any) -> None:
    job = make_job(privacy=PRIVATE)
    trainers, moved = [trainer_of(job) for _ in range(2)], []
    for seed, trainer in enumerate(trainers):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # pyright: ignore
        moved.append(trainer.layout.flatten(train(trainer, job)))
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == np.random.get_state()[1].tolist()  # pyright: ignore
    np.testing.assert_array_equal(*moved)


@pytest.mark.parametrize("persons", [False, True], ids=["rows", "persons"])
def test_what_one_unit_adds_does_not_depend_on_who_else_is_in_the_batch(make_job: Any, persons: bool) -> None:
    """Padding to a neighbour's length would change the rounding of the shorter row: 9 % of a gradient in bf16."""
    for dtype in ("float32", "bfloat16"):
        unit = {"unit": "column:patient", "units_per_site": 30} if persons else {}
        job = make_job(
            model={"dtype": dtype}, data=unit, train={"microbatch": 7},
            privacy={"level": "unit" if persons else "example", "noise_multiplier": 1.0, "delta": 1e-3},
        )  # fmt: skip
        words = [
            "fever",
            "cough",
            "heart",
            "skin",
            "eye",
            "lung",
            "bone",
            "tooth",
            "pain",
            "rash",
            "blood",
            "vessel",
            "chronic",
            "acute",
            "left",
            "right",
        ]
        texts = [" ".join(words[i % 5 :] * 3)[: 20 + 11 * (i % 9)] for i in range(40)]
        records = [
            Record("text", prompt="", completion="", text=text, label="", messages=(), columns={"patient": i % 12})
            for i, text in enumerate(texts)
        ]
        base = locate(job)
        trainer = Trainer(Network(attach(load_model(base, job), job), job), job, base.sha256)
        data = prepare(records, load_tokenizer(base), job)
        assert len({padded_length(len(example.ids)) for example in data.examples}) > 2

        def sums(units: list[int], trainer: Trainer = trainer, data: SiteExamples = data, job: Job = job) -> Any:
            features = Features(trainer.network, data.examples)
            leaves = Leaves(trainer.network.adapted, trainer.layout, {})
            given = data, features, mechanism_of(job), leaves, trainer.layout
            return trainer._sum(np.array(units), *given).gradient  # pyright: ignore[reportPrivateUsage]

        alone = np.array([sums([unit]) for unit in range(data.units)])
        together = sums(list(range(data.units)))
        apart = float(np.linalg.norm(together - alone.sum(axis=0))) / float(np.linalg.norm(alone, axis=1).sum())
        assert apart <= 1e-6, dtype
