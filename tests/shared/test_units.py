"""Files for the machine: as strict as the design says, taken by the programs they are for, and without a secret."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.client.federations import invite_for
from tests.server.doors import nginx_program

from cotune.client.courier_folder import courier_folder
from cotune.client.home import SiteHome
from cotune.client.joining import join, write_request
from cotune.client.policy import DatasetPolicy, Policy
from cotune.server.fedhome import FedHome, FedSettings
from cotune.server.inspection import SECRETS
from cotune.shared.cli import run

HARDENED = {
    "NoNewPrivileges=yes",
    "ProtectSystem=strict",
    "PrivateTmp=yes",
    "UMask=0077",
    "LimitCORE=0",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
    "MemoryMax=90%",
    "Restart=always",
    "RestartSec=15",
    "StartLimitIntervalSec=0",
    "SystemCallFilter=@system-service",
    "ProtectProc=invisible",
}
Made = Callable[..., dict[str, str]]
MakeFed = Callable[..., FedHome]


@pytest.fixture
def make_fed(tmp_path: Path) -> MakeFed:
    def make(name: str = "fed", **gateway: object) -> FedHome:
        settings = {"federation": {"name": "trial", "address": "192.0.2.1:8443"}, "gateway": gateway}
        return FedHome.create(tmp_path / name, FedSettings.model_validate(settings))

    return make


@pytest.fixture
def site(tmp_path: Path) -> SiteHome:
    (tmp_path / "notes.jsonl").write_text('{"text": "never to be copied"}\n')
    dataset = {"id": "notes", "path": str(tmp_path / "notes.jsonl"), "unit": "record"}
    budget = {"epsilon_total": 8.0, "epsilon_per_run": 4.0}
    described = DatasetPolicy.model_validate({**dataset, "budget": budget})
    made = SiteHome.create(
        tmp_path / "site", Policy.model_validate({"schema": 1, "site": {"name": "st-mary"}, "dataset": (described,)})
    )
    write_request(made)
    return made


@pytest.fixture
def made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Made:
    """Run `cotune fed files` or `site files`; the texts by name."""

    def make(whose: str, home: Path, *more: str) -> dict[str, str]:
        code = run([whose, "files", "--home", str(home), "--out", str(tmp_path / "out"), *more, "--json"])
        envelope = json.loads(capsys.readouterr().out)
        assert code == 0, envelope
        return {Path(name).name: Path(name).read_text() for name in envelope["data"]["files"]}

    return make


def settings_of(unit: str) -> set[str]:
    return {line for line in unit.splitlines() if line and not line.startswith(("#", "["))}


def test_a_coordinator_s_unit_is_hardened_and_starts_the_one_command(make_fed: MakeFed, made: Made) -> None:
    home = make_fed()
    unit = settings_of(made("fed", home.path)["cotune-fed.service"])
    assert unit >= HARDENED
    assert {"CapabilityBoundingSet=", "AmbientCapabilities=", "PrivateDevices=yes"} <= unit
    [start] = [line for line in unit if line.startswith("ExecStart=")]
    assert start.endswith(f'/cotune" "fed" "up" "--home" "{home.path}"')
    assert {'Environment="FLWR_TELEMETRY_ENABLED=0"', 'Environment="HF_HUB_OFFLINE=1"'} <= unit


def test_a_site_s_unit_is_hardened_and_may_use_gpus(site: SiteHome, made: Made) -> None:
    unit = settings_of(made("site", site.path)["cotune-site.service"])
    assert unit >= HARDENED
    assert {"CapabilityBoundingSet=", "DevicePolicy=closed", "DeviceAllow=char-nvidia* rw"} <= unit
    [writable] = [line for line in unit if line.startswith("ReadWritePaths=")]
    assert f'"{site.path}" "{courier_folder(site.path)}"' in writable
    assert "notes.jsonl" not in writable


def test_a_courier_of_its_own_takes_just_the_rights_to_become_it(site: SiteHome, made: Made) -> None:
    files = made("site", site.path, "--courier-user", "nobody")
    unit = settings_of(files["cotune-site.service"])
    assert "User=root" in unit
    [rights] = [line for line in unit if line.startswith("CapabilityBoundingSet=")]
    assert set(rights.partition("=")[2].split()) == {
        "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
    }  # fmt: skip
    assert "SystemCallFilter=~@privileged" not in unit
    assert set(files) == {"cotune-site.service"}  # a container has one user


def test_a_site_talks_to_its_coordinators_alone_where_their_addresses_are_numbers(site: SiteHome, made: Made) -> None:
    assert "IPAddressDeny=any" not in made("site", site.path)["cotune-site.service"]
    join(site, invite_for(site, address="192.0.2.7:8443"))
    unit = settings_of(made("site", site.path)["cotune-site.service"])
    assert {"IPAddressDeny=any", "IPAddressAllow=localhost 192.0.2.7"} <= unit


def test_behind_nginx_a_coordinator_talks_to_its_own_machine_alone(make_fed: MakeFed, made: Made) -> None:
    files = made("fed", make_fed(kind="nginx").path)
    assert {"IPAddressDeny=any", "IPAddressAllow=localhost"} <= settings_of(files["cotune-fed.service"])
    assert "compose.yaml" not in files  # nginx could not reach into it


def test_a_low_port_takes_the_one_right_it_needs(make_fed: MakeFed, made: Made) -> None:
    unit = settings_of(made("fed", make_fed(bind="0.0.0.0:443").path)["cotune-fed.service"])
    assert {"AmbientCapabilities=CAP_NET_BIND_SERVICE", "CapabilityBoundingSet=CAP_NET_BIND_SERVICE"} <= unit


@pytest.mark.parametrize("name", ["fed", "a fed", "fed%h"])
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_units_and_calls_them_little_exposed(
    name: str, make_fed: MakeFed, site: SiteHome, made: Made, tmp_path: Path
) -> None:
    made("fed", make_fed(name).path, "--user", "daemon")
    made("site", site.path, "--user", "daemon")
    for unit in sorted((tmp_path / "out").glob("*.service")):
        checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
        said = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--no-pager", unit],
            capture_output=True,
            text=True,
            check=False,
        )
        exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", said.stdout)
        assert exposure, said.stderr
        assert float(exposure[1]) <= 2.5


def test_compose_publishes_the_gateway_alone_and_writes_to_the_home_alone(make_fed: MakeFed, made: Made) -> None:
    home = make_fed()
    service = yaml.safe_load(made("fed", home.path)["compose.yaml"])["services"]["cotune-fed"]
    assert service["ports"] == ["8443:8443"]
    assert service["command"] == ["cotune", "fed", "up", "--home", str(home.path)]
    assert (service["read_only"], service["cap_drop"], service["restart"]) == (True, ["ALL"], "always")
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert str(home.path) in [volume["source"] for volume in service["volumes"]]
    assert service["environment"]["FLWR_TELEMETRY_ENABLED"] == "0"


def test_a_site_s_container_publishes_nothing_and_cannot_write_to_the_records(site: SiteHome, made: Made) -> None:
    service = yaml.safe_load(made("site", site.path)["compose.yaml"])["services"]["cotune-site"]
    assert "ports" not in service
    [records] = [volume for volume in service["volumes"] if volume["source"].endswith("notes.jsonl")]
    assert records["read_only"] is True
    assert {volume["source"] for volume in service["volumes"]} >= {str(site.path), str(courier_folder(site.path))}


def test_no_file_holds_a_secret_or_a_record(make_fed: MakeFed, site: SiteHome, made: Made) -> None:
    home = make_fed()
    texts = "".join([*made("fed", home.path).values(), *made("site", site.path).values()])
    secrets = [(home.path / name).read_bytes() for name in SECRETS] + [(site.path / "site.key").read_bytes()]
    lines = [line for secret in secrets for line in secret.splitlines() if b"---" not in line]
    assert not [line for line in lines if line.decode("latin-1") in texts]
    assert "never to be copied" not in texts


@pytest.mark.skipif(nginx_program() is None, reason="nginx is not installed (Debian: nginx-light)")
@pytest.mark.parametrize("name", ["fed", "a fed; include x"])
def test_nginx_takes_the_written_file(name: str, make_fed: MakeFed, made: Made, tmp_path: Path) -> None:
    made("fed", make_fed(name, kind="nginx", bind="127.0.0.1:8443").path)
    whole = tmp_path / "whole.conf"
    whole.write_text(f"pid {tmp_path}/pid; events {{}} http {{ include {tmp_path}/out/nginx.conf; }}")
    checked = subprocess.run(
        [str(nginx_program()), "-t", "-c", whole, "-p", tmp_path], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("name", ['a "fed"', "fed$HOME", "a\\fed"])
def test_a_path_that_nginx_would_read_otherwise_is_refused(
    name: str, make_fed: MakeFed, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["fed", "files", "--home", str(make_fed(name).path), "--out", str(tmp_path / "out")]) == 4
    assert capsys.readouterr().err.startswith("E-NGINX-PATH")


def test_a_user_that_is_not_there_is_refused(site: SiteHome, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["site", "files", "--home", str(site.path), "--user", "nobody-of-that-name"]) == 4
    assert capsys.readouterr().err.startswith("E-USER")


def test_a_folder_that_cannot_be_written_is_an_error(
    site: SiteHome, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert run(["site", "files", "--home", str(site.path), "--out", str(tmp_path / "file" / "out")]) == 1
    assert capsys.readouterr().err.startswith("E-STORAGE")


def test_written_again_they_are_the_same(site: SiteHome, made: Made) -> None:
    first: dict[str, Any] = made("site", site.path)
    assert made("site", site.path) == first
