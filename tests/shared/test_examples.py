"""Which tokens are read, which are learnt, and where a record is cut."""

from __future__ import annotations

from typing import Any

import pytest

from cotune.shared.errors import DataError, ModelError
from cotune.shared.examples import Example, answer_of, choice_tokens, tokenize
from cotune.shared.job import Job
from cotune.shared.model import load_tokenizer, locate
from cotune.shared.records import Record

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} . {% endfor %}{% if add_generation_prompt %}Specialty :{% endif %}"
)


def record(shape: Any, *, messages: tuple[tuple[str, str], ...] = (), **texts: str) -> Record:
    empty = dict.fromkeys(("prompt", "completion", "text", "label"), "")
    return Record(shape, **{**empty, **texts}, messages=messages, columns={})


def words(example: Example, tokenizer: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(example.ids))


def one(made: Record, job: Job, tokenizer: Any | None = None) -> tuple[list[str], list[str]]:
    """What is read and what is learnt of one record, as words."""
    tokenizer = tokenizer or load_tokenizer(locate(job))
    (example,) = tokenize([made], tokenizer, job)
    told = words(example, tokenizer)
    return told[: example.start], told[example.start :]


def test_a_completion_is_learnt_and_its_prompt_is_not(make_job: Any) -> None:
    made = record("completion", prompt="Diagnosis: fever. Specialty:", completion=" cardio")
    prompt = ["Diagnosis", ":", "fever", ".", "Specialty", ":"]
    assert one(made, make_job()) == (prompt, ["cardio", "<end>"])


def test_the_end_is_learnt_only_where_the_job_says_so(make_job: Any) -> None:
    made = record("completion", prompt="fever", completion=" cardio")
    assert one(made, make_job(task={"end_token": False})) == (["fever"], ["cardio"])
    assert one(made, make_job(task={"end_token": True})) == (["fever"], ["cardio", "<end>"])


def test_no_special_tokens_are_added_around_prompt_or_answer(make_job: Any) -> None:
    made = record("completion", prompt="fever", completion=" cardio")
    read, learnt = one(made, make_job())
    assert not {"[CLS]", "[SEP]"} & {*read, *learnt}


def test_a_record_that_is_too_long_loses_the_start_of_its_prompt(make_job: Any) -> None:
    made = record("completion", prompt="fever cough heart skin eye lung", completion=" derma rash")
    read, learnt = one(made, make_job(model={"max_length": 6}))
    assert (read, learnt) == (["skin", "eye", "lung"], ["derma", "rash", "<end>"])


@pytest.mark.parametrize("length", range(4, 12))
def test_no_example_is_longer_than_the_job_allows_and_the_answer_is_whole(make_job: Any, length: int) -> None:
    made = record("completion", prompt="fever cough heart skin eye lung", completion=" derma rash")
    read, learnt = one(made, make_job(model={"max_length": length}))
    assert len(read) + len(learnt) == min(length, 9)
    assert learnt == ["derma", "rash", "<end>"]


def test_an_answer_longer_than_the_job_allows_is_cut_and_keeps_one_token_to_start_from(make_job: Any) -> None:
    made = record("completion", prompt="fever cough", completion=" heart skin eye lung bone")
    read, learnt = one(made, make_job(model={"max_length": 4}))
    assert (read, learnt) == (["cough"], ["heart", "skin", "eye"])


def test_a_prompt_without_tokens_is_replaced_by_a_start_token(make_job: Any) -> None:
    made = record("completion", prompt=" ", completion=" cardio")
    assert one(made, make_job()) == (["<end>"], ["cardio", "<end>"])


def test_a_text_is_learnt_from_its_second_token_and_loses_its_end(make_job: Any) -> None:
    made = record("text", text="fever cough heart skin eye lung")
    assert one(made, make_job(model={"max_length": 4})) == (["fever"], ["cough", "heart", "skin"])
    assert one(made, make_job())[1] == ["cough", "heart", "skin", "eye", "lung"]


def test_a_labelled_text_is_learnt_as_its_label(make_job: Any) -> None:
    assert one(record("label", text="fever", label="derma"), make_job()) == (["fever"], ["derma", "<end>"])


@pytest.mark.parametrize(
    ("made", "task"),
    [
        (record("text", text="fever"), {}),
        (record("text", text=" "), {}),
        (record("completion", prompt="fever", completion=" "), {"end_token": False}),
    ],
    ids=["one token", "no token", "no answer"],
)
def test_a_record_that_leaves_nothing_to_learn_is_named_by_number_alone(
    make_job: Any, made: Record, task: dict[str, Any]
) -> None:
    job = make_job(task=task)
    good = record("completion", prompt="fever", completion=" cardio")
    with pytest.raises(DataError) as caught:
        tokenize([good, made], load_tokenizer(locate(job)), job)
    assert caught.value.code == "E-DATA-EMPTY-EXAMPLE"
    assert "record 2" in caught.value.message
    assert "fever" not in caught.value.message


