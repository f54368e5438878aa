"""The run for readers who know neither machine learning nor privacy mathematics."""

from __future__ import annotations

from typing import NamedTuple

from cotune.shared.report import wording
from cotune.shared.report.evidence import Evidence, Record
from cotune.shared.report.verdict import noun_of


class Answer(NamedTuple):
    """A question somebody asks, and its answer from this run's records."""

    question: str
    answer: str


class Term(NamedTuple):
    """A word of this page and what it means."""

    term: str
    meaning: str


GLOSSARY = (
    Term("Adapter", "The small part of a language model that was trained here, and all that the run gives away."),
    Term("Site", "Whoever holds records: a hospital, a bank, an office. Records stay there."),
    Term("Coordinator", "Who sends the adapter round and joins what comes back. It is never sent a record."),
    Term(
        "Epsilon and delta",
        "Two numbers that bound how much one record or person can change what is published. Smaller is stronger. "
        "Delta is a small chance on which the bound is not counted.",
    ),
    Term(
        "Trade-off curve", "For every share of wrong accusations, the largest share of right ones an attack can reach."
    ),
    Term("Canary", "A made-up record that is put into training to see whether it can be found in the result."),
    Term("Control", "The same training without privacy, attacked in the same way, to show that the attack works."),
    Term("Ledger", "A site's own account of everything it gave, in which no line can be changed unseen."),
)


DEGREES = ((60, "Hardly better than by guessing"), (75, "Better than by guessing"), (100, "Quite possibly"))


def plain_answers(evidence: Evidence) -> tuple[Answer, ...]:
    """What was done, what is given away, what somebody may learn from it, and how to check."""
    return (
        Answer("What was done?", _done(evidence)),
        Answer("What left the sites?", _left(evidence)),
        Answer("Could somebody find out that I was in the data?", _found_out(evidence)),
        Answer("Could it repeat what I wrote?", _repeated(evidence)),
        Answer("Whose word is this?", "The figures follow from records in the run's folder, which anybody who is given "
               "it can check without trusting who wrote this page."),
    )  # fmt: skip


def _done(evidence: Evidence) -> str:
    sites = len(evidence.summary.get("sites") or []) or evidence.job.sites
    simulated = evidence.summary.get("engine") not in (None, "deployed")
    who = f"{sites} site{'' if sites == 1 else 's'}"
    where = "Their records were never put in one place."
    if simulated:
        where = "It was a trial on one machine that played all the sites."
    return f"{who[0].upper()}{who[1:]} trained one language model together. {where}"


def _left(evidence: Evidence) -> str:
    if evidence.privacy != "private":
        return "Updates of the adapter, without protection. Records can be read out of such updates."
    return "Updates of the adapter, which each site had limited and blurred with random noise before they left."


def _found_out(evidence: Evidence) -> str:
    if evidence.privacy != "private" or evidence.is_broken:
        return "Yes. Nothing here prevents it."
    right = wording.right_of_hundred([(p[0], p[1]) for p in evidence.guarantee.get("tradeoff") or []])
    if right is None:
        return "This run makes no statement on it."
    noun = noun_of(evidence)
    some = "one row of yours" if noun == "record" else "you"
    degree = next(word for most, word in DEGREES if right <= most)
    return (
        f"{degree}: whoever guesses whether {some} took part is right 50 times in 100 by chance, and at most {right} "
        "times with this model."
    )


def _repeated(evidence: Evidence) -> str:
    run: Record = evidence.attack.get("run") or {}
    control: Record = (evidence.attack.get("control") or {}).get("results") or {}
    ours, others = (results.get("secrets") or {} for results in (run, control))
    if not ours.get("planted"):
        return "It was not tried out on this run."
    said = (
        f"It was tried out: of {ours['planted']} made-up secrets in the training data, {ours.get('recovered')} came out"
    )
    if not others.get("planted"):
        return f"{said}."
    return f"{said}; from a model trained without privacy, {others.get('recovered')} of {others['planted']}."
