"""Features of a run: in the site's home, closed to others, gone with the run."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from cotune.client.work import IDLE_S, WorkFolders


def test_a_runs_folder_is_its_owners_alone_and_goes_with_the_run(tmp_path: Path) -> None:
    work = WorkFolders(tmp_path / "work")
    for name in ("run-1", "run-2"):
        (work.of(name) / "features.f4").write_bytes(b"1")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (work.path, work.of("run-1"))} == {0o700}
    work.end("run-1")
    work.end("run-9")
    assert [path.name for path in work.path.iterdir()] == ["run-2"]


def test_what_a_run_left_is_swept_away_unless_it_goes_on(tmp_path: Path) -> None:
    work = WorkFolders(tmp_path / "work")
    work.sweep()
    old = time.time() - IDLE_S - 60
    for name in ("left", "goes-on", "new"):
        folder = work.of(name)
        (folder / "features.f4").write_bytes(b"1")
        if name != "new":
            os.utime(folder, (old, old))
    work.of("goes-on")
    work.sweep()
    assert sorted(path.name for path in work.path.iterdir()) == ["goes-on", "new"]
    assert (work.path / "goes-on" / "features.f4").exists()
