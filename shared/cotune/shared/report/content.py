"""What the report and the model card say: pure functions from a run's records to frozen values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cotune.shared.report import charts, wording
from cotune.shared.report.charts import Chart, Level
from cotune.shared.report.evidence import Evidence, Privacy, Record
from cotune.shared.report.method import Fact, load_snippet, mechanism_facts, training_facts
from cotune.shared.report.verdict import Verdict, build_verdict
from cotune.shared.report.wording import ABSENT

FEDERATED: dict[Privacy, str] = {
    "private": "Federated, with differential privacy",
    "none": "Federated, NOT PRIVATE",
    "test-noise": "Federated, TEST NOISE: NOT PRIVATE",
}
OUTCOMES = {
    "queued": "Not started: nothing here is a result yet.",
    "running": "Still running: figures so far, not a result.",
    "paused": "Paused: figures so far, not a result.",
    "succeeded": "Finished.",
    "failed": "Failed: there is no result that may be published.",
    "cancelled": "Cancelled: there is no result that may be published.",
}
MAX_SITES = 200


@dataclass(frozen=True)
class Outcome:
    """How the run stands; `finished` once all that it publishes is written."""

    finished: bool
    status: str
    sentence: str
    round: str
    error: str
    hint: str


@dataclass(frozen=True)
class Score:
    """One row of the result table, as printed."""

    name: str
    accuracy: str
    interval: str
    loss: str
    epsilon: str
    examples: str


@dataclass(frozen=True)
class SiteRow:
    """One site's share of the run, as printed."""

    site: str
    epsilon: str
    delta: str
    steps: str
    bytes_up: str
    bytes_down: str


@dataclass(frozen=True)
class Note:
    """A warning or error the run recorded."""

    level: str
    when: str
    message: str


@dataclass(frozen=True)
class Content:
    """Everything a reader is told, in the order they are told it."""

    run_id: str
    name: str
    privacy: Privacy
    created: str
    outcome: Outcome
    verdict: Verdict
    measure: str
    scores: tuple[Score, ...]
    comparison: str
    reload: str
    charts: tuple[Chart, ...]
    sites: tuple[SiteRow, ...]
    sites_left_out: int
    training: tuple[Fact, ...]
    mechanism: tuple[Fact, ...]
    notes: tuple[Note, ...]
    snippet: str


def build_content(evidence: Evidence) -> Content:
    """Turn a run's records into what is said about it."""
    sites = site_rows(evidence)
    return Content(
        run_id=evidence.run_id,
        name=evidence.job.run.name,
        privacy=evidence.privacy,
        created=wording.moment(evidence.claim.get("created") or evidence.state.get("updated_at")),
        outcome=build_outcome(evidence),
        verdict=build_verdict(evidence),
        measure=measure(evidence),
        scores=score_rows(evidence),
        comparison=comparison(evidence),
        reload=reload_check(evidence),
        charts=build_charts(evidence),
        sites=sites[:MAX_SITES],
        sites_left_out=max(0, len(sites) - MAX_SITES),
        training=training_facts(evidence),
        mechanism=mechanism_facts(evidence),
        notes=build_notes(evidence.events),
        snippet=load_snippet(evidence),
    )


def build_outcome(evidence: Evidence) -> Outcome:
    """How the run stands, and what stopped it."""
    status = str(evidence.state.get("status", "unknown"))
    error: Record = evidence.state.get("error") or {}
    message = f"{error.get('code', '')}: {error.get('message', '')}" if error else ""
    rounds = f"{evidence.state.get('round', 0)} of {evidence.job.run.rounds}"
    # The card goes into the adapter's folder before the run can be called succeeded.
    closing = status == "running" and bool(evidence.summary) and bool(evidence.claim)
    sentence = "All rounds are done." if closing else OUTCOMES.get(status, "State unknown.")
    hint = str(error.get("hint") or "")
    return Outcome(closing or status == "succeeded", status, sentence, rounds, message, hint)


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


def build_charts(evidence: Evidence) -> tuple[Chart, ...]:
    """The charts that this run's records allow."""
    rows = evidence.federation_rows
    base = base_score(evidence)
    levels = [Level("base model", base["accuracy"])] if base.get("accuracy") is not None else []
    for baseline in evidence.summary.get("baselines") or []:
        value = (baseline.get("evaluation") or {}).get("accuracy")
        if value is not None:
            levels.append(Level(str(baseline.get("name", "baseline")), value))
    drawn = [charts.quality_chart(rows, levels)]
    if evidence.privacy == "private":
        drawn.append(charts.epsilon_chart(rows, evidence.job.privacy.epsilon))
    drawn.append(charts.bytes_chart(rows))
    return tuple(chart for chart in drawn if chart is not None)


def site_rows(evidence: Evidence) -> tuple[SiteRow, ...]:
    """Each site's epsilon, delta, steps and bytes; from the metrics while there is no summary."""
    private = evidence.privacy == "private"
    return tuple(
        SiteRow(
            site=str(row.get("site", ABSENT)),
            epsilon=wording.epsilon(row.get("epsilon")) if private else "none",
            delta=wording.delta(row.get("delta")) if private else "none",
            steps=wording.count(row.get("steps")),
            bytes_up=wording.size(row.get("bytes_up")),
            bytes_down=wording.size(row.get("bytes_down")),
        )
        for row in evidence.summary.get("sites") or _sites_so_far(evidence)
    )


def build_notes(events: Sequence[Record]) -> tuple[Note, ...]:
    """The warnings and errors among a run's events."""
    return tuple(
        Note(str(event["level"]), wording.moment(event.get("created_at")), str(event.get("message", "")))
        for event in events
        if event.get("level") in ("warn", "warning", "error")
    )


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


def _sites_so_far(evidence: Evidence) -> list[Record]:
    delta = evidence.job.privacy.delta
    sites: dict[str, list[Record]] = {}
    for row in evidence.metrics:
        if row.get("site"):
            sites.setdefault(str(row["site"]), []).append(row)
    return [
        {
            "site": site,
            "epsilon": rows[-1].get("epsilon"),
            "delta": delta if isinstance(delta, float) else None,
            "bytes_up": sum(row.get("bytes_up") or 0 for row in rows),
            "bytes_down": sum(row.get("bytes_down") or 0 for row in rows),
        }
        for site, rows in sorted(sites.items())
    ]
