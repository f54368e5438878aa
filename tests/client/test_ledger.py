"""The site's ledger on real files: what it keeps, what it refuses, and several writers at once."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cotune.client.disk import LocalDisk
from cotune.client.ledger import Ledger
from cotune.shared.chain import Entry, SignedHead, head_is_genuine, next_line, read_chain, reserved, sign_head
from cotune.shared.errors import RefusedError, StorageError
from cotune.shared.keyfile import SigningKey
from cotune.shared.privacy.event import DpSgdEvent

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))
EVENT = DpSgdEvent(sampling_probability=0.01, noise_multiplier=1.5, steps=10)
JOB = "cd" * 32


@dataclass(frozen=True)
class CountingDisk(LocalDisk):
    """The real disk, and what it was asked."""

    asked: list[str] = field(default_factory=list)

    def read(self, file: int, start: int) -> bytes:
        self.asked.append("read")
        return super().read(file, start)

    def sync(self, file: int) -> None:
        self.asked.append("sync")
        super().sync(file)


def reserve(ledger: Ledger, number: int, run_id: str = "run", **more: Any) -> SignedHead:
    fields = {"dataset": "notes", "unit": "record", "run_id": run_id, "job_sha256": JOB, "event": EVENT}
    return ledger.reserve(round_number=number, **{**fields, **more})


def commit(ledger: Ledger, number: int, update: str = "ab" * 32) -> SignedHead:
    return ledger.commit(run_id="run", round_number=number, update_sha256=update)


def opened(folder: Path, key: SigningKey = KEY, site: str = "a", **more: Any) -> Ledger:
    return Ledger.open(folder / "ledger.jsonl", site, key, **more)


def begun(folder: Path, rounds: int = 0, **more: Any) -> Ledger:
    ledger = opened(folder, **more)
    ledger.append("site.init", name="a")
    for number in range(1, rounds + 1):
        reserve(ledger, number)
        commit(ledger, number)
    return ledger


def refusal(folder: Path, **more: Any) -> StorageError:
    with pytest.raises(StorageError) as caught:
        opened(folder, **more)
    return caught.value


def kept(folder: Path) -> list[Entry]:
    return read_chain((folder / "ledger.jsonl").read_bytes())


# What it keeps


def test_what_was_appended_is_there_after_reopening(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    ledger.append("data.register", dataset="notes", unit="record", digest="ef" * 32)
    reserve(ledger, 1)
    head = commit(ledger, 1, "12" * 32)
    again = opened(tmp_path)
    assert again.entries == ledger.entries == tuple(kept(tmp_path))
    assert [e.action for e in again.entries] == ["site.init", "data.register", "budget.reserve", "budget.commit"]
    assert again.head == head == ledger.head
    assert again.events("notes") == [EVENT]
    assert again.events("images") == []


def test_a_reservation_holds_the_event_and_no_epsilon_count_or_path(tmp_path: Path) -> None:
    reserve(begun(tmp_path), 7)
    line = json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[-1])
    assert line.keys() == {
        "seq", "prev", "time", "action", "dataset", "unit", "run_id", "job_sha256", "round", "event",
    }  # fmt: skip
    assert line["event"] == EVENT.to_dict()
    assert "epsilon" not in (tmp_path / "ledger.jsonl").read_text()
    assert str(tmp_path) not in (tmp_path / "ledger.jsonl").read_text()


def test_each_append_leaves_a_genuine_head_of_its_line_and_only_the_owner_may_read(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for number in range(3):
        head = ledger.append("site.init") if number == 0 else reserve(ledger, number)
        assert SignedHead.model_validate_json((tmp_path / "head.json").read_bytes()) == head
        assert head_is_genuine(head)
        assert (head.site, head.seq, head.sha256) == ("a", number + 1, kept(tmp_path)[-1].sha256)
    assert {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {
        "ledger.jsonl": 0o600,
        "head.json": 0o600,
    }


def test_a_round_is_reserved_as_often_as_it_was_begun_and_gives_one_update(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    assert (ledger.rounds("run", 1), ledger.committed("run", 1)) == ([], None)
    reserve(ledger, 1)
    reserve(ledger, 1)
    reserve(ledger, 1, run_id="another")
    assert [e.seq for e in ledger.rounds("run", 1)] == [2, 3]
    assert ledger.committed("run", 1) is None
    commit(ledger, 1, "12" * 32)
    assert ledger.committed("run", 1) == "12" * 32
    assert ledger.committed("another", 1) is None
    assert len(ledger.events("notes")) == 3


def test_a_late_process_cannot_commit_a_second_update_nor_one_that_was_never_reserved(tmp_path: Path) -> None:
    late, ledger = begun(tmp_path), opened(tmp_path)
    reserve(late, 1)
    reserve(ledger, 1)
    commit(ledger, 1, "12" * 32)
    for number, said in ((1, "gave its update already"), (2, "was never reserved")):
        with pytest.raises(RefusedError, match=said) as caught:
            commit(late, number, "34" * 32)
        assert (caught.value.code, caught.value.exit_code) == ("E-ROUND-DONE", 6)
    assert opened(tmp_path).committed("run", 1) == "12" * 32


def test_a_rule_that_refuses_leaves_the_ledger_as_it_was_and_usable(tmp_path: Path) -> None:
    ledger = begun(tmp_path, 1)
    before = (tmp_path / "ledger.jsonl").read_bytes()

    def no(entries: Sequence[Entry]) -> None:
        raise RefusedError("E-BUDGET", f"{len(reserved(entries))} are enough")

    with pytest.raises(RefusedError, match="1 are enough"):
        reserve(ledger, 2, rule=no)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    reserve(ledger, 2)


def test_a_field_that_is_no_json_writes_nothing(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    for value in (float("nan"), tmp_path):
        with pytest.raises((ValueError, TypeError)):
            ledger.append("job.received", x=value)
    assert len(kept(tmp_path)) == len(ledger.entries) == 1
    reserve(ledger, 1)


def test_a_new_ledger_takes_nothing_before_its_site(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="expected site"):
        reserve(opened(tmp_path), 1)
    with pytest.raises(StorageError, match="no entry yet"):
        _ = opened(tmp_path).head
    assert kept(tmp_path) == []


def test_time_only_informs_whatever_the_clock_does(tmp_path: Path) -> None:
    times = [datetime(2030, 1, 1, tzinfo=UTC) + timedelta(days=365 * y) for y in (0, 10, -10, 10, 0, 0, -29)]
    clock = iter(times)
    ledger = begun(tmp_path, 3, clock=lambda: next(clock))
    assert [e.time for e in ledger.entries] == [t.isoformat(timespec="seconds") for t in times]
    assert [e.seq for e in opened(tmp_path).entries] == [1, 2, 3, 4, 5, 6, 7]
    assert len(opened(tmp_path).events("notes")) == 3


# How fast


def test_ten_thousand_entries_open_and_an_append_reads_none_of_them(tmp_path: Path) -> None:
    head = begun(tmp_path).head
    last, lines = kept(tmp_path)[-1], []
    fields = {"dataset": "notes", "unit": "record", "run_id": "run", "job_sha256": JOB, "event": EVENT.to_dict()}
    for number in range(9_999):
        lines.append(next_line(last, "", "budget.reserve", {**fields, "round": number}))
        [last] = read_chain(lines[-1], last)
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b"".join(lines))
    (tmp_path / "head.json").write_text(sign_head(KEY, "a", last).model_dump_json())
    disk, start = CountingDisk(), time.perf_counter()
    ledger = opened(tmp_path, disk=disk)
    seconds = time.perf_counter() - start
    assert (len(ledger.entries), head.seq) == (10_000, 1)
    disk.asked.clear()
    start = time.perf_counter()
    for number in range(50):
        reserve(ledger, number, "fast")
    each = (time.perf_counter() - start) * 20
    print(f"\nledger: 10,000 entries open in {seconds:.2f} s, an append takes {each:.1f} ms")  # noqa: T201
    assert "read" not in disk.asked
    assert disk.asked.count("sync") == 150  # the line, the head, the folder


# Several writers

WRITER = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cotune.shared.keyfile import SigningKey
from cotune.client.ledger import Ledger
from cotune.shared.chain import reserved
from cotune.shared.errors import RefusedError
from cotune.shared.privacy.event import DpSgdEvent

folder, name, count, cap = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
ledger = Ledger.open(folder / "ledger.jsonl", "a", SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32)))))
print("ready", flush=True)
sys.stdin.readline()

def rule(entries):
    if sum(entry.action == "budget.reserve" for entry in entries) >= cap:
        raise RefusedError("E-BUDGET", "spent")

for number in range(1, count + 1):
    event = DpSgdEvent(sampling_probability=0.01, noise_multiplier=1.5, steps=number)
    try:
        ledger.reserve(dataset="notes", unit="record", run_id=name, job_sha256="cd" * 32, round_number=number,
                       event=event, rule=rule)
    except RefusedError:
        print("refused", flush=True)
    else:
        print(number, flush=True)
"""


