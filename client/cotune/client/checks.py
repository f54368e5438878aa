"""What is worth knowing about record files before training: counts and row numbers, never a text.

These run where the records live; their counts are exact and are not for sending anywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from cotune.client.data import unit_of
from cotune.shared.errors import DataError
from cotune.shared.records import NOT_UTF8, Record, scan

Level = Literal["error", "warning", "info"]
SHOWN_ROWS = 20
MANY_ROWS = 4  # of one person, where the policy or job names no other number
LARGE_SHARE = 1 / 4
LONGEST = 5

PERSONAL = {
    "an e-mail address": re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,4}"),
    "a telephone number": re.compile(
        r"(?<!\d)(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)[ .-]?|\d{2,4}[ .-])\d{3,4}[ .-]\d{3,4}(?!\d)"
    ),
    "a number like a US social security number": re.compile(r"(?<!\d)\d{3}-\d{2}-\d{4}(?!\d)"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a check found.

    Attributes:
        level: Errors stop training, warnings deserve a look.
        code: Stable name.
        message: Counts, never a text.
        rows: The first row numbers it is about.
    """

    level: Level
    code: str
    message: str
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, repr=False)
class RecordFile:
    """A file as read: sound records by row number, and row numbers by what is wrong."""

    path: Path
    records: dict[int, Record]
    faults: dict[str, list[int]]

    @property
    def shape(self) -> str | None:
        """The shape of its records; None if none is sound."""
        return next((record.shape for record in self.records.values()), None)

    def repeated(self) -> list[int]:
        """Rows equal to an earlier row in everything trained on and in every column of one value."""
        seen: set[bytes] = set()
        rows: list[int] = []
        for row, record in self.records.items():
            before = len(seen)
            seen.add(record.fingerprint(columns=True))
            if len(seen) == before:
                rows.append(row)
        return rows


def read_file(path: Path) -> RecordFile:
    """Read a file's good and bad rows.

    Raises:
        DataError: It is no readable file, or has no rows.
    """
    file = RecordFile(path, {}, {})
    for row in scan(path):
        if row.record is not None:
            file.records[row.number] = row.record
        elif row.fault is not None:
            file.faults.setdefault(row.fault, []).append(row.number)
    return file


def check_file(file: RecordFile) -> list[Finding]:
    """Everything the checks of one file find."""
    return [finding for check in FILE_CHECKS for finding in check(file)]


def check_together(files: Sequence[RecordFile]) -> list[Finding]:
    """Everything the checks over all files find."""
    return [finding for check in TOGETHER_CHECKS for finding in check(files)]


def check_units(file: RecordFile, column: str, max_per_unit: int | None) -> list[Finding]:
    """Whether every row says whose it is, and how many rows persons have: counts, never who.

    Args:
        file: A file as read.
        column: The unit column.
        max_per_unit: Rows of one person that are used at most, if that is known.
    """
    owners = {row: _owner(record, column) for row, record in file.records.items()}
    nobodys = [row for row, owner in owners.items() if owner is None]
    rows = Counter(owner for owner in owners.values() if owner is not None)
    found = _some(nobodys, "error", "E-UNIT", f"with nothing in the unit column `{column}`")
    if not rows:
        return found
    found.append(Finding("info", "I-UNIT", f"{len(rows):,} persons by their rows: {_histogram(rows)}"))
    most, limit = max(rows.values()), max_per_unit or MANY_ROWS
    above = sum(count > limit for count in rows.values())
    if above:
        what = f"{above:,} of {len(rows):,} persons have more than {limit} rows, up to {most:,}"
        advice = f"{limit} of them are used" if max_per_unit else "set data.max_per_unit, or protect whole persons"
        found.append(Finding("warning", "W-UNIT-MAX", f"{what}: {advice}"))
    if most > LARGE_SHARE * rows.total():
        text = f"one person owns {most / rows.total():.0%} of the rows: what is learnt is mostly theirs"
        found.append(Finding("warning", "W-UNIT-SHARE", text))
    return found


def unit_error(path: Path, findings: Sequence[Finding], column: str) -> DataError | None:
    """The error for a file with rows of nobody, if `check_units` found some."""
    for finding in findings:
        if finding.code == "E-UNIT":
            return DataError(
                "E-UNIT",
                f"{path.name}: {finding.message}: without it only single rows can be protected",
                param="data.unit",
                hint=f"give every row a `{column}`, or leave those rows out",
            )
    return None


def _owner(record: Record, column: str) -> str | None:
    try:
        return unit_of(record, column, 0)
    except DataError:
        return None


