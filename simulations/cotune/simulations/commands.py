"""`cotune init`, `recipes`, `simulate`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import click
import typer

from cotune.shared.cli import show
from cotune.shared.errors import CotuneError, JobError, StorageError
from cotune.shared.files import read_lines
from cotune.shared.finding import find_run
from cotune.shared.runs import BROKEN, Engine, RunFolder

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON envelope.")]
ORPHAN_S = 30.0  # processes of a killed run end within seconds; one that holds it longer is alive
NOT_PRIVATE_HINT = "add --i-know if nobody's privacy is at stake"


def recipes(
    action: Annotated[str, typer.Argument(help="list, or show")] = "list",
    name: Annotated[str | None, typer.Argument(help="The recipe to show.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the built-in jobs, or show one: cotune recipes show NAME."""
    from cotune.simulations.scenario import recipe_names, recipe_path

    if action not in ("list", "show") or (action == "show") != (name is not None):
        raise JobError("E-USAGE", "expected `cotune recipes` or `cotune recipes show NAME`", hint="cotune recipes")
    if name:
        text = recipe_path(name).read_text(encoding="utf-8").rstrip()
        show({"name": name, "text": text}, as_json=as_json, text=text)
        return
    listed = {recipe: _first_line(recipe_path(recipe)) for recipe in recipe_names()}
    width = max(len(recipe) for recipe in listed)
    lines = [f"{recipe:<{width}}  {line}" for recipe, line in listed.items()]
    show(listed, as_json=as_json, text="\n".join([*lines, "", "Start one: cotune init my-study --recipe NAME"]))


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def init(
    folder: Annotated[Path, typer.Argument(help="The new study's folder.")],
    recipe: Annotated[str, typer.Option(help="The job to start from; see `cotune recipes`.")] = "quickstart",
    as_json: JsonFlag = False,
) -> None:
    """Start a study: a job file to edit and, for the quick start, sample data. Nothing is downloaded."""
    from cotune.simulations.quickstart import write_samples
    from cotune.simulations.scenario import recipe_path

    source = recipe_path(recipe)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise StorageError(
            "E-EXISTS",
            f"{folder} exists and is not an empty folder",
            hint="cotune init another-name",
        )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, folder / "run.toml")
    files = write_samples(folder / "data") if recipe == "quickstart" else []
    made = [str(folder / "run.toml"), *map(str, files)]
    text = "\n".join([*(f"wrote {name}" for name in made), "", f"Next: cd {folder} && cotune plan run.toml"])
    show({"files": made}, as_json=as_json, text=text)


def simulate(
    job: Annotated[str, typer.Argument(help="A job file, or recipe:NAME.")] = "run.toml",
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings: privacy.epsilon=3 run.seed=1 ...")] = None,
    engine: Annotated[Engine, typer.Option(help="Flower's engine, or one process.")] = "flower",
    sites: Annotated[int | None, typer.Option(help="Short for federation.sites=N.")] = None,
    out: Annotated[Path, typer.Option(help="Folder the run's folder is made in.")] = Path("runs"),
    baselines: Annotated[bool, typer.Option("--baselines", help="Also: each site alone, no privacy, pooled.")] = False,
    canaries_of: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Plant that run's canaries and secrets: a control to compare with."),
    ] = None,
    i_know: Annotated[bool, typer.Option("--i-know", help="Run a job that gives no privacy at all.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON lines, then one envelope.")] = False,
) -> None:
    """Run a job over sites on this machine. The exit code is the run's outcome."""
    from cotune.simulations.scenario import prepare_run

    settings = [*(overrides or []), *([f"federation.sites={sites}"] if sites else [])]
    like = find_run(canaries_of) if canaries_of else None
    run = prepare_run(job, settings, out, _silent if quiet or as_json else _say, like)
    _require_consent(run, i_know)
    if not quiet and not as_json:
        _say(f"run {run.run_id} in {run.path}")
    _run_shown(run, engine, quiet=quiet, as_json=as_json)
    if baselines:
        from cotune.simulations.baselines import add_baselines

        add_baselines(run, quiet=quiet or as_json)
    _show_result(run, as_json)


