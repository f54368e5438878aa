"""Every state that a loss of power, a kill or a failing disk can leave of a ledger, made in memory and opened again.

The simulated disk keeps a log of system calls. A crash may come before any of them. What was written before an
fsync of its file, or renamed before one of its folder, is there; of the rest any part may be: none, all, later ones
without earlier ones, a write torn at a byte, with zeros where it was not finished, or without one of its sectors.
"""

import errno
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cotune.client.disk import LOCAL_DISK, Disk
from cotune.client.ledger import Ledger
from cotune.shared.chain import SignedHead, read_chain, require_agreement, require_own, reserved
from cotune.shared.errors import StorageError
from cotune.shared.keyfile import SigningKey
from cotune.shared.privacy.event import DpSgdEvent, Event

FOLDER = Path("/home-of-a-site")
KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
SECTOR = 512
Files = dict[str, bytes]
Operation = tuple[Any, ...]
Fault = Literal[
    "no fsync at all",
    "line without fsync",
    "head before the line",
    "head without fsync",
    "folder without fsync",
    "nothing written twice",
]


class Killed(BaseException):
    """The process ends here."""


def perform(operation: Operation, names: dict[str, int], content: dict[int, bytes]) -> None:
    """What an operation does, to what is in memory or to what is on the disk."""
    match operation:
        case ("create", name, file):
            names[name] = file
        case ("rename", source, target, file):
            names.pop(source, None)
            names[target] = file
        case ("write", file, start, data):
            old = content.get(file, b"")
            content[file] = old[:start].ljust(start, b"\0") + data + old[start + len(data) :]
        case ("extend", file, size):
            content[file] = content.get(file, b"").ljust(size, b"\0")
        case ("cut", file, size):
            content[file] = content.get(file, b"")[:size]
        case _:
            pass


