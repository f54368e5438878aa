"""The coordinators a site has joined. Whose jobs it may start is in its ledger, where no edit goes unseen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import AwareDatetime, ValidationError

from cotune.shared.chain import Entry, PublicKey
from cotune.shared.errors import StorageError
from cotune.shared.files import storage_errors, sync_folder, write_atomic
from cotune.shared.invitation import Address
from cotune.shared.sections import Section, Sha256, SiteName

JOIN, LEAVE = "federation.join", "federation.leave"


class Coordinator(Section):
    """A coordinator as the site's home knows it.

    Attributes:
        name: The federation's.
        address: HOST:PORT of its gateway.
        public_key: With which it signs jobs.
        ca_sha256: Of the one certificate that may vouch for the address.
        joined: When.
    """

    name: SiteName
    address: Address
    public_key: PublicKey
    ca_sha256: Sha256
    joined: AwareDatetime


@dataclass(frozen=True)
class Coordinators:
    """One file a federation.

    Attributes:
        folder: In the site's home; made by the first.
    """

    folder: Path

    def all(self) -> dict[str, Coordinator]:
        """Every federation's coordinator, by the federation's name.

        Raises:
            StorageError: A file is damaged (E-COORDINATORS).
        """
        return {path.stem: _read(path) for path in sorted(self.folder.glob("*.json"))}

    def keep(self, coordinator: Coordinator) -> None:
        """Write a coordinator down, in place of what was known of its federation."""
        with storage_errors(self.folder):
            self.folder.mkdir(mode=0o700, exist_ok=True)
        write_atomic(self.folder / f"{coordinator.name}.json", coordinator.model_dump_json(indent=2).encode() + b"\n")

    def forget(self, federation: str) -> None:
        """Remove what is known of a federation, if anything is."""
        with storage_errors(self.folder):
            (self.folder / f"{federation}.json").unlink(missing_ok=True)
            if self.folder.exists():
                sync_folder(self.folder)


def joined_keys(entries: Iterable[Entry]) -> dict[str, str] | None:
    """The keys of the coordinators a site is joined to, by federation; None if it never joined any.

    Guarantee: computed from the ledger alone; a site that ever joined never gets None again, so that a job nobody
    signed stays out for good.

    Edge cases: joined again counts once, with the newest key; left counts as gone.
    """
    keys: dict[str, str] | None = None
    for entry in entries:
        if entry.action == JOIN:
            keys = {**(keys or {}), entry.fields["federation"]: entry.fields["coordinator"]}
        elif entry.action == LEAVE and keys:
            keys = {name: key for name, key in keys.items() if name != entry.fields["federation"]}
    return keys


def _read(path: Path) -> Coordinator:
    try:
        return Coordinator.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise StorageError(
            "E-COORDINATORS", f"{path}: expected a coordinator, found a damaged file", hint="cotune site join INVITE"
        ) from None
