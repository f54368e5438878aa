"""Running cells: one after the other in this process, or several at once, each in a process with a base of its own."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from cotune.shared.errors import INTERNAL_EXIT_CODE, CotuneError, RunFailed, ended
from cotune.shared.runs import RunFolder

ORPHAN_S = 60.0  # a process of a killed comparison ends within seconds
FAULTS_OF_THE_MACHINE = ("E-STORAGE", "E-RUN-HELD", "E-INTERNAL")


@dataclass(frozen=True)
class Task:
    """A cell to be run.

    Attributes:
        name: The cell's.
        run: Its run folder.
        kept: See `run_inline`.
    """

    name: str
    run: Path
    kept: Path


Done = tuple[str, float, CotuneError | None]  # the cell's name, its seconds in this process, why it failed


def run_tasks(tasks: Sequence[Task], processes: int, log: Path) -> Generator[Done]:
    """Run cells and give each when it is done; with several processes in the order in which they end.

    Args:
        tasks: The cells.
        processes: How many at once.
        log: What the processes say goes there.

    Raises:
        CotuneError: This machine has a fault. What was finished is kept, the other cells can go on.
    """
    if processes == 1:
        for task in tasks:
            yield _judged(task.name, *_attempt(task))
        return
    workers = [_Worker(log) for _ in range(min(processes, len(tasks)))]
    free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def ask(task: Task) -> Done:
        worker = free.get()
        try:
            return task.name, *worker.ask(task)
        finally:
            free.put(worker)

    threads = ThreadPoolExecutor(max(1, len(workers)))
    try:
        for future in as_completed([threads.submit(ask, task) for task in tasks]):
            yield _judged(*future.result())
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()
        for worker in workers:
            worker.wait()


def _judged(name: str, seconds: float, error: CotuneError | None) -> Done:
    if error is not None and error.code in FAULTS_OF_THE_MACHINE:
        raise error
    return name, seconds, error


def _attempt(task: Task) -> tuple[float, CotuneError | None]:
    """Run a cell to its end, or from where it was interrupted."""
    from cotune.simulations.federation import run_inline
    from cotune.simulations.scenario import work_folder

    run, started = RunFolder(task.run), time.monotonic()
    with run.held(ORPHAN_S):
        shutil.rmtree(work_folder(run.run_id), ignore_errors=True)
    try:
        # A run says it has succeeded before it has written all its files.
        if run.state()["status"] != "succeeded" or not (run.path / "MANIFEST.json").exists():
            run.set_engine("inline")
            run_inline(run, task.kept)
    except CotuneError as error:
        return time.monotonic() - started, error
    finally:
        shutil.rmtree(work_folder(run.run_id), ignore_errors=True)
    return time.monotonic() - started, None


class _Worker:
    """A process that runs one cell after the other; it ends when its standard input does, also in a cell."""

    def __init__(self, log: Path) -> None:
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cotune.simulations.comparison.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
                start_new_session=True,  # Ctrl-C is for the comparison; it ends its processes
            )  # fmt: skip
        self._log = log

    def ask(self, task: Task) -> tuple[float, CotuneError | None]:
        """Run a cell there.

        Raises:
            RunFailed: E-INTERNAL: the process ended.
        """
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None and answers is not None  # noqa: S101 - both are pipes
        try:
            asked.write(json.dumps({"name": task.name, "run": str(task.run), "kept": str(task.kept)}) + "\n")
            asked.flush()
            answer: dict[str, Any] = json.loads(answers.readline())
        except (OSError, ValueError):
            raise RunFailed("E-INTERNAL", f"{task.name}: its process ended", hint=f"see {self._log}") from None
        fault = answer["error"]
        error = ended(fault["code"], fault["message"], fault["exit_code"], fault["hint"]) if fault else None
        return answer["seconds"], error

    def close(self) -> None:
        """Tell the process to end."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def wait(self) -> None:
        """Wait until it has ended; one that does not is killed."""
        try:
            self._process.wait(timeout=ORPHAN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """Run what is asked for on standard input, a task a line; answer on standard output, an outcome a line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nobody else's words go between the answers
    tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(tasks,), daemon=True).start()
    try:
        while (task := tasks.get()) is not None:
            _answer(answers, *_outcome(task))
    except KeyboardInterrupt:
        pass


def _read(tasks: queue.SimpleQueue[Task | None]) -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        tasks.put(Task(asked["name"], Path(asked["run"]), Path(asked["kept"])))
    tasks.put(None)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _outcome(task: Task) -> tuple[float, CotuneError | None]:
    try:
        return _attempt(task)
    except Exception as error:
        if os.environ.get("COTUNE_DEBUG") == "1":
            raise
        return 0.0, ended("E-INTERNAL", f"{task.name}: {type(error).__name__}", INTERNAL_EXIT_CODE)


def _answer(answers: TextIO, seconds: float, error: CotuneError | None) -> None:
    fault = {**error.to_dict(), "exit_code": error.exit_code} if error else None
    answers.write(json.dumps({"seconds": seconds, "error": fault}) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