@dataclass
class SimulatedDisk:
    """A disk that remembers each change, and may kill or fail its process at one of them, or keep no promise."""

    files: Files = field(default_factory=dict)
    fault: Fault | None = None
    kill_at: int = -1
    fail_at: int = -1
    failure: str = "EIO"

    def __post_init__(self) -> None:
        self.names = {name: file for file, name in enumerate(self.files, start=1)}
        self.content = {file: self.files[name] for name, file in self.names.items()}
        self.log: list[Operation] = []
        self.calls = 0
        self.descriptors: dict[int, int] = {}
        self.late: list[Operation] = []

    def now(self) -> Files:
        return {name: self.content.get(file, b"") for name, file in self.names.items()}

    def open(self, path: Path, flags: int) -> int:
        self._call()
        if path != FOLDER and path.name not in self.names:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory")
            self._change("create", path.name, len(self.names) + len(self.content) + 1)
        file = 0 if path == FOLDER else self.names[path.name]
        if flags & os.O_TRUNC:
            self._change("cut", file, 0)
        self.descriptors[len(self.descriptors)] = file
        return len(self.descriptors) - 1

    def close(self, file: int) -> None:
        self._call()

    def lock(self, file: int) -> None:
        self._call()

    def size(self, file: int) -> int:
        self._call()
        return len(self.content.get(self.descriptors[file], b""))

    def read(self, file: int, start: int) -> bytes:
        self._call()
        return self.content.get(self.descriptors[file], b"")[start:]

    def write(self, file: int, content: bytes, start: int) -> int:
        short = self._call(short=True)
        there, taken = self.descriptors[file], content[: len(content) // 2] if short else content
        known = self.content.get(there, b"")[start : start + len(taken)] == taken
        if not (known and self.fault == "nothing written twice"):
            self._change("write", there, start, taken)
        return len(taken)

    def cut(self, file: int, size: int) -> None:
        self._call()
        self._change("cut", self.descriptors[file], size)

    def sync(self, file: int) -> None:
        there = self.descriptors[file]
        self._call(syncing=there)
        ledger, folder = there == self.names.get("ledger.jsonl"), there == 0
        ignored = {
            "no fsync at all": True,
            "line without fsync": ledger,
            "head before the line": ledger,
            "head without fsync": not ledger and not folder,
            "folder without fsync": folder,
        }
        if self.fault == "head before the line" and ledger:
            self.late.append(("sync", there))
        if not (self.fault and ignored.get(self.fault)):
            self._change("sync", there)
        if folder:
            self.log += self.late
            self.late.clear()

    def rename(self, source: Path, target: Path) -> None:
        self._call()
        self._change("rename", source.name, target.name, self.names[source.name])

    def _call(self, syncing: int | None = None, short: bool = False) -> bool:
        self.calls += 1
        if self.calls - 1 == self.kill_at:
            raise Killed
        if self.calls - 1 != self.fail_at or (self.failure == "short" and not short):
            return False
        if self.failure == "short":
            return True
        if syncing is not None:
            self.log.append(("lost", syncing))
        raise OSError(getattr(errno, self.failure), os.strerror(getattr(errno, self.failure)))

    def _change(self, *operation: Any) -> None:
        self.log.append(operation)
        perform(operation, self.names, self.content)


# What a crash can leave


def chosen(operations: Sequence[Operation]) -> Iterator[tuple[Operation, ...]]:
    """Which of several operations reached the disk: any, or for many all up to one, or all but one."""
    count = len(operations)
    if count <= 4:
        for size in range(count + 1):
            yield from itertools.combinations(operations, size)
        return
    for place in range(count + 1):
        yield tuple(operations[:place])
        yield (*operations[:place], *operations[place + 1 :])


def torn(operation: Operation, step: int) -> Iterator[tuple[Operation, ...]]:
    """The parts of one write that can have reached the disk."""
    _, file, start, data = operation
    end = start + len(data)
    borders = range(start - start % SECTOR + SECTOR, end, SECTOR)
    places = {1, len(data) - 1, *range(step, len(data), step)}
    places |= {border - start + near for border in borders for near in (-1, 0, 1)}
    for place in sorted(p for p in places if 0 < p < len(data)):
        part = ("write", file, start, data[:place])
        yield (part,)
        yield (part, ("extend", file, end))
    yield (("extend", file, end),)
    for lost in range(start - start % SECTOR, end, SECTOR):
        before, after = max(lost - start, 0), min(lost - start + SECTOR, len(data))
        yield (("write", file, start, data[:before]), ("write", file, start + after, data[after:]))


def contents(base: bytes, operations: Sequence[Operation], step: int) -> list[bytes]:
    """What one file can hold after a crash."""
    histories = list(chosen(operations))
    for place, operation in enumerate(operations):
        if operation[0] == "write":
            for parts in torn(operation, step):
                histories.append((*operations[:place], *parts))
                histories.append((*operations[:place], *parts, *operations[place + 1 :]))
    held: set[bytes] = set()
    for history in histories:
        content = {0: base}
        for operation in history:
            perform((operation[0], 0, *operation[2:]), {}, content)
        held.add(content[0])
    return sorted(held)


Told = tuple[tuple[SignedHead, Event | None], ...]


def crash_states(disk: SimulatedDisk, told: Told = (), since: int = 0, step: int = 16) -> Iterator[tuple[Files, Told]]:
    """Every state a loss of power before each operation can leave, with what the ledger had told by then."""
    start = SimulatedDisk(disk.files)
    names, content, pending = start.names, start.content, list[Operation]()
    for number, operation in enumerate([*disk.log, ("end",)]):
        if number >= since:
            yield from ((files, told) for files in _survivors(names, content, pending, step))
        match operation:
            case ("sync", 0):
                for done in [p for p in pending if p[0] in ("create", "rename")]:
                    perform(done, names, content)
                pending = [p for p in pending if p[0] not in ("create", "rename")]
            case ("sync", file):
                for done in [p for p in pending if p[0] in ("write", "cut") and p[1] == file]:
                    perform(done, names, content)
                pending = [p for p in pending if p[0] not in ("write", "cut") or p[1] != file]
            case ("lost", file):  # after a failed fsync nobody writes these pages again
                pending = [p for p in pending if p[0] not in ("write", "cut") or p[1] != file]
            case ("told", head, event):
                told = (*told, (head, event))
            case _:
                pending.append(operation)


def _survivors(
    names: dict[str, int], content: dict[int, bytes], pending: list[Operation], step: int
) -> Iterator[Files]:
    for moves in chosen([p for p in pending if p[0] in ("create", "rename")]):
        left = dict(names)
        for move in moves:
            perform(move, left, {})
        held = [
            contents(content.get(file, b""), [p for p in pending if p[0] in ("write", "cut") and p[1] == file], step)
            for file in left.values()
        ]
        for choice in itertools.product(*held):
            yield dict(zip(left, choice, strict=True))


def distinct(states: Iterator[tuple[Files, Told]]) -> list[tuple[Files, Told]]:
    """Each content of ledger and head once, with the most that was told before it."""
    found: dict[tuple[bytes | None, bytes | None], tuple[Files, Told]] = {}
    for files, told in states:
        key = files.get("ledger.jsonl"), files.get("head.json")
        if key not in found or len(told) > len(found[key][1]):
            found[key] = files, told
    return list(found.values())


# A site's life


def opened(disk: Disk, folder: Path = FOLDER) -> Ledger:
    return Ledger.open(folder / "ledger.jsonl", "a", KEY, disk, lambda: datetime(2030, 1, 1, tzinfo=UTC))


Step = Callable[[Ledger], tuple[SignedHead, Event | None]]


def reserving(number: int, run_id: str = "run") -> Step:
    event = DpSgdEvent(sampling_probability=0.01, noise_multiplier=1 + number / 100, steps=10)

    def step(ledger: Ledger) -> tuple[SignedHead, Event | None]:
        head = ledger.reserve(
            dataset="notes", unit="record", run_id=run_id, job_sha256="cd" * 32, round_number=number, event=event
        )
        return head, event

    return step


def history(rounds: int) -> list[Step]:
    """What a site writes down from its beginning through some rounds."""
    steps: list[Step] = [
        lambda ledger: (ledger.append("site.init", name="a", public_key=KEY.public), None),
        lambda ledger: (ledger.append("data.register", dataset="notes", unit="record", digest="ef" * 32), None),
        lambda ledger: (ledger.append("policy.change", sha256="01" * 32), None),
        lambda ledger: (ledger.append("job.approved", job_sha256="cd" * 32, rule="x" * 700), None),
    ]
    for number in range(1, rounds + 1):
        steps.append(reserving(number))
        steps.append(
            lambda ledger, number=number: (
                ledger.commit(run_id="run", round_number=number, update_sha256="ab" * 32),
                None,
            )
        )
    return [*steps, lambda ledger: (ledger.append("policy.change", sha256="02" * 32), None)]


def live(disk: SimulatedDisk, steps: Sequence[Step]) -> None:
    """Open the ledger and go through the steps; the log notes what each told its caller."""
    ledger = opened(disk)
    for step in steps:
        disk.log.append(("told", *step(ledger)))


def told_by(disk: SimulatedDisk) -> Told:
    return tuple(operation[1:] for operation in disk.log if operation[0] == "told")


def problem(files: Files, told: Told, crashes: int) -> str | None:
    """What is wrong after a restart: the ledger refuses, forgets, or holds more than one entry too many a crash."""
    disk = SimulatedDisk(files)
    try:
        ledger = opened(disk)
    except StorageError as error:
        return f"refused: {error.code}"
    entries = read_chain(disk.now()["ledger.jsonl"])
    assert tuple(entries) == ledger.entries
    hashes = {entry.seq: entry.sha256 for entry in entries}
    events = {entry.seq: event for entry, event in reserved(entries)}
    for head, event in told:
        if hashes.get(head.seq) != head.sha256 or events.pop(head.seq, None) != event:
            return "under-count"
    if len(events) > crashes:
        return "over-count"
    return goes_on(disk, ledger) if entries else None


def goes_on(disk: SimulatedDisk, ledger: Ledger) -> str | None:
    """After a restart the head is that of the last line, and the next entry is kept like any other."""
    head = SignedHead.model_validate_json(disk.now()["head.json"])
    require_own(head, "a", KEY.public)
    require_agreement(head, ledger.entries)
    if head.seq != len(ledger.entries):
        return "head behind"
    reserving(99, "next")(ledger)
    return None if opened(SimulatedDisk(disk.now())).entries == ledger.entries else "lost after the restart"


def problems(states: Sequence[tuple[Files, Told]], crashes: int = 1) -> list[str]:
    return [found for files, told in states if (found := problem(files, told, crashes))]


def enumerated(rounds: int, step: int, every: int) -> tuple[int, int]:
    """Check all states of a life, and those of every so many a restart's own crashes; gives how many there were."""
    start, disk = time.perf_counter(), SimulatedDisk()
    live(disk, history(rounds))
    states = distinct(crash_states(disk, step=step))
    assert problems(states) == []
    again: list[tuple[Files, Told]] = []
    for files, told in states[::every]:
        restarted = SimulatedDisk(files)
        opened(restarted)
        again += crash_states(restarted, told, step=4 * step)
    again = distinct(iter(again))
    assert problems(again) == []
    counts = {kind: sum(o[0] == kind for o in disk.log) for kind in ("write", "sync", "rename", "told")}
    print(  # noqa: T201
        f"\nledger: {counts['told']} entries ({counts['write']} writes, {counts['sync']} fsyncs, {counts['rename']}"
        f" renames): {len(states)} distinct states after a loss of power, {len(again)} after one during the"
        f" restart; 0 refused, 0 under-counts, at most one entry too many; {time.perf_counter() - start:.1f} s"
    )
    return len(states), len(again)


def test_no_loss_of_power_makes_the_ledger_hold_less_than_was_told() -> None:
    states, again = enumerated(rounds=20, step=16, every=40)
    assert states >= 2000
    assert again >= 500


@pytest.mark.slow
def test_no_loss_of_power_at_any_byte_makes_the_ledger_hold_less_than_was_told() -> None:
    states, again = enumerated(rounds=20, step=1, every=100)
    assert states >= 20_000
    assert again >= 1000


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("no fsync at all", "under-count"),
        ("line without fsync", "refused: E-LEDGER-BEHIND"),
        ("head before the line", "refused: E-LEDGER-BEHIND"),
        ("head without fsync", "refused: E-LEDGER-HEAD"),
        ("folder without fsync", "refused: E-LEDGER-HEAD"),
    ],
)
def test_the_enumeration_finds_a_ledger_that_keeps_the_order_badly(fault: Fault, found: str) -> None:
    disk = SimulatedDisk(fault=fault)
    live(disk, history(1))
    states = distinct(crash_states(disk, step=1000))
    assert any(problem(files, told, crashes=1) == found for files, told in states)


