"""Whose a row is: one person is one unit, never two, and never more rows than agreed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.client.data import SiteExamples, prepare, unit_of
from cotune.shared.errors import DataError
from cotune.shared.examples import Example
from cotune.shared.job import Job
from cotune.shared.model import load_tokenizer, locate
from cotune.shared.records import Record, read_records

PERSON = {"unit": "column:person", "units_per_site": 20}


def record(text: str = "fever", **columns: Any) -> Record:
    return Record("text", "", "", text, "", (), columns)


def records_of(folder: Path, persons: Sequence[Any]) -> list[Record]:
    """A row for each of these persons in turn, all of them different."""
    path = folder / "rows.jsonl"
    rows = [
        {"prompt": "fever " * (1 + row % 9), "completion": " skin", "person": person}
        for row, person in enumerate(persons)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_records(path)


@pytest.fixture
def person_job(make_job: Any) -> Any:
    """A job that protects persons, with other settings of its data section."""

    def make(level: str = "unit", **data: Any) -> Job:
        return make_job(data={**PERSON, **data}, privacy={"level": level, "noise_multiplier": 1.0, "delta": 1e-3})

    return make


def prepared(job: Job, records: list[Record]) -> SiteExamples:
    return prepare(records, load_tokenizer(locate(job)), job)


def grouped(data: SiteExamples) -> list[list[int]]:
    return [data.rows(unit).tolist() for unit in range(data.units)]


def test_all_rows_of_a_person_are_one_unit_in_the_order_they_first_come(person_job: Any, tmp_path: Path) -> None:
    data = prepared(person_job(), records_of(tmp_path, ["b", "a", "b", "c", "a", "b"]))
    assert data.units == 3
    assert data.owners.tolist() == [0, 1, 0, 2, 1, 0]
    assert grouped(data) == [[0, 2, 5], [1, 4], [3]]


def test_where_rows_are_protected_every_row_is_a_unit(person_job: Any, make_job: Any, tmp_path: Path) -> None:
    records = records_of(tmp_path, ["b", "a", "b"])
    for job in (person_job("example"), person_job("none"), make_job()):
        data = prepared(job, records)
        assert (data.units, data.owners.tolist()) == (3, [0, 1, 2])
        assert grouped(data) == [[0], [1], [2]]


@pytest.mark.parametrize(("level", "owners"), [("unit", [0, 1, 0, 2, 1]), ("example", [0, 1, 2, 3, 4])])
def test_a_person_has_no_more_rows_than_agreed_whatever_is_protected(
    person_job: Any, tmp_path: Path, level: str, owners: list[int]
) -> None:
    records = records_of(tmp_path, ["b", "a", "b", "b", "c", "a", "b", "a"])
    data = prepared(person_job(level, max_per_unit=2), records)
    assert data.owners.tolist() == owners
    first = [0, 1, 2, 4, 5]
    whole = prepared(person_job(level), records)
    assert data.examples == [whole.examples[row] for row in first]


def test_a_person_more_or_less_changes_nobody_elses_rows(person_job: Any) -> None:
    """Neighbours, whatever cap there is: everyone else keeps the same rows, and a person never has more than agreed."""
    jobs = {most: person_job(max_per_unit=most) for most in (None, 1, 2, 4)}
    tokenizer = load_tokenizer(locate(jobs[None]))

    def kept(persons: list[int], some: list[int], job: Job) -> dict[int, list[int]]:
        """Rows of each person; a row is known by how many words it has."""
        records = [record("fever " * (row + 2), person=persons[row]) for row in some]
        data = prepare(records, tokenizer, job)
        rows = [[len(data.examples[row].ids) - 2 for row in data.rows(unit)] for unit in range(data.units)]
        return {persons[own[0]]: own for own in rows}

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.lists(st.integers(0, 5), max_size=25), st.integers(0, 5), st.sampled_from([None, 1, 2, 4]))
    def search(persons: list[int], gone: int, most: int | None) -> None:
        everybody = kept(persons, list(range(len(persons))), jobs[most])
        others = [row for row, person in enumerate(persons) if person != gone]
        own = everybody.pop(gone, [])
        assert everybody == kept(persons, others, jobs[most])
        assert own == [row for row, person in enumerate(persons) if person == gone][:most]

    search()


def test_no_record_gives_no_unit(person_job: Any, make_job: Any) -> None:
    for job in (person_job(), make_job()):
        data = prepared(job, [])
        assert (data.units, len(data.examples), data.owners.tolist()) == (0, 0, [])


@pytest.mark.parametrize("nothing", [None, "", "  ", "\t"], ids=repr)
def test_a_row_without_a_person_is_refused_by_its_number_and_never_guessed(
    person_job: Any, tmp_path: Path, nothing: str | None
) -> None:
    for level in ("unit", "example"):
        with pytest.raises(DataError) as caught:
            prepared(person_job(level, max_per_unit=2), records_of(tmp_path, ["a-secret", nothing]))
        assert (caught.value.code, caught.value.param) == ("E-UNIT", "data.unit")
        assert "record 2" in caught.value.message
        assert "a-secret" not in caught.value.message + str(caught.value.hint)


def test_a_column_nobody_has_is_refused(person_job: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepared(person_job(unit="column:patient"), records_of(tmp_path, ["a"]))
    assert caught.value.code == "E-UNIT"


@pytest.mark.parametrize(
    "alike",
    [
        (7, 7.0, " 7", "7", "7 "),
        ("Jos\u00e9", "Jose\u0301"),
        (0, -0.0, "0"),
        (10**300, "1" + "0" * 300),
        (True, "True"),
    ],
    ids=["seven", "composed", "nought", "long", "true"],
)
def test_one_person_written_in_several_ways_is_one_unit(alike: tuple[Any, ...]) -> None:
    assert len({unit_of(record(person=value), "person", 0) for value in alike}) == 1


def test_two_persons_are_two_units() -> None:
    different = [7, 70, 7.5, "07", "seven", "a", "b", False]
    assert len({unit_of(record(person=value), "person", 0) for value in different}) == len(different)


def test_examples_know_their_rows_and_never_show_them() -> None:
    examples = [Example((1, 2, 3), 1)] * 5
    data = SiteExamples(examples, np.array([2, 0, 2, 1, 0]), 3)
    assert grouped(data) == [[1, 4], [3], [0, 2]]
    assert "Example(" not in repr(data)
    assert SiteExamples([], np.zeros(0, dtype=np.intp), 0).units == 0
