"""Some rows of the kill table: `python tests/integration/deployed/run_faults.py` does all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.deployed.faults import await_round
from tests.integration.deployed.networks import why_not
from tests.integration.deployed.run_faults import campaign
from tests.integration.deployed.story import Story
from tests.integration.deployed.study import SITES, write_job

from cotune.shared.jobfile import load_job

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

CHOSEN = (
    "coordinator's process killed in a round",
    "superlink killed, down 5 s",
    "courier killed",
    "agent killed while it trains",
    "site cut off 5 s",
    "disk of a site's home full 15 s",
)


def test_runs_outlive_faults_with_the_same_adapter_and_no_charge_too_many_or_too_few(story: Story) -> None:
    figures = campaign(story.made, CHOSEN, story.job, story.expected)
    assert figures.faults == []
    assert figures.kinds.total() == len(CHOSEN)
    assert figures.equal == figures.runs["succeeded"] > 0


def test_a_round_in_which_nobody_answers_pauses_by_name_and_goes_on_when_told(story: Story) -> None:
    made = story.made
    records = {site: story.folder / "records" / f"{site}.jsonl" for site in SITES}
    model = Path(load_job(story.job).model.base)
    job = write_job(story.folder / "impatient", model, records, federation={"min_sites": 3, "round_timeout_s": 20.0})
    run = made.submit(job)
    made.approve()
    await_round(made, run, 2)
    for site in SITES:
        made.sites[site].machine.unplug()
    try:
        assert made.wait(run) == "paused"
        assert run.state()["error"]["code"] == "E-TIMEOUT"
        assert f"cotune resume {run.run_id}" in run.state()["error"]["hint"]
    finally:
        for site in SITES:
            made.sites[site].machine.plug()
    made.await_online(SITES)
    made.coordinator.tell("resume", run.run_id)
    assert made.wait(run) == "succeeded", run.state()
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == story.expected
