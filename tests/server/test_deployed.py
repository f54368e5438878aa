"""Enrolled sites over Flower's grid: who is asked, who is waited for, and who is listened to no more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import httpx
import numpy as np
import pytest
from flwr.app import Error, RecordDict
from flwr.serverapp import Grid
from tests.server.answers import plan_of, update_of
from tests.server.grids import Answerer, Nodes, State, enrolled_as, within_a_run

from cotune.server.deployed import DeployedFleet
from cotune.server.fleet import CRASHED, Request
from cotune.server.grid import Exchange
from cotune.shared.codec import encode
from cotune.shared.errors import ConnectionFailed, RunFailed
from cotune.shared.plan import ClaimRequest, LedgerRequest
from cotune.shared.update import AdapterUpdate, Answer, SiteFailure
from cotune.shared.wire import answer_to_records, ledger_to_records, plan_from_records, signature_to_records

NODES = {"site-1": 101, "site-2": 102, "site-3": 103}
PAYLOAD = encode(np.zeros(4, dtype=np.float32), "fp32", 0)
GONE = Error(code=5)  # what Flower replies for a node that went away


@pytest.fixture(autouse=True)
def _run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotune.server.deployed.NODES_AGE_S", 0.0)
    within_a_run()


def trained(records: RecordDict) -> RecordDict:
    plan, _ = plan_from_records(records)
    return answer_to_records(update_of(plan, np.ones(4, dtype=np.float32)))


def fleet_of(
    nodes: Nodes,
    states: Callable[[], Mapping[str, State]] = lambda: dict.fromkeys(NODES, "approved"),
    seconds: float = 60.0,
    watch: Callable[[], None] = lambda: None,
    again_s: float = 600.0,
) -> DeployedFleet:
    fleet = DeployedFleet(
        Exchange(cast(Grid, nodes), len(NODES), 0.001, watch, again_s),
        lambda: {site: enrolled_as(site, NODES[site], state) for site, state in states().items()},
        seconds,
    )
    fleet.admit(NODES)
    return fleet


@pytest.fixture
def requests(make_job) -> list[Request]:
    job = make_job(privacy={"delta": 1e-3, "noise_multiplier": 3.0})
    return [Request(plan_of(job, site), PAYLOAD) for site in NODES]


def named(answers: Iterator[Answer]) -> dict[str, Answer]:
    return {a.site if isinstance(a, SiteFailure) else a.header.site: a for a in answers}


def test_each_plan_goes_to_the_node_of_its_sites_enrolment_and_to_no_other(requests: list[Request]) -> None:
    seen: dict[int, str] = {}

    def at(node: int) -> Answerer:
        def answer(records: RecordDict) -> RecordDict:
            seen[node] = plan_from_records(records)[0].site
            return trained(records)

        return answer

    nodes = Nodes({node: at(node) for node in (*NODES.values(), 999)})
    answers = named(fleet_of(nodes).ask(requests))
    assert seen == {node: site for site, node in NODES.items()}
    assert all(isinstance(answer, AdapterUpdate) for answer in answers.values())
    assert sorted(answers) == sorted(NODES)


def test_a_site_that_is_away_is_waited_for_and_asked_when_it_is_back(requests: list[Request]) -> None:
    looks = 0

    def there() -> list[int]:
        nonlocal looks
        looks += 1
        return [101, 103] if looks < 20 else [101, 102, 103]

    nodes = Nodes(dict.fromkeys(NODES.values(), trained), there)
    order = [a.header.site for a in fleet_of(nodes).ask(requests) if isinstance(a, AdapterUpdate)]
    assert order[-1] == "site-2" and len(order) == 3


def test_a_message_that_a_line_lost_is_sent_again_and_its_site_answers_once(requests: list[Request]) -> None:
    asked = 0

    def deaf_at_first(records: RecordDict) -> RecordDict | None:
        nonlocal asked
        asked += nodes.reached.count(102) > 1
        return trained(records) if asked else None

    nodes = Nodes({101: trained, 102: deaf_at_first, 103: trained})
    order = [a.header.site for a in fleet_of(nodes, again_s=0.05).ask(requests) if isinstance(a, AdapterUpdate)]
    assert sorted(order) == sorted(NODES) and order[-1] == "site-2"
    assert nodes.reached.count(102) == 2


def test_a_site_that_answers_in_time_is_sent_its_message_once(requests: list[Request]) -> None:
    nodes = Nodes(dict.fromkeys(NODES.values(), trained))
    assert len(list(fleet_of(nodes).ask(requests))) == 3
    assert sorted(nodes.reached) == sorted(NODES.values())


def test_a_site_that_withholds_part_of_its_reply_holds_nobody_up(
    requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotune.server.grid.PULL_S", 0.05)
    whole = threading.Event()

    def withheld(records: RecordDict) -> RecordDict:
        whole.wait(30)
        return trained(records)

    nodes, order = Nodes({101: withheld, 102: trained, 103: trained}), list[str]()
    for answer in fleet_of(nodes).ask(requests):
        assert isinstance(answer, AdapterUpdate)
        order.append(answer.header.site)
        if len(order) == 2:
            whole.set()  # it comes late, and counts
    assert sorted(order[:2]) == ["site-2", "site-3"] and order[2:] == ["site-1"]


def test_a_site_that_never_sends_the_rest_is_late_when_the_round_is(
    requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotune.server.grid.PULL_S", 0.05)
    for_ever = threading.Event()

    def withheld(records: RecordDict) -> RecordDict:
        for_ever.wait(30)
        return trained(records)

    began = time.monotonic()
    answers = named(fleet_of(Nodes({101: withheld, 102: trained, 103: trained}), seconds=1.0).ask(requests))
    assert time.monotonic() - began < 10
    for_ever.set()
    late = answers.pop("site-1")
    assert isinstance(late, SiteFailure) and late.code == "E-TIMEOUT"
    assert all(isinstance(answer, AdapterUpdate) for answer in answers.values()) and len(answers) == 2


def test_a_site_that_stays_away_is_late_and_the_rounds_time_is_not_begun_again(requests: list[Request]) -> None:
    nodes = Nodes(dict.fromkeys(NODES.values(), trained), lambda: [101, 103])
    fleet = fleet_of(nodes, seconds=0.3)
    answers = named(fleet.ask(requests))
    late = answers["site-2"]
    assert isinstance(late, SiteFailure)
    assert (late.code, late.exit_code) == ("E-TIMEOUT", 3)
    assert 102 not in nodes.reached
    began = time.monotonic()
    [again] = fleet.ask(requests[1:2])  # asked again in the same round: its time is over
    assert isinstance(again, SiteFailure) and again.code == "E-TIMEOUT"
    assert time.monotonic() - began < 0.3


def test_a_site_that_goes_away_is_asked_again_and_the_collector_hears_of_it_once(requests: list[Request]) -> None:
    losses = 3

    def flapping(records: RecordDict) -> RecordDict | Error:
        nonlocal losses
        losses -= 1
        return GONE if losses >= 0 else trained(records)

    nodes = Nodes({101: trained, 102: flapping, 103: trained})
    fleet = fleet_of(nodes)
    first = list(fleet.ask(requests))
    assert [a.code for a in first if isinstance(a, SiteFailure)] == [CRASHED]
    [answer] = fleet.ask(requests[1:2])  # as the collector does
    assert isinstance(answer, AdapterUpdate)
    assert nodes.reached.count(102) == 4


def test_a_revoked_site_is_not_asked_and_what_it_answers_counts_no_more(requests: list[Request]) -> None:
    states: dict[str, State] = {"site-1": "approved", "site-2": "approved", "site-3": "revoked"}

    def revoked_meanwhile(records: RecordDict) -> RecordDict:
        states["site-2"] = "revoked"
        return trained(records)

    nodes = Nodes({101: trained, 102: revoked_meanwhile, 103: trained})
    fleet = fleet_of(nodes, lambda: states)
    assert fleet.sites() == ["site-1", "site-2"]
    answers = named(fleet.ask(requests))
    assert isinstance(answers["site-1"], AdapterUpdate)
    for site in ("site-2", "site-3"):
        failure = answers[site]
        assert isinstance(failure, SiteFailure)
        assert failure.code == "E-REVOKED"
        assert failure.exit_code != 6, "it may have trained: its charge must stay"
    assert 103 not in nodes.reached
    assert fleet.sites() == ["site-1"]


def test_a_site_that_is_enrolled_no_more_is_as_good_as_revoked(requests: list[Request]) -> None:
    fleet = fleet_of(Nodes(dict.fromkeys(NODES.values(), trained)), lambda: {"site-1": "approved"})
    answers = named(fleet.ask(requests))
    assert {site for site, a in answers.items() if isinstance(a, SiteFailure)} == {"site-2", "site-3"}


def test_ledgers_come_from_those_who_are_there() -> None:
    nodes = Nodes(
        {node: lambda _r, n=node: ledger_to_records(b"%d" % n) for node in NODES.values()}, lambda: [101, 102]
    )
    requests = [LedgerRequest(run_id="run", site=site) for site in NODES]
    assert dict(fleet_of(nodes, seconds=0.3).ledgers(requests)) == {"site-1": b"101", "site-2": b"102"}


def test_signatures_come_from_those_who_are_there_and_each_other_site_says_why_not() -> None:
    def refuses(_records: RecordDict) -> RecordDict:
        failure = SiteFailure(site="site-9", code="E-CLAIM-ENTRY", message="steps", exit_code=6)
        return answer_to_records(failure)

    nodes = Nodes({101: lambda _r: signature_to_records("signature"), 102: refuses}, lambda: [101, 102])
    requests = [ClaimRequest(run_id="run", site=site, claim="{}") for site in NODES]
    found = dict(fleet_of(nodes, seconds=0.3).countersign(requests))
    assert found.pop("site-1") == "signature"
    codes = {site: said.code for site, said in found.items() if isinstance(said, SiteFailure)}
    assert codes == {"site-2": "E-CLAIM-ENTRY", "site-3": "E-TIMEOUT"}


def test_a_revoked_site_is_not_asked_to_sign() -> None:
    nodes = Nodes(dict.fromkeys(NODES.values(), lambda _r: signature_to_records("signature")))
    fleet = fleet_of(nodes, lambda: {**dict.fromkeys(NODES, "approved"), "site-3": "revoked"})
    requests = [ClaimRequest(run_id="run", site=site, claim="{}") for site in NODES]
    said = dict(fleet.countersign(requests))["site-3"]
    assert isinstance(said, SiteFailure) and said.code == "E-REVOKED"
    assert 103 not in nodes.reached


@pytest.mark.parametrize("fault", [httpx.ConnectError("gone"), httpx.ReadTimeout("slow")])
def test_a_superlink_that_is_gone_is_no_fault_of_the_run(requests: list[Request], fault: httpx.HTTPError) -> None:
    def there() -> list[int]:
        raise fault

    with pytest.raises(ConnectionFailed) as caught:
        list(fleet_of(Nodes({}, there)).ask(requests))
    assert caught.value.code == "E-SUPERLINK-LOST"


def test_whoever_watches_can_end_the_exchange(requests: list[Request]) -> None:
    looks = 0

    def watch() -> None:
        nonlocal looks
        looks += 1
        if looks == 5:
            raise RunFailed("E-STOPPED", "stopped")

    with pytest.raises(RunFailed):
        list(fleet_of(Nodes({}, list), watch=watch).ask(requests))
    assert looks == 5
