"""The verdict: who is protected, against whom, how strongly, and what is not covered."""

from __future__ import annotations

from dataclasses import dataclass

from cotune.shared.report import wording
from cotune.shared.report.attacks import build_attacks
from cotune.shared.report.evidence import Evidence, Record

PERSON_LEVEL = "Persons. A person with several records has weaker protection than the figures here."
ANOTHER_SITE = "The same {noun} at more sites than the job says: the figure is for that many."
UNITS = {"example": "record", "unit": "person"}


@dataclass(frozen=True)
class Verdict:
    """Four answers. `banner` is empty only for a run whose privacy can be claimed.

    Attributes:
        strength: How strongly, for a reader who knows no mathematics.
        figures: The figures behind it, for one who does.
        attacked: What an attack measured, in a sentence; empty where the answers say it.
    """

    headline: str
    banner: str
    banner_text: str
    who: str
    against: str
    strength: tuple[str, ...]
    figures: tuple[str, ...]
    attacked: str
    right_of_hundred: int | None
    uncovered: tuple[str, ...]
    statement: str


def build_verdict(evidence: Evidence) -> Verdict:
    """The verdict on a run as it stands; without a claim nothing is promised."""
    if evidence.privacy != "private":
        return _non_private(evidence)
    if evidence.is_broken:
        return _broken(evidence)
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
        figures=(),
        attacked=build_attacks(evidence).sentence if evidence.attack else "",
        right_of_hundred=None,
        uncovered=("Everything. " + why,),
        statement="",
    )


def _broken(evidence: Evidence) -> Verdict:
    """A claim that a measurement contradicts is no claim any more; its own words are not repeated."""
    error: Record = evidence.state.get("error") or {}
    attacks = build_attacks(evidence)
    measured = attacks.sentence if evidence.attack else str(error.get("message") or "")
    return Verdict(
        headline="The privacy claim does not hold",
        banner="BROKEN BY ATTACK",
        banner_text="An attack got more out of this adapter than its claim allows. Do not publish it; what trained it "
        "has a fault.",
        who="Nobody: the guarantee that was claimed is refuted.",
        against="Nobody.",
        strength=(measured, "The claimed figures are not to be relied on."),
        figures=(),
        attacked="",
        right_of_hundred=None,
        uncovered=("Everything, until the fault is found and the run is made again.",),
        statement="",
    )


def _unclaimed(evidence: Evidence) -> Verdict:
    spent, ended = evidence.epsilon, evidence.state.get("status") in ("failed", "cancelled")
    noun = noun_of(evidence)
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
        against=f"The claim is to be for each single {noun} of any one site, against everyone outside that site, "
        "the coordinator included.",
        strength=strength,
        figures=(),
        attacked="",
        right_of_hundred=None,
        uncovered=(*((PERSON_LEVEL,) if noun == "record" else ()), ANOTHER_SITE.format(noun=noun)),
        statement="",
    )


def _claimed(evidence: Evidence) -> Verdict:
    guarantee = evidence.guarantee
    unit: Record = evidence.claim.get("unit") or {}
    definition = unit.get("definition")
    curve = [(point[0], point[1]) for point in guarantee.get("tradeoff") or []]
    right = wording.right_of_hundred(curve)
    listed = tuple(str(item) for item in evidence.claim.get("unprotected") or [])
    noun = noun_of(evidence)
    return Verdict(
        headline=f"Each {noun} is protected with epsilon {wording.epsilon(evidence.epsilon)} "
        f"and delta {wording.delta(guarantee.get('delta'))}",
        banner="",
        banner_text="",
        who=f"Each single {noun} of any one site: {definition or 'one row of its data'}.",
        against="Everyone outside that site, the coordinator included.",
        strength=(*_odds(curve, right, noun), *_persons(guarantee)),
        figures=_figures(guarantee, noun),
        attacked=build_attacks(evidence).sentence,
        right_of_hundred=right,
        uncovered=listed,
        statement=str(evidence.claim.get("statement") or ""),
    )


def noun_of(evidence: Evidence) -> str:
    """What is protected, in one word."""
    return UNITS.get(evidence.job.privacy.level, "record")


def _odds(curve: list[tuple[float, float]], right: int | None, noun: str) -> tuple[str, ...]:
    if right is None:
        return ("The claim carries no trade-off curve, so its odds cannot be given.",)
    sentences = [
        f"Of 100 guesses whether one given {noun} was used, 50 are right by chance; "
        f"with this adapter in hand, the best attack gets at most {right} right."
    ]
    found = wording.found_of_hundred(curve, 0.01)
    if found is not None:
        sentences.append(
            f"An attack that wrongly accuses 1 of 100 unused {noun}s finds at most {found} of 100 used ones."
        )
    return tuple(sentences)


def _persons(guarantee: Record) -> tuple[str, ...]:
    """What the figures mean for a person with several rows, where single rows are protected."""
    said = [
        f"epsilon {wording.epsilon(row['epsilon'])} with {row['records']} rows"
        for row in guarantee.get("person") or []
        if row.get("epsilon") is not None
    ]
    return (f"For a person with several rows it is weaker: {', '.join(said)}.",) if said else ()


def _figures(guarantee: Record, noun: str) -> tuple[str, ...]:
    spent, delta = wording.epsilon(guarantee.get("epsilon")), wording.delta(guarantee.get("delta"))
    figures = f"Epsilon {spent} at delta {delta}"
    if guarantee.get("target_epsilon") is not None:
        figures += f" (target {wording.epsilon(guarantee['target_epsilon'])})"
    change = "replaced by nothing" if guarantee.get("adjacency") == "zero-out-one" else "added or removed"
    sentences = [f"{figures}, when one {noun} is {change}."]
    second = guarantee.get("epsilon_second_accountant")
    if second is not None:
        sentences.append(f"A second, independent accountant computes epsilon {wording.epsilon(second)}.")
    plain = guarantee.get("epsilon_without_amplification")
    if plain is not None:
        sentences.append(f"Without counting on the random choice of {noun}s: epsilon {wording.epsilon(plain)}.")
    replaced = guarantee.get("epsilon_replace_one")
    if replaced is not None:
        sentences.append(f"When one {noun} is replaced by another: epsilon {wording.epsilon(replaced)}.")
    return tuple(sentences)
