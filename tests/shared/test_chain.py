"""The ledger's format: each line names the one before it, and a head names the last."""

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from cotune.shared.chain import (
    ACTIONS,
    Entry,
    SignedHead,
    head_is_genuine,
    head_message,
    next_line,
    of_round,
    read_chain,
    read_torn_chain,
    require_agreement,
    require_own,
    reserved,
)
from cotune.shared.errors import PrivacyError, StorageError
from cotune.shared.privacy.event import DpSgdEvent, NonPrivateEvent
from cotune.shared.signing import public_key_line, sign

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = public_key_line(KEY.public_key())
EVENT = DpSgdEvent(sampling_probability=0.01, noise_multiplier=1.5, steps=10)
NEVER = next_line(None, "", "site.init", {})[:-1]


def reservation(dataset: str = "notes", run_id: str = "run", number: int = 1, **more: Any) -> dict[str, Any]:
    return {"dataset": dataset, "run_id": run_id, "round": number, "event": EVENT.to_dict(), **more}


def lines_of(*said: tuple[str, dict[str, Any]]) -> list[bytes]:
    lines: list[bytes] = []
    last: Entry | None = None
    for action, fields in (("site.init", {"name": "a"}), *said):
        lines.append(next_line(last, "2030-01-01T00:00:00+00:00", action, fields))
        last = read_chain(lines[-1], last)[-1]
    return lines


def ledger(rounds: int = 10) -> list[bytes]:
    said: list[tuple[str, dict[str, Any]]] = []
    for number in range(1, rounds + 1):
        said.append(("budget.reserve", reservation(number=number)))
        said.append(("budget.commit", {"run_id": "run", "round": number, "update_sha256": "ab" * 32}))
    return lines_of(*said)


def head_of(entry: Entry, site: str = "a", key: Ed25519PrivateKey = KEY) -> SignedHead:
    return SignedHead(
        site=site,
        seq=entry.seq,
        sha256=entry.sha256,
        public_key=public_key_line(key.public_key()),
        signature=sign(key, "cotune-head", head_message(site, entry.seq, entry.sha256)),
    )


def refused(content: bytes) -> str:
    with pytest.raises(StorageError) as caught:
        read_chain(content)
    assert caught.value.code == "E-LEDGER-CHAIN"
    assert "never an older one" in str(caught.value.hint)
    return caught.value.message


def test_a_line_is_one_json_object_that_names_the_exact_bytes_of_the_line_before_it() -> None:
    lines = ledger(1)
    objects = [json.loads(line) for line in lines]
    assert [o["seq"] for o in objects] == [1, 2, 3]
    assert objects[0]["prev"] == "0" * 64
    for line, after in zip(lines, objects[1:], strict=False):
        assert after["prev"] == hashlib.sha256(line.removesuffix(b"\n")).hexdigest()
    assert all(line.count(b"\n") == 1 for line in lines)


def test_what_was_written_is_what_is_read() -> None:
    fields = {"reason": "zeile\nzwei\u2028 é \ud800 \x00", "n": 1e-300, "nested": {"a": [1, None, True]}}
    entries = read_chain(b"".join(lines_of(("job.denied", fields))))
    assert [(e.seq, e.action, e.fields, e.time) for e in entries] == [
        (1, "site.init", {"name": "a"}, "2030-01-01T00:00:00+00:00"),
        (2, "job.denied", fields, "2030-01-01T00:00:00+00:00"),
    ]


def test_a_part_is_read_as_what_follows_the_entry_before_it() -> None:
    lines = ledger()
    whole = read_chain(b"".join(lines))
    for cut in range(1, len(lines)):
        assert read_chain(b"".join(lines[cut:]), whole[cut - 1]) == whole[cut:]
    with pytest.raises(StorageError):
        read_chain(b"".join(lines[2:]), whole[0])


def test_no_content_gives_no_entry() -> None:
    assert read_chain(b"") == []


def test_a_last_line_without_its_end_is_an_error_and_is_named() -> None:
    content = b"".join(ledger())
    assert "line 21: it has no end" in refused(content[:-1])


@pytest.mark.parametrize("action", ["budget.delegate", "", 7, None])
def test_an_action_of_a_later_version_is_refused_since_it_could_be_a_release(action: Any) -> None:
    first = ledger(0)[0]
    line = {"seq": 2, "prev": read_chain(first)[0].sha256, "time": "", "action": action}
    assert "line 2: an action this version of cotune does not know" in refused(
        first + json.dumps(line).encode() + b"\n"
    )
    assert "budget.reserve" in ACTIONS


def test_a_ledger_begins_with_its_site_and_does_so_once() -> None:
    assert "line 1" in refused(next_line(None, "", "budget.reserve", reservation()))
    with pytest.raises(StorageError):
        lines_of(("site.init", {}))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"{}",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"seq": ' + b"9" * 5000 + b"}",
        NEVER.replace(b'"seq": 1', b'"seq": 2'),
        NEVER.replace(b'"time": ""', b'"time": 3'),
        NEVER.replace(b"0" * 64, b"1" * 64),
        NEVER.replace(b', "time": ""', b""),
    ],
)
def test_a_line_that_is_no_entry_is_an_error_with_its_number_and_without_its_text(line: bytes) -> None:
    message = refused(line + b"\n")
    assert "line 1" in message
    assert len(message) < 200


