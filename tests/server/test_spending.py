"""What a run has cost: on disk before a site is asked, once however often it is asked, never taken back."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotune.server.spending import Spending
from cotune.shared.errors import StorageError
from cotune.shared.job import Job
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.claim import charged
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.runs import RunFolder

SITES = ("site-1", "site-2")


@pytest.fixture
def job(make_job) -> Job:
    return make_job(run={"rounds": 4}, privacy={"delta": 1e-3, "noise_multiplier": 2.0})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "run" / "privacy").mkdir(parents=True)
    return RunFolder(tmp_path / "run")


def on_disk(run: RunFolder) -> dict:
    return json.loads((run.privacy / "accountant.json").read_text())["sites"]


def test_what_is_reserved_is_on_disk_at_once_with_what_prices_it(run: RunFolder, job: Job) -> None:
    Spending(run, job).reserve(1, SITES)
    event = mechanism_of(job).event(job.train.local_steps).to_dict()
    assert on_disk(run) == {site: [{"round": 1, "event": event}] for site in SITES}
    whole = json.loads((run.privacy / "accountant.json").read_text())
    assert (whole["delta"], whole["adjacency"]) == (1e-3, "add-or-remove-one")


def test_a_site_that_cannot_be_written_down_is_not_asked(run: RunFolder, job: Job) -> None:
    spending = Spending(run, job)
    run.privacy.rmdir()
    with pytest.raises(StorageError):
        spending.reserve(1, SITES)


def test_epsilon_is_that_of_the_events_of_the_site_alone(run: RunFolder, job: Job) -> None:
    spending = Spending(run, job)
    assert spending.epsilon("site-1") == 0.0
    spending.reserve(1, SITES)
    spending.reserve(2, SITES[:1])
    expected = epsilon([mechanism_of(job).event(2 * job.train.local_steps)], 1e-3)
    assert spending.epsilon("site-1") == pytest.approx(expected, abs=1e-9)
    assert 0 < spending.epsilon("site-2") < spending.epsilon("site-1")


def test_what_a_site_refused_stays_written_down_and_costs_nothing(run: RunFolder, job: Job) -> None:
    spending = Spending(run, job)
    spending.reserve(1, SITES)
    spending.answered(1, ["site-2"], {"site-1": 1})
    assert on_disk(run)["site-2"][0]["refused"] is True
    assert spending.epsilon("site-2") == 0.0
    assert Spending(run, job).epsilon("site-1") == spending.epsilon("site-1") > 0
    assert list(charged(on_disk(run))) == ["site-1"]


def test_a_run_that_is_not_private_has_no_epsilon(run: RunFolder, make_job) -> None:
    spending = Spending(run, make_job(privacy={"level": "none"}))
    assert spending.epsilon("site-1") in (None, 0.0)
    spending.reserve(1, SITES)
    assert spending.epsilon("site-1") is None
    assert on_disk(run)["site-1"][0]["event"] == {"kind": "non-private"}


def numbers(run: RunFolder, site: str = "site-1") -> list[int]:
    """Rounds a site is charged for, in the order they are written."""
    return [entry["round"] for entry in on_disk(run).get(site, []) if "refused" not in entry]


def test_a_round_that_is_asked_for_again_is_the_same_release_and_written_once(run: RunFolder, job: Job) -> None:
    spending = Spending(run, job)
    spending.reserve(1, SITES)
    spending.reserve(2, SITES)
    once, cost = on_disk(run), spending.epsilon("site-1")
    for again in (spending, Spending(run, job)):
        again.reserve(2, SITES)
        assert on_disk(run) == once
        assert again.epsilon("site-1") == cost


def test_a_site_that_joins_late_is_charged_from_its_first_round_on(run: RunFolder, job: Job) -> None:
    spending = Spending(run, job)
    spending.reserve(1, SITES[:1])
    spending.reserve(2, SITES)
    assert (numbers(run, "site-1"), numbers(run, "site-2")) == ([1, 2], [2])
    assert spending.taken(3) == {"site-1": 2, "site-2": 1}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_round_a_site_charged_several_times_is_in_its_account_as_often(run: RunFolder, job: Job, count: int) -> None:
    spending = Spending(run, job)
    spending.reserve(1, SITES)
    spending.answered(1, [], {"site-1": count, "site-2": 1})
    assert numbers(run) == [1] * count
    expected = epsilon([mechanism_of(job).event(count * job.train.local_steps)], 1e-3)
    assert spending.epsilon("site-1") == pytest.approx(expected, abs=1e-9)
    assert spending.taken(2) == {"site-1": 1, "site-2": 1}, "a round lost and taken again is one of its rounds"
    spending.reserve(1, SITES)
    assert numbers(run) == [1] * count, "asked for again, what it was charged stays"


def test_a_site_that_refused_and_is_asked_again_may_agree_or_refuse_again(run: RunFolder, job: Job) -> None:
    spending = Spending(run, job)
    spending.reserve(1, SITES)
    spending.answered(1, SITES, {})
    assert (numbers(run, "site-1"), numbers(run, "site-2")) == ([], [])
    again = Spending(run, job)
    again.reserve(1, SITES)
    assert numbers(run, "site-1") == [1], "before it is asked, it is written down"
    again.answered(1, ["site-2"], {"site-1": 1})
    assert (numbers(run, "site-1"), numbers(run, "site-2")) == ([1], [])


def test_a_refusal_to_answer_again_takes_nothing_back_that_may_have_been_released(run: RunFolder, job: Job) -> None:
    Spending(run, job).reserve(1, SITES)  # and then the coordinator was interrupted, perhaps after an answer
    again = Spending(run, job)
    again.reserve(1, SITES)
    again.answered(1, ["site-2"], {"site-1": 1})
    assert numbers(run, "site-2") == [1]


def test_a_refusal_concerns_its_own_round_and_no_later_one_a_damaged_checkpoint_left(run: RunFolder, job: Job) -> None:
    spending = Spending(run, job)
    spending.reserve(1, SITES[:1])
    for number in (2, 3):
        spending.reserve(number, SITES)
    spending.reserve(1, SITES)
    spending.answered(1, ["site-2"], {"site-1": 1})
    assert numbers(run, "site-2") == [2, 3]
    assert spending.taken(4) == {"site-1": 3, "site-2": 2}
    assert spending.taken(3) == {"site-1": 2, "site-2": 1}


def test_a_refusal_of_a_stranger_is_no_matter(run: RunFolder, job: Job) -> None:
    spending = Spending(run, job)
    spending.reserve(1, SITES)
    spending.answered(1, ["mallory"], {})
    assert set(on_disk(run)) == set(SITES)


def test_at_the_end_the_sites_own_ledger_says_what_each_round_cost(run: RunFolder, job: Job) -> None:
    spending = Spending(run, job)
    for number in (1, 2, 3):
        spending.reserve(number, SITES)
        spending.answered(number, [], {"site-1": 1})
    spending.settle("site-1", [1, 2, 2])  # round 2 was lost once, and round 3 never charged
    assert numbers(run) == [1, 2, 2]
    assert [entry["round"] for entry in on_disk(run)["site-1"] if "refused" in entry] == [3]
    assert numbers(run, "site-2") == [1, 2, 3], "a site whose ledger did not come keeps what it was asked for"
    expected = epsilon([mechanism_of(job).event(3 * job.train.local_steps)], 1e-3)
    assert Spending(run, job).epsilon("site-1") == pytest.approx(expected, abs=1e-9)
    spending.settle("site-1", [1, 2, 2])
    assert numbers(run) == [1, 2, 2], "told twice, it is the same"


def test_a_round_in_a_ledger_that_nobody_asked_for_is_charged_too(run: RunFolder, job: Job) -> None:
    spending = Spending(run, job)
    spending.reserve(1, SITES)
    spending.settle("site-1", [1, 4])
    assert numbers(run) == [1, 4]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(outcomes=st.lists(st.sampled_from(["done", "crash", "lost checkpoint"]), min_size=1, max_size=12))
def test_no_history_of_crashes_of_the_coordinator_makes_a_site_spend_more_than_planned_or_less_than_it_was_asked(
    tmp_path_factory, job: Job, outcomes: list[str]
) -> None:
    run = RunFolder(tmp_path_factory.mktemp("run"))
    run.privacy.mkdir()
    spending, finished, asked = Spending(run, job), 0, set()
    for outcome in outcomes:
        if finished == job.run.rounds:
            break
        spending.reserve(finished + 1, SITES)
        asked.add(finished + 1)
        if outcome == "done":
            spending.answered(finished + 1, [], dict.fromkeys(SITES, 1))
            finished += 1
        else:
            finished -= outcome == "lost checkpoint" and finished > 0
            spending = Spending(run, job)
    assert numbers(run) == sorted(asked)
    assert sum(entry["event"]["steps"] for entry in on_disk(run)["site-1"]) <= job.steps


def test_an_account_that_is_damaged_is_never_taken_for_an_empty_one(run: RunFolder, job: Job) -> None:
    Spending(run, job).reserve(1, SITES)
    (run.privacy / "accountant.json").write_text('{"schema": 1, "sites"')
    with pytest.raises(Exception, match=r".") as caught:
        Spending(run, job)
    assert not isinstance(caught.value, AssertionError)
