"""A supervisor of two small programs, for tests: `python supervised.py HOME [HUNG_S]`.

The first daemonises a grandchild, says it is ready by a file, and stops being ready when the file `hung` is there.
"""

import os
import subprocess
import sys
from pathlib import Path

from cotune.shared import supervision
from cotune.shared.children import Child
from cotune.shared.supervision import supervise

FIRST = """
import os, pathlib, subprocess, sys, time
home = pathlib.Path(sys.argv[1])
if os.fork() == 0:
    os.setsid()
    os.execvp("sleep", ["sleep", "7777"])
(home / f"ready-{os.getpid()}").touch()
print("first says hello", flush=True)
time.sleep(8888)
"""
SECOND = "import os, pathlib, sys, time; assert list(pathlib.Path(sys.argv[1]).glob('ready-*')); time.sleep(9999)"

home = Path(sys.argv[1])
if len(sys.argv) > 2:
    supervision.HUNG_S = supervision.CHECK_S = float(sys.argv[2])


def fail() -> None:
    if (home / "wants help").exists() and not (home / "ticked").exists():
        subprocess.Popen(["sleep", "6666"], env={**os.environ, "OF_TEST": str(home)})
    (home / "ticked").touch()
    raise ValueError("never to be shown")


def child(name: str, code: str, **more: object) -> Child:
    command = (sys.executable, "-c", code, str(home))
    return Child(name, command, home / "logs" / f"{name}.log", {**os.environ, "OF_TEST": str(home)}, **more)  # type: ignore[arg-type]


def is_ready() -> bool:
    return any(home.glob("ready-*")) and not (home / "hung").exists()


supervise(
    [child("first", FIRST, ready=is_ready), child("second", SECOND)],
    home,
    on_tick=fail,
    say=lambda line: sys.stdout.write(line + "\n"),
)
