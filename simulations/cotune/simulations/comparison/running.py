"""Running a comparison: first the cells that tune, then those that count; what has finished is never run again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from cotune.shared.cli import job_file
from cotune.shared.errors import CotuneError, RunFailed
from cotune.shared.files import append_line
from cotune.shared.job import Job
from cotune.shared.jobfile import load_job
from cotune.shared.runs import RunFolder
from cotune.simulations.comparison.cells import Cell, Request, RowKey, cells_of, settings_of
from cotune.simulations.comparison.charts import write_charts
from cotune.simulations.comparison.folder import Comparison, Line, line_of
from cotune.simulations.comparison.table import write_table
from cotune.simulations.comparison.worker import Task, run_tasks


@dataclass(frozen=True)
class Watch:
    """Who is told how a comparison goes on.

    Attributes:
        say: Told a sentence now and then.
        finished: Told each finished cell's line, how many are done, how many there are, and the seconds left.
    """

    say: Callable[[str], None]
    finished: Callable[[Line, int, int, float], None]


def jobs_of(request: Request) -> list[Job]:
    """Every cell's job, checked as far as a job can be without its data.

    Raises:
        JobError: A cell's settings do not go together, or there is nothing to score models on.
    """
    path = job_file(request.job)
    return [load_job(path, settings_of(request, cell, _provisional(request, cell), 1)) for cell in cells_of(request)]


def run_comparison(comparison: Comparison, processes: int, watch: Watch, kept: Path | None = None) -> None:
    """Run every cell that has not finished.

    Everything is checked, and run folders are made, before the first cell is run. A cell that fails is left out,
    and the others go on; a fault of the machine ends the comparison. Whatever happens, finished cells are kept.

    Args:
        comparison: What to run.
        processes: How many cells run at once, each in a process of its own; 1 runs them in this one.
        watch: Told what happens.
        kept: Where other comparisons of the same records find what the base's frozen layers make of them; else that is
            removed at the end.

    Raises:
        RunFailed: E-COMPARE-FAILED: cells failed; they are tried again the next time.
        CotuneError: A cell's data or settings cannot be used, or this machine has a fault.
    """
    with comparison.held(kept) as shared:
        cells = cells_of(comparison.request)
        tuning = [cell for cell in cells if cell.tried is not None]
        counted = [cell for cell in cells if cell.tried is None]
        running = _Running(comparison, processes, watch, shared)
        with comparison.removed_unless_begun():
            ready = running.prepare(tuning or counted, {})
            if tuning and ready:
                running.check(counted)
        if tuning:
            running.run(ready, len(tuning))
            ready = running.prepare(counted, best_values(tuning, comparison.lines()))
        failed = running.run(ready, len(counted))
        write_table(comparison)
        write_charts(comparison)
    if failed:
        raise RunFailed(
            "E-COMPARE-FAILED",
            f"{len(failed)} of {len(counted)} cells failed: {'; '.join(f'{c}: {e.message}' for c, e in failed)}",
            hint=f"cotune compare --resume {comparison.path}",
        )


def best_values(tuning: Sequence[Cell], lines: Mapping[str, Line]) -> dict[RowKey, str]:
    """Of the values each row tried, the one with the least loss on the evaluation rows; the first of equal ones.

    Raises:
        RunFailed: E-COMPARE-TUNE: every value of a row failed.
    """
    losses: dict[RowKey, dict[str, float]] = {}
    for cell in tuning:
        loss = lines[cell.name]["loss"]
        losses.setdefault(cell.row, {})[str(cell.tried)] = math.inf if loss is None else loss
    for (rule, epsilon, _), found in losses.items():
        if math.isinf(min(found.values())):
            what = f"rule {rule}, epsilon {epsilon:g}: every value that was tried failed"
            raise RunFailed("E-COMPARE-TUNE", what, hint="other values for --tune, under another --name")
    return {row: min(found, key=lambda value: found[value]) for row, found in losses.items()}


def base_key(job: Job, sha256: str) -> str:
    """What the output of a base's frozen lower layers depends on, beside the tokens, in 16 hexadecimal digits.

    Args:
        job: The run's.
        sha256: Of its base's weights.
    """
    parts = [sha256, job.model.dtype, job.model.quantize, job.task.kind, job.lora.last_layers]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _provisional(request: Request, cell: Cell) -> str | None:
    """The value of the tuned setting that a cell is checked with."""
    return cell.tried or (request.tune[1][0] if request.tune else None)


@dataclass(frozen=True)
class _Ready:
    """A cell that can be run: its run folder, and its value of the tuned setting."""

    cell: Cell
    run: RunFolder
    value: str | None


@dataclass(frozen=True)
class _Running:
    comparison: Comparison
    processes: int
    watch: Watch
    kept: Path
    said: set[str] = field(default_factory=set)

    def prepare(self, cells: Sequence[Cell], best: Mapping[RowKey, str]) -> list[_Ready]:
        """A run folder for each cell that has not finished, made now unless it has been."""
        done = self.comparison.lines()
        values = {cell: cell.tried or best.get(cell.row) for cell in cells if cell.name not in done}
        return [_Ready(cell, self._run_folder(cell, value), value) for cell, value in values.items()]

    def check(self, cells: Sequence[Cell]) -> None:
        """Prepare cells whose last setting is not known yet with a provisional one, and forget them."""
        with TemporaryDirectory(dir=self.kept) as folder:
            for cell in cells:
                self._prepare(cell, _provisional(self.comparison.request, cell), Path(folder))

    def run(self, cells: Sequence[_Ready], total: int) -> list[tuple[str, CotuneError]]:
        """Run cells, the last of so many; returns those that failed, but for those that only tune."""
        started, waiting = time.monotonic(), {ready.cell.name: ready for ready in cells}
        failed: list[tuple[str, CotuneError]] = []
        tasks = self._tasks(cells)
        with closing(run_tasks(tasks, self.processes, self.comparison.path / "processes.log")) as outcomes:
            for number, (name, seconds, error) in enumerate(outcomes, 1):
                ready = waiting.pop(name)
                if error is not None and ready.cell.tried is None:
                    failed.append((name, error))
                line = self._note(ready, seconds, error)
                left = (time.monotonic() - started) / number * len(waiting)
                self.watch.finished(line, total - len(waiting), total, left)
        return failed

    def _tasks(self, cells: Sequence[_Ready]) -> list[Task]:
        from cotune.shared.model import locate

        jobs = {ready.cell.name: ready.run.job() for ready in cells}
        # Hashing a base takes seconds, and there are few of them.
        weights = {model: locate(job).sha256 for model, job in {job.model: job for job in jobs.values()}.items()}
        keys = {name: base_key(job, weights[job.model]) for name, job in jobs.items()}
        return [Task(ready.cell.name, ready.run.path, self.kept / keys[ready.cell.name]) for ready in cells]

    def _note(self, ready: _Ready, seconds: float, error: CotuneError | None) -> Line:
        """Write down what a cell gave; a cell that counts and failed is not finished."""
        tune = self.comparison.request.tune
        line = line_of(ready.cell, ready.run, {tune[0]: ready.value} if tune else {}, seconds, error)
        if error is None or ready.cell.tried is not None:  # a value that fails is no good value: not tried again
            append_line(self.comparison.path / "results.jsonl", line)
            write_table(self.comparison)
        return line

    def _run_folder(self, cell: Cell, value: str | None) -> RunFolder:
        home = self.comparison.path / "runs"
        for path in sorted(home.glob(f"*-{cell.name}")):
            if (path / "plan.json").exists():  # the last file of a run that is ready
                return RunFolder(path.resolve())
            shutil.rmtree(path)
        return self._prepare(cell, value, home)

    def _prepare(self, cell: Cell, value: str | None, home: Path) -> RunFolder:
        from cotune.simulations.scenario import prepare_run

        threads = max(1, (os.cpu_count() or 1) // self.processes)
        settings = settings_of(self.comparison.request, cell, value, threads)
        return prepare_run(self.comparison.request.job, settings, home, self._say_once)

    def _say_once(self, line: str) -> None:
        """Say what would be said again for every cell."""
        if line not in self.said:
            self.watch.say(line)
        self.said.add(line)
