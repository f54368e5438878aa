"""The jobs a site was asked to take part in, and what it said to each. Jobs are files; decisions are ledger entries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cotune.client.ledger import Ledger
from cotune.shared.errors import JobError
from cotune.shared.files import append_line, read_lines, write_atomic
from cotune.shared.job import Job
from cotune.shared.jobfile import parse_job

MAX_UNDECIDED = 200
MAX_JOB_BYTES = 1_000_000
PRIVATE_RULE = "records"
UNUSED = "update not used"
State = Literal["waiting", "approved", "denied", "refused"]
_STATES: dict[str, State] = {
    "job.received": "waiting", "job.refused": "refused", "job.approved": "approved", "job.denied": "denied",
}  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """Where a job stands.

    Attributes:
        state: Approved or denied if a decision was ever taken, the newest counts; else refused or waiting.
        rules: Rules that refused it, each once.
        outdated: Whether the administrator approved it for another version of the data: it waits again.
    """

    state: State
    rules: tuple[str, ...] = ()
    outdated: bool = False


@dataclass(frozen=True, repr=False)
class Decisions:
    """A site's jobs.

    Attributes:
        folder: One file a job, named by its SHA-256.
        ledger: Where it stands what was said to it.
    """

    folder: Path
    ledger: Ledger

    def standings(self) -> dict[str, Standing]:
        """Every job by its SHA-256, in the order in which they came.

        Edge cases: a data set's new file takes back what the administrator approved for the old one; what the
        policy approves by itself, and what was denied, stays.
        """
        found: dict[str, Standing] = {}
        by_admin: set[str] = set()
        for entry in self.ledger.entries:
            if entry.action == "data.change":
                found |= {sha256: self._outdated(sha256, found[sha256], entry.fields["dataset"]) for sha256 in by_admin}
            state = _STATES.get(entry.action)
            if state is None:
                continue
            sha256 = entry.fields["job_sha256"]
            before = found.get(sha256, Standing("waiting"))
            rules = (*before.rules, entry.fields["rule"]) if state == "refused" else before.rules
            if state in ("approved", "denied"):
                found[sha256] = Standing(state, rules)
                (by_admin.add if entry.fields["by"] == "admin" else by_admin.discard)(sha256)
            else:
                decided = before.outdated or before.state in ("approved", "denied")
                found[sha256] = Standing(before.state if decided else state, rules, before.outdated)
        return found

    def _outdated(self, sha256: str, standing: Standing, dataset: str) -> Standing:
        try:
            named = self.job(sha256).data.dataset
        except JobError:  # then it may be about any
            named = None
        if standing.state != "approved" or named not in (None, dataset):
            return standing
        return Standing("waiting", standing.rules, outdated=True)

    def receive(self, job: Job, *, come: bool = True) -> bool:
        """Keep a job that is not known yet.

        Edge cases: beyond 200 jobs that nobody decided on, and for a job beyond 1 MB, nothing is kept: a flood
        fills neither disk nor ledger.

        Args:
            job: The resolved job.
            come: Whether it is to be logged as received; False for one the administrator brings.

        Returns:
            Whether the job is kept here, now or before.
        """
        sha256, content = job.sha256(), job.to_json().encode()
        standings = self.standings()
        if sha256 in standings:
            return True
        undecided = sum(each.state in ("waiting", "refused") for each in standings.values())
        if come and (undecided >= MAX_UNDECIDED or len(content) > MAX_JOB_BYTES):
            return False
        write_atomic(self.folder / f"{sha256}.json", content)
        if come:
            self.ledger.append("job.received", job_sha256=sha256)
        return True

    def refuse(self, job: Job, rule: str, text: str) -> None:
        """Log that a rule refused a job: once for each job and rule, however often it is asked."""
        sha256 = job.sha256()
        if self.receive(job) and rule not in self.standings()[sha256].rules:
            self.ledger.append("job.refused", job_sha256=sha256, rule=rule, text=text)

    def refuse_privately(self, job: Job, rule: str, text: str) -> None:
        """Log that a check of the site's own records refused a job.

        The ledger, which others may get to see, only has that; why is in a file that never leaves the home.
        """
        self.refuse(job, PRIVATE_RULE, "a check of the site's own records")
        line = {"job_sha256": job.sha256(), "rule": rule, "text": text}
        if line["job_sha256"] in self.standings() and line not in self.own_lines():
            append_line(self.folder / "own.jsonl", line)

    def note_unused(self, job: Job, text: str) -> None:
        """Note why the coordinator did not use an update of this site; at most as often as the job has rounds."""
        line, lines = {"job_sha256": job.sha256(), "rule": UNUSED, "text": text}, self.own_lines()
        noted = sum(known["rule"] == UNUSED and known["job_sha256"] == line["job_sha256"] for known in lines)
        if line not in lines and noted < job.run.rounds:
            append_line(self.folder / "own.jsonl", line)

    def own_lines(self) -> list[dict[str, str]]:
        """Why checks of the site's own records refused jobs, and why updates were not used."""
        return read_lines(self.folder / "own.jsonl")

    def approve(self, job: Job, by: Literal["admin", "policy"]) -> None:
        """Let a job run, within the policy."""
        self.receive(job, come=False)
        self.ledger.append("job.approved", job_sha256=job.sha256(), by=by)

    def deny(self, sha256: str, reason: str) -> None:
        """Keep a job from running; also one that was approved before."""
        self.ledger.append("job.denied", job_sha256=sha256, by="admin", reason=reason)

    def find(self, prefix: str) -> str:
        """The one known job whose SHA-256 begins so.

        Raises:
            JobError: None or several do.
        """
        found = [sha256 for sha256 in self.standings() if prefix and sha256.startswith(prefix.lower())]
        if len(found) != 1:
            count = "none" if not found else str(len(found))
            raise JobError(
                "E-JOB-UNKNOWN",
                f"expected one job whose hash begins with {prefix!a}, found {count}",
                param="JOB",
                hint="cotune site jobs",
            )
        return found[0]

    def job(self, sha256: str) -> Job:
        """A known job.

        Raises:
            JobError: Its file is gone or is not that job.
        """
        path = self.folder / f"{sha256}.json"
        try:
            job = parse_job(json.loads(path.read_bytes()), origin=path.name)
        except (OSError, ValueError):
            job = None
        if job is None or job.sha256() != sha256:
            raise JobError("E-JOB-FILE", f"{path}: expected job {sha256[:12]}, found none or another")
        return job
