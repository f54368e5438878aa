"""All attacks on one run: what each found, and what could not be tried and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from cotune.shared.errors import CotuneError, DataError, JobError, ModelError
from cotune.shared.job import Job
from cotune.shared.privacy.claim import charged, events_of
from cotune.shared.privacy.event import Event
from cotune.shared.records import Record, read_records
from cotune.shared.runs import RunFolder
from cotune.shared.sections import HOME
from cotune.simulations.attack import audit, membership
from cotune.simulations.attack.canaries import Planted, planted_in, record_of
from cotune.simulations.attack.exposure import exposures, extracted
from cotune.simulations.attack.reader import Reader

ADVERSARY = "reader of the released model"
ROWS = 200  # members, non-members and population, each
FEWEST_ROWS = 20
NOMINAL_DELTA = 1e-5  # of the bound on a run that claims none
T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Attacks:
    """Attacks on one run by whoever has its released adapter.

    Attributes:
        run: The run; nothing in it is changed.
        say: Hears of each step.
        prefix: What its limits begin with.
        kept: See `Reader`.
        limits: What could not be tried, and why; it grows.
    """

    run: RunFolder
    say: Say
    prefix: str = ""
    kept: Path | None = None
    limits: list[str] = field(default_factory=list)

    def results(self) -> dict[str, Any]:
        """Whatever can be tried on this run; None for the rest."""
        found: dict[str, Any] = {"canaries": None, "audit": [], "exposure": None, "membership": None, "secrets": None}
        self._note_scope()
        planted = self.tried("planted units", lambda: _planted(self.run)) or []
        reader = self.tried("released adapter", lambda: _reader(self.run, self.kept))
        canaries = [one for one in planted if one.kind == "canary"]
        secrets = [one for one in planted if one.kind == "secret"]
        job = self.run.job()
        if canaries:
            found["canaries"] = _counted(canaries, job)
        if reader is None:
            return found
        if canaries:
            guesses = self.tried("canaries", lambda: guessed(reader, canaries))
            found["audit"] = (self.tried("lower bounds", lambda: _audited(self.run, guesses)) or []) if guesses else []
        if secrets:
            found["exposure"] = self.tried("exposure of secrets", lambda: exposures(reader, secrets))
            found["secrets"] = self.tried("extraction of secrets", lambda: extracted(reader, secrets))
        found["membership"] = self.tried("membership", lambda: member_inference(reader, job))
        return found

    def tried(self, what: str, attack: Callable[[], T]) -> T | None:
        """What an attack found; if it cannot be made, its reason becomes a limit."""
        self.say(f"{self.prefix}{what} ...")
        try:
            return attack()
        except CotuneError as error:
            self.limits.append(f"{self.prefix}{what}: {error.message}")
            return None

    def _note_scope(self) -> None:
        job = self.run.job()
        if not job.audit.canaries:
            self.limits.append(f"{self.prefix}no canaries were planted: no lower bound of epsilon can be measured")
        if not job.audit.secrets:
            self.limits.append(f"{self.prefix}no secrets were planted: none can be looked for")
        if job.rule.personal:
            self.limits.append(f"{self.prefix}adapters of single sites (personal/) were not attacked")


def _planted(run: RunFolder) -> list[Planted]:
    if run.engine() == "deployed":
        raise JobError("E-ATTACK-DEPLOYED", "a deployed run plants nothing among its sites' records")
    return planted_in(run)


def _reader(run: RunFolder, kept: Path | None) -> Reader:
    if not (run.adapter / "adapter_model.safetensors").exists():
        status = run.state()["status"]
        raise ModelError("E-ADAPTER", f"the run is {status} and has published none; nothing can be asked of it")
    return Reader(run, kept)


def _counted(canaries: Sequence[Planted], job: Job) -> dict[str, Any]:
    return {
        "candidates": len(canaries),
        "inserted": sum(one.coin for one in canaries),
        "rows_each": canaries[0].rows,
        "unit": "person" if job.privacy.level == "unit" or canaries[0].rows > 1 else "record",
    }


def guessed(reader: Reader, canaries: Sequence[Planted]) -> audit.Guesses:
    """Guesses by how much training lowered each canary's loss."""
    gains = reader.losses([record_of(one, reader.job) for one in canaries]).gains()
    return audit.guess(gains, [one.coin for one in canaries])


