"""A courier between a real SuperLink and a real agent: whatever dies on the way, each message gets its one answer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from tests.client.agent_nursery import CANARY
from tests.client.agents import PATIENCE_S, Nursery, RealSite, until
from tests.client.test_countersigning import claim_of
from tests.integration.couriers import (
    Courier,
    Desk,
    JoinedSite,
    Proxy,
    SuperLink,
    join_site,
    make_fed,
    running,
    superlink,
)

from cotune.client.home import SiteHome
from cotune.shared.bundle import bundle_sha256
from cotune.shared.files import write_atomic
from cotune.shared.plan import ClaimRequest, LedgerRequest, cotune_version
from cotune.shared.privacy.claim import claim_bytes
from cotune.shared.proposal import JobStanding, Proposal
from cotune.shared.signing import verify
from cotune.shared.update import AdapterUpdate, Answer, SiteFailure
from cotune.shared.wire import (
    answer_from_records,
    ledger_from_records,
    proposal_to_records,
    request_to_records,
    signature_from_records,
    standing_from_records,
)

pytestmark = pytest.mark.slow


@dataclass
class World:
    """A SuperLink, a run on it, a site that has joined, and its agent."""

    link: SuperLink
    desk: Desk
    site: JoinedSite
    agent: Nursery
    folder: Path
    rounds: int = 0

    def ask(self) -> tuple[int, str]:
        """Ask for the next round: its number, and the message's."""
        self.rounds += 1
        return self.rounds, self.desk.ask(self.site.node_id, "train", self.site.records(self.rounds))

    def answer(self, message: str, patience_s: float = PATIENCE_S) -> Answer:
        """The answer to a plan."""
        return answer_from_records(self.desk.answer(message, patience_s).content, self.site.site.plan().site)

    def update(self, number: int, message: str, patience_s: float = PATIENCE_S) -> AdapterUpdate:
        """The answer, which is to be that round's update, charged once."""
        update = self.answer(message, patience_s)
        assert isinstance(update, AdapterUpdate), update
        assert update.header.round == number
        assert self.site.site.charges(number) == 1
        return update

    def failure(self, message: str) -> SiteFailure:
        """The answer, which is to be a failure."""
        failure = self.answer(message)
        assert isinstance(failure, SiteFailure)
        return failure


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_causal: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("north")
    home = make_fed(folder / "fed")
    with superlink(home) as link:
        site = join_site(RealSite.make(folder, tiny_causal), home, link.control)
        agent = Nursery(site.site, folder / "agent.log")
        desk = Desk(link, folder / "bundle")
        yield World(link, desk, site, agent, folder)
        desk.close()
        agent.close()


@pytest.fixture
def courier(world: World, request: pytest.FixtureRequest) -> Iterator[Courier]:
    with running(world.site.courier(request.node.name)) as made:
        made.await_state("online")
        yield made


@pytest.mark.usefixtures("courier")
def test_rounds_proposals_and_the_ledger_go_there_and_back(world: World) -> None:
    job, site = world.site.site.job, world.site.site.plan().site
    signature = world.site.plan().signature
    asked = Proposal(
        run_id="run-1", job=job, site=site, bundle_sha256=bundle_sha256(), signature=signature, cotune=cotune_version()
    )
    message = world.desk.ask(world.site.node_id, "query", proposal_to_records(asked))
    standing = standing_from_records(world.desk.answer(message).content, site)
    assert isinstance(standing, JobStanding)
    assert standing.state == "approved"
    for _ in range(2):
        world.update(*world.ask())
    message = world.desk.ask(world.site.node_id, "query", request_to_records(LedgerRequest(run_id="run-1", site=site)))
    ledger = ledger_from_records(world.desk.answer(message).content)
    assert ledger == (world.site.site.home / "ledger.jsonl").read_bytes()
    home = SiteHome.open(world.site.site.home)
    request = ClaimRequest(run_id="run-1", site=site, claim=claim_bytes(claim_of(home, job)).decode())
    message = world.desk.ask(world.site.node_id, "query", request_to_records(request))
    signature = signature_from_records(world.desk.answer(message).content, site)
    assert isinstance(signature, str), signature
    assert verify(home.ledger.head.public_key, "cotune-claim", request.claim.encode(), signature)
    no_claim = ClaimRequest(run_id="run-1", site=site, claim="{}")
    message = world.desk.ask(world.site.node_id, "query", request_to_records(no_claim))
    assert world.failure(message).code == "E-CLAIM-FORM"
    message = world.desk.ask(world.site.node_id, "query", request_to_records(LedgerRequest(run_id="run-9", site=site)))
    assert world.failure(message).code == "E-PLAN"


