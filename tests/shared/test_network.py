"""Losses are per example, alike alone or padded, and alike in one piece or split in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotune.shared.errors import ModelError
from cotune.shared.examples import Example, tokenize
from cotune.shared.job import Job
from cotune.shared.methods import attach, read, write
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network, checkpoint, mean_by_row
from cotune.shared.records import read_records

CLASSIFY: dict[str, Any] = {"kind": "classify", "labels": ["cardio", "derma", "pulmo"]}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small matrices: threads would only wait for each other."""
    torch.set_num_threads(1)


def network_of(job: Job, seed: int = 5) -> Network:
    network = Network(attach(load_model(locate(job), job), job), job)
    random = np.random.default_rng(seed)
    values = {n: random.normal(size=a.shape) * 0.1 for n, a in read(network.adapted).items()}
    write(network.adapted, {n: value.astype(np.float32) for n, value in values.items()})
    return network


def examples_of(job: Job) -> list[Example]:
    """Eight examples of lengths 4 to 12."""
    whole = tokenize(read_records(Path(str(job.data.train)))[:8], load_tokenizer(locate(job)), job)
    return [Example(e.ids[i:], max(0, e.start - i), e.label) for i, e in enumerate(whole)]


@pytest.fixture
def encoder_job(make_job: Any, tiny_encoder: Path) -> Job:
    return make_job(model={"base": str(tiny_encoder)}, task=CLASSIFY, lora={"target_modules": ["query", "value"]})


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_split_network_gives_the_logits_and_losses_of_the_whole_one(make_job: Any, layers: int) -> None:
    job = make_job(lora={"last_layers": layers})
    network, examples = network_of(job), examples_of(job)
    assert network.splits
    hidden = network.encode(examples)
    assert [h.shape for h in hidden] == [(len(e.ids), 32) for e in examples]
    for split, whole in zip(network.logits(examples, hidden), network.logits(examples, None), strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.losses(examples, hidden), network.losses(examples, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", ["all", 4])
def test_a_network_adapted_down_to_the_first_layer_is_not_split(make_job: Any, layers: Any) -> None:
    job = make_job(lora={"last_layers": layers})
    network = network_of(job)
    assert not network.splits
    assert torch.isfinite(network.losses(examples_of(job), None)).all()


def test_a_classifier_is_not_split(encoder_job: Job) -> None:
    assert not network_of(encoder_job.replace(lora={"last_layers": 1})).splits


def test_the_lower_layers_do_not_depend_on_the_adapter(make_job: Any) -> None:
    job = make_job()
    examples = examples_of(job)
    first, second = (network_of(job, seed).encode(examples) for seed in (5, 6))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    losses = [network_of(job, seed).losses(examples, first).detach() for seed in (5, 6)]
    assert float((losses[0] - losses[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["whole", "split", "classify"])
def test_an_examples_loss_is_the_same_alone_and_padded_beside_others(
    make_job: Any, encoder_job: Job, kind: str
) -> None:
    job = encoder_job if kind == "classify" else make_job()
    network, examples = network_of(job), examples_of(job)

    def losses(some: list[Example]) -> torch.Tensor:
        return network.losses(some, network.encode(some) if kind == "split" else None).detach()

    together = losses(examples)
    alone = torch.cat([losses([example]) for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses(examples[::-1]), together.flip(0), rtol=1e-5, atol=1e-5)
    assert float(together.std()) > 1e-3, "these losses must differ to tell them apart"


def test_the_check_of_padding_notices_a_mask_that_is_missing(encoder_job: Job) -> None:
    network, examples = network_of(encoder_job), examples_of(encoder_job)
    short, longest = examples[-1], len(examples[0].ids)
    padded = Example((*short.ids, *[0] * (longest - len(short.ids))), 0, short.label)
    difference = network.losses([padded], None) - network.losses([short], None)
    assert float(difference.detach().abs().max()) > 1e-4


def test_a_loss_is_the_models_own_mean_over_the_learnt_tokens(make_job: Any) -> None:
    job = make_job()
    network = network_of(job)
    for example in examples_of(job):
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[:, : example.start] = -100
        wanted = network.inner(input_ids=ids, labels=labels).loss
        torch.testing.assert_close(network.losses([example], None)[0], wanted, rtol=1e-5, atol=1e-6)


def test_a_classifiers_loss_is_the_models_own(encoder_job: Job) -> None:
    network = network_of(encoder_job)
    for example in examples_of(encoder_job):
        wanted = network.inner(input_ids=torch.tensor([example.ids]), labels=torch.tensor([example.label])).loss
        torch.testing.assert_close(network.losses([example], None)[0], wanted, rtol=1e-5, atol=1e-6)


def test_logits_come_with_the_row_and_the_token_that_is_learnt(make_job: Any) -> None:
    job = make_job()
    examples = examples_of(job)[:3]
    logits, targets, rows = network_of(job).logits(examples, None)
    assert targets.tolist() == [token for e in examples for token in e.ids[e.start :]]
    assert rows.tolist() == [row for row, e in enumerate(examples) for _ in e.ids[e.start :]]
    assert logits.shape == (len(targets), 48)


def test_a_base_model_without_adapter_can_be_scored_too(make_job: Any) -> None:
    job = make_job()
    base = Network(load_model(locate(job), job), job)
    fresh = Network(attach(load_model(locate(job), job), job), job)
    examples = examples_of(job)
    torch.testing.assert_close(base.losses(examples, None), fresh.losses(examples, None).detach())


def test_a_mean_by_row_counts_only_the_rows_own_values() -> None:
    means = mean_by_row(torch.tensor([1.0, 3.0, 10.0, 7.0]), torch.tensor([0, 0, 2, 3]), 5)
    assert means.tolist() == [2.0, 0.0, 10.0, 7.0, 0.0]


def test_in_bfloat16_losses_and_what_is_kept_are_in_single_precision(make_job: Any) -> None:
    job = make_job()
    rounded, exact = network_of(job.replace(model={"dtype": "bfloat16"})), network_of(job)
    examples = examples_of(job)
    hidden = rounded.encode(examples)
    assert {h.dtype for h in hidden} == {np.dtype(np.float32)}
    wanted = exact.losses(examples, None)
    for got in (rounded.losses(examples, hidden), rounded.losses(examples, None)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
    assert not torch.equal(rounded.losses(examples, None), wanted)


@pytest.mark.parametrize("kind", ["completion", "classify"])
def test_checkpointing_changes_no_loss_and_stays_in_evaluation_mode(make_job: Any, encoder_job: Job, kind: str) -> None:
    job = encoder_job if kind == "classify" else make_job()
    examples = examples_of(job)
    plain, network = network_of(job), network_of(job.replace(train={"checkpointing": True}))
    assert not network.adapted.training
    assert torch.equal(network.losses(examples, None), plain.losses(examples, None))
    if network.splits:
        kept = plain.encode(examples)
        for one, other in zip(network.encode(examples), kept, strict=True):
            np.testing.assert_array_equal(one, other)
        assert torch.equal(network.losses(examples, kept), plain.losses(examples, kept))


def test_checkpointing_is_refused_where_no_layer_can_be_run_again() -> None:
    with pytest.raises(ModelError) as caught:
        checkpoint(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert (caught.value.code, caught.value.param) == ("E-MODEL-CHECKPOINTING", "train.checkpointing")
    assert "microbatch" in str(caught.value.hint)
