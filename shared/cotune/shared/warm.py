"""One warm model a process: the base is loaded once, only adapters are swapped."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from cotune.shared.job import Job
from cotune.shared.jobfile import parse_job
from cotune.shared.methods import attach
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network


def warm_network(job: Job) -> tuple[Network, Any]:
    """The job's network and tokenizer, loaded at the first call of this process and kept.

    Jobs that differ in nothing the network depends on share it. The adapter in it belongs to whoever called
    last: write yours before every use. Nothing of a site is ever kept here.
    """
    needed = {
        "schema": 1,
        "model": job.model.model_dump(mode="json"),
        "task": job.task.model_dump(mode="json"),
        "lora": {**job.lora.model_dump(mode="json"), "ranks": {}},
        "aggregation": {"rule": job.aggregation.rule},
        "train": {"batch_size": 1, "checkpointing": job.train.checkpointing, "compile": job.train.compile},
        "data": {"train": "unread", "records_per_site": 1},
    }
    return _load(json.dumps(needed, sort_keys=True))


def loads() -> int:
    """How often this process has loaded a base model."""
    return _load.cache_info().misses


@lru_cache(maxsize=1)
def _load(job_json: str) -> tuple[Network, Any]:
    job = parse_job(json.loads(job_json), origin="job")
    base = locate(job)
    return Network(attach(load_model(base, job), job), job), load_tokenizer(base)
