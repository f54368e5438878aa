"""Runs a command; ends it and every process it ever started once our starter is gone or says so.

Flower and Ray start sessions of their own and outlive each other, so neither a process group nor a signal reaches all.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
import threading

import psutil

PR_SET_CHILD_SUBREAPER = 36
LOOK_S = 0.5


def main() -> int:
    """Run `sys.argv[1:]` until it ends or stdin closes; then kill all descendants."""
    if sys.platform == "linux":  # whoever loses its parent below here becomes our child, so none is missed
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), over.set()), daemon=True).start()
    while child.poll() is None and not over.wait(LOOK_S):
        pass
    while family := psutil.Process().children(recursive=True):
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=LOOK_S)
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
