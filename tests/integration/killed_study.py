"""The jobs of the kill tests: what they are, how they are started, and what their sites' updates add up to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from cotune.client.home import SiteHome
from cotune.client.policy import POLICY_FILE
from cotune.client.updates import Updates
from cotune.shared.aggregation import returned
from cotune.shared.folding import folded
from cotune.shared.jobfile import load_job, validate
from cotune.shared.methods import initial_values, layout_of
from cotune.shared.model import locate
from cotune.shared.runs import RunFolder
from cotune.simulations.scenario import prepare_run

SITES = ("site-1", "site-2", "site-3")
SIGNS = {"cardio": "heart blood", "derma": "skin rash", "pulmo": "lung cough"}
WORDS = ("fever", "cough", "eye", "bone", "tooth", "pain", "chronic", "acute", "left", "right", "upper")


@dataclass(frozen=True)
class Study:
    """A job and where its runs go.

    Attributes:
        job: The job file; runs and cache are in folders beside it.
        rounds: Of the job.
        engine: What carries the messages.
        homes: The sites' own homes by name; none where the simulation makes them up.
    """

    job: Path
    rounds: int
    engine: str = "inline"
    homes: Mapping[str, Path] = field(default_factory=dict)

    def start(self, out: str, run: RunFolder | None) -> subprocess.Popen[bytes]:
        """The command in a process of its own: it goes on with `run`, or begins a new one."""
        folder = self.job.parent
        begin = ["simulate", str(self.job), "--engine", self.engine, "--out", str(folder / out), "--i-know"]
        arguments = begin if run is None else ["resume", str(run.path)]
        command = [sys.executable, "-m", "cotune.shared.cli", *arguments, "--quiet"]
        environment = {**os.environ, "COTUNE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        with self.said(out).open("wb") as said:
            return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)

    def said(self, out: str) -> Path:
        """What the newest process wrote to its standard error."""
        return self.job.parent / f"{out}.txt"

    def begun(self, out: str) -> RunFolder | None:
        """The newest run that got as far as its engine: from there on it can be resumed."""
        found = (self.job.parent / out).glob("*/env/engine.json")
        newest = max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
        return None if newest is None else RunFolder(newest.parents[1])


def rows(count: int) -> list[dict[str, str]]:
    """Made-up diagnoses, whose label follows from the words."""
    labels = [sorted(SIGNS)[i % 3] for i in range(count)]
    return [
        {"prompt": f"{WORDS[i % 7]} {SIGNS[label]} {WORDS[(i * 5) % 11]}:", "completion": f" {label}"}
        for i, label in enumerate(labels)
    ]


def write_rows(path: Path, made: list[dict[str, str]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def write_study(folder: Path, model: Path, rounds: int, **sections: dict[str, Any]) -> Study:
    """A job over three made-up sites of 30 records, with seeded noise unless said otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, dict[str, Any]] = {
        "run": {"name": "killed", "seed": 3, "rounds": rounds},
        "model": {"base": str(model), "max_length": 32},
        "lora": {"r": 2, "alpha": 4.0, "last_layers": 2},
        "data": {"train": str(write_rows(folder / "train.jsonl", rows(90))), "records_per_site": 30},
        "train": {"batch_size": 10, "local_steps": 4, "learning_rate": 0.5, "microbatch": 4},
        "privacy": {"noise_multiplier": 3.0, "noise": "test"},
        "federation": {"sites": 3, "min_sites": 3},
        "eval": {"data": str(write_rows(folder / "eval.jsonl", rows(12)))},
        "simulation": {"workers": 2, "threads": 1},
        **sections,
    }
    (folder / "run.toml").write_text(tomli_w.dumps({"schema": 1, **settings}))
    return Study(folder / "run.toml", rounds)


def write_home_study(folder: Path, model: Path) -> Study:
    """A job of three rounds with real noise, over three sites with homes of their own, which approved it."""
    homes = {name: folder / "homes" / name for name in SITES}
    data = {"sites": {name: f"home:{home}" for name, home in homes.items()}, "records_per_site": 30, "dataset": "notes"}
    privacy, federation = {"noise_multiplier": 3.0, "delta": 1e-3}, {"min_sites": 3}
    study = write_study(folder, model, 3, data=data, privacy=privacy, federation=federation)
    model_sha256 = locate(load_job(study.job)).sha256
    budget = {"epsilon_total": 400.0, "epsilon_per_run": 40.0, "delta_total": 1e-3}  # lost rounds cost twice
    for start, (name, home) in enumerate(homes.items()):
        notes = write_rows(folder / f"{name}.jsonl", rows(90)[start::3])
        said = {
            "site": {"name": name},
            "allow": {"models": [f"sha256:{model_sha256}"], "max_lora_rank": 2},
            "dataset": [{"id": "notes", "path": str(notes), "unit": "record", "budget": budget}],
        }
        SiteHome.create(home, validate(said, POLICY_FILE, origin="test"))
    job = prepare_run(str(study.job), (), folder / "prepared", lambda _line: None).job()
    for home in homes.values():
        SiteHome.open(home).jobs.approve(job, by="admin")
    return Study(study.job, study.rounds, homes=homes)


def replayed(run: RunFolder, homes: Mapping[str, Path]) -> dict[str, NDArray[np.float32]]:
    """The adapter by hand: the public start, plus each round's mean of the updates that the sites' homes hold."""
    job = run.job()
    layout, _ = layout_of(job, locate(job))
    arrays = initial_values(layout, job.run.seed)
    for number in range(1, job.run.rounds + 1):
        trained = returned(job.rule, layout, number, job.run.rounds)
        deltas: list[Mapping[str, NDArray[np.float32]]] = []
        for _, home in sorted(homes.items()):
            update = Updates(home / "updates").read(run.run_id, number)
            assert update is not None, f"{home.name} has no update of round {number}"
            deltas.append(trained.unflatten(update.delta(job.transport.codec_up, trained.size)))
        for name in trained.trained:
            total = np.zeros(trained.shapes[name])
            for delta in deltas:
                total += 1 / len(deltas) * delta[name].astype(np.float64)
            arrays[name] = arrays[name] + total.astype(np.float32)
    return folded(arrays)


def tiny_model(folder: Path) -> Path:
    """A random Llama of four layers with a word tokenizer, as in the tests' own."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = ["[UNK]", "<end>", *WORDS, *SIGNS, *(word for sign in SIGNS.values() for word in sign.split()), ":"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<end>")
    fast.save_pretrained(folder)
    return folder
