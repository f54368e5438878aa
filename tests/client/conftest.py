"""A site of one data set, and what a coordinator may ask of it: no model is needed to say no."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotune.client.guard import Guard
from cotune.client.home import SiteHome
from cotune.client.policy import POLICY_FILE, Policy
from cotune.shared.codec import encode
from cotune.shared.errors import CotuneError
from cotune.shared.job import Job
from cotune.shared.jobfile import parse_job, validate
from cotune.shared.plan import RoundPlan, cotune_version
from cotune.shared.privacy.event import Event
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.update import AdapterUpdate, UpdateHeader, payload_sha256

MODEL = "ab" * 32
Sections = dict[str, Any]
MakePolicy = Callable[..., Policy]
AskJob = Callable[..., Job]
MakeHome = Callable[..., SiteHome]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """40 rows of 10 persons."""
    rows = [{"prompt": f"note {i}:", "completion": f" code {i % 3}", "patient": f"p{i % 10}"} for i in range(40)]
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_policy(notes: Path) -> MakePolicy:
    """The policy of st-mary; settings are given as section=dict, those of its data set as dataset and budget."""

    def make(dataset: Sections | None = None, budget: Sections | None = None, **sections: Sections) -> Policy:
        settings: dict[str, Any] = {
            "site": {"name": "st-mary"},
            "allow": {"models": [f"sha256:{MODEL}"], "max_lora_rank": 16},
        }
        for name, changes in sections.items():
            settings[name] = {**settings.get(name, {}), **changes}
        described = {"id": "notes", "path": str(notes), "unit": "column:patient", "max_per_unit": 4, **(dataset or {})}
        described["budget"] = {"epsilon_total": 4.0, "epsilon_per_run": 2.0, "delta_total": 1e-5, **(budget or {})}
        return validate({**settings, "dataset": [described]}, POLICY_FILE, origin="test")

    return make


@pytest.fixture
def ask_job() -> AskJob:
    """A resolved job that the policy of `make_policy` lets pass; settings are given as section=dict."""

    def make(**sections: Sections) -> Job:
        settings: dict[str, Any] = {
            "run": {"name": "study", "rounds": 3},
            "model": {"base": "owner/model"},
            "data": {
                "sites": {"st-mary": "home", "charite": "home"}, "dataset": "notes", "records_per_site": 400,
                "unit": "column:patient", "units_per_site": 100, "max_per_unit": 4,
            },
            "train": {"batch_size": 10, "local_steps": 2},
            "privacy": {"level": "unit", "noise_multiplier": 1.5, "delta": 1e-5},
            "federation": {"min_sites": 2},
        }  # fmt: skip
        for name, changes in sections.items():
            settings[name] = {**settings.get(name, {}), **changes}
        return parse_job(settings, origin="test")

    return make


@pytest.fixture
def make_home(tmp_path: Path, make_policy: MakePolicy) -> MakeHome:
    """st-mary's home at tmp_path/home, with a policy as `make_policy` makes it."""

    def make(**sections: Sections) -> SiteHome:
        return SiteHome.create(tmp_path / "home", make_policy(**sections))

    return make


@pytest.fixture
def guard(make_home: MakeHome, ask_job: AskJob) -> Guard:
    """st-mary's guard; the job of `ask_job` is approved."""
    home = make_home()
    home.jobs.approve(ask_job(), by="admin")
    return Guard(home)


@dataclass(frozen=True)
class Desk:
    """What a coordinator and a site do to each other, in one call each."""

    model: str = MODEL

    def plan(self, job: Job, number: int = 1, **changes: Any) -> RoundPlan:
        """A plan for st-mary."""
        facts = {
            "run_id": "run-1", "cotune": cotune_version(), "job": job, "site": "st-mary", "round": number,
            "base_sha256": "0" * 64, "frozen_sha256": "1" * 64, "clipping_norm": job.privacy.clipping_norm,
            "rank": job.rank_of("st-mary"),
        }  # fmt: skip
        return RoundPlan(**{**facts, **changes})

    def event(self, job: Job) -> Event:
        """What one round releases."""
        return mechanism_of(job).event(job.train.local_steps)

    def update(self, guard: Guard, plan: RoundPlan, fill: float = 0.5) -> AdapterUpdate:
        """An update as a site makes it, of five numbers."""
        payload = encode(np.full(5, fill, dtype=np.float32), "fp32", 0)
        header = UpdateHeader(
            site=plan.site,
            run_id=plan.run_id,
            round=plan.round,
            job_sha256=plan.job.sha256(),
            base_sha256=plan.base_sha256,
            update_sha256=payload_sha256(payload),
            event=self.event(plan.job).to_dict(),
            head=guard.home.ledger.head,
        )
        return AdapterUpdate(header, payload)

    def reserve(self, guard: Guard, plan: RoundPlan) -> None:
        """A round up to its charge."""
        guard.reserve(plan, guard.admit(plan, MODEL), self.event(plan.job))

    def take(self, guard: Guard, plan: RoundPlan, fill: float = 0.5) -> AdapterUpdate:
        """One whole round, as `Site.train` takes it."""
        self.reserve(guard, plan)
        return guard.release(plan, self.update(guard, plan, fill), {})

    def refused(self, call: Callable[..., object], *arguments: Any) -> CotuneError:
        """The error a call ends with."""
        with pytest.raises(CotuneError) as caught:
            call(*arguments)
        return caught.value

    def actions(self, home: SiteHome) -> list[str]:
        """The actions of a ledger, as a new reader sees them."""
        return [json.loads(line)["action"] for line in (home.path / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture
def desk() -> Desk:
    """Both sides."""
    return Desk()
