"""A round of DP-SGD: against plain SGD where there is no privacy, and as noise alone where there is no record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.client.rounds import (
    OPEN,
    PRIVATE,
    by_record,
    examples_of,
    network_of,
    nobody,
    noise_of,
    stream,
    train,
    trainer_of,
)

from cotune.client.randomness import secure_stream
from cotune.client.sampling import draw_batch
from cotune.client.training import Start, Trainer
from cotune.shared.adapter import Vector
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.methods import layout_of, quiet_peft, read, save, trainable
from cotune.shared.model import load_model, locate
from cotune.shared.network import Network
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.schedule import learning_rate


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small matrices: threads would only wait for each other."""
    torch.set_num_threads(1)


def by_plain_autograd(job: Job, left_out: set[int] | None = None) -> dict[str, Vector]:
    """The reference: torch's own optimiser on the batch loss, divided by the expected batch size."""
    network, examples = network_of(job), examples_of(job)
    parameters = list(trainable(network.adapted).values())
    source, sizes = stream(), []
    optimiser: torch.optim.Optimizer = torch.optim.SGD(
        parameters, lr=job.train.learning_rate, momentum=job.train.momentum
    )
    if job.train.optimizer == "adamw":
        optimiser = torch.optim.AdamW(parameters, lr=job.train.learning_rate, weight_decay=0.0)
    for step in range(job.train.local_steps):
        batch = draw_batch(mechanism_of(job), len(examples), source)
        sizes.append(len(batch))
        kept = [examples[row] for row in batch if row not in (left_out or set())]
        optimiser.zero_grad()
        (network.losses(kept, None).sum() / job.train.batch_size).backward()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(job, step)
        optimiser.step()
    assert any(size != job.train.batch_size for size in sizes), "this would not tell the two divisors apart"
    return read(network.adapted)


