"""Figures as people read them. Privacy figures are rounded against ourselves, never in our favour."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import PurePosixPath, PureWindowsPath

ABSENT = "–"  # noqa: RUF001 - an en dash, as printed tables have it
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def plain(text: str) -> str:
    """A text without characters that act instead of being read: control codes, escapes, changes of direction.

    Line ends and tabs stay; anything else of the kind becomes one visible sign, so that nobody is misled by what is
    left of it.
    """
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else "\ufffd"
        for character in text.replace("\r\n", "\n")
    )


def percent(share: float | None) -> str:
    """A share of one in per cent, one decimal."""
    return ABSENT if share is None else f"{100 * share:.1f} %"


def interval(low: float | None, high: float | None) -> str:
    """A 95 % interval in per cent."""
    return "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f} %"


def decimal(value: float | None) -> str:
    """A loss or norm, three decimals."""
    return ABSENT if value is None else f"{value:.3f}"


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return ABSENT if value is None else f"{value:,.0f}"


def epsilon(value: float | None) -> str:
    """Epsilon rounded up to two decimals (two significant digits when small)."""
    if value is None:
        return ABSENT
    digits = 2 if value >= 0.1 or value <= 0 else 1 - math.floor(math.log10(value))
    scale = 10**digits
    return f"{math.ceil(value * scale - 1e-9) / scale:.{digits}f}"


def delta(value: float | str | None) -> str:
    """Delta rounded up to three digits, in short form: ``1e-5``; a setting not resolved yet stays a word."""
    if value is None or isinstance(value, str):
        return value or ABSENT
    if value > 0:
        unit = 10.0 ** (math.floor(math.log10(value)) - 2)
        value = math.ceil(value / unit - 1e-9) * unit
    return re.sub(r"e([-+])0*(\d)", r"e\1\2", f"{value:.3g}")


def small(value: float) -> str:
    """A measured figure with three significant digits, never in powers of ten."""
    if value <= 0 or not math.isfinite(value):
        return "0" if value == 0 else ABSENT
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def size(number: float | None) -> str:
    """Bytes in decimal units."""
    if number is None:
        return ABSENT
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes, seconds."""
    if seconds is None:
        return ABSENT
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def moment(iso: str | None) -> str:
    """An ISO time to the minute, in UTC; anything else as it is."""
    try:
        return f"{datetime.fromisoformat(iso or '').astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return iso or ABSENT


def model_name(base: str) -> str:
    """A base model's public name: a hub or package id as it is, of a path only the last part."""
    if base.startswith("pypi:") or (HUB_ID.fullmatch(base) and not base.endswith(".gguf")):
        return base
    return file_name(base)


def file_name(path: str) -> str:
    """The last part of a path: where a file lies is nobody else's business."""
    if path.startswith("dataset:"):
        return path
    return PurePosixPath(PureWindowsPath(path).as_posix()).name or "local"


def right_of_hundred(tradeoff: Iterable[tuple[float, float]]) -> int | None:
    """Of 100 guesses whether one record was used, how many the best attack gets right, rounded up.

    Args:
        tradeoff: Points (false positive rate, largest true positive rate) of the claimed curve.
    """
    best = max(((1 - false + true) / 2 for false, true in tradeoff), default=None)
    return None if best is None else max(50, math.ceil(100 * min(best, 1.0) - 1e-9))


def found_of_hundred(tradeoff: Iterable[tuple[float, float]], false_alarms: float) -> int | None:
    """Of 100 used records, how many an attack finds at this rate of false alarms, if the curve says so."""
    found = [true for false, true in tradeoff if math.isclose(false, false_alarms)]
    return math.ceil(100 * max(found) - 1e-9) if found else None
