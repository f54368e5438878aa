"""A site that is killed at any moment: its ledger never holds less than it released, and it always starts again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("site_killed.py")
NAMED_STEPS, KILLS = 14, 200


def killed(make_job: Any, tmp_path: Path) -> dict[str, Any]:
    """What a site looks like after so many kills, besides one at each named step."""
    job = make_job(
        run={"rounds": 100_000},
        train={"batch_size": 30, "local_steps": 2, "microbatch": 32},  # all take part: priced in no time
        privacy={"noise_multiplier": 150.0, "delta": 1e-3, "epsilon": 400.0},
    )
    (tmp_path / "job.json").write_text(job.to_json())
    command = [sys.executable, str(SCRIPT), str(tmp_path / "job.json"), str(tmp_path), str(KILLS), "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{result}")  # noqa: T201 - the figures
    return result


@pytest.mark.slow
def test_a_site_killed_at_each_named_step_and_two_hundred_times_never_releases_uncharged(
    make_job: Any, tmp_path: Path
) -> None:
    result = killed(make_job, tmp_path)
    assert result["kills"] == NAMED_STEPS + KILLS
    assert result["survived"] == []
    assert result["faults"] == []
    assert result["sent"] <= result["rounds"] <= result["charged"]
    assert result["charged"] - result["sent"] <= result["kills"] + 1, "a kill costs one round at most"
    assert result["sent"] > KILLS / 10, "it must have worked in between"
