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
from cotune.shared.privacy.accounting import epsilon, epsilon_by_prv, epsilon_replace_one, tradeoff_curve
from cotune.shared.privacy.event import DpSgdEvent, Event, event_from_dict
from cotune.shared.privacy.mechanism import Mechanism

SCHEMA = "cotune/privacy-claim/1"
RATES = (0.001, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
UNPROTECTED = (
    "site names, who took part in which round, and when",
    "data.records_per_site and everything else in the job file, which is public by design",
    "the base model and what it was trained on before",
    "evaluation figures: computed on public data only",
    "people with several records: the unit is one row, and protection weakens with every further row",
    "rounding: sums are floating-point, and attacks on their last bits are made harder, not impossible",
    "what is asked of the model later: prompts are not protected by training",
    "trials: settings tuned by running on the same records again cost more than one run says",
)
COMPOSITION = {
    "within_site": "PLD over all steps of all rounds, adaptive",
    "across_sites": "parallel: the largest site's epsilon, valid if nobody's rows are at two sites",
    "across_runs": "not composed: every further run on the same rows adds to this one",
    "tuning": "not accounted",
}
THREAT_MODEL = {
    "coordinator": "sees each site's noised update of every round; covered",
    "other sites": "see global adapters; covered, also if they collude",
    "readers of the released model": "covered",
    "the site's own staff": "trusted with its records; not covered",
}
NON_PRIVATE = "This run gives NO privacy guarantee."


@dataclass(frozen=True)
class ClaimSubject:
    """What a claim is about."""

    run_id: str
    files: Mapping[str, str]
    reload_check: Mapping[str, float] | None


def build_claim(job: Job, accounts: Mapping[str, Sequence[dict[str, Any]]], subject: ClaimSubject) -> dict[str, Any]:
    """The claim of a run, from its events alone.

    Guarantee: every epsilon is computed here from the events, the sites' maximum is the run's figure, and a
    run without accounted, secret noise gets `guarantee: null` in words nobody can overlook.

    Args:
        job: The resolved job.
        accounts: Site -> its ledger entries ({"round", "event"}).
        subject: Run id, hashes of what is released, result of the reload check.
    """
    private = job.is_private and bool(accounts) and all(_is_accounted(entries) for entries in accounts.values())
    delta = job.privacy.delta if job.privacy.delta != "auto" else math.nan
    sites = [_site(name, entries, job, delta) for name, entries in sorted(accounts.items())]
    claim: dict[str, Any] = {
        "schema": SCHEMA,
        "run_id": subject.run_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "job_sha256": job.sha256(),
        "subject": [{"name": name, "sha256": sha256} for name, sha256 in sorted(subject.files.items())],
        "statement": _statement(job, sites, delta) if private else _non_private_statement(job),
        "guarantee": _guarantee(job, accounts, sites, delta) if private else None,
        "unit": {
            "level": job.privacy.level,
            "definition": f"one row of a site's data, cut to {job.model.max_length} tokens",
            "adjacency": Mechanism.adjacency,
            "person_level": "not claimed: a person with several rows is protected less than one row is",
        },
        "sites": sites,
        "composition": COMPOSITION,
        "mechanism": _mechanism(job),
        "threat_model": THREAT_MODEL,
        "unprotected": list(UNPROTECTED),
        "evidence": {"reload_check": subject.reload_check, "attack": "not run"},
        "software": {
            name: version(name) for name in ("cotune", "flwr", "torch", "transformers", "peft", "dp-accounting")
        },
    }
    return {**claim, "claim_id": claim_id(claim)}


def claim_id(claim: Mapping[str, Any]) -> str:
    """`sha256:` and the hash of the claim without its id."""
    body = {key: value for key, value in claim.items() if key != "claim_id"}
    return "sha256:" + hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def statement_text(claim: Mapping[str, Any]) -> str:
    """The claim in plain words, as a short text file."""
    lines = [claim["statement"], "", "Not covered:", *(f"- {item}" for item in claim["unprotected"])]
    lines += [
        "",
        "Check it yourself: cotune verify RUN (epsilon is recomputed from privacy/accountant.json).",
    ]
    return "\n".join(lines) + "\n"


def _is_accounted(entries: Sequence[dict[str, Any]]) -> bool:
    events = events_of(entries)
    return bool(events) and all(isinstance(event, DpSgdEvent) for event in events)


def events_of(entries: Sequence[dict[str, Any]]) -> list[Event]:
    """The events of one site's ledger entries."""
    return [event_from_dict(entry["event"]) for entry in entries]


def _site(name: str, entries: Sequence[dict[str, Any]], job: Job, delta: float) -> dict[str, Any]:
    events = events_of(entries)
    counted = [event for event in events if isinstance(event, DpSgdEvent)]
    cost = epsilon(events, delta) if job.is_private and _is_accounted(entries) else math.inf
    return {
        "id": name,
        "sampling": "poisson",
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
    worst = max(sites, key=lambda site: site["epsilon"])
    events = events_of(accounts[worst["id"]])
    plain = [
        DpSgdEvent(sampling_probability=1.0, noise_multiplier=e.noise_multiplier, steps=e.steps)
        for e in events
        if isinstance(e, DpSgdEvent)
    ]
    return {
        "variant": "approximate DP",
        "epsilon": worst["epsilon"],
        "delta": delta,
        "target_epsilon": job.privacy.epsilon,
        "epsilon_without_amplification": epsilon(plain, delta),
        "epsilon_replace_one": epsilon_replace_one(events, delta),
        "epsilon_second_accountant": epsilon_by_prv(events, delta),
        "tradeoff": [list(point) for point in tradeoff_curve(events, RATES)],
    }


def _mechanism(job: Job) -> dict[str, str]:
    secure = job.privacy.noise == "secure"
    return {
        "name": "DP-SGD on LoRA " + ("B (A public and frozen)" if job.lora.freeze_a else "A and B"),
        "clipping": "per example, flat L2, non-finite gradients count as zero",
        "noise": "ChaCha20 keyed by the operating system, float64" if secure else "SEEDED FOR TESTS: NOT PRIVATE",
        "normaliser": "the public expected batch size",
        "accountant": "dp-accounting PLD, checked by Opacus PRV",
    }


def _statement(job: Job, sites: Sequence[dict[str, Any]], delta: float) -> str:
    worst = math.ceil(max(site["epsilon"] for site in sites) * 100) / 100
    return (
        f"The released adapter and every checkpoint are ({worst:.2f}, {_rounded_up(delta)})-differentially private with"
        f" respect to adding or removing one row of any one site's data, against everyone outside that site."
    )


def _rounded_up(value: float) -> str:
    """Three digits, never below the value: a claim may not say less than was computed."""
    text = f"{value:.3g}"
    return text if float(text) >= value else f"{value * 1.005:.3g}"


def _non_private_statement(job: Job) -> str:
    if job.privacy.level == "none":
        return f"{NON_PRIVATE} It was trained without clipping and noise (privacy.level = none)."
    if job.is_private:
        return f"{NON_PRIVATE} Not everything it released was accounted for."
    return f"{NON_PRIVATE} Its noise was seeded for tests (privacy.noise = test) and can be subtracted by anybody."