def resume(
    reference: Annotated[str, typer.Argument(metavar="RUN", help="A path, an id, a unique part of one, or latest.")],
    out: Annotated[Path | None, typer.Option(help="Folder the run's folder is in.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON lines, then one envelope.")] = False,
) -> None:
    """Go on with a run that was interrupted, from its newest whole checkpoint, on the engine it was started on.

    A deployed run is queued for `cotune fed up`; follow it with `cotune watch`.

    Sites answer what they were asked before with the very same bytes: the adapter is that of a run without the
    interruption, and no round is charged twice but one that was lost in the middle of training.
    """
    run = find_run(reference, *([out] if out else ()))
    if run.engine() == "deployed":
        from cotune.server.run_commands import resume_deployed

        resume_deployed(run, as_json=as_json)
        return
    run = _interrupted(run)
    if not quiet and not as_json:
        _say(f"run {run.run_id} in {run.path}, from round {run.state()['round']}")
    _run_shown(run, run.engine(), quiet=quiet, as_json=as_json)
    _show_result(run, as_json)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _silent(_line: str) -> None:
    """Say nothing."""


def _interrupted(run: RunFolder) -> RunFolder:
    """A run that can go on, queued again."""
    state = run.state()
    if (state["error"] or {}).get("code") == BROKEN:
        what = f"{run.run_id} has ended, and an attack got more out of it than it claims: going on would hide that"
        raise JobError("E-RUN-OVER", what, param="RUN", hint="cotune simulate run.toml")
    if _is_whole(run):
        _tidy(run)
        raise JobError("E-RUN-OVER", f"{run.run_id} has succeeded: there is nothing to go on with", param="RUN")
    _require_consent(run, i_know=(run.path / "env" / "engine.json").exists())  # written once it was asked for
    with run.held(patience_s=ORPHAN_S):
        run.set_state("queued", int(state["round"]))
    return run


def _is_whole(run: RunFolder) -> bool:
    """Whether a run has written its last file; it may be killed after it has said that it succeeded."""
    return run.state()["status"] == "succeeded" and (run.path / "MANIFEST.json").exists()


def _tidy(run: RunFolder) -> None:
    """Remove what was kept of records and, once a run is whole, the homes and keys of its simulated sites."""
    from cotune.simulations.scenario import work_folder

    shutil.rmtree(work_folder(run.run_id), ignore_errors=True)
    if _is_whole(run):
        shutil.rmtree(run.sites, ignore_errors=True)


def _require_consent(run: RunFolder, i_know: bool) -> None:
    job = run.job()
    if job.is_private or i_know:
        return
    what = "privacy.level = none" if job.privacy.level == "none" else "privacy.noise = test"
    error = JobError(
        "E-NON-PRIVATE",
        f"{what}: this run would give NO privacy; every artefact would say so",
        hint=NOT_PRIVATE_HINT,
    )
    run.set_state("cancelled", 0, error)
    raise error


def _run_shown(run: RunFolder, engine: Engine, *, quiet: bool, as_json: bool) -> None:
    """Run on an engine with progress; kept features are removed whatever happens; raise the run's own error."""
    from cotune.shared.footprint import measuring
    from cotune.shared.report.renewal import renew
    from cotune.shared.showing import View, raise_outcome, shown
    from cotune.simulations.scenario import site_names, work_folder

    run.set_engine(engine)
    steps = work_folder(run.run_id) / "progress.jsonl"
    measured = measuring(run.path / "env" / "footprint.json", lambda: renew(run))
    view = View(run, site_names(run.job()), lambda: read_lines(steps))
    try:
        with shown(view, quiet=quiet, as_json=as_json), measured:
            if engine == "flower":
                from cotune.simulations.flower import run_on_flower

                run_on_flower(run)
            else:
                from cotune.simulations.federation import run_inline

                run_inline(run)
    except BaseException as error:
        if run.state()["status"] in ("queued", "running"):
            known = error if isinstance(error, CotuneError) else None
            run.set_state("failed" if known else "cancelled", int(run.state()["round"]), known)
        raise
    finally:
        _tidy(run)
    raise_outcome(run)


def _show_result(run: RunFolder, as_json: bool) -> None:
    from cotune.shared.showing import show_result

    show_result(run, as_json=as_json)
