"""Who comes to a federation later, from elsewhere, or with a key that is not to count: in, out, and at what price."""

from __future__ import annotations

import json
import shutil
import sys
import time
from typing import Any

import pytest
from tests.integration.deployed.federation import NAME, PORT, Party, Refused, await_until, speed_up
from tests.integration.deployed.networks import why_not
from tests.integration.deployed.probes import courier_state
from tests.integration.deployed.story import Story
from tests.integration.deployed.study import write_records

from cotune.client.courier_folder import furnish_courier
from cotune.shared.runs import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


def test_a_site_joins_in_four_commands_and_takes_part_in_minutes(story: Story, capsys: Any) -> None:
    made, began = story.made, time.monotonic()
    site = made.join("site-4", write_records(story.folder / "records", "site-4"), **{
        "epsilon-total": "1.2", "epsilon-per-run": "1.2",
    })  # fmt: skip
    made.up(speed_up(site))
    run = made.submit(story.alone("alone"))
    made.approve([site])
    story.await_round(run)
    minutes = (time.monotonic() - began) / 60
    with capsys.disabled():
        sys.stdout.write(f"\nfrom nothing to the first round: init, join, up, approve; {minutes:.1f} minutes\n")
    assert made.wait(run) == "succeeded"


def test_what_one_coordinator_spent_another_cannot_spend_again(story: Story) -> None:
    made, site = story.made, story.made.sites["site-4"]
    rival = Party(made.others["rival"], story.folder / "rival" / "home", "fed")
    rival.home.parent.mkdir()
    rival.tell("fed", "init", "--name", "rival", "--address", f"{rival.machine.address}:{PORT}")
    made.up(rival)
    site.tell("site", "join", rival.let_in(site))
    made.ups["site-4"].terminate()
    made.ups["site-4"].wait()
    made.up(site)
    run_id = rival.tell("submit", str(story.alone("again", seed=4)), "--i-know")["run_id"]
    run = RunFolder(rival.home / "runs" / run_id)
    await_until(lambda: run.state()["status"] in ("failed", "paused"), "the second job was let in", 600, made)
    assert "budget.epsilon" in json.dumps(run.events()), run.state()
    reserved = [line for line in (site.home / "ledger.jsonl").read_text().splitlines() if run_id in line]
    assert not [line for line in reserved if '"budget.reserve"' in line]


def test_a_key_nobody_registered_and_one_that_was_revoked_get_nothing(story: Story) -> None:
    made, stranger = story.made, story.made.others["stranger"]
    unknown = shutil.copytree(story.folder / "stolen", story.folder / "unknown")
    (unknown / "node.key").unlink()
    furnish_courier(unknown)
    assert courier_state(stranger, unknown / NAME, 40)["state"] == "refused"
    run = made.submit(story.job)
    story.await_round(run)
    made.coordinator.tell("fed", "revoke", "site-3")
    assert made.wait(run) == "paused", "two sites of at least three are left"
    used = {(row["site"], row["round"]) for row in run.metrics() if row.get("site")}
    last = max(number for _, number in used)
    assert ("site-3", last + 1) not in used
    assert "E-REVOKED" in json.dumps(run.events()) or "not enrolled" in json.dumps(run.events())
    assert courier_state(stranger, story.folder / "stolen" / NAME, 40)["state"] == "refused"
    with pytest.raises(Refused) as refused:
        made.coordinator.tell("fed", "approve", str(made.sites["site-3"].home / "request.json"))
    assert refused.value.code == 6
