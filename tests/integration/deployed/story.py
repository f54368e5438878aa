"""What the slow tests of deployment share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.integration.deployed.federation import Federation, await_until
from tests.integration.deployed.study import write_job

from cotune.shared.jobfile import load_job
from cotune.shared.runs import RunFolder


@dataclass
class Story:
    """The federation, and what is known of it.

    Attributes:
        folder: Of everything.
        made: The federation.
        job: Over its three sites.
        expected: The adapter that the simulation of the job ends with.
        wiretap: All that passed between sites and gateway, in clear.
        first: The first run, which nothing disturbed.
    """

    folder: Path
    made: Federation
    job: Path
    expected: bytes
    wiretap: Path
    first: RunFolder | None = None

    def alone(self, name: str, seed: int = 3) -> Path:
        """A job over site-4 alone."""
        records = {"site-4": self.folder / "records" / "site-4.jsonl"}
        model = Path(load_job(self.job).model.base)
        return write_job(self.folder / name, model, records, run={"name": name, "seed": seed, "rounds": 3})

    def await_round(self, run: RunFolder) -> None:
        """Wait until a run has finished a round."""

        def is_there() -> bool:
            return any(event["type"] == "round" for event in run.events()) or run.state()["status"] == "failed"

        await_until(is_there, "no round was finished", 600, self.made)
