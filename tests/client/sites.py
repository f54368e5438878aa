"""Sites of tiny jobs in homes of their own, and what a coordinator asks of them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cotune.client.data import SiteExamples, prepare
from cotune.client.guard import Guard
from cotune.client.home import SiteHome
from cotune.client.policy import DatasetPolicy
from cotune.client.site import Site
from cotune.client.training import Trainer
from cotune.shared.adapter import Vector, fingerprint, flat_sha256
from cotune.shared.aggregation import OFFSET_A, sent
from cotune.shared.codec import Payload, decode, encode
from cotune.shared.job import Job
from cotune.shared.methods import attach, initial_values
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.plan import RoundPlan, cotune_version
from cotune.shared.records import read_records
from cotune.shared.update import AdapterUpdate

PRIVATE = {"epsilon": 3.0, "noise_multiplier": 2.0, "delta": 1e-3}


class Records:
    """A site's records, and whether anybody asked for them."""

    def __init__(self, count: int = 20) -> None:
        self.count = count
        self.asked = False

    def load(self, job: Job, site: str, dataset: DatasetPolicy) -> SiteExamples:
        self.asked = True
        records = read_records(Path(str(job.data.train)))
        return prepare((records * 50)[: self.count], load_tokenizer(locate(job)), job)


def trainer_of(job: Job) -> Trainer:
    base = locate(job)
    return Trainer(Network(attach(load_model(base, job), job), job), job, base.sha256)


def site_of(job: Job, records: Records | None = None, work: Path | None = None, name: str = "site-1") -> Site:
    """A site in a new home of its own, whose policy grants just this job."""
    folder = Path(tempfile.mkdtemp(dir=Path(str(job.data.train)).parent)) / "home"
    sound = job.replace(privacy={"delta": 1e-3}) if job.privacy.delta in (0.0, 1.0) else job
    home = SiteHome.simulated(folder, name, sound, locate(job).sha256)
    return Site(Guard(home), records or Records(), work)


def plan_of(job: Job, adapter: Vector, trainer: Trainer, **changes: Any) -> RoundPlan:
    facts = {
        "run_id": "run-1",
        "cotune": cotune_version(),
        "job": job,
        "site": "site-1",
        "round": 1,
        "base_sha256": flat_sha256(adapter),
        "rank": job.lora.r,
        "frozen_sha256": fingerprint(initial_values(trainer.layout, job.run.seed)),
        "clipping_norm": job.privacy.clipping_norm,
    }
    return RoundPlan(**{**facts, **changes})


def start(trainer: Trainer) -> Vector:
    random = np.random.default_rng(2)
    return (random.normal(size=trainer.layout.size) * 0.01).astype(np.float32)


def as_sent(adapter: Vector) -> Payload:
    """An adapter as a coordinator sends it."""
    return encode(adapter, "fp32", 0)


def numbers(update: AdapterUpdate) -> Vector:
    """What an update says."""
    return decode(update.payload, "fp32", update.payload.size // 4)


def request(
    job: Job, trainer: Trainer, arrays: Mapping[str, Vector], number: int = 1, site: str = "site-1"
) -> tuple[RoundPlan, Payload]:
    """A plan, and the encoded arrays that come with it: those of a whole state that this site is sent."""
    rank, codec = job.rank_of(site), job.transport.codec_down
    offset = next((array.shape[0] for name, array in arrays.items() if OFFSET_A in name), 0)
    down = sent(job.rule, trainer.layout.at_rank(rank), offset, job.train.scaffold)
    payload = encode(down.flatten(arrays), codec, number)
    decoded = decode(payload, codec, down.size)
    return plan_of(job, decoded, trainer, round=number, site=site, rank=rank, offset_rank=offset), payload
