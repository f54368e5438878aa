"""Before the first round: only a standing that the site itself signed for this job counts, and no names a rule."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tests.server.answers import key_of
from tests.server.grids import standing_of

from cotune.server.approval import Approval
from cotune.server.trust import Trust
from cotune.shared.bundle import bundle_sha256
from cotune.shared.errors import CotuneError, RefusedError, RunFailed, TimedOut
from cotune.shared.planning import resolve
from cotune.shared.proposal import JobStanding, Proposal
from cotune.shared.runs import RunFolder, create_run
from cotune.shared.signing import public_key_line, sign
from cotune.shared.update import SiteFailure

SITES = ("site-1", "site-2", "site-3")
Answerer = Callable[[Proposal], JobStanding | SiteFailure]
TRUST = Trust("signature", lambda site: public_key_line(key_of(site).public_key()))


class Shown:
    """Sites that are shown a job; each says what it says, call by call."""

    def __init__(self, **answers: Answerer) -> None:
        self._answers = {name.replace("_", "-"): answer for name, answer in answers.items()}
        self.asked: list[str] = []

    def propose(self, proposals: Sequence[Proposal], seconds: float) -> Iterator[JobStanding | SiteFailure]:
        assert seconds >= 0
        for proposal in proposals:
            self.asked.append(proposal.site)
            yield self._answers.get(proposal.site, yes)(proposal)

    def admit(self, sites: object) -> None:
        raise AssertionError(sites)


def yes(proposal: Proposal) -> JobStanding:
    return standing_of(proposal)


def refuses(proposal: Proposal) -> JobStanding:
    return standing_of(proposal, "refused", rule="allow.models", text="the base model is not on the list")


def after(calls: int, then: Answerer = yes) -> Answerer:
    left = calls

    def answer(proposal: Proposal) -> JobStanding | SiteFailure:
        nonlocal left
        left -= 1
        return then(proposal) if left < 0 else standing_of(proposal, "waiting")

    return answer


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotune.server.approval.PAUSE_S", 0.0)


@pytest.fixture
def start(make_job, tmp_path: Path):
    """A run and its approval, made anew at each call; a second call with the run is a second process."""

    def make(run: RunFolder | None = None, **federation: object) -> tuple[RunFolder, Approval]:
        if run is None:
            job = make_job(
                data={
                    "train": None,
                    "sites": dict.fromkeys(SITES, "site:"),
                    "dataset": "notes",
                    "records_per_site": 30,
                },
                federation={"min_sites": 2, **federation},
            )
            run = create_run(tmp_path / "runs", resolve(job), b"")
        proposals = {
            site: Proposal(run_id=run.run_id, cotune="0", job=run.job(), site=site, bundle_sha256=bundle_sha256())
            for site in SITES
        }
        return run, Approval(run, proposals, TRUST)

    return make


def said(run: RunFolder) -> list[str]:
    return [event["message"] for event in run.events() if event["type"] == "approval"]


def test_all_say_yes_and_take_part(start) -> None:
    run, approval = start()
    assert approval.obtain(Shown()) == list(SITES)
    assert said(run)[-1] == "3 sites take part: site-1, site-2, site-3"


def test_a_site_that_waits_for_its_administrator_is_asked_until_he_says_yes(start) -> None:
    run, approval = start()
    sites = Shown(site_2=after(4))
    assert approval.obtain(sites) == list(SITES)
    assert sites.asked.count("site-1") == 1, "who has approved is not asked again"
    assert sites.asked.count("site-2") == 5
    assert said(run).count("site-2: waiting") == 1, "each thing is said once"


def test_a_no_is_said_with_its_rule_and_the_others_go_on_without_it(start) -> None:
    run, approval = start()
    assert approval.obtain(Shown(site_3=refuses)) == ["site-1", "site-2"]
    assert "site-3: refused by rule allow.models: the base model is not on the list" in said(run)


@pytest.mark.parametrize("no", [refuses, lambda proposal: standing_of(proposal, "denied")])
def test_too_many_nos_end_the_run_with_the_exit_code_of_a_refusal(start, no: Answerer) -> None:
    run, approval = start()
    with pytest.raises(RefusedError) as caught:
        approval.obtain(Shown(site_2=no, site_3=no))
    assert (caught.value.code, caught.value.exit_code) == ("E-NOT-APPROVED", 6)
    assert "site-2" in caught.value.message and run.run_id in str(caught.value.hint)


def test_time_runs_out_for_too_few(start) -> None:
    _, approval = start(approval_timeout_s=0.05)
    with pytest.raises(TimedOut) as caught:
        approval.obtain(Shown(site_2=after(10**6), site_3=after(10**6)))
    assert (caught.value.code, caught.value.exit_code) == ("E-APPROVAL-TIMEOUT", 3)
    assert "site-2, site-3" in caught.value.message


def test_when_time_runs_out_enough_go_on_without_who_waits(start) -> None:
    _, approval = start(approval_timeout_s=0.05)
    assert approval.obtain(Shown(site_2=after(10**6))) == ["site-1", "site-3"]


def test_time_runs_on_over_restarts_and_begins_anew_when_the_run_is_resumed(start) -> None:
    run, _ = start(approval_timeout_s=0.5, min_sites=3)
    run.set_state("awaiting_approval", 0)
    time.sleep(0.6)
    run.set_state("queued", 0)  # the process that waited died
    run.set_state("awaiting_approval", 0)
    _, restarted = start(run)
    with pytest.raises(TimedOut):
        restarted.obtain(Shown(site_3=after(10)))
    run.set_state("paused", 0)
    run.set_state("queued", 0)
    run.set_state("awaiting_approval", 0)
    _, resumed = start(run)
    assert resumed.obtain(Shown(site_3=after(10))) == list(SITES)


def forged(proposal: Proposal) -> JobStanding:
    standing = standing_of(proposal)
    return standing.model_copy(update={"signature": sign(key_of("a stranger"), "cotune-standing", standing.message())})


FORGERIES: dict[str, Answerer] = {
    "another key": forged,
    "no signature": lambda p: standing_of(p).model_copy(update={"signature": ""}),
    "another job": lambda p: standing_of(p, job_sha256="0" * 64),
    "another run": lambda p: standing_of(p, run_id="another"),
    "another purpose": lambda p: standing_of(p).model_copy(
        update={"signature": sign(key_of(p.site), "cotune-update", standing_of(p).message())}
    ),
    "edited": lambda p: standing_of(p, "waiting").model_copy(update={"state": "approved"}),
}


@pytest.mark.parametrize("how", FORGERIES)
def test_a_forged_yes_is_no_yes(start, how: str) -> None:
    run, approval = start(min_sites=3, approval_timeout_s=0.05)
    with pytest.raises(TimedOut):
        approval.obtain(Shown(site_3=FORGERIES[how]))
    assert any("not signed by its own key" in message for message in said(run))


def test_a_site_without_a_key_here_cannot_say_yes(start) -> None:
    run, _ = start(min_sites=3, approval_timeout_s=0.05)
    proposals = {
        site: Proposal(run_id=run.run_id, cotune="0", job=run.job(), site=site, bundle_sha256=bundle_sha256())
        for site in SITES
    }
    with pytest.raises(TimedOut):
        Approval(run, proposals, Trust(None)).obtain(Shown())


def test_what_was_approved_is_not_asked_again_by_the_next_process_and_a_no_is(start) -> None:
    run, approval = start()
    approval.obtain(Shown(site_3=refuses))
    _, again = start(run)
    sites = Shown()
    assert again.obtain(sites) == list(SITES)
    assert sites.asked == ["site-3"]


def test_an_approval_that_was_edited_on_disk_is_asked_for_again(start) -> None:
    run, approval = start()
    approval.obtain(Shown(site_3=refuses))
    path = run.privacy / "approvals.json"
    path.write_text(path.read_text().replace('"refused"', '"approved"'))
    _, again = start(run)
    sites = Shown(site_3=refuses)
    assert again.obtain(sites) == ["site-1", "site-2"]
    assert sites.asked == ["site-3"]
    path.write_text("{")
    with pytest.raises(CotuneError) as caught:
        start(run)
    assert caught.value.code == "E-APPROVALS"


def test_a_site_of_another_version_says_no_by_its_failure_and_one_whose_agent_is_away_is_waited_for(start) -> None:
    run, approval = start(approval_timeout_s=0.05, min_sites=1)
    other = lambda p: SiteFailure(site=p.site, code="E-VERSION", message="of cotune 9", exit_code=6)  # noqa: E731
    away = lambda p: SiteFailure(site=p.site, code="E-AGENT-AWAY", message="no agent", exit_code=2)  # noqa: E731
    assert approval.obtain(Shown(site_1=other, site_2=away)) == ["site-3"]
    _, again = start(run)
    with pytest.raises(RefusedError):
        start(min_sites=3)[1].obtain(Shown(site_1=other, site_2=away))
    assert again.obtain(Shown(site_2=away)) == ["site-1", "site-3"]
    assert {"site-1: of cotune 9 (E-VERSION)", "site-2: no agent (E-AGENT-AWAY)"} <= set(said(run))


def test_a_run_that_is_asked_to_stop_stops_waiting(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotune.server.approval.PAUSE_S", 5.0)
    run, approval = start()

    def stops(proposal: Proposal) -> JobStanding:
        run.ask_to_stop()
        return standing_of(proposal, "waiting")

    with pytest.raises(RunFailed) as caught:
        approval.obtain(Shown(site_1=stops))
    assert caught.value.code == "E-STOPPED"
