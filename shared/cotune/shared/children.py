"""Programs that run below us: each in a tether, which ends it and all it started when we are gone or say so."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

STOP_S = 10.0
LOG_BYTES = 10_000_000


@dataclass(frozen=True)
class Child:
    """A program to keep running.

    Attributes:
        name: What it is called in `up.json` and in messages.
        command: Program and arguments.
        log: Where its words go; the file before the last 10 MB is kept as `NAME.log.1`.
        env: Its whole environment.
        ready: Whether it does its work now; the children after it wait for that once, and one that was ready and
            has not been for 45 seconds is ended and started again. Without it, a child is ready when it is started.
        user: The user it runs as, if not ours.
        cwd: The folder it runs in.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    env: Mapping[str, str]
    ready: Callable[[], bool] | None = None
    user: str | None = None
    cwd: Path | None = None


def start(child: Child) -> subprocess.Popen[bytes]:
    """The child below a tether, which ends it and its family when our end of the pipe is gone."""
    group, extra_groups = (pwd.getpwnam(child.user).pw_gid, []) if child.user else (None, None)
    child.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with child.log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "cotune.shared.tether", *child.command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=child.cwd,
            env=dict(child.env),
            start_new_session=True,
            user=child.user,
            group=group,
            extra_groups=extra_groups,
        )


def end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End a tether's child, asked first if there is any grace; then the tether ends what is left."""
    assert process.stdin is not None  # noqa: S101 - made with a pipe
    if grace_s:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.terminate()
            process.wait(grace_s)
    process.stdin.close()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_strays(tethers: frozenset[int], *, and_helpers: bool = False) -> None:
    """End what a killed tether left to us.

    Args:
        tethers: Processes of ours that stay.
        and_helpers: Also what this process started itself, which shares its session.
    """
    while family := [member for child in _strays(tethers, and_helpers) for member in (child, *_below(child))]:
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=STOP_S)


def _strays(tethers: frozenset[int], and_helpers: bool) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        with contextlib.suppress(ProcessLookupError):
            if child.pid not in tethers and (and_helpers or os.getsid(child.pid) != os.getsid(0)):
                found.append(child)
    return found


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def cause(code: int) -> str:
    """Why a tether's child ended, from its exit code."""
    number = -code if code < 0 else code - 128
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(number).name}"
    return f"exit code {code}"


def rotate(log: Path) -> None:
    """Keep a log small while it is written to: the writer appends, so an emptied file goes on from its start."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > LOG_BYTES:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)
