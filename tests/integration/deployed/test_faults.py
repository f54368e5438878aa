"""Some rows of the kill table: `python tests/integration/deployed/run_faults.py` does all of them."""

from __future__ import annotations

import pytest
from tests.integration.deployed.networks import why_not
from tests.integration.deployed.run_faults import campaign
from tests.integration.deployed.story import Story

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
