"""Cheats on a small honest run in every way of cheats.py, and looks which check of `cotune verify` names it.

`python tests/integration/tampering.py` prints the table of docs/claims.md.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

if __package__ is None:  # run as a program
    sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.integration.cheats import CHEATS, Cheat
from tests.integration.killed_study import tiny_model, write_study
from tests.integration.tampered_world import World, make_world, sign_as_coordinator

from cotune.shared.checking.checks import Check, run_checks
from cotune.shared.checking.examined import Examined
from cotune.shared.errors import CotuneError
from cotune.shared.report.card import cards
from cotune.shared.runs import RunFolder
from cotune.shared.verification import CHECKS

WITHOUT_MANIFEST = "a file changed, and the manifest forgotten"


def small_world(folder: Path) -> World:
    """An honest run of two rounds at three sites, with secret noise."""
    model = tiny_model(folder / "model")
    privacy = {"noise_multiplier": 3.0, "epsilon": 30.0}
    return make_world(write_study(folder, model, 2, privacy=privacy).job)


def judged(world: World, cheat: Cheat, folder: Path, *, alone: bool = False) -> list[Check]:
    """What `cotune verify` says after a cheat, with the signers an officer knows.

    Args:
        world: Where it is done.
        cheat: What is done.
        folder: For the copy of the run that it is done to.
        alone: Make only the check that is to name it.
    """
    run = world.copy(folder)
    cheat.do(run, world)
    if not alone and cheat.check != "card":
        with contextlib.suppress(CotuneError, KeyError):  # of a claim that is none, no card can be made
            for path, card in cards(run).items():
                path.write_bytes(card)
    if cheat.who == "coordinator":
        sign_as_coordinator(run, world.coordinator)
    if cheat.what != WITHOUT_MANIFEST:
        run.write_manifest()
    table = {cheat.check: CHECKS[cheat.check]} if alone else CHECKS
    return run_checks(table, Examined(RunFolder(run.path), world.signers))


def main() -> None:
    """Print the table."""
    said = sys.stdout.write
    with tempfile.TemporaryDirectory(prefix="cotune-tampering-") as name:
        os.environ["COTUNE_CACHE"] = f"{name}/cache"
        world = small_world(Path(name))
        said("| what was done | by | caught by | it says |\n|---|---|---|---|\n")
        missed = 0
        for number, cheat in enumerate(CHEATS):
            failed = {check.name: check for check in judged(world, cheat, Path(name) / str(number)) if not check.passed}
            caught = failed.get(cheat.check)
            missed += caught is None
            also = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            words = caught.detail.replace("|", "\\|")[:110] if caught else "**NOT CAUGHT**"
            said(f"| {cheat.what} | {cheat.who} | {cheat.check}{also} | {words} |\n")
    said(f"\n{len(CHEATS)} ways to cheat, {len(CHEATS) - missed} caught by the check that is to name them\n")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
