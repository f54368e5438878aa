"""What an attack on the run measured, beside what the claim allows and beside a run without privacy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from cotune.shared.report import attack_charts, wording
from cotune.shared.report.charts import Chart
from cotune.shared.report.evidence import Evidence, Record
from cotune.shared.report.wording import ABSENT

Standing = Literal["not run", "holds", "not refuted", "broken", "not tested", "nothing claimed"]


@dataclass(frozen=True)
class Bound:
    """One audit: what it proves was leaked at least, beside what the claim says is leaked at most.

    Attributes:
        most: What it could have proved, had every guess been right: below the claim, it could not have refuted it.
    """

    adversary: str
    method: str
    guesses: str
    lower: str
    most: str
    claimed: str
    holds: bool


@dataclass(frozen=True)
class Pair:
    """One figure of this run and of the control, as printed."""

    what: str
    run: str
    control: str


@dataclass(frozen=True)
class Secret:
    """A planted, made-up secret and what each model said when asked for it."""

    prompt: str
    secret: str
    run: str
    run_told: bool
    control: str
    control_told: bool


@dataclass(frozen=True)
class Attacks:
    """All of it. A claim that no audit could have refuted is "not refuted".

    With standing "not run" the rest is empty but for `sentence`, which says how to run it.
    """

    standing: Standing
    sentence: str
    bounds: tuple[Bound, ...] = ()
    pairs: tuple[Pair, ...] = ()
    control: str = ""
    secrets: tuple[Secret, ...] = ()
    limits: tuple[str, ...] = ()


def build_attacks(evidence: Evidence) -> Attacks:
    """What `cotune attack` wrote of this very claim; a run that was not attacked is said to be untested."""
    results = evidence.attack
    if not results:
        stale = (
            "There are results of an attack on another run or claim, which say nothing here. " * evidence.stale_attack
        )
        return Attacks("not run", f"{stale}No attack was run on this result: what is said of it is mathematics alone.")
    run: Record = results.get("run") or {}
    control: Record = (results.get("control") or {}).get("results") or {}
    return Attacks(
        standing=_standing(evidence),
        sentence=_sentence(run, evidence),
        bounds=tuple(_bound(record) for record in run.get("audit") or []),
        pairs=_pairs(run, control),
        control=str((results.get("control") or {}).get("run_id") or ""),
        secrets=_secrets(run, control),
        limits=tuple(str(limit) for limit in results.get("limits") or []),
    )


def _standing(evidence: Evidence) -> Standing:
    if evidence.is_broken:
        return "broken"
    if not evidence.guarantee:
        return "nothing claimed"
    if evidence.attack.get("verdict") != "holds":
        return "not tested"
    able = any(could_refute(audit) for audit in (evidence.attack.get("run") or {}).get("audit") or [])
    return "holds" if able else "not refuted"


def strongest(run: Record) -> Record:
    """The audit that proved the largest leak; empty without one."""
    audits: Sequence[Record] = run.get("audit") or []
    return max(audits, key=_proved, default={})


def _proved(audit: Record) -> float:
    return audit.get("epsilon_lower") or 0.0


def planted(results: Record) -> str:
    """How many planted secrets came out, in words; empty if none were planted."""
    secrets: Record = results.get("secrets") or {}
    if not secrets.get("planted"):
        return ""
    return f"{secrets.get('recovered', 0)} of {secrets['planted']}"


def _sentence(run: Record, evidence: Evidence) -> str:
    best = strongest(run)
    lower, claimed = best.get("epsilon_lower"), best.get("claimed_epsilon")
    said: list[str] = []
    if lower is not None and claimed is not None:
        verdict = "more than the claim allows" if lower > claimed else "within the claim"
        said.append(f"{_proves(best)}; claimed is at most {wording.epsilon(claimed)}: {verdict}.")
        if not could_refute(best):
            said.append(f"Its {wording.count(best.get('guesses'))} guesses were too few to refute such a claim.")
    elif lower is not None:
        said.append(f"{_proves(best)}; nothing was claimed.")
    out = planted(run)
    if out:
        other = planted((evidence.attack.get("control") or {}).get("results") or {})
        beside = f"; from the same training without privacy, {other}" if other else ""
        said.append(f"Of planted secrets, {out} came out of this model{beside}.")
    return " ".join(said) or "An attack was run; its figures are below."


def _proves(audit: Record) -> str:
    if not audit["epsilon_lower"] > 0:
        return "No attack could prove a leak"
    sure = f"{100 * (audit.get('confidence') or 0.95):.0f} %"
    return f"The strongest attack proves a leak of at least epsilon {audit['epsilon_lower']:.2f} ({sure} confidence)"


def could_refute(audit: Record) -> bool:
    """Whether an audit could have proved more than is claimed: else it is no test of the claim."""
    claimed, most = audit.get("claimed_epsilon"), _most(audit)
    return claimed is not None and most is not None and most > claimed


def _most(audit: Record) -> float | None:
    """The largest epsilon so many guesses can prove, all of them right (Steinke et al. 2023, without delta)."""
    guesses, doubt = audit.get("guesses") or 0, 1 - (audit.get("confidence") or 0.95)
    if guesses < 1 or not 0 < doubt < 1:
        return None
    share = doubt ** (1 / guesses)
    return math.log(share / (1 - share)) if share > 0.5 else 0.0


def _bound(record: Record) -> Bound:
    lower, claimed, most = record.get("epsilon_lower"), record.get("claimed_epsilon"), _most(record)
    return Bound(
        adversary=str(record.get("adversary", "")),
        method=str(record.get("method", "")),
        guesses=f"{wording.count(record.get('right'))} of {wording.count(record.get('guesses'))}",
        lower=ABSENT if lower is None else f"{lower:.2f}",
        most=ABSENT if most is None else f"{most:.2f}",
        claimed="nothing claimed" if claimed is None else wording.epsilon(claimed),
        holds=record.get("holds") is not False,
    )


def _pairs(run: Record, control: Record) -> tuple[Pair, ...]:
    """The figures that both may have; a figure that neither has is left out."""
    rows: tuple[tuple[str, Callable[[Record], str]], ...] = (
        ("Planted secrets that came out", planted),
        ("Tokens of the secrets that came out", lambda r: _percent(r, "secrets", "tokens_recovered")),
        ("Telling members from others: area under the curve (0.5 is guessing)", _area),
        ("Members found while wrongly accusing 1 of 100", lambda r: _percent(r, "membership", "tpr_at_1pct_fpr")),
        ("Exposure of canaries, mean, in bits", lambda r: _bits(r, "mean")),
        ("Exposure of the most exposed canary, in bits", lambda r: _bits(r, "max")),
        ("Exposure by chance, in bits", lambda r: _bits(r, "chance_mean")),
        ("Canaries inserted, of candidates", _canaries),
    )
    found = (Pair(what, value(run), value(control)) for what, value in rows)
    return tuple(Pair(p.what, p.run or ABSENT, p.control or ABSENT) for p in found if p.run or p.control)


def _percent(results: Record, part: str, name: str) -> str:
    value = (results.get(part) or {}).get(name)
    return "" if value is None else wording.percent(value)


def _bits(results: Record, name: str) -> str:
    value = (results.get("exposure") or {}).get(name)
    return "" if value is None else f"{value:.2f}"


def _area(results: Record) -> str:
    membership: Record = results.get("membership") or {}
    if membership.get("auc") is None:
        return ""
    low, high = membership.get("auc_low"), membership.get("auc_high")
    return f"{membership['auc']:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")


def _canaries(results: Record) -> str:
    canaries: Record = results.get("canaries") or {}
    return f"{canaries.get('inserted')} of {canaries.get('candidates')}" if canaries else ""


def _secrets(run: Record, control: Record) -> tuple[Secret, ...]:
    """The examples of the run with those of the control that asked the same."""
    others = {str(one.get("prompt")): one for one in _examples(control)}
    rows: list[Secret] = []
    for one in _examples(run) or _examples(control):
        prompt, secret = str(one.get("prompt", "")), str(one.get("secret", ""))
        said = str(one.get("said") or "(nothing)") if _examples(run) else ABSENT
        other = str(others[prompt].get("said") or "(nothing)") if prompt in others else ABSENT
        rows.append(Secret(prompt, secret, said, _told(secret, said), other, _told(secret, other)))
    return tuple(rows)


def _examples(results: Record) -> Sequence[Record]:
    return (results.get("secrets") or {}).get("examples") or []


def _told(secret: str, said: str) -> bool:
    return bool(secret.strip()) and secret.strip() in said


def measured_charts(evidence: Evidence) -> tuple[Chart, ...]:
    """The charts that the attack's results allow."""
    run: Record = evidence.attack.get("run") or {}
    control: Record = (evidence.attack.get("control") or {}).get("results") or {}
    curve = [(point[0], point[1]) for point in evidence.guarantee.get("tradeoff") or []]
    drawn = (
        attack_charts.membership_chart(_points(run), _points(control), curve),
        attack_charts.exposure_chart(run.get("exposure") or {}, control.get("exposure") or {}),
        attack_charts.leak_chart(evidence.attack.get("leakage") or {}),
    )
    return tuple(chart for chart in drawn if chart is not None)


def _points(results: Record) -> list[tuple[float, float]]:
    return [(point[0], point[1]) for point in (results.get("membership") or {}).get("roc") or []]
