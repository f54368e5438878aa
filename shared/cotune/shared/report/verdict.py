"""The verdict: who is protected, against whom, how strongly, and what is not covered."""

from __future__ import annotations

from dataclasses import dataclass

from cotune.shared.report import wording
from cotune.shared.report.evidence import Evidence, Record

PERSON_LEVEL = (
    "Persons. A person with several records has weaker protection than the figures here; no bound is claimed."
)
ANOTHER_SITE = "The same record held by two sites: the figure is for one site's copy."


@dataclass(frozen=True)
class Verdict:
    """Four answers. `banner` is empty only for a run whose privacy can be claimed."""

    headline: str
    banner: str
    banner_text: str
    who: str
    against: str
    strength: tuple[str, ...]
    right_of_hundred: int | None
    uncovered: tuple[str, ...]
    statement: str


def build_verdict(evidence: Evidence) -> Verdict:
    """The verdict on a run as it stands; without a claim nothing is promised."""
    if evidence.privacy != "private":
        return _non_private(evidence)
    return _claimed(evidence) if evidence.guarantee else _unclaimed(evidence)


def _non_private(evidence: Evidence) -> Verdict:
    if evidence.privacy == "test-noise":
        banner, why = (
            "TEST NOISE: NOT PRIVATE",
            "The noise was seeded for tests: anyone can compute and remove it.",
        )
    else:
        banner, why = "NON-PRIVATE", "This run was trained without differential privacy."
    return Verdict(
        headline="This run protects nobody",
        banner=banner,
        banner_text=f"{why} Records may be recovered from the adapter: keep it where they are.",
        who="Nobody: no guarantee holds for any record.",
        against="Nobody.",
        strength=("There is no epsilon. Whoever has the adapter may be able to tell, and reconstruct, what it saw.",),
        right_of_hundred=None,
        uncovered=("Everything. " + why,),
        statement="",
    )


def _unclaimed(evidence: Evidence) -> Verdict:
    spent, ended = evidence.epsilon, evidence.state.get("status") in ("failed", "cancelled")
    target = wording.epsilon(evidence.job.privacy.epsilon)
    strength = (f"The target is epsilon {target}.",)
    if spent:
        strength = (
            f"Spent so far: epsilon {wording.epsilon(spent)} of {target}.",
            "That is a figure of unfinished training, not a guarantee for an adapter.",
        )
    return Verdict(
        headline="No privacy claim" if ended else "No privacy claim yet",
        banner="",
        banner_text="",
        who="Nobody: the run ended without a claim." if ended else "Nobody yet: a run's claim is written at its end.",
        against="The claim is to be for each single record (one row) of any one site, against everyone "
        "outside that site, the coordinator included.",
        strength=strength,
        right_of_hundred=None,
        uncovered=(PERSON_LEVEL, ANOTHER_SITE),
        statement="",
    )


def _claimed(evidence: Evidence) -> Verdict:
    guarantee = evidence.guarantee
    unit: Record = evidence.claim.get("unit") or {}
    definition = unit.get("definition")
    curve = [(point[0], point[1]) for point in guarantee.get("tradeoff") or []]
    right = wording.right_of_hundred(curve)
    listed = tuple(str(item) for item in evidence.claim.get("unprotected") or [])
    person = unit.get("person_level")
    return Verdict(
        headline=f"Each record is protected with epsilon {wording.epsilon(evidence.epsilon)} "
        f"and delta {wording.delta(guarantee.get('delta'))}",
        banner="",
        banner_text="",
        who=f"Each single record of any one site: {definition or 'one row of its data'}.",
        against="Everyone outside that site, the coordinator included.",
        strength=(*_odds(curve, right), *_figures(guarantee)),
        right_of_hundred=right,
        uncovered=(*listed, f"Persons: {person}" if person else PERSON_LEVEL),
        statement=str(evidence.claim.get("statement") or ""),
    )


def _odds(curve: list[tuple[float, float]], right: int | None) -> tuple[str, ...]:
    if right is None:
        return ("The claim carries no trade-off curve, so its odds cannot be given.",)
    sentences = [
        f"Of 100 guesses whether one given record was used, 50 are right by chance; "
        f"with this adapter in hand, the best attack gets at most {right} right."
    ]
    found = wording.found_of_hundred(curve, 0.01)
    if found is not None:
        sentences.append(
            f"An attack that wrongly accuses 1 of 100 unused records finds at most {found} of 100 used ones."
        )
    return tuple(sentences)


def _figures(guarantee: Record) -> tuple[str, ...]:
    spent, delta = wording.epsilon(guarantee.get("epsilon")), wording.delta(guarantee.get("delta"))
    figures = f"Epsilon {spent} at delta {delta}"
    if guarantee.get("target_epsilon") is not None:
        figures += f" (target {wording.epsilon(guarantee['target_epsilon'])})"
    sentences = [f"{figures}, when one record is added or removed."]
    second = guarantee.get("epsilon_second_accountant")
    if second is not None:
        sentences.append(f"A second, independent accountant computes epsilon {wording.epsilon(second)}.")
    plain = guarantee.get("epsilon_without_amplification")
    if plain is not None:
        sentences.append(f"Without counting on the random choice of records: epsilon {wording.epsilon(plain)}.")
    replaced = guarantee.get("epsilon_replace_one")
    if replaced is not None:
        sentences.append(f"When one record is replaced by another: epsilon {wording.epsilon(replaced)}.")
    return tuple(sentences)
