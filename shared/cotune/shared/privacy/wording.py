"""What a claim says in words: whom it protects, from whom, what is released, what is not covered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cotune.shared.aggregation import what_is_trained
from cotune.shared.job import Job
from cotune.shared.privacy.mechanism import mechanism_of

NON_PRIVATE = "This run gives NO privacy guarantee."


def threat_model(job: Job, *, promised: bool) -> dict[str, str]:
    """Who sees what, and whether the guarantee reaches them."""
    covered = "covered" if promised else "NOT covered"
    return {
        "coordinator": f"sees each site's {update(job)} of every round; {covered}",
        "other sites": f"see global adapters; {covered}{', also if they collude' if promised else ''}",
        "readers of the released model": covered,
        "the site's own staff": "trusted with its records; not covered",
    }


def update(job: Job) -> str:
    """What a site sends, in two words."""
    return "update, neither clipped nor noised," if job.privacy.level == "none" else "noised update"


def statement(job: Job, guarantee: Mapping[str, Any]) -> str:
    """The claim in one sentence."""
    worst = math.ceil(guarantee["epsilon"] * 100) / 100
    change = {
        "add-or-remove-one": "adding or removing {unit}",
        "zero-out-one": "replacing {unit} by nothing",
    }[mechanism_of(job).adjacency]
    where = "of any one site's data" if job.data.sites_per_unit == 1 else f"at up to {job.data.sites_per_unit} sites"
    return (
        f"The released adapter and every checkpoint are ({worst:.2f}, {_rounded_up(guarantee['delta'])})-differentially"
        f" private with respect to {change.format(unit=_one_unit(job))} {where}, against everyone outside"
        f" {'that site' if job.data.sites_per_unit == 1 else 'those sites'}."
    )


def non_private_statement(job: Job) -> str:
    """Why a run claims nothing, in one sentence that nobody can overlook."""
    if job.privacy.level == "none":
        return f"{NON_PRIVATE} It was trained without clipping and noise (privacy.level = none)."
    if job.is_private:
        return f"{NON_PRIVATE} Not everything it released was accounted for."
    return f"{NON_PRIVATE} Its noise was seeded for tests (privacy.noise = test) and can be subtracted by anybody."


def unit(job: Job) -> dict[str, Any]:
    """Whom or what the figures are about."""
    cut, most = f"cut to {job.model.max_length} tokens", job.data.max_per_unit
    if job.privacy.level == "unit":
        some = f"the first {most} rows" if most else "all rows"
        definition = f"{some} of one person (one value of column {job.data.unit_column}) at a site, each {cut}"
        person = "claimed: the unit is the person"
    else:
        definition = f"one row of a site's data, {cut}"
        person = (
            f"a person has at most {most} rows here: see guarantee.person"
            if most
            else "not claimed: a person with several rows is protected less than one row is, see guarantee.person"
        )
    return {
        "level": job.privacy.level,
        "column": job.data.unit_column,
        "definition": definition,
        "adjacency": mechanism_of(job).adjacency,
        "max_records_per_person": most,
        "person_level": person,
    }


def releases(job: Job) -> list[str]:
    """Everything that leaves a site, and what it costs."""
    listed = ["each round's noised adapter update: the events"]
    if job.privacy.level == "none":
        return ["each round's adapter update, neither clipped nor noised: without any bound"]
    if job.rule.personal:
        listed.append("each site's own B, in the last round: noised in every step, inside the events")
    if job.privacy.clipping == "adaptive":
        listed.append("a noised share of gradients within the clipping norm, each step: inside the events")
    if job.privacy.metrics == "noised":
        listed.append("a noised mean training loss, each round: inside the events")
    listed.append("evaluation figures: on public data, by the coordinator; free")
    return listed


def composition(job: Job) -> dict[str, str]:
    """What is composed with what."""
    most = job.data.sites_per_unit
    persons = "person" if job.data.unit_column else "row"
    return {
        "within_site": "PLD over all steps of all rounds, adaptive",
        "across_sites": f"parallel: the costliest site's epsilon, valid if no {persons} is at two sites"
        if most == 1
        else f"the {most} costliest sites composed, valid if no {persons} is at more than {most} sites",
        "across_runs": "by each site's own ledger, against its own budget; this claim is of one run",
        "tuning": "not accounted here: every trial on the same data is in the sites' ledgers",
    }


def mechanism(job: Job) -> dict[str, str]:
    """How it was done."""
    if job.privacy.level == "none":
        return {"name": f"SGD on LoRA {what_is_trained(job.rule)}", "clipping": "none", "noise": "none: NOT PRIVATE"}
    secure = job.privacy.noise == "secure"
    whose = "person, over all their rows" if job.privacy.level == "unit" else "row"
    how = {
        "flat": "flat L2",
        "normalised": "normalised (AUTO-S)",
        "adaptive": "flat L2, the norm following a noised quantile",
    }[job.privacy.clipping]
    cap = job.train.max_batch_size
    return {
        "name": f"DP-SGD on LoRA {what_is_trained(job.rule)}",
        "sampling": "Poisson" if cap is None else f"Poisson, at most {cap} of {job.units_per_site} units",
        "clipping": f"per {whose}, {how}, non-finite gradients count as zero",
        "noise": "ChaCha20 keyed by the operating system, float64" if secure else "SEEDED FOR TESTS: NOT PRIVATE",
        "normaliser": "the public expected batch size",
        "accountant": "dp-accounting PLD, checked by Opacus PRV",
    }


def unprotected(job: Job) -> list[str]:
    """What the guarantee does not reach; never empty."""
    listed = [
        "site names, who took part in which round, and when",
        "the job file, with the agreed numbers of records and persons at a site, which is public by design",
        "the base model and what it was trained on before",
        "rounding: sums are floating-point, and attacks on their last bits are made harder, not impossible",
        "what is asked of the model later: prompts are not protected by training",
        "trials: settings tuned by running on the same records again cost more than one run says",
    ]
    if job.privacy.level != "unit":
        listed.insert(0, "people with several records: the unit is one row, and every further row weakens protection")
    elif job.data.max_per_unit is None:
        listed.append("how much a person with very many rows slows a round down")
    return listed


def _one_unit(job: Job) -> str:
    if job.privacy.level == "unit":
        return f"one person (all rows with one value of column {job.data.unit_column})"
    return "one row"


def _rounded_up(value: float) -> str:
    """Three digits, never below the value: a claim may not say less than was computed."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit - 1e-9) * unit:.3g}"
