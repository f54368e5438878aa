"""Tables as CSV for people who open them in a spreadsheet, which must not run what it finds in a cell."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # with which a spreadsheet begins to compute (OWASP, CSV injection)


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as CSV with a header; a text that a spreadsheet would take for a formula begins with an apostrophe.

    Edge cases: numbers stay numbers, also negative ones; a column a row lacks is empty.
    """
    buffer = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(buffer, columns, restval="")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value