def _audited(run: RunFolder, guesses: audit.Guesses) -> list[dict[str, Any]]:
    """Both lower bounds, held against the run's claim."""
    guarantee = run.claim()["guarantee"]
    claimed = guarantee["epsilon"] if guarantee else None
    delta = guarantee["delta"] if guarantee else NOMINAL_DELTA
    hypothesis = audit.as_claimed(claimed_events(run)) if guarantee else audit.gaussian
    bounds = {
        "Steinke et al. 2023": audit.lower_bound(guesses, delta),
        "f-DP, Mahloujifar et al. 2024": audit.lower_bound_of(guesses, hypothesis, delta),
    }
    return [
        {
            "adversary": ADVERSARY,
            "method": method,
            "guesses": guesses.made,
            "right": guesses.right,
            "epsilon_lower": bound,
            "delta": delta,
            "confidence": audit.CONFIDENCE,
            "claimed_epsilon": claimed,
            "holds": claimed is None or bound <= claimed,
        }
        for method, bound in bounds.items()
    ]


def claimed_events(run: RunFolder) -> list[Event]:
    """What a run's claim is computed from: the events of as many sites as one unit may be at, the costliest."""
    accounts = charged(json.loads((run.privacy / "accountant.json").read_text(encoding="utf-8"))["sites"])
    sites = sorted(run.claim()["sites"], key=lambda site: (-(site["epsilon"] or 0.0), site["id"]))
    return [event for site in sites[: run.job().data.sites_per_unit] for event in events_of(accounts[site["id"]])]


def member_inference(reader: Reader, job: Job) -> dict[str, Any]:
    """Rows that were trained on against rows that were not, beside a population of further held-out rows."""
    chance = Random(job.run.seed)  # noqa: S311 - which rows are tried is no secret
    members, held_out = _training_rows(job), _held_out_rows(job)
    chance.shuffle(members)
    chance.shuffle(held_out)
    half = min(ROWS, len(held_out) // 2)
    sets = members[:ROWS], held_out[:half], held_out[half : 2 * half]
    inside, outside, population = (reader.losses(rows) for rows in sets)
    scores = [membership.relative_membership(rows, population) for rows in (inside, outside)]
    mean, low, high = membership.area(*scores)
    curve = membership.roc(*scores)
    return {
        "method": "offline RMIA (Zarifzadeh et al. 2024), the base model as its one reference",
        "members": len(scores[0]),
        "non_members": len(scores[1]),
        "auc": mean,
        "auc_low": low,
        "auc_high": high,
        "tpr_at_1pct_fpr": membership.true_positives(curve),
        "roc": membership.thinned(curve),
    }


def _training_rows(job: Job) -> list[Record]:
    from cotune.simulations.scenario import site_names, site_records

    if job.data.deployed or any(source.startswith(HOME) for source in job.data.sites.values()):
        raise DataError("E-ATTACK-ROWS", "the sites' records are their own: nobody here may look at them")
    rows = [row for site in site_names(job) for row in site_records(job, site)]
    return _enough(rows, FEWEST_ROWS, "training rows")


def _held_out_rows(job: Job) -> list[Record]:
    rows = read_records(Path(job.eval.data)) if job.eval.data else []
    return _enough(rows, 2 * FEWEST_ROWS, "held-out rows (eval.data)")


def _enough(rows: list[Record], least: int, what: str) -> list[Record]:
    if len(rows) < least:
        raise DataError("E-ATTACK-ROWS", f"expected at least {least} {what}, found {len(rows)}")
    return rows
