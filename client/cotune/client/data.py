"""A site's records as examples, and whose they are. Never leaves this room."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.shared.errors import DataError
from cotune.shared.examples import Example, tokenize
from cotune.shared.job import Job
from cotune.shared.records import Record


@dataclass(frozen=True, repr=False)
class SiteExamples:
    """Examples and the unit each belongs to. Sensitive: it has no repr.

    Attributes:
        examples: n examples.
        owners: Unit of each example, shape (n,), values 0 to units - 1, every unit at least once.
        units: How many units there are: what is sampled, clipped and counted.
    """

    examples: Sequence[Example]
    owners: NDArray[np.intp]
    units: int

    def rows(self, unit: int) -> NDArray[np.intp]:
        """Indices of a unit's examples, in order."""
        return self._rows[unit]

    def __post_init__(self) -> None:
        order = np.argsort(self.owners, kind="stable")
        ends = np.searchsorted(self.owners[order], np.arange(1, self.units))
        object.__setattr__(self, "_rows", np.split(order, ends))

    _rows: Sequence[NDArray[np.intp]] = ()


def prepare(records: Sequence[Record], tokenizer: object, job: Job) -> SiteExamples:
    """Records as examples with their units.

    Guarantee: with `privacy.level = "unit"` all of a person's examples have one owner, and every row has a
    person; with `data.max_per_unit` no person has more examples than that, at either level, whichever rows
    others have. So a person adds or removes at most one unit, or `max_per_unit` units of one row.

    Edge cases: a row without a person's id is refused, never guessed or shared; no record gives no unit.

    Raises:
        DataError: The unit column is missing or null in some rows, or a row cannot be an example.
    """
    kept, owners = _owned(records, job)
    examples = tokenize([records[row] for row in kept], tokenizer, job)
    if job.privacy.level != "unit":
        owners = np.arange(len(kept))
    return SiteExamples(examples, owners, int(owners.max()) + 1 if len(owners) else 0)


def _owned(records: Sequence[Record], job: Job) -> tuple[list[int], NDArray[np.intp]]:
    """Rows that are used, and the person of each, numbered as they first come."""
    column, most = job.data.unit_column, job.data.max_per_unit
    if column is None:
        return list(range(len(records))), np.arange(len(records))
    persons: dict[str, int] = {}
    kept: list[int] = []
    owners: list[int] = []
    count: dict[int, int] = {}
    for row, record in enumerate(records):
        person = persons.setdefault(unit_of(record, column, row), len(persons))
        count[person] = count.get(person, 0) + 1
        if most is None or count[person] <= most:
            kept.append(row)
            owners.append(person)
    return kept, np.array(owners, dtype=np.intp)


def unit_of(record: Record, column: str, row: int) -> str:
    """The person a record belongs to, as text: 7, 7.0 and " 7" are one person, and so are two spellings of one text.

    Raises:
        DataError: E-UNIT: it has no such column, or nothing in it.
    """
    value = record.columns.get(column)
    if value is None or not str(value).strip():
        raise DataError(
            "E-UNIT",
            f"record {row + 1} has nothing in the unit column `{column}`: without it nobody knows whose row it is",
            param="data.unit",
            hint=f"cotune data check FILE --unit column:{column}",
        )
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return unicodedata.normalize("NFC", str(value)).strip()
