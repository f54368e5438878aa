"""Programs that are kept running: started in order, restarted, never twice, and gone with whoever keeps them."""

import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cotune.shared.children import LOG_BYTES, Child, cause, end, rotate, start
from cotune.shared.errors import JobError
from cotune.shared.supervision import running, stop_running, supervise

PATIENCE_S = 30.0
SCRIPT = Path(__file__).with_name("supervised.py")


def soon(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < deadline, "did not come to be"
        time.sleep(0.05)
    return found


def family(home: Path) -> dict[str, psutil.Process]:
    """What runs of a home's children, by the last digits of what it does: first, second, grandchild, tethers."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get("OF_TEST") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                words = " ".join(process.cmdline())
                names = {"8888": "first", "9999": "second", "7777": "grandchild", "6666": "helper"}
                name = next((name for digits, name in names.items() if digits in words), "starting")
                found[f"tether of {name}" if "cotune.shared.tether" in words else name] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Start]:
    begun: list[subprocess.Popen[str]] = []

    def begin(*more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), str(tmp_path), *more]
        begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        soon(lambda: state(tmp_path, "second") == "running" and len(family(tmp_path)) >= 5)
        return begun[-1]

    yield begin
    for process in begun:
        with process:
            process.kill()


def state(home: Path, name: str) -> str | None:
    return (running(home) or {"children": {}})["children"].get(name, {}).get("state")


def test_children_run_in_order_and_end_with_all_they_started(tmp_path: Path, supervised: Start) -> None:
    (tmp_path / "wants help").touch()
    process = supervised()
    found = running(tmp_path)
    assert found is not None
    assert found["pid"] == process.pid
    kept = {"first", "second", "grandchild", "tether of first", "tether of second"}
    soon(lambda: set(family(tmp_path)) == {*kept, "helper"})
    assert (tmp_path / "logs" / "first.log").read_text() == "first says hello\n"
    assert stop_running(tmp_path, PATIENCE_S)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert not family(tmp_path)
    assert running(tmp_path) is None
    assert not stop_running(tmp_path, PATIENCE_S)
    assert out.index("first runs") < out.index("second runs") < out.index("stopped")
    assert "ValueError beside the children" in out
    assert "never to be shown" not in out


@pytest.mark.parametrize("victim", ["first", "tether of first"])
def test_a_killed_child_is_restarted_and_its_family_is_gone(tmp_path: Path, supervised: Start, victim: str) -> None:
    supervised()
    before = family(tmp_path)
    before[victim].kill()
    soon(lambda: (running(tmp_path) or {})["children"]["first"]["restarts"] == 1)
    soon(lambda: state(tmp_path, "first") == "running")
    soon(lambda: len(family(tmp_path)) == 5)
    after = family(tmp_path)
    for name in ("first", "grandchild", "tether of first"):
        assert not before[name].is_running() or before[name].status() == psutil.STATUS_ZOMBIE
        assert after[name].pid != before[name].pid
    assert after["second"] == before["second"]


def test_nothing_is_left_when_the_supervisor_is_killed(tmp_path: Path, supervised: Start) -> None:
    process = supervised()
    process.kill()
    soon(lambda: not family(tmp_path))
    assert running(tmp_path) is None
    supervised()


def test_a_second_supervisor_is_refused_and_told_who_is_first(tmp_path: Path, supervised: Start) -> None:
    process = supervised()
    with pytest.raises(JobError) as caught:
        supervise([], tmp_path, say=print)
    assert caught.value.code == "E-UP-RUNNING"
    assert str(process.pid) in caught.value.message
    assert state(tmp_path, "first") == "running"


@pytest.mark.slow
def test_a_child_that_answers_no_more_is_ended_and_started_again(tmp_path: Path, supervised: Start) -> None:
    supervised("0.5")
    before = family(tmp_path)["first"]
    (tmp_path / "hung").touch()
    soon(lambda: (running(tmp_path) or {})["children"]["first"]["restarts"] == 1)
    (tmp_path / "hung").unlink()
    soon(lambda: state(tmp_path, "first") == "running" and len(family(tmp_path)) == 5)
    assert family(tmp_path)["first"].pid != before.pid


NEVER_WORKS = """
import os, sys
from pathlib import Path
from cotune.shared.children import Child
from cotune.shared.supervision import supervise
home = Path(sys.argv[1])
child = Child("bad", ("no-such-program",), home / "bad.log", os.environ)
supervise([child], home, say=lambda line: print(line, flush=True))
"""


def test_a_child_that_never_works_is_tried_ever_more_slowly(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NEVER_WORKS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ends = (line for line in process.stdout if "again in" in line)
        waits = [next(ends).partition("again in ")[2][:3] for _ in range(2)]
        process.terminate()
    assert waits == ["1 s", "2 s"]
    assert "no-such-program" in (tmp_path / "bad.log").read_text()


def test_a_log_is_kept_small_while_it_is_written_to(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with log.open("ab") as writer:
        writer.write(b"x" * (LOG_BYTES + 1))
        writer.flush()
        rotate(log)
        writer.write(b"after\n")
    assert log.read_bytes() == b"after\n"
    assert (tmp_path / "a.log.1").stat().st_size == LOG_BYTES + 1
    rotate(log)
    assert log.read_bytes() == b"after\n"


def test_a_child_gets_the_time_to_end_well(tmp_path: Path) -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        "print('up', flush=True); signal.pause()"
    )
    process = start(Child("a", (sys.executable, "-c", code), tmp_path / "a.log", os.environ))
    soon((tmp_path / "a.log").read_text)
    end(process, PATIENCE_S)
    assert process.returncode == 7


def test_the_cause_of_an_end_is_named() -> None:
    assert (cause(1), cause(137), cause(-9)) == ("exit code 1", "killed by SIGKILL", "killed by SIGKILL")


def _others_may_run_python() -> bool:
    try:
        return (
            subprocess.run([sys.executable, "-c", "import cotune.shared"], user="nobody", check=False).returncode == 0
        )
    except (PermissionError, KeyError):
        return False


@pytest.mark.skipif(not _others_may_run_python(), reason="we may not become nobody, or nobody may not run our Python")
def test_a_child_may_run_as_another_user_without_our_groups(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    code = "import os; print(os.getuid(), os.getgid(), os.getgroups())"
    child = Child("a", (sys.executable, "-c", code), tmp_path / "a.log", os.environ, user="nobody", cwd=Path("/"))
    process = start(child)
    process.wait()
    end(process, 0.0)
    assert (tmp_path / "a.log").read_text() == f"{nobody.pw_uid} {nobody.pw_gid} []\n"
