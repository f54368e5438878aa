"""An exported ledger on another machine: what is whole passes, and each thing that was changed has a name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.client.federations import STRANGER

from cotune.client.exporting import export_ledger
from cotune.client.guard import Guard
from cotune.client.home import SiteHome
from cotune.shared.chain import read_chain, sign_head
from cotune.shared.cli import run
from cotune.shared.errors import JobError
from cotune.shared.exported import ExportedLedger, read_exported, verify_exported
from cotune.shared.keyfile import SigningKey
from cotune.shared.privacy.accounting import epsilon

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def site(guard: Guard, desk: Any, ask_job: Any) -> SiteHome:
    """A site that gave two rounds of one run and one of another."""
    for number, name in ((1, "run-1"), (2, "run-1"), (1, "run-2")):
        desk.take(guard, desk.plan(ask_job(), number, run_id=name))
    return guard.home


@pytest.fixture
def exported(site: SiteHome, tmp_path: Path) -> ExportedLedger:
    return export_ledger(site, tmp_path / "export.json")


def failed(exported: ExportedLedger) -> set[str]:
    return {check.name for check in verify_exported(exported) if not check.passed}


def changed(exported: ExportedLedger, change: Change, key: SigningKey | None = None) -> ExportedLedger:
    """The file with something changed; signed anew if there is a key."""
    data = json.loads(exported.to_json())
    change(data)
    made = ExportedLedger.model_validate(data)
    return made.signed(key.sign) if key else made


def test_a_whole_export_passes_and_holds_no_path_and_no_count_of_records(
    site: SiteHome, exported: ExportedLedger, tmp_path: Path, notes: Path, desk: Any, ask_job: Any
) -> None:
    read = read_exported(tmp_path / "export.json")
    assert read == exported
    assert failed(read) == set()
    [spent] = read.spending
    events = [desk.event(ask_job())] * 3
    assert spent.epsilon_spent == pytest.approx(epsilon(events, 1e-5))
    assert spent.runs == pytest.approx({"run-1": epsilon(events[:2], 1e-5), "run-2": epsilon(events[:1], 1e-5)})
    assert read.ledger.encode() == (site.path / "ledger.jsonl").read_bytes()
    text = (tmp_path / "export.json").read_text()
    assert str(notes) not in text
    assert str(tmp_path) not in text


def test_what_is_written_while_it_is_exported_is_not_in_it(site: SiteHome, tmp_path: Path) -> None:
    other = SiteHome.open(site.path)
    other.ledger.append("policy.change", policy_sha256="0" * 64)
    export_ledger(site, tmp_path / "export.json")
    assert failed(read_exported(tmp_path / "export.json")) == set()


def lower(data: dict[str, Any]) -> None:
    data["spending"][0]["epsilon_spent"] -= 0.1


def lower_run(data: dict[str, Any]) -> None:
    data["spending"][0]["runs"]["run-2"] -= 0.1


def drop_run(data: dict[str, Any]) -> None:
    del data["spending"][0]["runs"]["run-2"]


def unpriced(data: dict[str, Any]) -> None:
    data["spending"][0]["epsilon_spent"] = None


def small_budget(data: dict[str, Any]) -> None:
    data["spending"][0]["epsilon_total"] = 0.01


def looser_delta(data: dict[str, Any]) -> None:
    data["spending"][0]["delta"] = 1e-3


def twice(data: dict[str, Any]) -> None:
    data["spending"] *= 2


def other_site(data: dict[str, Any]) -> None:
    data["site"] = "charite"


def simulated(data: dict[str, Any]) -> None:
    data["simulated"] = True


def cut(data: dict[str, Any]) -> None:
    data["ledger"] = "".join(line + "\n" for line in data["ledger"].splitlines()[:-1])


def torn(data: dict[str, Any]) -> None:
    data["ledger"] = data["ledger"][:-1]


def emptied(data: dict[str, Any]) -> None:
    data["ledger"] = ""


def edited(data: dict[str, Any]) -> None:
    data["ledger"] = data["ledger"].replace('"run-2"', '"run-3"')


CHANGES: list[tuple[Change, set[str]]] = [
    (lower, {"epsilon", "second accountant"}), (lower_run, {"epsilon", "second accountant"}),
    (drop_run, {"epsilon", "second accountant"}), (unpriced, {"epsilon", "budgets"}), (small_budget, {"budgets"}),
    (looser_delta, {"epsilon"}), (twice, {"charges"}), (other_site, {"head", "key"}), (simulated, {"key"}),
    (cut, {"head"}),
    (torn, {"chain", "head", "key", "charges", "epsilon", "second accountant"}),
    (emptied, {"chain", "head", "key", "epsilon", "second accountant"}),
    (edited, {"chain", "head", "key", "charges", "epsilon", "second accountant"}),
]  # fmt: skip


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=lambda each: getattr(each, "__name__", ""))
def test_each_change_is_named_also_where_the_site_itself_signed_it(
    exported: ExportedLedger, site: SiteHome, change: Change, named: set[str]
) -> None:
    assert failed(changed(exported, change)) == named | {"signature"}
    own = SigningKey.load(site.path / "site.key")
    assert failed(changed(exported, change, own)) == named


def test_another_key_s_file_of_this_ledger_is_named(exported: ExportedLedger) -> None:
    head = sign_head(STRANGER, exported.site, read_chain(exported.ledger.encode())[-1])

    def taken_over(data: dict[str, Any]) -> None:
        data |= {"public_key": STRANGER.public, "head": head.model_dump()}

    assert failed(changed(exported, taken_over, STRANGER)) == {"key"}


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"kind": "other"}', b"{" * 5000])
def test_a_file_that_is_no_export_is_an_error_with_a_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    for path in (tmp_path / "x.json", tmp_path / "nothing", tmp_path):
        with pytest.raises(JobError) as caught:
            read_exported(path)
        assert caught.value.code == "E-EXPORT"


def test_the_commands_export_here_and_verify_there(
    site: SiteHome, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "export.json"
    assert run(["site", "log", "export", str(file), "--home", str(site.path)]) == 0
    assert f"cotune verify {file}" in capsys.readouterr().out
    site.path.rename(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    assert run(["verify", "export.json"]) == 0
    out = capsys.readouterr().out
    assert out.count("ok  ") == 8
    assert "FAIL" not in out
    data = json.loads(file.read_text())
    lower(data)
    file.write_text(json.dumps(data))
    assert run(["verify", "export.json", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "E-VERIFY"
    assert "signature: a part of the file was changed" in error["message"]
    assert "epsilon: notes: " in error["message"]
