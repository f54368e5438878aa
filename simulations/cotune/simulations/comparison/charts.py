"""A comparison's two charts, as SVG files that stand by themselves: utility against epsilon, and against bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cotune.shared.files import write_atomic
from cotune.shared.report import charts
from cotune.simulations.comparison.cells import epsilon_text
from cotune.simulations.comparison.folder import Comparison
from cotune.simulations.comparison.table import Row, Spread, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (charts.BLUE, charts.VERMILLION, charts.GREEN, charts.BLACK, charts.PURPLE)
MARKERS = "os^Dv<"  # more than colours, and no multiple: a line's pair of both is its own up to 30 lines
LINE_HEIGHT_INCHES = 0.25
NO_PRIVACY = "inf"
APART = 0.4


def write_charts(comparison: Comparison) -> None:
    """Write utility-against-epsilon.svg and utility-against-bytes.svg from what has finished."""
    rows = rows_of(comparison.lines().values())
    if not rows:
        return
    for ident, draw in (("epsilon", against_epsilon), ("bytes", against_bytes)):
        write_atomic(comparison.path / f"utility-against-{ident}.svg", draw(rows).encode())


def against_epsilon(rows: Sequence[Row]) -> str:
    """Mean and range over seeds at each epsilon, a line for each rule and varied setting."""
    budgets = sorted({_budget(row) for row in rows})
    labels = [epsilon_text(budget) for budget in budgets]
    names = _names(rows)

    def place(row: Row) -> float:  # side by side, so that ranges do not hide each other
        return budgets.index(_budget(row)) + APART * ((names.index(row.name) + 0.5) / len(names) - 0.5)

    def finish(axes: Axes) -> None:
        axes.set_xticks(range(len(budgets)), labels)
        axes.set_xlim(-0.5, len(budgets) - 0.5)
        axes.set_xlabel("epsilon of each run" + (" (inf: no privacy)" if NO_PRIVACY in labels else ""))

    return _drawn("epsilon", rows, place, finish)


def against_bytes(rows: Sequence[Row]) -> str:
    """Mean and range over seeds at the megabytes all sites sent and received, a line for each rule."""
    sizes = [row.megabytes_up + row.megabytes_down for row in rows]

    def finish(axes: Axes) -> None:
        if max(sizes) > 10 * min(sizes):
            axes.set_xscale("log")
        for row, size in zip(rows, sizes, strict=True):
            height = _utility(row, _has_accuracy(rows))[0]
            axes.annotate(epsilon_text(_budget(row)), (size, height), (5, 4), textcoords="offset points", fontsize=10)
        axes.set_xlabel("MB up and down, all rounds (figures: epsilon)")

    return _drawn("bytes", rows, lambda row: row.megabytes_up + row.megabytes_down, finish)


def _budget(row: Row) -> float:
    return float("inf") if row.epsilon is None else row.epsilon


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.name for row in rows))


def _has_accuracy(rows: Sequence[Row]) -> bool:
    return all(row.accuracy for row in rows)


def _drawn(ident: str, rows: Sequence[Row], place: Callable[[Row], float], finish: Callable[[Any], None]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names, accuracy = _names(rows), _has_accuracy(rows)
    measure = "accuracy, %" if accuracy else "loss, nats"
    width, height = charts.SIZE_INCHES
    with mpl.rc_context(charts.RC):
        figure = Figure(figsize=(width, height + LINE_HEIGHT_INCHES * len(names)), layout="constrained")
        axes = figure.add_subplot()
        for number, name in enumerate(names):
            points = sorted((place(row), _utility(row, accuracy)) for row in rows if row.name == name)
            _line(axes, number, name, points)
        axes.set_ylabel(measure)
        finish(axes)
        legend = figure.legend(loc="outside lower center")
        for text in legend.get_texts():
            text.set_parse_math(False)  # a varied value may hold a dollar sign
    title = f"Utility against {ident}"
    return _alone(charts.to_svg(figure, f"utility-{ident}", title, f"{measure}; {', '.join(names)}."))


def _utility(row: Row, accuracy: bool) -> tuple[float, float, float]:
    values: Spread = row.accuracy if accuracy and row.accuracy else row.loss
    scale = 100 if accuracy else 1
    return scale * values.mean, scale * values.low, scale * values.high


def _line(axes: Axes, number: int, name: str, points: Sequence[tuple[float, tuple[float, float, float]]]) -> None:
    means = [mean for _, (mean, _, _) in points]
    below = [mean - low for _, (mean, low, _) in points]
    above = [high - mean for _, (mean, _, high) in points]
    axes.errorbar(
        [x for x, _ in points], means, yerr=[below, above], label=name, color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)], linewidth=2, capsize=4, clip_on=False,
    )  # fmt: skip


def _alone(svg: str) -> str:
    """A drawing for inside a page as a file of its own."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" '
    return svg.replace("<svg ", head, 1).replace('style="', 'style="background: white; ', 1) + "\n"
