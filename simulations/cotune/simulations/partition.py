"""One file's records over simulated sites: alike, unlike in their labels, or by a column."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cotune.client.data import unit_of
from cotune.shared.errors import DataError
from cotune.shared.records import Record
from cotune.shared.sections import DataSettings

_STREAM = int.from_bytes(b"split")  # tells this use of the job's seed from every other


def split(records: Sequence[Record], settings: DataSettings, sites: int, seed: int) -> dict[str, list[int]]:
    """Rows by site; every row is at exactly one site, and the same arguments give the same split.

    iid: at random; with a unit column whole persons are, so that nobody is at two sites. dirichlet: site by
    site, rows are drawn without replacement by label proportions from a symmetric Dirichlet(alpha); a label
    that runs out leaves its share to the others (Hsu et al. 2019, arXiv 1909.06335). Both give sizes that
    differ by one row (or person) at most. column: a site for each value.

    Args:
        records: All records.
        settings: `split`, `split_column` and `alpha`.
        sites: How many sites there are; for a column its values say.
        seed: Public; the same for everyone.

    Returns:
        Site names, in order, with ascending indices into `records`.

    Raises:
        DataError: E-DATA-COLUMN, E-DATA-SITE-NAME or E-DATA-SITE-EMPTY.
    """
    if settings.split == "column":
        return _by_column(_values(records, settings.split_column))
    units = _units(records, settings.unit_column)
    _require_enough(len(units), sites, settings)
    generator = np.random.default_rng([seed, _STREAM])
    shares = [len(part) for part in np.array_split(np.arange(len(units)), sites)]
    if settings.split == "iid":
        parts = np.split(generator.permutation(len(units)), np.cumsum(shares)[:-1])
    else:
        labels = _values(records, settings.split_column)
        parts = _dirichlet(labels, shares, settings.alpha, generator)
    return {
        f"site-{number}": sorted(row for unit in part for row in units[unit]) for number, part in enumerate(parts, 1)
    }


def _require_enough(units: int, sites: int, settings: DataSettings) -> None:
    if units < sites:
        what = "persons" if settings.unit_column else "records"
        raise DataError(
            "E-DATA-SITE-EMPTY",
            f"site-{units + 1} would get no record: {units:,} {what} for {sites:,} sites",
            param="federation.sites",
            hint=f"federation.sites={units} or fewer" if units else "give a file with records",
        )


def _units(records: Sequence[Record], column: str | None) -> list[list[int]]:
    """Rows of each unit, in the order units first come; without a column each row is one."""
    if column is None:
        return [[row] for row in range(len(records))]
    rows: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        rows.setdefault(unit_of(record, column, row), []).append(row)
    return list(rows.values())


def _values(records: Sequence[Record], column: str | None) -> list[str]:
    """A column's value in every record; null counts as missing."""
    values = [record.columns.get(column or "") for record in records]
    missing = sum(value is None for value in values)
    if missing or not column:
        raise DataError(
            "E-DATA-COLUMN",
            f"expected `{column}` in every record; {missing:,} of {len(records):,} have no such value",
            param="data.split_column",
            hint='data.split="iid" needs no column',
        )
    return [str(value) for value in values]


def _by_column(values: list[str]) -> dict[str, list[int]]:
    named = {value: _site_name(value) for value in set(values)}
    clashes = len(named) - len({name for name in named.values() if name})
    if clashes:
        raise DataError(
            "E-DATA-SITE-NAME",
            f"{clashes:,} of {len(named):,} values of the column make no site name of their own "
            "(letters, digits and dashes; 40 at most)",
            param="data.split_column",
        )
    if not values:
        raise DataError("E-DATA-SITE-EMPTY", "expected records to split, got none", param="data.train")
    rows: dict[str, list[int]] = {name: [] for name in sorted(named.values())}
    for index, value in enumerate(values):
        rows[named[value]].append(index)
    return rows


def _site_name(value: str) -> str:
    plain = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40]


def _dirichlet(
    labels: list[str], shares: list[int], alpha: float, generator: np.random.Generator
) -> list[NDArray[np.intp]]:
    _, codes = np.unique(labels, return_inverse=True)
    pools = [generator.permutation(np.flatnonzero(codes == label)) for label in range(codes.max() + 1)]
    parts: list[NDArray[np.intp]] = []
    for share in shares:
        proportions = generator.dirichlet([alpha] * len(pools))
        taken = _draw(share, np.array([len(pool) for pool in pools]), proportions, generator)
        parts.append(np.concatenate([pool[:count] for pool, count in zip(pools, taken, strict=True)]))
        pools = [pool[count:] for pool, count in zip(pools, taken, strict=True)]
    return parts


def _draw(
    rows: int, left: NDArray[np.intp], proportions: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.intp]:
    """How many rows of each label a site takes; each pass fills the site or exhausts a label."""
    taken = np.zeros_like(left)
    while (missing := rows - taken.sum()) > 0:
        weights = np.where(taken < left, proportions, 0.0)
        if not weights.sum() > 0:  # the labels this site wants are gone, or alpha was too small for a float
            weights = (left - taken).astype(float)
        drawn = generator.multinomial(missing, weights / weights.sum())
        taken += np.minimum(drawn, left - taken)
    return taken