def writer(folder: Path, name: str, count: int, cap: int = 1_000_000) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), name, str(count), str(cap)]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def test_a_thousand_appends_of_two_processes_lose_no_line_and_never_pass_a_cap(tmp_path: Path) -> None:
    begun(tmp_path)
    writers = {name: writer(tmp_path, name, 500, cap=900) for name in ("x", "y")}
    start = time.perf_counter()
    for each in writers.values():
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    said = {name: each.communicate()[0].split() for name, each in writers.items()}
    print(f"\nledger: 1,000 reservations of two processes in {time.perf_counter() - start:.1f} s")  # noqa: T201
    assert [each.returncode for each in writers.values()] == [0, 0]
    entries = opened(tmp_path).entries
    assert len(entries) == 901
    assert sum(words.count("refused") for words in said.values()) == 100
    for name, words in said.items():
        there = [event.steps for _, event in reserved(entries, run_id=name) if isinstance(event, DpSgdEvent)]
        assert there == [int(word) for word in words if word != "refused"]


def test_threads_of_one_process_may_share_a_ledger(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    threads = [threading.Thread(target=lambda: [reserve(ledger, n) for n in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept(tmp_path)) == len(ledger.entries) == 101


def test_a_killed_writer_leaves_every_reservation_it_was_told_of(tmp_path: Path) -> None:
    begun(tmp_path)
    chance, told, kills = np.random.default_rng(1), 0, 6
    for kill in range(kills):
        victim = writer(tmp_path, f"kill-{kill}", 100_000)
        assert victim.stdin is not None
        assert victim.stdout is not None
        victim.stdin.write("\n")
        victim.stdin.flush()
        time.sleep(chance.uniform(0.02, 0.15))
        victim.kill()
        said = len(victim.communicate()[0].splitlines())
        there = len(reserved(opened(tmp_path).entries, run_id=f"kill-{kill}"))
        assert said <= there <= said + 1
        told += said
    assert told > kills
    reserve(opened(tmp_path), 1)


# What a crash leaves


def test_a_torn_line_is_cut_off_and_said(tmp_path: Path) -> None:
    begun(tmp_path, 2)
    whole = (tmp_path / "ledger.jsonl").read_bytes()
    (tmp_path / "ledger.jsonl").write_bytes(whole + b'{"seq": 6, "prev"')
    ledger = opened(tmp_path)
    assert (ledger.entries[-1].action, ledger.entries[-1].fields) == ("ledger.repair", {"cut_bytes": 17})
    assert (tmp_path / "ledger.jsonl").read_bytes().startswith(whole)
    assert opened(tmp_path).entries == ledger.entries


def test_a_whole_line_that_no_head_covers_is_kept_and_signed(tmp_path: Path) -> None:
    ledger = begun(tmp_path, 2)
    old = (tmp_path / "head.json").read_bytes()
    reserve(ledger, 3)
    (tmp_path / "head.json").write_bytes(old)
    again = opened(tmp_path)
    assert again.entries == ledger.entries
    assert SignedHead.model_validate_json((tmp_path / "head.json").read_bytes()) == ledger.head


def test_a_head_that_was_not_finished_is_written_over_whatever_its_length(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    (tmp_path / ".head.json.tmp").write_bytes(b"x" * 5000)
    reserve(ledger, 1)
    assert opened(tmp_path).entries == ledger.entries


def test_a_ledger_that_another_process_mended_is_taken_in(tmp_path: Path) -> None:
    ledger = begun(tmp_path, 1)
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b'{"seq": 4')
    reserve(opened(tmp_path), 2)
    reserve(ledger, 3)
    assert [e.action for e in ledger.entries][-3:] == ["ledger.repair", "budget.reserve", "budget.reserve"]


def test_a_torn_line_of_another_process_is_mended_before_the_next_append(tmp_path: Path) -> None:
    ledger = begun(tmp_path, 1)
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b'{"seq": 4')
    reserve(ledger, 2)
    assert [e.action for e in kept(tmp_path)][-2:] == ["ledger.repair", "budget.reserve"]


@pytest.mark.parametrize(("lines", "torn"), [(0, b""), (0, b'{"seq"'), (1, b"")])
def test_a_head_may_be_missing_only_as_a_crash_at_the_first_entry_leaves_it(
    tmp_path: Path, lines: int, torn: bytes
) -> None:
    begun(tmp_path, 2)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]) + torn)
    (tmp_path / "head.json").unlink()
    ledger = opened(tmp_path)
    assert len(ledger.entries) == lines
    if lines == 0:
        ledger.append("site.init")
    assert opened(tmp_path).head.seq == 1


