"""ROC curves and their areas, against scikit-free arithmetic."""

import numpy as np
import pytest

from cotune.simulations.attack.membership import (
    ROC_POINTS,
    Losses,
    area,
    relative_membership,
    roc,
    thinned,
    true_positives,
)


def test_the_area_counts_pairs_and_halves_ties() -> None:
    mean, low, high = area(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0]))
    assert mean == pytest.approx((1 + 1 + 1 + 0 + 0.5 + 1) / 6)
    assert 0.0 <= low < mean < high <= 1.0


def test_nineteen_of_twenty_intervals_hold_the_true_area() -> None:
    random = np.random.default_rng(3)
    true = 0.7602  # of two normal distributions one standard deviation apart: Phi(1 / sqrt(2))
    held = 0
    for _ in range(400):
        _, low, high = area(random.normal(1, 1, 80), random.normal(0, 1, 80))
        held += low <= true <= high
    assert 0.91 <= held / 400 <= 0.985  # four standard deviations of 0.95


def test_a_curve_begins_at_nothing_and_ends_at_everything() -> None:
    curve = roc(np.array([3.0, 2.0]), np.array([1.0, 2.0]))
    assert curve == [(0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 1.0)]
    assert true_positives(curve) == 0.5
    assert true_positives(roc(np.zeros(5), np.zeros(5))) == 0.0


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    random = np.random.default_rng(4)
    curve = thinned(roc(random.normal(size=500), random.normal(size=500)))
    assert len(curve) == ROC_POINTS
    assert curve[0] == [0.0, 0.0]
    assert curve[-1] == [1.0, 1.0]


def test_rows_that_gained_more_than_the_population_look_like_members() -> None:
    population = Losses(np.full(10, 3.0), np.linspace(2.0, 3.0, 10))
    rows = Losses(np.array([3.0, 3.0, 9.0]), np.array([1.0, 3.5, 8.5]))
    scores = relative_membership(rows, population)
    assert scores[0] == 1.0
    assert scores[1] == 0.0
    assert scores[2] == pytest.approx(0.5)  # a hard row is judged by its gain, not by its loss
