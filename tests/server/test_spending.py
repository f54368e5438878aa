"""What a run has cost: on disk before a site is asked, never taken back, never above the plan."""

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
    spending.refused(1, "site-2")
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


def test_a_new_run_takes_all_its_rounds(run: RunFolder, job: Job) -> None:
    assert Spending(run, job).rounds_left(0) == range(1, 5)
    assert not (run.path / "events.jsonl").exists()


def test_a_run_stopped_between_rounds_takes_the_rest(run: RunFolder, job: Job) -> None:
    spending = Spending(run, job)
    spending.reserve(1, SITES)
    spending.reserve(2, SITES)
    assert Spending(run, job).rounds_left(2) == range(3, 5)


def test_an_interrupted_round_stays_spent_and_the_run_has_one_less(run: RunFolder, job: Job) -> None:
    spending = Spending(run, job)
    spending.reserve(1, SITES)
    spending.reserve(2, SITES)
    again = Spending(run, job)
    assert again.rounds_left(1) == range(2, 4)
    assert on_disk(run)["site-1"] == on_disk(run)["site-2"]
    assert len(on_disk(run)["site-1"]) == 2
    assert run.events()[-1]["level"] == "warn"
    assert run.events()[-1]["data"]["lost"] == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(outcomes=st.lists(st.sampled_from(["done", "crash", "lost checkpoint"]), min_size=1, max_size=12))
def test_no_history_of_crashes_makes_a_site_spend_more_than_planned(
    tmp_path_factory, job: Job, outcomes: list[str]
) -> None:
    run = RunFolder(tmp_path_factory.mktemp("run"))
    run.privacy.mkdir()
    spending, finished = Spending(run, job), 0
    for outcome in outcomes:
        left = spending.rounds_left(finished)
        if not left:
            break
        assert left[0] == finished + 1
        spending.reserve(left[0], SITES)
        if outcome == "done":
            finished += 1
        else:
            finished -= outcome == "lost checkpoint" and finished > 0
            spending = Spending(run, job)
    entries = on_disk(run)["site-1"]
    assert sum(entry["event"]["steps"] for entry in entries) <= job.steps
    assert finished <= len(entries)


def test_an_account_that_is_damaged_is_never_taken_for_an_empty_one(run: RunFolder, job: Job) -> None:
    Spending(run, job).reserve(1, SITES)
    (run.privacy / "accountant.json").write_text('{"schema": 1, "sites"')
    with pytest.raises(Exception, match=r".") as caught:
        Spending(run, job)
    assert not isinstance(caught.value, AssertionError)
