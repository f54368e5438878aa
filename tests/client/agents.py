"""A real site of tiny records, its agent in a process of its own, and what a courier asks of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tests.client.sites import trainer_of
from tests.conftest import rows, write_rows

from cotune.client.agent_link import AgentLink
from cotune.client.home import SiteHome
from cotune.client.policy import POLICY_FILE
from cotune.shared.adapter import fingerprint, flat_sha256
from cotune.shared.chain import Entry, of_round, read_chain
from cotune.shared.codec import Payload, encode
from cotune.shared.job import Job
from cotune.shared.jobfile import parse_job, validate
from cotune.shared.methods import initial_values
from cotune.shared.model import locate
from cotune.shared.plan import RoundPlan
from cotune.shared.update import AdapterUpdate, Answer

NAME, PATIENCE_S = "st-mary", 120.0
ROOT, NURSERY = Path(__file__).parents[2], Path(__file__).with_name("agent_nursery.py")


@dataclass(frozen=True)
class RealSite:
    """A home with a policy and records of its own, and a job it has approved."""

    home: Path
    socket: Path
    job: Job
    adapter: Payload
    base: dict[str, Any]

    @classmethod
    def make(cls, folder: Path, model: Path, home: Path | None = None) -> RealSite:
        """Make it."""
        notes = write_rows(folder / "notes.jsonl", rows(40))
        settings = {
            "run": {"name": "study", "seed": 3, "rounds": 50},
            "model": {"base": str(model), "max_length": 32},
            "lora": {"r": 2, "alpha": 4.0, "last_layers": 2},
            "data": {"sites": {NAME: "site:"}, "dataset": "notes", "records_per_site": 40},
            "train": {"batch_size": 10, "local_steps": 2, "learning_rate": 0.5, "microbatch": 4},
            "privacy": {"epsilon": 100.0, "noise_multiplier": 20.0, "delta": 1e-5},
        }
        job = parse_job({"schema": 1, **settings}, origin="test")
        budget = {"epsilon_total": 100.0, "epsilon_per_run": 100.0, "delta_total": 1e-5}
        policy = {
            "site": {"name": NAME},
            "allow": {"models": [f"sha256:{locate(job).sha256}"]},
            "dataset": [{"id": "notes", "path": str(notes), "unit": "record", "budget": budget}],
        }
        opened = SiteHome.create(home or folder / "home", validate(policy, POLICY_FILE, origin="test"))
        opened.jobs.approve(job, by="admin")
        trainer = trainer_of(job)
        adapter = np.zeros(trainer.layout.size, dtype=np.float32)
        facts = {
            "base_sha256": flat_sha256(adapter),
            "frozen_sha256": fingerprint(initial_values(trainer.layout, job.run.seed)),
        }
        return cls(opened.path, folder / "agent.sock", job, encode(adapter, "fp32", 0), facts)

    def plan(self, number: int = 1, **changes: Any) -> RoundPlan:
        """What its coordinator asks of it."""
        facts = {
            "run_id": "run-1", "job": self.job, "site": NAME, "round": number, "rank": self.job.lora.r,
            "clipping_norm": self.job.privacy.clipping_norm,
        }  # fmt: skip
        return RoundPlan(**{**facts, **self.base, **changes})

    def link(self, patience_s: float = PATIENCE_S) -> AgentLink:
        """The courier's end."""
        return AgentLink(self.socket, patience_s)

    def ask(self, plan: RoundPlan) -> Answer:
        """A plan's answer."""
        return self.link().train(plan, self.adapter, lambda _step: None)

    def entries(self) -> list[Entry]:
        """The ledger on the disk."""
        return read_chain((self.home / "ledger.jsonl").read_bytes())

    def entries_key(self) -> str:
        """The key that signs for it."""
        return SiteHome.open(self.home).ledger.head.public_key

    def charges(self, number: int, run_id: str = "run-1") -> int:
        """How often a round was charged."""
        return len(of_round(self.entries(), "budget.reserve", run_id, number))

    def await_agent(self) -> dict[str, Any]:
        """What the agent says of itself, once it is there."""
        return self.link().describe()

    @contextmanager
    def agent(self, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Its agent as `cotune site up` starts it."""
        command = [sys.executable, "-m", "cotune.client.agent", "--home", str(self.home), "--socket", str(self.socket)]
        with log.open("wb") as output, subprocess.Popen(command, stderr=output) as process:
            try:
                self.await_agent()
                yield process
            finally:
                process.terminate()
                process.wait(60)


def update_of(answer: Answer) -> AdapterUpdate:
    """An answer that is to be an update."""
    assert isinstance(answer, AdapterUpdate), answer
    return answer


class Nursery:
    """Agents that are born with a loaded model, and with a fault if one is asked for; see agent_nursery.py."""

    def __init__(self, site: RealSite, log: Path) -> None:
        self.log = log
        (site.socket.parent / "job.json").write_text(site.job.to_json())
        command = [sys.executable, str(NURSERY), str(site.home), str(site.socket), str(site.socket.parent / "job.json")]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        self._said()

    def arm(self, fault: str) -> None:
        """Give place to an agent that has this fault; when it dies, to one without."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{fault}\n".encode())
        self._process.stdin.flush()
        self._said()

    def close(self) -> None:
        """End it and its agent."""
        self._process.communicate(timeout=60)

    def _said(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline(), self.log.read_text()


def until(what: Any, patience_s: float = PATIENCE_S) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)
