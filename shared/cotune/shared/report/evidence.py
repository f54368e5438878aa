"""What a run folder holds, read once: a running, failed or cancelled run simply holds less."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cotune.shared.errors import JobError
from cotune.shared.job import Job
from cotune.shared.report.budgets import Budget, read_budget
from cotune.shared.runs import RunFolder

Record = Mapping[str, Any]
Privacy = Literal["private", "none", "test-noise"]
SITE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
BROKEN = "E-ATTACK-BOUND"
MAX_BUDGETS = 50  # sites whose ledgers are read for the page; the others' are in the run folder


@dataclass(frozen=True)
class Evidence:
    """The run's own records. `summary`, `claim`, `hardware`, `attack`, `footprint` and `bias` are empty until written.

    Attributes:
        attack: What `cotune attack` measured on this very claim.
        stale_attack: Whether there are results of an attack on another run or claim, which say nothing here.
        budgets: What each of the first sites' data had paid for; empty without a claim.
        signatures: Who signed the claim: names of files in privacy/signatures without their ending.
        checkpoint_files: Names of the files in the checkpoints that are kept.
    """

    run_id: str
    job: Job
    state: Record
    summary: Record
    claim: Record
    metrics: Sequence[Record]
    events: Sequence[Record]
    hardware: Record
    attack: Record
    stale_attack: bool
    footprint: Record
    bias: Record
    budgets: Sequence[Budget]
    signatures: Sequence[str]
    checkpoint_files: Sequence[str]

    @property
    def privacy(self) -> Privacy:
        """Whether anything may be claimed; one record against it is enough to say no."""
        if self.job.privacy.level == "none":
            return "none"
        if self.job.privacy.noise == "test":
            return "test-noise"
        withdrawn = bool(self.claim) and not self.claim.get("guarantee")
        return "none" if withdrawn or self.summary.get("non_private") else "private"

    @property
    def is_broken(self) -> bool:
        """Whether an attack measured more than the claim allows; one record of it is enough."""
        code = (self.state.get("error") or {}).get("code")
        return code == BROKEN or self.attack.get("verdict") == "broken"

    @property
    def guarantee(self) -> Record:
        """The claimed guarantee; empty for a run that claims nothing, or nothing yet."""
        return self.claim.get("guarantee") or {} if self.privacy == "private" else {}

    @property
    def federation_rows(self) -> list[Record]:
        """Metric rows of the whole federation, by round; round 0 is the base model."""
        return [row for row in self.metrics if not row.get("site")]

    @property
    def epsilon(self) -> float | None:
        """The largest epsilon of any site so far; None for a run that is not private."""
        if self.privacy != "private":
            return None
        if self.guarantee:
            return self.guarantee.get("epsilon")
        spent = [row["epsilon"] for row in self.metrics if row.get("epsilon") is not None]
        return max(spent, default=None)


def read_evidence(run: RunFolder) -> Evidence:
    """Read what is there; files that a partial run has not written yet count as empty.

    Raises:
        JobError: A file is there but damaged.
    """
    claim = run.claim() if (run.privacy / "claim.json").exists() else {}
    attack = _optional(run.attack / "results.json")
    ours = attack.get("run_id") == run.run_id and attack.get("claim_id") == claim.get("claim_id")
    return Evidence(
        run_id=run.run_id,
        job=run.job(),
        state=run.state(),
        summary=run.summary() if (run.path / "summary.json").exists() else {},
        claim=claim,
        metrics=run.metrics(),
        events=run.events(),
        hardware=_optional(run.path / "env" / "hardware.json"),
        attack=attack if ours else {},
        stale_attack=bool(attack) and not ours,
        footprint=_optional(run.path / "env" / "footprint.json"),
        bias=_optional(run.path / "bias.json"),
        budgets=_budgets(run, claim),
        signatures=sorted(filter(SITE_NAME.fullmatch, (p.stem for p in (run.privacy / "signatures").glob("*.sig")))),
        checkpoint_files=sorted({path.name for path in run.checkpoints.rglob("*") if path.is_file()}),
    )


def _optional(path: Path) -> Record:
    """A JSON object, empty where there is no such file.

    Raises:
        JobError: It is no JSON object (E-RUN-FILE).
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise JobError("E-RUN-FILE", f"{path}: expected one JSON object", hint=f"remove {path.name}, or make it again")
    return value


def _budgets(run: RunFolder, claim: Record) -> tuple[Budget, ...]:
    sites: Sequence[Record] = claim.get("sites") or []
    named = [site for site in sites if SITE_NAME.fullmatch(str(site.get("id")))]
    return tuple(read_budget(run.ledger(site["id"]), run.run_id, site) for site in named[:MAX_BUDGETS])
