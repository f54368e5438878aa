"""`cotune site log`: the ledger on the screen, as a table, or as a file that anybody can check."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cotune.client.exporting import export_ledger
from cotune.client.home import SiteHome
from cotune.client.site_options import AsJson, HomeOption, open_home
from cotune.client.site_views import log_text, proof_of, view_of, view_text
from cotune.shared.cli import show
from cotune.shared.exports.tables import csv_text
from cotune.shared.files import write_atomic

OWN_COLUMNS = ("run_id", "round", "dataset", "job_sha256", "by", "rule", "text", "reason")
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
        _write_csv(csv_file, opened)
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
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the entries to this file.")] = None,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Write the signed ledger to one file, for `cotune verify FILE` on any machine. No record and no path is in it."""
    opened = open_home(home)
    exported = export_ledger(opened, file)
    if csv_file:
        _write_csv(csv_file, opened)
    data = {**view_of(opened), "file": str(file), "entries": exported.head.seq, "head": exported.head.sha256}
    data |= {"csv": str(csv_file)} if csv_file else {}
    text = f"{view_text(opened)}\nwrote {file}: {exported.head.seq} entries, head {exported.head.sha256}"
    show(data, as_json=as_json, text=f"{text}\ncheck it anywhere: cotune verify {file}")


def _write_csv(path: Path, home: SiteHome) -> None:
    """The entries, what most of them say in columns of its own, and all they say as JSON."""
    rows = [
        {"seq": entry.seq, "time": entry.time, "action": entry.action, "sha256": entry.sha256}
        | {name: entry.fields[name] for name in OWN_COLUMNS if name in entry.fields}
        | {"fields": json.dumps(entry.fields)}
        for entry in home.ledger.entries
    ]
    write_atomic(path, csv_text(("seq", "time", "action", *OWN_COLUMNS, "fields", "sha256"), rows).encode())
