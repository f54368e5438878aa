"""`cotune config` and `cotune plan`: what a job file says and costs. Neither touches data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cotune.shared.cli import job_file, show
from cotune.shared.job import Job
from cotune.shared.jobfile import dump_toml, load_job
from cotune.shared.planning import Plan

if TYPE_CHECKING:
    from cotune.shared.outlook import Outlook

JobArgument = Annotated[str, typer.Argument(help="A job file, or recipe:NAME.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings: privacy.epsilon=3 run.rounds=8 ...")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON envelope.")]

config = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help="Work on job files.")


def _job(source: str, overrides: list[str] | None) -> Job:
    return load_job(job_file(source), overrides or ())


@config.command()
def validate(job: JobArgument, overrides: Overrides = None, as_json: JsonFlag = False) -> None:
    """Check a job file; nothing is fetched or read but the file."""
    from cotune.shared.planning import resolve

    resolved = resolve(_job(job, overrides))
    sha256 = resolved.sha256()
    show({"valid": True, "job_sha256": sha256}, as_json=as_json, text=f"{job}: valid, job {sha256[:12]}")


@config.command("show")
def show_resolved(job: JobArgument, overrides: Overrides = None, as_json: JsonFlag = False) -> None:
    """Print a job with every `auto` that needs no data filled in."""
    from cotune.shared.planning import resolve

    resolved = resolve(_job(job, overrides))
    show(resolved.model_dump(mode="json", by_alias=True), as_json=as_json, text=dump_toml(resolved).rstrip())


@config.command()
def schema(as_json: JsonFlag = False) -> None:
    """Describe every setting: a JSON Schema with --json, else one line each."""
    described = Job.model_json_schema(by_alias=True)
    show(described, as_json=as_json, text="\n".join(_lines(described)))


def _lines(described: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for section, reference in described["properties"].items():
        name = json.dumps(reference).rpartition("/")[2].partition('"')[0]
        model = described["$defs"].get(name)
        if model is None:
            continue
        lines += ["", f"[{section}]  {model['description'].splitlines()[0]}"]
        for key, setting in model["properties"].items():
            default = "required" if key in model.get("required", ()) else json.dumps(setting.get("default"))
            lines.append(f"  {key:<18} {default:<24} {setting.get('description', '')}".rstrip())
    return lines[1:]


def plan(
    job: JobArgument = "run.toml",
    overrides: Overrides = None,
    solve: Annotated[
        Literal["noise", "rounds", "epsilon"] | None,
        typer.Option(help="Only the one of these that follows from the other two."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """What a job will cost, before any data is touched: noise, epsilon by round, bytes, memory, time."""
    from cotune.shared import planning
    from cotune.shared.model import locate
    from cotune.shared.outlook import outlook

    given = _job(job, overrides)
    if solve is not None:
        found = planning.solve(given, solve)
        show({"solved": found}, as_json=as_json, text=found)
        return
    resolved = planning.resolve(given)
    base = locate(resolved)
    made = planning.make_plan(resolved, base)
    expected = outlook(resolved, base, made.trained_parameters)
    persons = planning.costs_by_person(resolved) if expected else {}
    replaced = planning.cost_of_replacing(resolved) if expected else None
    data = {
        **made.to_dict(),
        "job_sha256": resolved.sha256(),
        "model_sha256": base.sha256,
        "epsilon_replace_one": replaced,
        "epsilon_by_records_of_a_person": persons,
        "outlook": asdict(expected) if expected else None,
    }
    lines = [*_plan_lines(resolved, made), *_outlook_lines(persons, replaced, expected)]
    show(data, as_json=as_json, text="\n".join(lines))


def _plan_lines(job: Job, made: Plan) -> list[str]:
    lines = [f"{job.run.name}: {job.sites} sites, {job.run.rounds} rounds of {job.train.local_steps} steps"]
    if made.noise_multiplier is None:
        lines.append("privacy           NONE: this job promises nothing (privacy.level = none)")
    else:
        unit = "persons" if job.privacy.level == "unit" else "records"
        cap = f", {job.train.max_batch_size} at most" if job.train.max_batch_size else ""
        lines += [
            f"noise multiplier  {made.noise_multiplier:.4f}  (the least for epsilon {job.privacy.epsilon:g}"
            f" at delta {made.delta:.3g})",
            f"batches           Poisson, probability {made.sampling_probability:.4g},"
            f" {job.train.batch_size} {unit} expected{cap}",
            "epsilon by round  " + "  ".join(f"{value:.3f}" for value in made.epsilon_by_round),
        ]
        if job.privacy.noise == "test":
            lines.append("TEST NOISE: the noise is seeded; this job is NOT private")
    return [
        *lines,
        f"steps             {made.steps} a site",
        f"trained           {made.trained_parameters:,} of {made.base_parameters:,} parameters",
        f"bytes             {made.bytes_up:,} up, {made.bytes_down:,} down, a site and round",
        f"memory            about {made.memory_bytes / 2**30:.1f} GiB a worker, {job.simulation.workers} workers",
        f"time              at most about {made.seconds_estimate / 60:.0f} min here, if all rows were of full length",
    ]


def _outlook_lines(persons: Mapping[int, float], replaced: float | None, expected: Outlook | None) -> list[str]:
    if expected is None or replaced is None:
        return []
    costs = "  ".join(f"{count}: {cost:.2f}" for count, cost in persons.items())
    lines = [
        f"epsilon of people {costs}   (by their number of records at a site)",
        f"if one is replaced {replaced:.2f} instead (neighbours differ in a unit's content, not in its presence)",
        f"noise to signal   {expected.step:.2f} a step, {expected.run:.2f} over the run"
        " (noise beside the most the data can say; near 1 little is learnt)",
    ]
    helping = [f"  would help      {a.settings}: {a.noise_to_signal:.2f} over the run" for a in expected.advice]
    return lines + helping
