"""How well the result does, beside the untouched base model and the baselines."""

from __future__ import annotations

from dataclasses import dataclass

from cotune.shared.report import wording
from cotune.shared.report.evidence import Evidence, Privacy, Record

FEDERATED: dict[Privacy, str] = {
    "private": "Federated, with differential privacy",
    "none": "Federated, NOT PRIVATE",
    "test-noise": "Federated, TEST NOISE: NOT PRIVATE",
}


@dataclass(frozen=True)
class Score:
    """One row of the result table, as printed."""

    name: str
    accuracy: str
    interval: str
    loss: str
    epsilon: str
    examples: str


def base_score(evidence: Evidence) -> Record:
    """The untouched base model's evaluation; empty when it was not scored."""
    first = [row for row in evidence.federation_rows if row.get("round") == 0]
    return evidence.summary.get("base") or (_evaluation(first[0]) if first else {})


def federated_score(evidence: Evidence) -> tuple[Record, str]:
    """The federated model's last evaluation, and a remark if it is not the final one."""
    if evidence.summary.get("final"):
        return evidence.summary["final"], ""
    scored = [row for row in evidence.federation_rows if row.get("round") and row.get("valid_loss") is not None]
    if not scored:
        return {}, " (not scored yet)"
    return _evaluation(scored[-1]), f" (after round {scored[-1]['round']}, not final)"


def measure(evidence: Evidence) -> str:
    """What the result table's first column of figures measures."""
    seen = [base_score(evidence), federated_score(evidence)[0]]
    return "Accuracy" if any(s.get("accuracy") is not None for s in seen) else "Token accuracy"


def score_rows(evidence: Evidence) -> tuple[Score, ...]:
    """Base model, federated model and baselines, the same figures for each."""
    final, remark = federated_score(evidence)
    base = base_score(evidence)
    spent = wording.epsilon(evidence.epsilon) if evidence.privacy == "private" else "none: not private"
    rows = [
        _score("Base model, untouched", base, "no record used"),
        _score(FEDERATED[evidence.privacy] + remark, final, spent),
    ]
    for baseline in evidence.summary.get("baselines") or []:
        bound = baseline.get("epsilon")
        void = bound is None or evidence.privacy == "test-noise"
        text = "none: not private" if void else wording.epsilon(bound)
        rows.append(_score(str(baseline.get("name", "baseline")), baseline.get("evaluation") or {}, text))
    if measure(evidence) == "Accuracy":
        return tuple(row for row, _ in rows)
    return tuple(
        Score(row.name, wording.percent(raw.get("token_accuracy")), "", row.loss, row.epsilon, row.examples)
        for row, raw in rows
    )


def comparison(evidence: Evidence) -> str:
    """Base against federated model in one sentence, with what the intervals allow one to say."""
    base, (final, _) = base_score(evidence), federated_score(evidence)
    if base.get("accuracy") is None or final.get("accuracy") is None:
        return ""
    before, after = wording.percent(base["accuracy"]), wording.percent(final["accuracy"])
    sentence = f"Accuracy went from {before} (base model) to {after} (federated)"
    bounds = [s.get(edge) for s in (base, final) for edge in ("accuracy_low", "accuracy_high")]
    if None in bounds:
        return f"{sentence}."
    apart = final["accuracy_low"] > base["accuracy_high"] or base["accuracy_low"] > final["accuracy_high"]
    return f"{sentence}; the 95 % intervals {'do not overlap' if apart else 'overlap: it may be chance'}."


def reload_check(evidence: Evidence) -> str:
    """Whether the adapter on disk behaves as the one that was trained."""
    check: Record = evidence.summary.get("reload") or {}
    if check.get("loss_saved") is None or check.get("loss_reloaded") is None:
        return "The saved adapter has not been read back and scored."
    saved, read = wording.decimal(check["loss_saved"]), wording.decimal(check["loss_reloaded"])
    return f"The saved adapter was read back and scored: loss {read}, when it was saved {saved}."


def _evaluation(row: Record) -> Record:
    return {**row, "loss": row.get("valid_loss")}


def _score(name: str, evaluation: Record, epsilon: str) -> tuple[Score, Record]:
    row = Score(
        name=name,
        accuracy=wording.percent(evaluation.get("accuracy")),
        interval=wording.interval(evaluation.get("accuracy_low"), evaluation.get("accuracy_high")),
        loss=wording.decimal(evaluation.get("loss")),
        epsilon=epsilon,
        examples=wording.count(evaluation.get("examples")),
    )
    return row, evaluation
