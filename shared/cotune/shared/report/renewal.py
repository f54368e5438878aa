"""What tells people of a run, made anew once more of it has become known."""

from __future__ import annotations

from cotune.shared.files import write_atomic
from cotune.shared.report.card import cards
from cotune.shared.report.page import render, write_report
from cotune.shared.runs import RunFolder


def renew(run: RunFolder) -> None:
    """Write the report of a run anew, and its cards and its manifest where it has such.

    All is made before any of it is written, so that the manifest is out of date for no longer than that takes.

    Raises:
        JobError: A file of the run is damaged; nothing was written.
        StorageError: A file could not be written.
    """
    made, page = cards(run), render(run)
    for path, card in made.items():
        write_atomic(path, card)
    write_report(run, page)
    if (run.path / "MANIFEST.json").exists():
        run.write_manifest()
