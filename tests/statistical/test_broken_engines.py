"""The benchmark of broken engines, small: audits catch what they are said to catch, and do not cry wolf.

Rates of false alarms: the right engine is refuted at 95 % confidence in one run of twenty at most, so in five of
twenty once in 400 runs; its bounds stay far below the claim, so that it is far rarer. Power against an accountant reset
each round is 0.77 (100 runs), so that fewer than eight of twenty are caught once in 10,000 runs.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "broken_engines.py"
RUNS = 20


@pytest.fixture(scope="module")
def power() -> dict[str, dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), "--runs", str(RUNS), "--canaries", "5000", "--claims", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return {row["engine"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
def test_audits_leave_the_right_engine_alone(power: dict[str, dict[str, Any]]) -> None:
    right = power["none (as it is)"]
    assert right["caught_by_steinke"] <= 4
    assert right["caught_by_f_dp"] <= 4
    assert right["claimed"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["accountant reset each round", "training loss without noise"])
def test_audits_catch_what_gives_away_far_more_than_it_claims(power: dict[str, dict[str, Any]], engine: str) -> None:
    assert power[engine]["caught_by_f_dp"] >= 8


@pytest.mark.slow
def test_half_the_noise_is_found_by_more_right_guesses(power: dict[str, dict[str, Any]]) -> None:
    assert power["half the noise"]["right"] > power["none (as it is)"]["right"] + 0.03
