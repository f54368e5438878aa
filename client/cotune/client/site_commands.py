"""`cotune site`: a site's home, policy, budget, ledger and jobs, for whoever looks after the site."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cotune.client.deployment_commands import down, status, up
from cotune.client.files_commands import files
from cotune.client.joining import write_request
from cotune.client.joining_commands import join_federation, leave_federation, request
from cotune.client.log_commands import log_app
from cotune.client.opening import open_new_site
from cotune.client.review import review, summaries
from cotune.client.site_options import AsJson, HomeOption, home_path, open_home
from cotune.client.site_views import (
    budget_of,
    budget_text,
    init_text,
    jobs_text,
    policy_view,
    view_of,
    view_text,
)
from cotune.shared.cli import show, show_failed
from cotune.shared.errors import JobError

site = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, help="A site's policy, budget, ledger and jobs."
)
policy_app = typer.Typer(
    add_completion=False, rich_markup_mode=None, help="Show the policy, or hold a job against it; edit policy.toml."
)
site.add_typer(policy_app, name="policy")
site.add_typer(log_app, name="log")
site.command("request")(request)
site.command("join")(join_federation)
site.command("leave")(leave_federation)
site.command()(up)
site.command()(status)
site.command()(down)
site.command()(files)

JobReference = Annotated[str, typer.Argument(help="The first digits of a received job's hash, or a resolved job file.")]


@site.command()
def init(
    name: Annotated[str | None, typer.Option(help="The site's public name.")] = None,
    dataset: Annotated[str | None, typer.Option(help="What jobs call the data set.")] = None,
    data: Annotated[Path | None, typer.Option(help="Its file of JSON lines.")] = None,
    unit: Annotated[str | None, typer.Option(help="record, or column:NAME: the column of the person's id.")] = None,
    max_per_unit: Annotated[int | None, typer.Option(help="Rows of one person a job may use, at most.")] = None,
    epsilon_total: Annotated[float | None, typer.Option(help="May be spent in all, for ever.")] = None,
    epsilon_per_run: Annotated[float | None, typer.Option(help="May be spent by one run.")] = None,
    delta_total: Annotated[float, typer.Option(help="The delta of both.")] = 1e-5,
    model: Annotated[
        list[str] | None, typer.Option(help="sha256:HASH of a base model that jobs may use; may be given again.")
    ] = None,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="For trials: noise of a public seed is let in. Never for real records.")
    ] = False,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Make a site's home: key, policy, ledger. Asks for what is missing, if there is someone to ask."""
    settings = _complete({
        "name": name, "dataset": dataset, "data": data, "unit": unit,
        "epsilon-total": epsilon_total, "epsilon-per-run": epsilon_per_run,
    })  # fmt: skip
    budget = {
        "epsilon_total": settings["epsilon-total"],
        "epsilon_per_run": settings["epsilon-per-run"],
        "delta_total": delta_total,
    }
    described = {
        "id": settings["dataset"],
        "path": str(Path(settings["data"]).expanduser().absolute()),
        "unit": settings["unit"],
        "max_per_unit": max_per_unit,
        "budget": budget,
    }
    who = {"name": settings["name"], "simulated": simulated}
    made, findings = open_new_site(home_path(home), who, described, model or ())
    write_request(made)
    data_out = {**view_of(made), "findings": [asdict(finding) for finding in findings]}
    show(data_out, as_json=as_json, text=init_text(made, findings))


def _complete(settings: dict[str, Any]) -> dict[str, Any]:
    """Ask for each setting that was not given, or name them all where nobody can be asked."""
    missing = [name for name, value in settings.items() if value is None and name != "unit"]
    if missing and not sys.stdin.isatty():
        raise JobError(
            "E-SITE-INIT",
            f"missing: {', '.join(f'--{name}' for name in missing)}",
            param=f"--{missing[0]}",
            hint="cotune site init --help",
        )
    kinds = {"epsilon-total": float, "epsilon-per-run": float}
    for name in missing:
        settings[name] = typer.prompt(QUESTIONS[name], type=kinds.get(name, str))
    if settings["unit"] is None:
        settings["unit"] = typer.prompt(QUESTIONS["unit"], default="record") if missing else "record"
    return settings


QUESTIONS = {
    "name": "Public name of this site (small letters, digits, -)",
    "dataset": "What jobs call the data set",
    "data": "Its file of JSON lines",
    "unit": "Whom a row belongs to: record, or column:NAME for the column of the person's id",
    "epsilon-total": "Epsilon that may be spent in all, for ever (8 is a common upper end)",
    "epsilon-per-run": "Epsilon that one run may spend",
}


@policy_app.callback(invoke_without_command=True)
def policy(ctx: typer.Context, home: HomeOption = None, as_json: AsJson = False) -> None:
    """Show the policy, or hold a job against it; the policy is the file policy.toml, to be edited."""
    if ctx.invoked_subcommand is None:
        show_policy(home, as_json)


@policy_app.command("show")
def show_policy(home: HomeOption = None, as_json: AsJson = False) -> None:
    """Show the policy as it is in force."""
    opened = open_home(home)
    data, text = policy_view(opened)
    show(data, as_json=as_json, text=text)


@policy_app.command()
def check(job: JobReference, home: HomeOption = None, as_json: AsJson = False) -> None:
    """Hold a job against every rule, with its base model located. Exit code 6 if one refuses."""
    found = review(open_home(home), job, locate_model=True)
    data, text = found.to_dict(), found.text()
    if found.refusal is None:
        show(data, as_json=as_json, text=text)
        return
    show_failed(found.refusal.error(found.site), data, as_json=as_json, text=text)


@site.command()
def budget(home: HomeOption = None, as_json: AsJson = False) -> None:
    """What each data set has spent and what is left. It is raised by editing policy.toml, which the ledger notes."""
    opened = open_home(home)
    rows = [budget_of(opened, dataset) for dataset in opened.policy.dataset]
    show({**view_of(opened), "datasets": rows}, as_json=as_json, text=budget_text(opened, rows))


@site.command()
def jobs(home: HomeOption = None, as_json: AsJson = False) -> None:
    """The jobs that came: state, cost of the data set they name, and what would leave the site."""
    opened = open_home(home)
    rows = summaries(opened)
    show({**view_of(opened), "jobs": rows}, as_json=as_json, text=jobs_text(opened, rows))


@site.command()
def approve(job: JobReference, home: HomeOption = None, as_json: AsJson = False) -> None:
    """Let a job run, on the data set's file as it is now. It must keep every rule: this is no way round the policy."""
    opened = open_home(home)
    found = review(opened, job, locate_model=False)
    if found.refusal:
        raise found.refusal.error(found.site)
    dataset = opened.policy.find(found.job.data.dataset)
    if dataset and not opened.is_simulated:
        opened.files.note(dataset)
    opened.jobs.approve(found.job, by="admin")
    data = {**found.to_dict(), "state": "approved"}
    show(data, as_json=as_json, text=f"{found.text()}\napproved {found.job.sha256()}")


@site.command()
def deny(
    jobs: Annotated[list[str], typer.Argument(help="The first digits of the hashes of jobs.")],
    reason: Annotated[str, typer.Option(help="Goes into the ledger.")] = "",
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Keep jobs from running, also ones that were approved before."""
    opened = open_home(home)
    denied = [opened.jobs.find(job) for job in jobs]
    for sha256 in denied:
        opened.jobs.deny(sha256, reason)
    text = "\n".join([view_text(opened), *(f"denied {sha256}" for sha256 in denied)])
    show({**view_of(opened), "denied": denied}, as_json=as_json, text=text)