def assert_equal(got: dict[str, Vector], wanted: dict[str, Vector], atol: float = 2e-6) -> None:
    assert got.keys() == wanted.keys()
    for name, reference in wanted.items():
        np.testing.assert_allclose(got[name], reference, rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"microbatch": 1},
        {"microbatch": 30},
        {"momentum": 0.9},
        {"schedule": "linear"},
        {"optimizer": "adamw", "learning_rate": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", ["ffa", "fedavg_ab"], ids=["B", "A and B"])
def test_without_privacy_a_round_is_plain_training_on_the_mean_over_the_expected_batch(
    make_job: Any, settings: dict[str, Any], rule: str
) -> None:
    job = make_job(privacy=OPEN, train={"local_steps": 3, **settings}, aggregation={"rule": rule})
    got = train(trainer_of(job), job)
    assert_equal(got, by_plain_autograd(job), atol=1e-4 if job.train.optimizer == "adamw" else 2e-6)
    assert any(value.any() for name, value in got.items() if ".lora_B." in name)


def test_a_classifier_trains_its_head_like_plain_training(make_job: Any, tiny_encoder: Path) -> None:
    job = make_job(
        privacy=OPEN,
        model={"base": str(tiny_encoder)},
        task={"kind": "classify", "labels": ["cardio", "derma", "pulmo"]},
        lora={"target_modules": ["query", "value"]},
        train={"local_steps": 3},
    )
    got = train(trainer_of(job), job)
    assert_equal(got, by_plain_autograd(job))
    assert any(value.any() for name, value in got.items() if name.endswith("classifier.bias"))


def test_frozen_tensors_and_the_base_model_do_not_move(make_job: Any) -> None:
    job = make_job(privacy=PRIVATE)
    trainer = trainer_of(job)
    before = {n: p.detach().clone() for n, p in trainer.network.adapted.named_parameters()}
    train(trainer, job)
    moved = {n for n, p in trainer.network.adapted.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".lora_B." in n}


def test_an_empty_batch_is_a_step_of_noise_alone(make_job: Any) -> None:
    job = make_job(privacy=PRIVATE, train={"local_steps": 1})
    mechanism = nobody(job)
    trainer = trainer_of(job)
    got = trainer.layout.flatten(train(trainer, job, mechanism=mechanism))
    source = stream()
    assert len(draw_batch(mechanism, 30, source)) == 0
    noise = noise_of(mechanism, trainer.layout.size, source)
    np.testing.assert_allclose(got, -job.train.learning_rate * noise, rtol=1e-6)
    assert np.abs(got).min() > 0


def test_an_empty_batch_without_privacy_changes_nothing(make_job: Any) -> None:
    job = make_job(privacy=OPEN)
    network = network_of(job)
    before = read(network.adapted)
    assert_equal(train(Trainer(network, job, "0" * 64), job, mechanism=nobody(job)), before, atol=0)


def test_every_step_draws_a_fresh_batch_and_fresh_noise(make_job: Any) -> None:
    job = make_job(privacy=PRIVATE, train={"local_steps": 2})
    mechanism = nobody(job)
    trainer = trainer_of(job)
    got = trainer.layout.flatten(train(trainer, job, mechanism=mechanism))
    source, noises = stream(), []
    for _ in range(2):
        draw_batch(mechanism, 30, source)
        noises.append(noise_of(mechanism, trainer.layout.size, source))
    assert abs(np.corrcoef(noises[0], noises[1])[0, 1]) < 0.4
    np.testing.assert_allclose(got, -job.train.learning_rate * (noises[0] + noises[1]), atol=1e-5)


def test_progress_counts_the_steps_from_one(make_job: Any) -> None:
    job = make_job(privacy=PRIVATE, train={"local_steps": 3})
    trainer, steps, data = trainer_of(job), [], by_record(examples_of(job))
    begin, features = Start(1, read(trainer.network.adapted)), Features(trainer.network, data.examples)
    trainer.train_round(begin, data, features, mechanism_of(job), secure_stream(), steps.append)
    assert steps == [1, 2, 3]


def test_a_constant_rate_stays_and_a_linear_one_ends_at_a_tenth(make_job: Any) -> None:
    constant = make_job(run={"rounds": 2}, train={"local_steps": 3, "learning_rate": 0.8})
    assert [learning_rate(constant, step) for step in range(6)] == [0.8] * 6
    linear = constant.replace(train={"schedule": "linear"})
    rates = [learning_rate(linear, step) for step in range(6)]
    assert rates == pytest.approx([0.8, 0.656, 0.512, 0.368, 0.224, 0.08])


def test_a_linear_rate_over_one_step_is_the_rate(make_job: Any) -> None:
    job = make_job(run={"rounds": 1}, train={"local_steps": 1, "learning_rate": 0.8, "schedule": "linear"})
    assert learning_rate(job, 0) == 0.8


def test_the_schedule_runs_on_over_the_rounds(make_job: Any) -> None:
    job = make_job(run={"rounds": 3}, train={"local_steps": 1, "schedule": "linear"}, privacy=PRIVATE)
    sizes = []
    for number in (1, 2, 3):
        trainer = trainer_of(job)
        values = train(trainer, job, number=number, mechanism=nobody(job))
        sizes.append(float(np.linalg.norm(trainer.layout.flatten(values))))
    assert [size / sizes[0] for size in sizes] == pytest.approx([1, 0.55, 0.1], rel=1e-4)


def test_the_optimiser_starts_anew_each_round(make_job: Any) -> None:
    job = make_job(privacy=OPEN, train={"momentum": 0.9})
    trainer = trainer_of(job)
    after_one = train(trainer, job)
    assert any(value.any() for name, value in after_one.items() if ".lora_B." in name)
    assert_equal(train(trainer, job, number=2, mechanism=nobody(job)), after_one, atol=0)


def test_a_record_that_overflows_never_spreads(make_job: Any) -> None:
    job = make_job(privacy=OPEN, train={"local_steps": 3})
    trainer, examples, source = trainer_of(job), examples_of(job), stream()
    spoilt = int(draw_batch(mechanism_of(job), 30, source)[0])
    features = Features(trainer.network, examples)
    for kept in features.of([spoilt]) or []:
        kept[:] = np.nan
    got = train(trainer, job, features=features)
    assert all(np.isfinite(value).all() for value in got.values())
    assert_equal(got, by_plain_autograd(job, left_out={spoilt}))


def test_an_adapter_that_is_not_finite_still_gives_a_step_of_noise_alone(make_job: Any) -> None:
    job = make_job(privacy={**PRIVATE}, train={"local_steps": 1})
    trainer = trainer_of(job)
    name, parameter = next(iter(trainable(trainer.network.adapted).items()))
    with torch.no_grad():
        parameter.fill_(float("nan"))
    got = train(trainer, job)
    assert all(np.isfinite(value).all() for other, value in got.items() if other != name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_noised_step_moves_every_trained_number_of_the_model_that_is_saved(
    make_job: Any, tmp_path: Path, optimizer: str
) -> None:
    """The optimiser's parameters are the model's own: they once were not in a per-example wrapper elsewhere."""
    from peft import PeftModel

    job = make_job(privacy=PRIVATE, train={"optimizer": optimizer, "learning_rate": 0.1})
    trainer, examples = trainer_of(job), examples_of(job)
    before = trainer.network.losses(examples, None).detach()
    values = train(trainer, job)
    assert all((value != 0).all() for name, value in values.items() if ".lora_B." in name)
    after = trainer.network.losses(examples, None).detach()
    assert float((after - before).abs().max()) > 1e-4
    base = locate(job)
    save(tmp_path / "adapter", values, layout_of(job, base)[1], "card")
    with quiet_peft():
        reloaded = Network(PeftModel.from_pretrained(load_model(base, job), str(tmp_path / "adapter")).eval(), job)
    torch.testing.assert_close(reloaded.losses(examples, None).detach(), after, rtol=1e-5, atol=1e-6)


def test_training_lowers_the_loss_on_what_can_be_learnt(make_job: Any) -> None:
    job = make_job(privacy=OPEN, train={"local_steps": 30, "learning_rate": 1.0})
    trainer, examples = trainer_of(job), examples_of(job)
    before = float(trainer.network.losses(examples, None).detach().mean())
    train(trainer, job)
    assert float(trainer.network.losses(examples, None).detach().mean()) < 0.8 * before
