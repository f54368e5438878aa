"""The judge of deployed runs finds what is wrong with a run: each invariant is broken on purpose, and says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from tests.integration.deployed.invariants import INVARIANTS, History, broken
from tests.integration.deployed.study import canary
from tests.integration.killed_study import tiny_model, write_home_study

from cotune.client.home import SiteHome
from cotune.shared.files import read_lines
from cotune.shared.runs import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run over sites with homes of their own."""
    folder = tmp_path_factory.mktemp("judged")
    study = write_home_study(folder, tiny_model(folder / "model"))
    assert study.start("runs", None).wait(timeout=900) == 0, study.said("runs").read_text()
    return folder


@pytest.fixture
def history(whole: Path, tmp_path: Path) -> History:
    """A copy of it that may be spoilt."""
    shutil.copytree(whole / "homes", tmp_path / "homes")
    shutil.copytree(whole / "runs", tmp_path / "runs")
    [state] = (tmp_path / "runs").glob("*/state.json")
    homes = {path.name: path for path in sorted((tmp_path / "homes").iterdir())}
    return History(
        run=RunFolder(state.parent),
        homes=homes,
        kept=homes,
        keys={name: SiteHome.open(home).ledger.head.public_key for name, home in homes.items()},
        before={},
        outside=[state.parent],
        expected=None,
        may_be_lost=set(),
        recovered={},
    )


def uncounted(history: History) -> None:
    path = history.run.privacy / "accountant.json"
    account = json.loads(path.read_bytes())
    account["sites"]["site-1"].pop()
    path.write_text(json.dumps(account))


def overspent(history: History) -> None:
    policy = history.homes["site-2"] / "policy.toml"
    policy.write_text(policy.read_text().replace("400.0", "0.1").replace("40.0", "0.1"))


def cut_short(history: History) -> None:
    ledger = history.homes["site-1"] / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))


def joined_twice(history: History) -> None:
    row = next(row for row in history.run.metrics() if row.get("site"))
    history.run.record_metrics(**{name: value for name, value in row.items() if value is not None})


def another_adapter(history: History) -> None:
    arrays = load_file(history.adapter)
    name = sorted(arrays)[0]
    arrays[name] = arrays[name].copy()
    arrays[name].flat[0] += 1e-6
    save_file(arrays, history.adapter)


def changed_after(history: History) -> None:
    (history.run.path / "summary.json").write_text("{}")


def told(history: History) -> None:
    history.run.emit("site", canary("site-1", 3))


def failed(history: History) -> None:
    path = history.run.path / "state.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"status": "failed"}))


SPOILT: dict[str, tuple[str, Callable[[History], None]]] = {
    "I1": ("the coordinator counts", uncounted),
    "I2": ("spent", overspent),
    "I3": ("its head is not of its last line", cut_short),
    "I4": ("joined 2 times", joined_twice),
    "I5": ("not what the sites' updates add up to", another_adapter),
    "I7": ("verify: files", changed_after),
    "I8": ("a word of a record", told),
    "I9": ("the run is failed", failed),
}


def test_a_run_that_nothing_happened_to_breaks_no_invariant(history: History) -> None:
    assert broken(history) == []
    assert {line["action"] for line in read_lines(history.homes["site-1"] / "ledger.jsonl")} >= {"budget.commit"}


@pytest.mark.parametrize("name", SPOILT)
def test_each_invariant_finds_what_breaks_it(history: History, name: str) -> None:
    words, spoil = SPOILT[name]
    spoil(history)
    assert any(words in fault for fault in INVARIANTS[name](history))


def test_an_update_under_another_key_than_the_enrolled_one_is_found(history: History) -> None:
    spoilt = replace(history, keys={**history.keys, "site-1": history.keys["site-2"]})
    assert any("no head signed by its key" in fault for fault in INVARIANTS["I6"](spoilt))


def test_a_round_charged_again_is_found_unless_it_may_have_been_lost(history: History) -> None:
    run_id = history.run.run_id
    entries = [e for e in history.entries("site-3") if e.fields.get("run_id") == run_id and e.fields.get("round") == 1]
    home = SiteHome.open(history.homes["site-3"])
    again = next(e for e in entries if e.action == "budget.reserve").fields
    home.ledger.append("budget.reserve", **again)
    assert any("charged again" in fault for fault in INVARIANTS["I2"](history))
    lost = replace(history, may_be_lost={("site-3", 1)})
    assert not any("charged again" in fault for fault in INVARIANTS["I2"](lost))
