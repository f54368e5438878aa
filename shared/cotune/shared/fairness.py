"""Accuracy by group of public evaluation rows, by Fairlearn; optional. Never of anybody's private records."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from cotune.shared.errors import DataError, JobError
from cotune.shared.records import Record

MAX_GROUPS = 50  # more values than this are no groups but names
UNKNOWN = "(none)"


def groups_of(records: Sequence[Record], column: str) -> list[str]:
    """Each row's group: its value in a column, as text; `(none)` where a row has no value there.

    Raises:
        JobError: Fairlearn is not installed (E-FAIRNESS).
        DataError: No row has the column, or it has too many values to be groups (E-GROUP-COLUMN).
    """
    if find_spec("fairlearn") is None:
        raise JobError(
            "E-FAIRNESS", "eval.group_column needs Fairlearn, which is not installed", param="eval.group_column",
            hint="python -m pip install 'cotune[fairness]'",
        )  # fmt: skip
    values = [record.columns.get(column) for record in records]
    groups = [UNKNOWN if value is None or value == "" else str(value) for value in values]
    if set(groups) <= {UNKNOWN}:
        raise DataError(
            "E-GROUP-COLUMN", f"no row of the public evaluation file has a value in column `{column}`",
            param="eval.group_column", hint="name a column of that file, or leave eval.group_column out",
        )  # fmt: skip
    if len(set(groups)) > MAX_GROUPS:
        raise DataError(
            "E-GROUP-COLUMN",
            f"column `{column}` has {len(set(groups))} values; expected at most {MAX_GROUPS} groups",
            param="eval.group_column", hint="name a column with few values, such as an age band",
        )  # fmt: skip
    return groups


def by_group(column: str, groups: Sequence[str], hits: Sequence[float]) -> dict[str, Any]:
    """Accuracy of each group with its 95 % Wilson interval, and the gap between the best and the worst.

    Args:
        column: What the groups are values of.
        groups: Each row's group.
        hits: Each row's 1 if the model was right, else 0.
    """
    from fairlearn.metrics import MetricFrame, count
    from sklearn.metrics import accuracy_score

    right = [round(hit) for hit in hits]
    frame: Any = MetricFrame(
        metrics={"accuracy": accuracy_score, "examples": count},
        y_true=[1] * len(right),
        y_pred=right,
        sensitive_features=list(groups),
    )
    rows: list[dict[str, Any]] = []
    for group, figures in frame.by_group.iterrows():
        accuracy, examples = float(figures["accuracy"]), int(figures["examples"])
        low, high = wilson_interval(round(accuracy * examples), examples)
        rows.append(
            {
                "group": str(group),
                "examples": examples,
                "accuracy": accuracy,
                "accuracy_low": low,
                "accuracy_high": high,
            }
        )
    return {"column": column, "rows": rows, "gap": float(frame.difference()["accuracy"])}


def wilson_interval(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score."""
    from scipy.stats import binomtest

    interval = binomtest(right, of).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
