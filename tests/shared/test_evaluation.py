"""Scores against naive ones: mean losses, constrained greedy answers, Wilson intervals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotune.shared import evaluation
from cotune.shared.evaluation import MAX_AUTO_CHOICES, Evaluation, Evaluator, choices_of, probe_records
from cotune.shared.examples import answer_of, tokenize
from cotune.shared.job import Job
from cotune.shared.methods import attach, read, write
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.records import Record, read_records

NESTED = (" heart", " heart blood", " heart lung", " heart blood vessel", " skin", " skin rash", " bone")
SIGNS = ["fever", "cough", "heart", "skin", "eye", "lung", "bone", "tooth", "pain", "rash", "blood", "vessel"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small matrices: threads would only wait for each other."""
    torch.set_num_threads(1)


def network_of(job: Job, seed: int = 5) -> Network:
    network = Network(attach(load_model(locate(job), job), job), job)
    random = np.random.default_rng(seed)
    values = {n: random.normal(size=a.shape) * 0.3 for n, a in read(network.adapted).items()}
    write(network.adapted, {n: value.astype(np.float32) for n, value in values.items()})
    return network


def records_of(answers: tuple[str, ...], count: int = 42) -> list[Record]:
    """Records with prompts of several lengths, answered by each of `answers` in turn."""
    made: list[Record] = []
    for i in range(count):
        prompt = " ".join(SIGNS[(i * k) % 12] for k in range(1, 2 + i % 6))
        made.append(Record("completion", prompt, answers[i % len(answers)], "", "", (), {}))
    return made


def naive_accuracy(network: Network, records: list[Record], choices: tuple[str, ...], job: Job) -> float:
    """Greedy decoding held to the choices, one record and one whole forward pass after the other."""
    tokenizer, hits = load_tokenizer(locate(job)), 0
    end = [tokenizer.eos_token_id] if job.task.end_token else []
    answers = {c: tokenizer(c, add_special_tokens=False)["input_ids"] + end for c in choices}
    for record in records:
        told, left, depth = tokenizer(record.prompt, add_special_tokens=False)["input_ids"], list(choices), 0
        while len(left) > 1:
            with torch.no_grad():
                scores = network.inner(input_ids=torch.tensor([told])).logits[0, -1]
            allowed = {answers[c][depth] for c in left if depth < len(answers[c])}
            best = max(allowed, key=lambda token: float(scores[token]))
            left = [c for c in left if depth < len(answers[c]) and answers[c][depth] == best]
            told, depth = [*told, best], depth + 1
        hits += left[0] == record.completion
    return hits / len(records)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("layers", [2, "all"])
def test_accuracy_is_that_of_naive_decoding_though_answers_begin_alike(make_job: Any, seed: int, layers: Any) -> None:
    job = make_job(lora={"last_layers": layers})
    network, records = network_of(job, seed), records_of(NESTED)
    got = Evaluator(network, records, load_tokenizer(locate(job)), job).score()
    assert got.accuracy == pytest.approx(naive_accuracy(network, records, NESTED, job))


def test_naive_decoding_finds_some_answers_and_misses_some(make_job: Any) -> None:
    job = make_job()
    found = [naive_accuracy(network_of(job, seed), records_of(NESTED), NESTED, job) for seed in (1, 2, 3)]
    assert len({*found}) > 1
    assert 0 < sum(found) / 3 < 1


def test_accuracy_is_naive_decodings_without_an_end_token_too(make_job: Any) -> None:
    answers = (" heart blood", " heart lung", " skin", " bone vessel")
    job = make_job(task={"end_token": False})
    network, records = network_of(job), records_of(answers)
    got = Evaluator(network, records, load_tokenizer(locate(job)), job).score()
    assert got.accuracy == pytest.approx(naive_accuracy(network, records, answers, job))


def test_answers_the_tokenizer_cannot_tell_apart_do_not_stop_the_run(make_job: Any) -> None:
    job = make_job()
    records = records_of((" unknownword", " otherword", " heart"))
    got = Evaluator(network_of(job), records, load_tokenizer(locate(job)), job).score()
    assert 0 <= float(got.accuracy or 0) <= 1


def test_choices_beyond_those_present_compete(make_job: Any) -> None:
    job = make_job(eval={"choices": list(NESTED)})
    network, records = network_of(job, 2), records_of((" heart", " skin rash"))
    got = Evaluator(network, records, load_tokenizer(locate(job)), job).score()
    assert got.accuracy == pytest.approx(naive_accuracy(network, records, NESTED, job))


