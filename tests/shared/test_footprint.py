from __future__ import annotations

import logging
import socket

import pytest

from cotune.shared.errors import JobError
from cotune.shared.files import write_json
from cotune.shared.footprint import WORLD, country, footprint, measuring


@pytest.fixture
def path(tmp_path):
    return tmp_path / "footprint.json"


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Measuring is on, the working folder is watched, and no socket goes anywhere."""
    monkeypatch.delenv("COTUNE_FOOTPRINT")
    monkeypatch.delenv("COTUNE_COUNTRY", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def refuse(*_: object) -> None:
        raise AssertionError("something went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path / "here"


@pytest.mark.parametrize(("said", "name"), [("FRA", "France (FRA)"), (None, WORLD)])
def test_energy_is_measured_and_told_with_how_and_where(path, measured, monkeypatch, said, name):
    if said:
        monkeypatch.setenv("COTUNE_COUNTRY", said)
    monkeypatch.setenv("CODECARBON_SAVE_TO_FILE", "true")  # a user's own settings must not make it write or send
    monkeypatch.setenv("CODECARBON_SAVE_TO_API", "true")
    monkeypatch.setenv("CODECARBON_ELECTRICITYMAPS_API_TOKEN", "token")
    told: list[bool] = []
    with measuring(path, lambda: told.append(path.exists())):
        sum(range(3_000_000))
    found = footprint(path)
    assert found["energy_kwh"] > 0 and found["co2_kg"] > 0 and found["seconds"] > 0
    assert found["country"] == name and "codecarbon" in found["how"]
    assert told == [True]
    assert list(measured.iterdir()) == []
    if said is None:
        assert found["co2_kg"] / found["energy_kwh"] == pytest.approx(0.475, rel=0.01)  # kg a kWh, the world's average


def test_a_run_that_fails_has_used_its_energy_all_the_same(path, measured):
    told: list[bool] = []
    with pytest.raises(JobError, match="failed"), measuring(path, lambda: told.append(True)):
        raise JobError("E-X", "failed")
    assert footprint(path)["energy_kwh"] > 0
    assert told == []


def test_a_run_that_goes_on_in_another_process_adds_up(path, measured):
    for _ in range(2):
        with measuring(path):
            sum(range(100_000))
        found = footprint(path)
        write_json(path, {**found, "energy_kwh": 5.0, "seconds": 100.0})
    assert found["energy_kwh"] > 5 and found["seconds"] >= 100


def test_a_country_that_is_none_ends_it_before_it_begins(path, measured, monkeypatch):
    monkeypatch.setenv("COTUNE_COUNTRY", "Freedonia\x1b[2J")
    begun: list[bool] = []
    with pytest.raises(JobError, match="ISO 3166") as caught, measuring(path):
        begun.append(True)
    assert caught.value.code == "E-COUNTRY" and "\x1b" not in caught.value.message
    assert begun == []


def test_it_can_be_switched_off(path, monkeypatch):
    monkeypatch.setenv("COTUNE_FOOTPRINT", "0")
    monkeypatch.setenv("COTUNE_COUNTRY", "nonsense")
    with measuring(path, lambda: pytest.fail("there is nothing to tell")):
        pass
    assert country() is None
    assert not path.exists()


def test_the_tracker_says_nothing(path, measured, capfd, caplog):
    with caplog.at_level(logging.DEBUG, logger="cotune"), measuring(path):
        pass
    assert capfd.readouterr() == ("", "")


def test_a_figure_that_cannot_be_kept_is_lost_and_nothing_else(path, measured):
    path.mkdir()
    with measuring(path, lambda: pytest.fail("there is nothing to tell")):
        done = True
    assert done


@pytest.mark.parametrize("fault", ["start", "stop"])
def test_a_tracker_that_fails_costs_the_figure_and_nothing_else(path, measured, monkeypatch, fault):
    def fail(_self: object) -> None:
        raise RuntimeError("no such sensor")

    monkeypatch.setattr(f"codecarbon.OfflineEmissionsTracker.{fault}", fail)
    with measuring(path, lambda: pytest.fail("there is nothing to tell")):
        done = True
    assert done and footprint(path) == {}


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_file_counts_as_none_and_is_written_anew(path, measured, content):
    path.write_text(content)
    assert footprint(path) == {}
    with measuring(path):
        pass
    assert footprint(path)["seconds"] > 0