@pytest.mark.parametrize("moment", ["at rest", "while it trains", "with the answer in its hands"])
def test_a_courier_that_was_killed_is_back_within_its_lease_and_loses_nothing(
    world: World, courier: Courier, moment: str
) -> None:
    number = message = None
    if moment == "while it trains":
        number, message = world.ask()
        until((courier.folder / "incoming.bin").exists)
    if moment == "with the answer in its hands":
        number, message = world.ask()
        until((courier.folder / "outgoing.bin").exists)
    courier.end(signal.SIGKILL)
    assert world.site.node_id in world.desk.nodes(), "the lease of the dead one goes on"
    courier.start()
    if number is None or message is None:
        courier.await_state("online")
        number, message = world.ask()
    world.update(number, message)


def test_a_courier_without_its_notes_waits_for_the_lease_of_the_dead_one(
    world: World, request: pytest.FixtureRequest
) -> None:
    with world.site.told(heartbeat_s="10"), running(world.site.courier(request.node.name)) as courier:
        courier.await_state("online")
        courier.end(signal.SIGKILL)
        (courier.folder / "courier.json").unlink()
        courier.start()
        courier.await_state("online")
        world.update(*world.ask())


def test_a_courier_that_was_told_to_go_says_so_and_comes_again(world: World, courier: Courier) -> None:
    assert courier.end() == 0
    assert world.site.node_id not in world.desk.nodes()
    courier.start()
    until(lambda: world.site.node_id in world.desk.nodes())
    world.update(*world.ask())


@pytest.mark.usefixtures("courier")
def test_a_superlink_that_was_dead_for_ten_seconds_gets_the_answer(world: World) -> None:
    number, message = world.ask()
    world.link.kill()
    time.sleep(10)
    world.link.start()
    world.update(number, message)
    world.update(*world.ask())


def test_a_second_courier_of_the_folder_is_refused(world: World, courier: Courier) -> None:
    with running(Courier(courier.folder, world.folder / "second.log")) as second:
        assert second.process is not None
        assert second.process.wait(PATIENCE_S) == 6
        assert "E-COURIER-RUNNING" in second.log.read_text()
    world.update(*world.ask())


@pytest.fixture
def proxy(world: World) -> Iterator[Proxy]:
    """A proxy on the way of the site's courier."""
    made = Proxy(world.link.home)
    with world.site.told(address=f'"{made.address}"'):
        yield made
    made.close()


def test_what_an_agent_s_defect_says_of_a_record_is_in_no_byte_that_leaves(
    world: World, proxy: Proxy, request: pytest.FixtureRequest
) -> None:
    with running(world.site.courier(request.node.name)) as courier:
        courier.await_state("online")
        for fault in ("records", "train"):
            world.agent.arm(fault)
            failure = world.failure(world.ask()[1])
            assert (failure.code, failure.message) == ("E-INTERNAL", "Unforeseen")
            os.kill(world.site.site.await_agent()["pid"], signal.SIGKILL)  # one without a fault follows
        assert b"Unforeseen" in proxy.seen, "there was something to find"
        assert CANARY.encode() not in proxy.seen
        kept = [path for path in courier.folder.parent.rglob("*") if path.is_file()]
        assert not [path for path in (*kept, courier.log, world.agent.log) if CANARY.encode() in path.read_bytes()]


def test_heartbeats_that_fail_leave_no_courier_away_for_good(
    world: World, proxy: Proxy, request: pytest.FixtureRequest
) -> None:
    with world.site.told(heartbeat_s="10"), running(world.site.courier(request.node.name)) as courier:
        courier.await_state("online")
        proxy.failing.add("/send-node-heartbeat")
        until(lambda: world.site.node_id not in world.desk.nodes())
        assert courier.log.read_text().count("heartbeat failed: E-COORDINATOR-AWAY") > 1
        proxy.failing.clear()
        until(lambda: world.site.node_id in world.desk.nodes())
        world.update(*world.ask())


@pytest.mark.parametrize("call", ["/push-messages", "/push-object", "/pull-object", "/get-fab", "/pull-messages"])
def test_a_call_that_fails_is_made_again(world: World, proxy: Proxy, request: pytest.FixtureRequest, call: str) -> None:
    with running(world.site.courier(request.node.name.replace("/", "-"))) as courier:
        courier.await_state("online")
        proxy.failing.add(call)
        number, message = world.ask()
        courier.await_state("away", "E-COORDINATOR-AWAY")
        proxy.failing.clear()
        world.update(number, message)


def changed(records: RecordDict, **header: Any) -> RecordDict:
    said = records["header"]
    assert isinstance(said, ConfigRecord)
    return RecordDict({**records, "header": ConfigRecord({**said, **header})})


