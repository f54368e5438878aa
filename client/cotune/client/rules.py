"""The rules of a site, by name: what a job asks for against what the policy allows. The stricter side wins.

A rule looks at the policy, the job and the site's own ledger, never at a record: its refusal may be told to anyone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cotune.client.budget import Account, bounded_price, job_event
from cotune.client.policy import DatasetPolicy, Policy, protected_unit
from cotune.shared.errors import PrivacyError, RefusedError
from cotune.shared.job import Job
from cotune.shared.privacy.event import Event
from cotune.shared.signing import verify

LEVELS = {"none": 0, "example": 1, "unit": 2}
MAX_STEPS = 1_000_000
EDIT = "edit policy.toml in the site's home; the change goes into the ledger"


@dataclass(frozen=True)
class Request:
    """What is asked of a data set.

    Attributes:
        job: The resolved job.
        rounds: Rounds that are to be paid for.
        model_sha256: Of the base model's weights; None if they were not located.
        signature: SSH signature over the job's hash, if one came.
        account: The data set's account, before this.
        coordinators: Keys of the coordinators the site is joined to, by federation; None if it never joined any.
    """

    job: Job
    rounds: int
    model_sha256: str | None
    signature: str | None
    account: Account
    coordinators: Mapping[str, str] | None


@dataclass(frozen=True)
class Refusal:
    """A rule that says no.

    Attributes:
        rule: Its name.
        text: What was asked, and what is allowed. Public.
    """

    rule: str
    text: str

    @property
    def hint(self) -> str:
        """What the site's administrator does about it."""
        return HINTS.get(self.rule) or HINTS[self.rule.partition(".")[0]]

    def error(self, site: str) -> RefusedError:
        """The refusal as the error a site answers with: E-BUDGET for a budget's rule, E-POLICY for any other."""
        code = "E-BUDGET" if self.rule.startswith("budget.") else "E-POLICY"
        return RefusedError(code, f"{site}: rule {self.rule}: {self.text}", param=self.rule, hint=self.hint)


Rule = Callable[[Policy, DatasetPolicy, Request], str | None]


def first_refusal(
    rules: Mapping[str, Rule], policy: Policy, dataset: DatasetPolicy, request: Request
) -> Refusal | None:
    """The first of the rules that says no.

    Guarantee: None only if every rule was asked and none refused.
    """
    for name, rule in rules.items():
        text = rule(policy, dataset, request)
        if text is not None:
            return Refusal(name, text)
    return None


def unknown_dataset(policy: Policy, named: str | None) -> Refusal:
    """The refusal of a job that names no data set of this site."""
    asked = "names no data set" if named is None else f"names the data set {named[:40]!a}"
    return Refusal("data.dataset", f"the job {asked}; data.dataset may be: {', '.join(d.id for d in policy.dataset)}")


def _mechanism(_policy: Policy, _dataset: DatasetPolicy, request: Request) -> str | None:
    if request.job.privacy.level != "none" and request.job.privacy.delta == "auto":
        return "privacy.delta is still `auto`; a site is asked with a resolved job"
    try:
        job_event(request.job, 1)
    except PrivacyError as error:
        return error.message
    return None


def _private(policy: Policy, _dataset: DatasetPolicy, request: Request) -> str | None:
    if request.job.privacy.level == "none" and not policy.site.simulated:
        return 'the job has privacy.level = "none"; records are never trained on without noise'
    return None


def _secret_noise(policy: Policy, _dataset: DatasetPolicy, request: Request) -> str | None:
    if request.job.privacy.noise != "secure" and not policy.site.simulated:
        return 'the job has privacy.noise = "test"; noise that others can compute hides nothing'
    return None


def _models(policy: Policy, _dataset: DatasetPolicy, request: Request) -> str | None:
    if request.model_sha256 is None or f"sha256:{request.model_sha256}" in policy.allow.models:
        return None
    return f"the base model is sha256:{request.model_sha256}, which is not on the list of {len(policy.allow.models)}"


