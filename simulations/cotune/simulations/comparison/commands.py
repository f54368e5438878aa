"""`cotune compare`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cotune.shared.cli import show
from cotune.shared.errors import JobError
from cotune.shared.report.wording import duration

if TYPE_CHECKING:
    from cotune.simulations.comparison.cells import Request
    from cotune.simulations.comparison.folder import Comparison, Line
    from cotune.simulations.comparison.running import Watch

NOT_PRIVATE_HINT = "add --i-know if nobody's privacy is at stake"


def compare(
    job: Annotated[str, typer.Argument(help="A job file, or recipe:NAME.")] = "run.toml",
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of all runs: run.rounds=3 ...")] = None,
    rules: Annotated[str | None, typer.Option(help="Aggregation rules: ffa,product_svd. Default: the job's.")] = None,
    epsilons: Annotated[str | None, typer.Option(help="1,3,8,inf; inf: no privacy. Default: the job's.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Public seeds: 1,2,3. Default: the job's.")] = None,
    vary: Annotated[list[str] | None, typer.Option(help="Also vary SETTING=V1,V2,...; several times.")] = None,
    own: Annotated[list[str] | None, typer.Option("--for", help="RULE:SETTING=VALUE, for one rule alone.")] = None,
    tune: Annotated[str | None, typer.Option(help="First find the best of SETTING=V1,V2,... for each row.")] = None,
    out: Annotated[Path, typer.Option(help="Folder the comparison's folder is made in.")] = Path("comparisons"),
    name: Annotated[str | None, typer.Option(help="The comparison's name. Default: the job's.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the comparison in this folder instead.")] = None,
    kept: Annotated[Path | None, typer.Option(help="Private folder for what other comparisons can use.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each in a process of its own.")] = 1,
    i_know: Annotated[bool, typer.Option("--i-know", help="Run jobs that give no privacy at all.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON envelope.")] = False,
) -> None:
    """Run one job by every rule, epsilon and seed, in one process; write a table and charts.

    The noise follows from each epsilon. The same command again goes on where it was interrupted.
    """
    from cotune.simulations.comparison.cells import Options, own_job, parse_request
    from cotune.simulations.comparison.folder import make_comparison, open_comparison
    from cotune.simulations.comparison.running import run_comparison

    if resume:
        comparison = open_comparison(resume)
    else:
        options = Options(rules, epsilons, seeds, tuple(vary or ()), tuple(own or ()), tune)
        request = parse_request(job, overrides or (), options)
        _require_consent(request, i_know)
        comparison = make_comparison(out / (name or own_job(request).run.name), request)
    with _shown(quiet=quiet or as_json) as watch:
        watch.say(f"comparison in {comparison.path}")
        run_comparison(comparison, jobs, watch, kept.resolve() if kept else None)
    _show_result(comparison, as_json)


def _require_consent(request: Request, i_know: bool) -> None:
    from cotune.simulations.comparison.running import jobs_of

    found = [job for job in jobs_of(request) if not job.is_private]
    if found and not i_know:
        raise JobError(
            "E-NON-PRIVATE",
            f"{len(found)} runs would give NO privacy; every artefact would say so",
            hint=NOT_PRIVATE_HINT,
        )


@contextlib.contextmanager
def _shown(*, quiet: bool) -> Generator[Watch]:
    """Show what happens on standard error: a bar on a terminal, and a line for each finished cell."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from cotune.simulations.comparison.running import Watch

    console, started = Console(stderr=True, highlight=False), time.monotonic()
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), console=console,
        transient=True, disable=quiet or not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task("starting", total=None)

    def say(line: str) -> None:
        if not quiet:
            console.print(line, markup=False, soft_wrap=True)

    def finished(line: Line, done: int, total: int, left: float) -> None:
        rest = f"about {duration(left)} left" if done < total else "the last of these"
        bar.update(task, completed=done, total=total, description=rest)
        say(f"[{duration(time.monotonic() - started)}] {done}/{total} {_line_text(line)}; {rest}")

    with bar:
        yield Watch(say, finished)


def _line_text(line: Line) -> str:
    if line["error"]:
        return f"{line['cell']}: FAILED: {line['error']['message']}"
    tuned = "".join(f" {name}={value}" for name, value in (line["varied"] | line["tuned"]).items())
    accuracy = "" if line["accuracy"] is None else f"accuracy {line['accuracy']:.3f}, "
    return f"{line['cell']}{tuned}: {accuracy}loss {line['loss']:.3f}, {line['seconds']:.0f} s"


def _show_result(comparison: Comparison, as_json: bool) -> None:
    from cotune.simulations.comparison.table import notes, rows_of, table_text

    lines = list(comparison.lines().values())
    data = {
        "comparison": str(comparison.path),
        "rows": [row.to_dict() for row in rows_of(lines)],
        "notes": notes(comparison.request, lines),
    }
    places = [
        f"{part:<8} {comparison.path / file}" for part, file in (("table", "table.md"), ("results", "results.jsonl"))
    ]
    places += [f"chart    {path}" for path in sorted(comparison.path.glob("*.svg"))]
    show(data, as_json=as_json, text="\n".join([table_text(comparison.request, lines), "", *places]))
