"""What is known to undo a privacy claim, and how this run stands to each: NIST SP 800-226's pyramid and hazards.

Every status follows from the run's own records. `proven`: it follows from recorded events by mathematics that
`cotune verify` repeats. `tested`: it was measured on this run. `declared`: it rests on the word of the software or of
a person. `not covered`: nothing here speaks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cotune.shared.report import wording
from cotune.shared.report.attacks import build_attacks, could_refute
from cotune.shared.report.evidence import Evidence, Record

Status = Literal["proven", "tested", "declared", "not covered"]
# What a checkpoint holds: the adapter, its card, and what the coordinator goes on with, all made of noised updates.
POST_PROCESSED = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "state.safetensors",
    "progress.json",
}


class Finding(NamedTuple):
    """How the run stands to one thing, and why."""

    status: Status
    why: str


@dataclass(frozen=True)
class Hazard:
    """One line of the list."""

    name: str
    status: Status
    why: str


@dataclass(frozen=True)
class Level:
    """One level of the pyramid, the top first."""

    name: str
    blocks: tuple[Hazard, ...]


NOTHING = Finding("not covered", "This run promises nothing.")


def build_hazards(evidence: Evidence) -> tuple[Hazard, ...]:
    """The twelve hazards; a run that may claim nothing is covered against none but those it truly has not."""
    return tuple(Hazard(name, *find(evidence)) for name, find in HAZARDS.items())


def build_pyramid(evidence: Evidence) -> tuple[Level, ...]:
    """The pyramid's levels, from the parameters at the top to the collection of data at its base."""
    return tuple(
        Level(name, tuple(Hazard(block, *find(evidence)) for block, find in blocks.items()))
        for name, blocks in PYRAMID.items()
    )


def _stands(evidence: Evidence) -> bool:
    return bool(evidence.guarantee) and not evidence.is_broken


def _attacked(evidence: Evidence) -> str:
    """What an audit that the claim survived says for the run; empty without one that could have refuted it."""
    audits = (evidence.attack.get("run") or {}).get("audit") or []
    able = [audit for audit in audits if could_refute(audit) and audit.get("epsilon_lower") is not None]
    if build_attacks(evidence).standing != "holds" or not able:
        return ""
    lower = max(audit["epsilon_lower"] for audit in able)
    return f"An audit that could have refuted the claim found a leak of epsilon {lower:.2f} at least."


def _unit(evidence: Evidence) -> Finding:
    if not _stands(evidence):
        return NOTHING
    unit: Record = evidence.claim.get("unit") or {}
    if unit.get("level") == "unit":
        return Finding("proven", "The unit is the person, over all their rows at a site.")
    most = unit.get("max_records_per_person")
    if most:
        return Finding("declared", f"The unit is one row; a person has at most {most}, and their figure is stated.")
    return Finding("not covered", "The unit is one row: a person with several rows is protected less.")


def _sampling(evidence: Evidence) -> Finding:
    if not _stands(evidence):
        return NOTHING
    kinds = sorted({str(site.get("sampling")) for site in evidence.claim.get("sites") or []})
    if not kinds or any(kind not in ("poisson", "truncated poisson") for kind in kinds):
        return Finding("not covered", f"Sampling as recorded: {', '.join(kinds) or 'nothing'}.")
    said = f"{' and '.join(kinds).capitalize()} sampling: the sampler and the accountant are one object."
    plain = evidence.guarantee.get("epsilon_without_amplification")
    without = f" Without counting on it: epsilon {wording.epsilon(plain)}." if plain is not None else ""
    audit = _attacked(evidence)
    return Finding("tested" if audit else "declared", " ".join(part for part in (said + without, audit) if part))


def _tuning(evidence: Evidence) -> Finding:
    known = [budget for budget in evidence.budgets if not budget.fault and not budget.simulated]
    if known and len(known) == len(evidence.budgets):
        runs = sum(budget.other_runs for budget in known)
        return Finding("declared", f"The sites' ledgers hold every run of cotune on the same data: {runs} others.")
    return Finding("not covered", "Trial runs on the same records are in no account that this folder holds.")


def _metrics(evidence: Evidence) -> Finding:
    leaked = [row for row in evidence.metrics if row.get("site") and row.get("train_loss") is not None]
    if not leaked:
        return Finding("tested", "No site reported a figure of its records; scores are on public rows.")
    if evidence.job.privacy.metrics == "noised" and _stands(evidence):
        return Finding("proven", "Sites report a training loss with noise, inside the accounted events.")
    return Finding("not covered", "Sites reported figures of their records without noise.")


def _fitted(evidence: Evidence) -> Finding:
    if evidence.job.privacy.level == "none":
        return NOTHING
    if evidence.job.privacy.clipping != "adaptive":
        return Finding("declared", "Clipping norm, vocabulary and settings are constants of the public job.")
    if not _stands(evidence):
        return NOTHING
    return Finding("proven", "The clipping norm follows a noised share, inside the accounted events.")


def _delta(evidence: Evidence) -> Finding:
    delta, units = evidence.guarantee.get("delta"), evidence.job.units_per_site
    if not _stands(evidence) or delta is None:
        return NOTHING
    said = f"Delta is {wording.delta(delta)}; one over the agreed number at a site is {wording.delta(1 / units)}."
    return Finding("proven" if delta < 1 / units else "not covered", said)


