"""Agents that die, break and run out of things, through the real socket: nothing is lost, told or charged twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.client.agent_nursery import CANARY
from tests.client.agents import NAME, Nursery, RealSite, update_of

from cotune.client.agent_link import SERVICE
from cotune.client.frames import pack, plan_frame, read_answer
from cotune.shared.bundle import bundle_sha256
from cotune.shared.plan import LedgerRequest
from cotune.shared.proposal import Proposal
from cotune.shared.update import SiteFailure

pytestmark = pytest.mark.slow

# Killed there, how often is the round charged? Once if it was not charged yet, or had given its update already.
CHARGES = {
    "before the plan is admitted": 1,
    "after the plan is admitted": 1,
    "before the records are checked": 1,
    "before the round is charged": 1,
    "after the round is charged": 2,
    "before a ledger line is written": 1,
    "after a line, before its head": 2,
    "after a line and its head": 2,
    "after the round is trained": 2,
    "before the update is written": 2,
    "after the update is written": 1,
    "before the round is committed": 1,
    "after the round is committed": 1,
    "after the update may be sent": 1,
}


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory, tiny_causal: Path) -> Iterator[tuple[RealSite, Nursery]]:
    folder = tmp_path_factory.mktemp("site")
    site = RealSite.make(folder, tiny_causal)
    nursery = Nursery(site, folder / "agent.log")
    yield site, nursery
    nursery.close()


def test_an_agent_killed_anywhere_in_a_round_gives_one_update_and_is_charged_for_what_was_lost(
    nursery: tuple[RealSite, Nursery],
) -> None:
    site, agents = nursery
    found: dict[str, int] = {}
    for number, step in enumerate(CHARGES, start=1):
        agents.arm(step)
        update = update_of(site.ask(site.plan(number)))
        assert np.array_equal(update_of(site.ask(site.plan(number))).payload, update.payload), step
        assert update.header.charges == site.charges(number)
        found[step] = site.charges(number)
    assert found == CHARGES


def test_no_text_of_an_exception_leaves_or_is_logged(nursery: tuple[RealSite, Nursery]) -> None:
    site, agents = nursery
    proposal = Proposal(run_id="run-1", job=site.job, site=NAME, bundle_sha256=bundle_sha256())
    asked = {
        "admit": ("Train", plan_frame(site.plan(31), site.adapter)),
        "records": ("Train", plan_frame(site.plan(31), site.adapter)),
        "train": ("Train", plan_frame(site.plan(31), site.adapter)),
        "write": ("Train", plan_frame(site.plan(32), site.adapter)),
        "propose": ("Propose", pack({"proposal": proposal.model_dump(mode="json", by_alias=True)})),
        "ledger": ("Ledger", pack({"request": LedgerRequest(run_id="run-1", site=NAME).model_dump(mode="json")})),
    }
    for fault, (method, frame) in asked.items():
        agents.arm(fault)
        site.await_agent()
        with grpc.insecure_channel(f"unix:{site.socket}") as channel:
            call = channel.unary_stream(f"/{SERVICE}/{method}")(frame, timeout=60)
            said = list(call)
            around = f"{call.initial_metadata()} {call.trailing_metadata()} {call.details()} {call.code()}"
        failure = read_answer(said[-1])
        assert isinstance(failure, SiteFailure), fault
        assert (failure.code, failure.message, failure.exit_code) == ("E-INTERNAL", "Unforeseen", 5), fault
        assert not any(CANARY.encode() in each for each in said), fault
        assert CANARY not in around, fault
    log = agents.log.read_text()
    assert log.count("Unforeseen") >= len(asked), "the log names the kind and the place"
    assert CANARY not in log


def test_memory_that_runs_out_in_training_is_named_and_the_agent_lives_on(nursery: tuple[RealSite, Nursery]) -> None:
    site, agents = nursery
    for number, fault in enumerate(("torch memory", "numpy memory"), start=41):
        agents.arm(fault)
        pid = site.await_agent()["pid"]
        said = site.ask(site.plan(number))
        assert isinstance(said, SiteFailure) and said.code == "E-OOM", said
        assert site.charges(number) == 1
        assert site.link().describe()["pid"] == pid
        os.kill(pid, 9)
        update_of(site.ask(site.plan(number)))
        assert site.charges(number) == 2


def test_a_full_disk_refuses_the_round_before_it_is_trained(
    tmp_path: Path, tiny_causal: Path, mount_disk: Callable[[int], Path]
) -> None:
    disk = mount_disk(512)
    site = RealSite.make(tmp_path, tiny_causal, home=disk / "home")
    agents = Nursery(site, tmp_path / "agent.log")
    try:
        update_of(site.ask(site.plan(1)))
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"x" * 4096)
        steps: list[int] = []
        said = site.link().train(site.plan(2), site.adapter, steps.append)
        assert isinstance(said, SiteFailure)
        assert said.code in ("E-LEDGER-STORAGE", "E-STORAGE"), said
        assert str(disk) not in said.message
        assert steps == []
        filler.unlink()
        update_of(site.ask(site.plan(2)))
    finally:
        agents.close()
