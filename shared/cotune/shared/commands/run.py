"""`cotune eval`, `report`, `verify`, `export`: what can be done with a run or an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cotune.shared.cli import show
from cotune.shared.errors import RunFailed
from cotune.shared.finding import find_run

if TYPE_CHECKING:
    from cotune.shared.verification import Check

Reference = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, id, unique prefix, or `latest`.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON envelope.")]


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, or the folder of a PEFT adapter.")],
    data: Annotated[Path | None, typer.Option(help="Any JSONL; default: the run's own evaluation file.")] = None,
    job: Annotated[Path | None, typer.Option(help="Job file that names the base model, for a lone adapter.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the base model without the adapter.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first rows.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Score a run or adapter: loss, token accuracy, and accuracy where the answers can be listed."""
    from cotune.shared.report.wording import plain
    from cotune.shared.scoring import score

    scored = score(run, data=data, job_file=job, base_only=base, limit=limit)
    lines = [f"rows            {scored.examples}", f"loss            {scored.loss:.4f}"]
    lines.append(f"token accuracy  {scored.token_accuracy:.3f}")
    if scored.accuracy is not None:
        interval = f"{scored.accuracy_low:.3f} to {scored.accuracy_high:.3f}"
        lines.append(f"accuracy        {scored.accuracy:.3f}  (95 % interval {interval})")
    for row in (scored.groups or {}).get("rows", []):
        spread = f"{row['accuracy_low']:.3f} to {row['accuracy_high']:.3f}"
        lines.append(f"  {plain(row['group'])}: {row['accuracy']:.3f}  ({spread}, {row['examples']} rows)")
    show(scored.to_dict(), as_json=as_json, text="\n".join(lines))


def report(
    run: Reference = "latest",
    pdf: Annotated[bool, typer.Option("--pdf", help="Also print it, by a Chromium that is there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a run's report: one self-contained HTML page, also for a run that failed or goes on."""
    from cotune.shared.report.page import write_report
    from cotune.shared.report.wording import plain

    folder = find_run(run)
    files = {"report": write_report(folder)}
    if pdf:
        from cotune.shared.report.pdf import print_pdf

        files["pdf"] = print_pdf(files["report"])
    folder.renew_manifest(*files.values())
    text = plain("\n".join(f"wrote {file}" for file in files.values()))
    show({name: str(file) for name, file in files.items()}, as_json=as_json, text=text)


def verify(
    run: Annotated[
        str, typer.Argument(metavar="RUN|FILE", help="A run, or a file written by `cotune site log export`.")
    ] = "latest",
    as_json: JsonFlag = False,
) -> None:
    """Check a run or an exported ledger without trusting its figures: hashes, signatures, epsilon from events."""
    if _is_file(run):
        from cotune.shared.exported import read_exported, said_of, verify_exported

        exported = read_exported(Path(run))
        _show_checks(exported.site, said_of(exported), verify_exported(exported), as_json)
        return
    from cotune.shared.verification import verify_run

    folder = find_run(run)
    _show_checks(folder.run_id, {"run": folder.run_id}, verify_run(folder), as_json)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a name no file can have
        return False


def _show_checks(name: str, said: dict[str, Any], checks: Sequence[Check], as_json: bool) -> None:
    lines = [f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}" for check in checks]
    failed = [check for check in checks if not check.passed]
    if failed and not as_json:
        typer.echo("\n".join(lines))
    if failed:
        raise RunFailed(
            "E-VERIFY", f"{name}: {len(failed)} of {len(checks)} checks failed: "
            + "; ".join(f"{check.name}: {check.detail}" for check in failed),
        )  # fmt: skip
    show({**said, "checks": [check.to_dict() for check in checks]}, as_json=as_json, text="\n".join(lines))


def export(
    run: Reference,
    out: Annotated[Path, typer.Option("--out", "--peft", help="The new folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the base model.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Copy a run's adapter out as a plain PEFT folder, or merged into its base model."""
    from cotune.shared.scoring import export_adapter

    export_adapter(find_run(run), out, merge=merge)
    what = "merged model" if merge else "adapter"
    show({"folder": str(out), "merged": merge}, as_json=as_json, text=f"wrote the {what} to {out}")
