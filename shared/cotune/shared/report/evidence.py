"""What a run folder holds, read once: a running, failed or cancelled run simply holds less."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cotune.shared.job import Job
from cotune.shared.runs import RunFolder

Record = Mapping[str, Any]
Privacy = Literal["private", "none", "test-noise"]


@dataclass(frozen=True)
class Evidence:
    """The run's own records. `summary`, `claim` and `hardware` are empty until they are written."""

    run_id: str
    job: Job
    state: Record
    summary: Record
    claim: Record
    metrics: Sequence[Record]
    events: Sequence[Record]
    hardware: Record

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
    hardware = run.path / "env" / "hardware.json"
    return Evidence(
        run_id=run.run_id,
        job=run.job(),
        state=run.state(),
        summary=run.summary() if (run.path / "summary.json").exists() else {},
        claim=run.claim() if (run.privacy / "claim.json").exists() else {},
        metrics=run.metrics(),
        events=run.events(),
        hardware=_hardware(hardware) if hardware.exists() else {},
    )


def _hardware(path: Path) -> Record:
    return json.loads(path.read_text(encoding="utf-8"))
