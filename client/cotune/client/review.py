"""A job held against a site's policy before anything runs: every rule's answer, the cost, and what would leave."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cotune.client.budget import Account, account, bounded_price, job_event
from cotune.client.coordinators import joined_keys
from cotune.client.decisions import Standing
from cotune.client.home import SiteHome
from cotune.client.rules import BUDGET_RULES, RULES, Refusal, Request, unknown_dataset
from cotune.shared.bundle import bundle_sha256
from cotune.shared.errors import CotuneError, PrivacyError
from cotune.shared.job import Job
from cotune.shared.jobfile import load_job

AT_REQUEST = {"allow.signers": "checked when the job comes, with its signature"}


@dataclass(frozen=True)
class Review:
    """What a site would say to a job.

    Attributes:
        site: The site's name.
        simulated: Whether it is a simulated one.
        job: The resolved job.
        answers: Rule -> why it refuses, or None.
        open_rules: Rules that could not be asked yet, and why.
        refusal: The first that refuses.
        model_sha256: Of the base model, where it was located.
        cost: See `cost_of`.
    """

    site: str
    simulated: bool
    job: Job
    answers: dict[str, str | None]
    open_rules: dict[str, str]
    refusal: Refusal | None
    model_sha256: str | None
    cost: str

    def to_dict(self) -> dict[str, Any]:
        """The review as JSON."""
        return {
            "site": self.site,
            "simulated": self.simulated,
            "job_sha256": self.job.sha256(),
            "model_sha256": self.model_sha256,
            "rules": self.answers,
            "not_checked": self.open_rules,
            "refused_by": asdict(self.refusal) if self.refusal else None,
            "cost": self.cost,
            "leaves": what_leaves(self.job),
        }

    def text(self) -> str:
        """The review for people."""
        title = f"{self.site}{' (SIMULATED)' if self.simulated else ''}: job {self.job.sha256()[:12]}"
        lines = [f"{title} ({self.job.run.name}), {self.cost}"]
        if self.model_sha256:
            lines.append(f"  base model  sha256:{self.model_sha256}")
        lines += [
            f"  {'REFUSED' if text else 'ok':8}{rule}{f': {text}' if text else ''}"
            for rule, text in self.answers.items()
        ]
        lines += [f"  {'later':8}{rule}: {why}" for rule, why in self.open_rules.items()]
        return "\n".join([*lines, *(f"  leaves  {each}" for each in what_leaves(self.job))])


def review(home: SiteHome, reference: str, *, locate_model: bool) -> Review:
    """Hold a job against every rule that can be asked without its coordinator.

    Args:
        home: The site.
        reference: The first digits of a received job's hash, or a job file; what is `auto` in it is filled in.
        locate_model: Find the base model, as training would, and ask allow.models too.

    Raises:
        JobError: There is no such job.
        PrivacyError: The job's own privacy settings are impossible.
    """
    job = _job(home, reference)
    policy = home.policy
    dataset = policy.find(job.data.dataset)
    later = dict(AT_REQUEST)
    model = _model(job, later) if locate_model else None
    if model is None:
        later.setdefault("allow.models", "checked when the job runs, on the base model that is located then")
    if dataset is None:
        refusal = unknown_dataset(policy, job.data.dataset)
        answers: dict[str, str | None] = {refusal.rule: refusal.text}
        return Review(home.name, home.is_simulated, job, answers, later, refusal, model, "cost unknown")
    now = account(home.ledger.entries, dataset)
    request = Request(
        job=job,
        rounds=job.run.rounds,
        model_sha256=model,
        signature=None,
        account=now,
        coordinators=joined_keys(home.ledger.entries),
    )
    asked = {name: rule for name, rule in RULES.items() if name not in later}
    answers = {name: rule(policy, dataset, request) for name, rule in asked.items()}
    if not any(answers.values()):  # a budget prices only what the other rules let pass
        answers |= {name: rule(policy, dataset, request) for name, rule in BUDGET_RULES.items()}
    refusal = next((Refusal(name, text) for name, text in answers.items() if text), None)
    return Review(home.name, home.is_simulated, job, answers, later, refusal, model, cost_of(job, now))


def summaries(home: SiteHome) -> list[dict[str, Any]]:
    """Every job that came, with its state, its cost for the data set it names, and what would leave the site."""
    return [_summary(home, sha256, standing) for sha256, standing in home.jobs.standings().items()]


def cost_of(job: Job, now: Account) -> str:
    """A job's price over all its rounds, at the data set's delta, for people."""
    budget = now.dataset.budget
    try:
        event = job_event(job, job.run.rounds)
    except PrivacyError:
        return "cost unknown: the job is not resolved"
    price = bounded_price(event, budget.delta_total, budget.epsilon_total)
    if math.isinf(price):
        return f"costs far more than epsilon {budget.epsilon_total:g} of `{now.dataset.id}`"
    return f"costs epsilon {price:.3f} of `{now.dataset.id}` at delta {budget.delta_total:g}"


def what_leaves(job: Job) -> list[str]:
    """Everything a site gives away when it takes part in a job."""
    noised = "noised" if job.is_private else "NOT PRIVATE"
    leaves = [f"{job.run.rounds} updates of the adapter, one a round ({noised})"]
    if job.privacy.metrics == "noised":
        leaves.append("the mean training loss of each round (noised, in the cost)")
    if job.privacy.clipping == "adaptive":
        leaves.append("the clipping norm of each round (learnt from noised counts, in the cost)")
    return [*leaves, "the ledger: signed heads each round, its lines at the end"]


def _summary(home: SiteHome, sha256: str, standing: Standing) -> dict[str, Any]:
    row: dict[str, Any] = {
        "job_sha256": sha256,
        "bundle_sha256": bundle_sha256(),  # this version's own: a job that comes with another is refused
        "state": standing.state,
        "rules": list(standing.rules),
        "outdated": standing.outdated,
    }
    try:
        job = home.jobs.job(sha256)
    except CotuneError as error:
        return {**row, "name": None, "dataset": None, "cost": error.message, "leaves": []}
    dataset = home.policy.find(job.data.dataset)
    cost = cost_of(job, account(home.ledger.entries, dataset)) if dataset else "names no data set of this site"
    return {
        **row,
        "name": job.run.name,
        "dataset": dataset.id if dataset else None,
        "cost": cost,
        "leaves": what_leaves(job),
    }


def _job(home: SiteHome, reference: str) -> Job:
    path = Path(reference).expanduser()
    if path.suffix in (".toml", ".yaml", ".yml", ".json") or "/" in reference:
        from cotune.shared.planning import resolve

        return resolve(load_job(path))
    return home.jobs.job(home.jobs.find(reference))


def _model(job: Job, later: dict[str, str]) -> str | None:
    from cotune.shared.model import locate

    try:
        return locate(job).sha256
    except CotuneError as error:
        later["allow.models"] = f"the base model could not be located ({error.code})"
        return None
