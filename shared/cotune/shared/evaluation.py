"""Scoring an adapter on public records: loss, token accuracy and, where answers can be listed, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.shared.examples import Example, answer_of, choice_tokens, tokenize
from cotune.shared.fairness import by_group, groups_of, wilson_interval
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.network import Network, mean_by_row
from cotune.shared.records import Record

CHUNK = 32
MAX_AUTO_CHOICES = 50
Scores = NDArray[np.floating]
PROBE = ("The capital of France is Paris.", "Water boils at one hundred degrees.", "She sells sea shells.")


@dataclass(frozen=True)
class Evaluation:
    """Scores on `examples` records; accuracy with its 95 % Wilson interval, None where there are no choices.

    Attributes:
        groups: The same by group, see `fairness.by_group`; None where the job names no column or has no choices.
    """

    examples: int
    loss: float
    token_accuracy: float
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    groups: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON; without `groups` where there are none."""
        return {name: value for name, value in asdict(self).items() if name != "groups" or value}


class Evaluator:
    """A fixed set of records to score one network on again and again.

    Accuracy is that of greedy decoding constrained to the job's choices: at each token the most probable one
    that continues a choice is taken, until one choice is left. For `classify` it is the most probable class.

    Args:
        network: The model; its adapter may change between scorings.
        records: What is scored.
        tokenizer: The model's.
        job: Says the task and the choices.
        kept: Keep what the lower layers make of the records in files there; None for memory.
    """

    def __init__(
        self, network: Network, records: Sequence[Record], tokenizer: Any, job: Job, kept: Path | None = None
    ) -> None:
        self._network = network
        self._column = job.eval.group_column
        self._groups = groups_of(records, self._column) if self._column else []
        self._examples = tokenize(records, tokenizer, job)
        self._kept = kept
        self._features = Features(network, self._examples, kept)
        choices = choices_of(records, job)
        tokens = dict(zip(choices, choice_tokens(choices, tokenizer), strict=True))
        self._choices = sorted(set(tokens.values()))
        self._wanted = [tokens[answer_of(record)] for record in records] if choices else []

    @torch.no_grad()
    def score(self, limit: int | None = None) -> Evaluation:
        """Score the first `limit` records, or all."""
        count = min(limit or len(self._examples), len(self._examples))
        order = sorted(range(count), key=lambda row: len(self._examples[row].ids))
        losses, tokens, hits = np.zeros(count), np.zeros(count), np.zeros(count)
        for start in range(0, count, CHUNK):
            rows = order[start : start + CHUNK]
            losses[rows], tokens[rows], hits[rows] = self._score_chunk(rows)
        accuracy = hits if self._choices or self._network.classify else None
        scores = _summarise(losses, tokens, accuracy)
        if accuracy is None or not self._column:
            return scores
        return replace(scores, groups=by_group(self._column, self._groups[:count], accuracy.tolist()))

    def _score_chunk(self, rows: list[int]) -> tuple[Scores, Scores, Scores]:
        examples = [self._examples[row] for row in rows]
        logits, targets, owners = self._network.logits(examples, self._features.of(rows))
        loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        right = (logits.argmax(-1) == targets).float()
        if self._network.classify:
            return loss.numpy(), right.numpy(), right.numpy()
        count = len(rows)
        hits = np.zeros(count, dtype=np.float32)
        if self._choices:
            first = logits[torch.searchsorted(owners, torch.arange(count))]
            hits = self._hits(rows, first)
        return mean_by_row(loss, owners, count).numpy(), mean_by_row(right, owners, count).numpy(), hits

    def _hits(self, rows: list[int], first: Tensor) -> Scores:
        """Whether constrained greedy decoding gives each record's own answer, as 0 or 1, shape (rows,).

        All rows that are not decided yet go one token further together.
        """
        left = dict.fromkeys(range(len(rows)), self._choices)
        logits, depth = dict(enumerate(first)), 0
        while logits:
            for place, values in logits.items():
                allowed = sorted({choice[depth] for choice in left[place]})
                best = allowed[int(values[allowed].argmax())]
                left[place] = [choice for choice in left[place] if choice[depth] == best]
            depth += 1
            open_ = [place for place in logits if len(left[place]) > 1]
            longer = [self._longer(rows[place], left[place][0][:depth]) for place in open_]
            hidden = Features(self._network, longer, self._kept).of(range(len(longer))) if open_ else None
            logits = dict(zip(open_, self._network.logits(longer, hidden)[0], strict=True)) if open_ else {}
        return np.array([left[place][0] == self._wanted[row] for place, row in enumerate(rows)], dtype=np.float32)

    def _longer(self, row: int, answer: Sequence[int]) -> Example:
        """A record's prompt with the answer so far, asking for one token more."""
        example = self._examples[row]
        return Example((*example.ids[: example.start], *answer, 0), example.start + len(answer))


def choices_of(records: Sequence[Record], job: Job) -> list[str]:
    """The answers to rank: the job's, or the distinct ones of this public file if they are few."""
    present = sorted({answer_of(record) for record in records})
    if job.task.kind == "classify" or "" in present:
        return []
    if job.eval.choices != "auto":
        return sorted({*job.eval.choices, *present}) if job.eval.choices else []
    return present if 1 < len(present) <= MAX_AUTO_CHOICES and len(present) * 2 <= len(records) else []


def settle_scoring(job: Job, records: Sequence[Record]) -> Job:
    """A job with the answers that are ranked, after its public evaluation rows; they must have its groups.

    Raises:
        JobError, DataError: See `fairness.groups_of`.
    """
    if job.eval.group_column:
        groups_of(records, job.eval.group_column)
    if job.eval.choices == "auto":
        return job.replace(eval={"choices": tuple(choices_of(records, job))})
    return job


def probe_records(job: Job) -> list[Record]:
    """Fixed public sentences, for jobs without evaluation data."""
    label = job.task.labels[0] if job.task.labels else ""
    return [
        Record(
            "label" if label else "text",
            prompt="",
            completion="",
            text=text,
            label=label,
            messages=(),
            columns={},
        )
        for text in PROBE
    ]


def _summarise(losses: Scores, tokens: Scores, hits: Scores | None) -> Evaluation:
    scores = Evaluation(len(losses), float(losses.mean()), float(tokens.mean()))
    if hits is None:
        return scores
    low, high = wilson_interval(int(hits.sum()), len(hits))
    return replace(scores, accuracy=float(hits.mean()), accuracy_low=low, accuracy_high=high)
