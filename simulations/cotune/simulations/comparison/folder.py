"""A comparison's folder: what was asked for, the runs, and what each finished cell gave.

compare.json           what was asked for, and SHA-256 of the files it reads
runs/                  a run folder a cell; the run is named after the cell
results.jsonl          one line a finished cell
table.md table.csv     mean and spread over seeds
utility-against-epsilon.svg utility-against-bytes.svg
processes.log          what cells said that ran in processes of their own
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotune.shared.errors import CotuneError, JobError, StorageError
from cotune.shared.files import read_lines, storage_errors, write_json
from cotune.shared.packages import cache_dir
from cotune.shared.runs import RunFolder
from cotune.simulations.comparison.cells import Cell, Request, inputs_of

Line = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A comparison's folder.

    Attributes:
        path: The folder.
        request: What was asked for.
    """

    path: Path
    request: Request

    def lines(self) -> dict[str, Line]:
        """What finished cells gave, by the cell's name; see `line_of`."""
        return {line["cell"]: line for line in read_lines(self.path / "results.jsonl")}

    @contextlib.contextmanager
    def held(self, kept: Path | None = None) -> Generator[Path]:
        """Hold the comparison; gives a private folder for what its cells share, removed at the end.

        Args:
            kept: A folder to use instead, and to leave as it is.

        Raises:
            JobError: E-COMPARE-HELD: another process holds it.
        """
        with (self.path / "compare.json").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                what = f"{self.path} is being run by another process"
                raise JobError("E-COMPARE-HELD", what, hint="wait for it, or end it") from None
            name = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
            own = cache_dir() / "work" / f"compare-{name}"
            shutil.rmtree(own, ignore_errors=True)  # of a process that was killed
            with storage_errors(kept or own):
                (kept or own).mkdir(mode=0o700, parents=True, exist_ok=kept is not None)
            try:
                yield kept or own
            finally:
                shutil.rmtree(own, ignore_errors=True)

    @contextlib.contextmanager
    def removed_unless_begun(self) -> Generator[None]:
        """If the block fails before anything was ever run here, nothing is left of this folder."""
        try:
            yield
        except BaseException:
            if not any(self.path.glob("results.jsonl")) and not any(self.path.glob("runs/*/metrics.jsonl")):
                shutil.rmtree(self.path, ignore_errors=True)
            raise


def make_comparison(path: Path, request: Request) -> Comparison:
    """A new comparison's folder, or the one there is, if it was asked for the same.

    Raises:
        JobError: E-COMPARE-OTHER: the folder is of another comparison, or files it reads have changed since.
        StorageError: The folder cannot be made, or holds something else.
    """
    record = {"schema": 1, "request": request.to_dict(), "inputs": inputs_of(request)}
    if (path / "compare.json").exists():
        _require_same(path, record)
        return Comparison(path, request)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise StorageError("E-EXISTS", f"{path} exists and is no comparison", hint="--name another-name")
    with storage_errors(path):
        (path / "runs").mkdir(parents=True, exist_ok=True)
    write_json(path / "compare.json", record)
    return Comparison(path, request)


def open_comparison(path: Path) -> Comparison:
    """The comparison in a folder, to go on with. Raises as `make_comparison` does."""
    return make_comparison(path, Request.from_dict(_record(path)["request"]))


def _record(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "compare.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError("E-COMPARE-FOLDER", f"{path}: no comparison can be read there ({error})") from None


def _require_same(path: Path, record: dict[str, Any]) -> None:
    kept = _record(path)
    for part, what in (("request", "was asked for with other"), ("inputs", "was made when other were")):
        names = [name for name in {**kept[part], **record[part]} if kept[part].get(name) != record[part].get(name)]
        if names:
            hint = "--name another-name, for a comparison of its own"
            raise JobError("E-COMPARE-OTHER", f"{path} {what}: {', '.join(names)}", param="--name", hint=hint)


def line_of(
    cell: Cell, run: RunFolder, tuned: dict[str, str | None], seconds: float, error: CotuneError | None
) -> Line:
    """What a finished cell gave, as one line of results.jsonl.

    Losses are in nats, accuracies shares of one, bytes those of all sites and rounds, steps and epsilon those of
    the site with the most; null where there is none. `train_seconds` are those until every round's last update
    was in, `seconds` the whole cell's in the process that ended it.
    """
    line: Line = {
        "cell": cell.name,
        "counted": cell.tried is None,
        "rule": cell.rule,
        "epsilon": None if math.isinf(cell.epsilon) else cell.epsilon,
        "seed": cell.seed,
        "varied": dict(cell.varied),
        "tuned": tuned,
        "learning_rate": run.job().train.learning_rate,
        "error": {"code": error.code, "message": error.message} if error else None,
        "run_id": run.run_id,
    }
    if error:
        return {**line, "loss": None}
    summary = run.summary()
    sites: list[dict[str, Any]] = summary["sites"]
    epsilons = [site["epsilon"] for site in sites if site["epsilon"] is not None]
    return {
        **line,
        **{f"{name}_base": summary["base"][name] for name in ("accuracy", "loss")},
        **{name: summary["final"][name] for name in ("accuracy", "loss")},
        "epsilon_spent": max(epsilons, default=None),
        "bytes_up": summary["bytes_up"],
        "bytes_down": summary["bytes_down"],
        "steps": max(site["steps"] for site in sites),
        "train_seconds": round(_train_seconds(run), 3),
        "seconds": round(seconds, 3),
    }


def _train_seconds(run: RunFolder) -> float:
    rounds: dict[int, float] = {}  # a row's seconds count from the round's start, so the last answer's are the round's
    for row in run.metrics():
        if row.get("site"):
            rounds[row["round"]] = max(row["seconds"], rounds.get(row["round"], 0.0))
    return sum(rounds.values())