@pytest.mark.parametrize(("lines", "torn"), [(1, b'{"seq"'), (2, b""), (5, b"")])
def test_a_head_missing_otherwise_is_refused(tmp_path: Path, lines: int, torn: bytes) -> None:
    begun(tmp_path, 2)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]) + torn)
    (tmp_path / "head.json").unlink()
    assert refusal(tmp_path).code == "E-LEDGER-HEAD"


# What somebody changed


def test_300_changed_bytes_of_the_ledger_are_300_refusals(tmp_path: Path) -> None:
    begun(tmp_path, 10)
    path, chance = tmp_path / "ledger.jsonl", np.random.default_rng(3)
    content = path.read_bytes()
    codes: dict[str, int] = {}
    for _ in range(300):
        place, bits = chance.integers(len(content)), chance.integers(1, 256)
        path.write_bytes(content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :])
        error = refusal(tmp_path)
        if error.code == "E-LEDGER-CHAIN":  # the line itself, or the next, which no longer follows from it
            line = content[:place].count(b"\n") + 1
            assert f"line {line}:" in error.message or f"line {line + 1}:" in error.message
        codes[error.code] = codes.get(error.code, 0) + 1
        assert error.hint is not None
        assert "never an older one" in error.hint
    print(f"\nledger: 300 of 300 changed bytes refused {codes}")  # noqa: T201
    path.write_bytes(content)
    opened(tmp_path)


