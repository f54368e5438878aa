"""The benchmark of broken engines, small: audits catch what they are said to catch, and do not cry wolf.

Rates of false alarms: the right engine is refuted at 95 % confidence in one run of twenty at most, so in five of
twenty once in 400 runs; its bounds stay far below the claim, so that it is far rarer. Power against an accountant reset
each round is 0.75 (100 runs), so that fewer than eight of twenty are caught once in 5,000 runs; against the two others
0.99 and more.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "broken_engines.py"
RUNS = 20


Power = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def power() -> Power:
    command = [sys.executable, str(SCRIPT), "--runs", str(RUNS), "--canaries", "5000", "--claims", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return {(row["engine"], row["auditor"]): row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("auditor", ["coordinates", "opposed"])
def test_audits_leave_the_right_engine_alone(power: Power, auditor: str) -> None:
    right = power["as it is", auditor]
    assert right["caught_by_steinke"] <= 4
    assert right["caught_by_f_dp"] <= 4
    assert right["claimed"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "auditor", "least"),
    [
        ("shuffled, not Poisson", "opposed", RUNS - 4),
        ("accountant reset each round", "coordinates", 8),
        ("training loss without noise", "losses", RUNS - 4),
    ],
)
def test_audits_catch_what_gives_away_far_more_than_it_claims(
    power: Power, engine: str, auditor: str, least: int
) -> None:
    assert power[engine, auditor]["caught_by_f_dp"] >= least


@pytest.mark.slow
def test_half_the_noise_is_found_by_more_right_guesses(power: Power) -> None:
    assert power["half the noise", "coordinates"]["right"] > power["as it is", "coordinates"]["right"] + 0.03
