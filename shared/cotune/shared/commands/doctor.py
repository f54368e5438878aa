"""`cotune doctor`: is this installation open, or about to break?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cotune.shared.cli import INSPECTIONS, RUNNING, named, show, show_failed
from cotune.shared.errors import JobError, RunFailed
from cotune.shared.fault import Fault, flower_faults
from cotune.shared.reaching import look_at

Looked = dict[str, list[Fault]]


def doctor(
    fed: Annotated[Path | None, typer.Option(help="A coordinator's home.")] = None,
    site: Annotated[Path | None, typer.Option(help="A site's home.")] = None,
    address: Annotated[str | None, typer.Option(help="HOST:PORT of a coordinator, as the network sees it.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The certificate that may vouch for the address.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON envelope.")] = False,
) -> None:
    """What is open at this installation, or about to break. Exit code 1 if anything is.

    Looks at Flower's version and at what is named; if nothing is, at the homes in their usual places. With a
    coordinator's home go the SuperLinks of this machine.
    """
    given = {"coordinator": fed, "site": site}
    looked: Looked = {"Flower": flower_faults()}
    if fed or not (site or address):
        looked["SuperLinks of this machine"] = named(RUNNING)()
    for kind, (default, inspect) in INSPECTIONS.items():
        home = given[kind]
        if home is None and not (fed or site or address):
            home = there if (there := named(default)()).exists() else None
        if home is not None:
            looked[f"{kind} {home}"] = named(inspect)(home.expanduser())
    if address is not None:
        looked[f"address {address}"] = look_at(address, _read(ca))
    _show(looked, as_json)


def _read(ca: Path | None) -> str | None:
    try:
        return None if ca is None else ca.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        raise JobError("E-TLS", f"{ca}: expected a certificate in PEM form", param="--ca") from None


def _show(looked: Looked, as_json: bool) -> None:
    """Print what was found; with a fault, the command fails.

    Raises:
        RunFailed: Something is wrong (E-DOCTOR).
    """
    text = "\n".join(line for subject, found in looked.items() for line in _lines(subject, found))
    data = {"looked_at": {subject: [asdict(fault) for fault in found] for subject, found in looked.items()}}
    total = sum(map(len, looked.values()))
    if not total:
        show(data, as_json=as_json, text=text)
        return
    count = f"{total} thing{'s' * (total > 1)} to mend"
    error = RunFailed("E-DOCTOR", count, hint="what stands under each, then cotune doctor again")
    show_failed(error, data, as_json=as_json, text=text)


def _lines(subject: str, found: list[Fault]) -> list[str]:
    if not found:
        return [f"{subject}: nothing to mend"]
    return [f"{subject}:", *(f"  {fault.code}  {fault.what}\n    mend it: {fault.mend}" for fault in found)]