def test_every_changed_byte_of_the_head_is_refused_or_leaves_it_the_same_head(tmp_path: Path) -> None:
    head = begun(tmp_path, 1).head
    path = tmp_path / "head.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            assert opened(tmp_path).head == head
        except StorageError as error:
            assert error.code == "E-LEDGER-HEAD"
        else:
            assert chr(content[place]) in "\n"  # white space around the object


def test_a_tail_cut_off_at_any_line_or_inside_one_is_refused(tmp_path: Path) -> None:
    begun(tmp_path, 10)
    path = tmp_path / "ledger.jsonl"
    content = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for end in (0, *ends[:-1]):
        for size in (end, end + 1, end + 100):
            path.write_bytes(content[:size])
            assert refusal(tmp_path).code == "E-LEDGER-BEHIND"


@pytest.mark.parametrize("what", ["left out", "doubled", "moved"])
def test_lines_left_out_doubled_or_moved_are_refused_by_number(tmp_path: Path, what: str) -> None:
    begun(tmp_path, 5)
    path = tmp_path / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for place in range(len(lines) - 1):
        changed = {
            "left out": [*lines[:place], *lines[place + 1 :]],
            "doubled": [*lines[:place], lines[place], *lines[place:]],
            "moved": [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]],
        }[what]
        path.write_bytes(b"".join(changed))
        error = refusal(tmp_path)
        assert error.code == "E-LEDGER-CHAIN"
        assert f"line {place + (2 if what == 'doubled' else 1)}:" in error.message


