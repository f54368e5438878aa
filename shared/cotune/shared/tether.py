"""Runs a command; ends it and every process it ever started once our starter is gone or says so.

Flower and Ray start sessions of their own and outlive each other, so neither a process group nor a signal reaches all.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

import psutil

PR_SET_CHILD_SUBREAPER = 36
LOOK_S = 0.5


def adopt_strays() -> None:
    """From now on whatever loses its parent below us becomes our child, so that none is missed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main() -> int:
    """Run `sys.argv[1:]` until it ends or stdin closes; then kill all descendants. SIGTERM is passed on to it."""
    adopt_strays()
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda _number, _frame: child.terminate())
    over = threading.Event()
    threading.Thread(target=lambda: (_await_close(), over.set()), daemon=True).start()
    while child.poll() is None and not over.wait(LOOK_S):
        _bury_strays(child.pid)
    while family := psutil.Process().children(recursive=True):
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=LOOK_S)
    code = child.wait()
    return code if code >= 0 else 128 - code  # as a shell says it


def _await_close() -> None:
    while os.read(0, 4096):  # not through `sys.stdin`, whose lock would be held when we end
        pass


def _bury_strays(own: int) -> None:
    """Take note of adopted processes that ended; the exit code of our own child is left to be asked for."""
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, look)) and ended.si_pid != own:
            os.waitpid(ended.si_pid, 0)


if __name__ == "__main__":
    sys.exit(main())
