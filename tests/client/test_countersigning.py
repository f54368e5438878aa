"""A site signs a claim if its own ledger bears it out, and says by name why it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from tests.client.conftest import AskJob, Desk, MakeHome

from cotune.client.countersigning import MOST_CLAIMS, countersign
from cotune.client.home import SiteHome
from cotune.shared.chain import reserved
from cotune.shared.errors import CotuneError, RefusedError
from cotune.shared.job import Job
from cotune.shared.plan import ClaimRequest
from cotune.shared.privacy.claim import ClaimSubject, build_claim, claim_bytes, claim_id
from cotune.shared.privacy.event import Event
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.signing import verify

RUN = "run-1"
COORDINATOR = {"public_key": "ssh-ed25519 " + "A" * 68, "simulated": True}


@dataclass(frozen=True)
class Case:
    """A site that took two rounds of a run, and the honest claim of it."""

    home: SiteHome
    job: Job
    claim: dict[str, Any]

    def said(self, change: Callable[[dict[str, Any]], object] = lambda _claim: None, *, id_too: bool = True) -> str:
        """The claim's text after a change, with an id that fits it."""
        claim = json.loads(json.dumps(self.claim))
        change(claim)
        if id_too:
            claim["claim_id"] = claim_id(claim)
        return claim_bytes(claim).decode()

    def own(self, claim: dict[str, Any]) -> dict[str, Any]:
        return next(site for site in claim["sites"] if site["id"] == "st-mary")

    def signed(self, text: str | None = None, run_id: str = RUN, site: str = "st-mary") -> str:
        request = ClaimRequest(run_id=run_id, site=site, claim=self.said() if text is None else text)
        return countersign(self.home, request)

    def refused(self, text: str, run_id: str = RUN, site: str = "st-mary") -> CotuneError:
        before = (self.home.path / "ledger.jsonl").read_bytes()
        with pytest.raises(RefusedError) as caught:
            self.signed(text, run_id, site)
        assert (self.home.path / "ledger.jsonl").read_bytes() == before
        assert caught.value.message.startswith("st-mary: does not sign the claim: ")
        return caught.value


def claim_of(home: SiteHome, job: Job, run_id: str = RUN) -> dict[str, Any]:
    """The honest claim of a run that this site and a cheaper one took part in."""
    charged = reserved(home.ledger.entries, run_id=run_id)
    own = [{"round": entry.fields["round"], "event": entry.fields["event"]} for entry, _ in charged]
    heads = {home.name: home.ledger.head.model_dump()}
    subject = ClaimSubject(run_id, {}, None, heads, ("base", "c" * 64), COORDINATOR)
    return build_claim(job, {home.name: own, "charite": own[:1]}, subject)


def charge(home: SiteHome, job: Job, number: int, event: Event | None = None) -> None:
    home.ledger.reserve(
        dataset="notes", unit="column:patient", run_id=RUN, job_sha256=job.sha256(), round_number=number,
        event=event or mechanism_of(job).event(job.train.local_steps),
    )  # fmt: skip


@pytest.fixture
def case(make_home: MakeHome, ask_job: AskJob) -> Case:
    home, job = make_home(), ask_job()
    home.jobs.approve(job, by="admin")
    for number in (1, 2):
        charge(home, job, number)
    return Case(home, job, claim_of(home, job))


def test_what_is_signed_are_the_exact_bytes_and_the_ledger_says_so_once(case: Case, desk: Desk) -> None:
    signature = case.signed()
    assert signature == case.signed()
    key = case.home.ledger.head.public_key
    assert verify(key, "cotune-claim", case.said().encode(), signature)
    assert not verify(key, "cotune-claim", case.said().encode() + b" ", signature)
    assert not verify(key, "cotune-head", case.said().encode(), signature)
    assert desk.actions(case.home).count("claim.signed") == 1


def test_a_claim_that_names_an_earlier_head_of_this_ledger_is_signed(case: Case) -> None:
    case.home.jobs.deny("ab" * 32, "another study")
    assert case.signed()