def test_loss_and_token_accuracy_are_means_over_records_of_means_over_tokens(make_job: Any) -> None:
    job = make_job()
    network, records = network_of(job), records_of(NESTED)
    losses, rights = [], []
    for example in tokenize(records, load_tokenizer(locate(job)), job):
        with torch.no_grad():
            logits = network.inner(input_ids=torch.tensor([example.ids])).logits[0, example.start - 1 : -1]
        targets = torch.tensor(example.ids[example.start :])
        losses.append(float(torch.nn.functional.cross_entropy(logits, targets)))
        rights.append(float((logits.argmax(-1) == targets).float().mean()))
    got = Evaluator(network, records, load_tokenizer(locate(job)), job).score()
    assert (got.loss, got.token_accuracy) == pytest.approx((np.mean(losses), np.mean(rights)), rel=1e-5)
    assert got.examples == 42


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_scores_do_not_depend_on_what_is_scored_together(
    make_job: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    network, records, tokenizer = network_of(job), records_of(NESTED), load_tokenizer(locate(job))
    usual = Evaluator(network, records, tokenizer, job).score().to_dict()
    monkeypatch.setattr(evaluation, "CHUNK", chunk)
    assert Evaluator(network, records, tokenizer, job).score().to_dict() == pytest.approx(usual, rel=1e-5)


def test_a_limit_scores_the_first_rows_among_all_the_choices(make_job: Any) -> None:
    job = make_job(eval={"choices": list(NESTED)})
    network, records, tokenizer = network_of(job), records_of(NESTED), load_tokenizer(locate(job))
    evaluator = Evaluator(network, records, tokenizer, job)
    few = Evaluator(network, records[:9], tokenizer, job).score().to_dict()
    assert evaluator.score(9).to_dict() == pytest.approx(few, rel=1e-5)
    assert evaluator.score(1000).examples == 42


def test_a_score_follows_the_adapter_that_is_in_the_network(make_job: Any) -> None:
    job = make_job()
    network, records = network_of(job, 1), records_of(NESTED)
    evaluator = Evaluator(network, records, load_tokenizer(locate(job)), job)
    before = evaluator.score().loss
    write(network.adapted, read(network_of(job, 2).adapted))
    assert evaluator.score().loss != pytest.approx(before, rel=1e-4)


def test_a_classifiers_accuracy_is_how_often_its_likeliest_class_is_right(make_job: Any, tiny_encoder: Path) -> None:
    job = make_job(
        model={"base": str(tiny_encoder)},
        task={"kind": "classify", "labels": ["cardio", "derma", "pulmo"]},
        lora={"target_modules": ["query", "value"]},
    )
    network, tokenizer = network_of(job), load_tokenizer(locate(job))
    records = read_records(Path(str(job.eval.data)))
    hits = []
    for example in tokenize(records, tokenizer, job):
        with torch.no_grad():
            scores = network.inner(input_ids=torch.tensor([example.ids])).logits[0]
        hits.append(int(scores.argmax()) == example.label)
    got = Evaluator(network, records, tokenizer, job).score()
    assert got.accuracy == got.token_accuracy == pytest.approx(np.mean(hits))
    assert got.accuracy_low is not None


def test_the_interval_is_wilsons_at_95_percent(make_job: Any) -> None:
    job = make_job()
    got = Evaluator(network_of(job), records_of(NESTED), load_tokenizer(locate(job)), job).score()
    n, p, z = 42, float(got.accuracy or 0), 1.959963984540054
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    wanted = ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
    assert (got.accuracy_low, got.accuracy_high) == pytest.approx(wanted, abs=1e-9)


def test_records_without_choices_have_no_accuracy(make_job: Any) -> None:
    job = make_job(eval={"choices": []})
    got = Evaluator(network_of(job), records_of(NESTED), load_tokenizer(locate(job)), job).score()
    assert (got.accuracy, got.accuracy_low, got.accuracy_high) == (None, None, None)
    assert got.loss > 0


def test_few_distinct_answers_are_ranked_by_themselves(make_job: Any) -> None:
    job = make_job()
    assert choices_of(records_of(NESTED), job) == sorted(NESTED)
    assert choices_of(records_of(NESTED, 14), job) == sorted(NESTED), "each occurs twice"


def test_answers_are_not_ranked_when_alone_too_many_or_hardly_repeated(make_job: Any) -> None:
    job = make_job()
    many = tuple(f" answer {i}" for i in range(MAX_AUTO_CHOICES + 1))
    assert choices_of(records_of(NESTED[:1]), job) == []
    assert choices_of(records_of(NESTED, 13), job) == []
    assert choices_of(records_of(many, 500), job) == []
    assert len(choices_of(records_of(many[:-1], 500), job)) == MAX_AUTO_CHOICES


def test_texts_conversations_and_classes_have_no_answers_to_rank(make_job: Any, tiny_encoder: Path) -> None:
    texts = [Record("text", "", "", "fever cough", "", (), {})] * 9
    talks = [Record("messages", "", "", "", "", (("user", "a"), ("assistant", "b")), {})] * 9
    job = make_job()
    assert choices_of(texts, job) == choices_of(talks, job) == []
    assert choices_of([*records_of(NESTED), *texts], job) == []
    classify = job.replace(task={"kind": "classify", "labels": ("a", "b")})
    assert choices_of(records_of(NESTED), classify) == []


def test_listed_choices_are_ranked_with_those_that_occur(make_job: Any) -> None:
    job = make_job(eval={"choices": [" tooth", " heart"]})
    assert choices_of(records_of((" heart", " skin")), job) == [" heart", " skin", " tooth"]


@pytest.mark.parametrize("kind", ["completion", "classify"])
def test_the_probe_sentences_can_be_scored_by_any_job(make_job: Any, tiny_encoder: Path, kind: str) -> None:
    settings: dict[str, Any] = {}
    if kind == "classify":
        settings = {
            "model": {"base": str(tiny_encoder)},
            "task": {"kind": "classify", "labels": ["cardio", "derma"]},
            "lora": {"target_modules": ["query", "value"]},
        }
    job = make_job(**settings)
    records = probe_records(job)
    got = Evaluator(network_of(job), records, load_tokenizer(locate(job)), job).score()
    assert got.examples == 3
    assert math.isfinite(got.loss)
    assert {answer_of(record) for record in records} == ({""} if kind == "completion" else {" cardio"})


def test_scores_are_json_with_nulls_for_what_there_is_not() -> None:
    assert Evaluation(3, 1.5, 0.5).to_dict() == {
        "examples": 3,
        "loss": 1.5,
        "token_accuracy": 0.5,
        "accuracy": None,
        "accuracy_low": None,
        "accuracy_high": None,
    }
