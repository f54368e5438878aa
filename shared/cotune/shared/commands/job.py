"""`cotune config` and `cotune plan`: what a job file says and costs. Neither touches data."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from cotune.shared.cli import job_file, show
from cotune.shared.job import Job
from cotune.shared.jobfile import dump_toml, load_job
from cotune.shared.planning import Plan

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


def plan(job: JobArgument = "run.toml", overrides: Overrides = None, as_json: JsonFlag = False) -> None:
    """What a job will cost, before any data is touched: noise, epsilon by round, bytes, memory, time."""
    from cotune.shared.model import locate
    from cotune.shared.planning import make_plan, resolve

    resolved = resolve(_job(job, overrides))
    made = make_plan(resolved, locate(resolved))
    text = _plan_text(resolved, made)
    show({**made.to_dict(), "job_sha256": resolved.sha256()}, as_json=as_json, text=text)


def _plan_text(job: Job, made: Plan) -> str:
    sites = len(job.data.sites) or job.federation.sites
    lines = [f"{job.run.name}: {sites} sites, {job.run.rounds} rounds of {job.train.local_steps} steps"]
    if made.noise_multiplier is None:
        lines.append("privacy           NONE: this job promises nothing (privacy.level = none)")
    else:
        lines += [
            f"noise multiplier  {made.noise_multiplier:.4f}  (the least for epsilon {job.privacy.epsilon:g}"
            f" at delta {made.delta:.3g})",
            f"batches           Poisson, probability {made.sampling_probability:.4g},"
            f" {job.train.batch_size} records expected",
            "epsilon by round  " + "  ".join(f"{value:.3f}" for value in made.epsilon_by_round),
        ]
        if job.privacy.noise == "test":
            lines.append("TEST NOISE: the noise is seeded; this job is NOT private")
    lines += [
        f"steps             {made.steps} a site",
        f"trained           {made.trained_parameters:,} of {made.base_parameters:,} parameters",
        f"bytes             {made.bytes_up:,} up, {made.bytes_down:,} down, a site and round",
        f"memory            about {made.memory_bytes / 2**30:.1f} GiB a worker, {job.simulation.workers} workers",
        f"time              at most about {made.seconds_estimate / 60:.0f} min here, if all rows were of full length",
    ]
    return "\n".join(lines)
