"""What a budget has paid for: every reservation, at one delta, and no absurd request takes the site down."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from cotune.client.budget import account, bounded_price, job_event
from cotune.shared.chain import Entry
from cotune.shared.errors import PrivacyError
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.event import DpSgdEvent, Event, NonPrivateEvent

STEP = DpSgdEvent(sampling_probability=0.1, noise_multiplier=1.5, steps=2)
OTHER = DpSgdEvent(sampling_probability=0.2, noise_multiplier=2.0, steps=3)


def ledger(*charged: tuple[str, str, Event]) -> list[Entry]:
    """Entries of a ledger: dataset, run and event of each reservation, with other entries between."""
    entries = [Entry(1, "site.init", {"site": "st-mary"}, "0" * 64)]
    for dataset, run, event in charged:
        fields = {"dataset": dataset, "unit": "column:patient", "run_id": run, "round": 1, "event": event.to_dict()}
        entries.append(Entry(len(entries) + 1, "budget.reserve", fields, "0" * 64))
        entries.append(Entry(len(entries) + 1, "job.received", {"job_sha256": run}, "0" * 64))
    return entries


def test_every_reservation_of_the_data_set_counts_and_none_of_another(make_policy: Any) -> None:
    entries = ledger(("notes", "a", STEP), ("letters", "a", OTHER), ("notes", "b", STEP), ("notes", "a", OTHER))
    now = account(entries, make_policy().dataset[0])
    assert now.events == (STEP, STEP, OTHER), "whether a round was ever committed is not asked"
    assert now.runs == {"a": (STEP, OTHER), "b": (STEP,)}
    assert now.units == {"column:patient"}
    assert now.spent == epsilon([STEP, STEP, OTHER], 1e-5)
    assert now.left == 4.0 - now.spent


def test_a_data_set_nobody_used_has_spent_nothing(make_policy: Any) -> None:
    now = account(ledger(), make_policy().dataset[0])
    assert (now.spent, now.left, now.runs) == (0.0, 4.0, {})


def test_what_is_left_is_never_negative_though_the_policy_was_lowered_below_the_spent(make_policy: Any) -> None:
    budget = {"epsilon_total": 0.1, "epsilon_per_run": 0.1}
    now = account(ledger(("notes", "a", STEP)), make_policy(budget=budget).dataset[0])
    assert now.spent > 0.1
    assert now.left == 0.0


def test_all_is_priced_at_the_delta_of_the_data_set(make_policy: Any) -> None:
    entries = ledger(("notes", "a", STEP))
    lax, strict = (account(entries, make_policy(budget={"delta_total": d}).dataset[0]) for d in (1e-3, 1e-7))
    assert lax.spent == epsilon([STEP], 1e-3) < strict.spent


def test_a_release_without_privacy_has_no_price(make_policy: Any) -> None:
    now = account(ledger(("notes", "a", STEP), ("notes", "b", NonPrivateEvent())), make_policy().dataset[0])
    assert math.isinf(now.spent)
    assert now.more_runs([STEP]) == 0


def test_more_runs_is_the_number_that_fits_and_one_more_does_not(make_policy: Any) -> None:
    entries = ledger(("notes", "a", STEP))
    total = epsilon([STEP] * 4, 1e-5)
    now = account(entries, make_policy(budget={"epsilon_total": total, "epsilon_per_run": total}).dataset[0])
    assert now.more_runs([STEP]) == 3
    assert now.more_runs([STEP], most=2) == 2


def test_what_a_job_costs_is_that_of_all_its_rounds(ask_job: Any) -> None:
    job = ask_job()
    event = job_event(job, 3)
    assert event == DpSgdEvent(sampling_probability=0.1, noise_multiplier=1.5, steps=6)
    with pytest.raises(PrivacyError):
        job_event(ask_job(privacy={"noise_multiplier": "auto"}), 3)


def test_a_price_within_the_cap_is_exact_and_one_a_little_above_too() -> None:
    event = DpSgdEvent(sampling_probability=0.1, noise_multiplier=1.0, steps=500)
    exact = epsilon([event], 1e-5)
    assert bounded_price(event, 1e-5, cap=exact) == exact
    assert bounded_price(event, 1e-5, cap=exact / 2) == exact
    none = DpSgdEvent(sampling_probability=0.1, noise_multiplier=1.0, steps=0)
    assert bounded_price(none, 1e-5, cap=1.0) == 0.0


@pytest.mark.parametrize(
    "event",
    [
        DpSgdEvent(sampling_probability=0.9, noise_multiplier=0.2, steps=10**9),
        DpSgdEvent(sampling_probability=0.5, noise_multiplier=0.3, steps=10**6),
        NonPrivateEvent(),
    ],
    ids=str,
)
def test_an_absurd_event_is_found_out_by_a_few_of_its_steps(event: Event) -> None:
    """The whole distribution of the first would take hours and all memory."""
    started = time.process_time()
    assert math.isinf(bounded_price(event, 1e-5, cap=8.0))
    assert time.process_time() - started < 10
