"""Trains a site again and again in processes that are killed, and checks its ledger after each.

Run by test_site_kills.py as `python site_killed.py JOB_JSON FOLDER KILLS SEED`. The model is loaded once; each
attempt is a fork of this process, which has one thread. Prints one JSON object: what happened, and every fault.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cotune.client.data import prepare
from cotune.client.guard import Guard
from cotune.client.home import SiteHome
from cotune.client.ledger import Ledger
from cotune.client.site import Site
from cotune.client.training import Trainer
from cotune.client.updates import Updates
from cotune.shared.adapter import fingerprint, flat_sha256
from cotune.shared.chain import SignedHead, read_torn_chain
from cotune.shared.codec import encode
from cotune.shared.errors import RefusedError
from cotune.shared.job import Job
from cotune.shared.jobfile import parse_job
from cotune.shared.methods import attach, initial_values
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.plan import RoundPlan, cotune_version
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.records import read_records
from cotune.shared.update import payload_sha256

NAME = "site-1"
ROUNDS = 4  # about as many as a process gets done before it is killed, at most
PARENT = os.getpid()


def die(*_args: object, **_named: object) -> Any:
    """End this process as a power cut would, but never the one that loads the model."""
    if os.getpid() != PARENT:
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner: type, name: str) -> Callable[[], None]:
    """Die instead of doing this."""
    return lambda: setattr(owner, name, die)


def after(owner: type, name: str) -> Callable[[], None]:
    """Do this, then die."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **named: Any) -> Any:
        original(*args, **named)
        die()

    return lambda: setattr(owner, name, wrapped)


STEPS: dict[str, Callable[[], None]] = {
    "before the plan is admitted": before(Guard, "admit"),
    "after the plan is admitted": after(Guard, "admit"),
    "before the records are checked": before(Guard, "check_records"),
    "before the round is charged": before(Guard, "reserve"),
    "after the round is charged": after(Guard, "reserve"),
    "before a ledger line is written": before(Ledger, "_write"),
    "after a line, before its head": before(Ledger, "_seal"),
    "after a line and its head": after(Ledger, "_seal"),
    "after the round is trained": after(Trainer, "train_round"),
    "before the update is written": before(Updates, "write"),
    "after the update is written": after(Updates, "write"),
    "before the round is committed": before(Ledger, "commit"),
    "after the round is committed": after(Ledger, "commit"),
    "after the update may be sent": after(Guard, "release"),
}


class Victim:
    """One site, loaded once, whose rounds are trained in forks."""

    def __init__(self, job: Job, folder: Path) -> None:
        base = locate(job)
        self.job, self.home, self.sent = job, folder / "home", folder / "sent.jsonl"
        self.trainer = Trainer(Network(attach(load_model(base, job), job), job), job, base.sha256)
        self.data = prepare(read_records(Path(str(job.data.train))), load_tokenizer(base), job)
        self.adapter = np.zeros(self.trainer.layout.size, dtype=np.float32)
        self.payload = encode(self.adapter, "fp32", 0)
        SiteHome.simulated(self.home, NAME, job, base.sha256)
        self.sent.touch()
        epsilon([mechanism_of(job).event(1)], 1e-3)  # imports what forks would each import anew

    def load(self, *_args: object) -> Any:
        """`SiteData`."""
        return self.data

    def updates(self) -> list[dict[str, Any]]:
        """What the coordinator has got, oldest first."""
        return [json.loads(line) for line in self.sent.read_text().splitlines()]

    def train(self) -> None:
        """Train round after round, as a coordinator that asks for the round after the last it got."""
        site = Site(Guard(SiteHome.open(self.home)), self, None)
        got = self.updates()
        number, heads = (got[-1]["round"] + 1, (SignedHead(**got[-1]["head"]),)) if got else (1, ())
        while True:
            try:
                update = site.train(self.plan(number, heads), self.payload, self.trainer, lambda _step: None)
                sha256 = payload_sha256(update.payload)
                line = {"round": number, "sha256": sha256, "head": update.header.head.model_dump()}
                with self.sent.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                heads = (update.header.head,)
            except RefusedError as error:
                if error.code != "E-ROUND-LOST":
                    raise
            number += 1

    def plan(self, number: int, heads: tuple[SignedHead, ...]) -> RoundPlan:
        """What is asked for in a round; the adapter stays where it is."""
        return RoundPlan(
            run_id="run-1", cotune=cotune_version(), job=self.job, site=NAME, round=number, heads=heads,
            base_sha256=flat_sha256(self.adapter), rank=self.job.lora.r, clipping_norm=self.job.privacy.clipping_norm,
            frozen_sha256=fingerprint(initial_values(self.trainer.layout, self.job.run.seed)),
        )  # fmt: skip

    def kill(self, after_s: float | None, prepare_death: Callable[[], None] | None = None) -> bool:
        """Train in a fork until it is killed; whether it was (and did not end by itself)."""
        child = os.fork()
        if child == 0:
            if prepare_death is not None:
                prepare_death()
            try:
                self.train()
            except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is to hear of it
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
        if after_s is not None:
            time.sleep(after_s)
            os.kill(child, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])

    def pace(self) -> float:
        """How long a process takes here to start and train some rounds, in seconds."""
        before, started = len(self.updates()), time.monotonic()
        child = os.fork()
        if child == 0:
            self.train()
        while len(self.updates()) < before + ROUNDS:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return time.monotonic() - started

    def faults(self) -> list[str]:
        """What must never be, judged from the bytes on the disk before anybody mends them."""
        content = (self.home / "ledger.jsonl").read_bytes()
        head = SignedHead.model_validate_json((self.home / "head.json").read_bytes())
        entries, _ = read_torn_chain(content, None, head.seq)
        charged = Counter(e.fields["round"] for e in entries if e.action == "budget.reserve")
        committed = {e.fields["round"]: e.fields["update_sha256"] for e in entries if e.action == "budget.commit"}
        sent: dict[int, set[str]] = {}
        for update in self.updates():
            sent.setdefault(update["round"], set()).add(update["sha256"])
        found = [f"round {number} was sent and not charged" for number in sent if not charged[number]]
        found += [f"round {number} gave two updates" for number, hashes in sent.items() if len(hashes) > 1]
        found += [f"round {number}: sent is not committed" for number in sent if sent[number] != {committed[number]}]
        found += [f"round {number} was charged {count} times" for number, count in charged.items() if count > 2]
        return found


def main() -> None:
    """Kill at every named step, then at random instants; after each kill look, then start again."""
    job = parse_job(json.loads(Path(sys.argv[1]).read_text()), origin="test")
    folder, kills, seed = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    victim, chance = Victim(job, folder), random.Random(seed)  # noqa: S311 - when to kill is no secret
    faults: list[str] = []
    survived: list[str] = []
    for name, prepare_death in STEPS.items():
        if not victim.kill(None, prepare_death):
            survived.append(name)
        faults += [f"{name}: {fault}" for fault in victim.faults()]
    longest = victim.pace()
    for number in range(kills):
        if not victim.kill(chance.uniform(0, longest)):
            survived.append(f"kill {number}")
        faults += [f"kill {number}: {fault}" for fault in victim.faults()]
    entries = SiteHome.open(victim.home).ledger.entries
    actions = Counter(entry.action for entry in entries)
    sys.stdout.write(json.dumps({
        "kills": len(STEPS) + kills, "faults": faults, "survived": survived, "sent": len(victim.updates()),
        "charged": actions["budget.reserve"], "repairs": actions["ledger.repair"],
        "rounds": len({e.fields["round"] for e in entries if e.action == "budget.reserve"}),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
