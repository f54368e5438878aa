"""`cotune eval`, `report`, `verify`, `export`: what can be done with a run or an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cotune.shared.cli import show, show_failed
from cotune.shared.errors import JobError, RunFailed, did_you_mean
from cotune.shared.files import write_atomic
from cotune.shared.finding import find_run

if TYPE_CHECKING:
    from cotune.shared.checking.checks import Check
    from cotune.shared.runs import RunFolder

Reference = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, id, unique prefix, or `latest`.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON envelope.")]


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, or the folder of a PEFT adapter.")],
    data: Annotated[Path | None, typer.Option(help="Any JSONL; default: the run's own evaluation file.")] = None,
    job: Annotated[Path | None, typer.Option(help="Job file that names the base model, for a lone adapter.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the base model without the adapter.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only so many rows, or pairs of sentences.")] = None,
    bias: Annotated[
        str | None, typer.Option(metavar="SET", help="Instead: how often stereotypes are likelier (stereoset).")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Score a run or adapter: loss, token accuracy, and accuracy where the answers can be listed."""
    if bias:
        _measure_bias(run, bias, limit, as_json)
        return
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


def _measure_bias(run: str, bias: str, limit: int | None, as_json: bool) -> None:
    from cotune.shared.report.renewal import renew
    from cotune.shared.stereotypes import SETS, measure_stereotypes, text_of

    if bias not in SETS:
        what = f"`{bias}` is not a set of sentence pairs; known: {', '.join(SETS)}.{did_you_mean(bias, SETS)}"
        raise JobError("E-BIAS-SET", what, param="--bias", hint=f"cotune eval {run} --bias {SETS[0]}")
    folder = find_run(run)
    found = measure_stereotypes(folder, limit)
    renew(folder)
    show(found, as_json=as_json, text=text_of(found))


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
    signers: Annotated[
        Path | None, typer.Option(help="allowed_signers file you got elsewhere: only its keys may have signed.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a run or an exported ledger without trusting its figures: hashes, signatures, epsilon from events."""
    if _is_file(run):
        from cotune.shared.exported import read_exported, said_of, verify_exported

        exported = read_exported(Path(run))
        _show_checks(exported.site, said_of(exported), verify_exported(exported), as_json)
        return
    from cotune.shared.checking.checks import printable
    from cotune.shared.signers import read_signers
    from cotune.shared.verification import verify_run

    folder = find_run(run)
    name = printable(folder.run_id)
    _show_checks(name, {"run": name}, verify_run(folder, read_signers(signers) if signers else None), as_json)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a name no file can have
        return False


def _show_checks(name: str, said: dict[str, Any], checks: Sequence[Check], as_json: bool) -> None:
    lines = [f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}" for check in checks]
    failed = [check for check in checks if not check.passed]
    data, text = {**said, "checks": [check.to_dict() for check in checks]}, "\n".join(lines)
    if failed:
        what = "; ".join(f"{check.name}: {check.detail}" for check in failed)
        error = RunFailed("E-VERIFY", f"{name}: {len(failed)} of {len(checks)} checks failed: {what}")
        show_failed(error, data, as_json=as_json, text=text)
    show(data, as_json=as_json, text=text)


def export(
    run: Reference,
    out: Annotated[Path | None, typer.Option("--out", "--peft", help="The adapter, as a new folder.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the base model.")] = False,
    registry: Annotated[
        Path | None, typer.Option(help="Record of the DP Deployments Registry (OpenDP, NIST), as YAML.")
    ] = None,
    curators: Annotated[
        Literal["government", "industry", "nonprofit"] | None,
        typer.Option(help="What the sites are; the registry's record has to say it."),
    ] = None,
    dpia: Annotated[
        Path | None, typer.Option(help="Facts for an impact assessment (GDPR Art. 35(7)), Markdown.")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Record of processing (GDPR Art. 30), Markdown.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a run's adapter as a plain PEFT folder, or merged; or its facts for those who ask for them."""
    wanted = {name: path for name, path in (("registry", registry), ("dpia", dpia), ("record", record)) if path}
    if not out and not wanted:
        what = "expected what to export: --out, --registry, --dpia or --record"
        raise JobError("E-EXPORT-WHAT", what, param="--out", hint="cotune export --help")
    folder, said = find_run(run), dict[str, Any]()
    if wanted:
        said |= _write_facts(folder, wanted, curators)
    if out:
        from cotune.shared.scoring import export_adapter

        export_adapter(folder, out, merge=merge)
        said |= {"folder": str(out), "merged": merge}
    lines = [f"wrote the {'merged model' if merge else 'adapter'} to {out}"] if out else []
    lines += [f"wrote {path}" for path in wanted.values()]
    show(said, as_json=as_json, text="\n".join(lines))


def _write_facts(folder: RunFolder, wanted: Mapping[str, Path], curators: str | None) -> dict[str, str]:
    """Write the texts that were asked for, all or none of them."""
    from cotune.shared.exports.documents import document
    from cotune.shared.exports.facts import read_facts
    from cotune.shared.exports.registry import registry_yaml

    facts = read_facts(folder)
    makers: dict[str, Callable[[], str]] = {
        "registry": lambda: registry_yaml(facts, curators),
        "dpia": lambda: document("dpia", facts),
        "record": lambda: document("record", facts),
    }
    made = {name: makers[name]() for name in wanted}
    for name, path in wanted.items():
        write_atomic(path, made[name].encode())
    return {name: str(path) for name, path in wanted.items()}
