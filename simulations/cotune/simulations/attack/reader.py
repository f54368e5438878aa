"""A reader of the released model: it has the base, the adapter, and questions."""

from __future__ import annotations

from collections.abc import Sequence
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

    Raises:
        ModelError: The adapter or its base does not load.
    """

    def __init__(self, run: RunFolder) -> None:
        self.job = run.local_job()
        base = locate(self.job)
        self.tokenizer: Any = load_tokenizer(base)
        self._adapted = load_adapter(load_model(base, self.job), run.adapter)
        self._network = Network(self._adapted, self.job)

    def losses(self, records: Sequence[Record]) -> Losses:
        """Each record's loss by the base and by the released model, both from one pass of the frozen layers."""
        examples = tokenize(records, self.tokenizer, self.job)
        features = Features(self._network, examples)
        with self._adapted.disable_adapter():
            base = self._losses(examples, features)
        return Losses(base, self._losses(examples, features))

    def released_losses(self, records: Sequence[Record]) -> Floats:
        """Each record's loss by the released model alone."""
        examples = tokenize(records, self.tokenizer, self.job)
        return self._losses(examples, Features(self._network, examples))

    @torch.no_grad()
    def _losses(self, examples: Sequence[Example], features: Features) -> Floats:
        found = np.zeros(len(examples))
        order = sorted(range(len(examples)), key=lambda row: len(examples[row].ids))
        for start in range(0, len(order), CHUNK):
            rows = order[start : start + CHUNK]
            found[rows] = self._network.losses([examples[row] for row in rows], features.of(rows)).cpu().numpy()
        return np.nan_to_num(found, nan=LARGEST_LOSS, posinf=LARGEST_LOSS)

    @torch.no_grad()
    def say(self, record: Record) -> tuple[list[int], list[int]]:
        """What it says to a record's prompt, greedily, and what the record's answer is: as many tokens each."""
        example = tokenize([record], self.tokenizer, self.job.replace(task={"end_token": False}))[0]
        said: list[int] = []
        for _ in example.ids[example.start :]:
            asked = Example((*example.ids[: example.start], *said, 0), example.start + len(said))
            logits, _, _ = self._network.logits([asked], None)
            said.append(int(logits[-1].argmax()))
        return said, list(example.ids[example.start :])

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
