"""Who was in the training data: offline RMIA with the base model as the one reference, and what it is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
DOMINATED_BY = 1.0  # gamma: a row counts as more likely in than one of the population from this ratio on
FALSE_POSITIVES = 0.01
ROC_POINTS = 100


@dataclass(frozen=True)
class Losses:
    """Losses of some rows in nats, shape (n,): by the base model, and by the released one."""

    base: Floats
    released: Floats

    def gains(self) -> Floats:
        """By how much training lowered each row's loss."""
        return self.base - self.released


def relative_membership(rows: Losses, population: Losses) -> Floats:
    """Share of the population that each row looks more trained on than (Zarifzadeh et al. 2024, equation 2 and 10).

    A row's likelihood, per token, under the released model is divided by that under the base, which stands for the
    average model that was not trained on it (offline, a = 1): the ratio is the exponential of the gain.

    Args:
        rows: n rows to be judged.
        population: Rows of the same kind that nobody trained on.
    """
    ratios = rows.gains()[:, None] - population.gains()[None, :]  # their logarithms
    return (ratios >= np.log(DOMINATED_BY)).mean(axis=1)


def area(members: Floats, others: Floats) -> tuple[float, float, float]:
    """Area under the ROC curve with its 95 % interval (DeLong et al. 1988); equal scores count half."""
    wins = (members[:, None] > others[None, :]) + 0.5 * (members[:, None] == others[None, :])
    mean = float(wins.mean())
    variance = wins.mean(axis=1).var(ddof=1) / len(members) + wins.mean(axis=0).var(ddof=1) / len(others)
    reach = 1.959964 * float(np.sqrt(variance))
    return mean, max(0.0, mean - reach), min(1.0, mean + reach)


def roc(members: Floats, others: Floats) -> list[tuple[float, float]]:
    """False and true positive rate at every threshold, from (0, 0) to (1, 1)."""
    thresholds = np.unique(np.concatenate([members, others]))[::-1]
    points = [(float((others >= t).mean()), float((members >= t).mean())) for t in thresholds]
    return [(0.0, 0.0), *points]


def true_positives(curve: list[tuple[float, float]], false_positives: float = FALSE_POSITIVES) -> float:
    """The highest true positive rate at no more than this false positive rate."""
    return max(tpr for fpr, tpr in curve if fpr <= false_positives)


def thinned(curve: list[tuple[float, float]]) -> list[list[float]]:
    """The curve with at most `ROC_POINTS` points, its ends among them."""
    places = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), ROC_POINTS)).round().astype(int))
    return [list(curve[place]) for place in places]
