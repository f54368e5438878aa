"""The privacy claim: what a run promises, to whom, and what it does not."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from cotune.shared.job import Job
from cotune.shared.privacy import wording as words
from cotune.shared.privacy.accounting import delta_profile, epsilon, epsilon_replace_one, tradeoff_curve
from cotune.shared.privacy.adversaries import adversaries
from cotune.shared.privacy.claim_form import SCHEMA
from cotune.shared.privacy.crosscheck import epsilon_by_prv
from cotune.shared.privacy.event import DpSgdEvent, Event, NonPrivateEvent, event_from_dict
from cotune.shared.privacy.group import epsilon_group
from cotune.shared.privacy.mechanism import mechanism_of

WEIGHTS = "adapter/adapter_model.safetensors"
RATES = (0.001, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
EPSILONS = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
GROUPS = (2, 4, 8)
DIGITS = 1e-6
SOFTWARE = ("cotune", "flwr", "torch", "transformers", "peft", "dp-accounting")


@dataclass(frozen=True)
class ClaimSubject:
    """What a claim is about, beside job and events.

    Attributes:
        run_id: The run.
        files: Hashes of what is released, by name.
        reload_check: What the adapter's loss was, and is; None if it was not looked at.
        heads: Signed ledger heads, by site.
        base: Name and hash of the base model.
        coordinator: The coordinator's `public_key`, and whether it is `simulated`.
    """

    run_id: str
    files: Mapping[str, str]
    reload_check: Mapping[str, float] | None
    heads: Mapping[str, Mapping[str, Any]]
    base: tuple[str, str]
    coordinator: Mapping[str, Any]


def build_claim(job: Job, accounts: Mapping[str, Sequence[dict[str, Any]]], subject: ClaimSubject) -> dict[str, Any]:
    """The claim of a run, from its events alone.

    Guarantee: every epsilon is computed here from the events. The run's figure is that of the
    `data.sites_per_unit` costliest sites composed, so it holds for anybody at that many sites or fewer. A run
    without accounted, secret noise gets `guarantee: null` in words nobody can overlook.

    Edge cases: no site, or a site without an event, promises nothing; with fewer sites than
    `data.sites_per_unit` all are composed.

    Args:
        job: The resolved job.
        accounts: Site -> its entries ({"round", "event"}).
        subject: What else the claim is about.
    """
    private = job.is_private and bool(accounts) and all(_is_accounted(entries) for entries in accounts.values())
    delta = job.privacy.delta if job.privacy.delta != "auto" else math.nan
    sites = [{**site, "ledger_head": subject.heads.get(site["id"])} for site in site_costs(job, accounts)]
    guarantee = _guarantee(job, accounts, sites, delta) if private else None
    claim: dict[str, Any] = {
        "schema": SCHEMA,
        "run_id": subject.run_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "job_sha256": job.sha256(),
        "subject": [{"name": name, "sha256": sha256} for name, sha256 in sorted(subject.files.items())],
        "model": {
            "base": subject.base[0],
            "base_sha256": subject.base[1],
            "adapter_sha256": subject.files.get(WEIGHTS),
        },
        "guarantee": guarantee,
        **said_by(job, guarantee),
        "sites": sites,
        "coordinator": dict(subject.coordinator),
        "evidence": {"reload_check": subject.reload_check},
        "software": {name: version(name) for name in SOFTWARE},
    }
    return {**claim, "claim_id": claim_id(claim)}


def said_by(job: Job, guarantee: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parts of a claim that follow from the job and the guarantee alone; None: it promises nothing."""
    return {
        "statement": words.statement(job, guarantee) if guarantee else words.non_private_statement(job),
        "adversaries": adversaries(job, guarantee),
        "unit": words.unit(job),
        "releases": words.releases(job),
        "composition": words.composition(job),
        "mechanism": words.mechanism(job),
        "threat_model": words.threat_model(job, promised=guarantee is not None),
        "unprotected": words.unprotected(job),
    }


def claim_bytes(claim: Mapping[str, Any]) -> bytes:
    """The exact bytes of claim.json, which are what is signed."""
    return (json.dumps(claim, indent=2, allow_nan=False) + "\n").encode()