def _methods(policy: Policy, _dataset: DatasetPolicy, _request: Request) -> str | None:
    return None if "lora" in policy.allow.methods else "the job trains a LoRA adapter, which is not on the list"


def _rank(policy: Policy, _dataset: DatasetPolicy, request: Request) -> str | None:
    asked, allowed = request.job.lora.r, policy.allow.max_lora_rank
    return f"lora.r = {asked} is above {allowed}" if asked > allowed else None


def _signers(policy: Policy, _dataset: DatasetPolicy, request: Request) -> str | None:
    """Whoever the policy lists; where it lists nobody, the coordinators the site has joined.

    Guarantee: once a site has joined a federation, no job gets past this that none of these signed.

    Edge cases: a site that left all its federations takes no job; one that never joined takes any.
    """
    signers, who = policy.allow.signers, "listed signer"
    if not signers:
        if request.coordinators is None:
            return None
        signers, who = tuple(request.coordinators.values()), "coordinator this site has joined"
    if request.signature is None:
        return f"the job is not signed; the signature of a {who} is needed"
    if any(verify(each, "cotune-job", request.job.sha256().encode(), request.signature) for each in signers):
        return None
    return f"the job's signature is of no {who}, or of another job"


def _level(policy: Policy, dataset: DatasetPolicy, request: Request) -> str | None:
    required = "unit" if dataset.unit_column else policy.require.level
    asked = request.job.privacy.level
    if policy.site.simulated or LEVELS[asked] >= LEVELS[required]:
        return None
    return f'privacy.level = "{asked}" promises less than "{required}"'


def _unit(policy: Policy, dataset: DatasetPolicy, request: Request) -> str | None:
    asked = protected_unit(request.job)
    if asked == dataset.unit or (policy.site.simulated and request.job.privacy.level == "none"):
        return None
    return f'the job protects a unit of {asked[:60]!a}; the budget of {dataset.id} is kept per "{dataset.unit}"'


def _one_unit(_policy: Policy, dataset: DatasetPolicy, request: Request) -> str | None:
    others = ", ".join(sorted(request.account.units - {dataset.unit}))
    if not others:
        return None
    return f"{dataset.id} has releases per {others}, which say nothing about a unit of {dataset.unit}"


def _rows(_policy: Policy, dataset: DatasetPolicy, request: Request) -> str | None:
    asked, allowed = request.job.data.max_per_unit, dataset.max_per_unit
    if allowed is None or (asked is not None and asked <= allowed):
        return None
    return f"data.max_per_unit is {'not set' if asked is None else asked}; at most {allowed} rows of a person are used"


def _sites(policy: Policy, _dataset: DatasetPolicy, request: Request) -> str | None:
    asked, needed = request.job.federation.min_sites, policy.require.min_sites
    return f"federation.min_sites = {asked} is below {needed}" if asked < needed else None


def _noise(policy: Policy, _dataset: DatasetPolicy, request: Request) -> str | None:
    asked, needed = request.job.privacy.noise_multiplier, policy.require.min_noise_multiplier
    if request.job.privacy.level == "none" or asked == "auto" or asked >= needed:
        return None
    return f"privacy.noise_multiplier = {asked:g} is below {needed:g}"


def _metrics(policy: Policy, _dataset: DatasetPolicy, request: Request) -> str | None:
    if request.job.privacy.metrics == "none" or policy.release.train_metrics == "noised":
        return None
    return 'the job wants the training loss, noised; release.train_metrics is "none"'


def _steps(_policy: Policy, _dataset: DatasetPolicy, request: Request) -> str | None:
    asked = request.rounds * request.job.train.local_steps
    return f"{asked:,} steps are more than the {MAX_STEPS:,} that are priced" if asked > MAX_STEPS else None


def _delta(_policy: Policy, dataset: DatasetPolicy, request: Request) -> str | None:
    asked, allowed = request.job.privacy.delta, dataset.budget.delta_total
    if request.job.privacy.level == "none" or asked == "auto" or asked <= allowed:
        return None
    return f"privacy.delta = {asked:g} is above {allowed:g}"


