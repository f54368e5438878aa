"""One round's answers: what ends it, who is asked again, and what one bad answer does to the others: nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.server.answers import head_of, plan_of, update_of
from tests.server.rounds import RANK, SITES, job_of, layout_of, state_of

from cotune.server.collecting import MAX_BARREN, Collected, Collector, require_enough
from cotune.server.fleet import CRASHED, Request
from cotune.server.sending import sending
from cotune.server.spool import Spool
from cotune.server.witness import Witness
from cotune.shared.errors import CotuneError, RunFailed
from cotune.shared.plan import LedgerRequest, RoundPlan
from cotune.shared.runs import RunFolder
from cotune.shared.update import AdapterUpdate, Answer, SiteFailure

JOB = job_of()
SENT = sending(JOB, layout_of(JOB), state_of(layout_of(JOB)), RANK, 1)
Answerer = Callable[[RoundPlan], Answer | list[Answer]]


def honest(plan: RoundPlan, **changes: Any) -> AdapterUpdate:
    delta = np.random.default_rng(list(plan.site.encode())).normal(size=SENT.up.size).astype(np.float32)
    return update_of(plan, delta, **changes)


def crash(plan: RoundPlan) -> Answer:
    return SiteFailure(site=plan.site, code=CRASHED, message="failed (Flower code 0)")


def refuse(plan: RoundPlan) -> Answer:
    return SiteFailure(site=plan.site, code="E-POLICY", message="rule allow.models", exit_code=6)


def fail(plan: RoundPlan) -> Answer:
    return SiteFailure(site=plan.site, code="E-TIMEOUT", message="no answer within 60 s", exit_code=3)


def wrong(plan: RoundPlan) -> Answer:
    return honest(plan, update_sha256="0" * 64)


def none(_plan: RoundPlan) -> list[Answer]:
    return []


@dataclass
class Sites:
    """A fleet in this process: sites answer as they are told to, each time they are asked; honestly if untold."""

    told: dict[str, list[Answerer]] = field(default_factory=dict)
    passes: list[list[str]] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)

    def sites(self) -> Sequence[str]:
        return SITES

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        self.passes.append([request.plan.site for request in requests])
        for request in requests:
            left = self.told.get(request.plan.site, [])
            answerer = (left.pop(0) if len(left) > 1 else left[0]) if left else honest
            answers = answerer(request.plan)
            for answer in answers if isinstance(answers, list) else [answers]:
                self.heard.append(request.plan.site)
                yield answer

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        del requests
        return iter(())


@dataclass
class Room:
    """What a round needs on disk, and what came of it there."""

    run: RunFolder
    spool: Spool
    witness: Witness

    def collect(self, fleet: Sites, quorum: int = len(SITES), asked: Sequence[str] = SITES) -> Collected:
        requests = {site: Request(plan_of(JOB, site), SENT.payload) for site in asked}
        sizes = dict.fromkeys(asked, SENT.up.size)
        return Collector(self.run, requests, sizes, self.witness, self.spool).collect(fleet, quorum)

    def said(self, site: str) -> list[str]:
        return [event["message"] for event in self.run.events() if event["message"].startswith(f"{site}: ")]

    def holds_the_honest(self, *sites: str) -> bool:
        """Whether just these sites are in, each with its own numbers to the bit."""
        own = {site: SENT.up.unflatten(honest(plan_of(JOB, site)).delta("fp32", SENT.up.size)) for site in sites}
        return self.spool.sites == tuple(sorted(sites)) and all(
            self.spool.delta(site, name).tobytes() == array.tobytes()
            for site, arrays in own.items()
            for name, array in arrays.items()
        )


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    (tmp_path / "privacy").mkdir()
    with Spool(tmp_path / ".spool", {RANK: SENT.up}, {RANK: SENT.arrays}, {}) as spool:
        yield Room(RunFolder(tmp_path), spool, Witness(tmp_path / "privacy" / "heads.json"))


def test_a_round_in_which_all_answer_asks_each_once_and_keeps_all(room: Room) -> None:
    fleet = Sites()
    found = room.collect(fleet)
    assert fleet.passes == [list(SITES)]
    assert tuple(found.received) == SITES
    assert (found.failures, found.rejected, found.refused, found.notices) == ([], {}, [], {})
    assert room.holds_the_honest(*SITES)
    assert room.witness.heads_for("site-1", SITES)[0] == head_of("site-1", 1)


def test_what_is_said_of_an_update_is_what_travelled_and_what_was_decoded(room: Room) -> None:
    figures = room.collect(Sites({"site-1": [lambda plan: honest(plan, charges=2)]})).received["site-1"]
    plan, update = plan_of(JOB, "site-1"), honest(plan_of(JOB, "site-1"), charges=2)
    assert figures.bytes_up == update.bytes == 4 * SENT.up.size + len(update.header.model_dump_json())
    assert figures.bytes_down == SENT.payload.nbytes + len(plan.model_dump_json())
    assert figures.norm == pytest.approx(float(np.linalg.norm(update.delta("fp32", SENT.up.size))), rel=1e-6)
    assert (figures.charges, figures.clipping_norm, figures.train_loss) == (2, None, None)
    assert figures.seconds >= 0


# Quorum


@pytest.mark.parametrize("quorum", [1, 3, 5])
def test_a_quorum_ends_the_round_and_nobody_else_is_heard(room: Room, quorum: int) -> None:
    fleet = Sites()
    found = room.collect(fleet, quorum)
    assert tuple(found.received) == SITES[:quorum]
    assert fleet.heard == list(SITES[:quorum])
    assert room.holds_the_honest(*SITES[:quorum])


def test_answers_that_do_not_count_do_not_count_for_the_quorum(room: Room) -> None:
    fleet = Sites({"site-1": [wrong], "site-2": [fail], "site-3": [crash, honest]})
    found = room.collect(fleet, 3)
    assert set(found.received) == {"site-3", "site-4", "site-5"}
    assert fleet.passes == [list(SITES), ["site-3"]]


# Crashes


def test_a_site_that_crashed_is_asked_again_and_counted_once(room: Room) -> None:
    fleet = Sites({"site-2": [crash, honest], "site-4": [crash, crash, honest]})
    found = room.collect(fleet)
    assert fleet.passes == [list(SITES), ["site-2", "site-4"], ["site-4"]]
    assert set(found.received) == set(SITES)
    assert found.failures == []
    assert found.crashed == {"site-2", "site-4"}
    assert room.holds_the_honest(*SITES)
    assert not room.said("site-2")


@pytest.mark.parametrize("dead", [("site-2",), SITES])
def test_three_passes_in_which_only_crashes_answer_end_the_round(room: Room, dead: tuple[str, ...]) -> None:
    fleet = Sites({site: [crash] for site in dead})
    found = room.collect(fleet)
    fruitful = 1 if len(dead) < len(SITES) else 0
    assert len(fleet.passes) == fruitful + MAX_BARREN == fruitful + 3
    assert fleet.passes[1:] == [list(dead)] * (len(fleet.passes) - 1)
    assert [(failure.site, failure.code) for failure in found.failures] == [(site, CRASHED) for site in dead]
    assert set(found.received) == set(SITES) - set(dead)
    for site in dead:
        assert room.said(site) == [f"{site}: failed (Flower code 0)"], "once, not at each pass"


def test_while_asking_again_helps_it_goes_on(room: Room) -> None:
    fleet = Sites({site: [*[crash] * number, honest] for number, site in enumerate(SITES)})
    found = room.collect(fleet)
    assert [len(asked) for asked in fleet.passes] == [5, 4, 3, 2, 1]
    assert set(found.received) == set(SITES)
    assert room.holds_the_honest(*SITES)


def test_a_crash_beside_an_answer_asks_nobody_again_who_was_heard(room: Room) -> None:
    both = Sites({"site-2": [lambda plan: [honest(plan), crash(plan)]], "site-3": [lambda p: [wrong(p), crash(p)]]})
    found = room.collect(both)
    assert both.passes == [list(SITES)]
    assert "site-2" in found.received
    assert found.rejected == {"site-3": "its hash does not match"}


def test_a_crash_of_a_stranger_asks_nobody(room: Room) -> None:
    stranger = SiteFailure(site="mallory", code=CRASHED, message="failed")
    fleet = Sites({"site-1": [lambda plan: [honest(plan), stranger]]})
    assert set(room.collect(fleet).received) == set(SITES)
    assert fleet.passes == [list(SITES)]


def test_a_refusal_after_a_crash_says_nothing_of_what_was_sent_before_it(room: Room) -> None:
    fleet = Sites({"site-1": [refuse], "site-2": [crash, refuse]})
    found = room.collect(fleet)
    assert [failure.site for failure in found.failures] == ["site-1", "site-2"]
    assert found.refused == ["site-1"]


# Answers that do not count


def test_a_second_answer_is_named_and_does_not_spoil_the_first(room: Room) -> None:
    def other(plan: RoundPlan) -> Answer:
        return update_of(plan, np.ones(SENT.up.size, dtype=np.float32))

    seconds: dict[str, list[Answerer]] = {
        "site-1": [lambda plan: [honest(plan), other(plan)]],
        "site-2": [lambda plan: [honest(plan), wrong(plan)]],
        "site-3": [lambda plan: [honest(plan), refuse(plan)]],
        "site-4": [lambda plan: [wrong(plan), honest(plan)]],
    }
    found = room.collect(Sites(seconds), 6)
    assert set(found.received) == set(SITES)
    assert (found.rejected, found.refused, found.notices) == ({}, [], {})
    assert room.holds_the_honest(*SITES)
    assert room.said("site-1") == ["site-1: update rejected: it has answered already"]
    assert room.said("site-2") == ["site-2: update rejected: it has answered already"]
    assert room.said("site-4") == ["site-4: update rejected: its hash does not match"]


def test_a_site_nobody_asked_is_named_and_not_counted(room: Room) -> None:
    fleet = Sites({"site-1": [lambda plan: [honest(plan), honest(plan, site="mallory")]]})
    found = room.collect(fleet)
    assert set(found.received) == set(SITES)
    assert room.said("mallory") == ["mallory: update rejected: nobody asked it"]
    assert room.holds_the_honest(*SITES)


def test_a_site_that_was_not_asked_in_this_round_is_a_stranger_to_it(room: Room) -> None:
    late = Sites({"site-1": [lambda plan: [honest(plan), honest(plan_of(JOB, "site-5"))]]})
    found = room.collect(late, asked=SITES[:4])
    assert set(found.received) == set(SITES[:4])
    assert room.said("site-5") == ["site-5: update rejected: nobody asked it"]


def test_a_rejected_update_is_named_with_its_reason_and_leaves_nothing_behind(room: Room) -> None:
    genuine = head_of("site-3", 2)
    fleet = Sites(
        {
            "site-1": [wrong],
            "site-2": [lambda plan: update_of(plan, np.zeros(SENT.up.size, dtype=np.float32))],
            "site-3": [lambda plan: honest(plan, head=genuine.model_copy(update={"seq": 9}))],
        }
    )
    found = room.collect(fleet)
    assert set(found.received) == {"site-4", "site-5"}
    assert found.rejected["site-1"] == "its hash does not match"
    assert "it echoes the global adapter" in found.rejected["site-2"]
    assert found.rejected["site-3"] == "its ledger head is not signed by its own key"
    assert found.notices == found.rejected
    assert room.holds_the_honest("site-4", "site-5")
    for site, reason in found.rejected.items():
        assert room.said(site) == [f"{site}: update rejected: {reason}"]
        assert not room.witness.heads_for(site, [site])


def test_a_failure_is_kept_as_it_was_said(room: Room) -> None:
    found = room.collect(Sites({"site-1": [fail], "site-2": [refuse], "site-3": [none]}))
    assert [(f.site, f.code, f.exit_code) for f in found.failures] == [
        ("site-1", "E-TIMEOUT", 3),
        ("site-2", "E-POLICY", 6),
    ]
    assert found.refused == ["site-2"]
    assert set(found.received) == {"site-4", "site-5"}
    assert room.said("site-2") == ["site-2: rule allow.models"]


# Enough?


def require(room: Room, fleet: Sites, least: int) -> CotuneError | None:
    try:
        require_enough(room.collect(fleet), least, 4, "the-run")
    except CotuneError as error:
        return error
    return None


@pytest.mark.parametrize(("least", "enough"), [(0, True), (1, True), (3, True), (4, False)])
def test_enough_is_as_many_as_the_job_says(room: Room, least: int, enough: bool) -> None:
    error = require(room, Sites({"site-1": [wrong], "site-2": [fail]}), least)
    assert (error is None) == enough
    if error:
        assert isinstance(error, RunFailed)
        assert (error.code, error.param) == ("E-MIN-SITES", "federation.min_sites")
        assert "round 4: 3 of at least 4" in error.message
        assert "site-2: no answer within 60 s; site-1: its hash does not match" in error.message
        assert "cotune resume the-run" in str(error.hint)


def test_one_is_needed_even_where_the_job_asks_for_none(room: Room) -> None:
    error = require(room, Sites({site: [none] for site in SITES}), 0)
    assert error is not None
    assert error.code == "E-MIN-SITES"


def test_where_all_say_the_same_that_is_how_the_run_ends(room: Room) -> None:
    error = require(room, Sites({site: [refuse] for site in SITES}), 1)
    assert error is not None
    assert (error.code, error.exit_code) == ("E-POLICY", 6)


@pytest.mark.parametrize("other", [wrong, fail])
def test_where_one_says_another_thing_it_is_not(room: Room, other: Answerer) -> None:
    told: dict[str, list[Answerer]] = {site: [refuse] for site in SITES}
    error = require(room, Sites({**told, "site-5": [other]}), 1)
    assert error is not None
    assert error.code == "E-MIN-SITES"
