"""From p-values to one printed line and a verdict."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping

import pytest

ALPHA = 1e-6
TRIES = 6


def judge(check: str, pvalues: Mapping[str, float], figures: str) -> None:
    """Fail if a p-value is below its share of ALPHA, or is no number; print what was found either way."""
    level = ALPHA / len(pvalues)
    wrong = [name for name, pvalue in pvalues.items() if not pvalue > level]
    least = min(pvalues, key=lambda name: pvalues[name])
    outcome = f"WRONG: {', '.join(wrong)}" if wrong else f"least p of {len(pvalues)} {pvalues[least]:.2g} ({least})"
    print(f"\n{check}: {figures}; {outcome}", end="")  # noqa: T201 - the figures are the point
    assert not wrong, f"{check}: {', '.join(wrong)} ({figures})"


def must_fail(check: Callable[[], object], *, fault: str, repeats: int = 1, least: int | None = None) -> None:
    """The check refuses the fault, in at least so many of the repeats; prints its power where repeated.

    Where it is not repeated, one of TRIES is enough: a power of nine in ten then misses once in a million runs.
    """
    caught = 0
    for _ in range(TRIES if repeats == 1 else repeats):
        if repeats == 1 and caught:
            break
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                check()
        except AssertionError:
            caught += 1
    print(f"\n  planted fault `{fault}`: caught {caught} of {repeats}", end="")  # noqa: T201
    if caught < (repeats if least is None else least):
        pytest.fail(f"planted fault `{fault}` was caught only {caught} of {repeats} times")
