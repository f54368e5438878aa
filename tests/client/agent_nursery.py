"""Starts agents as forks of a process that has the model loaded, so that a test can afford to kill many.

Run by tests as `python agent_nursery.py HOME SOCKET JOB_JSON`. A line on stdin names a fault: the agent of the moment
is killed and one with the fault takes its place. Whenever an agent dies, one without a fault follows, as under
`cotune site up`. No agent is started by a process that has used grpc, which forks badly.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.integration.site_killed import STEPS

from cotune.client import agent, considering
from cotune.client.answering import warm_trainer
from cotune.client.guard import Guard
from cotune.client.training import Trainer
from cotune.client.updates import Updates
from cotune.shared.jobfile import parse_job
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.mechanism import mechanism_of

CANARY = "patient-4711-has-a-rash"


class Unforeseen(Exception):
    """A defect that cotune does not know."""


def unforeseen(*_args: object, **_named: object) -> Any:
    """Fail as a library does, which quotes what it was given."""
    raise Unforeseen(CANARY)


def too_much_for_torch(*_args: object, **_named: object) -> Any:
    """Run out of memory as torch does."""
    torch.empty(2**50)


def too_much_for_numpy(*_args: object, **_named: object) -> Any:
    """Run out of memory as numpy does."""
    np.empty(2**50)


FAULTS: dict[str, Callable[[], None]] = {
    **STEPS,
    "admit": lambda: setattr(Guard, "admit", unforeseen),
    "records": lambda: setattr(agent, "own_records", unforeseen),
    "train": lambda: setattr(Trainer, "train_round", unforeseen),
    "write": lambda: setattr(Updates, "write", unforeseen),
    "propose": lambda: setattr(considering, "first_refusal", unforeseen),
    "ledger": lambda: setattr(agent, "reserved", unforeseen),
    "torch memory": lambda: setattr(Trainer, "train_round", too_much_for_torch),
    "numpy memory": lambda: setattr(Trainer, "train_round", too_much_for_numpy),
}


def born(fault: str | None) -> int:
    """A new agent's process id."""
    child = os.fork()
    if child == 0:
        os.close(0)
        if fault:
            FAULTS[fault]()
        sys.argv = ["agent", "--home", sys.argv[1], "--socket", sys.argv[2]]
        try:
            agent.main()
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        os._exit(0)
    return child


def main() -> None:
    """Keep one agent alive until stdin closes."""
    torch.set_num_threads(1)
    job = parse_job(json.loads(Path(sys.argv[3]).read_text()), origin="test")
    warm_trainer(job)
    epsilon([mechanism_of(job).event(1)], 1e-5)  # imports what forks would each import anew
    child = born(None)
    sys.stdout.write("born\n")
    sys.stdout.flush()
    while True:
        asked, _, _ = select.select([0], [], [], 0.02)
        if os.waitpid(child, os.WNOHANG)[0]:
            child = born(None)
        if not asked:
            continue
        fault = sys.stdin.buffer.readline().decode().strip()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not fault:
            return
        child = born(fault)
        sys.stdout.write("armed\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