@pytest.mark.parametrize("fields", [{"seq": 1}, {"prev": ""}, {"x": float("nan")}, {"x": object()}])
def test_what_is_no_json_or_would_forge_the_frame_is_never_written(fields: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        next_line(None, "", "site.init", fields)


def test_every_changed_byte_breaks_the_chain_or_the_head() -> None:
    content = b"".join(ledger())
    entries = read_chain(content)
    head = head_of(entries[-1])
    chance, by_chain = np.random.default_rng(5), 0
    for _ in range(300):
        place, bit = chance.integers(len(content)), chance.integers(1, 256)
        changed = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
        try:
            require_agreement(head, read_chain(changed))
        except StorageError as error:
            by_chain += error.code == "E-LEDGER-CHAIN"
        else:
            pytest.fail(f"byte {place} changed unnoticed")
    assert by_chain > 250  # the others are in the last line, which only the head names


@pytest.mark.parametrize("what", ["left out", "doubled", "moved"])
def test_lines_left_out_doubled_or_moved_break_the_chain(what: str) -> None:
    lines = ledger()
    for place in range(len(lines) - 1):
        changed = {
            "left out": [*lines[:place], *lines[place + 1 :]],
            "doubled": [*lines[:place], lines[place], *lines[place:]],
            "moved": [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]],
        }[what]
        number = place + 2 if what == "doubled" else place + 1
        assert f"line {number}:" in refused(b"".join(changed))


def test_a_torn_last_line_is_left_over_and_one_that_a_head_covers_never_is() -> None:
    lines = ledger(3)
    whole, last = b"".join(lines[:-1]), lines[-1]
    for torn in (last[:1], last[:-1], b"\0" * len(last), last[:40] + b"\0" * (len(last) - 41) + b"\n"):
        entries, size = read_torn_chain(whole + torn, None, covered=6)
        assert (len(entries), size) == (6, len(whole))
        if torn.endswith(b"\n"):
            with pytest.raises(StorageError, match="line 7"):
                read_torn_chain(whole + torn, None, covered=7)
    assert read_torn_chain(whole + last, None, covered=6)[1] == len(whole + last)
    assert read_torn_chain(b"", None, covered=0) == ([], 0)


def test_a_broken_line_with_anything_after_it_was_not_left_by_a_crash() -> None:
    lines = ledger(3)
    broken = lines[5].replace(b'"round": 3', b'"round": \x00')
    assert broken != lines[5]
    for after in (b"x", lines[6]):
        with pytest.raises(StorageError, match="line 6"):
            read_torn_chain(b"".join([*lines[:5], broken, after]), None, covered=0)


def test_a_head_is_genuine_for_what_its_key_signed_and_for_nothing_else() -> None:
    entries = read_chain(b"".join(ledger()))
    head = head_of(entries[-1])
    assert head_is_genuine(head)
    other = head_of(entries[-1], key=Ed25519PrivateKey.from_private_bytes(bytes(32)))
    for change in ({"seq": 20}, {"site": "b"}, {"sha256": "0" * 64}, {"public_key": other.public_key}):
        assert not head_is_genuine(head.model_copy(update=change))
    assert not head_is_genuine(head.model_copy(update={"signature": other.signature}))
    require_own(head, "a", PUBLIC)
    for site, key in (("b", PUBLIC), ("a", other.public_key)):
        with pytest.raises(StorageError) as caught:
            require_own(head, site, key)
        assert caught.value.code == "E-LEDGER-HEAD"


def test_a_head_reads_back_strictly() -> None:
    head = head_of(read_chain(b"".join(ledger()))[-1])
    assert SignedHead.model_validate_json(head.model_dump_json()) == head
    said = json.loads(head.model_dump_json())
    for change in (
        {"seq": 0}, {"seq": "21"}, {"seq": 21.0}, {"site": "../a"}, {"sha256": "AB" * 32}, {"more": 1},
        {"public_key": PUBLIC + " comment"}, {"signature": "x" * 1001},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            SignedHead.model_validate_json(json.dumps({**said, **change}))


def test_a_head_says_whether_a_ledger_is_the_one_it_was_signed_for() -> None:
    entries = read_chain(b"".join(ledger()))
    for entry in entries:
        require_agreement(head_of(entry), entries)
        with pytest.raises(StorageError) as caught:
            require_agreement(head_of(entry), entries[: entry.seq - 1])
        assert caught.value.code == "E-LEDGER-BEHIND"
    other = read_chain(b"".join(lines_of(("budget.reserve", reservation(number=2)))))
    with pytest.raises(StorageError) as caught:
        require_agreement(head_of(other[1]), entries)
    assert caught.value.code == "E-LEDGER-FORK"
    require_agreement(head_of(other[0]), entries)


def test_every_reservation_counts_committed_or_not() -> None:
    said = [
        ("data.register", {"dataset": "notes"}),
        ("budget.reserve", reservation()),
        ("budget.commit", {"run_id": "run", "round": 1, "update_sha256": "ab" * 32}),
        ("budget.reserve", reservation(run_id="lost", number=2)),
        ("budget.reserve", reservation(dataset="images", event=NonPrivateEvent().to_dict())),
    ]
    entries = read_chain(b"".join(lines_of(*said)))
    assert [(e.seq, event) for e, event in reserved(entries)] == [(3, EVENT), (5, EVENT), (6, NonPrivateEvent())]
    assert [e.seq for e, _ in reserved(entries, dataset="notes")] == [3, 5]
    assert [e.seq for e, _ in reserved(entries, dataset="notes", run_id="lost")] == [5]
    assert reserved(entries, run_id="none") == []
    assert [e.seq for e in of_round(entries, "budget.reserve", "run", 1)] == [3, 6]
    assert [e.seq for e in of_round(entries, "budget.commit", "run", 1)] == [4]


def test_a_reservation_that_cannot_be_priced_is_an_error_and_not_left_out() -> None:
    entries = read_chain(b"".join(lines_of(("budget.reserve", reservation(event={"kind": "laplace"})))))
    with pytest.raises(PrivacyError):
        reserved(entries)
