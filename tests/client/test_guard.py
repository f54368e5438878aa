"""The site's own say: what it refuses, what it charges, and that a round gives one update whatever happens."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cotune.client.budget import account
from cotune.client.decisions import MAX_UNDECIDED, Standing
from cotune.client.guard import Guard
from cotune.client.home import SiteHome
from cotune.client.policy import policy_text
from cotune.shared.errors import DataError, StorageError
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.event import DpSgdEvent
from cotune.shared.signing import public_key_line, sign

MODEL = "ab" * 32


def spent(guard: Guard) -> float:
    home = SiteHome.open(guard.home.path)
    return account(home.ledger.entries, home.policy.dataset[0]).spent


def again(guard: Guard) -> Guard:
    """The same site after a restart."""
    return Guard(SiteHome.open(guard.home.path))


def change(guard: Guard, policy: Any) -> None:
    (guard.home.path / "policy.toml").write_text(policy_text(policy))


def test_a_round_is_charged_before_it_is_trained_and_committed_before_it_is_sent(
    guard: Guard, desk: Any, ask_job: Any
) -> None:
    plan = desk.plan(ask_job())
    dataset = guard.admit(plan, MODEL)
    assert guard.kept(plan) is None
    guard.reserve(plan, dataset, desk.event(plan.job))
    assert desk.actions(guard.home)[-1] == "budget.reserve", "on disk before `reserve` returned"
    update = guard.release(plan, desk.update(guard, plan), {})
    assert desk.actions(guard.home)[-1] == "budget.commit"
    assert update.header.head == guard.home.ledger.head
    assert guard.home.ledger.committed("run-1", 1) == update.header.update_sha256
    charge = guard.home.ledger.rounds("run-1", 1)[0].fields
    assert (charge["dataset"], charge["unit"]) == ("notes", "column:patient")
    assert charge["event"] == desk.event(plan.job).to_dict()


def test_asked_again_the_site_gives_the_same_numbers_and_charges_nothing(guard: Guard, desk: Any, ask_job: Any) -> None:
    plan = desk.plan(ask_job())
    first = desk.take(guard, plan)
    desk.take(guard, desk.plan(ask_job(), 2), fill=9.0)
    before = spent(guard)
    for site in (guard, again(guard)):
        site.admit(plan, MODEL)
        kept = site.kept(plan)
        assert kept is not None
        np.testing.assert_array_equal(kept.payload, first.payload)
        assert kept.header.update_sha256 == first.header.update_sha256
        assert kept.header.head == site.home.ledger.head, "an older head would look like a restored ledger"
    assert spent(guard) == before


def test_a_job_nobody_approved_waits_and_is_logged_once(make_home: Any, desk: Any, ask_job: Any) -> None:
    guard, plan = Guard(make_home()), desk.plan(ask_job())
    sha256 = plan.job.sha256()
    for _ in range(3):
        error = desk.refused(guard.admit, plan, MODEL)
        assert (error.code, error.exit_code) == ("E-APPROVAL", 6)
        assert error.message == f"st-mary: rule approve.mode: job {sha256[:12]} waits for approval"
        assert error.hint == f"cotune site approve {sha256[:12]}"
    assert desk.actions(guard.home)[2:] == ["job.received"]
    assert guard.home.jobs.job(sha256) == plan.job
    guard.home.jobs.approve(plan.job, by="admin")
    assert guard.admit(plan, MODEL).id == "notes"


def test_a_denied_job_stays_denied_also_in_the_middle_of_its_run(guard: Guard, desk: Any, ask_job: Any) -> None:
    job = ask_job()
    desk.take(guard, desk.plan(job))
    SiteHome.open(guard.home.path).jobs.deny(job.sha256(), "withdrawn")
    error = desk.refused(guard.admit, desk.plan(job, 2), MODEL)
    assert error.code == "E-APPROVAL"
    assert "was denied" in error.message


def test_in_auto_mode_a_listed_signers_job_starts_and_no_other(make_home: Any, desk: Any, ask_job: Any) -> None:
    key, job = Ed25519PrivateKey.generate(), ask_job()
    guard = Guard(
        make_home(approve={"mode": "auto-within-policy"}, allow={"signers": [public_key_line(key.public_key())]})
    )
    error = desk.refused(guard.admit, desk.plan(job), MODEL)
    assert (
        error.message
        == "st-mary: rule allow.signers: the job is not signed; the signature of a listed signer is needed"
    )
    signature = sign(key, "cotune-job", job.sha256().encode())
    desk.take(guard, desk.plan(job, signature=signature))
    assert desk.actions(guard.home)[2:] == [
        "job.received", "job.refused", "job.approved", "budget.reserve", "budget.commit"
    ]  # fmt: skip
    assert guard.home.ledger.entries[4].fields["by"] == "policy"


def test_a_refusal_names_the_rule_and_is_logged_once_however_often_it_is_asked(
    guard: Guard, desk: Any, ask_job: Any
) -> None:
    plan = desk.plan(ask_job(lora={"r": 99}))
    for _ in range(50):
        error = desk.refused(guard.admit, plan, MODEL)
        assert (error.code, error.exit_code, error.param) == ("E-POLICY", 6, "allow.max_lora_rank")
        assert error.message == "st-mary: rule allow.max_lora_rank: lora.r = 99 is above 16"
    assert desk.actions(guard.home).count("job.refused") == 1
    desk.refused(guard.admit, plan, "cd" * 32)
    logged = [e.fields["rule"] for e in guard.home.ledger.entries if e.action == "job.refused"]
    assert logged == ["allow.max_lora_rank", "allow.models"]
    assert spent(guard) == 0.0


def test_a_flood_of_jobs_fills_neither_ledger_nor_disk_and_an_approved_one_is_still_served(
    guard: Guard, desk: Any, ask_job: Any
) -> None:
    for seed in range(MAX_UNDECIDED + 20):
        desk.refused(guard.admit, desk.plan(ask_job(run={"seed": seed}, lora={"r": 99})), MODEL)
    assert len(list((guard.home.path / "jobs").iterdir())) == MAX_UNDECIDED + 1
    assert len(guard.home.ledger.entries) == 3 + 2 * MAX_UNDECIDED
    error = desk.refused(guard.admit, desk.plan(ask_job(run={"seed": 10**6})), MODEL)
    assert "too many jobs wait" in error.message
    assert len(guard.home.ledger.entries) == 3 + 2 * MAX_UNDECIDED
    desk.take(guard, desk.plan(ask_job()))


def test_a_job_of_an_unknown_data_set_is_told_the_known_ones(guard: Guard, desk: Any, ask_job: Any) -> None:
    for name, said in ((None, "names no data set"), ("x\x1b[31m" * 40, r"names the data set 'x\x1b[31mx")):
        error = desk.refused(guard.admit, desk.plan(ask_job(data={"dataset": name})), MODEL)
        assert error.param == "data.dataset"
        assert said in error.message
        assert "may be: notes" in error.message
        assert "\x1b" not in error.message
        assert len(error.message) < 200


def test_a_run_that_does_not_fit_into_the_budget_gets_no_first_round(make_home: Any, desk: Any, ask_job: Any) -> None:
    job = ask_job()
    cost = epsilon([DpSgdEvent(sampling_probability=0.1, noise_multiplier=1.5, steps=6)], 1e-5)
    guard = Guard(make_home(budget={"epsilon_total": 4.0, "epsilon_per_run": cost * 0.999}))
    guard.home.jobs.approve(job, by="admin")
    error = desk.refused(guard.admit, desk.plan(job), MODEL)
    assert (error.code, error.exit_code) == ("E-BUDGET", 6)
    assert error.message.startswith("st-mary: rule budget.epsilon_per_run: this run costs epsilon 1.")
    assert desk.actions(guard.home)[-1] == "job.refused"
    assert spent(guard) == 0.0


def test_a_run_that_costs_exactly_the_budget_is_taken_to_its_end(make_home: Any, desk: Any, ask_job: Any) -> None:
    job = ask_job()
    cost = epsilon([DpSgdEvent(sampling_probability=0.1, noise_multiplier=1.5, steps=6)], 1e-5)
    guard = Guard(make_home(budget={"epsilon_total": cost, "epsilon_per_run": cost}))
    guard.home.jobs.approve(job, by="admin")
    for number in (1, 2, 3):
        desk.take(guard, desk.plan(job, number))
    assert spent(guard) == cost
    assert guard.kept(desk.plan(job, 3)) is not None
    guard.admit(desk.plan(job, 3), MODEL)
    error = desk.refused(guard.admit, desk.plan(job, run_id="run-2"), MODEL)
    assert error.param == "budget.epsilon_total"


def test_runs_without_end_never_spend_more_than_the_budget(make_home: Any, desk: Any, ask_job: Any) -> None:
    job = ask_job()
    guard = Guard(make_home(budget={"epsilon_total": 2.0, "epsilon_per_run": 2.0}))
    guard.home.jobs.approve(job, by="admin")
    taken = 0
    for number in range(60):
        plan = desk.plan(job, 3, run_id=f"run-{number}")  # only the last round, again and again
        try:
            desk.take(guard, plan)
        except Exception as error:  # noqa: BLE001 - any error but the budget's fails below
            assert getattr(error, "param", "") == "budget.epsilon_total", error
            continue
        taken += 1
    assert 0 < taken < 60
    assert spent(guard) <= 2.0
    assert account(guard.home.ledger.entries, guard.home.policy.dataset[0]).more_runs([desk.event(job)]) == 0


def test_of_two_processes_that_both_were_admitted_only_what_fits_is_charged(
    make_home: Any, desk: Any, ask_job: Any
) -> None:
    job = ask_job()
    cost = epsilon([DpSgdEvent(sampling_probability=0.1, noise_multiplier=1.5, steps=6)], 1e-5)
    one = Guard(make_home(budget={"epsilon_total": cost, "epsilon_per_run": cost}))
    one.home.jobs.approve(job, by="admin")
    two = again(one)
    plans = [desk.plan(job, 1, run_id=run) for run in ("a", "b")]
    datasets = [site.admit(plan, MODEL) for site, plan in zip((one, two), plans, strict=True)]
    whole = DpSgdEvent(sampling_probability=0.1, noise_multiplier=1.5, steps=6)
    one.reserve(plans[0], datasets[0], whole)
    error = desk.refused(two.reserve, plans[1], datasets[1], whole)
    assert error.param == "budget.epsilon_total"
    assert spent(one) == cost
    logged = SiteHome.open(one.home.path).ledger.entries[-1]
    assert (logged.action, logged.fields["rule"]) == ("job.refused", "budget.epsilon_total")


def test_a_round_lost_in_a_crash_is_charged_once_more_and_then_given_up(guard: Guard, desk: Any, ask_job: Any) -> None:
    plan = desk.plan(ask_job())
    desk.reserve(guard, plan)
    once = spent(guard)
    desk.reserve(again(guard), plan)
    assert spent(guard) > once, "what may have been released is never given back"
    error = desk.refused(desk.reserve, again(guard), plan)
    assert (error.code, error.exit_code) == ("E-ROUND-LOST", 6)
    assert desk.take(again(guard), desk.plan(ask_job(), 2)).header.round == 2


def test_an_update_that_was_written_but_not_committed_is_not_lost(guard: Guard, desk: Any, ask_job: Any) -> None:
    plan = desk.plan(ask_job())
    desk.reserve(guard, plan)
    written = desk.update(guard, plan)
    assert guard.home.updates.write("run-1", 1, written, {})
    restarted = again(guard)
    kept = restarted.kept(plan)
    assert kept is not None
    np.testing.assert_array_equal(kept.payload, written.payload)
    assert desk.actions(guard.home)[-1] == "budget.commit"


def test_an_uncommitted_update_of_another_global_adapter_is_trained_anew(guard: Guard, desk: Any, ask_job: Any) -> None:
    plan, moved = desk.plan(ask_job()), desk.plan(ask_job(), base_sha256="9" * 64)
    desk.reserve(guard, plan)
    guard.home.updates.write("run-1", 1, desk.update(guard, plan), {})
    assert guard.kept(moved) is None
    assert desk.take(guard, moved, fill=2.0).delta("fp32", 5)[0] == 2.0


def test_a_round_that_gave_its_update_gives_no_other_for_another_global_adapter(
    guard: Guard, desk: Any, ask_job: Any
) -> None:
    desk.take(guard, desk.plan(ask_job()))
    error = desk.refused(guard.kept, desk.plan(ask_job(), base_sha256="9" * 64))
    assert (error.code, error.exit_code) == ("E-ROUND-BASE", 6)


@pytest.mark.parametrize("harm", ["gone", "cut", "edited", "of another round"])
def test_a_round_whose_update_is_gone_is_not_trained_again(harm: str, guard: Guard, desk: Any, ask_job: Any) -> None:
    plan = desk.plan(ask_job())
    desk.take(guard, plan)
    path = guard.home.updates.path("run-1", 1)
    content = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(content[:-3])
    elif harm == "edited":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        desk.take(guard, desk.plan(ask_job(), 2), fill=3.0)
        shutil.copy(guard.home.updates.path("run-1", 2), path)
    assert guard.kept(plan) is None
    error = desk.refused(desk.reserve, guard, plan)
    assert (error.code, error.exit_code) == ("E-ROUND-DONE", 6)


def test_of_two_processes_that_trained_one_round_both_give_the_update_of_the_faster(
    guard: Guard, desk: Any, ask_job: Any
) -> None:
    plan, slow = desk.plan(ask_job()), again(guard)
    desk.reserve(guard, plan)
    desk.reserve(slow, plan)
    fast_update = guard.release(plan, desk.update(guard, plan, fill=1.0), {})
    slow_update = slow.release(plan, desk.update(slow, plan, fill=2.0), {})
    np.testing.assert_array_equal(slow_update.payload, fast_update.payload)
    assert desk.actions(guard.home).count("budget.commit") == 1


def test_an_update_of_a_round_that_was_never_charged_is_not_released(guard: Guard, desk: Any, ask_job: Any) -> None:
    plan = desk.plan(ask_job())
    assert desk.refused(guard.release, plan, desk.update(guard, plan), {}).code == "E-ROUND-DONE"
    assert guard.kept(plan) is None


def test_updates_of_long_ago_are_let_go(guard: Guard, desk: Any, ask_job: Any) -> None:
    job = ask_job(run={"rounds": 5})
    guard.home.jobs.approve(job, by="admin")
    for number in range(1, 6):
        desk.take(guard, desk.plan(job, number))
    kept = sorted(path.name for path in (guard.home.path / "updates").iterdir())
    assert kept == [f"run-1-{number}.safetensors" for number in (3, 4, 5)]


@pytest.mark.parametrize(
    "changes", [{"site": "charite"}, {"number": 4}, {"job": {"run": {"seed": 4}}}], ids=["site", "round", "job"]
)
def test_a_plan_that_does_not_hold_together_is_refused(
    changes: dict[str, Any], guard: Guard, desk: Any, ask_job: Any
) -> None:
    desk.take(guard, desk.plan(ask_job()))
    job = ask_job(**changes.pop("job", {}))
    plan = desk.plan(job, changes.pop("number", 2), **changes)
    error = desk.refused(guard.admit, plan, MODEL)
    assert (error.code, error.exit_code) == ("E-PLAN", 6)


def test_a_restored_old_ledger_is_found_out_by_a_head_that_comes_back(
    guard: Guard, desk: Any, ask_job: Any, tmp_path: Path
) -> None:
    desk.take(guard, desk.plan(ask_job()))
    for name in ("ledger.jsonl", "head.json"):
        shutil.copy(guard.home.path / name, tmp_path / name)
    head = desk.take(guard, desk.plan(ask_job(), 2)).header.head
    for name in ("ledger.jsonl", "head.json"):
        shutil.copy(tmp_path / name, guard.home.path / name)
    plan = desk.plan(ask_job(), 3, heads=(head,))
    error = desk.refused(again(guard).admit, plan, MODEL)
    assert (error.code, error.exit_code) == ("E-LEDGER-BEHIND", 1)
    forked = again(guard)
    desk.take(forked, desk.plan(ask_job(), 3))
    assert desk.refused(forked.admit, plan, MODEL).code == "E-LEDGER-FORK"


def test_a_foreign_head_in_this_sites_name_is_refused(guard: Guard, desk: Any, ask_job: Any, sign_head: Any) -> None:
    plan = desk.plan(ask_job(), heads=(sign_head("st-mary", 99),))
    assert desk.refused(guard.admit, plan, MODEL).code == "E-LEDGER-HEAD"
    desk.take(guard, desk.plan(ask_job()))


def test_heads_of_other_sites_are_remembered_and_given_back(
    guard: Guard, desk: Any, ask_job: Any, sign_head: Any
) -> None:
    heads = (sign_head("charite", 7), sign_head("mercy", 3))
    assert desk.take(guard, desk.plan(ask_job(), heads=heads)).header.witnessed == heads
    older = (sign_head("charite", 2),)
    assert desk.take(again(guard), desk.plan(ask_job(), 2, heads=older)).header.witnessed == heads[:1]


def test_a_policy_that_was_tightened_holds_from_the_next_plan_on(
    guard: Guard, desk: Any, ask_job: Any, make_policy: Any
) -> None:
    desk.take(guard, desk.plan(ask_job()))
    change(guard, make_policy(budget={"epsilon_total": 1.0, "epsilon_per_run": 0.9}))
    error = desk.refused(desk.reserve, guard, desk.plan(ask_job(), 2))
    assert error.param == "budget.epsilon_per_run"
    assert "policy.change" in desk.actions(guard.home)


def test_a_swapped_data_file_is_logged_and_opens_no_new_budget_and_its_jobs_wait_to_be_approved_again(
    guard: Guard, desk: Any, ask_job: Any, notes: Path
) -> None:
    job = ask_job()
    desk.take(guard, desk.plan(job))
    before = spent(guard)
    notes.write_text('{"prompt": "other", "completion": " x", "patient": "p1"}\n')
    for _ in range(2):
        error = desk.refused(guard.admit, desk.plan(job, 2), MODEL)
        assert error.code == "E-APPROVAL" and error.message.endswith("waits for approval"), "outsiders learn no more"
    assert desk.actions(guard.home)[-1] == "data.change"
    assert guard.home.jobs.standings()[job.sha256()] == Standing("waiting", outdated=True)
    guard.home.jobs.approve(job, by="admin")
    guard.admit(desk.plan(job, 2), MODEL)
    assert spent(guard) == before


def test_another_data_sets_new_file_and_a_denial_are_left_as_they_are(guard: Guard, desk: Any, ask_job: Any) -> None:
    job, jobs = ask_job(), guard.home.jobs
    guard.home.ledger.append("data.change", dataset="letters", digest="0" * 64)
    assert jobs.standings()[job.sha256()].state == "approved"
    jobs.deny(job.sha256(), "withdrawn")
    guard.home.ledger.append("data.change", dataset="notes", digest="0" * 64)
    assert jobs.standings()[job.sha256()] == Standing("denied")


def test_what_the_policy_approves_by_itself_outlives_a_new_file(guard: Guard, desk: Any, ask_job: Any) -> None:
    job, jobs = ask_job(), guard.home.jobs
    jobs.approve(job, by="policy")
    guard.home.ledger.append("data.change", dataset="notes", digest="0" * 64)
    assert jobs.standings()[job.sha256()].state == "approved"


def test_a_data_file_swapped_for_that_of_another_data_set_is_refused_in_private(
    guard: Guard, desk: Any, ask_job: Any, make_policy: Any, notes: Path, tmp_path: Path
) -> None:
    letters = tmp_path / "letters.jsonl"
    letters.write_text('{"prompt": "other", "completion": " x", "patient": "p1"}\n')
    policy = make_policy()
    other = policy.dataset[0].model_copy(update={"id": "letters", "path": str(letters)})
    change(guard, policy.model_copy(update={"dataset": (*policy.dataset, other)}))
    guard.admit(desk.plan(ask_job()), MODEL)
    shutil.copy(letters, notes)
    error = desk.refused(guard.admit, desk.plan(ask_job()), MODEL)
    assert error.code == "E-SITE-DATA"
    assert "letters" not in error.message
    assert "`letters`" in guard.home.jobs.own_lines()[0]["text"]


def own_reasons(guard: Guard) -> list[str]:
    return [line["rule"] for line in SiteHome.open(guard.home.path).jobs.own_lines()]


def test_what_is_wrong_with_records_stays_here(guard: Guard, desk: Any, ask_job: Any, notes: Path) -> None:
    plan = desk.plan(ask_job())
    dataset = guard.admit(plan, MODEL)

    def bad_rows() -> None:
        with guard.data_errors(plan):
            raise DataError("E-UNIT", "record 17 has nothing in the unit column `patient`", param="data.unit")

    faults = [
        desk.refused(lambda: guard.check_records(plan, dataset, rows=0, units=0)),
        desk.refused(lambda: guard.check_records(plan, dataset, rows=10**6, units=10**6)),
        desk.refused(bad_rows),
    ]
    notes.unlink()
    faults.append(desk.refused(guard.admit, plan, MODEL))
    told = {(error.code, error.exit_code, error.message, error.param) for error in faults}
    assert told == {("E-SITE-DATA", 6, "st-mary: the site's own check of its records failed; its log says why", None)}
    assert own_reasons(guard) == ["require.min_records", "require.delta", "data.unit", "dataset.path"]
    refusals = [e.fields for e in guard.home.ledger.entries if e.action == "job.refused"]
    assert [(fields["rule"], fields["text"]) for fields in refusals] == [
        ("records", "a check of the site's own records")
    ], "others may get to see the ledger"


def test_a_check_of_records_that_fails_again_and_again_is_logged_once(guard: Guard, desk: Any, ask_job: Any) -> None:
    plan = desk.plan(ask_job())
    dataset = guard.admit(plan, MODEL)
    for _ in range(20):
        desk.refused(lambda: guard.check_records(plan, dataset, rows=0, units=0))
    assert own_reasons(guard) == ["require.min_records"]


def test_min_records_is_a_floor_and_its_number_is_in_the_own_log_only(make_home: Any, desk: Any, ask_job: Any) -> None:
    guard, plan = Guard(make_home(require={"min_records": 200})), desk.plan(ask_job())
    guard.home.jobs.approve(plan.job, by="admin")
    dataset = guard.admit(plan, MODEL)
    guard.check_records(plan, dataset, rows=200, units=50)
    error = desk.refused(lambda: guard.check_records(plan, dataset, rows=199, units=50))
    assert "200" not in error.message
    text = guard.home.jobs.own_lines()[0]["text"]
    assert "fewer than 200" in text
    assert "199" not in text


def test_errors_of_the_disk_are_no_secret_of_the_records(guard: Guard, desk: Any, ask_job: Any) -> None:
    def failing() -> None:
        with guard.data_errors(desk.plan(ask_job())):
            raise StorageError("E-STORAGE", "disk full")

    assert desk.refused(failing).code == "E-STORAGE"


def test_a_disk_that_fills_up_refuses_before_anything_is_trained(
    mount_disk: Callable[[int], Path], make_policy: Any, desk: Any, ask_job: Any
) -> None:
    disk = mount_disk(256)
    guard, plan = Guard(SiteHome.create(disk / "home", make_policy())), desk.plan(ask_job())
    guard.home.jobs.approve(plan.job, by="admin")
    dataset = guard.admit(plan, MODEL)
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            pass
    error = desk.refused(guard.reserve, plan, dataset, desk.event(plan.job))
    assert (error.code, error.exit_code) == ("E-LEDGER-STORAGE", 1)
    (disk / "ballast").unlink()
    desk.take(again(guard), plan)


def test_a_disk_that_became_read_only_refuses_before_anything_is_trained(
    mount_disk: Callable[[int], Path], make_policy: Any, desk: Any, ask_job: Any
) -> None:
    disk = mount_disk(1024)
    guard, plan = Guard(SiteHome.create(disk / "home", make_policy())), desk.plan(ask_job())
    guard.home.jobs.approve(plan.job, by="admin")
    dataset = guard.admit(plan, MODEL)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    error = desk.refused(guard.reserve, plan, dataset, desk.event(plan.job))
    assert isinstance(error, StorageError)
    assert desk.refused(guard.admit, plan, MODEL).code == "E-LEDGER-STORAGE"


@pytest.mark.parametrize("privacy", [{"level": "none"}, {"noise": "test"}, {}], ids=str)
def test_a_simulated_site_takes_its_job_whatever_real_sites_would_say_and_no_other(
    privacy: dict[str, Any], tmp_path: Path, desk: Any, ask_job: Any
) -> None:
    job = ask_job(privacy=privacy)
    guard = Guard(SiteHome.simulated(tmp_path / "site", "st-mary", job, MODEL))
    for number in (1, 2, 3):
        desk.take(guard, desk.plan(job, number))
    error = desk.refused(guard.admit, desk.plan(ask_job(privacy=privacy, run={"seed": 4}), run_id="run-2"), MODEL)
    assert error.code == "E-APPROVAL"
