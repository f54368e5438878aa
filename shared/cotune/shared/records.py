"""Training records: JSON lines in four shapes, read strictly. Errors name rows by number, never by text.

    completion   {"prompt": "…", "completion": "…"}
    messages     {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    label        {"text": "…", "label": "…"}
    text         {"text": "…"}

A row may have other columns; those that hold one value are kept, to split records over sites by.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args

from cotune.shared.errors import DataError

Shape = Literal["completion", "messages", "text", "label"]
Scalar = str | int | float | bool | None

SHAPE_FIELDS: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "label": ("text", "label"),
    "text": ("text",),
}  # in the order a row's shape is looked for
_TEXTS = ("prompt", "completion", "text", "label")
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_LINE_BYTES = 1_000_000
MAX_DIGITS = 300  # what a float can hold; the interpreter itself refuses a few thousand

TOO_LONG = f"longer than {MAX_LINE_BYTES:,} bytes"
NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NOT_AN_OBJECT = "not a JSON object"
TWICE = "with the same field twice"
NO_NUMBER = "with NaN, Infinity or a number too large"
TOO_DEEP = "nested too deeply"
SURROGATE = "with half a surrogate pair"
OTHER_SHAPE = "of another shape than the first good row"
NO_SHAPE = "without messages, prompt and completion, or text"
NO_ANSWER = "with no assistant message"
SHOWN_ROWS = 5


@dataclass(frozen=True, slots=True, repr=False)
class Record:
    """One training example. Its `repr` shows no content; a field its row does not have is empty."""

    shape: Shape
    prompt: str
    completion: str
    text: str
    label: str
    messages: tuple[tuple[str, str], ...]
    columns: Mapping[str, Scalar] = field(hash=False)

    def contents(self) -> tuple[str, ...]:
        """The texts that are trained on, in order."""
        if self.shape == "messages":
            return tuple(content for _, content in self.messages)
        return tuple(cast(str, getattr(self, name)) for name in SHAPE_FIELDS[self.shape])

    def fingerprint(self, *, columns: bool) -> bytes:
        """A digest that is equal for equal records.

        Args:
            columns: Whether every column counts, or only what is trained on.
        """
        roles = [role for role, _ in self.messages]
        extra = sorted(self.columns.items()) if columns else []
        whole = json.dumps([self.shape, roles, self.contents(), extra])
        return hashlib.sha256(whole.encode()).digest()[:16]


@dataclass(frozen=True, slots=True, repr=False)
class Row:
    """One line of a file: its number from 1, its bytes, and either a record or what is wrong with it."""

    number: int
    line: bytes
    record: Record | None
    fault: str | None


class _Unusable(Exception):
    """A row that cannot be used; the message is one of this module's own phrases."""


def read_records(path: Path, shape: Shape | Literal["auto"] = "auto") -> list[Record]:
    """All records of a file, every one of them sound.

    Args:
        path: A regular file of JSON lines.
        shape: The shape every row must have; ``auto``: that of the first row.

    Raises:
        DataError: E-DATA-FILE, E-DATA-EMPTY, E-DATA-ENCODING or E-DATA-ROW, with row numbers.
    """
    records: list[Record] = []
    faults: dict[str, list[int]] = {}
    for row in scan(path, shape):
        if row.record is not None:
            records.append(row.record)
        elif row.fault is not None:
            faults.setdefault(row.fault, []).append(row.number)
    if faults:
        raise bad_rows(path, faults, len(records))
    return records


def bad_rows(path: Path, faults: Mapping[str, list[int]], good: int) -> DataError:
    """The error for a file with rows that cannot be used.

    Args:
        path: The file; only its name is told.
        faults: Row numbers by what is wrong.
        good: How many rows can be used.
    """
    bad = sum(map(len, faults.values()))
    reasons = "; ".join(f"{len(rows):,} {fault} ({_numbers(rows)})" for fault, rows in faults.items())
    return DataError(
        "E-DATA-ENCODING" if NOT_UTF8 in faults else "E-DATA-ROW",
        f"{path.name}: {bad:,} of {bad + good:,} rows cannot be used: {reasons}",
        hint=f"cotune data check {path.name} --fix out/",
    )


def scan(path: Path, shape: Shape | Literal["auto"] = "auto") -> Iterator[Row]:
    """Each row of a file, good or bad. Blank lines are passed over but counted; lines end in LF or CRLF only.

    Raises:
        DataError: E-DATA-FILE if it is no readable file, E-DATA-EMPTY if it has no rows.
    """
    first: Shape | None = None
    rows = 0
    for number, line in _lines(path):
        rows += 1
        record, fault = _parse(line, shape)
        if record is not None:
            first = first or record.shape
            if record.shape != first:
                record, fault = None, OTHER_SHAPE
        yield Row(number, line, record, fault)
    if not rows:
        raise DataError("E-DATA-EMPTY", f"{path.name}: expected one JSON object a line, found no rows")


