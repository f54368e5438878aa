"""From whom a claim protects, one entry for each: what it sees, and how much that can tell it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cotune.shared.job import Job
from cotune.shared.privacy import wording as words

WHO = ("coordinator", "another site", "colluding sites", "reader of the released model")


def adversaries(job: Job, guarantee: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What each adversary sees of one site's records, and the bound that holds against it.

    Guarantee: every figure is the run's, of the noised updates of single sites. Without secure aggregation those
    are what the coordinator gets, everything the others see is computed from them, and a function of a release
    tells no more than the release. So no figure here is below what its adversary can learn.

    Edge cases: a smaller bound may hold for who sees only sums of sites; none is claimed. Nothing promised is a
    list without figures.

    Args:
        job: The resolved job.
        guarantee: That of the claim; None if it promises nothing.
    """
    figures = {
        "epsilon": guarantee["epsilon"] if guarantee else None,
        "delta": guarantee["delta"] if guarantee else None,
        "epsilon_without_amplification": guarantee["epsilon_without_amplification"] if guarantee else None,
        "tradeoff": guarantee["tradeoff"] if guarantee else [],
    }
    seen, notes = _seen(job), _notes(job)
    return [
        {"who": who, "sees": seen[who], **figures, "note": notes[who] if guarantee else words.NON_PRIVATE}
        for who in WHO
    ]


def _seen(job: Job) -> dict[str, str]:
    losses = ", and a noised training loss of each" if job.privacy.metrics == "noised" else ""
    own = ", and each site's own adapter" if job.rule.personal else ""
    return {
        "coordinator": f"each site's {words.update(job)} of every round{losses}; it chooses where a round starts",
        "another site": "the global adapter of every round, from which it can take its own update away",
        "colluding sites": "all sites but one, with the coordinator: what each of them sees, together",
        "reader of the released model": f"the last adapter, the checkpoints, the public figures of the run{own}",
    }


def _notes(job: Job) -> dict[str, str]:
    most, whose = job.data.sites_per_unit, "person" if job.data.unit_column else "row"
    at = (
        f"valid if no {whose} is at two sites, which sites do not compare"
        if most == 1
        else f"the {most} costliest sites composed, for a {whose} at up to {most} of them"
    )
    smaller = "where it sees sums of several sites only, a smaller epsilon may hold; none is claimed"
    return {
        "coordinator": f"holds whatever adapter it sends, as each site clips and adds noise by itself; {at}",
        "another site": f"{smaller}; what it holds of a {whose} itself, it knows; {at}",
        "colluding sites": f"they learn of the last site what its own noised updates tell, and no more; {at}",
        "reader of the released model": f"{smaller}; {at}",
    }
