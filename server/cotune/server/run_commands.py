"""`cotune submit`, `status`, `watch`, `logs`, `stop`, `ls`: deployed runs, at the coordinator's own machine.

They read and write run folders; the SuperLink is told by `cotune fed up` alone, so that one process gives it runs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from cotune.shared.cli import show
from cotune.shared.errors import CotuneError, JobError
from cotune.shared.finding import coordinators_folder, find_run, known_runs
from cotune.shared.runs import RunFolder

RunReference = Annotated[str, typer.Argument(metavar="RUN", help="A path, an id, a unique part of one, or latest.")]
FedOption = Annotated[
    Path | None, typer.Option("--fed", help="The coordinator's home; else $COTUNE_FED, or ~/.local/share/cotune/fed.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON envelope.")]
EventsFlag = Annotated[bool, typer.Option("--json", help="Events as JSON lines, then one envelope.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="No progress.")]
LOOK_S = 0.5
STOP_S = 60.0
LAST_EVENTS = 5


def submit(
    job: Annotated[str, typer.Argument(help="A job file, or recipe:NAME.")] = "run.toml",
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings: privacy.epsilon=3 run.seed=1 ...")] = None,
    fed: FedOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run; the exit code is its outcome.")] = False,
    i_know: Annotated[bool, typer.Option("--i-know", help="Submit a job that gives no privacy at all.")] = False,
    quiet: QuietFlag = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON envelope; --wait: events before it.")] = False,
) -> None:
    """Put a job before the enrolled sites. It runs when they have approved it, as long as `cotune fed up` runs."""
    from cotune.server.enrolment import enrolled
    from cotune.server.fedhome import FedHome
    from cotune.server.submitting import prepare_deployed

    home = FedHome.open(_home(fed))
    sites = [site.name for site in enrolled(home.path).values() if site.state == "approved"]
    run = prepare_deployed(job, overrides or (), sites, home.runs, _silent if quiet or as_json else _say, i_know=i_know)
    if wait:
        _follow(run, quiet=quiet, as_json=as_json)
        return
    data, text = _submitted(run, home.path)
    show(data, as_json=as_json, text=text)


def status(run: RunReference = "latest", fed: FedOption = None, as_json: JsonFlag = False) -> None:
    """How a run stands: its state, what each site said and spent, its newest figures."""
    found = _find(run, fed)
    data = status_of(found)
    show(data, as_json=as_json, text=_status_text(data))


def watch(
    run: RunReference = "latest", fed: FedOption = None, quiet: QuietFlag = False, as_json: EventsFlag = False
) -> None:
    """Follow a run to its end: a live table on a terminal, else a line a round. The exit code is its outcome."""
    _follow(_find(run, fed), quiet=quiet, as_json=as_json)


def logs(
    run: RunReference = "latest",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over.")] = False,
    fed: FedOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON lines.")] = False,
) -> None:
    """Everything that happened to a run, a line an event; what programs said is in the home's folder `logs`."""
    from cotune.server.resubmission import is_over

    found, seen = _find(run, fed), 0
    while True:
        over, events = is_over(found), found.events()
        for event in events[seen:]:
            click.echo(json.dumps(event) if as_json else _event_text(event))
        seen = len(events)
        if over or not follow:
            return
        time.sleep(LOOK_S)


def stop(run: RunReference, fed: FedOption = None, as_json: JsonFlag = False) -> None:
    """Stop a run; it stays stopped until `cotune resume`. Sites keep what they were charged."""
    from cotune.server.resubmission import end_stopped, is_over

    found = _deployed(_find(run, fed))
    if is_over(found):
        what = f"{found.run_id} is over already: {found.state()['status']}"
        raise JobError("E-RUN-OVER", what, param="RUN", hint=f"cotune status {found.run_id}")
    found.ask_to_stop()
    deadline = time.monotonic() + STOP_S
    while not (is_over(found) or end_stopped(found)) and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    state = found.state()["status"]
    text = f"{found.run_id}: {'stopped' if state == 'cancelled' else f'asked to stop; it is {state} now'}"
    show({"run_id": found.run_id, "state": state}, as_json=as_json, text=text)


def ls(fed: FedOption = None, as_json: JsonFlag = False) -> None:
    """The coordinator's runs, oldest first."""
    rows = [_row(run) for run in known_runs(_home(fed) / "runs") if run.engine() == "deployed"]
    lines = [f"{row['run_id']:<44}{row['state']:<20}round {row['round']}/{row['rounds']}" for row in rows]
    show(rows, as_json=as_json, text="\n".join(lines) or "no run yet: cotune submit run.toml")


def resume_deployed(run: RunFolder, *, as_json: bool) -> None:
    """Queue a run that paused, failed or was stopped; `cotune fed up` gives it to Flower.

    Raises:
        JobError: It is under way (E-RUN-HELD), or has succeeded (E-RUN-OVER).
    """
    from cotune.server.resubmission import begin_anew

    begin_anew(run)
    text = f"{run.run_id} goes on after round {run.state()['round']}; cotune watch {run.run_id}"
    show({"run_id": run.run_id, "state": run.state()["status"]}, as_json=as_json, text=text)


