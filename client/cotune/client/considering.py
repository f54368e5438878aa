"""A proposal held against a site's policy, budget and decisions, before any round: where the job stands here."""

from __future__ import annotations

from cotune.client.budget import account
from cotune.client.coordinators import joined_keys
from cotune.client.decisions import State
from cotune.client.home import SiteHome
from cotune.client.rules import BUDGET_RULES, RULES, Refusal, Request, first_refusal, unknown_dataset
from cotune.shared.bundle import bundle_sha256
from cotune.shared.errors import one_line
from cotune.shared.plan import cotune_version
from cotune.shared.proposal import MAX_TEXT, JobStanding, Proposal

CROWDED = Refusal("approve.mode", "too many jobs wait for a decision already; this one was not kept")


def consider(home: SiteHome, proposal: Proposal) -> JobStanding:
    """Where a proposed job stands at this site, signed by its key.

    Guarantee: no record is read, no base model looked for, nothing charged, and nothing but public words of
    rules said. `approved` is no promise of a round: `Guard.admit` asks every rule again, that on the model too.

    Edge cases: another version, another bundle and another site's name are refused by name and kept nowhere;
    a run that has begun is not asked for its whole price again; a job beyond those the site keeps undecided is
    refused, not silently left waiting.

    Raises:
        StorageError: The ledger cannot be read or written.
    """
    home.refresh()
    state, refusal = _standing(home, proposal)
    said = JobStanding(
        site=home.name,
        run_id=proposal.run_id,
        job_sha256=proposal.job.sha256(),
        state=state,
        rule=refusal.rule if refusal else None,
        text=one_line(refusal.text, MAX_TEXT) if refusal else None,
    )
    return said.model_copy(update={"signature": home.ledger.sign("cotune-standing", said.message())})


def _standing(home: SiteHome, proposal: Proposal) -> tuple[State, Refusal | None]:
    foreign = _foreign(home, proposal)
    if foreign:
        return "refused", foreign
    job = proposal.job
    before = home.jobs.standings().get(job.sha256())
    if before and before.state == "denied":
        return "denied", None
    refusal = _refusal(home, proposal)
    if refusal:
        home.jobs.refuse(job, refusal.rule, refusal.text)
        return "refused", refusal
    if before and before.state == "approved":
        return "approved", None
    if home.policy.approve.mode == "auto-within-policy":
        home.jobs.approve(job, by="policy")
        return "approved", None
    return ("waiting", None) if home.jobs.receive(job) else ("refused", CROWDED)


def _foreign(home: SiteHome, proposal: Proposal) -> Refusal | None:
    facts = {
        "cotune": (proposal.cotune, cotune_version()),
        "bundle": (proposal.bundle_sha256, bundle_sha256()),
        "site": (proposal.site, home.name),
    }
    for what, (said, here) in facts.items():
        if said != here:
            return Refusal(what, f"the proposal's is {said}, here it is {here}")
    return None


def _refusal(home: SiteHome, proposal: Proposal) -> Refusal | None:
    policy, job = home.policy, proposal.job
    dataset = policy.find(job.data.dataset)
    if dataset is None:
        return unknown_dataset(policy, job.data.dataset)
    now = account(home.ledger.entries, dataset)
    request = Request(
        job=job,
        rounds=job.rounds_per_site,
        model_sha256=None,
        signature=proposal.signature,
        account=now,
        coordinators=joined_keys(home.ledger.entries),
    )
    refusal = first_refusal(RULES, policy, dataset, request)
    if refusal or proposal.run_id in now.runs:
        return refusal
    return first_refusal(BUDGET_RULES, policy, dataset, request)
