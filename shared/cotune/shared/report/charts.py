"""The report's charts: drawn by matplotlib, made safe and accessible to stand inside one HTML page.

No name a user chose is ever drawn: legends, captions and tables are the page's, where they are escaped
and stay legible on a phone. Equal input gives equal bytes.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from cotune.shared.report import wording
from cotune.shared.report.evidence import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours with at least 3:1 contrast on white; every series also differs in its line.
BLUE, VERMILLION, GREEN, BLACK, PURPLE = "#0072B2", "#D55E00", "#007C5A", "#222222", "#9A4F79"
GREY = "#666666"
LEVEL_STYLES = ((BLACK, "6 3"), (VERMILLION, "2 2"), (GREEN, "8 2 2 2"), (PURPLE, "1 3"))
MAX_POINTS = 60
SIZE_INCHES = (5.6, 3.5)  # 403 units wide: on a phone of 360 px the text still is over 10 px
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#D8D8D8",
    "text.color": BLACK,
    "axes.labelcolor": BLACK,
    "xtick.color": BLACK,
    "ytick.color": BLACK,
}


@dataclass(frozen=True)
class Key:
    """One entry of a legend: the line or bar, and what it is."""

    label: str
    colour: str
    dash: str = ""
    bar: bool = False
    hatched: bool = False


@dataclass(frozen=True)
class Level:
    """A value drawn as a horizontal line for comparison."""

    label: str
    value: float


@dataclass(frozen=True)
class Chart:
    """A drawing with its legend and the figures it shows."""

    ident: str
    heading: str
    caption: str
    svg: str
    legend: tuple[Key, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def quality_chart(rows: Sequence[Record], levels: Sequence[Level]) -> Chart | None:
    """Accuracy by round with 95 % intervals, or the loss where the run has no accuracy.

    Args:
        rows: Metric rows of the federation.
        levels: Accuracies to compare with; the first few are drawn.
    """
    points = thin([row for row in rows if row.get("accuracy") is not None])
    if not points:
        return _loss_chart(thin([row for row in rows if row.get("valid_loss") is not None]))
    rounds, values = [row["round"] for row in points], [100 * row["accuracy"] for row in points]
    figure, axes = canvas("accuracy, %")
    low = [100 * _or(row.get("accuracy_low"), row["accuracy"]) for row in points]
    high = [100 * _or(row.get("accuracy_high"), row["accuracy"]) for row in points]
    axes.fill_between(rounds, low, high, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(rounds, values, color=BLUE, marker="o", linewidth=2.2, markersize=5, clip_on=False)
    keys = [Key("federated model, with its 95 % interval (band)", BLUE)]
    for level, (colour, dash) in zip(levels, LEVEL_STYLES, strict=False):
        axes.axhline(100 * level.value, color=colour, linewidth=1.8, linestyle=dashes(dash))
        keys.append(Key(f"{level.label}: {wording.percent(level.value)}", colour, dash))
    caption = (
        f"Accuracy on the held-out rows went from {values[0]:.1f} % after round {rounds[0]} "
        f"to {values[-1]:.1f} % after round {rounds[-1]}."
    )
    table = [
        (
            str(row["round"]),
            wording.percent(row["accuracy"]),
            _interval(row),
            wording.decimal(row.get("valid_loss")),
        )
        for row in points
    ]
    columns = ("Round", "Accuracy", "95 % interval", "Loss")
    return finished(figure, Chart("accuracy", "Accuracy by round", caption, "", tuple(keys), columns, tuple(table)))


def _loss_chart(points: Sequence[Record]) -> Chart | None:
    if not points:
        return None
    figure, axes = canvas("loss, nats per token")
    rounds, values = [row["round"] for row in points], [row["valid_loss"] for row in points]
    axes.plot(rounds, values, color=BLUE, marker="o", linewidth=2.2, markersize=5, clip_on=False)
    caption = (
        f"Loss on the held-out rows went from {values[0]:.3f} after round {rounds[0]} "
        f"to {values[-1]:.3f} after round {rounds[-1]}; lower is better."
    )
    table = tuple((str(row["round"]), wording.decimal(row["valid_loss"])) for row in points)
    keys = (Key("federated model", BLUE),)
    return finished(figure, Chart("loss", "Loss by round", caption, "", keys, ("Round", "Loss"), table))


def epsilon_chart(rows: Sequence[Record], target: float) -> Chart | None:
    """Epsilon spent by round, the largest over the sites, with the job's target dashed."""
    points = thin([row for row in rows if row.get("epsilon") is not None])
    if not points:
        return None
    rounds, values = [row["round"] for row in points], [row["epsilon"] for row in points]
    figure, axes = canvas("epsilon spent")
    axes.plot(rounds, values, color=BLUE, marker="o", linewidth=2.2, markersize=5, clip_on=False)
    axes.axhline(target, color=VERMILLION, linewidth=1.8, linestyle=dashes("6 3"))
    axes.set_ylim(0, 1.1 * max(target, *values))
    caption = (
        f"After round {rounds[-1]} the site that spent most had spent epsilon "
        f"{wording.epsilon(values[-1])} of {wording.epsilon(target)}. Lower is stronger."
    )
    keys = (
        Key("epsilon spent, largest of all sites", BLUE),
        Key(f"target: {wording.epsilon(target)}", VERMILLION, "6 3"),
    )
    table = tuple((str(row["round"]), wording.epsilon(row["epsilon"])) for row in points)
    columns = ("Round", "Epsilon so far")
    return finished(figure, Chart("epsilon", "Privacy spent by round", caption, "", keys, columns, table))


