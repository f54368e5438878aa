"""What the lower layers make of a site's records, kept between the rounds of a run and no longer: it is as sensitive
as the records are."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cotune.shared.files import storage_errors

IDLE_S = 6 * 3600.0  # longer than a coordinator waits between two rounds of a run that goes on


@dataclass(frozen=True)
class WorkFolders:
    """One private folder a run.

    Guarantee: a run's folder lies inside the site's home, is its owner's alone, and goes with the run.

    Edge cases: a run that nobody ever ends loses its folder after six hours without a round; one that goes on
    after that, or after its end, makes it anew from the records, which costs time and nothing else.

    Attributes:
        path: In the site's home.
    """

    path: Path

    def of(self, run_id: str) -> Path:
        """The folder of a run, which is in use now."""
        folder = self.path / run_id
        with storage_errors(folder):
            self.path.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            os.utime(folder)
        return folder

    def end(self, run_id: str) -> None:
        """Remove a run's folder, if it has one."""
        shutil.rmtree(self.path / run_id, ignore_errors=True)

    def sweep(self) -> None:
        """Remove the folders of runs that were left."""
        for folder in self.path.iterdir() if self.path.exists() else ():
            if time.time() - folder.stat().st_mtime > IDLE_S:
                self.end(folder.name)
