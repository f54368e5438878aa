"""A federation of real processes on machines of its own: what it ends with, and what it lets out."""

from __future__ import annotations

import shutil

import pytest
from tests.integration.deployed.federation import PORT
from tests.integration.deployed.invariants import broken
from tests.integration.deployed.keeping import keeping
from tests.integration.deployed.networks import why_not
from tests.integration.deployed.probes import answers, open_ports, tls_refusal
from tests.integration.deployed.run_faults import history_of
from tests.integration.deployed.story import Story
from tests.integration.deployed.study import SITES, canary, leaks

from cotune.client.agent_link import AgentLink
from cotune.client.courier_folder import courier_folder

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

SHUT = (
    "/v1/control/list-runs", "/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task",
    "/docs", "/openapi.json", "/redoc", "/", "/v1/fleet/../control/list-runs", "/V1/FLEET/pull-messages",
)  # fmt: skip


def test_a_run_over_the_network_ends_with_the_adapter_of_the_simulation(story: Story) -> None:
    made, before = story.made, story.made.ledger_hashes()
    run = story.first = made.submit(story.job)
    with keeping(made, run, story.folder / "kept" / run.run_id) as kept:
        made.approve()
        assert made.wait(run) == "succeeded", run.state()
    history = history_of(made, run, before, story.expected, kept)
    assert broken(history) == []
    assert made.coordinator.tell("status", run.run_id)["state"] == "succeeded"
    assert set(history.charges().values()) == {1}


def test_the_base_model_is_loaded_once_at_a_site(story: Story) -> None:
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
