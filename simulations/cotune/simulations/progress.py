"""Showing a run while it goes on, and its result at the end. Everything shown comes from the run's own files."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cotune.shared.files import read_lines
from cotune.shared.job import Job
from cotune.shared.runs import RunFolder
from cotune.simulations.scenario import site_names, work_folder

REFRESH_S = 1.0


@contextlib.contextmanager
def shown(run: RunFolder, *, quiet: bool, as_json: bool) -> Generator[None]:
    """Show a run's progress while the block runs: a live table on a terminal, else one plain line an event.

    With `as_json` every event is one JSON line on standard output.
    """
    stop = threading.Event()
    console = Console(stderr=True)
    live = console.is_terminal and not as_json and not quiet
    target = _show_live if live else _show_lines
    arguments = (run, stop, console) if live else (run, stop, quiet, as_json)
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


def _show_lines(run: RunFolder, stop: threading.Event, quiet: bool, as_json: bool) -> None:
    started, seen_events, seen_rows, announced = time.monotonic(), 0, 0, 0
    while True:
        last = stop.is_set()
        events, rows = run.events(), [row for row in run.metrics() if not row.get("site")]
        for event in events[seen_events:]:
            if as_json:
                click.echo(json.dumps(event))
            elif not quiet and (event["level"] != "info" or event["type"] in ("publish", "round")):
                click.echo(f"[{_clock(started)}] {event['message']}", err=True)
        for row in rows[seen_rows:]:
            if not quiet and not as_json:
                click.echo(f"[{_clock(started)}] {_row_text(row)}", err=True)
        steps = len(_steps(run))
        if not quiet and not as_json and steps - announced >= _announce_every(run.job()):
            announced = steps
            click.echo(f"[{_clock(started)}] {_step_text(run, steps)}", err=True)
        seen_events, seen_rows = len(events), len(rows)
        if last:
            return
        stop.wait(REFRESH_S)


def _announce_every(job: Job) -> int:
    return max(1, job.train.local_steps * len(site_names(job)) // 4)


def _step_text(run: RunFolder, steps: int) -> str:
    job = run.job()
    total = job.steps * len(site_names(job))
    return f"round {run.state()['round']}/{job.run.rounds}: {steps} of {total} site steps taken"


def _row_text(row: dict[str, Any]) -> str:
    name = "base model" if row["round"] == 0 else f"round {row['round']}"
    parts = [f"{name}: loss {row['valid_loss']:.3f}"]
    if row.get("accuracy") is not None:
        parts.append(f"accuracy {row['accuracy']:.3f} ({row['accuracy_low']:.3f} to {row['accuracy_high']:.3f})")
    if row.get("epsilon") is not None:
        parts.append(f"epsilon spent {row['epsilon']:.2f}")
    return ", ".join(parts)


def _show_live(run: RunFolder, stop: threading.Event, console: Console) -> None:
    started = time.monotonic()
    with Live(console=console, refresh_per_second=2, transient=True) as live:
        while not stop.is_set():
            live.update(_live_table(run, started))
            stop.wait(REFRESH_S)


def _live_table(run: RunFolder, started: float) -> Table:
    job, state, rows = run.job(), run.state(), run.metrics()
    events = run.events()
    last = [row for row in rows if not row.get("site")][-1:]
    caption = " · ".join([*(_row_text(row) for row in last), events[-1]["message"] if events else ""])
    title = f"{run.run_id}  {state['status'].upper()}  round {state['round']}/{job.run.rounds}  {_clock(started)}"
    table = Table(title=title, caption=Text(caption), title_justify="left", caption_justify="left")
    for name in ("site", "step", "eps spent / cap", "up/down MB"):
        table.add_column(name)
    steps = _steps(run)
    for site in site_names(job):
        own = [row for row in rows if row.get("site") == site]
        done = max((s["step"] for s in steps if s["site"] == site and s["round"] == state["round"]), default=0)
        spent = own[-1]["epsilon"] if own else (None if job.privacy.level == "none" else 0.0)
        table.add_row(
            site,
            f"{done}/{job.train.local_steps}",
            "no guarantee" if spent is None else f"{spent:.2f} / {job.privacy.epsilon:.2f}",
            f"{sum(r['bytes_up'] for r in own) / 1e6:.2f}/{sum(r['bytes_down'] for r in own) / 1e6:.2f}",
        )
    return table


def _steps(run: RunFolder) -> list[dict[str, Any]]:
    return read_lines(work_folder(run.run_id) / "progress.jsonl")


def _clock(started: float) -> str:
    seconds = int(time.monotonic() - started)
    return f"{seconds // 60:02d}:{seconds % 60:02d}"


def result_text(run: RunFolder) -> str:
    """The table a finished run ends with: models, then sites, then where things are."""
    summary = run.summary()
    console = Console(file=None, width=110, record=True, no_color=not sys.stdout.isatty(), highlight=False)
    with console.capture() as captured:
        if summary["final"]:
            console.print(_models_table(summary))
        console.print(_sites_table(summary))
        if summary["non_private"]:
            console.print("NON-PRIVATE: this run promises nothing to anybody whose records it used.")
    lines = [captured.get().rstrip()]
    lines.append(
        f"{summary['seconds']:.0f} s, {(summary['bytes_up'] + summary['bytes_down']) / 1e6:.1f} MB over the wire"
    )
    lines.append(f"adapter  {_short(run.adapter)}")
    lines.append(f"report   {_short(run.path / 'report' / 'index.html')}")
    lines.append(f"check it: cotune verify {_short(run.path)}")
    return "\n".join(lines)


def _models_table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"{summary['name']}: {summary['final']['examples']} held-out rows", title_justify="left")
    for name in ("model", "accuracy", "95 % interval", "loss", "epsilon"):
        table.add_column(name)
    worst = max((site["epsilon"] or 0.0 for site in summary["sites"]), default=0.0)
    federated = "federated" if summary["non_private"] else "federated with DP"
    rows = [("base model", summary["base"], None), (federated, summary["final"], worst or None)]
    rows += [(line["name"], line["evaluation"], line["epsilon"]) for line in summary["baselines"]]
    for name, scores, spent in rows:
        known = scores["accuracy"] is not None
        table.add_row(
            name,
            f"{scores['accuracy']:.3f}" if known else "-",
            f"{scores['accuracy_low']:.3f} to {scores['accuracy_high']:.3f}" if known else "-",
            f"{scores['loss']:.3f}",
            "0" if name == "base model" else ("infinite" if spent is None else f"{spent:.2f}"),
        )
    return table


def _sites_table(summary: dict[str, Any]) -> Table:
    table = Table(title="what each site spent", title_justify="left")
    for name in ("site", "rounds", "steps", "epsilon", "delta", "sent MB", "received MB"):
        table.add_column(name)
    for site in summary["sites"]:
        private = site["epsilon"] is not None
        table.add_row(
            site["site"],
            str(site["rounds"]),
            str(site["steps"]),
            f"{site['epsilon']:.3f}" if private else "infinite",
            f"{site['delta']:.2e}" if private else "-",
            f"{site['bytes_up'] / 1e6:.2f}",
            f"{site['bytes_down'] / 1e6:.2f}",
        )
    return table


def _short(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
