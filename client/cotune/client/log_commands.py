"""`cotune site log`: the ledger on the screen, as a table, or as a file that anybody can check."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cotune.client.exporting import export_ledger
from cotune.client.site_options import AsJson, HomeOption, open_home
from cotune.client.site_views import log_text, proof_of, view_of, view_text
from cotune.shared.cli import show
from cotune.shared.files import write_atomic

log_app = typer.Typer(
    add_completion=False, rich_markup_mode=None, help="Show the ledger, checked line by line, or export it."
)


@log_app.callback(invoke_without_command=True)
def log(
    ctx: typer.Context,
    verify: Annotated[bool, typer.Option("--verify", help="Only the proof that the ledger is whole.")] = False,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the entries to this file.")] = None,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Show the ledger, checked line by line, and why the site's own checks of its records refused jobs."""
    if ctx.invoked_subcommand is not None:
        return
    opened = open_home(home)
    entries = [] if verify else list(opened.ledger.entries)
    if csv_file:
        _write_csv(csv_file, [asdict(entry) for entry in opened.ledger.entries])
    data = {
        **view_of(opened),
        "proof": proof_of(opened),
        "entries": [asdict(entry) for entry in entries],
        "own_checks": [] if verify else opened.jobs.own_lines(),
    }
    show(data, as_json=as_json, text=log_text(opened, entries, full=not verify))


@log_app.command()
def export(
    file: Annotated[Path, typer.Argument(help="Where to; a file that is there is replaced.")],
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Write the signed ledger to one file, for `cotune verify FILE` on any machine. No record and no path is in it."""
    opened = open_home(home)
    exported = export_ledger(opened, file)
    data = {**view_of(opened), "file": str(file), "entries": exported.head.seq, "head": exported.head.sha256}
    text = f"{view_text(opened)}\nwrote {file}: {exported.head.seq} entries, head {exported.head.sha256}"
    show(data, as_json=as_json, text=f"{text}\ncheck it anywhere: cotune verify {file}")


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    buffer = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(buffer, ("seq", "time", "action", "fields", "sha256"))
    writer.writeheader()
    writer.writerows({**row, "fields": json.dumps(row["fields"])} for row in rows)
    write_atomic(path, buffer.getvalue().encode())
