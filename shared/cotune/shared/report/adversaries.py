"""Who could see what of the run, and what that may tell them: one row an adversary, as the claim has them."""

from __future__ import annotations

from dataclasses import dataclass

from cotune.shared.report import wording
from cotune.shared.report.evidence import Evidence, Record


@dataclass(frozen=True)
class Adversary:
    """One row: who, what they see, and the bound on what they learn of one record or person."""

    who: str
    sees: str
    epsilon: str
    unamplified: str
    odds: str
    note: str


def adversary_rows(evidence: Evidence) -> tuple[Adversary, ...]:
    """The claim's adversaries in its own order; none for a claim that states none.

    What a run may not claim, or what an attack refuted, bounds none of them.
    """
    stands = bool(evidence.guarantee) and not evidence.is_broken
    return tuple(_row(record, stands) for record in evidence.claim.get("adversaries") or [])


def _row(record: Record, stands: bool) -> Adversary:
    curve = [(point[0], point[1]) for point in record.get("tradeoff") or []] if stands else []
    right = wording.right_of_hundred(curve)
    bound = record.get("epsilon") if stands else None
    plain = record.get("epsilon_without_amplification") if stands else None
    return Adversary(
        who=str(record.get("who", "")),
        sees=str(record.get("sees", "")),
        epsilon="no bound" if bound is None else f"{wording.epsilon(bound)} at {wording.delta(record.get('delta'))}",
        unamplified="no bound" if plain is None else wording.epsilon(plain),
        odds="no bound" if right is None else f"at most {right} of 100",
        note=str(record.get("note") or ""),
    )


def trusted_parties(evidence: Evidence) -> str:
    """Whom everything rests on, in one sentence."""
    names = [str(site.get("id", "")) for site in evidence.claim.get("sites") or []]
    return (
        "Each site's own staff see that site's records and are trusted with them; so are the machines and the "
        f"copy of cotune that run at {'the site' if len(names) == 1 else 'each site'}."
    )