def _histogram(rows: Counter[str]) -> str:
    """Persons with 1, 2, 3-4, 5-8, 9-16 ... rows."""
    buckets = Counter((count - 1).bit_length() for count in rows.values())
    edges = {power: (2**power // 2 + 1, 2**power) for power in buckets}
    named = {power: str(high) if low >= high else f"{low:,}-{high:,}" for power, (low, high) in edges.items()}
    return ", ".join(f"{named[power]}: {buckets[power]:,}" for power in sorted(buckets))


def _unusable(file: RecordFile) -> list[Finding]:
    return [
        _about(rows, "error", "E-DATA-ENCODING" if fault == NOT_UTF8 else "E-DATA-ROW", fault)
        for fault, rows in file.faults.items()
    ]


def _duplicates(file: RecordFile) -> list[Finding]:
    return _some(file.repeated(), "warning", "W-DATA-DUPLICATE", "equal to an earlier row")


def _spacing(file: RecordFile) -> list[Finding]:
    rows = [
        row
        for row, record in file.records.items()
        if record.shape == "completion" and not (record.prompt[-1].isspace() or record.completion[0].isspace())
    ]
    what = "whose completion follows the prompt without a space: start the completion with one"
    return _some(rows, "warning", "W-DATA-SPACE", what)


def _targets(file: RecordFile) -> list[Finding]:
    targets = Counter(target for record in file.records.values() for target in _target(record))
    if not targets:
        return []
    kind = "labels" if file.shape == "label" else "completions"
    total, largest, least = targets.total(), max(targets.values()), min(targets.values())
    if len(targets) == 1 and total > 1:
        return [Finding("warning", "W-DATA-ONE-TARGET", f"all {kind} are the same: there is nothing to learn")]
    spread = f"{len(targets):,} distinct {kind}; the commonest has {largest:,} rows, the rarest {least:,}"
    return [Finding("info", "I-DATA-TARGETS", spread)]


def _target(record: Record) -> tuple[str, ...]:
    if record.shape == "messages":
        return tuple(content for role, content in record.messages if role == "assistant")[-1:]
    return {"completion": (record.completion,), "label": (record.label,), "text": ()}[record.shape]


def _lengths(file: RecordFile) -> list[Finding]:
    lengths = {row: sum(map(len, record.contents())) for row, record in file.records.items()}
    if not lengths:
        return []
    marks = np.percentile(list(lengths.values()), [50, 90, 99, 100], method="higher").astype(int).tolist()
    longest = sorted(lengths, key=lambda row: (-lengths[row], row))[:LONGEST]
    text = "characters: half have at most {:,}, 90 % {:,}, 99 % {:,}, all {:,}; the longest rows".format(*marks)
    return [Finding("info", "I-DATA-LENGTH", text, tuple(longest))]


def _personal(file: RecordFile) -> list[Finding]:
    return [
        finding
        for kind, pattern in PERSONAL.items()
        for finding in _some(
            [row for row, record in file.records.items() if any(pattern.search(text) for text in record.contents())],
            "warning",
            "W-DATA-PERSONAL",
            f"with {kind}",
        )
    ]


def _overlap(files: Sequence[RecordFile]) -> list[Finding]:
    prints = [{row: record.fingerprint(columns=False) for row, record in file.records.items()} for file in files]
    found: list[Finding] = []
    for first, second in combinations(range(len(files)), 2):
        known = set(prints[first].values())
        rows = [row for row, fingerprint in prints[second].items() if fingerprint in known]
        what = f"of {files[second].path.name} also in {files[first].path.name}: no score on them can be trusted"
        found += _some(rows, "warning", "W-DATA-OVERLAP", what)
    return found


def _shapes(files: Sequence[RecordFile]) -> list[Finding]:
    shapes = sorted({file.shape for file in files if file.shape})
    if len(shapes) < 2:
        return []
    return [Finding("warning", "W-DATA-SHAPES", f"the files have different shapes: {', '.join(shapes)}")]


def _records_per_site(files: Sequence[RecordFile]) -> list[Finding]:
    smallest = min(len(file.records) for file in files)
    if not smallest:
        return []
    digit = 10 ** (len(str(smallest)) - 1)
    of = "the smallest file" if len(files) > 1 else "this file"
    text = f"data.records_per_site = {smallest // digit * digit} suits {of} if each is a site; it is public"
    return [Finding("info", "I-DATA-RECORDS-PER-SITE", text)]


FILE_CHECKS: tuple[Callable[[RecordFile], list[Finding]], ...] = (
    _unusable, _duplicates, _spacing, _targets, _lengths, _personal,
)  # fmt: skip
TOGETHER_CHECKS: tuple[Callable[[Sequence[RecordFile]], list[Finding]], ...] = (
    _overlap, _shapes, _records_per_site,
)  # fmt: skip


def _some(rows: Sequence[int], level: Level, code: str, what: str) -> list[Finding]:
    return [_about(rows, level, code, what)] if rows else []


def _about(rows: Sequence[int], level: Level, code: str, what: str) -> Finding:
    return Finding(level, code, f"{len(rows):,} row{'s' if len(rows) > 1 else ''} {what}", tuple(rows[:SHOWN_ROWS]))
