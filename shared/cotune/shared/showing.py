"""Showing a run while it goes on, its result, and how it ended. Everything shown comes from the run's own files."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cotune.shared.cli import ENVELOPE_VERSION
from cotune.shared.errors import ended
from cotune.shared.runs import RunFolder

REFRESH_S = 1.0
SAID = ("publish", "round", "approval", "submission")  # kinds of events that are worth a line


@dataclass(frozen=True)
class View:
    """What of a run is to be seen.

    Attributes:
        run: The run.
        sites: Names of its sites.
        steps: The steps that were taken so far; None where only the sites know.
    """

    run: RunFolder
    sites: Sequence[str]
    steps: Callable[[], Sequence[dict[str, Any]]] | None = None


@contextlib.contextmanager
def shown(view: View, *, quiet: bool, as_json: bool) -> Generator[None]:
    """Show a run's progress while the block runs: a live table on a terminal, else one plain line an event.

    With `as_json` every event is one JSON line on standard output.
    """
    stop = threading.Event()
    console = Console(stderr=True)
    live = console.is_terminal and not as_json and not quiet
    target = _show_live if live else _show_lines
    arguments = (view, stop, console) if live else (view, stop, quiet, as_json)
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


def _show_lines(view: View, stop: threading.Event, quiet: bool, as_json: bool) -> None:
    run = view.run
    started, seen_events, seen_rows, announced = time.monotonic(), 0, 0, 0
    while True:
        last = stop.is_set()
        events, rows = run.events(), [row for row in run.metrics() if not row.get("site")]
        for event in events[seen_events:]:
            if as_json:
                click.echo(json.dumps(event))
            elif not quiet and (event["level"] != "info" or event["type"] in SAID):
                click.echo(f"[{_clock(started)}] {event['message']}", err=True)
        for row in rows[seen_rows:]:
            if not quiet and not as_json:
                click.echo(f"[{_clock(started)}] {row_text(row)}", err=True)
        steps = len(view.steps()) if view.steps else 0
        if not quiet and not as_json and steps - announced >= _announce_every(view):
            announced = steps
            click.echo(f"[{_clock(started)}] {_step_text(view, steps)}", err=True)
        seen_events, seen_rows = len(events), len(rows)
        if last:
            return
        stop.wait(REFRESH_S)


def _announce_every(view: View) -> int:
    return max(1, view.run.job().train.local_steps * len(view.sites) // 4)


def _step_text(view: View, steps: int) -> str:
    job = view.run.job()
    total = job.steps * len(view.sites)
    return f"round {view.run.state()['round']}/{job.run.rounds}: {steps} of {total} site steps taken"


def row_text(row: dict[str, Any]) -> str:
    """A row of metrics of the whole federation, for people."""
    name = "base model" if row["round"] == 0 else f"round {row['round']}"
    parts = [f"{name}: loss {row['valid_loss']:.3f}"]
    if row.get("accuracy") is not None:
        parts.append(f"accuracy {row['accuracy']:.3f} ({row['accuracy_low']:.3f} to {row['accuracy_high']:.3f})")
    if row.get("epsilon") is not None:
        parts.append(f"epsilon spent {row['epsilon']:.2f}")
    return ", ".join(parts)


def _show_live(view: View, stop: threading.Event, console: Console) -> None:
    started = time.monotonic()
    with Live(console=console, refresh_per_second=2, transient=True) as live:
        while not stop.is_set():
            live.update(_live_table(view, started))
            stop.wait(REFRESH_S)


def _live_table(view: View, started: float) -> Table:
    run = view.run
    job, state, rows = run.job(), run.state(), run.metrics()
    events = run.events()
    last = [row for row in rows if not row.get("site")][-1:]
    caption = " · ".join([*(row_text(row) for row in last), events[-1]["message"] if events else ""])
    title = f"{run.run_id}  {state['status'].upper()}  round {state['round']}/{job.run.rounds}  {_clock(started)}"
    table = Table(title=title, caption=Text(caption), title_justify="left", caption_justify="left")
    for name in ("site", "step", "eps spent / cap", "up/down MB"):
        table.add_column(name)
    steps = view.steps() if view.steps else ()
    for site in view.sites:
        own = [row for row in rows if row.get("site") == site]
        done = max((s["step"] for s in steps if s["site"] == site and s["round"] == state["round"]), default=0)
        spent = own[-1]["epsilon"] if own else (None if job.privacy.level == "none" else 0.0)
        table.add_row(
            site,
            f"{done}/{job.train.local_steps}" if view.steps else "-",
            "no guarantee" if spent is None else f"{spent:.2f} / {job.privacy.epsilon:.2f}",
            f"{sum(r['bytes_up'] for r in own) / 1e6:.2f}/{sum(r['bytes_down'] for r in own) / 1e6:.2f}",
        )
    return table


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


def raise_outcome(run: RunFolder) -> None:
    """Raise what ended a run, with its exit code there; nothing if it succeeded. Other processes may have run it."""
    state = run.state()
    if state["status"] == "succeeded":
        return
    fault: dict[str, Any] = state["error"] or {
        "code": "E-RUN",
        "message": f"the run was {state['status']}",
        "exit_code": 1,
    }
    raise ended(fault["code"], fault["message"], fault["exit_code"], fault.get("hint"))


def show_result(run: RunFolder, *, as_json: bool) -> None:
    """Print the result of a run that succeeded: tables, or the last JSON line, which says that it is the last."""
    if as_json:
        envelope = {"schema_version": ENVELOPE_VERSION, "status": "ok", "terminal": True, "data": run.summary()}
        click.echo(json.dumps({**envelope, "run": str(run.path)}))
    else:
        click.echo(result_text(run))
