"""Planted secrets: how exposed they are, and whether the model says them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np

from cotune.simulations.attack.canaries import Planted, random_digits, record_of
from cotune.simulations.attack.reader import Reader

ALTERNATIVES = 64  # other digits a secret is ranked among, itself included
SHOWN = 10
LISTED = 200


def exposures(reader: Reader, secrets: Sequence[Planted]) -> dict[str, Any]:
    """Exposure in bits of each secret: log2 of the alternatives less log2 of its rank (Carlini et al. 2019, section 4).

    The rank is by the released model's loss among other random digits after the same prompt, the same for every run.
    A secret nobody learnt has any rank with equal chance.
    """
    values = [_exposure(reader, secret) for secret in secrets]
    return {
        "mean": float(np.mean(values)),
        "median": float(np.median(values)),
        "max": max(values),
        "chance_mean": math.log2(ALTERNATIVES) - float(np.log2(np.arange(1, ALTERNATIVES + 1)).mean()),
        "values": values[:LISTED],
    }


def _exposure(reader: Reader, secret: Planted) -> float:
    chance, others = Random(secret.id), {secret.answer}  # noqa: S311 - what is guessed is no secret
    while len(others) < ALTERNATIVES:
        others.add(" " + random_digits(chance))
    answers = [secret.answer, *sorted(others - {secret.answer})]
    losses = reader.released_losses([record_of(replace(secret, answer=text), reader.job) for text in answers])
    rank = 1 + float((losses[1:] < losses[0]).sum()) + float((losses[1:] == losses[0]).sum()) / 2
    return math.log2(ALTERNATIVES) - math.log2(rank)


def extracted(reader: Reader, secrets: Sequence[Planted]) -> dict[str, Any]:
    """Which secrets the released model says when it is given the prompt and decoded greedily."""
    said, wanted = reader.say([record_of(secret, reader.job) for secret in secrets])
    shares = [float(np.mean(np.equal(*pair))) for pair in zip(said, wanted, strict=True)]
    examples = [
        {"prompt": secret.prompt, "secret": secret.answer.strip(), "said": reader.text(words).strip()}
        for secret, words in zip(secrets, said, strict=True)
    ]
    return {
        "planted": len(secrets),
        "recovered": sum(share == 1.0 for share in shares),
        "tokens_recovered": float(np.mean(shares)),
        "examples": examples[:SHOWN],
    }