@pytest.mark.usefixtures("courier")
@pytest.mark.parametrize("kind", ["train", "query"])
def test_what_is_no_message_of_ours_is_answered_by_name(world: World, kind: str) -> None:
    good = world.site.records(1)
    malformed = [
        RecordDict({}),
        RecordDict({"header": ConfigRecord({"kind": "plan", "json": "{"})}),
        RecordDict({"header": ArrayRecord({"x": Array(np.zeros(3))})}),
        changed(good, json="[]"),
        changed(good, kind="update"),
        changed(good, json="x" * 100_000),
    ]
    for records in malformed:
        assert world.failure(world.desk.ask(world.site.node_id, kind, records)).code == "E-WIRE"
    other = changed(good, json=str(good["header"]["json"]).replace('"cotune":"', '"cotune":"9.'))  # pyright: ignore
    code = world.failure(world.desk.ask(world.site.node_id, kind, other)).code
    assert code == ("E-VERSION" if kind == "train" else "E-WIRE")


@pytest.mark.usefixtures("courier")
def test_a_message_of_another_kind_is_answered_by_name(world: World) -> None:
    assert world.failure(world.desk.ask(world.site.node_id, "evaluate", world.site.records(1))).code == "E-WIRE"


def test_a_message_beyond_the_size_is_refused_by_name_and_the_next_one_is_not(world: World) -> None:
    with world.site.told(max_message_mb="1"), running(world.site.courier("small")) as courier:
        courier.await_state("online")
        array = ArrayRecord({"adapter": Array(np.ones(2_000_000, dtype=np.uint8))})
        large = RecordDict({"header": ConfigRecord({"kind": "plan", "json": "{}"}), "adapter": array})
        assert world.failure(world.desk.ask(world.site.node_id, "train", large)).code == "E-MESSAGE-SIZE"
        world.update(*world.ask())


@pytest.mark.usefixtures("courier")
def test_a_bundle_that_differs_by_one_byte_is_refused_and_nobody_is_asked(world: World) -> None:
    def change(bundle: Path) -> None:
        with (bundle / "flower_app.py").open("ab") as file:
            file.write(b"\n")

    desk = Desk(world.link, world.folder / "changed", change)
    try:
        before = len(world.site.site.entries())
        for _ in range(2):
            message = desk.ask(world.site.node_id, "train", world.site.records(world.rounds + 1))
            failure = answer_from_records(desk.answer(message).content, "st-mary")
            assert isinstance(failure, SiteFailure)
            assert failure.code == "E-BUNDLE"
        assert len(world.site.site.entries()) == before, "the agent was not asked"
    finally:
        desk.close()
    world.update(*world.ask())


def test_a_message_of_a_run_that_is_over_is_dropped(world: World, courier: Courier) -> None:
    desk = Desk(world.link, world.folder / "stopped")
    courier.end(signal.SIGKILL)
    desk.ask(world.site.node_id, "train", world.site.records(world.rounds + 1))
    desk.close()
    world.link.control.stop(desk.run_id)
    courier.start()
    courier.await_state("online")
    world.update(*world.ask())
    assert not (courier.folder / "incoming.bin").exists()


def test_a_message_that_expired_is_dropped(world: World, courier: Courier) -> None:
    courier.end(signal.SIGKILL)
    number = world.rounds + 1
    world.desk.ask(world.site.node_id, "train", world.site.records(number), ttl=2.0)
    time.sleep(3)
    courier.start()
    courier.await_state("online")
    world.update(*world.ask())


def test_notes_of_a_crash_that_are_damaged_are_thrown_away(world: World, request: pytest.FixtureRequest) -> None:
    with world.site.told(heartbeat_s="10"), running(world.site.courier(request.node.name)) as courier:
        courier.await_state("online")
        courier.end(signal.SIGKILL)
        write_atomic(courier.folder / "incoming.bin", b"\xff\x00nonsense")
        write_atomic(courier.folder / "courier.json", b"{")
        courier.start()
        courier.await_state("online")
        world.update(*world.ask())


def test_another_authority_is_refused_by_name(world: World) -> None:
    other = make_fed(world.folder / "other")
    ca = world.site.folder / "ca.crt"
    before = ca.read_bytes()
    ca.write_bytes((other.tls / "ca.crt").read_bytes())
    try:
        with running(world.site.courier("wrong-ca")) as courier:
            courier.await_state("refused", "E-TLS")
            assert "online" not in courier.log.read_text()
    finally:
        ca.write_bytes(before)


def test_a_key_nobody_registered_is_refused_by_name(world: World) -> None:
    key = world.site.folder.parent / "node.key"
    before, known = key.read_bytes(), (world.site.folder / "courier.json").read_bytes()
    stranger = ec.generate_private_key(ec.SECP384R1())
    key.write_bytes(stranger.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    try:
        with running(world.site.courier("stranger")) as courier:
            courier.await_state("refused", "E-NODE-REFUSED")
            assert courier.process is not None
            assert courier.process.wait(200) == 2, "after the longest that a dead one's place is kept"
            assert "E-NODE-REFUSED" in courier.log.read_text()
    finally:
        key.write_bytes(before)
        (world.site.folder / "courier.json").write_bytes(known)
