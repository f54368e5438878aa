"""Who is where in a simulated federation: what its owner should know of the persons before any round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from cotune.client.checks import LARGE_SHARE
from cotune.client.data import unit_of
from cotune.shared.errors import DataError
from cotune.shared.job import Job
from cotune.shared.records import Record


def check_sites(job: Job, records: Mapping[str, Sequence[Record]], say: Callable[[str], None]) -> None:
    """Check every site's records against what the job says of them in public.

    In a simulation one owner has all the data and is told of it; a real site answers nothing of this kind.

    Raises:
        DataError: A row has no person, a site has too few of them, or persons are at more sites than agreed.
    """
    for site, found in records.items():
        if not found:
            raise DataError("E-DATA-SITE-EMPTY", f"{site}: no record", hint="cotune data check FILE")
    column = job.data.unit_column
    if column is None:
        return
    rows = {site: _rows_by_person(found, column) for site, found in records.items()}
    for site, persons in rows.items():
        _check_site(job, site, persons, say)
    _check_overlap(job, rows)


def _rows_by_person(records: Sequence[Record], column: str) -> Counter[str]:
    return Counter(unit_of(record, column, row) for row, record in enumerate(records))


def _check_site(job: Job, site: str, persons: Counter[str], say: Callable[[str], None]) -> None:
    if job.privacy.level == "unit" and len(persons) < job.train.batch_size:
        raise DataError(
            "E-UNIT-FEW",
            f"{site}: holds {len(persons):,} persons, fewer than the {job.train.batch_size} expected in a batch:"
            " noise made for many would fall on few",
            param="train.batch_size",
            hint=f"data.units_per_site={len(persons)} train.batch_size={max(1, len(persons) // 4)}",
        )
    largest, total = max(persons.values()), persons.total()
    if job.data.max_per_unit is None and largest > LARGE_SHARE * total:
        say(
            f"W-UNIT-SHARE  {site}: one person owns {largest / total:.0%} of the rows; clipping bounds their weight,"
            " data.max_per_unit their cost"
        )
    if job.privacy.level == "example" and job.data.max_per_unit is None:
        say(
            f"W-UNIT-MAX  {site}: persons have up to {largest:,} rows, and single rows are protected:"
            ' set privacy.level = "unit", or data.max_per_unit'
        )


def _check_overlap(job: Job, rows: Mapping[str, Counter[str]]) -> None:
    places = Counter(person for persons in rows.values() for person in persons)
    most = max(places.values())
    if most > job.data.sites_per_unit:
        raise DataError(
            "E-UNIT-OVERLAP",
            f"persons are at up to {most} sites, the job says {job.data.sites_per_unit}: its claim would not hold",
            param="data.sites_per_unit",
            hint=f"data.sites_per_unit={most}, which composes that many sites' events",
        )
