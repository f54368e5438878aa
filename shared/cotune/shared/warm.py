"""One warm model a process: the base is loaded once, only adapters are swapped."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from cotune.shared.job import Job
from cotune.shared.jobfile import parse_job
from cotune.shared.methods import attach
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network


def warm_network(job: Job) -> tuple[Network, Any]:
    """The job's network and tokenizer, loaded at the first call of this process and kept.

    The adapter in it belongs to whoever called last: write yours before every use. Nothing of a site is
    ever kept here.
    """
    return _load(job.replace(run={"name": "warm"}).to_json())


@lru_cache(maxsize=1)
def _load(job_json: str) -> tuple[Network, Any]:
    import json

    job = parse_job(json.loads(job_json), origin="job")
    base = locate(job)
    return Network(attach(load_model(base, job), job), job), load_tokenizer(base)
