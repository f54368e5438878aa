"""A site's ledger as both sides read it: lines that name the line before them, and signed heads that name the last.

A line is one JSON object {"seq", "prev", "time", "action", ...}; `prev` is the SHA-256 of the exact bytes of the
line before it, without its newline. `seq` is the order; `time` only informs, and a clock may jump.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from cotune.shared.errors import PrivacyError, StorageError
from cotune.shared.files import write_json
from cotune.shared.keyfile import SigningKey
from cotune.shared.privacy.event import Event, event_from_dict
from cotune.shared.sections import Sha256, SiteName
from cotune.shared.signing import verify

Action = Literal[
    "site.init", "policy.change", "data.register", "data.change", "federation.join", "federation.leave",
    "job.received", "job.approved", "job.denied", "job.refused",
    "budget.reserve", "budget.commit", "claim.signed", "ledger.repair",
]  # fmt: skip
PublicKey = Annotated[str, StringConstraints(pattern=r"^ssh-ed25519 [A-Za-z0-9+/]{68}$")]
WITNESSES = 3  # other sites that hold a site's newest head
MAX_LINE = 1_000_000  # bytes
BEFORE_THE_FIRST = "0" * 64
ACTIONS = frozenset(get_args(Action))
RESTORE = (
    "restore the newest copy of ledger.jsonl and head.json, never an older one; without it the budget counts as spent"
)
_FRAME = ("seq", "prev", "time", "action")


class SignedHead(BaseModel):
    """A site's word for how far its ledger had got; whoever holds one can tell an older ledger, or another one.

    Attributes:
        site: Whose ledger.
        seq: Number of its last line, counted from 1.
        sha256: Hash of that line, and through it of all before.
        public_key: The site's key, `ssh-ed25519 AAAA...`.
        signature: SSH signature over `head_message`, namespace `cotune-head`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    site: SiteName
    seq: int = Field(ge=1)
    sha256: Sha256
    public_key: PublicKey
    signature: str = Field(max_length=1000)


def head_message(site: str, seq: int, sha256: str) -> bytes:
    """What a site signs: one line of text, so that `ssh-keygen -Y verify` can be given it by hand."""
    return f"{site} {seq} {sha256}\n".encode()


def sign_head(key: SigningKey, site: str, entry: Entry) -> SignedHead:
    """The signed head of a site's ledger that ends with this entry."""
    signature = key.sign("cotune-head", head_message(site, entry.seq, entry.sha256))
    return SignedHead(site=site, seq=entry.seq, sha256=entry.sha256, public_key=key.public, signature=signature)


def head_is_genuine(head: SignedHead) -> bool:
    """Whether the head was signed by the key it names. Whose key that is, the caller knows."""
    message = head_message(head.site, head.seq, head.sha256)
    return verify(head.public_key, "cotune-head", message, head.signature)


def read_heads(path: Path, hint: str) -> dict[str, SignedHead]:
    """The heads a file keeps, by site; none if there is no file.

    Raises:
        StorageError: The file is damaged (E-HEADS).
    """
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_bytes())
        return {site: SignedHead.model_validate(head) for site, head in known.items()}
    except (OSError, ValueError, AttributeError):
        raise StorageError("E-HEADS", f"{path}: the sites' ledger heads cannot be read", hint=hint) from None


def write_heads(path: Path, heads: Mapping[str, SignedHead]) -> None:
    """Keep heads in a file, in place of those it had."""
    write_json(path, {site: head.model_dump() for site, head in sorted(heads.items())})


@dataclass(frozen=True)
class Entry:
    """One line of a ledger.

    Attributes:
        seq: Its number, counted from 1.
        action: What happened.
        fields: What is said of it.
        sha256: Hash of the exact bytes of its line.
        time: When, by the site's clock; informs, and orders nothing.
    """

    seq: int
    action: str
    fields: dict[str, Any]
    sha256: str
    time: str = ""


def next_line(last: Entry | None, time: str, action: str, fields: Mapping[str, object]) -> bytes:
    """The bytes of the line after `last`, with its newline.

    Raises:
        ValueError, TypeError: A field is not JSON, or is named as a part of the frame.
    """
    if taken := fields.keys() & set(_FRAME):
        raise ValueError(f"a ledger entry has its own {sorted(taken)}")
    seq, prev = (last.seq + 1, last.sha256) if last else (1, BEFORE_THE_FIRST)
    line = {"seq": seq, "prev": prev, "time": time, "action": action, **fields}
    return (json.dumps(line, allow_nan=False) + "\n").encode()


def read_chain(content: bytes, after: Entry | None = None) -> list[Entry]:
    """All entries of a ledger, or of the part of it that follows `after`.

    Guarantee: every entry returned is a line that names the exact bytes of the line before it, from the first
    line or `after` on. With a genuine head for the last one, no line was edited, left out, added or moved.

    Edge cases: no content gives no entry; a last line without its newline is an error, since only the ledger's
    own site may say that a crash tore it; an action this version does not know is an error, since it could be
    something that was released.

    Raises:
        StorageError: A line is not what its chain says (E-LEDGER-CHAIN); the line is named.
    """
    lines = content.split(b"\n")
    torn = lines.pop()
    entries = list(walk_chain(lines, after))
    if torn:
        raise _broken((entries[-1].seq if entries else after.seq if after else 0) + 1, "it has no end")
    return entries