def _per_run(policy: Policy, _dataset: DatasetPolicy, request: Request) -> str | None:
    return None if _is_free(policy, request) else over_run(request.account, (), _asked(request))


def _total(policy: Policy, _dataset: DatasetPolicy, request: Request) -> str | None:
    return None if _is_free(policy, request) else over_total(request.account, _asked(request))


def _is_free(policy: Policy, request: Request) -> bool:
    return policy.site.simulated and request.job.privacy.level == "none"


def _asked(request: Request) -> Event:
    return job_event(request.job, request.rounds)


def over_run(account: Account, of_run: tuple[Event, ...], event: Event) -> str | None:
    """Why an event after those of its run exceeds `epsilon_per_run`, or None; see `_over`."""
    return _over(account, of_run, event, account.dataset.budget.epsilon_per_run, "this run")


def over_total(account: Account, event: Event) -> str | None:
    """Why an event after everything before it exceeds `epsilon_total`, or None; see `_over`."""
    total = account.dataset.budget.epsilon_total
    return _over(account, account.events, event, total, f"`{account.dataset.id}` with this run")


def over_round(account: Account, run_id: str, event: Event) -> Refusal | None:
    """The budget's refusal of one more round of a run, if there is one.

    Guarantee: None only if run and data set, with the round, cost at most their budgets.

    Edge cases: rounds that were lost count; a run without a round so far has cost nothing.
    """
    text = over_run(account, account.runs.get(run_id, ()), event)
    if text:
        return Refusal("budget.epsilon_per_run", text)
    text = over_total(account, event)
    return Refusal("budget.epsilon_total", text) if text else None


def _over(account: Account, before: tuple[Event, ...], event: Event, cap: float, what: str) -> str | None:
    """Why an event after others exceeds a cap, or None.

    Guarantee: None only if everything before and the event together cost at most `cap` at the data set's delta.

    Edge cases: an event without privacy exceeds every cap; exactly the cap is allowed.
    """
    cost = bounded_price(event, account.dataset.budget.delta_total, cap)
    if cost <= cap and before:
        cost = account.price([*before, event])
    if cost <= cap:
        return None
    if not before or math.isinf(cost):
        said = f"epsilon {cost:.3f}" if math.isfinite(cost) else f"far more than epsilon {cap:g}"
        return f"{what} costs {said}; {cap:g} is allowed"
    return f"{what} costs epsilon {cost:.3f}, {account.price(before):.3f} of it spent already; {cap:g} is allowed"


RULES: dict[str, Rule] = {
    "job.mechanism": _mechanism,
    "privacy.none": _private,
    "noise.test": _secret_noise,
    "allow.models": _models,
    "allow.methods": _methods,
    "allow.max_lora_rank": _rank,
    "allow.signers": _signers,
    "require.level": _level,
    "require.unit": _unit,
    "dataset.unit": _one_unit,
    "dataset.max_per_unit": _rows,
    "require.min_sites": _sites,
    "require.min_noise_multiplier": _noise,
    "release.train_metrics": _metrics,
}
BUDGET_RULES: dict[str, Rule] = {
    "budget.steps": _steps,
    "budget.delta": _delta,
    "budget.epsilon_per_run": _per_run,
    "budget.epsilon_total": _total,
}
HINTS = {
    "job": "cotune config validate JOB",
    "privacy": 'set privacy.level = "unit" or "example" in the job',
    "noise": 'set privacy.noise = "secure" in the job',
    "data": "set data.dataset in the job; `cotune site policy` lists the site's data sets",
    "allow.models": f"add the model to allow.models: {EDIT}",
    "allow": EDIT,
    "require": f"change the job, or {EDIT}",
    "dataset": f"change the job, or {EDIT}",
    "dataset.unit": "set the data set's unit back to what was spent under; new records get a new data set",
    "release": f'set privacy.metrics = "none" in the job, or {EDIT}',
    "budget": f"cotune site budget; to raise it, {EDIT}",
    "approve": "cotune site jobs",
}
