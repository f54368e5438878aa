"""Charts of what an attack measured: by the same rules as the others, see `charts`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from cotune.shared.report import wording
from cotune.shared.report.charts import (
    BLACK,
    BLUE,
    GREY,
    VERMILLION,
    Chart,
    Key,
    canvas,
    dashes,
    finished,
)
from cotune.shared.report.evidence import Record

RATES = (0.01, 0.05, 0.1, 0.25, 0.5)  # false alarms the table is made for
BINS = 12
Points = Sequence[tuple[float, float]]


def membership_chart(run: Points, control: Points, bound: Points) -> Chart | None:
    """How well membership can be told, beside the curve that the claim says no attack can cross.

    Args:
        run: (false positive rate, true positive rate) measured on the run.
        control: The same on the run without privacy; may be empty.
        bound: The claimed curve; empty for a run that claims nothing.
    """
    if not run:
        return None
    figure, axes = canvas("members found, %", "others wrongly accused, %")
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1.4, linestyle=dashes("1 3"))
    keys = [Key("guessing", GREY, "1 3")]
    lines = (
        ("the claim: no attack can be above", _closed(bound), BLACK, "6 3"),
        ("measured on the control, without privacy", _closed(control), VERMILLION, "8 2 2 2"),
        ("measured on this run", _closed(run), BLUE, ""),
    )
    for label, points, colour, dash in lines:
        if points:
            across, up = [100 * x for x, _ in points], [100 * y for _, y in points]
            axes.plot(across, up, color=colour, linewidth=2.2, linestyle=dashes(dash) if dash else "-")
            keys.append(Key(label, colour, dash))
    if bound:
        across, up = [100 * x for x, _ in _closed(bound)], [100 * y for _, y in _closed(bound)]
        axes.fill_between(across, up, 100, color=VERMILLION, alpha=0.08, linewidth=0)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_xticks(range(0, 101, 20))
    caption = f"While wrongly accusing 10 of 100, the attack finds {wording.percent(_at(run, 0.1))} of the members"
    caption += f"; the claim allows {wording.percent(_at(bound, 0.1))}." if bound else "."
    table = tuple(
        (wording.percent(rate), *(wording.percent(_at(points, rate)) for points in (run, control, bound)))
        for rate in RATES
    )
    columns = ("Wrongly accused", "Found in this run", "Found in the control", "Claim allows")
    heading = "Telling who was in the training data"
    return finished(figure, Chart("membership", heading, caption, "", tuple(keys), columns, table))


def exposure_chart(run: Record, control: Record) -> Chart | None:
    """How exposed the inserted canaries are, beside chance and the run without privacy."""
    ours, others = list(run.get("values") or []), list(control.get("values") or [])
    if not ours:
        return None
    figure, axes = canvas("share of canaries, %", "exposure, bits")
    most = max([*ours, *others, 1.0])
    edges = [most * i / BINS for i in range(BINS + 1)]
    keys = [Key("this run", BLUE, bar=True)]
    shares = _shares(ours, edges)
    axes.stairs(shares, edges, color=BLUE, fill=True, alpha=0.35)
    axes.stairs(shares, edges, color=BLUE, linewidth=2)
    if others:
        axes.stairs(_shares(others, edges), edges, color=VERMILLION, linewidth=2.2, linestyle=dashes("8 2 2 2"))
        keys.append(Key("control, without privacy", VERMILLION, "8 2 2 2"))
    chance = run.get("chance_mean")
    if chance is not None:
        axes.axvline(chance, color=BLACK, linewidth=1.8, linestyle=dashes("6 3"))
        keys.append(Key("mean by chance", BLACK, "6 3"))
    beside = f", without privacy {control['mean']:.2f}" if control.get("mean") is not None else ""
    by_chance = f"; by chance it would be {chance:.2f}" if chance is not None else ""
    mean = run.get("mean")
    caption = f"Mean exposure {'unknown' if mean is None else f'{mean:.2f}'} bits{beside}{by_chance}. More is worse."
    table = tuple(
        (f"{low:.1f} to {high:.1f}", f"{here:.1f} %", f"{there:.1f} %" if others else wording.ABSENT)
        for (low, high), here, there in zip(pairwise(edges), shares, _shares(others, edges), strict=True)
    )
    columns = ("Exposure in bits", "This run", "Control")
    heading = "Exposure of inserted canaries"
    return finished(figure, Chart("exposure", heading, caption, "", tuple(keys), columns, table))


def leak_chart(leakage: Record) -> Chart | None:
    """How much of a sentence one update gives away, without and with the run's clipping and noise."""
    without, with_noise = leakage.get("recovered_without_dp"), leakage.get("recovered_with_dp")
    if without is None or with_noise is None:
        return None
    figure, axes = canvas("tokens recovered, %", "")
    axes.bar([0, 1], [100 * without, 100 * with_noise], 0.6, color=[VERMILLION, BLUE])
    axes.set_xticks([0, 1], ["without privacy", "with privacy"])
    axes.set_ylim(0, 100)
    note = wording.plain(str(leakage.get("note") or ""))
    tried = f"{wording.count(leakage.get('trials'))} sentences of {wording.count(leakage.get('tokens'))} tokens"
    caption = (
        f"From one update without privacy an attacker reads {wording.percent(without)} of a sentence's tokens, with "
        f"this run's clipping and noise {wording.percent(with_noise)} ({tried}, "
        f"adapter of rank {wording.count(leakage.get('rank'))}"
        f"). {note}"
    )
    keys = (Key("plain gradient", VERMILLION, bar=True), Key("clipped and noised", BLUE, bar=True))
    table = (("without privacy", wording.percent(without)), ("with privacy", wording.percent(with_noise)))
    return finished(
        figure, Chart("leak", "What one update gives away", caption, "", keys, ("Update", "Tokens recovered"), table)
    )


def _closed(points: Points) -> list[tuple[float, float]]:
    """A curve from (0, 0) to (1, 1), in order."""
    return sorted({(0.0, 0.0), *((float(x), float(y)) for x, y in points), (1.0, 1.0)}) if points else []


def _at(points: Points, rate: float) -> float | None:
    """The curve's height at a rate, on the straight line between its points; None without a curve."""
    for (x, y), (after, above) in pairwise(_closed(points)):
        if x <= rate <= after:
            return above if after == x else y + (above - y) * (rate - x) / (after - x)
    return None


def _shares(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    """Per cent of the values in each bin, the last one closed."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        place = sum(value >= edge for edge in edges[1:])
        counts[min(place, len(counts) - 1)] += 1
    return [100 * count / max(1, len(values)) for count in counts]
