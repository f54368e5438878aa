"""Persons in a simulated federation: what its owner is told before any round."""

from typing import Any

import pytest

from cotune.shared.errors import DataError
from cotune.shared.records import Record
from cotune.simulations.partition import split
from cotune.simulations.population import check_sites

UNIT = {"data": {"unit": "column:patient", "units_per_site": 20}, "privacy": {"level": "unit"}}


def records(*persons: object) -> list[Record]:
    return [
        Record("text", prompt="", completion="", text="t", label="", messages=(), columns={"patient": person})
        for person in persons
    ]


def told(make_job: Any, sites: dict[str, list[Record]], **sections: dict[str, Any]) -> list[str]:
    said: list[str] = []
    merged = {name: {**UNIT.get(name, {}), **sections.get(name, {})} for name in {*UNIT, *sections}}
    check_sites(make_job(**merged), sites, said.append)
    return said


def test_enough_persons_each_at_one_site_pass_in_silence(make_job: Any) -> None:
    assert told(make_job, {"a": records(*range(12)), "b": records(*range(12, 30))}) == []


def test_a_site_without_records_is_named(make_job: Any) -> None:
    with pytest.raises(DataError, match="b: no record"):
        told(make_job, {"a": records(*range(12)), "b": []})


@pytest.mark.parametrize("missing", [None, "", "  "])
def test_a_row_without_a_person_is_an_error_that_names_the_row_alone(make_job: Any, missing: object) -> None:
    with pytest.raises(DataError, match="record 3 has nothing in the unit column") as caught:
        told(make_job, {"a": records("secret-1", "secret-2", missing, *range(12))})
    assert caught.value.code == "E-UNIT"
    assert "secret" not in caught.value.message


def test_fewer_persons_than_a_batch_expects_are_refused(make_job: Any) -> None:
    with pytest.raises(DataError) as caught:
        told(make_job, {"a": records(*range(9), *range(9))})
    assert caught.value.code == "E-UNIT-FEW"


def test_one_person_with_half_of_the_rows_is_a_warning_unless_their_rows_are_bounded(make_job: Any) -> None:
    half = {"a": records(*range(12), *["rich"] * 12)}
    assert [line.split()[0] for line in told(make_job, half)] == ["W-UNIT-SHARE"]
    assert told(make_job, half, data={"max_per_unit": 2}) == []


def test_single_rows_of_persons_with_many_are_a_warning(make_job: Any) -> None:
    said = told(make_job, {"a": records(*range(12), 3, 3)}, privacy={"level": "example"})
    assert [line.split()[0] for line in said] == ["W-UNIT-MAX"]


def test_persons_at_more_sites_than_agreed_void_the_claim(make_job: Any) -> None:
    sites = {"a": records(*range(12)), "b": records(*range(11, 30))}
    with pytest.raises(DataError) as caught:
        told(make_job, sites)
    assert caught.value.code == "E-UNIT-OVERLAP"
    assert told(make_job, sites, data={"sites_per_unit": 2}) == []


def test_a_split_keeps_persons_whole(make_job: Any) -> None:
    people = records(*[person for person in range(40) for _ in range(1 + person % 8)])
    settings = make_job(**UNIT).data
    parts = split(people, settings, 3, seed=5)
    where = {site: {people[row].columns["patient"] for row in rows} for site, rows in parts.items()}
    assert sorted(row for rows in parts.values() for row in rows) == list(range(len(people)))
    assert sum(map(len, where.values())) == 40
    assert max(map(len, where.values())) - min(map(len, where.values())) <= 1


def test_a_split_names_persons_where_there_are_too_few(make_job: Any) -> None:
    with pytest.raises(DataError, match="2 persons for 3 sites"):
        split(records(1, 1, 2, 2), make_job(**UNIT).data, 3, seed=5)
