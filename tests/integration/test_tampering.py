"""Every way to cheat on a run is caught by the check that is to name it, also where the cheater repairs the rest."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.cheats import CHEATS, Cheat, attacked
from tests.integration.tampered_world import SITES, World
from tests.integration.tampering import judged, small_world

from cotune.shared.checking.checks import run_checks
from cotune.shared.checking.examined import Examined
from cotune.shared.runs import RunFolder
from cotune.shared.signers import COORDINATOR, NAMESPACE, signature_path, signers_path
from cotune.shared.verification import CHECKS, verify_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("tampering")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTUNE_CACHE", str(folder / "cache"))
        yield small_world(folder)


def test_the_honest_run_passes_every_check(world: World) -> None:
    checks = verify_run(world.run, world.signers)
    assert [check.detail for check in checks if not check.passed] == []
    assert [check.name for check in checks] == list(CHECKS)


@pytest.mark.parametrize("cheat", CHEATS, ids=[cheat.what for cheat in CHEATS])
def test_a_cheat_is_named(world: World, cheat: Cheat, tmp_path: Path) -> None:
    [check] = judged(world, cheat, tmp_path, alone=True)
    assert not check.passed, check.detail
    assert "cannot be checked" not in check.detail


def test_there_are_ways_enough_and_each_is_another() -> None:
    assert len({cheat.what for cheat in CHEATS}) == len(CHEATS) >= 40
    assert CHECKS.keys() - {cheat.check for cheat in CHEATS} == {"state", "second accountant"}


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
@pytest.mark.parametrize("name", [COORDINATOR, *SITES])
def test_stock_openssh_checks_the_signatures(world: World, name: str) -> None:
    def accepts(content: bytes, who: str = name) -> bool:
        command = ["ssh-keygen", "-Y", "verify", "-f", str(signers_path(world.run)), "-I", who, "-n", NAMESPACE]
        command += ["-s", str(signature_path(world.run, name))]
        return subprocess.run(command, input=content, capture_output=True, check=False).returncode == 0

    content = (world.run.privacy / "claim.json").read_bytes()
    assert accepts(content)
    assert not accepts(content.replace(b"0", b"1", 1))
    assert not accepts(content, "site-1" if name == COORDINATOR else COORDINATOR)


@pytest.mark.parametrize(("rows", "lower", "holds"), [(1, 0.2, True), (1, 1.0, False), (4, 1.0, True), (4, 9.0, False)])
def test_a_lower_bound_is_held_against_what_is_claimed_of_such_canaries(
    world: World, tmp_path: Path, rows: int, lower: float, holds: bool
) -> None:
    """The world's rows cost epsilon 0.71 each, and a person with four rows 4.17."""
    run = world.copy(tmp_path)
    claimed = {1: run.claim()["guarantee"]["epsilon"], 4: run.claim()["guarantee"]["person"][1]["epsilon"]}[rows]

    def change(said: Any) -> None:
        said["run"]["canaries"] = {"candidates": 100, "inserted": 50, "rows_each": rows, "unit": "record"}
        said["run"]["audit"][0] |= {"epsilon_lower": lower, "claimed_epsilon": claimed}

    attacked(run, change)
    [check] = run_checks({"attack": CHECKS["attack"]}, Examined(run))
    assert check.passed is holds, check.detail


def test_a_partial_run_names_what_is_missing(world: World, tmp_path: Path) -> None:
    run = world.copy(tmp_path)
    for name in ("MANIFEST.json", "summary.json", "privacy/claim.json", "privacy/accountant.json", "adapter/README.md"):
        (run.path / name).unlink()
    shutil.rmtree(run.privacy / "signatures")
    run.set_state("running", 1)
    failed = {check.name: check.detail for check in verify_run(RunFolder(run.path)) if not check.passed}
    assert "the run is running" in failed["state"]
    assert failed["claim"].startswith("privacy/claim.json: there is none yet")
    assert failed["files"].startswith("MANIFEST.json: there is none yet")
    assert not any("cannot be checked" in detail for detail in failed.values())


@pytest.mark.parametrize("content", ["", "null", "[]", "{", "0", '{"schema": 1}', "[" * 100_000])
def test_hostile_files_end_in_named_failures(world: World, tmp_path: Path, content: str) -> None:
    run = world.copy(tmp_path)
    for name in ("summary.json", "state.json", "privacy/claim.json", "privacy/accountant.json", "MANIFEST.json"):
        (run.path / name).write_text(content)
    (run.path / "metrics.jsonl").write_text(content + "\n")
    run.ledger("site-1").write_text(content + "\n")
    (run.path / "attack").mkdir()
    (run.path / "attack" / "results.json").write_text(content)
    checks = verify_run(RunFolder(run.path))
    assert not any(check.passed for check in checks if check.name not in {"keys", "metrics"}), checks


def test_no_name_in_a_run_steers_a_terminal(world: World, tmp_path: Path) -> None:
    run = world.copy(tmp_path)
    evil = "\x1b]0;pwned\x07\x1b[2J\u202e"
    (run.path / f"adapter/{evil}.bin").write_bytes(b"x")
    (run.path / "metrics.jsonl").write_text('{"round": 1, "site": "site-1", "\\u001b[31m": 1}\n')
    details = [check.detail for check in verify_run(RunFolder(run.path))]
    assert any(".bin" in detail for detail in details)
    assert all(detail.isprintable() for detail in details)
