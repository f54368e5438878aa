"""Which file each data set of a site has, and had: salted digests in the ledger, so that a swap shows."""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from cotune.client.ledger import Ledger
from cotune.client.policy import DatasetPolicy
from cotune.shared.errors import DataError, RefusedError
from cotune.shared.files import write_atomic

SALT_BYTES = 32
FileState = Literal["new", "unchanged", "changed"]


@dataclass(frozen=True, repr=False)
class DataFiles:
    """The files of a home's data sets.

    Attributes:
        home: The home folder, which keeps the salt.
        ledger: Which keeps the digests. Without the salt they tell nothing of the file.
    """

    home: Path
    ledger: Ledger

    @staticmethod
    def make_salt(home: Path) -> None:
        """Give a new home its salt."""
        write_atomic(home / "data.salt", secrets.token_bytes(SALT_BYTES))
        (home / "data.salt").chmod(0o600)

    def path(self, dataset: DatasetPolicy) -> Path:
        """A data set's file; a relative path starts at the home."""
        return self.home / dataset.path

    def digests(self) -> dict[str, list[str]]:
        """The digests of every file a data set ever had, oldest first."""
        found: dict[str, list[str]] = {}
        for entry in self.ledger.entries:
            if entry.action in ("data.register", "data.change"):
                found.setdefault(entry.fields["dataset"], []).append(entry.fields["digest"])
        return found

    def note(self, dataset: DatasetPolicy) -> None:
        """Log a data set's file when it is new or has changed; what was spent stays spent.

        Guarantee: no file is ever registered under two ids, so no second budget is opened for it, also not
        after the first id has left the policy.

        Edge cases: a changed file is a new version of the same data set, and its budget goes on. A copy that
        was altered by one byte is another file to this check.

        Raises:
            DataError: The file cannot be read (E-DATA-FILE).
            RefusedError: It is, or was, another data set's file (E-DATASET-SAME).
        """
        state, digest = self._looked_at(dataset)
        if state == "new":
            self.ledger.append("data.register", dataset=dataset.id, unit=dataset.unit, digest=digest)
        elif state == "changed":
            self.ledger.append("data.change", dataset=dataset.id, digest=digest)

    def state(self, dataset: DatasetPolicy) -> FileState:
        """How a data set's file stands to what the ledger knows of it; nothing is logged.

        Raises:
            DataError, RefusedError: As `note`.
        """
        return self._looked_at(dataset)[0]

    def _looked_at(self, dataset: DatasetPolicy) -> tuple[FileState, str]:
        digest, digests = self._digest(dataset), self.digests()
        for other, known in digests.items():
            if other != dataset.id and digest in known:
                raise RefusedError(
                    "E-DATASET-SAME",
                    f"the file of `{dataset.id}` is registered as `{other}`; it has one budget, not two",
                    param="dataset.path",
                    hint=f"name `{other}` in the job, or give `{dataset.id}` other records",
                )
        if dataset.id not in digests:
            return "new", digest
        return ("unchanged" if digests[dataset.id][-1] == digest else "changed"), digest

    def _digest(self, dataset: DatasetPolicy) -> str:
        path = self.path(dataset)
        try:
            salt = (self.home / "data.salt").read_bytes()
            if not path.is_file():  # a FIFO would wait for a writer for ever
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            with path.open("rb") as file:
                return hashlib.file_digest(file, partial(hmac.new, salt, digestmod="sha256")).hexdigest()
        except OSError as error:
            why = f"data set `{dataset.id}`: its file cannot be read ({error.strerror})"
            raise DataError("E-DATA-FILE", why, param="dataset.path", hint="mend `path` in policy.toml") from None
