"""A coordinator's home: whole or not at all, nobody else's to enter, strict about its settings."""

import json
import os
from pathlib import Path

import pytest

from cotune.server.fedhome import FED_FILE, FedHome, FedSettings
from cotune.shared import cli
from cotune.shared.errors import CotuneError, JobError, StorageError
from cotune.shared.jobfile import validate
from cotune.shared.keyfile import SigningKey

SETTINGS = validate({"federation": {"name": "lungs", "address": "127.0.0.1:8443"}}, FED_FILE, origin="test")


@pytest.fixture
def home(tmp_path: Path) -> FedHome:
    return FedHome.create(tmp_path / "fed", SETTINGS)


def refusal(path: Path) -> CotuneError:
    with pytest.raises(CotuneError) as caught:
        FedHome.open(path)
    return caught.value


def test_a_home_is_made_and_opened_again(home: FedHome) -> None:
    again = FedHome.open(home.path)
    assert again.settings == SETTINGS == FedSettings.model_validate(SETTINGS.model_dump())
    assert again.key.public == home.key.public
    assert again.name == "lungs"
    assert [each.name for each in home.path.parent.iterdir()] == ["fed"]


def test_every_secret_is_its_owners_alone(home: FedHome) -> None:
    assert home.path.stat().st_mode & 0o777 == 0o700
    secrets = ("coordinator.key", "tls/ca.key", "tls/server.key", "superlink/superexec.secret")
    for name in secrets:
        assert (home.path / name).stat().st_mode & 0o777 == 0o600, name
    public = [
        path for path in home.path.rglob("*") if path.is_file() and str(path.relative_to(home.path)) not in secrets
    ]
    assert not [path for path in public if b"PRIVATE" in path.read_bytes()]
    assert len((home.path / "superlink" / "superexec.secret").read_bytes()) == 32


def test_two_homes_share_no_secret(home: FedHome, tmp_path: Path) -> None:
    other = FedHome.create(tmp_path / "other", SETTINGS)
    for name in ("coordinator.key", "tls/ca.key", "tls/server.key", "superlink/superexec.secret"):
        assert (home.path / name).read_bytes() != (other.path / name).read_bytes()


def test_what_is_there_already_stays(home: FedHome) -> None:
    before = (home.path / "coordinator.key").read_bytes()
    with pytest.raises(JobError) as caught:
        FedHome.create(home.path, SETTINGS)
    assert caught.value.code == "E-FED-EXISTS"
    assert (home.path / "coordinator.key").read_bytes() == before


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_home_that_others_may_enter_is_refused(home: FedHome, mode: int) -> None:
    home.path.chmod(mode)
    error = refusal(home.path)
    assert error.code == "E-FED-HOME"
    assert error.hint == f"chmod 700 {home.path}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_a_home_of_another_user_is_refused(home: FedHome) -> None:
    os.chown(home.path, 12345, -1)
    assert "another user" in refusal(home.path).message


def test_a_missing_home_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    error = refusal(tmp_path / "none")
    assert (error.code, error.hint) == ("E-FED-HOME", "cotune fed init")


def test_a_key_of_another_home_is_refused(home: FedHome, tmp_path: Path) -> None:
    (home.path / "coordinator.key").unlink()
    SigningKey.create(home.path / "coordinator.key")
    assert refusal(home.path).code == "E-FED-HOME"


def test_a_setting_that_is_none_is_refused_with_the_nearest(home: FedHome) -> None:
    file = home.path / "fed.toml"
    file.write_text(file.read_text().replace("max_body_mb", "max_body"))
    error = refusal(home.path)
    assert error.code == "E-FED-KEY"
    assert "max_body_mb" in error.message
    assert "line" in error.message


@pytest.mark.parametrize(
    ("before", "after", "param"),
    [
        ("8443", "99999", "federation.address"),
        ("127.0.0.1:", "", "federation.address"),
        ('"embedded"', '"open"', "gateway.kind"),
        ("9080", "0", "superlink.port"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(home: FedHome, before: str, after: str, param: str) -> None:
    file = home.path / "fed.toml"
    file.write_text(file.read_text().replace(before, after, 1))
    error = refusal(home.path)
    assert (error.code, error.param) == ("E-FED-VALUE", param)


def test_a_home_that_was_moved_finds_itself(home: FedHome, tmp_path: Path) -> None:
    home.flwr_environment()
    home.path.rename(tmp_path / "moved")
    moved = FedHome.open(tmp_path / "moved")
    environment = moved.flwr_environment()
    config = (tmp_path / "moved" / "flwr" / "config.toml").read_text()
    assert environment["FLWR_HOME"] == str(tmp_path / "moved" / "flwr")
    assert str(tmp_path / "moved" / "tls" / "ca.crt") in config
    assert str(home.path) not in config
    assert "insecure" not in config


def test_flower_is_told_to_send_no_telemetry_and_install_nothing(home: FedHome) -> None:
    environment = home.flwr_environment()
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


def test_the_disk_is_named_when_a_home_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as caught:
        FedHome.create(tmp_path / "file" / "fed", SETTINGS)
    assert caught.value.code == "E-STORAGE"


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    code = cli.run(["fed", *arguments, "--json"])
    answer = json.loads(capsys.readouterr().out)
    return {"exit": code, **(answer.get("data") or answer["error"])}


def test_the_commands_speak_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--home", str(tmp_path / "fed"))
    made = told(capsys, "init", "--name", "lungs", "--address", "fed.example.org:8443", *where)
    assert made["exit"] == 0
    assert str(made["key"]).startswith("SHA256:")
    assert told(capsys, "sites", *where)["sites"] == []
    assert told(capsys, "down", *where)["did_run"] is False
    assert told(capsys, "revoke", "nobody", *where)["code"] == "E-SITE-UNKNOWN"
    assert told(capsys, "init", "--name", "x", "--address", "y:1", *where)["code"] == "E-FED-EXISTS"
    wrong = told(capsys, "init", "--name", "x", "--address", "y", "--home", str(tmp_path / "b"))
    assert (wrong["exit"], wrong["code"], wrong["param"]) == (4, "E-FED-VALUE", "federation.address")
    assert not (tmp_path / "b").exists()
