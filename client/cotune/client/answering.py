"""What every process that trains for a site has in common, in a simulation as behind an agent."""

from __future__ import annotations

import json
from functools import lru_cache

import torch

from cotune.client.home import SiteHome
from cotune.client.policy import DatasetPolicy
from cotune.client.rules import unknown_dataset
from cotune.client.training import Trainer
from cotune.shared.errors import CotuneError
from cotune.shared.job import Job
from cotune.shared.jobfile import parse_job
from cotune.shared.model import locate
from cotune.shared.placement import device
from cotune.shared.records import Record, read_records
from cotune.shared.update import SiteFailure
from cotune.shared.warm import warm_network

NO_MEMORY = "can't allocate memory"  # what torch says on a CPU, in a RuntimeError


def warm_trainer(job: Job) -> Trainer:
    """A trainer for a job on this process's one warm network; the same one as long as the job is the same."""
    return _trainer(job.to_json())


@lru_cache(maxsize=1)
def _trainer(job_json: str) -> Trainer:
    job = parse_job(json.loads(job_json), origin="plan")
    return Trainer(warm_network(job)[0], job, locate(job).sha256)


def own_dataset(home: SiteHome, job: Job) -> DatasetPolicy:
    """The data set of a site's policy that a job is about.

    Raises:
        RefusedError: E-POLICY: it is about none.
    """
    dataset = home.policy.find(job.data.dataset)
    if dataset is None:
        raise unknown_dataset(home.policy, job.data.dataset).error(home.name)
    return dataset


def own_records(home: SiteHome, dataset: DatasetPolicy, job: Job) -> list[Record]:
    """The records of a site's data set.

    Raises:
        DataError: The file cannot be read, or a row of it cannot be used.
    """
    return read_records(home.data_path(dataset), job.data.format)


def device_text() -> str:
    """Where models run here, for people."""
    where = device()
    if where.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    free, total = torch.cuda.mem_get_info(where)
    return f"{torch.cuda.get_device_name(where)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def failure_of(site: str, error: Exception) -> SiteFailure:
    """An error as a site's answer.

    Guarantee: of an error that cotune did not foresee, whose text may quote a record, only its type's name is told.

    Edge cases: memory that ran out is named (E-OOM), whichever library met it; the round it met stays charged.
    """
    if isinstance(error, CotuneError):
        return SiteFailure(site=site, code=error.code, message=error.message, exit_code=error.exit_code)
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if out_of_memory or (isinstance(error, RuntimeError) and NO_MEMORY in str(error)):
        return SiteFailure(site=site, code="E-OOM", message=f"{site}: ran out of memory", exit_code=1)
    return SiteFailure(site=site, code="E-INTERNAL", message=type(error).__name__, exit_code=5)
