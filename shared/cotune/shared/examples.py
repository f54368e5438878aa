"""Records to token ids: what is read, what is learnt, where a record is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cotune.shared.errors import DataError, ModelError
from cotune.shared.job import Job
from cotune.shared.records import Record


@dataclass(frozen=True, slots=True, repr=False)
class Example:
    """One record as tokens. Sensitive: it has no repr.

    Attributes:
        ids: Token ids, at most max_length.
        start: Index of the first token that is learnt; the loss is over ids[start:].
        label: Index into the job's labels, or -1 for a completion task.
    """

    ids: tuple[int, ...]
    start: int
    label: int = -1


def tokenize(records: Sequence[Record], tokenizer: Any, job: Job) -> list[Example]:
    """Every record as one example: a record is never joined with another, so the unit stays one row.

    A record longer than `model.max_length` loses the start of its prompt, or the end of its text.

    Raises:
        DataError: A record has a label the job does not list, or nothing left to learn.
        ModelError: Messages came and the tokenizer has no chat template.
    """
    classes = {label: index for index, label in enumerate(job.task.labels)}
    if classes:
        return [_classified(record, number, tokenizer, job, classes) for number, record in enumerate(records, 1)]
    return [_completed(record, number, tokenizer, job) for number, record in enumerate(records, 1)]


def _classified(
    record: Record,
    number: int,
    tokenizer: Any,
    job: Job,
    classes: dict[str, int],
) -> Example:
    label = record.label if record.shape == "label" else record.completion.strip()
    if label not in classes:
        raise DataError(
            "E-DATA-LABEL",
            f"record {number} has a label that is not in task.labels (labels are public and agreed, never read"
            " off the data)",
            param="task.labels",
        )
    text = record.text if record.shape == "label" else record.prompt
    ids = tokenizer(text, truncation=True, max_length=job.model.max_length)["input_ids"]
    return Example(tuple(ids), 0, classes[label])


def _completed(record: Record, number: int, tokenizer: Any, job: Job) -> Example:
    if record.shape == "text":
        ids = _ids(tokenizer, record.text)[: job.model.max_length]
        return _checked(Example(tuple(ids), 1), number)
    if record.shape == "messages":
        prompt, answer = _conversation(record, tokenizer)
    else:
        prompt = _ids(tokenizer, record.text if record.shape == "label" else record.prompt)
        answer = _ids(tokenizer, answer_of(record))
    answer = (answer + _end(tokenizer, job))[: job.model.max_length - 1]
    prompt = prompt[-(job.model.max_length - len(answer)) :] or [_start_token(tokenizer)]
    return _checked(Example(tuple(prompt + answer), len(prompt)), number)


def answer_of(record: Record) -> str:
    """What a completion model shall say after a record's prompt; empty for texts and conversations."""
    return {"completion": record.completion, "label": f" {record.label}"}.get(record.shape, "")


def choice_tokens(choices: Sequence[str], tokenizer: Any) -> list[tuple[int, ...]]:
    """Tokens of each answer a record may get, ended, so that none is the beginning of another."""
    end = -1 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
    return [(*_ids(tokenizer, choice), end) for choice in choices]


def _conversation(record: Record, tokenizer: Any) -> tuple[list[int], list[int]]:
    """All but the last message as the model's own chat prompt; the last is the answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "E-MODEL-TEMPLATE",
            "the data has messages, but this base model's tokenizer has no chat template",
            param="model.base",
            hint='give rows as {"prompt": ..., "completion": ...}, or take an instruction-tuned model',
        )
    *context, (_, answer) = record.messages
    turns = [{"role": role, "content": content} for role, content in context]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return _ids(tokenizer, prompt), _ids(tokenizer, answer)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _end(tokenizer: Any, job: Job) -> list[int]:
    return [tokenizer.eos_token_id] if job.task.end_token and tokenizer.eos_token_id is not None else []


def _start_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _checked(example: Example, number: int) -> Example:
    if len(example.ids) <= example.start:
        raise DataError(
            "E-DATA-EMPTY-EXAMPLE", f"record {number} leaves no token to learn", hint="cotune data check FILE"
        )
    return example
