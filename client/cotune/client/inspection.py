"""What is open at a site, or about to break."""

from __future__ import annotations

import hashlib
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

from cotune.client.courier_folder import NODE_KEY, CourierFolder, courier_folder
from cotune.client.home import SiteHome
from cotune.shared.errors import CotuneError
from cotune.shared.fault import Fault, fault_of
from cotune.shared.reaching import look_at

OF_THE_HOME = ("site.key", "ledger.jsonl", "policy.toml", "head.json")
APART = "move it out: the courier's folder holds its node key and addresses alone, the site's home all the rest"


def inspect(path: Path) -> list[Fault]:
    """A site's home with its ledger, its courier's folder, its files of records, and the coordinators it joined."""
    path = path.absolute()
    courier = courier_folder(path)
    found = [*fault_of(lambda: SiteHome.open(path)), *_mixed(path, courier), *_courier(courier)]
    if any(fault.code.startswith(("E-SITE", "E-KEY", "E-LEDGER")) for fault in found):
        return found  # who the site trusts is in there
    home = SiteHome.open(path)
    return [*found, *_records(home), *(fault for name in home.coordinators.all() for fault in _coordinator(home, name))]


def _mixed(home: Path, courier: Path) -> Iterator[Fault]:
    """What lies on the wrong side of the line between those who see records and those who see the network."""
    if courier.resolve().is_relative_to(home.resolve()) or home.resolve().is_relative_to(courier.resolve()):
        yield Fault("E-COURIER-MIXED", f"{courier}: lies in the site's home, or the home in it", APART)
    for name in OF_THE_HOME:
        for file in sorted(courier.rglob(name)):
            yield Fault("E-COURIER-MIXED", f"{file}: is the site's, and lies with the courier", APART)
    for file in sorted(home.rglob(NODE_KEY)):
        yield Fault("E-COURIER-MIXED", f"{file}: is the courier's, and lies in the site's home", APART)


def _courier(folder: Path) -> Iterator[Fault]:
    """A courier may be a user of its own: only what others may do counts."""
    for path, right in ((folder, "700"), (folder / NODE_KEY, "600")):
        if path.exists() and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            mode = stat.S_IMODE(path.stat().st_mode)
            yield Fault("E-COURIER-OPEN", f"{path}: its mode is {mode:o}, open to others", f"chmod {right} {path}")


def _records(home: SiteHome) -> Iterator[Fault]:
    for dataset in home.policy.dataset:
        file = (home.path / dataset.path).absolute()
        if not file.exists():
            yield Fault(
                "E-DATA-MISSING", f"data set {dataset.id}: its file is not there", "restore it, or edit policy.toml"
            )
        elif file.stat().st_mode & stat.S_IROTH and all(p.stat().st_mode & stat.S_IXOTH for p in file.parents):
            yield Fault("E-DATA-OPEN", f"data set {dataset.id}: every user may read its file", f"chmod o= {file}")


def _coordinator(home: SiteHome, federation: str) -> list[Fault]:
    known = home.coordinators.all()[federation]
    try:
        ca = CourierFolder(courier_folder(home.path) / federation).ca.decode("ascii")
        pinned = hashlib.sha256(ssl.PEM_cert_to_DER_cert(ca)).hexdigest() == known.ca_sha256
    except (CotuneError, ValueError):
        pinned, ca = False, ""
    if not pinned:
        what = f"{federation}: the certificate its courier trusts is not the one that was joined"
        return [Fault("E-COURIER-CA", what, "cotune site join INVITE, with a new invitation")]
    return look_at(known.address, ca)