REFUSALS: dict[str, tuple[str, Callable[[dict[str, Any], dict[str, Any]], object]]] = {
    "fewer steps": ("E-CLAIM-ENTRY", lambda _claim, own: own.update(steps=2)),
    "more steps": ("E-CLAIM-ENTRY", lambda _claim, own: own.update(steps=400)),
    "more noise": ("E-CLAIM-ENTRY", lambda _claim, own: own.update(noise_multiplier=9.0)),
    "less epsilon": ("E-CLAIM-ENTRY", lambda _claim, own: own.update(epsilon=own["epsilon"] / 2)),
    "no epsilon": ("E-CLAIM-ENTRY", lambda _claim, own: own.update(epsilon=None, delta=None)),
    "another delta": ("E-CLAIM-ENTRY", lambda _claim, own: own.update(delta=1e-9)),
    "another chance to be drawn": ("E-CLAIM-ENTRY", lambda _claim, own: own.update(sampling_probability=0.01)),
    "no entry": ("E-CLAIM-ENTRY", lambda claim, own: claim["sites"].remove(own)),
    "two entries": ("E-CLAIM-ENTRY", lambda claim, own: claim["sites"].append(own)),
    "no head": ("E-CLAIM-HEAD", lambda _claim, own: own.update(ledger_head=None)),
    "a line it never signed": ("E-CLAIM-HEAD", lambda _claim, own: own["ledger_head"].update(sha256="0" * 64)),
    "a later line": ("E-CLAIM-HEAD", lambda _claim, own: own["ledger_head"].update(seq=99)),
    "less in the guarantee": ("E-CLAIM-PROMISE", lambda claim, _own: claim["guarantee"].update(epsilon=0.01)),
    "delta of the guarantee": ("E-CLAIM-PROMISE", lambda claim, _own: claim["guarantee"].update(delta=1e-9)),
    "a bolder sentence": ("E-CLAIM-PROMISE", lambda claim, _own: claim.update(statement="Nothing can be learnt.")),
    "an adversary's epsilon": ("E-CLAIM-PROMISE", lambda claim, _own: claim["adversaries"][3].update(epsilon=0.1)),
    "unit": ("E-CLAIM-PROMISE", lambda claim, _own: claim["unit"].update(definition="one household")),
    "unprotected": ("E-CLAIM-PROMISE", lambda claim, _own: claim["unprotected"].pop()),
    "another job": ("E-CLAIM-RUN", lambda claim, _own: claim.update(job_sha256="d" * 64)),
    "another run": ("E-CLAIM-RUN", lambda claim, _own: claim.update(run_id="run-2")),
    "a part too many": ("E-CLAIM-FORM", lambda claim, _own: claim.update(certified=True)),
    "a part too few": ("E-CLAIM-FORM", lambda claim, _own: claim.pop("unit")),
    "another version": ("E-CLAIM-VERSION", lambda claim, _own: claim.update(schema="cotune/privacy-claim/7")),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_claim_that_says_something_else_than_its_ledger_is_refused_by_name(case: Case, name: str) -> None:
    code, change = REFUSALS[name]
    assert case.refused(case.said(lambda claim: change(claim, case.own(claim)))).code == code


def test_an_id_of_other_content_is_refused(case: Case) -> None:
    text = case.said(lambda claim: claim.update(created="2020-01-01T00:00:00+00:00"), id_too=False)
    assert case.refused(text).code == "E-CLAIM-ID"


def test_a_run_it_took_no_part_in_and_another_sites_name_are_refused(case: Case) -> None:
    other = case.said(lambda claim: claim.update(run_id="run-9"))
    assert case.refused(other, run_id="run-9").code == "E-CLAIM-RUN"
    assert case.refused(case.said(), site="charite").code == "E-CLAIM-RUN"


@pytest.mark.parametrize("text", ["", "{}", "[]", "x" * 100, "[" * 100_000, '{"schema": 1}'])
def test_bytes_that_are_no_claim_are_refused(case: Case, text: str) -> None:
    assert case.refused(text).code == "E-CLAIM-FORM"


def test_a_round_charged_after_the_claim_was_made_is_missing_in_it(case: Case) -> None:
    charge(case.home, case.job, 3)
    error = case.refused(case.said())
    assert error.code == "E-CLAIM-ENTRY"
    assert "steps is 4, by this site's ledger 6" in error.message


def test_the_guarantee_may_not_promise_less_than_this_site_released_alone(case: Case) -> None:
    """The entry is right, but the guarantee was made of the other site's events, with all words to match."""
    cheap = case.claim["sites"][0]["id"]
    assert cheap == "charite"
    entries = [{"round": 1, "event": mechanism_of(case.job).event(case.job.train.local_steps).to_dict()}]
    subject = ClaimSubject(RUN, {}, None, {}, ("base", "c" * 64), COORDINATOR)
    lesser = build_claim(case.job, {cheap: entries}, subject)
    parts = ("guarantee", "statement", "adversaries")
    text = case.said(lambda claim: claim.update({part: lesser[part] for part in parts}))
    assert case.refused(text).code == "E-CLAIM-PROMISE"


def test_so_many_claims_of_one_run_and_no_more(case: Case) -> None:
    for number in range(MOST_CLAIMS):
        assert case.signed(case.said(lambda claim, n=number: claim["software"].update(cotune=f"0.{n}")))
    error = case.refused(case.said(lambda claim: claim["software"].update(cotune="1.0")))
    assert error.code == "E-CLAIM-MANY"
    assert case.signed(case.said(lambda claim: claim["software"].update(cotune="0.3")))


def test_a_run_that_promises_nothing_is_signed_as_one(make_home: MakeHome, ask_job: AskJob) -> None:
    home, job = make_home(), ask_job(privacy={"noise": "test"})
    home.jobs.approve(job, by="admin")
    charge(home, job, 1)
    claim = claim_of(home, job)
    assert claim["guarantee"] is None
    case = Case(home, job, claim)
    assert case.signed()
    private = build_claim(
        job.replace(privacy={"noise": "secure"}),
        {home.name: [{"round": 1, "event": mechanism_of(job).event(job.train.local_steps).to_dict()}]},
        ClaimSubject(RUN, {}, None, {}, ("base", "c" * 64), COORDINATOR),
    )
    text = case.said(lambda said: said.update(guarantee=private["guarantee"]))
    assert case.refused(text).code == "E-CLAIM-PROMISE"
