"""A site's ledger: what it ever released and decided, in one file that only grows.

An entry counts once three things are done, in this order: its line is on the disk, a signed head that names the
line is on the disk, and the call that wrote it has returned. A crash in between leaves an entry too many, never one
too few. The format and its reader are `cotune.shared.chain`, for everyone who checks a ledger.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from cotune.client.disk import LOCAL_DISK, Disk, read_whole, replace_whole, sync_folder, write_whole
from cotune.shared.chain import (
    RESTORE,
    Action,
    Entry,
    SignedHead,
    next_line,
    of_round,
    read_chain,
    read_torn_chain,
    require_agreement,
    require_own,
    reserved,
    sign_head,
)
from cotune.shared.errors import RefusedError, StorageError
from cotune.shared.keyfile import SigningKey
from cotune.shared.privacy.event import Event
from cotune.shared.signing import Namespace

Rule = Callable[[Sequence[Entry]], None]
_NOW = partial(datetime.now, UTC)


class Ledger:
    """The entries of one site; open it with `Ledger.open`.

    Several processes and threads may hold one ledger: each write takes the file's lock, takes in what others
    wrote, and only then appends. `entries` and what is computed from them are as of the last such call.
    """

    def __init__(self, path: Path, site: str, key: SigningKey, disk: Disk, clock: Callable[[], datetime]) -> None:
        self._path, self._head_path = path, path.with_name("head.json")
        self._site, self._key, self._disk, self._clock = site, key, disk, clock
        self._known: tuple[tuple[Entry, ...], int] = (), 0  # the entries, and the bytes they take in the file
        self._sound = True

    @classmethod
    def open(
        cls, path: Path, site: str, key: SigningKey, disk: Disk = LOCAL_DISK, clock: Callable[[], datetime] = _NOW
    ) -> Ledger:
        """The ledger of a file; a file that is not there is begun, and its first entry is then to be site.init.

        Guarantee: what is returned holds every entry this file's head vouches for, unchanged and in order.

        Edge cases: a line that a crash tore was never returned to anyone, and is cut off (ledger.repair says
        so); a whole line that no head covers yet is kept and signed; a head without its line, an edited,
        missing or moved line, another key's head and a disk that cannot be written are refused.

        Raises:
            StorageError: E-LEDGER-CHAIN, -HEAD, -BEHIND, -FORK or -STORAGE.
        """
        ledger = cls(path, site, key, disk, clock)
        with ledger._held(opening=True):
            return ledger

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries, oldest first."""
        self._require_sound()
        return self._known[0]

    @property
    def head(self) -> SignedHead:
        """The signed head of the last entry; a StorageError (E-LEDGER-HEAD) if there is none yet."""
        if not self.entries:
            raise self._refused("E-LEDGER-HEAD", "the ledger has no entry yet, and so no head")
        return sign_head(self._key, self._site, self.entries[-1])

    def append(self, action: Action, /, **fields: object) -> SignedHead:
        """Append an entry; it survives a loss of power once this returns.

        Raises:
            ValueError, TypeError: A field is not JSON; nothing was written.
            StorageError: The disk failed, or holds another ledger than this object knows.
        """
        return self._append(action, fields)

    def reserve(
        self, *, dataset: str, unit: str, run_id: str, job_sha256: str, round_number: int, event: Event,
        rule: Rule | None = None,
    ) -> SignedHead:  # fmt: skip
        """Charge a round before it is trained.

        Guarantee: once this returns, the event counts against the data set for ever: no crash, commit or
        refusal gives it back. No other process can reserve between the rule's decision and this entry.

        Edge cases: a rule that raises leaves the ledger as it was; a disk that fails leaves it with the
        reservation or without, and this returns in neither case.

        Args:
            dataset: Its id in the site's policy.
            unit: What is protected, `record` or `column:NAME`.
            run_id: The coordinator's run.
            job_sha256: The job.
            round_number: Counted from 1.
            event: What the round will release.
            rule: Given all entries while the ledger is held; raises to refuse. It must not append.
        """
        fields = {
            "dataset": dataset, "unit": unit, "run_id": run_id, "job_sha256": job_sha256, "round": round_number,
            "event": event.to_dict(),
        }  # fmt: skip
        return self._append("budget.reserve", fields, rule)

    def commit(self, *, run_id: str, round_number: int, update_sha256: str) -> SignedHead:
        """Say which update a reserved round gave; a round gives one.

        Raises:
            RefusedError: The round was never reserved, or gave an update already (E-ROUND-DONE).
        """

        def open_round(entries: Sequence[Entry]) -> None:
            begun = of_round(entries, "budget.reserve", run_id, round_number)
            if not begun or of_round(entries, "budget.commit", run_id, round_number):
                what = "gave its update already" if begun else "was never reserved"
                raise RefusedError("E-ROUND-DONE", f"{self._site}: round {round_number} of {run_id} {what}")

        fields = {"run_id": run_id, "round": round_number, "update_sha256": update_sha256}
        return self._append("budget.commit", fields, open_round)

    def sign(self, namespace: Namespace, message: bytes) -> str:
        """A signature by the key that signs this ledger's heads."""
        return self._key.sign(namespace, message)

    def events(self, dataset: str) -> list[Event]:
        """Everything ever reserved for a data set, committed or not."""
        return [event for _, event in reserved(self.entries, dataset=dataset)]

    def rounds(self, run_id: str, round_number: int) -> list[Entry]:
        """The reservations of one round: none, one, or one for each time it was begun."""
        return of_round(self.entries, "budget.reserve", run_id, round_number)

    def committed(self, run_id: str, round_number: int) -> str | None:
        """Hash of the update a round gave, if it gave one."""
        commits = of_round(self.entries, "budget.commit", run_id, round_number)
        return commits[0].fields["update_sha256"] if commits else None

    def check(self, head: SignedHead) -> None:
        """Hold a head that comes back from a coordinator or another site against this ledger.

        Raises:
            StorageError: It is not this site's (E-LEDGER-HEAD), or it is and this ledger is an older one
                (E-LEDGER-BEHIND) or another (E-LEDGER-FORK).
        """
        require_own(head, self._site, self._key.public)
        with self._held():
            require_agreement(head, self._known[0])

    def _append(self, action: str, fields: Mapping[str, object], rule: Rule | None = None) -> SignedHead:
        with self._held() as file:
            if rule:
                rule(self._known[0])
            return self._write(file, action, fields)

    @contextlib.contextmanager
    def _held(self, opening: bool = False) -> Generator[int]:
        """The file, locked and taken in. After a failure the disk is not to be trusted, nor this object any more."""
        self._require_sound()
        try:
            file = self._disk.open(self._path, os.O_RDWR | (os.O_CREAT if opening else 0))
            try:
                self._disk.lock(file)
                if opening:
                    sync_folder(self._disk, self._path.parent)
                if opening or self._disk.size(file) != self._known[1]:
                    self._take_in(file)
                yield file
            finally:
                self._disk.close(file)
        except (OSError, StorageError) as error:
            self._sound = False
            if isinstance(error, StorageError):
                raise
            what = f"the ledger could not be kept ({error.strerror or error})"
            raise self._refused("E-LEDGER-STORAGE", what, "free or replace its disk, then start again") from error

    def _take_in(self, file: int) -> None:
        """Read what this object does not know yet, hold it against the head on disk, and mend what a crash left."""
        entries, known = self._known
        if self._disk.size(file) < known:
            raise self._refused("E-LEDGER-BEHIND", "the ledger became shorter while it was open")
        head, content = self._head_on_disk(), self._disk.read(file, known)
        covered = head.seq if head else 0
        new, whole = read_torn_chain(content, entries[-1] if entries else None, covered)
        entries, torn = (*entries, *new), len(content) - whole
        if head:
            require_agreement(head, entries)
        elif len(entries) > 1 or (entries and torn):
            raise self._refused("E-LEDGER-HEAD", "the ledger has no head.json, and no crash takes it away")
        if torn or len(entries) > covered:
            # Written once more: whoever wrote it may have died before its fsync, or seen that fail, and then what
            # is read here may be in memory only. A head must not name it before the disk has it.
            self._disk.cut(file, known + whole)
            write_whole(self._disk, file, content[:whole], known)
        self._known = entries, known + whole
        if entries and torn:
            self._write(file, "ledger.repair", {"cut_bytes": torn})
        elif uncovered := entries[covered:]:
            self._seal(uncovered[-1])

    def _write(self, file: int, action: str, fields: Mapping[str, object]) -> SignedHead:
        entries, size = self._known
        last = entries[-1] if entries else None
        line = next_line(last, self._clock().isoformat(timespec="seconds"), action, fields)
        [entry] = read_chain(line, last)
        write_whole(self._disk, file, line, size)
        head = self._seal(entry)
        self._known = (*entries, entry), size + len(line)
        return head

    def _seal(self, entry: Entry) -> SignedHead:
        head = sign_head(self._key, self._site, entry)
        replace_whole(self._disk, self._head_path, head.model_dump_json().encode() + b"\n")
        return head

    def _head_on_disk(self) -> SignedHead | None:
        content = read_whole(self._disk, self._head_path)
        if content is None:
            return None
        try:
            head = SignedHead.model_validate_json(content)
        except ValidationError:
            raise self._refused("E-LEDGER-HEAD", "head.json is damaged") from None
        require_own(head, self._site, self._key.public)
        return head

    def _require_sound(self) -> None:
        if not self._sound:
            what = "the ledger failed before, and nobody knows what its disk holds"
            raise self._refused("E-LEDGER-STORAGE", what, "mend what the first error named, then start again")

    def _refused(self, code: str, what: str, hint: str = RESTORE) -> StorageError:
        return StorageError(code, f"{self._site}: {what}", hint=hint)
