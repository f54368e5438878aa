"""The command `cotune`: a lazy table of names, so that `--help` loads nothing heavy, and one error boundary."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click

from cotune.shared.errors import INTERNAL_EXIT_CODE, INTERRUPTED_EXIT_CODE, CotuneError, place_of

ENVELOPE_VERSION = 1


class Entry(NamedTuple):
    """One command: where it lives, and its line in `--help`."""

    target: str
    summary: str


COMMANDS: dict[str, Entry] = {
    "init": Entry("cotune.simulations.commands:init", "Start a study: a job file and sample data, offline."),
    "recipes": Entry("cotune.simulations.commands:recipes", "List the built-in jobs, or show one."),
    "data": Entry("cotune.client.commands:data", "Check record files; fetch the demo sets."),
    "site": Entry("cotune.client.site_commands:site", "Look after a site: policy, budget, ledger, jobs."),
    "fed": Entry("cotune.server.fed_commands:fed", "Look after a coordinator: start and stop it, let sites in."),
    "doctor": Entry("cotune.shared.commands.doctor:doctor", "What is open at this installation, or about to break."),
    "config": Entry("cotune.shared.commands.job:config", "Validate, show or describe a job file."),
    "plan": Entry("cotune.shared.commands.job:plan", "What a job will cost, before any data is touched."),
    "simulate": Entry("cotune.simulations.commands:simulate", "Run a job over sites on this machine."),
    "compare": Entry(
        "cotune.simulations.comparison.commands:compare",
        "Run one job by several rules, epsilons and seeds; table and plots.",
    ),
    "resume": Entry("cotune.simulations.commands:resume", "Go on with an interrupted run; nothing is charged twice."),
    "submit": Entry("cotune.server.run_commands:submit", "Put a job before enrolled sites; it runs when they approve."),
    "status": Entry("cotune.server.run_commands:status", "How a deployed run stands: state, sites, figures."),
    "watch": Entry("cotune.server.run_commands:watch", "Follow a deployed run to its end."),
    "logs": Entry("cotune.server.run_commands:logs", "Everything that happened to a deployed run."),
    "stop": Entry("cotune.server.run_commands:stop", "Stop a deployed run until it is resumed."),
    "ls": Entry("cotune.server.run_commands:ls", "List the coordinator's runs."),
    "eval": Entry("cotune.shared.commands.run:evaluate", "Score a run or adapter on any JSONL."),
    "attack": Entry("cotune.simulations.attack.commands:attack", "Attack a run; hold what it gives away to its claim."),
    "report": Entry("cotune.shared.commands.run:report", "Write a run's report: one self-contained page."),
    "verify": Entry("cotune.shared.commands.run:verify", "Check a run: files, adapter, epsilon recomputed."),
    "export": Entry("cotune.shared.commands.run:export", "Write a run's adapter, or its facts for authorities."),
}


RECIPES = "cotune.simulations.scenario:recipe_path"  # the shared room imports no other: looked up by name
INSPECTIONS = {  # whose home: where it is if nothing is said, and what is wrong with it
    "coordinator": ("cotune.shared.finding:coordinators_folder", "cotune.server.inspection:inspect"),
    "site": ("cotune.client.home:default_home", "cotune.client.inspection:inspect"),
}
RUNNING = "cotune.server.superlinks:superlink_faults"


def named(target: str) -> Any:
    """What a table names, imported now."""
    module_name, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module_name), attribute)


def job_file(source: str) -> Path:
    """A job file's path; `recipe:NAME` is one that ships with cotune."""
    if not source.startswith("recipe:"):
        return Path(source)
    return named(RECIPES)(source.removeprefix("recipe:"))


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order a new user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and build one command; None lets click report an unknown name."""
        entry = COMMANDS.get(cmd_name)
        return None if entry is None else _load(cmd_name, entry)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table's own summaries: help imports no command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest known name for an unknown one."""
        from cotune.shared.errors import did_you_mean

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command '{args[0]}'.{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)


def _load(name: str, entry: Entry) -> click.Command:
    import typer
    from typer.main import get_command

    target = named(entry.target)
    if isinstance(target, typer.Typer):
        command = get_command(target)
    else:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        app.command()(target)
        command = get_command(app)
    command.name = name
    return command


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(version("cotune"))
        ctx.exit()


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, callback=_version, expose_value=False, is_eager=True, help="Show the version.")
def cotune() -> None:
    """Fine-tune one language model across sites, privately, without moving their data.

    \b
    First steps:   cotune init my-study && cd my-study && cotune plan run.toml && cotune simulate run.toml
    """


def show(data: object, *, as_json: bool, text: str) -> None:
    """Print a command's result: text for people, or one JSON envelope."""
    click.echo(json.dumps({"schema_version": ENVELOPE_VERSION, "status": "ok", "data": data}) if as_json else text)


def show_failed(error: CotuneError, data: object, *, as_json: bool, text: str) -> NoReturn:
    """Print what a command found and end with its error: text, then the error; or one JSON envelope with both."""
    if not as_json:
        click.echo(text)
        raise error
    envelope = {"schema_version": ENVELOPE_VERSION, "status": "error", "error": error.to_dict(), "data": data}
    click.echo(json.dumps(envelope))
    raise click.exceptions.Exit(error.exit_code)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; never a traceback for a user's mistake."""
    as_json = "--json" in arguments
    for name in ("FLWR_TELEMETRY_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ[name] = "0" if name.startswith("FLWR") else "1"
    try:
        result: Any = cotune.main(arguments, prog_name="cotune", standalone_mode=False)
    except CotuneError as error:
        return _report(error.to_dict(), error.exit_code, as_json)
    except click.UsageError as error:
        fault = {
            "code": "E-USAGE",
            "message": error.format_message(),
            "param": None,
            "hint": _usage_hint(error),
        }
        return _report(fault, 4, as_json)
    except (KeyboardInterrupt, click.exceptions.Abort):
        fault = {
            "code": "E-INTERRUPTED",
            "message": "interrupted; what was finished is kept",
            "param": None,
            "hint": None,
        }
        return _report(fault, INTERRUPTED_EXIT_CODE, as_json)
    except Exception as error:  # noqa: BLE001 - the boundary: a defect of ours, said as one
        return _defect(error, as_json)
    return result if isinstance(result, int) else 0


def _usage_hint(error: click.UsageError) -> str:
    return f"{error.ctx.command_path} --help" if error.ctx else "cotune --help"


def _report(fault: dict[str, str | None], exit_code: int, as_json: bool) -> int:
    if as_json:
        click.echo(json.dumps({"schema_version": ENVELOPE_VERSION, "status": "error", "error": fault}))
    else:
        click.echo(f"{fault['code']}  {fault['message']}", err=True)
        if fault["hint"]:
            click.echo(f"  mend it: {fault['hint']}", err=True)
    return exit_code


def _defect(error: Exception, as_json: bool) -> int:
    """A bug: the kind of error and the place in our code, never its text, which may quote a record."""
    import traceback

    if os.environ.get("COTUNE_DEBUG") == "1":
        traceback.print_exc()
    fault: dict[str, str | None] = {
        "code": "E-INTERNAL",
        "message": f"{type(error).__name__} at {place_of(error)}: this is a defect of cotune",
        "param": None,
        "hint": "run again with COTUNE_DEBUG=1 for the traceback, and report it",
    }
    return _report(fault, INTERNAL_EXIT_CODE, as_json)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
