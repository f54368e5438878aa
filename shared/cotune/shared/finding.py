"""Finding a run by what a person calls it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cotune.shared.errors import JobError
from cotune.shared.runs import RunFolder


def coordinators_folder() -> Path:
    """A coordinator's home if nothing is said: $COTUNE_FED, or `cotune/fed` in the user's data folder."""
    if named := os.environ.get("COTUNE_FED"):
        return Path(named)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "cotune" / "fed"


def runs_homes() -> tuple[Path, ...]:
    """Where runs are looked for if nothing is said: ./runs, and those of this machine's coordinator."""
    return Path("runs"), coordinators_folder() / "runs"


def known_runs(*homes: Path) -> list[RunFolder]:
    """The runs of some folders, oldest first."""
    found = {state.parent.resolve() for home in homes for state in home.glob("*/state.json")}
    return [RunFolder(path) for path in sorted(found, key=_started)]


def _started(run: Path) -> tuple[str, int]:
    """The second in its name, then the finer time of its first file."""
    first = run / "run.toml"
    return run.name[:15], first.stat().st_mtime_ns if first.exists() else 0


def find_run(reference: str, *homes: Path) -> RunFolder:
    """A run by path, by id, by a unique prefix of either part of its id, or `latest`.

    Args:
        reference: What the run is called.
        homes: The folders it may be in; `runs_homes()` if none is given.

    Raises:
        JobError: None or several match.
    """
    path = Path(reference)
    with contextlib.suppress(OSError):  # a name no file can have
        if (path / "state.json").exists():
            return RunFolder(path.resolve())
    homes = homes or runs_homes()
    known = known_runs(*homes)
    if reference == "latest" and known:
        return known[-1]
    matches = [run for run in known if run.run_id.startswith(reference) or f"-{reference}" in run.run_id]
    if len(matches) != 1:
        found = "none" if not matches else ", ".join(run.run_id for run in matches)
        where = " or ".join(str(home) for home in homes)
        raise JobError("E-RUN-UNKNOWN", f"expected one run called `{reference}` in {where}, found {found}", param="RUN")
    return matches[0]
