"""How often the model finds a stereotype likelier than its opposite, if it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cotune.shared.report import wording
from cotune.shared.report.evidence import Evidence, Record


@dataclass(frozen=True)
class StereotypeRow:
    """One group of sentence pairs, as printed."""

    group: str
    pairs: str
    base: str
    federated: str
    interval: str


@dataclass(frozen=True)
class Stereotypes:
    """The table; `sentence` says why there is none where `rows` is empty."""

    sentence: str
    source: str
    rows: tuple[StereotypeRow, ...]


def build_stereotypes(evidence: Evidence) -> Stereotypes:
    """Base and federated model on pairs of public sentences, over all and by group."""
    found = evidence.bias
    if not found.get("groups"):
        how = f"cotune eval {evidence.run_id} --bias stereoset"
        return Stereotypes(f"Stereotypes were not measured: {how}", "", ())
    rows = [{"group": "all", **found}, *found["groups"]]
    return Stereotypes(_sentence(found["base"], found["run"]), str(found.get("source", "")), tuple(map(_row, rows)))


def _sentence(base: Mapping[str, float], run: Mapping[str, float]) -> str:
    apart = run["low"] > base["high"] or base["low"] > run["high"]
    chance = "do not overlap" if apart else "overlap: the difference may be chance"
    return (
        "Of two sentences that differ in what they say of a group, the stereotypical one was likelier in "
        f"{wording.percent(base['share'])} of pairs to the base model and in {wording.percent(run['share'])} to this "
        f"one (50 % is no preference); the 95 % intervals {chance}."
    )


def _row(row: Record) -> StereotypeRow:
    return StereotypeRow(
        group=str(row.get("group", "")),
        pairs=wording.count(row.get("pairs")),
        base=wording.percent(row["base"]["share"]),
        federated=wording.percent(row["run"]["share"]),
        interval=wording.interval(row["run"]["low"], row["run"]["high"]),
    )
