"""Whom a round asks: drawn by the public seed alone, never above the cap, and the same after a resume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotune.server.selection import select
from cotune.shared.errors import JobError
from cotune.shared.job import Job
from cotune.shared.jobfile import parse_job

SITES = [f"site-{number}" for number in range(1, 13)]


def job_of(rounds: int = 30, seed: int = 17, **federation: Any) -> Job:
    sections: dict[str, Any] = {
        "run": {"rounds": rounds, "seed": seed},
        "model": {"base": "owner/name"},
        "data": {"train": "/a.jsonl", "records_per_site": 100},
        "federation": {"sites": 12, **federation},
    }
    return parse_job(sections, origin="test")


def cohort(count: int = 4, **more: Any) -> Job:
    return job_of(**{"selection": "random", "sites_per_round": count, **more})


def test_all_sites_are_asked_unless_something_else_is_said() -> None:
    assert select(job_of(), 1, SITES, {}, ()) == sorted(SITES)
    assert select(job_of(), 7, SITES[3:], {}, SITES[4:6]) == sorted(SITES[3:])


@pytest.mark.parametrize("selection", ["random", "available"])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_a_cohort_is_as_large_as_was_said_without_repetition_and_in_order(selection: str, count: int) -> None:
    for number in range(1, 31):
        asked = select(cohort(count, selection=selection), number, SITES, {}, ())
        assert len(asked) == len(set(asked)) == count
        assert asked == sorted(asked)
        assert set(asked) <= set(SITES)


@pytest.mark.parametrize("selection", ["random", "available"])
def test_where_there_are_no_more_sites_than_asked_for_all_are_asked(selection: str) -> None:
    job = cohort(4, selection=selection)
    assert select(job, 1, SITES[:3], {}, ()) == sorted(SITES[:3])
    assert select(job, 1, SITES[:4], {}, SITES[:4]) == sorted(SITES[:4])
    assert select(job, 1, [], {}, ()) == []


def test_the_draw_depends_on_seed_and_round_and_on_nothing_else() -> None:
    drawn = [select(cohort(), number, SITES, {}, ()) for number in range(1, 31)]
    assert drawn == [select(cohort(), number, SITES[::-1], {}, SITES[:5]) for number in range(1, 31)]
    assert len({tuple(names) for names in drawn}) > 15
    assert drawn != [select(cohort(seed=18), number, SITES, {}, ()) for number in range(1, 31)]


def test_every_site_is_drawn_about_as_often_as_every_other() -> None:
    counts = Counter(site for number in range(1, 601) for site in select(cohort(rounds=600), number, SITES, {}, ()))
    expected, deviation = 200, (600 * 1 / 3 * 2 / 3) ** 0.5
    assert all(abs(counts[site] - expected) < 5 * deviation for site in SITES)


def test_sites_that_did_not_answer_are_asked_only_if_there_are_too_few_others() -> None:
    job = cohort(selection="available")
    for number in range(1, 31):
        assert not set(select(job, number, SITES, {}, SITES[:8])) & set(SITES[:8])
        asked = select(job, number, SITES, {}, SITES[:10])
        assert set(SITES[10:]) < set(asked)
        assert len(asked) == 4
    among = {site for number in range(1, 31) for site in select(job, number, SITES, {}, SITES[:10])}
    assert among == set(SITES), "no absent site is forgotten"


def test_a_site_that_took_all_its_rounds_is_not_asked_again() -> None:
    job = cohort(max_rounds_per_site=15)
    taken = dict.fromkeys(SITES[:6], 15) | dict.fromkeys(SITES[6:9], 14)
    for number in range(1, 31):
        assert not set(select(job, number, SITES, taken, ())) & set(SITES[:6])
    everybody = job_of(rounds=2)
    assert select(everybody, 3, SITES, dict.fromkeys(SITES[:11], 2), ()) == [SITES[11]]


def rounds(job: Job, taken: dict[str, int], first: int, failing: set[str]) -> Iterator[list[str]]:
    """The sites of the rounds from `first` on, as a coordinator finds them from what it has on disk."""
    absent: set[str] = set()
    for number in range(first, job.run.rounds + 1):
        asked = select(job, number, SITES, taken, absent)
        absent = (absent | failing) & set(asked) | (absent - set(asked))
        for site in asked:
            taken[site] = taken.get(site, 0) + 1
        yield asked


@pytest.mark.parametrize("selection", ["random", "available"])
def test_a_run_that_was_interrupted_asks_the_same_sites_afterwards(selection: str) -> None:
    job = cohort(selection=selection, max_rounds_per_site=15)
    whole = list(rounds(job, {}, 1, set()))
    taken: dict[str, int] = {}
    before = [asked for asked, _ in zip(rounds(job, taken, 1, set()), range(13), strict=False)]
    counts = Counter(site for asked in whole[: len(before)] for site in asked)
    assert before + list(rounds(job, dict(counts), len(before) + 1, set())) == whole


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    sites=st.integers(1, 9),
    rounds=st.integers(1, 9),
    most=st.integers(1, 9),
    count=st.integers(1, 9),
    least=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_an_accepted_cap_of_rounds_a_site_never_leaves_a_round_with_too_few_sites(
    sites: int, rounds: int, most: int, count: int, least: int, seed: int
) -> None:
    asked_for = {"sites": sites, "min_sites": least, "max_rounds_per_site": most, "sites_per_round": count}
    try:
        job = cohort(**{"rounds": rounds, "seed": seed, "count": count, **asked_for})
    except JobError:
        return
    taken: dict[str, int] = {}
    for number in range(1, rounds + 1):
        asked = select(job, number, SITES[:sites], taken, ())
        assert least <= len(asked) <= count
        for site in asked:
            taken[site] = taken.get(site, 0) + 1
    assert max(taken.values()) <= most
