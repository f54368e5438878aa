"""`cotune attack`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import click
import typer

from cotune.shared.cli import show, show_failed
from cotune.shared.finding import find_run


def attack(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, id, unique prefix, or `latest`.")],
    control: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="A run without privacy and with the same canaries, attacked alike."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON envelope.")] = False,
) -> None:
    """Attack a run: canaries, membership, planted secrets, gradients. Exit code 1: it gave away more than it claims."""
    from cotune.simulations.attack.results import attack_run, broken_claim

    found, beside = find_run(run), find_run(control) if control else None
    results = attack_run(found, beside, _silent if quiet or as_json else _say)
    error = broken_claim(results)
    if error is not None:
        show_failed(error, results, as_json=as_json, text=text_of(results))
    show(results, as_json=as_json, text=text_of(results))


def text_of(results: Mapping[str, Any]) -> str:
    """The results for people."""
    lines = [f"attacks on {results['run_id']}: {results['verdict'].upper()}"]
    lines += _lines(results["run"])
    if results["control"]:
        lines += ["", f"control without privacy, {results['control']['run_id']}:"]
        lines += _lines(results["control"]["results"])
    leak = results["leakage"]
    if leak:
        lines += [
            "",
            f"tokens read off one gradient: {leak['recovered_without_dp']:.0%} without DP,"
            f" {leak['recovered_with_dp']:.1%} with it ({leak['trials']} sentences of {leak['tokens']} tokens)",
        ]
    return "\n".join([*lines, "", "limits:", *(f"- {limit}" for limit in results["limits"])])


def _lines(found: Mapping[str, Any]) -> list[str]:
    canaries, secrets = found["canaries"], found["secrets"]
    lines: list[str] = []
    if canaries:
        unit = canaries["unit"] if canaries["rows_each"] == 1 else f"{canaries['unit']} of {canaries['rows_each']} rows"
        lines.append(f"canaries    {canaries['inserted']} of {canaries['candidates']} put in, each one {unit}")
    for bound in found["audit"]:
        claimed = (
            f"claimed {bound['claimed_epsilon']:.2f}" if bound["claimed_epsilon"] is not None else "nothing claimed"
        )
        lines.append(
            f"epsilon     at least {bound['epsilon_lower']:.2f}, {claimed}"
            f" ({bound['right']} of {bound['guesses']} guesses right; {bound['method']})"
        )
    if found["membership"]:
        auc = found["membership"]
        lines.append(
            f"membership  AUC {auc['auc']:.3f} ({auc['auc_low']:.3f} to {auc['auc_high']:.3f}),"
            f" true positives at 1 % false ones {auc['tpr_at_1pct_fpr']:.3f}"
        )
    if found["exposure"]:
        bits = found["exposure"]
        lines.append(f"exposure    {bits['mean']:.2f} bits on average, {bits['chance_mean']:.2f} by chance")
    if secrets:
        lines.append(f"secrets     {secrets['recovered']} of {secrets['planted']} said word for word")
        lines += [
            f"            {one['prompt']} -> {one['said']}  (true: {one['secret']})" for one in secrets["examples"]
        ]
    return lines


def _say(line: str) -> None:
    click.echo(line, err=True)


def _silent(_line: str) -> None:
    """Say nothing."""