def status_of(run: RunFolder) -> dict[str, Any]:
    """How a run stands, as data."""
    job, state, rows = run.job(), run.state(), run.metrics()
    path = run.privacy / "approvals.json"
    said: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    sites: list[dict[str, Any]] = []
    for site in sorted(job.data.sites):
        own = [row for row in rows if row.get("site") == site]
        standing = said.get(site, {})
        sites.append({
            "site": site,
            "standing": standing.get("state", "asked" if path.exists() else "not asked"),
            "rule": standing.get("rule"),
            "text": standing.get("text"),
            "rounds": len(own),
            "epsilon": own[-1]["epsilon"] if own else None,
        })  # fmt: skip
    return {
        **_row(run),
        "path": str(run.path),
        "job_sha256": job.sha256(),
        "held": run.is_held(),
        "error": state["error"],
        "sites": sites,
        "metrics": next((row for row in reversed(rows) if not row.get("site")), None),
        "events": run.events()[-LAST_EVENTS:],
    }


def _row(run: RunFolder) -> dict[str, Any]:
    job, state = run.job(), run.state()
    return {
        "run_id": run.run_id,
        "name": job.run.name,
        "state": state["status"],
        "round": state["round"],
        "rounds": job.run.rounds,
        "updated_at": state["updated_at"],
        "non_private": not job.is_private,
    }


def _status_text(data: dict[str, Any]) -> str:
    from cotune.shared.showing import row_text

    lines = [f"{data['run_id']}  {data['state'].upper()}  round {data['round']}/{data['rounds']}"]
    if data["non_private"]:
        lines.append("NON-PRIVATE: this run promises nothing to anybody whose records it uses")
    if data["error"]:
        lines.append(f"{data['error']['code']}  {data['error']['message']}")
    for site in data["sites"]:
        why = f" by rule {site['rule']}: {site['text']}" if site["rule"] else ""
        spent = "" if site["epsilon"] is None else f"  epsilon {site['epsilon']:.3f} so far"
        lines.append(f"  {site['site']:<20}{site['standing']}{why}  {site['rounds']} rounds{spent}")
    if data["metrics"]:
        lines.append(row_text(data["metrics"]))
    return "\n".join([*lines, *(f"  {_event_text(event)}" for event in data["events"])])


def _event_text(event: dict[str, Any]) -> str:
    return f"{event['created_at']}  {event['level']:<5}  {event['type']:<10}  {event['message']}"


def _submitted(run: RunFolder, home: Path) -> tuple[dict[str, Any], str]:
    """What a submitted run is called, what its sites will see, and whether anything will come of it now."""
    from cotune.shared.bundle import bundle_sha256
    from cotune.shared.supervision import running

    job, plan = run.job(), json.loads((run.path / "plan.json").read_bytes())
    epsilons, up, sites = plan["epsilon_by_round"], running(home) is not None, sorted(job.data.sites)
    data = {
        "run_id": run.run_id,
        "path": str(run.path),
        "job_sha256": job.sha256(),
        "bundle_sha256": bundle_sha256(),
        "sites": sites,
        "epsilon": epsilons[-1] if epsilons else None,
        "up": up,
    }
    cost = f"epsilon {epsilons[-1]:.3f} to each site" if epsilons else "NO PRIVACY"
    lines = [
        f"{run.run_id}: {job.run.rounds} rounds at {', '.join(sites)}; costs {cost}",
        f"  job     {job.sha256()}",
        f"  bundle  {bundle_sha256()}",
        f"next: each site approves it (cotune site approve {job.sha256()[:12]}); cotune watch {run.run_id}",
    ]
    return data, "\n".join(lines if up else [*lines, "it waits: the coordinator is not up (cotune fed up)"])


def _follow(run: RunFolder, *, quiet: bool, as_json: bool) -> None:
    from cotune.server.resubmission import is_over
    from cotune.shared.showing import View, raise_outcome, show_result, shown

    if not quiet and not as_json:
        _say(f"run {run.run_id} in {run.path}")
    try:
        with shown(View(run, sorted(run.job().data.sites)), quiet=quiet, as_json=as_json):
            while not is_over(run):
                time.sleep(LOOK_S)
        raise_outcome(run)
    except CotuneError as error:
        if not as_json:
            raise
        _last_line(run, error)
        raise typer.Exit(error.exit_code) from None
    show_result(run, as_json=as_json)


def _last_line(run: RunFolder, error: CotuneError) -> None:
    """The envelope of a run that did not succeed: the last JSON line, which says that it is the last."""
    envelope = {"schema_version": 1, "status": "error", "terminal": True, "error": error.to_dict()}
    click.echo(json.dumps({**envelope, "run": str(run.path)}))


def _deployed(run: RunFolder) -> RunFolder:
    if run.engine() != "deployed":
        what = f"{run.run_id} is a simulation: it belongs to the `cotune simulate` that runs it"
        raise JobError("E-RUN-ENGINE", what, param="RUN", hint="end that command; cotune resume goes on with it")
    return run


def _find(reference: str, fed: Path | None) -> RunFolder:
    return find_run(reference, _home(fed) / "runs")


def _home(fed: Path | None) -> Path:
    return (fed or coordinators_folder()).expanduser().absolute()


def _say(line: str) -> None:
    click.echo(line, err=True)


def _silent(_line: str) -> None:
    """Say nothing."""
