"""Where a proposed job stands before any round: said by rules alone, signed, and no promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cotune.client import decisions
from cotune.client.considering import consider
from cotune.client.guard import Guard
from cotune.client.home import SiteHome
from cotune.shared.bundle import bundle_sha256
from cotune.shared.job import Job
from cotune.shared.keyfile import SigningKey
from cotune.shared.proposal import JobStanding, Proposal
from cotune.shared.signing import verify


def ask(home: SiteHome, job: Job, **changes: Any) -> JobStanding:
    """A proposal's standing, whose signature holds."""
    said = {"run_id": "run-1", "job": job, "site": "st-mary", "bundle_sha256": bundle_sha256(), **changes}
    standing = consider(home, Proposal(**said))
    assert verify(home.ledger.head.public_key, "cotune-standing", standing.message(), standing.signature)
    assert (standing.site, standing.run_id, standing.job_sha256) == ("st-mary", said["run_id"], job.sha256())
    return standing


def test_a_job_waits_until_the_site_decides(make_home: Any, ask_job: Any) -> None:
    home, job = make_home(), ask_job()
    assert ask(home, job).state == "waiting"
    assert home.jobs.job(home.jobs.find(job.sha256()[:12])) == job, "kept, so that it can be looked at"
    home.jobs.approve(job, by="admin")
    assert ask(home, job).state == "approved"
    home.jobs.deny(job.sha256(), "a reason that is the site's own")
    standing = ask(home, job)
    assert (standing.state, standing.rule, standing.text) == ("denied", None, None)


def test_a_rule_refuses_by_name_also_what_was_approved(make_home: Any, ask_job: Any) -> None:
    home, job = make_home(require={"min_sites": 3}), ask_job()
    for _ in range(2):
        standing = ask(home, job)
        assert (standing.state, standing.rule) == ("refused", "require.min_sites")
        assert "below 3" in str(standing.text)
        home.jobs.approve(job, by="admin")


@pytest.mark.parametrize(
    ("sections", "rule"),
    [
        ({"data": {"dataset": "other"}}, "data.dataset"),
        ({"privacy": {"noise": "test"}}, "noise.test"),
        ({"run": {"rounds": 3000}, "privacy": {"noise_multiplier": 0.8}}, "budget.epsilon_per_run"),
    ],
)
def test_every_kind_of_rule_is_asked(make_home: Any, ask_job: Any, sections: dict[str, Any], rule: str) -> None:
    standing = ask(make_home(), ask_job(**sections))
    assert (standing.state, standing.rule) == ("refused", rule)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [({"cotune": "0.0.1"}, "cotune"), ({"bundle_sha256": "0" * 64}, "bundle"), ({"site": "charite"}, "site")],
)
def test_what_is_of_another_version_or_for_another_site_is_kept_nowhere(
    make_home: Any, ask_job: Any, changes: dict[str, str], rule: str
) -> None:
    home = make_home()
    before = home.ledger.head
    standing = ask(home, ask_job(), **changes)
    assert (standing.state, standing.rule) == ("refused", rule)
    assert home.ledger.head == before
    assert not list((home.path / "jobs").iterdir())


def test_a_listed_signers_job_may_start_unseen_and_no_other(make_home: Any, ask_job: Any, tmp_path: Path) -> None:
    signer, job = SigningKey.create(tmp_path / "signer.key"), ask_job()
    home = make_home(allow={"signers": [signer.public]}, approve={"mode": "auto-within-policy"})
    assert ask(home, job).rule == "allow.signers"
    assert ask(home, job, signature=signer.sign("cotune-job", b"another job")).rule == "allow.signers"
    assert ask(home, job, signature=signer.sign("cotune-job", job.sha256().encode())).state == "approved"


def test_a_run_that_goes_on_is_not_asked_for_its_whole_price_again(guard: Guard, ask_job: Any, desk: Any) -> None:
    job = ask_job()
    desk.take(guard, desk.plan(job, 1))
    policy = guard.home.path / "policy.toml"
    text = policy.read_text()
    policy.write_text(text.replace("epsilon_per_run = 2.0", "epsilon_per_run = 0.1"))
    assert policy.read_text() != text
    assert ask(guard.home, job).state == "approved"
    assert ask(guard.home, job, run_id="run-2").rule == "budget.epsilon_per_run"


def test_a_flood_of_proposals_is_refused_and_fills_nothing(
    make_home: Any, ask_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decisions, "MAX_UNDECIDED", 2)
    home = make_home()
    standings = [ask(home, ask_job(run={"seed": seed})) for seed in range(4)]
    assert [each.state for each in standings] == ["waiting", "waiting", "refused", "refused"]
    assert standings[-1].rule == "approve.mode"
    assert len(list((home.path / "jobs").glob("*.json"))) == 2


def test_no_record_and_no_model_is_looked_at(make_home: Any, ask_job: Any, notes: Path) -> None:
    home = make_home()
    notes.unlink()
    assert ask(home, ask_job(model={"base": "owner/no-such-model"})).state == "waiting"
