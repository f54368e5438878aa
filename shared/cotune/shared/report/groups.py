"""How the result does by group of the public evaluation rows, beside the base model and the baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cotune.shared.report import wording
from cotune.shared.report.evidence import Evidence, Record
from cotune.shared.report.wording import ABSENT

FEW = 30  # rows of a group below which its interval is too wide to say much


@dataclass(frozen=True)
class Span:
    """An accuracy and its 95 % interval, in per cent, for drawing."""

    low: float
    value: float
    high: float


@dataclass(frozen=True)
class GroupRow:
    """One group, as printed."""

    group: str
    examples: str
    few: bool
    base: str
    federated: str
    interval: str
    base_span: Span | None
    span: Span | None
    others: tuple[str, ...]


@dataclass(frozen=True)
class Groups:
    """The table; `sentence` says why there is none where `rows` is empty."""

    column: str
    sentence: str
    rows: tuple[GroupRow, ...]
    baselines: tuple[str, ...]
    gaps: tuple[str, ...]


def build_groups(evidence: Evidence) -> Groups:
    """Per-group accuracy of base, federated model and baselines where the job names a group column."""
    final: Record = (evidence.summary.get("final") or {}).get("groups") or {}
    if not final.get("rows"):
        return Groups(str(evidence.job.eval.group_column or ""), _why_none(evidence), (), (), ())
    base = _by_group((evidence.summary.get("base") or {}).get("groups") or {})
    baselines = {
        str(one.get("name", "baseline")): (one.get("evaluation") or {}).get("groups") or {}
        for one in evidence.summary.get("baselines") or []
    }
    rows = tuple(
        _row(record, base.get(str(record.get("group")), {}), [_by_group(groups) for groups in baselines.values()])
        for record in final["rows"]
    )
    gaps = [("base model", (evidence.summary.get("base") or {}).get("groups") or {}), ("this run", final)]
    gaps += list(baselines.items())
    said = tuple(f"{name}: {_points(groups['gap'])}" for name, groups in gaps if groups.get("gap") is not None)
    return Groups(str(final.get("column", "")), _sentence(final, rows), rows, tuple(baselines), said)


def _why_none(evidence: Evidence) -> str:
    if not evidence.job.eval.group_column:
        return "Not measured by group: the job names no group column of the public evaluation rows (eval.group_column)."
    return "The job names a group column, but the result has no accuracy by group yet."


def _sentence(final: Record, rows: tuple[GroupRow, ...]) -> str:
    known = [record for record in final["rows"] if record.get("accuracy") is not None]
    if not known:
        return "The groups have no accuracy."
    worst, best = (pick(known, key=lambda record: record["accuracy"]) for pick in (min, max))
    said = (
        f"Accuracy goes from {wording.percent(worst['accuracy'])} ({worst.get('group')}) to "
        f"{wording.percent(best['accuracy'])} ({best.get('group')})"
    )
    bounds = (worst.get("accuracy_high"), best.get("accuracy_low"))
    if None in bounds:
        said += "."
    elif worst["accuracy_high"] < best["accuracy_low"]:
        said += "; their 95 % intervals do not overlap."
    else:
        said += "; their 95 % intervals overlap: it may be chance."
    few = sum(row.few for row in rows)
    return said + (f" {few} of {len(rows)} groups have fewer than {FEW} rows, too few to say much." if few else "")


def _row(record: Record, base: Record, others: list[Mapping[str, Record]]) -> GroupRow:
    name, examples = str(record.get("group", "")), record.get("examples")
    return GroupRow(
        group=name,
        examples=wording.count(examples),
        few=examples is not None and examples < FEW,
        base=wording.percent(base.get("accuracy")),
        federated=wording.percent(record.get("accuracy")),
        interval=wording.interval(record.get("accuracy_low"), record.get("accuracy_high")),
        base_span=_span(base),
        span=_span(record),
        others=tuple(wording.percent(groups.get(name, {}).get("accuracy")) for groups in others),
    )


def _span(record: Record) -> Span | None:
    values = [record.get(name) for name in ("accuracy_low", "accuracy", "accuracy_high")]
    low, value, high = (None if v is None else 100 * v for v in values)
    return None if low is None or value is None or high is None else Span(low, value, high)


def _by_group(groups: Record) -> Mapping[str, Record]:
    return {str(record.get("group")): record for record in groups.get("rows") or []}


def _points(gap: float | None) -> str:
    return ABSENT if gap is None else f"{100 * gap:.1f} points"