def test_a_line_written_by_hand_under_the_same_number_is_a_fork(tmp_path: Path) -> None:
    begun(tmp_path, 2)
    path = tmp_path / "ledger.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"ab" * 32, b"12" * 32))
    assert refusal(tmp_path).code == "E-LEDGER-CHAIN"
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:-1], lines[-1].replace(b"ab" * 32, b"12" * 32)]))
    assert refusal(tmp_path).code == "E-LEDGER-FORK"


def copies_of(folder: Path, rounds: int) -> list[tuple[bytes, bytes]]:
    """Copies of the ledger and of its head, as a backup takes them, after each append."""
    ledger = begun(folder)
    taken: list[tuple[bytes, bytes]] = []
    for number in range(1, rounds + 1):
        for write in (reserve, commit):
            taken.append(((folder / "ledger.jsonl").read_bytes(), (folder / "head.json").read_bytes()))
            write(ledger, number)
    return taken


def test_an_old_copy_of_the_ledger_is_refused_at_each_of_100_points(tmp_path: Path) -> None:
    for content, _ in copies_of(tmp_path, 50):
        (tmp_path / "ledger.jsonl").write_bytes(content)
        error = refusal(tmp_path)
        assert error.code == "E-LEDGER-BEHIND"
        assert "an old copy was restored" in error.message


def test_an_old_copy_of_ledger_and_head_is_found_by_a_head_that_others_hold(tmp_path: Path) -> None:
    copies = copies_of(tmp_path, 50)
    held = opened(tmp_path).head
    for content, head in copies:
        (tmp_path / "ledger.jsonl").write_bytes(content)
        (tmp_path / "head.json").write_bytes(head)
        ledger = opened(tmp_path)
        with pytest.raises(StorageError) as caught:
            ledger.check(held)
        assert caught.value.code == "E-LEDGER-BEHIND"
        with pytest.raises(StorageError):  # and nothing is trained on it
            reserve(ledger, 99)


def test_two_ledgers_that_grew_from_one_are_told_apart(tmp_path: Path) -> None:
    begun(tmp_path, 1)
    copy = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    held = reserve(opened(tmp_path), 2)
    for name, content in copy.items():
        (tmp_path / name).write_bytes(content)
    ledger = opened(tmp_path)
    reserve(ledger, 2, run_id="hidden")
    with pytest.raises(StorageError) as caught:
        ledger.check(held)
    assert caught.value.code == "E-LEDGER-FORK"


def test_an_older_head_beside_the_whole_ledger_is_harmless(tmp_path: Path) -> None:
    copies = copies_of(tmp_path, 5)
    whole = kept(tmp_path)
    for _, head in copies:
        (tmp_path / "head.json").write_bytes(head)
        assert list(opened(tmp_path).entries) == whole


def test_a_ledger_and_head_that_are_both_gone_let_nothing_be_charged(tmp_path: Path) -> None:
    held = begun(tmp_path, 3).head
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(StorageError, match="expected site"):
        reserve(opened(tmp_path), 1)
    with pytest.raises(StorageError) as caught:
        opened(tmp_path).check(held)
    assert caught.value.code == "E-LEDGER-BEHIND"


def test_a_ledger_exchanged_while_it_is_open_is_found_at_the_next_append(tmp_path: Path) -> None:
    copies = copies_of(tmp_path, 3)
    ledger = opened(tmp_path)
    (tmp_path / "ledger.jsonl").write_bytes(copies[2][0])
    with pytest.raises(StorageError) as caught:
        reserve(ledger, 4)
    assert caught.value.code == "E-LEDGER-BEHIND"
    assert (tmp_path / "ledger.jsonl").read_bytes() == copies[2][0]


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"\xff", b"[" * 50_000, b'{"seq": 1}'])
def test_a_broken_head_is_refused(tmp_path: Path, content: bytes) -> None:
    begun(tmp_path, 1)
    (tmp_path / "head.json").write_bytes(content)
    assert refusal(tmp_path).code == "E-LEDGER-HEAD"