def test_a_process_killed_anywhere_and_then_a_loss_of_power_lose_nothing_that_was_told() -> None:
    steps = history(2)
    count, kill_at = 0, -1
    while True:
        kill_at += 1
        disk = SimulatedDisk(kill_at=kill_at)
        try:
            live(disk, steps)
            break
        except Killed:
            killed = len(disk.log)
        ledger = opened(disk)  # what the dead process wrote is in memory, and perhaps not on the disk
        if ledger.entries:
            disk.log.append(("told", *reserving(9, "next")(ledger)))
        states = distinct(crash_states(disk, since=killed, step=100))
        assert problems(states, crashes=2) == [], kill_at
        count += len(states)
    print(f"\nledger: {kill_at} kills, then {count} states after a loss of power: 0 refused, 0 under-counts")  # noqa: T201
    assert count >= 1000


def fail_everywhere(failure: str, fault: Fault | None = None) -> tuple[int, list[str]]:
    """Let each call to the disk fail once, start again on the same machine, then lose power; gives what went wrong."""
    steps, fail_at, found = history(2), -1, list[str]()
    while True:
        fail_at += 1
        disk = SimulatedDisk(fault=fault, fail_at=fail_at, failure=failure)
        ledger: Ledger | None = None
        try:
            ledger = opened(disk)
            for step in steps:
                disk.log.append(("told", *step(ledger)))
        except StorageError as error:
            assert error.code == "E-LEDGER-STORAGE"
        if disk.calls <= fail_at:
            return fail_at, found
        failed = len(disk.log)
        if ledger and len(told_by(disk)) < len(steps):
            for step in (steps[-1], reserving(8)):
                with pytest.raises(StorageError, match="failed before"):
                    step(ledger)
            assert len(disk.log) == failed  # and it left the disk alone
        restarted = opened(disk)
        if restarted.entries:
            disk.log.append(("told", *reserving(9, "next")(restarted)))
        states = distinct(crash_states(disk, since=failed, step=200))
        found += problems(states, crashes=2)


@pytest.mark.parametrize("failure", ["EIO", "ENOSPC", "short"])
def test_a_disk_that_fails_anywhere_ends_the_ledger_and_loses_nothing_that_was_told(failure: str) -> None:
    calls, found = fail_everywhere(failure)
    assert calls > 100
    assert found == []


def test_a_line_whose_fsync_failed_is_written_again_before_a_head_names_it() -> None:
    """Else it may be in memory only, and the next process, which sees it there, would sign what no disk holds."""
    assert "refused: E-LEDGER-BEHIND" in fail_everywhere("EIO", "nothing written twice")[1]


def test_the_simulated_disk_and_the_real_one_hold_the_same_bytes(tmp_path: Path) -> None:
    simulated = SimulatedDisk()
    live(simulated, history(3))
    ledger = opened(LOCAL_DISK, tmp_path)
    for step in history(3):
        step(ledger)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == simulated.now()
