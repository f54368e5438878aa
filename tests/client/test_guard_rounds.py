"""Rank, number of rounds, notices and signatures: what the guard holds of a plan and says of an update."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cotune.client.decisions import UNUSED
from cotune.client.guard import Guard
from cotune.client.home import SiteHome
from cotune.shared.chain import head_is_genuine
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.event import DpSgdEvent
from cotune.shared.signing import verify
from cotune.shared.update import UpdateHeader

MODEL = "ab" * 32
FOUR = dict.fromkeys(("st-mary", "charite", "mercy", "north"), "home")


def again(guard: Guard) -> Guard:
    """The same site after a restart."""
    return Guard(SiteHome.open(guard.home.path))


@pytest.fixture
def two_of_three(ask_job: Any) -> Any:
    """A job of three rounds of which a site takes two at most."""
    drawn = {"selection": "random", "sites_per_round": 2, "max_rounds_per_site": 2}
    return ask_job(data={"sites": FOUR}, federation=drawn)


@pytest.fixture
def capped(make_home: Any, two_of_three: Any) -> Guard:
    home = make_home()
    home.jobs.approve(two_of_three, by="admin")
    return Guard(home)


def refused_as_plan(desk: Any, call: Any, *arguments: Any, saying: str) -> None:
    error = desk.refused(call, *arguments)
    assert (error.code, error.exit_code) == ("E-PLAN", 6)
    assert saying in error.message


# Rank


def test_a_plan_of_another_rank_than_the_jobs_for_this_site_is_refused(make_home: Any, desk: Any, ask_job: Any) -> None:
    job, guard = ask_job(lora={"ranks": {"st-mary": 4}}), Guard(make_home())
    guard.home.jobs.approve(job, by="admin")
    for rank in (1, 3, 5, 8):
        refused_as_plan(desk, guard.admit, desk.plan(job, rank=rank), MODEL, saying="rank")
    assert guard.admit(desk.plan(job, rank=4), MODEL).id == "notes"


# Rounds


@pytest.mark.parametrize("rounds", [(1, 2), (1, 3), (3, 1)], ids=str)
def test_no_site_takes_more_rounds_than_the_job_lets_it(
    capped: Guard, desk: Any, two_of_three: Any, rounds: tuple[int, int]
) -> None:
    given = {number: desk.take(capped, desk.plan(two_of_three, number), fill=number) for number in rounds}
    [last] = {1, 2, 3} - set(rounds)
    for site in (capped, again(capped)):
        refused_as_plan(desk, site.admit, desk.plan(two_of_three, last), MODEL, saying="took part in 2 rounds")
        for number, update in given.items():
            site.admit(desk.plan(two_of_three, number), MODEL)
            kept = site.kept(desk.plan(two_of_three, number))
            assert kept is not None and kept.payload.tobytes() == update.payload.tobytes()
    assert desk.actions(capped.home).count("budget.reserve") == 2


def test_a_round_that_was_lost_counts_and_may_still_be_taken(capped: Guard, desk: Any, two_of_three: Any) -> None:
    desk.reserve(capped, desk.plan(two_of_three, 1))
    desk.take(capped, desk.plan(two_of_three, 2))
    refused_as_plan(desk, capped.admit, desk.plan(two_of_three, 3), MODEL, saying="took part in 2 rounds")
    update = desk.take(again(capped), desk.plan(two_of_three, 1))
    assert (update.header.round, update.header.charges) == (1, 2)


def test_of_two_processes_that_both_were_admitted_only_as_many_rounds_are_charged_as_the_job_lets_a_site(
    capped: Guard, desk: Any, two_of_three: Any
) -> None:
    desk.take(capped, desk.plan(two_of_three, 1))
    other, plans = again(capped), [desk.plan(two_of_three, number) for number in (2, 3)]
    datasets = [site.admit(plan, MODEL) for site, plan in zip((capped, other), plans, strict=True)]
    capped.reserve(plans[0], datasets[0], desk.event(two_of_three))
    event = desk.event(two_of_three)
    refused_as_plan(desk, other.reserve, plans[1], datasets[1], event, saying="took part in 2 rounds")
    assert desk.actions(capped.home).count("budget.reserve") == 2


def test_another_run_of_the_same_job_has_rounds_of_its_own(capped: Guard, desk: Any, two_of_three: Any) -> None:
    for number in (1, 2):
        desk.take(capped, desk.plan(two_of_three, number))
    assert desk.take(capped, desk.plan(two_of_three, 3, run_id="run-2")).header.run_id == "run-2"


def test_a_run_needs_budget_for_the_rounds_a_site_can_take_and_no_more(
    make_home: Any, desk: Any, ask_job: Any, two_of_three: Any
) -> None:
    cost = epsilon([DpSgdEvent(sampling_probability=0.1, noise_multiplier=1.5, steps=4)], 1e-5)
    guard = Guard(make_home(budget={"epsilon_total": cost, "epsilon_per_run": cost}))
    all_three = ask_job(data={"sites": FOUR})
    for job in (two_of_three, all_three):
        guard.home.jobs.approve(job, by="admin")
    assert desk.refused(guard.admit, desk.plan(all_three), MODEL).param == "budget.epsilon_per_run"
    for number in (1, 3):
        desk.take(guard, desk.plan(two_of_three, number))


# Notices


def own_lines(guard: Guard) -> list[tuple[str, str]]:
    lines = SiteHome.open(guard.home.path).jobs.own_lines()
    return [(line["rule"], line["text"]) for line in lines]


def test_why_an_update_was_not_used_is_kept_in_the_homes_own_log_once_a_round(
    guard: Guard, desk: Any, ask_job: Any
) -> None:
    desk.take(guard, desk.plan(ask_job()))
    first, second = "round 1: its norm 12 exceeds aggregation.max_update_norm", "round 2: its hash does not match"
    for site in (guard, guard, again(guard)):
        site.admit(desk.plan(ask_job(), 2, notice=first), MODEL)
    assert own_lines(guard) == [(UNUSED, first)]
    desk.take(guard, desk.plan(ask_job(), 2, notice=first))
    guard.admit(desk.plan(ask_job(), 3, notice=second), MODEL)
    assert own_lines(guard) == [(UNUSED, first), (UNUSED, second)]
    assert first not in (guard.home.path / "ledger.jsonl").read_text(), "others may get to see the ledger"


def test_a_flood_of_notices_leaves_no_more_lines_than_the_job_has_rounds(guard: Guard, desk: Any, ask_job: Any) -> None:
    desk.take(guard, desk.plan(ask_job()))
    for number in range(20):
        guard.admit(desk.plan(ask_job(), 2, notice=f"\x1b[31mreason {number}"), MODEL)
    assert len(own_lines(guard)) == ask_job().run.rounds
    assert "\x1b" not in (guard.home.path / "jobs" / "own.jsonl").read_text()


def test_a_notice_of_a_run_this_site_gave_nothing_to_is_not_kept(guard: Guard, desk: Any, ask_job: Any) -> None:
    guard.admit(desk.plan(ask_job(), 2, notice="round 1: its hash does not match"), MODEL)
    desk.take(guard, desk.plan(ask_job()))
    guard.admit(desk.plan(ask_job(), run_id="run-2", notice="round 1: its hash does not match"), MODEL)
    desk.refused(guard.admit, desk.plan(ask_job(), 2, rank=1, notice="round 1: not a plan of this job"), MODEL)
    assert own_lines(guard) == []


# Signatures


def genuine(header: UpdateHeader) -> bool:
    return verify(header.head.public_key, "cotune-update", header.message(), header.signature)


def test_an_updates_signature_is_by_the_sites_key_and_holds_for_nothing_else(
    guard: Guard, desk: Any, ask_job: Any, sign_head: Any
) -> None:
    header = desk.take(guard, desk.plan(ask_job(), heads=(sign_head("charite", 7),))).header
    assert genuine(header) and head_is_genuine(header.head)
    assert header.head.public_key == guard.home.ledger.entries[0].fields["public_key"]
    changed: dict[str, Any] = {
        "site": "charite", "run_id": "run-2", "round": 2, "charges": 2, "clipping_norm": 1.0, "train_loss": 0.5,
        "job_sha256": "2" * 64, "base_sha256": "3" * 64, "update_sha256": "4" * 64,
        "event": {**header.event, "steps": 1}, "head": sign_head("st-mary", 4), "witnessed": (),
    }  # fmt: skip
    assert set(changed) == set(UpdateHeader.model_fields) - {"signature"}
    for name, value in changed.items():
        other = header.model_copy(update={name: value})
        assert getattr(other, name) != getattr(header, name)
        assert not verify(header.head.public_key, "cotune-update", other.message(), header.signature), name
    assert not verify(header.head.public_key, "cotune-head", header.message(), header.signature)
    assert not verify(sign_head("charite", 7).public_key, "cotune-update", header.message(), header.signature)


def test_a_signature_still_holds_after_the_journey(guard: Guard, desk: Any, ask_job: Any) -> None:
    """A header travels as JSON: its numbers and the order of its keys come back as they were."""
    job = ask_job(privacy={"noise_multiplier": 1.1 + 0.2, "clipping_norm": 0.1 + 0.2})
    guard.home.jobs.approve(job, by="admin")
    header = desk.take(guard, desk.plan(job)).header
    arrived = UpdateHeader.model_validate_json(json.dumps(json.loads(header.model_dump_json())))
    assert arrived == header and genuine(arrived)


def test_an_update_that_is_given_again_is_signed_anew_with_todays_head_and_charges(
    guard: Guard, desk: Any, ask_job: Any
) -> None:
    plan = desk.plan(ask_job())
    desk.reserve(guard, plan)
    first = desk.take(again(guard), plan).header
    desk.take(again(guard), desk.plan(ask_job(), 2))
    kept = again(guard).kept(plan)
    assert kept is not None and genuine(first) and genuine(kept.header)
    assert (first.charges, kept.header.charges) == (2, 2)
    assert kept.header.head.seq > first.head.seq
    assert kept.header.signature != first.signature