def alike(one: Any, other: Any) -> bool:
    """Equal, but for the last digits of computed figures, which may differ between machines."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=DIGITS, abs_tol=DIGITS**2)
    return one == other


def claim_id(claim: Mapping[str, Any]) -> str:
    """`sha256:` and the hash of the claim without its id."""
    body = {key: value for key, value in claim.items() if key != "claim_id"}
    return "sha256:" + hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def statement_text(claim: Mapping[str, Any]) -> str:
    """The claim in plain words, as a short text file."""
    lines = [claim["statement"], "", "Not covered:", *(f"- {item}" for item in claim["unprotected"])]
    lines += [
        "",
        "Check it yourself: cotune verify RUN (epsilon is recomputed from the sites' ledgers).",
    ]
    return "\n".join(lines) + "\n"


def charged(accounts: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The coordinator's account without what sites refused; a site that refused everything is not in it."""
    kept = {site: [entry for entry in entries if "refused" not in entry] for site, entries in accounts.items()}
    return {site: entries for site, entries in kept.items() if entries}


def _is_accounted(entries: Sequence[dict[str, Any]]) -> bool:
    events = events_of(entries)
    return bool(events) and not any(isinstance(event, NonPrivateEvent) for event in events)


def events_of(entries: Sequence[dict[str, Any]]) -> list[Event]:
    """The events of one site's entries."""
    return [event_from_dict(entry["event"]) for entry in entries]


def site_costs(job: Job, accounts: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What each site's entries cost its units, in order of names."""
    delta = job.privacy.delta if job.privacy.delta != "auto" else math.nan
    return [_site(name, entries, job, delta) for name, entries in sorted(accounts.items())]


def _site(name: str, entries: Sequence[dict[str, Any]], job: Job, delta: float) -> dict[str, Any]:
    events = events_of(entries)
    counted = [event for event in events if not isinstance(event, NonPrivateEvent)]
    cost = epsilon(events, delta) if job.is_private and _is_accounted(entries) else math.inf
    return {
        "id": name,
        "sampling": "poisson" if job.train.max_batch_size is None else "truncated poisson",
        "sampling_probability": job.sampling_probability,
        "noise_multiplier": counted[0].noise_multiplier if counted else None,
        "clipping_norm": job.privacy.clipping_norm if counted else None,
        "steps": sum(event.steps for event in counted) or job.train.local_steps * len(entries),
        "epsilon": cost if math.isfinite(cost) else None,
        "delta": delta if math.isfinite(cost) else None,
    }


def _guarantee(
    job: Job, accounts: Mapping[str, Sequence[dict[str, Any]]], sites: Sequence[dict[str, Any]], delta: float
) -> dict[str, Any]:
    costliest = sorted(sites, key=lambda site: (-site["epsilon"], site["id"]))[: job.data.sites_per_unit]
    events = [event for site in costliest for event in events_of(accounts[site["id"]])]
    return {
        "variant": "approximate DP",
        "epsilon": epsilon(events, delta),
        "delta": delta,
        "adjacency": mechanism_of(job).adjacency,
        "target_epsilon": job.privacy.epsilon,
        "epsilon_without_amplification": epsilon(_unsampled(events), delta),
        "epsilon_replace_one": epsilon_replace_one(events, delta),
        "epsilon_second_accountant": epsilon_by_prv(events, delta),
        "person": _persons(job, events, delta),
        "tradeoff": [list(point) for point in tradeoff_curve(events, RATES)],
        "delta_of_epsilon": [list(point) for point in delta_profile(events, EPSILONS)],
    }


def _unsampled(events: Sequence[Event]) -> list[Event]:
    """The same releases as if every unit had been in every batch."""
    return [
        DpSgdEvent(sampling_probability=1.0, noise_multiplier=event.noise_multiplier, steps=event.steps)
        for event in events
        if not isinstance(event, NonPrivateEvent)
    ]


def _persons(job: Job, events: Sequence[Event], delta: float) -> list[dict[str, Any]]:
    """What the events cost a person with so many rows, where single rows are protected; empty for persons."""
    if job.privacy.level == "unit":
        return []
    most = job.data.max_per_unit
    return [
        {"records": count, "epsilon": cost if math.isfinite(cost) else None}
        for count in ((most,) if most else GROUPS)
        for cost in (epsilon_group(events, delta, count),)
    ]
