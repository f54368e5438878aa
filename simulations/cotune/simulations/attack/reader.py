"""A reader of the released model: it has the base, the adapter, and questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cotune.shared.examples import Example, tokenize
from cotune.shared.features import Features
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.records import Record
from cotune.shared.runs import RunFolder
from cotune.shared.scoring import load_adapter
from cotune.simulations.attack.membership import Floats, Losses

CHUNK = 32
LARGEST_LOSS = 1e4  # what counts for a model that has lost its numbers


class Reader:
    """What anybody can do who was given a run's adapter.

    Args:
        run: The run.
        kept: A folder in which attacks on runs with one base find what its frozen layers make of rows; None: none.

    Raises:
        ModelError: The adapter or its base does not load.
    """

    def __init__(self, run: RunFolder, kept: Path | None = None) -> None:
        self.job = run.local_job()
        self._kept = kept
        base = locate(self.job)
        self.tokenizer: Any = load_tokenizer(base)
        self._adapted = load_adapter(load_model(base, self.job), run.adapter)
        self._network = Network(self._adapted, self.job)

    def losses(self, records: Sequence[Record]) -> Losses:
        """Each record's loss by the base and by the released model, both from one pass of the frozen layers."""
        examples = tokenize(records, self.tokenizer, self.job)
        features = Features(self._network, examples, self._kept)
        with self._adapted.disable_adapter():
            base = self._losses(examples, features)
        return Losses(base, self._losses(examples, features))

    def released_losses(self, records: Sequence[Record]) -> Floats:
        """Each record's loss by the released model alone."""
        examples = tokenize(records, self.tokenizer, self.job)
        return self._losses(examples, Features(self._network, examples, self._kept))

    @torch.no_grad()
    def _losses(self, examples: Sequence[Example], features: Features) -> Floats:
        found = np.zeros(len(examples))
        order = sorted(range(len(examples)), key=lambda row: len(examples[row].ids))
        for start in range(0, len(order), CHUNK):
            rows = order[start : start + CHUNK]
            found[rows] = self._network.losses([examples[row] for row in rows], features.of(rows)).cpu().numpy()
        return np.nan_to_num(found, nan=LARGEST_LOSS, posinf=LARGEST_LOSS)

    @torch.no_grad()
    def say(self, records: Sequence[Record]) -> tuple[list[list[int]], list[list[int]]]:
        """What it says to each record's prompt, greedily, and each record's answer: as many tokens of either."""
        examples = tokenize(records, self.tokenizer, self.job.replace(task={"end_token": False}))
        answers = [list(example.ids[example.start :]) for example in examples]
        said: list[list[int]] = [[] for _ in records]
        for depth in range(max(map(len, answers))):
            open_ = [place for place, answer in enumerate(answers) if len(answer) > depth]
            asked = [_continued(examples[place], said[place]) for place in open_]
            logits, _, _ = self._network.logits(asked, None)
            for place, best in zip(open_, logits.argmax(-1).tolist(), strict=True):
                said[place].append(int(best))
        return said, answers

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _continued(example: Example, said: Sequence[int]) -> Example:
    """A prompt with what was said so far, asking for one token more."""
    return Example((*example.ids[: example.start], *said, 0), example.start + len(said))
