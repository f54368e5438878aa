"""What `cotune doctor` finds at a site: each fault in a home that really has it, and none in a sound one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.client.federations import certificate, invite_for
from tests.free_ports import free_port

from cotune.client.courier_folder import courier_folder
from cotune.client.home import SiteHome
from cotune.client.inspection import inspect
from cotune.client.joining import join, write_request
from cotune.shared.cli import run
from cotune.shared.fault import Fault


@pytest.fixture
def home(make_home: Any) -> SiteHome:
    made = make_home()
    write_request(made)
    return made


def codes(faults: list[Fault]) -> list[str]:
    assert all(fault.mend and fault.what for fault in faults)
    return [fault.code for fault in faults]


def test_a_sound_home_has_no_fault(home: SiteHome, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(home.path) == []
    assert run(["doctor", "--site", str(home.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["looked_at"] == {"Flower": [], f"site {home.path}": []}


def test_a_home_that_is_not_there_is_found(tmp_path: Path) -> None:
    assert codes(inspect(tmp_path / "none")) == ["E-SITE-HOME"]


def test_a_home_that_others_may_enter_is_found(home: SiteHome, capsys: pytest.CaptureFixture[str]) -> None:
    home.path.chmod(0o750)
    [fault] = inspect(home.path)
    assert (fault.code, fault.mend) == ("E-SITE-HOME", f"chmod 700 {home.path}")
    assert run(["doctor", "--site", str(home.path)]) == 1
    assert f"mend it: chmod 700 {home.path}" in capsys.readouterr().out


def test_a_key_that_others_may_read_is_found(home: SiteHome) -> None:
    (home.path / "site.key").chmod(0o644)
    [fault] = inspect(home.path)
    assert (fault.code, fault.mend) == ("E-KEY", f"chmod 600 {home.path / 'site.key'}")


def test_a_ledger_that_does_not_verify_is_found(home: SiteHome) -> None:
    ledger = home.path / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b"st-mary", b"st-marx", 1))
    [fault] = inspect(home.path)
    assert fault.code.startswith("E-LEDGER")


def test_a_ledger_that_is_gone_is_found(home: SiteHome) -> None:
    (home.path / "ledger.jsonl").unlink()
    assert codes(inspect(home.path)) == ["E-LEDGER-BEHIND"]


def _home_in_courier(home: SiteHome) -> Path:
    courier = courier_folder(home.path)
    moved = courier / "home"
    home.path.rename(moved)
    courier_folder(moved).symlink_to(courier)
    return moved


def _courier_in_home(home: SiteHome) -> Path:
    courier = courier_folder(home.path)
    courier.rename(home.path / "courier")
    courier.symlink_to(home.path / "courier")
    return home.path


def _key_beside_the_courier(home: SiteHome) -> Path:
    (courier_folder(home.path) / "site.key").write_bytes((home.path / "site.key").read_bytes())
    return home.path


def _ledger_beside_the_courier(home: SiteHome) -> Path:
    (courier_folder(home.path) / "backup").mkdir()
    (courier_folder(home.path) / "backup" / "ledger.jsonl").write_bytes(b"")
    return home.path


def _node_key_in_the_home(home: SiteHome) -> Path:
    (home.path / "node.key").write_bytes((courier_folder(home.path) / "node.key").read_bytes())
    return home.path


MIXED = [_home_in_courier, _courier_in_home, _key_beside_the_courier, _ledger_beside_the_courier, _node_key_in_the_home]


@pytest.mark.parametrize("mix", MIXED, ids=lambda mix: mix.__name__.strip("_"))
def test_a_courier_that_is_not_apart_from_the_home_is_found(mix: Callable[[SiteHome], Path], home: SiteHome) -> None:
    found = codes(inspect(mix(home)))
    assert found
    assert set(found) == {"E-COURIER-MIXED"}


@pytest.mark.parametrize(("name", "mode", "right"), [("", 0o755, 700), ("node.key", 0o644, 600)])
def test_a_courier_s_folder_that_is_open_is_found(name: str, mode: int, right: int, home: SiteHome) -> None:
    path = courier_folder(home.path) / name
    path.chmod(mode)
    [fault] = inspect(home.path)
    assert (fault.code, fault.mend) == ("E-COURIER-OPEN", f"chmod {right} {path}")


def test_records_that_every_user_may_read_are_found(home: SiteHome, notes: Path) -> None:
    opened = [path for path in notes.parents if path.stat().st_uid == notes.stat().st_uid and path != Path("/")]
    modes = {path: path.stat().st_mode & 0o7777 for path in opened}
    try:
        for path in opened:
            path.chmod(modes[path] | 0o001)
        notes.chmod(0o644)
        assert codes(inspect(home.path)) == ["E-DATA-OPEN"]
        notes.chmod(0o640)
        assert inspect(home.path) == []
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def test_records_that_are_gone_are_found(home: SiteHome, notes: Path) -> None:
    notes.unlink()
    assert codes(inspect(home.path)) == ["E-DATA-MISSING"]


def test_a_coordinator_that_does_not_answer_is_found(home: SiteHome) -> None:
    join(home, invite_for(home, address=f"127.0.0.1:{free_port()}"))
    assert codes(inspect(home.path)) == ["E-REACH"]


def test_a_certificate_that_was_exchanged_under_the_courier_is_found(home: SiteHome) -> None:
    join(home, invite_for(home, address=f"127.0.0.1:{free_port()}"))
    file = courier_folder(home.path) / "north" / "ca.crt"
    file.write_text(certificate("another"))
    assert codes(inspect(home.path)) == ["E-COURIER-CA"]
    file.unlink()
    assert codes(inspect(home.path)) == ["E-COURIER-CA"]


def test_nothing_of_the_records_or_of_a_key_is_ever_said(home: SiteHome, notes: Path) -> None:
    _key_beside_the_courier(home)
    (home.path / "site.key").chmod(0o644)
    said = " ".join(fault.what + fault.mend for fault in inspect(home.path))
    secret = (courier_folder(home.path) / "site.key").read_text().splitlines()[1]
    assert secret not in said
    assert not [line for line in notes.read_text().splitlines() if line in said]