def test_a_head_of_another_key_or_site_is_refused_on_disk_and_from_outside(tmp_path: Path) -> None:
    ledger = begun(tmp_path, 1)
    last, own = ledger.entries[-1], ledger.head
    strangers = [
        sign_head(OTHER, "a", last),
        sign_head(KEY, "b", last),
        own.model_copy(update={"seq": 99}),
        own.model_copy(update={"signature": sign_head(OTHER, "a", last).signature}),
    ]
    for stranger in strangers:
        with pytest.raises(StorageError) as caught:
            ledger.check(stranger)
        assert caught.value.code == "E-LEDGER-HEAD"
        (tmp_path / "head.json").write_text(stranger.model_dump_json())
        assert refusal(tmp_path).code == "E-LEDGER-HEAD"
    (tmp_path / "head.json").write_text(own.model_dump_json())
    assert refusal(tmp_path, key=OTHER).code == "E-LEDGER-HEAD"
    assert refusal(tmp_path, site="b").code == "E-LEDGER-HEAD"
    reserve(ledger, 2)  # what a stranger sends does not stop the site


def test_a_genuine_head_of_any_age_is_agreed_with_also_one_that_another_process_signed(tmp_path: Path) -> None:
    ledger = begun(tmp_path)
    heads = [ledger.head, *(reserve(opened(tmp_path), number) for number in range(5))]
    for head in reversed(heads):
        ledger.check(head)


# What the disk does


def test_a_full_disk_refuses_before_training_and_for_good_and_loses_nothing(
    mount_disk: Callable[[int], Path],
) -> None:
    folder = mount_disk(64)
    ledger = begun(folder)
    returned = 0
    (folder / "filler").write_bytes(b"x" * 40_000)
    with pytest.raises(StorageError) as caught:
        for number in range(1000):
            reserve(ledger, number)
            returned += 1
    assert (caught.value.code, caught.value.exit_code) == ("E-LEDGER-STORAGE", 1)
    assert "No space left" in caught.value.message
    (folder / "filler").unlink()
    for ask in (lambda: ledger.entries, lambda: ledger.head, lambda: reserve(ledger, 1), lambda: ledger.events("x")):
        with pytest.raises(StorageError, match="failed before"):
            ask()
    assert returned <= len(opened(folder).events("notes")) <= returned + 1
    reserve(opened(folder), 1001)


def test_a_read_only_disk_is_refused_when_the_ledger_is_opened(mount_disk: Callable[[int], Path]) -> None:
    folder = mount_disk(64)
    begun(folder, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    error = refusal(folder)
    assert error.code == "E-LEDGER-STORAGE"
    assert "Read-only" in error.message
    assert error.hint is not None


def test_a_file_size_limit_is_a_short_write_and_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    code = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_ledger import opened, reserve
        from cotune.shared.errors import StorageError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        folder = Path({str(tmp_path)!r})
        ledger = opened(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "ledger.jsonl").stat().st_size + 700,) * 2)
        for number in range(10):
            try:
                reserve(ledger, number)
            except StorageError as error:
                sys.exit(f"{{error.code}} {{number}}")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    error, returned = done.stderr.split()
    assert error == "E-LEDGER-STORAGE"
    entries = opened(tmp_path).entries
    assert len(reserved(entries)) == int(returned)
    assert entries[-1].action == "ledger.repair"


def test_a_link_or_a_folder_in_the_ledgers_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "ledger.jsonl").symlink_to(tmp_path / "real")
    assert refusal(tmp_path).code == "E-LEDGER-STORAGE"
    (tmp_path / "ledger.jsonl").unlink()
    (tmp_path / "ledger.jsonl").mkdir()
    assert refusal(tmp_path).code == "E-LEDGER-STORAGE"
    assert refusal(tmp_path / "nowhere").code == "E-LEDGER-STORAGE"


def test_errors_name_no_path_since_they_may_be_answered_to_the_outside(tmp_path: Path) -> None:
    begun(tmp_path, 1)
    (tmp_path / "head.json").unlink()
    assert str(tmp_path) not in refusal(tmp_path).message
    assert os.sep not in refusal(tmp_path / "nowhere").message
