"""Records over sites: disjoint, complete, reproducible, and as unlike as asked."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cotune.shared.errors import DataError
from cotune.shared.records import Record
from cotune.shared.sections import DataSettings
from cotune.simulations.partition import split


def records(*labels: object, column: str = "label") -> list[Record]:
    return [Record("text", "", "", "t", "", (), {"text": "t", column: label}) for label in labels]


def settings(kind: str, alpha: float = 1.0, column: str | None = "label") -> DataSettings:
    return DataSettings(train="a.jsonl", split=kind, split_column=column, alpha=alpha, records_per_site=10)


@hypothesis_settings(deadline=None)
@given(
    kind=st.sampled_from(["iid", "dirichlet"]),
    labels=st.lists(st.sampled_from("abcde"), min_size=1, max_size=200),
    sites=st.integers(1, 12),
    alpha=st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 100.0, 1e6]),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_row_is_at_one_site_and_sites_are_equally_large(kind, labels, sites, alpha, seed):
    sites = min(sites, len(labels))
    parts = split(records(*labels), settings(kind, alpha), sites, seed)
    assert list(parts) == [f"site-{number}" for number in range(1, sites + 1)]
    assert sorted(row for rows in parts.values() for row in rows) == list(range(len(labels)))
    sizes = [len(rows) for rows in parts.values()]
    assert max(sizes) - min(sizes) <= 1
    assert all(rows == sorted(rows) for rows in parts.values())
    assert parts == split(records(*labels), settings(kind, alpha), sites, seed)


@hypothesis_settings(deadline=None)
@given(values=st.lists(st.sampled_from(["St Mary", "Zürich", "3", 4, True]), min_size=1, max_size=50))
def test_a_column_gives_a_site_for_each_value(values):
    parts = split(records(*values), settings("column"), sites=2, seed=1)
    names = {"St Mary": "st-mary", "Zürich": "zurich", "3": "3", 4: "4", True: "true"}
    assert list(parts) == sorted({names[value] for value in values})
    for name, rows in parts.items():
        assert rows == [index for index, value in enumerate(values) if names[value] == name]


def test_another_seed_gives_another_split():
    many = records(*"ab" * 50)
    for kind in ("iid", "dirichlet"):
        assert split(many, settings(kind), 4, 1) != split(many, settings(kind), 4, 2)


def largest_share(alpha: float) -> float:
    """The mean share of a site's commonest label, of five labels equally frequent."""
    many = records(*"abcde" * 400)
    parts = split(many, settings("dirichlet", alpha), 10, 3)
    shares = [Counter(many[row].columns["label"] for row in rows).most_common(1)[0][1] / 200 for rows in parts.values()]
    return sum(shares) / len(shares)


def test_a_small_alpha_makes_sites_unlike_and_a_large_one_alike():
    assert largest_share(0.05) > 0.7
    assert largest_share(1000.0) < 0.3
    assert largest_share(0.05) > largest_share(1.0) > largest_share(1000.0)


@pytest.mark.parametrize("kind", ["dirichlet", "column"])
def test_a_column_missing_in_some_rows_is_counted(kind):
    with pytest.raises(DataError) as caught:
        split([*records("a", None), *records("b", column="other")], settings(kind), 2, 1)
    assert caught.value.code == "E-DATA-COLUMN"
    assert "2 of 3 have no such value" in caught.value.message


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_more_sites_than_records_name_the_first_that_stays_empty(kind):
    with pytest.raises(DataError, match="site-3 would get no record: 2 records for 5 sites") as caught:
        split(records("a", "b"), settings(kind), 5, 1)
    assert caught.value.code == "E-DATA-SITE-EMPTY"


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "column"])
def test_no_records_at_all_are_refused(kind):
    with pytest.raises(DataError) as caught:
        split([], settings(kind), 2, 1)
    assert caught.value.code == "E-DATA-SITE-EMPTY"


@pytest.mark.parametrize("values", [("A b", "a-b"), ("---",), ("患者",), ("x" * 50, "x" * 60)])
def test_values_that_make_no_site_name_of_their_own_are_refused_unquoted(values):
    with pytest.raises(DataError) as caught:
        split(records(*values), settings("column"), 2, 1)
    assert caught.value.code == "E-DATA-SITE-NAME"
    assert not any(value in caught.value.message for value in values)