def bytes_chart(rows: Sequence[Record]) -> Chart | None:
    """Bytes the sites sent and received in each round."""
    sent = [row for row in rows if row.get("round") and row.get("bytes_up") is not None]
    points = thin(sent)
    if not points:
        return None
    figure, axes = canvas("kB in the round")
    rounds = [row["round"] for row in points]
    width = 0.4 * min((b - a for a, b in itertools.pairwise(rounds)), default=1)
    for column, offset, colour, hatch in (
        ("bytes_up", -0.5, BLUE, ""),
        ("bytes_down", 0.5, VERMILLION, "////"),
    ):
        places = [number + offset * width for number in rounds]
        heights = [_or(row.get(column), 0) / 1000 for row in points]
        axes.bar(places, heights, width, color=colour if not hatch else "white", edgecolor=colour, hatch=hatch)
    total_up = sum(row["bytes_up"] for row in sent)
    total_down = sum(_or(row.get("bytes_down"), 0) for row in sent)
    caption = (
        f"All sites together sent {wording.size(total_up)} and received {wording.size(total_down)} "
        f"in {len(sent)} round{'' if len(sent) == 1 else 's'}."
    )
    keys = (
        Key("from the sites up to the coordinator (solid)", BLUE, bar=True),
        Key("from the coordinator down to the sites (hatched)", VERMILLION, bar=True, hatched=True),
    )
    table = tuple(
        (str(row["round"]), wording.size(row["bytes_up"]), wording.size(row.get("bytes_down"))) for row in points
    )
    columns = ("Round", "Sent by sites", "Received by sites")
    return finished(figure, Chart("bytes", "Data sent by round", caption, "", keys, columns, table))


def thin(rows: Sequence[Record]) -> list[Record]:
    """At most `MAX_POINTS` rows, evenly spaced, the first and the last among them."""
    if len(rows) <= MAX_POINTS:
        return list(rows)
    last = len(rows) - 1
    return [rows[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _interval(row: Record) -> str:
    return wording.interval(row.get("accuracy_low"), row.get("accuracy_high")) or wording.ABSENT


def dashes(dash: str) -> tuple[int, tuple[int, ...]]:
    """A line style of matplotlib from SVG's."""
    return 0, tuple(int(length) for length in dash.split())


def canvas(y_label: str, x_label: str = "round") -> tuple[Figure, Axes]:
    """An empty drawing in the report's own style, whatever the user's settings of matplotlib are."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(RC):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.set_axisbelow(True)
    return figure, axes


def finished(figure: Figure, chart: Chart) -> Chart:
    """A chart with its drawing."""
    svg = to_svg(figure, chart.ident, chart.heading, chart.caption)
    return Chart(chart.ident, chart.heading, chart.caption, svg, chart.legend, chart.columns, chart.rows)


def to_svg(figure: Figure, ident: str, title: str, description: str) -> str:
    """Draw a figure as an SVG element for inside an HTML page.

    Args:
        figure: What to draw.
        ident: Prefix of every id in it, so that several drawings share a page.
        title: Its accessible name.
        description: What it shows, in a sentence.
    """
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({**RC, "svg.hashsalt": ident}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 - drawn a line above, from numbers
    for parent in list(root.iter()):
        for child in [c for c in parent if _local(c.tag) in {"metadata", "style"}]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = dict(_attributes(element.attrib.items(), ident))
    _name(root, ident, title, description)
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _attributes(items: Iterable[tuple[str, str]], ident: str) -> Iterable[tuple[str, str]]:
    for name, value in items:
        key = _local(name)
        if key == "id":
            yield key, f"{ident}-{value}"
        elif key == "href":
            yield key, value.replace("#", f"#{ident}-", 1)
        elif key == "style":
            # The page's own font: the one matplotlib measured with is wider, so nothing is cut off.
            yield key, re.sub(r"font-family:[^;]*;\s*", "", value).replace("url(#", f"url(#{ident}-")
        else:
            yield key, value.replace("url(#", f"url(#{ident}-")


def _name(root: ElementTree.Element, ident: str, title: str, description: str) -> None:
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{ident}-title {ident}-desc")
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{ident}-{tag}"})
        element.text = text
        root.insert(place, element)
