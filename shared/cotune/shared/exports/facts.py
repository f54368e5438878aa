"""What a run knows of itself that authorities ask for, read once from its signed claim and its job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cotune.shared.errors import JobError
from cotune.shared.job import Job
from cotune.shared.privacy.claim_form import read_claim
from cotune.shared.report import wording
from cotune.shared.runs import RunFolder

BLANK = "to be filled by the controller"
AT = 0.01  # false positives at which an attacker's reach is given


@dataclass(frozen=True)
class Facts:
    """A published run.

    Attributes:
        claim: Its privacy claim.
        job: Its job.
        attack: Results of `cotune attack`; empty if none was run.
        rounds: How many rounds were joined.
    """

    claim: Mapping[str, Any]
    job: Job
    attack: Mapping[str, Any]
    rounds: int

    @property
    def guarantee(self) -> Mapping[str, Any]:
        """The promise in figures; empty if nothing is promised."""
        return self.claim["guarantee"] or {}

    @property
    def sites(self) -> str:
        """The sites that were charged, by name."""
        return ", ".join(site["id"] for site in self.claim["sites"])

    @property
    def unit(self) -> str:
        """Whom or what the figures are about, in a word."""
        return "person" if self.job.privacy.level == "unit" else "record"

    @property
    def base(self) -> str:
        """The base model's name, without a path."""
        return wording.model_name(self.claim["model"]["base"])

    @property
    def epsilon(self) -> str:
        """Rounded up."""
        return wording.epsilon(self.guarantee.get("epsilon"))

    @property
    def delta(self) -> str:
        """In short form."""
        return wording.delta(self.guarantee.get("delta"))

    @property
    def found(self) -> str:
        """How many of 100 used units an attack finds at most that wrongly accuses 1 of 100 unused ones."""
        curve = [(point[0], point[1]) for point in self.guarantee.get("tradeoff", [])]
        return str(wording.found_of_hundred(curve, AT))

    @property
    def training(self) -> str:
        """What was done, in a sentence."""
        job, sites = self.job, f"{len(self.claim['sites'])} sites ({self.sites})"
        sent = "an update" if job.privacy.level == "none" else "a clipped and noised update"
        return (
            f"A LoRA adapter of {self.base} was trained in {self.rounds} rounds at {sites}, task: {job.task.kind}."
            f" In each round a site took {job.train.local_steps} steps on its own records, each cut to"
            f" {job.model.max_length} tokens, and sent {sent}; no record itself left it."
        )

    @property
    def agreed(self) -> str:
        """The agreed, public size of a site; its true size is nobody's to know."""
        data = self.job.data
        persons = f" of {data.units_per_site:,} persons" if data.units_per_site else ""
        return f"{data.records_per_site:,} records{persons} a site (an agreed public number, not a count)"

    @property
    def measured(self) -> str:
        """What measured attacks came to, in a sentence."""
        if not self.attack:
            return "No attack was run on this model (cotune attack RUN)."
        bounds = [float(audit["epsilon_lower"]) for audit in self.attack["run"]["audit"]]
        most = f"; the largest lower bound of epsilon was {max(bounds):.2f}" if bounds else ""
        return f"Attacks were run; verdict: {self.attack['verdict']}{most}."


def read_facts(run: RunFolder) -> Facts:
    """The facts of a run.

    Raises:
        JobError: It published no claim (E-NO-CLAIM), or one that is none (E-CLAIM-FORM, E-CLAIM-VERSION).
    """
    path, results = run.privacy / "claim.json", run.attack / "results.json"
    if not path.exists():
        status = run.state()["status"]
        raise JobError("E-NO-CLAIM", f"{run.run_id} is {status}: it has no privacy claim", hint="cotune simulate JOB")
    rounds = {row["round"] for row in run.metrics() if row.get("site")}
    attack = json.loads(results.read_bytes()) if results.exists() else {}
    return Facts(read_claim(path.read_bytes()), run.job(), attack, len(rounds))
