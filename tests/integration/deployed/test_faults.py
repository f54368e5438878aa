"""Some rows of the kill table: `python tests/integration/deployed/run_faults.py` does all of them."""

from __future__ import annotations

import pytest
from tests.integration.deployed.faults import FAULTS
from tests.integration.deployed.networks import why_not
from tests.integration.deployed.run_faults import suffer
from tests.integration.deployed.story import Story
from tests.integration.deployed.study import SITES

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

CHOSEN = (
    "coordinator's process killed in a round",
    "superlink killed, down 5 s",
    "courier killed",
    "agent killed while it trains",
    "site cut off 5 s",
    "disk of a site's home full 15 s",
)


@pytest.mark.parametrize("name", CHOSEN)
def test_a_run_outlives_a_fault_with_the_same_adapter_and_no_charge_too_many_or_too_few(
    story: Story, name: str
) -> None:
    result = suffer(story.made, name, FAULTS[name], story.job, story.expected)
    assert result.faults == ()
    assert (result.status, result.equal) == ("succeeded", True)
    story.made.await_online(SITES)