def _repeated(evidence: Evidence) -> Finding:
    if not _stands(evidence):
        return NOTHING
    known = [budget for budget in evidence.budgets if not budget.fault]
    if len(known) < len(evidence.claim.get("sites") or []):
        return Finding("declared", "All rounds are composed; not every site's ledger was read for what came before.")
    before = [budget for budget in known if budget.other_runs]
    earlier = f"{len(before)} sites had other runs: see the budgets." if before else "The ledgers hold no other run."
    return Finding("proven", f"All rounds are composed, each from the site's own ledger. {earlier}")


def _overlap(evidence: Evidence) -> Finding:
    if not _stands(evidence):
        return NOTHING
    most, sites = evidence.job.data.sites_per_unit, len(evidence.claim.get("sites") or [])
    if most >= sites:
        return Finding("proven", "All sites are composed: the same person may be at every one.")
    where = "one site" if most == 1 else f"{most} sites"
    return Finding("declared", f"The job says that nobody is at more than {where}; cotune cannot look across sites.")


def _single_updates(evidence: Evidence) -> Finding:
    if not _stands(evidence):
        return NOTHING
    return Finding("proven", "The coordinator sees single updates; each carries the full noise of its site.")


def _randomness(evidence: Evidence) -> Finding:
    if not evidence.job.is_private:
        return Finding("not covered", "No secret noise was used.")
    return Finding("declared", "Noise and batches come from ChaCha20, keyed by each site's operating system.")


def _checkpoints(evidence: Evidence) -> Finding:
    if not _stands(evidence):
        return NOTHING
    other = [name for name in evidence.checkpoint_files if name not in POST_PROCESSED]
    if other:
        return Finding("not covered", f"The checkpoints hold files that are no adapter: {', '.join(other[:3])}.")
    return Finding("tested", "The checkpoints hold adapters made of noised updates, and no state of a site.")


def _base(_evidence: Evidence) -> Finding:
    return Finding("not covered", "What the base model learned before, and from whom, is outside this run.")


def _parameters(evidence: Evidence) -> Finding:
    if not _stands(evidence):
        return NOTHING
    second = evidence.guarantee.get("epsilon_second_accountant")
    said = f"Epsilon {wording.epsilon(evidence.epsilon)} at delta {wording.delta(evidence.guarantee.get('delta'))}"
    twice = f"; a second accountant gives {wording.epsilon(second)}" if second is not None else ""
    return Finding("proven", f"{said}, recomputed from recorded events{twice}.")


def _algorithm(evidence: Evidence) -> Finding:
    if evidence.is_broken:
        return Finding("not covered", "An attack measured more than the claim allows.")
    if not _stands(evidence):
        return NOTHING
    audit = _attacked(evidence)
    name = str((evidence.claim.get("mechanism") or {}).get("name") or "DP-SGD")
    return (
        Finding("tested", f"{name}. {audit}")
        if audit
        else Finding("declared", f"{name}; no attack could have refuted it.")
    )


def _utility(evidence: Evidence) -> Finding:
    final: Record = evidence.summary.get("final") or {}
    if final.get("loss") is None:
        return Finding("not covered", "The result was not scored.")
    groups = "by group too" if final.get("groups") else "not by group"
    return Finding("tested", f"Scored on held-out public rows, {groups}.")


def _trust(evidence: Evidence) -> Finding:
    if not _stands(evidence):
        return NOTHING
    return Finding("declared", "Each site trusts its own staff and machine; nobody else is trusted with records.")


def _access(evidence: Evidence) -> Finding:
    if evidence.summary.get("engine") != "deployed":
        return Finding("not covered", "Simulated on one machine, which held every site's records.")
    signed = f"{len(evidence.signatures)} parties signed the claim." if evidence.signatures else ""
    return Finding("declared", f"Records stay at the sites; updates are signed and go over TLS. {signed}".strip())


def _side_channels(_evidence: Evidence) -> Finding:
    return Finding("not covered", "Timing, memory and the last bits of floating-point sums are not proven safe.")


def _collection(_evidence: Evidence) -> Finding:
    return Finding("not covered", "How records were collected, and on what legal basis, is the sites' to answer.")


Find = Callable[[Evidence], Finding]
HAZARDS: dict[str, Find] = {
    "The unit is smaller than a person": _unit,
    "Batches are not sampled as accounted": _sampling,
    "Trials and tuning are not accounted": _tuning,
    "Metrics or logs in the clear": _metrics,
    "Settings fitted on private records": _fitted,
    "Delta above one over the number protected": _delta,
    "Repeated releases of the same records": _repeated,
    "The same people at several sites": _overlap,
    "The coordinator sees single updates": _single_updates,
    "Weak or seeded randomness": _randomness,
    "Checkpoints or optimizer state released": _checkpoints,
    "The base model remembers": _base,
}
PYRAMID: dict[str, dict[str, Find]] = {
    "What is promised": {"Epsilon and delta": _parameters, "Unit of privacy": _unit},
    "What can undermine it": {
        "Algorithm": _algorithm,
        "Utility and bias": _utility,
        "Trust model": _trust,
        "Side channels": _side_channels,
        "Security and access": _access,
    },
    "What it stands on": {"Collection of data": _collection},
}
