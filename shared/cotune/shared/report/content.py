"""What the report and the model card say: pure functions from a run's records to frozen values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cotune.shared.report import charts, hazards, wording
from cotune.shared.report.adversaries import Adversary, adversary_rows, trusted_parties
from cotune.shared.report.annexes import Annex, build_annexes
from cotune.shared.report.attacks import Attacks, build_attacks
from cotune.shared.report.budgets import Budget
from cotune.shared.report.charts import Chart, Level
from cotune.shared.report.evidence import Evidence, Privacy, Record
from cotune.shared.report.footprint import footprint_facts
from cotune.shared.report.groups import Groups, build_groups
from cotune.shared.report.method import Fact, load_snippet, mechanism_facts, training_facts
from cotune.shared.report.plainly import GLOSSARY, Answer, Term, plain_answers
from cotune.shared.report.scores import Score, base_score, comparison, measure, reload_check, score_rows
from cotune.shared.report.stereotypes import Stereotypes, build_stereotypes
from cotune.shared.report.verdict import Verdict, build_verdict
from cotune.shared.report.wording import ABSENT

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
class BudgetRow:
    """What one site's data had paid for, as printed."""

    site: str
    before: str
    this_run: str
    together: str
    remark: str


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
    baselines_run: bool
    reload: str
    sites: tuple[SiteRow, ...]
    sites_left_out: int
    training: tuple[Fact, ...]
    mechanism: tuple[Fact, ...]
    notes: tuple[Note, ...]
    snippet: str
    answers: tuple[Answer, ...]
    glossary: tuple[Term, ...]
    adversaries: tuple[Adversary, ...]
    trusted: str
    budgets: tuple[BudgetRow, ...]
    attacks: Attacks
    groups: Groups
    stereotypes: Stereotypes
    footprint: tuple[Fact, ...]
    hazards: tuple[hazards.Hazard, ...]
    pyramid: tuple[hazards.Level, ...]
    signers: tuple[str, ...]
    annexes: tuple[Annex, ...]


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
        baselines_run=bool(evidence.summary.get("baselines")),
        reload=reload_check(evidence),
        sites=sites[:MAX_SITES],
        sites_left_out=max(0, len(sites) - MAX_SITES),
        training=training_facts(evidence),
        mechanism=mechanism_facts(evidence),
        notes=build_notes(evidence.events),
        snippet=load_snippet(evidence),
        answers=plain_answers(evidence),
        glossary=GLOSSARY,
        adversaries=adversary_rows(evidence),
        trusted=trusted_parties(evidence),
        budgets=tuple(budget_row(budget) for budget in evidence.budgets),
        attacks=build_attacks(evidence),
        groups=build_groups(evidence),
        stereotypes=build_stereotypes(evidence),
        footprint=footprint_facts(evidence),
        hazards=hazards.build_hazards(evidence),
        pyramid=hazards.build_pyramid(evidence),
        signers=tuple(evidence.signatures),
        annexes=build_annexes(evidence),
    )


def budget_row(budget: Budget) -> BudgetRow:
    """One site's account in figures; a site made for this run alone cannot have had another."""
    without = "no bound"
    remark = budget.fault
    if budget.simulated:
        remark = "simulated: its ledger was made for this run"
    elif not remark:
        remark = f"{budget.other_runs} other runs"
    known = not budget.fault
    return BudgetRow(
        site=budget.site,
        before=(without if budget.before is None else wording.epsilon(budget.before)) if known else ABSENT,
        this_run=without if budget.this_run is None else wording.epsilon(budget.this_run),
        together=(without if budget.together is None else wording.epsilon(budget.together)) if known else ABSENT,
        remark=remark,
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