def test_messages_without_a_chat_template_are_refused_with_the_way_out(make_job: Any) -> None:
    job = make_job()
    made = record("messages", messages=(("user", "fever"), ("assistant", "derma")))
    with pytest.raises(ModelError) as caught:
        tokenize([made], load_tokenizer(locate(job)), job)
    assert (caught.value.code, caught.value.param) == ("E-MODEL-TEMPLATE", "model.base")
    assert "fever" not in caught.value.message
    assert "prompt" in str(caught.value.hint)


def test_messages_are_read_through_the_models_template_and_the_last_is_learnt(make_job: Any) -> None:
    job = make_job()
    tokenizer = load_tokenizer(locate(job))
    tokenizer.chat_template = TEMPLATE
    turns = (("user", "fever"), ("assistant", "skin"), ("user", "cough"), ("assistant", "pulmo"))
    read, learnt = one(record("messages", messages=turns), job, tokenizer)
    assert read == ["fever", ".", "skin", ".", "cough", ".", "Specialty", ":"]
    assert learnt == ["pulmo", "<end>"]


def test_every_record_is_one_example_and_keeps_its_place(make_job: Any) -> None:
    job = make_job()
    tokenizer = load_tokenizer(locate(job))
    made = [record("completion", prompt=word, completion=" cardio") for word in ("fever", "cough", "heart")]
    assert [words(e, tokenizer)[0] for e in tokenize(made, tokenizer, job)] == ["fever", "cough", "heart"]
    assert tokenize([], tokenizer, job) == []


@pytest.fixture
def classify_job(make_job: Any, tiny_encoder: Any) -> Job:
    return make_job(
        model={"base": str(tiny_encoder), "max_length": 6},
        task={"kind": "classify", "labels": ["pulmo", "cardio", "derma"]},
    )


def test_a_class_is_its_place_in_the_jobs_list(classify_job: Job) -> None:
    made = [
        record("label", text="fever", label="cardio"),
        record("completion", prompt="cough", completion=" derma"),
    ]
    tokenizer = load_tokenizer(locate(classify_job))
    first, second = tokenize(made, tokenizer, classify_job)
    assert [(first.label, first.start), (second.label, second.start)] == [(1, 0), (2, 0)]
    assert ("fever" in words(first, tokenizer), "cough" in words(second, tokenizer)) == (True, True)
    assert "derma" not in words(second, tokenizer), "the answer must not be read"


def test_a_classified_text_is_cut_at_its_end(classify_job: Job) -> None:
    tokenizer = load_tokenizer(locate(classify_job))
    made = record("label", text="fever cough heart skin eye lung bone pain", label="cardio")
    (example,) = tokenize([made], tokenizer, classify_job)
    assert len(example.ids) == 6
    assert "fever" in words(example, tokenizer)
    assert "pain" not in words(example, tokenizer)


@pytest.mark.parametrize(
    "made",
    [
        record("label", text="fever", label="oncology-secret"),
        record("completion", prompt="fever", completion="oncology-secret"),
        record("text", text="fever"),
    ],
    ids=lambda made: made.shape,
)
def test_a_label_that_is_not_listed_is_refused_without_being_shown(classify_job: Job, made: Record) -> None:
    good = record("label", text="cough", label="cardio")
    with pytest.raises(DataError) as caught:
        tokenize([good, good, made], load_tokenizer(locate(classify_job)), classify_job)
    assert (caught.value.code, caught.value.param) == ("E-DATA-LABEL", "task.labels")
    assert "record 3" in caught.value.message
    said = f"{caught.value.message} {caught.value.hint}"
    assert "secret" not in said
    assert "fever" not in said


def test_an_example_shows_nothing_of_its_record() -> None:
    assert "7" not in repr(Example((7, 77, 777), 1)).split(" at 0x")[0]


def test_the_answer_of_a_record_is_its_completion_or_its_label() -> None:
    assert answer_of(record("completion", prompt="fever", completion=" cardio")) == " cardio"
    assert answer_of(record("label", text="fever", label="derma")) == " derma"
    assert answer_of(record("text", text="fever")) == ""
    assert answer_of(record("messages", messages=(("user", "a"), ("assistant", "b")))) == ""


def test_choices_are_tokenized_as_the_answers_are(make_job: Any) -> None:
    job = make_job(task={"end_token": True})
    tokenizer = load_tokenizer(locate(job))
    made = record("completion", prompt="fever", completion=" heart blood")
    (example,) = tokenize([made], tokenizer, job)
    assert choice_tokens([" heart blood"], tokenizer) == [example.ids[example.start :]]
