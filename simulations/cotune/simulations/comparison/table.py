"""A comparison's table: mean and spread over seeds for every rule, epsilon and varied setting."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cotune.shared.files import write_atomic
from cotune.shared.report import wording
from cotune.simulations.comparison.cells import Request, epsilon_text
from cotune.simulations.comparison.folder import Comparison, Line


@dataclass(frozen=True)
class Spread:
    """Mean, least and largest value over seeds, and the sample's standard deviation (None for one seed)."""

    mean: float
    low: float
    high: float
    std: float | None


@dataclass(frozen=True)
class Row:
    """All seeds of one combination.

    Attributes:
        rule: The aggregation rule.
        epsilon: The budget; None for no privacy.
        varied: The varied settings.
        tuned: The tuned setting and the value that was best.
        seeds: How many runs have finished.
        accuracy: Share of right answers; None where answers cannot be listed.
        loss: On the evaluation rows, in nats.
        epsilon_spent: The most any site spent in any run.
        megabytes_up: All sites, all rounds, in MB; mean over seeds, as what follows.
        megabytes_down: The same, the other way.
        steps: Noisy steps of a site.
        seconds: Of a run.
    """

    rule: str
    epsilon: float | None
    varied: dict[str, str]
    tuned: dict[str, Any]
    seeds: int
    accuracy: Spread | None
    loss: Spread
    epsilon_spent: float | None
    megabytes_up: float
    megabytes_down: float
    steps: int
    seconds: float

    @property
    def name(self) -> str:
        """The rule and the varied settings: what one line of a chart stands for."""
        return ", ".join([self.rule, *(f"{name.rpartition('.')[2]} {value}" for name, value in self.varied.items())])

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON."""
        return asdict(self)


def rows_of(lines: Iterable[Line]) -> list[Row]:
    """Rows of the table from finished cells, in the order they were asked for; cells that tune are left out."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in sorted(lines, key=lambda line: line["cell"]):
        if line["counted"]:
            groups.setdefault((line["rule"], line["epsilon"], *line["varied"].items()), []).append(line)
    return [_row(group) for group in groups.values()]


def _row(group: Sequence[Line]) -> Row:
    first = group[0]

    def mean(name: str) -> float:
        return statistics.fmean(line[name] for line in group)

    return Row(
        rule=first["rule"],
        epsilon=first["epsilon"],
        varied=first["varied"],
        tuned=first["tuned"],
        seeds=len(group),
        accuracy=spread([line["accuracy"] for line in group]) if first["accuracy"] is not None else None,
        loss=spread([line["loss"] for line in group]),
        epsilon_spent=max((line["epsilon_spent"] for line in group if line["epsilon_spent"] is not None), default=None),
        megabytes_up=mean("bytes_up") / 1e6,
        megabytes_down=mean("bytes_down") / 1e6,
        steps=max(line["steps"] for line in group),
        seconds=mean("seconds"),
    )


def spread(values: Sequence[float]) -> Spread:
    """Mean and spread of at least one value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), min(values), max(values), std)


def write_table(comparison: Comparison) -> None:
    """Write table.md and table.csv from what has finished so far."""
    lines = list(comparison.lines().values())
    write_atomic(comparison.path / "table.md", (table_text(comparison.request, lines) + "\n").encode())
    write_atomic(comparison.path / "table.csv", _csv(rows_of(lines)).encode())


def table_text(request: Request, lines: Sequence[Line]) -> str:
    """The table and what has to be known to read it, as Markdown."""
    rows = rows_of(lines)
    settings = [name for name, _ in request.vary] + ([request.tune[0]] if request.tune else [])
    head = [
        "rule",
        "epsilon",
        *settings,
        "seeds",
        "accuracy",
        "loss",
        "epsilon spent",
        "MB up",
        "MB down",
        "steps",
        "s",
    ]
    table = [head, *(_cells(row, settings) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    text = [
        "| " + " | ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([*text, "", *(f"- {note}" for note in notes(request, lines))])


def _cells(row: Row, settings: Sequence[str]) -> list[str]:
    known = {**row.varied, **row.tuned}
    private = row.epsilon is not None
    return [
        row.rule,
        epsilon_text(row.epsilon) if row.epsilon is not None else "inf (NOT PRIVATE)",
        *(str(known[name]).replace("|", "\\|") for name in settings),
        str(row.seeds),
        _shown(row.accuracy, 3),
        _shown(row.loss, 3),
        wording.epsilon(row.epsilon_spent) if private else "infinite",
        f"{row.megabytes_up:.3g}",
        f"{row.megabytes_down:.3g}",
        str(row.steps),
        f"{row.seconds:.0f}",
    ]


def _shown(values: Spread | None, digits: int) -> str:
    if values is None:
        return wording.ABSENT
    return f"{values.mean:.{digits}f} ({values.low:.{digits}f} to {values.high:.{digits}f})"


def notes(request: Request, lines: Sequence[Line]) -> list[str]:
    """What has to be known to read the table, a sentence or two each."""
    found = [
        "Mean over seeds, in brackets the least and the largest. A seed fixes the split over sites and the frozen"
        " start; noise and batches are drawn anew in every run.",
    ]
    counted = [line for line in lines if line["counted"]]
    if counted:
        base = spread([line["loss_base"] for line in counted]).mean
        known = [line["accuracy_base"] for line in counted if line["accuracy_base"] is not None]
        accuracy = f"accuracy {statistics.fmean(known):.3f}, " if known else ""
        found.append(f"The base model, untouched: {accuracy}loss {base:.3f}.")
    if any(line["epsilon"] is not None for line in counted):
        found.append(
            "Epsilon is of each run by itself: whoever's records were in several runs spent the sum of theirs."
        )
    if any(math.isinf(epsilon) for epsilon in request.epsilons):
        found.append(
            "Epsilon inf gives NO privacy: nothing is clipped or noised, and train.learning_rate is multiplied by"
            " privacy.clipping_norm, since gradients keep their own length."
        )
    if request.tune:
        name, values = request.tune
        seed = next((line["seed"] for line in lines if not line["counted"]), None)
        found.append(
            f"{name} was chosen for each row among {', '.join(values)}: the least loss on the evaluation rows in a run"
            f" with seed {seed}, which is not counted. That choice saw the sites' records and is NOT accounted in"
            " epsilon, and it saw the evaluation rows."
        )
    return found


def _csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    spreads = [f"{what}_{part}" for what in ("accuracy", "loss") for part in ("mean", "low", "high", "std")]
    settings = list(dict.fromkeys(name for row in rows for name in (*row.varied, *row.tuned)))
    plain = ("epsilon_spent", "megabytes_up", "megabytes_down", "steps", "seconds")
    writer.writerow(["rule", "epsilon", *settings, "seeds", *spreads, *plain])
    for row in rows:
        values = [getattr(getattr(row, what), part, None) for what in ("accuracy", "loss") for part in asdict(row.loss)]
        known = {**row.varied, **row.tuned}
        epsilon = "inf" if row.epsilon is None else row.epsilon
        writer.writerow(
            [
                row.rule,
                epsilon,
                *(known[name] for name in settings),
                row.seeds,
                *values,
                *(getattr(row, n) for n in plain),
            ]
        )
    return buffer.getvalue()
