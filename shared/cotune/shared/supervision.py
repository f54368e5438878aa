"""Keeping programs running: started in order, restarted when they die, ended with all they started when we are told.

What must not happen is two of them: a lock on the home keeps a second supervisor out, and a child whose supervisor is
gone is ended by its tether.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil

from cotune.shared.children import STOP_S, Child, cause, end, end_strays, rotate, start
from cotune.shared.errors import CotuneError, JobError, StorageError, TimedOut
from cotune.shared.files import storage_errors, write_json
from cotune.shared.tether import adopt_strays

LOOK_S = 0.2
TICK_S = 1.0
CHECK_S = 5.0
SLOW_START_S = 180.0
HUNG_S = 45.0  # below the 60 s after which Flower takes a task for dead
CALM_S = 120.0
LONGEST_WAIT_S = 60.0

State = Literal["waiting", "starting", "running", "stopped"]


@dataclass
class _Kept:
    """A child and how it fares. Times are of the monotonic clock."""

    child: Child
    process: subprocess.Popen[bytes] | None = None
    state: State = "waiting"
    restarts: int = 0
    since: str = ""
    was_ready: bool = False
    wait_s: float = 1.0
    due: float = 0.0
    began: float = 0.0
    well: float = 0.0
    looked: float = field(default=float("-inf"))


def supervise(
    children: Sequence[Child],
    home: Path,
    *,
    on_tick: Callable[[], None] | None = None,
    say: Callable[[str], None],
) -> None:
    """Keep the children running until SIGTERM or SIGINT, then end them and all they started.

    `home/up.json` says at every change who runs, for `cotune ... status` and `down`.

    Args:
        children: In the order in which they are started; they are ended in the opposite one.
        home: Whose they are; only one supervisor may have it.
        on_tick: Done once a second, beside the children. An error in it is said and ends nothing; what it started is
            ended with the children.
        say: Gets a line for each change.

    Edge cases: when this process is killed, so are all children and all they ever started, by their tethers; when
    a tether is killed, what it leaves is ended before its child is started again; a full disk ends nothing.

    Raises:
        JobError: Another process supervises this home (E-UP-RUNNING).
        StorageError: The home cannot be written.
    """
    over = threading.Event()
    with _alone(home), _stopped_by_signals(over):
        adopt_strays()
        supervisor = _Supervisor([_Kept(child) for child in children], home, say)
        ticker = threading.Thread(target=_tick, args=(on_tick, over, supervisor.tell), daemon=True)
        try:
            supervisor.note()
            if on_tick:
                ticker.start()
            while not over.wait(LOOK_S):
                supervisor.look()
        finally:
            over.set()
            supervisor.stop()


def running(home: Path) -> dict[str, Any] | None:
    """What `up.json` says of a home that is being supervised now: {pid, started, children}; None if it is not."""
    if not _is_held(home):
        return None
    with contextlib.suppress(OSError, ValueError):
        return json.loads((home / "up.json").read_text(encoding="utf-8"))
    return {"pid": None, "started": None, "children": {}}


def stop_running(home: Path, timeout: float) -> bool:
    """Ask a home's supervisor to stop and wait until it has; False if there was none.

    Raises:
        TimedOut: It still runs (E-DOWN).
    """
    deadline = time.monotonic() + timeout
    asked: int | None = None
    while _is_held(home):
        found = running(home) or {}
        if found.get("pid") not in (asked, None) and _is_supervisor(found):
            asked = int(found["pid"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(asked, signal.SIGTERM)
        if time.monotonic() > deadline:
            raise TimedOut("E-DOWN", f"process {asked} still runs after {timeout:.0f} s", hint=f"kill -9 {asked}")
        time.sleep(LOOK_S)
    return asked is not None


class _Supervisor:
    def __init__(self, kept: Sequence[_Kept], home: Path, say: Callable[[str], None]) -> None:
        self._kept = kept
        self._home = home
        self._say = say
        self._started = _now()
        self._noted: str | None = None

    def look(self) -> None:
        """One look at each child: bury, start, ask."""
        for kept in self._kept:
            if kept.process and kept.process.poll() is not None:
                self._bury(kept)
            if kept.process:
                self._ask(kept)
                rotate(kept.child.log)
            elif kept.due <= time.monotonic():
                self._start(kept)
            if not kept.was_ready:
                break  # those after it wait
        self.note()

    def stop(self) -> None:
        """End every child: those first that lean on others."""
        for kept in reversed(self._kept):
            if kept.process:
                end(kept.process, STOP_S)
            kept.process = None
            kept.state, kept.since = "stopped", _now()
        end_strays(frozenset(), and_helpers=True)
        self.note()
        self.tell("stopped")

    def note(self) -> None:
        """Write `up.json`, if anything changed."""
        rows = {
            kept.child.name: {
                "pid": kept.process.pid if kept.process else None,
                "restarts": kept.restarts,
                "since": kept.since,
                "state": kept.state,
            }
            for kept in self._kept
        }
        content = {"pid": os.getpid(), "started": self._started, "children": rows}
        if (text := json.dumps(content)) != self._noted:
            try:
                write_json(self._home / "up.json", content)
                self._noted = text
            except StorageError as error:
                self.tell(error.message)

    def tell(self, line: str) -> None:
        """Say it, unless whoever listened is gone."""
        with contextlib.suppress(OSError, ValueError):
            self._say(line)

    def _start(self, kept: _Kept) -> None:
        try:
            kept.process = start(kept.child)
        except (OSError, KeyError) as error:
            self._delay(kept, f"could not be started ({error})")
            return
        kept.began = kept.well = time.monotonic()
        kept.looked = float("-inf")
        kept.state, kept.since = "starting", _now()

    def _ask(self, kept: _Kept) -> None:
        """Whether it does its work: often until it first does, then now and then."""
        now = time.monotonic()
        if kept.state == "running" and (not kept.child.ready or now - kept.looked < CHECK_S):
            return
        kept.looked = now
        if kept.child.ready is None or kept.child.ready():
            kept.well = now
            if kept.state == "starting":
                kept.state, kept.since, kept.was_ready = "running", _now(), True
                self.tell(f"{kept.child.name} runs")
        elif kept.process and now - kept.well > (HUNG_S if kept.state == "running" else SLOW_START_S):
            self.tell(f"{kept.child.name} has not answered for {now - kept.well:.0f} s and is ended")
            end(kept.process, 0.0)

    def _bury(self, kept: _Kept) -> None:
        assert kept.process is not None  # noqa: S101 - asked before
        end(kept.process, 0.0)
        code = kept.process.returncode
        kept.process = None
        end_strays(frozenset(other.process.pid for other in self._kept if other.process))
        if time.monotonic() - kept.began > CALM_S:
            kept.wait_s = 1.0
        self._delay(kept, f"ended ({cause(code)})")

    def _delay(self, kept: _Kept, what: str) -> None:
        kept.due = time.monotonic() + kept.wait_s
        kept.restarts += 1
        kept.state, kept.since = "waiting", _now()
        self.tell(f"{kept.child.name} {what}; again in {kept.wait_s:.0f} s; its words: {kept.child.log}")
        kept.wait_s = min(2 * kept.wait_s, LONGEST_WAIT_S)


def _tick(on_tick: Callable[[], None] | None, over: threading.Event, tell: Callable[[str], None]) -> None:
    while on_tick and not over.wait(TICK_S):
        try:
            on_tick()
        except CotuneError as error:
            tell(f"{error.code}  {error.message}")
        except Exception as error:  # noqa: BLE001 - a fault beside the children never ends them
            tell(f"{type(error).__name__} beside the children: this is a defect of cotune")


@contextlib.contextmanager
def _alone(home: Path) -> Generator[None]:
    """Hold the home. A moment's patience: whoever only asks whether it is held holds it for that moment."""
    with storage_errors(home / "up.lock"):
        descriptor = os.open(home / "up.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + 1.0
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    pid = (running(home) or {}).get("pid")
                    what = f"{home} is being looked after by process {pid or 'of another user'} already"
                    raise JobError("E-UP-RUNNING", what, hint="end that one first") from None
                time.sleep(LOOK_S)
        yield
    finally:
        os.close(descriptor)


def _is_held(home: Path) -> bool:
    try:
        descriptor = os.open(home / "up.lock", os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _is_supervisor(found: Mapping[str, Any]) -> bool:
    """Whether the process of `up.json` is the one that wrote it, not a later one with its number."""
    try:
        began = psutil.Process(found["pid"]).create_time()
        return began <= datetime.fromisoformat(found["started"]).timestamp() + 1.0
    except (psutil.NoSuchProcess, ValueError, TypeError):
        return False


@contextlib.contextmanager
def _stopped_by_signals(over: threading.Event) -> Generator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda _number, _frame: over.set())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
