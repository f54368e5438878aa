"""Copies of the updates that sites give in a run: a site itself keeps the newest few, a judge wants all."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Generator, Mapping
from pathlib import Path

from tests.integration.deployed.federation import Federation

from cotune.shared.runs import RunFolder

LOOK_S = 0.2


@contextlib.contextmanager
def keeping(made: Federation, run: RunFolder, folder: Path) -> Generator[Mapping[str, Path]]:
    """Copy every update of a run as it appears; yields site -> a folder that holds them in `updates`, as homes do."""
    kept = {site: folder / site for site in made.sites}
    for place in kept.values():
        (place / "updates").mkdir(parents=True)
    over = threading.Event()

    def look() -> None:
        for site, place in kept.items():
            for update in (made.sites[site].home / "updates").glob(f"{run.run_id}-*.safetensors"):
                copy = place / "updates" / update.name
                if not copy.exists():
                    with contextlib.suppress(FileNotFoundError):  # it was thrown away just now
                        shutil.copyfile(update, copy)

    def watch() -> None:
        while not over.wait(LOOK_S):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield kept
    finally:
        over.set()
        thread.join()
        look()