def _numbers(rows: list[int]) -> str:
    shown = ", ".join(str(number) for number in rows[:SHOWN_ROWS])
    return f"row{'s' if len(rows) > 1 else ''} {shown}{', …' if len(rows) > SHOWN_ROWS else ''}"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered; no more than `MAX_LINE_BYTES` + 2 of each is ever held."""
    reason = ""
    try:
        if stat.S_ISREG(path.stat().st_mode):  # a FIFO would wait for a writer for ever
            with path.open("rb") as file:
                number = 0
                while piece := file.readline(MAX_LINE_BYTES + 2):
                    number += 1
                    rest = piece
                    while rest and not rest.endswith(b"\n"):
                        rest = file.readline(65_536)
                    line = piece.removeprefix(b"\xef\xbb\xbf") if number == 1 else piece
                    if line.strip():
                        yield number, line
            return
        reason = "not a regular file"
    except (OSError, ValueError) as error:  # ValueError: a path that cannot be one
        reason = getattr(error, "strerror", None) or type(error).__name__
    raise DataError("E-DATA-FILE", f"{path.name}: expected a file of JSON lines ({reason})", param="data")


def _parse(line: bytes, shape: Shape | Literal["auto"]) -> tuple[Record | None, str | None]:
    try:
        if len(line.rstrip(b"\r\n")) > MAX_LINE_BYTES:
            raise _Unusable(TOO_LONG)
        return _record(_object(line), shape), None
    except _Unusable as fault:
        return None, str(fault)


def _object(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_once, parse_constant=_no_number, parse_int=_integer, parse_float=_float
        )
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise _Unusable(NOT_UTF8) from None
    except UnicodeEncodeError:
        raise _Unusable(SURROGATE) from None
    except RecursionError:
        raise _Unusable(TOO_DEEP) from None
    except ValueError:
        raise _Unusable(NOT_JSON) from None
    if not isinstance(value, dict):
        raise _Unusable(NOT_AN_OBJECT)
    return cast(dict[str, Any], value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _Unusable(TWICE)
    return value


def _no_number(_: str) -> NoReturn:
    raise _Unusable(NO_NUMBER)


def _integer(digits: str) -> int:
    return int(digits) if len(digits) <= MAX_DIGITS else _no_number(digits)


def _float(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_number(digits)


def _record(row: dict[str, Any], shape: Shape | Literal["auto"]) -> Record:
    found = _shape_of(row) if shape == "auto" else shape
    for name in SHAPE_FIELDS[found]:
        if name != "messages":
            _require_text(row.get(name), name)
    messages = _messages(row.get("messages")) if found == "messages" else ()
    columns = {key: value for key, value in row.items() if isinstance(value, get_args(Scalar))}
    known = [value if isinstance(value := columns.get(name), str) else "" for name in _TEXTS]
    return Record(found, *known, messages=messages, columns=columns)


def _shape_of(row: dict[str, Any]) -> Shape:
    present = {key for key, value in row.items() if value is not None}
    for shape, fields in SHAPE_FIELDS.items():
        if present.issuperset(fields):
            return shape
    if present & {"prompt", "completion"}:
        return "completion"  # and its missing half is what the error names
    raise _Unusable(NO_SHAPE)


def _require_text(value: object, name: str) -> None:
    if value is None:
        raise _Unusable(f"without `{name}`")
    if not isinstance(value, str):
        raise _Unusable(f"whose `{name}` is not a text")
    if not value.strip():
        raise _Unusable(f"with an empty `{name}`")


def _messages(value: object) -> tuple[tuple[str, str], ...]:
    if value is None:
        raise _Unusable("without `messages`")
    if not isinstance(value, list):
        raise _Unusable("whose `messages` is not a list")
    messages: list[tuple[str, str]] = []
    for item in cast(list[object], value):
        if not isinstance(item, dict):
            raise _Unusable("whose `messages` are not all objects")
        message = cast(dict[str, object], item)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _Unusable(f"with a role other than {', '.join(ROLES)}")
        _require_text(content, "content")
        messages.append((cast(str, role), cast(str, content)))
    if all(role != "assistant" for role, _ in messages):
        raise _Unusable(NO_ANSWER)
    return tuple(messages)
