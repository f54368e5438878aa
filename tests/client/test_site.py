"""The one door: what a site refuses before it looks at a record, and all that it lets out."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.client.sites import PRIVATE, Records, as_sent, numbers, plan_of, site_of, start, trainer_of

from cotune.client.guard import Guard
from cotune.client.home import SiteHome
from cotune.client.site import Site
from cotune.shared.errors import CotuneError
from cotune.shared.job import Job
from cotune.shared.methods import read, write
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.update import AdapterUpdate, payload_sha256


def train(job: Job, records: Records | None = None, work: Path | None = None, **changes: Any) -> AdapterUpdate:
    trainer = trainer_of(job)
    adapter = start(trainer)
    plan = plan_of(job, adapter, trainer, **changes)
    return site_of(job, records, work).train(plan, as_sent(adapter), trainer, lambda _step: None)


@pytest.mark.parametrize(
    "changes",
    [
        {"cotune": "0.0.1"},
        {"site": "site-2"},
        {"base_sha256": "0" * 64},
        {"frozen_sha256": "0" * 64},
        {"round": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_plan_that_does_not_hold_together_is_refused_before_any_record_is_read(
    make_job: Any, changes: dict[str, Any]
) -> None:
    records = Records()
    with pytest.raises(CotuneError) as caught:
        train(make_job(privacy=PRIVATE), records, **changes)
    assert (caught.value.code, caught.value.exit_code) == ("E-PLAN", 6)
    assert not records.asked


@pytest.mark.parametrize(
    ("privacy", "code"),
    [
        ({"epsilon": 1.0, "noise_multiplier": 0.8, "delta": 1e-3}, "E-BUDGET"),
        ({"epsilon": 3.0, "noise_multiplier": 2.0}, "E-POLICY"),
        ({"epsilon": 3.0, "delta": 1e-3}, "E-POLICY"),
        ({"epsilon": 3.0, "noise_multiplier": 2.0, "delta": 1.0}, "E-APPROVAL"),
        ({"epsilon": 3.0, "noise_multiplier": 2.0, "delta": 0.0}, "E-APPROVAL"),
        ({"epsilon": 3.0, "noise_multiplier": 0.0, "delta": 1e-3}, "E-POLICY"),
        ({"epsilon": 3.0, "noise_multiplier": -2.0, "delta": 1e-3}, "E-POLICY"),
    ],
    ids=str,
)
def test_a_job_that_costs_more_than_it_promises_is_refused_before_any_record_is_read(
    make_job: Any, privacy: dict[str, float], code: str
) -> None:
    records = Records()
    with pytest.raises(CotuneError) as caught:
        train(make_job(privacy=privacy), records)
    assert caught.value.code == code
    assert not records.asked


def test_the_budget_counts_all_rounds_not_the_one_that_is_asked(make_job: Any) -> None:
    job = make_job(privacy=PRIVATE)
    assert numbers(train(job)).any()
    records = Records()
    with pytest.raises(CotuneError) as caught:
        train(job.replace(run={"rounds": 200}), records)
    assert caught.value.code == "E-BUDGET"
    assert not records.asked


def test_an_adapter_of_another_size_is_refused_before_any_record_is_read(make_job: Any) -> None:
    job = make_job(privacy=PRIVATE)
    trainer, records = trainer_of(job), Records()
    adapter = np.zeros(trainer.layout.size + 1, dtype=np.float32)
    with pytest.raises(CotuneError):
        site_of(job, records).train(plan_of(job, adapter, trainer), as_sent(adapter), trainer, lambda _step: None)
    assert not records.asked


def test_a_trainer_made_for_another_job_is_refused_or_takes_no_more_steps_than_are_accounted(
    make_job: Any,
) -> None:
    """The header accounts the plan's job; a trainer that takes its own job's steps would spend more."""
    job = make_job(privacy=PRIVATE, train={"local_steps": 1})
    trainer = trainer_of(job.replace(train={"local_steps": 5}))
    adapter, steps = start(trainer), []
    try:
        update = site_of(job).train(plan_of(job, adapter, trainer), as_sent(adapter), trainer, steps.append)
    except CotuneError:
        return
    assert len(steps) == update.header.event["steps"]


def test_a_delta_that_lets_one_of_this_sites_records_leak_whole_is_refused_untrained(make_job: Any) -> None:
    job, steps = make_job(privacy={"epsilon": 3.0, "noise_multiplier": 2.0, "delta": 0.03}), []
    trainer = trainer_of(job)
    adapter = start(trainer)
    with pytest.raises(CotuneError) as caught:
        site_of(job, Records(34)).train(plan_of(job, adapter, trainer), as_sent(adapter), trainer, steps.append)
    assert (caught.value.code, caught.value.exit_code) == ("E-SITE-DATA", 6)
    assert "34" not in caught.value.message, "the number of records is not public"
    assert steps == []
    assert numbers(train(job, Records(33))).any()


def test_a_site_without_records_is_an_error_and_no_update(make_job: Any) -> None:
    for privacy in (PRIVATE, {"level": "none"}):
        with pytest.raises(CotuneError) as caught:
            train(make_job(privacy=privacy), Records(0))
        assert caught.value.code == "E-SITE-DATA"


def test_what_leaves_is_the_noised_update_and_public_facts_alone(make_job: Any) -> None:
    job = make_job(privacy=PRIVATE)
    update = train(job)
    header = update.header.model_dump()
    named = {"site", "run_id", "round", "job_sha256", "base_sha256", "update_sha256", "event", "head", "witnessed"}
    assert {name for name, value in header.items() if value is not None} == {*named, "charges", "signature"}
    assert set(vars(update)) == {"header", "payload"}
    assert (header["site"], header["run_id"], header["round"]) == ("site-1", "run-1", 1)
    assert (header["job_sha256"], header["charges"]) == (job.sha256(), 1)
    assert header["update_sha256"] == payload_sha256(update.payload)
    assert update.payload.shape == (4 * trainer_of(job).layout.size,), "a number more would be a release more"


@pytest.mark.parametrize("privacy", [PRIVATE, {"level": "none"}], ids=["dp", "none"])
def test_the_event_is_that_of_the_mechanism_over_the_rounds_steps(make_job: Any, privacy: Any) -> None:
    job = make_job(privacy=privacy, train={"local_steps": 3})
    event = train(job).header.event
    assert event == mechanism_of(job).event(3).to_dict()
    assert event["kind"] == ("non-private" if privacy != PRIVATE else "dp-sgd")


def test_the_header_is_the_same_whatever_the_records_are(make_job: Any) -> None:
    job = make_job(privacy=PRIVATE)
    headers = [train(job, Records(count)).header.model_dump() for count in (1, 20)]
    for header in headers:
        del header["update_sha256"], header["signature"]
        assert header.pop("head")["seq"] == headers[0].get("head", {"seq": 4})["seq"]
    assert headers[0] == headers[1]


def test_the_update_is_the_new_adapter_minus_the_one_that_came(make_job: Any) -> None:
    job = make_job(privacy={"level": "none"})
    trainer = trainer_of(job)
    adapter = start(trainer)
    update = site_of(job).train(plan_of(job, adapter, trainer), as_sent(adapter), trainer, lambda _step: None)
    after = trainer.layout.flatten(read(trainer.network.adapted))
    np.testing.assert_array_equal(numbers(update), after - adapter)
    assert np.linalg.norm(numbers(update)) > 0


def test_nothing_of_who_used_the_network_before_reaches_the_update(make_job: Any) -> None:
    job = make_job(privacy={**PRIVATE, "noise": "test"})
    clean, used = trainer_of(job), trainer_of(job)
    random = np.random.default_rng(9)
    write(
        used.network.adapted,
        {n: random.normal(size=a.shape).astype(np.float32) for n, a in read(used.network.adapted).items()},
    )
    adapter = start(clean)
    updates = [
        site_of(job).train(plan_of(job, adapter, t), as_sent(adapter), t, lambda _step: None) for t in (clean, used)
    ]
    np.testing.assert_array_equal(updates[0].payload, updates[1].payload)


def test_secret_noise_is_never_the_same_twice(make_job: Any) -> None:
    job = make_job(privacy=PRIVATE)
    first, second = numbers(train(job)), numbers(train(job))
    assert not np.array_equal(first, second)


def test_test_noise_is_the_same_for_the_same_plan_and_differs_by_round_and_site(make_job: Any) -> None:
    job = make_job(privacy={**PRIVATE, "noise": "test"})
    first, again, later = numbers(train(job)), numbers(train(job)), numbers(train(job, round=2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, later)
    trainer = trainer_of(job)
    adapter = start(trainer)
    elsewhere = site_of(job, name="site-2").train(
        plan_of(job, adapter, trainer, site="site-2"), as_sent(adapter), trainer, lambda _step: None
    )
    assert not np.array_equal(first, numbers(elsewhere))


def test_what_is_kept_between_rounds_is_readable_by_the_site_alone(make_job: Any, tmp_path: Path) -> None:
    job = make_job(privacy={**PRIVATE, "noise": "test"})
    kept = train(job, work=tmp_path / "work" / "site-1").payload
    np.testing.assert_array_equal(kept, train(job).payload)
    np.testing.assert_array_equal(kept, train(job, work=tmp_path / "work" / "site-1").payload)
    mode = stat.S_IMODE((tmp_path / "work" / "site-1").stat().st_mode)
    assert mode == 0o700


def test_a_site_does_not_show_its_data(make_job: Any) -> None:
    assert "Records" not in repr(site_of(make_job(privacy=PRIVATE)))


def test_the_charge_is_in_the_ledger_before_a_record_is_drawn_and_the_update_after(make_job: Any) -> None:
    job = make_job(privacy=PRIVATE)
    trainer = trainer_of(job)
    adapter, site = start(trainer), site_of(job)
    seen: list[list[str]] = []
    update = site.train(
        plan_of(job, adapter, trainer), as_sent(adapter), trainer,
        lambda _step: seen.append([entry.action for entry in site.guard.home.ledger.entries]),
    )  # fmt: skip
    assert all(actions[-1] == "budget.reserve" for actions in seen)
    reserve, commit = site.guard.home.ledger.entries[-2:]
    assert (reserve.action, commit.action) == ("budget.reserve", "budget.commit")
    assert reserve.fields["event"] == update.header.event
    assert commit.fields["update_sha256"] == update.header.update_sha256
    assert update.header.head == site.guard.home.ledger.head


def test_a_round_that_is_asked_for_again_gives_the_same_bytes_and_costs_nothing(make_job: Any) -> None:
    job = make_job(privacy=PRIVATE)
    trainer, records = trainer_of(job), Records()
    adapter, site = start(trainer), site_of(job, records)
    plan = plan_of(job, adapter, trainer)
    first = site.train(plan, as_sent(adapter), trainer, lambda _step: None)
    records.asked = False
    spent = len(site.guard.home.ledger.entries)
    again = Site(Guard(SiteHome.open(site.guard.home.path)), records, None).train(
        plan, as_sent(adapter), trainer, print
    )
    assert again.payload.tobytes() == first.payload.tobytes()
    assert again.header == first.header
    assert not records.asked
    assert len(SiteHome.open(site.guard.home.path).ledger.entries) == spent
    other = adapter + 1
    with pytest.raises(CotuneError) as caught:
        site.train(plan_of(job, other, trainer), as_sent(other), trainer, print)
    assert (caught.value.code, caught.value.exit_code) == ("E-ROUND-BASE", 6)


def test_training_that_died_stays_charged_and_is_charged_again_once(make_job: Any) -> None:
    job = make_job(privacy={**PRIVATE, "epsilon": 6.0})
    trainer = trainer_of(job)
    adapter, site = start(trainer), site_of(job)
    plan = plan_of(job, adapter, trainer)

    def die(_step: int) -> None:
        raise MemoryError

    for _ in range(2):
        with pytest.raises(MemoryError):
            site.train(plan, as_sent(adapter), trainer, die)
    with pytest.raises(CotuneError) as caught:
        site.train(plan, as_sent(adapter), trainer, print)
    assert caught.value.code == "E-ROUND-LOST"
    actions = [entry.action for entry in SiteHome.open(site.guard.home.path).ledger.entries]
    assert actions.count("budget.reserve") == 2
    assert "budget.commit" not in actions


def test_a_ledger_set_back_to_an_older_copy_refuses_to_train(make_job: Any) -> None:
    """Both files of an old backup fit each other; only the head that others hold tells."""
    job = make_job(privacy=PRIVATE)
    trainer, records = trainer_of(job), Records()
    adapter, site = start(trainer), site_of(job, records)
    path = site.guard.home.path
    old = {name: (path / name).read_bytes() for name in ("ledger.jsonl", "head.json")}
    update = site.train(plan_of(job, adapter, trainer), as_sent(adapter), trainer, lambda _step: None)
    for name, content in old.items():
        (path / name).write_bytes(content)
    records.asked = False
    restored = Site(Guard(SiteHome.open(path)), records, None)
    with pytest.raises(CotuneError) as caught:
        plan = plan_of(job, adapter, trainer, round=2, heads=(update.header.head,))
        restored.train(plan, as_sent(adapter), trainer, lambda _step: None)
    assert caught.value.code == "E-LEDGER-BEHIND"
    assert not records.asked


def test_noised_metrics_and_the_moving_norm_leave_only_when_asked_for(make_job: Any) -> None:
    plain = train(make_job(privacy=PRIVATE)).header
    assert (plain.train_loss, plain.clipping_norm) == (None, None)
    asked = make_job(privacy={**PRIVATE, "metrics": "noised", "clipping": "adaptive"})
    header = train(asked).header
    assert header.train_loss is not None
    assert header.clipping_norm not in (None, asked.privacy.clipping_norm)
    assert header.event == plain.event


@pytest.mark.parametrize("batch", [1, 21])
def test_what_lower_layers_make_of_records_is_kept_for_all_of_them_if_the_run_will_draw_nearly_all(
    make_job: Any, tmp_path: Path, batch: int
) -> None:
    job = make_job(train={"batch_size": batch, "local_steps": 1}, privacy={"level": "none"})
    site = site_of(job)
    examples = Records().load(job, site.name, site.guard.home.policy.dataset[0]).examples
    train(job, work=tmp_path / "work")
    kept, every = len(list((tmp_path / "work").iterdir())), len({example.ids for example in examples})
    assert kept == every if batch == 21 else kept < every
