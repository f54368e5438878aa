"""A federation of real processes on machines of its own: what it ends with, what it lets out, whom it lets in.

The tests are one story, in order: each goes on with the federation that the one before left.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.integration.deployed.federation import (
    NAME,
    PORT,
    Federation,
    Party,
    Refused,
    await_until,
    federation,
    speed_up,
)
from tests.integration.deployed.invariants import broken
from tests.integration.deployed.networks import why_not
from tests.integration.deployed.probes import answers, courier_state, open_ports, tls_refusal
from tests.integration.deployed.run_faults import history_of
from tests.integration.deployed.study import (
    SITES,
    canary,
    leaks,
    simulated_adapter,
    write_job,
    write_records,
)
from tests.integration.killed_study import tiny_model

from cotune.client.courier_folder import courier_folder, furnish_courier
from cotune.shared.jobfile import load_job
from cotune.shared.model import locate
from cotune.shared.runs import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

SHUT = (
    "/v1/control/list-runs", "/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task",
    "/docs", "/openapi.json", "/redoc", "/", "/v1/fleet/../control/list-runs", "/V1/FLEET/pull-messages",
)  # fmt: skip


@dataclass
class Story:
    """What the tests share."""

    folder: Path
    made: Federation
    job: Path
    expected: bytes
    wiretap: Path
    first: RunFolder | None = None


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("deployed")
    os.environ["COTUNE_CACHE"] = str(folder / "cache")
    records = {site: write_records(folder / "records", site) for site in SITES}
    job = write_job(folder / "job", tiny_model(folder / "model"), records)
    expected, wiretap = simulated_adapter(job), folder / "wiretap"
    sha256 = locate(load_job(job)).sha256
    with federation(folder, sha256, spare=("site-4", "stranger", "rival"), record=wiretap) as made:
        yield Story(folder, made, job, expected, wiretap)


def test_a_run_over_the_network_ends_with_the_adapter_of_the_simulation(story: Story) -> None:
    made, before = story.made, story.made.ledger_hashes()
    run = story.first = made.submit(story.job)
    made.approve()
    assert made.wait(run) == "succeeded", run.state()
    history = history_of(made, run, before, story.expected, 0.0, 1.0)
    assert broken(history) == []
    assert made.coordinator.tell("status", run.run_id)["state"] == "succeeded"
    assert set(history.charges().values()) == {1}


def test_the_base_model_is_loaded_once_at_a_site(story: Story) -> None:
    from cotune.client.agent_link import AgentLink

    loads = {n: AgentLink(courier_folder(s.home) / "agent.sock").describe() for n, s in story.made.sites.items()}
    assert {name: said["model_loads"] for name, said in loads.items()} == dict.fromkeys(SITES, 1)


def test_a_sites_address_reaches_fleet_and_health_and_nothing_else(story: Story) -> None:
    site, coordinator = story.made.sites["site-1"].machine, story.made.coordinator
    found = answers(site, coordinator.machine.address, PORT, coordinator.home / "tls" / "ca.crt", ("/health", *SHUT))
    assert found == {"/health": 200, **dict.fromkeys(SHUT, 404)}
    assert open_ports(site, coordinator.machine.address) == [PORT]
    assert len(open_ports(coordinator.machine, "127.0.0.1")) > 1, "the scan does find the SuperLink where it is"


def test_a_site_takes_no_other_authority_than_the_invitations(story: Story) -> None:
    site, coordinator = story.made.sites["site-1"].machine, story.made.coordinator
    address = coordinator.machine.address
    assert "CERTIFICATE_VERIFY_FAILED" in tls_refusal(site, address, PORT, None, "TLSv1_2")
    assert not tls_refusal(site, address, PORT, coordinator.home / "tls" / "ca.crt", "TLSv1_2")
    assert tls_refusal(site, address, PORT, coordinator.home / "tls" / "ca.crt", "TLSv1_1")


def test_a_courier_folder_holds_neither_data_nor_the_ledgers_key(story: Story) -> None:
    site = story.made.sites["site-3"]
    stolen = shutil.copytree(
        courier_folder(site.home), story.folder / "stolen", ignore=shutil.ignore_patterns("*.sock")
    )
    assert leaks([story.folder / "records"]), "the search does find what is there"
    assert leaks([stolen]) == []
    key = (site.home / "site.key").read_bytes()
    secret = [line for line in key.splitlines() if b"PRIVATE KEY" not in line]
    assert not leaks([stolen], [line.decode() for line in secret if len(line) > 20])
    assert not ({path.name for path in stolen.iterdir()} & {"site.key", "policy.toml", "ledger.jsonl", "head.json"})


def test_no_word_of_a_record_was_ever_on_the_line(story: Story) -> None:
    assert story.first is not None
    assert leaks([story.wiretap], [story.first.run_id]), "the recorder saw the run, in clear"
    assert leaks([story.wiretap]) == []
    assert leaks([story.made.coordinator.home]) == []


def test_an_exception_over_a_record_carries_none_of_it_to_the_coordinator(story: Story) -> None:
    made, path = story.made, story.folder / "records" / "site-2.jsonl"
    whole = path.read_text()
    path.write_text(whole.rstrip("\n")[:-3] + "\n" + f'{{"prompt": 7, "completion": "{canary("site-2", 999)}"}}\n')
    try:
        run = made.submit(story.job)
        assert made.wait(run) == "paused"
        said = [event["data"]["failure"] for event in run.events() if event["data"].get("failure")]
        assert [(failure["site"], failure["code"]) for failure in said] == [("site-2", "E-SITE-DATA")]
    finally:
        path.write_text(whole)
    assert leaks([story.wiretap, made.coordinator.home]) == []
    assert made.sites["site-2"].tell("site", "log")["own_checks"], "the site's own log says why"
    made.coordinator.tell("resume", run.run_id)
    assert made.wait(run) == "succeeded"
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == story.expected


def test_a_site_joins_in_four_commands_and_takes_part_in_minutes(story: Story, capsys: Any) -> None:
    made, began = story.made, time.monotonic()
    site = made.join("site-4", write_records(story.folder / "records", "site-4"), **{
        "epsilon-total": "12", "epsilon-per-run": "12",
    })  # fmt: skip
    made.up(speed_up(site))
    run = made.submit(_alone(story, "alone"))
    _approve_at(made, site)
    _await_round(made, run)
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
    run_id = rival.tell("submit", str(_alone(story, "again", seed=4)), "--i-know")["run_id"]
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
    _await_round(made, run)
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


def _alone(story: Story, name: str, seed: int = 3) -> Path:
    """A job over site-4 alone."""
    records = {"site-4": story.folder / "records" / "site-4.jsonl"}
    model = Path(load_job(story.job).model.base)
    return write_job(story.folder / name, model, records, run={"name": name, "seed": seed})


def _approve_at(made: Federation, site: Party) -> None:
    def waiting() -> list[dict[str, Any]]:
        return [job for job in site.tell("site", "jobs")["jobs"] if job["state"] == "waiting"]

    await_until(waiting, "no job came to be approved", 600, made)
    for job in waiting():
        site.tell("site", "approve", job["job_sha256"][:12])


def _await_round(made: Federation, run: RunFolder) -> None:
    def is_there() -> bool:
        return any(event["type"] == "round" for event in run.events()) or run.state()["status"] == "failed"

    await_until(is_there, "no round was finished", 600, made)