def walk_chain(lines: Iterable[bytes], after: Entry | None = None) -> Iterator[Entry]:
    """As `read_chain`, one entry at a time, of lines without their newlines; it holds no more than one."""
    for line in lines:
        after = _read_line(line, after)
        yield after


def ledger_lines(path: Path) -> Iterator[bytes]:
    """The lines of a ledger's file, one at a time.

    Raises:
        StorageError: A line has no end, or is longer than any a site writes (E-LEDGER-CHAIN).
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE), b""), 1):
            if not line.endswith(b"\n"):
                raise _broken(number, "it has no end, or is longer than any a site writes")
            yield line[:-1]


def _read_line(line: bytes, last: Entry | None) -> Entry:
    seq, prev = (last.seq + 1, last.sha256) if last else (1, BEFORE_THE_FIRST)
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or not set(_FRAME) <= fields.keys():
        raise _broken(seq, f"expected a JSON object with {', '.join(_FRAME)}")
    said_seq, said_prev, time, action = (fields.pop(name) for name in _FRAME)
    if said_seq != seq:
        raise _broken(seq, "its number is another")
    if said_prev != prev:
        raise _broken(seq, "the line before it is not the one it names: one of the two was changed")
    if not isinstance(time, str) or not isinstance(action, str) or action not in ACTIONS:
        raise _broken(seq, "an action this version of cotune does not know")
    if (action == "site.init") != (seq == 1):
        raise _broken(seq, "expected site.init as the first entry and nowhere else")
    return Entry(seq, action, fields, hashlib.sha256(line).hexdigest(), time)


def _broken(seq: int, what: str) -> StorageError:
    return StorageError("E-LEDGER-CHAIN", f"ledger line {seq}: {what}", hint=RESTORE)


def read_torn_chain(content: bytes, after: Entry | None, covered: int) -> tuple[list[Entry], int]:
    """The entries of a ledger after a crash, and how many bytes they take; the rest is one line that it tore.

    Guarantee: as `read_chain`; a line that a head covers is never taken for a torn one.

    Edge cases: a torn line may have its end and lack its middle, since parts of one write reach a disk in any
    order; a broken line with anything after it was not left by a crash.

    Args:
        content: Part of a ledger, to its end.
        after: The entry before it.
        covered: Number of the last line a signed head covers; 0 without one.

    Raises:
        StorageError: Another line than an uncovered last one is broken (E-LEDGER-CHAIN).
    """
    end = content.rfind(b"\n") + 1
    try:
        return read_chain(content[:end], after), end
    except StorageError:
        before = content.rfind(b"\n", 0, end - 1) + 1
        entries = read_chain(content[:before], after)
        last = (after.seq if after else 0) + len(entries)
        if last < covered or end < len(content):
            raise
        return entries, before


def require_own(head: SignedHead, site: str, public_key: str) -> None:
    """Hold a head against whom it is to come from.

    Raises:
        StorageError: Another site or key signed it, or none did (E-LEDGER-HEAD).
    """
    if (head.site, head.public_key) != (site, public_key) or not head_is_genuine(head):
        raise StorageError(
            "E-LEDGER-HEAD", f"expected a ledger head that {site} signed with its key, got another", hint=RESTORE
        )


def require_agreement(head: SignedHead, entries: Sequence[Entry]) -> None:
    """Hold a genuine head of a site against its ledger.

    Raises:
        StorageError: The head is ahead of the ledger (E-LEDGER-BEHIND) or names another line (E-LEDGER-FORK): an
            older or another ledger was put in this one's place.
    """
    if head.seq > len(entries):
        what = f"the ledger ends at line {len(entries)}, older than line {head.seq}, which {head.site} signed"
        raise StorageError("E-LEDGER-BEHIND", f"{what}: an old copy was restored", hint=RESTORE)
    if entries[head.seq - 1].sha256 != head.sha256:
        what = f"ledger line {head.seq} is not the one {head.site} signed: two ledgers grew from one"
        raise StorageError("E-LEDGER-FORK", what, hint=RESTORE)


def of_round(entries: Iterable[Entry], action: Action, run_id: str, round_number: int) -> list[Entry]:
    """The reservations or the commits of one round."""
    wanted = (action, run_id, round_number)
    return [e for e in entries if (e.action, e.fields.get("run_id"), e.fields.get("round")) == wanted]


def reserved(
    entries: Iterable[Entry], *, dataset: str | None = None, run_id: str | None = None
) -> list[tuple[Entry, Event]]:
    """Every reservation of a data set or run, in order, with what it released at most.

    Guarantee: a reservation counts for ever, whether the round was committed, crashed or was lost; the events
    returned are therefore never fewer than what was released.

    Edge cases: without a data set or run, all are returned; entries of other actions are passed over.

    Raises:
        PrivacyError: An event cannot be priced, or an entry is not one a site writes (E-EVENT).
    """
    try:
        return [
            (entry, event_from_dict(entry.fields["event"]))
            for entry in entries
            if entry.action == "budget.reserve"
            and dataset in (None, entry.fields["dataset"])
            and run_id in (None, entry.fields["run_id"])
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise PrivacyError("E-EVENT", "a reservation of the ledger has not the fields a site writes") from None
