"""Before the first round: every site is shown the job and says yes, or is left out by name."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime

from cotune.server.deployed import Proposing
from cotune.server.trust import Trust
from cotune.shared.errors import RefusedError, StorageError, TimedOut
from cotune.shared.files import write_json
from cotune.shared.proposal import JobStanding, Proposal
from cotune.shared.runs import OVER, RunFolder
from cotune.shared.signing import verify
from cotune.shared.update import SiteFailure

PASS_S = 30.0  # that one answer is waited for, before all are asked anew
PAUSE_S = 5.0
SETTLED = ("denied", "refused")


class Approval:
    """The sites' signed answers to one job, in the run's `privacy/approvals.json`.

    Guarantee: a site counts as having approved only by a standing for this run and this job that is signed with
    the key it is enrolled with.

    Edge cases: time runs on over restarts of this process. What a site approved it is not asked again, also when
    the run goes on after a crash: it will refuse its plan if it has thought better of it. A site that denied or
    refused is asked again while others are waited for, since its administrator may mend that.

    Args:
        run: Whose events say who waits and who refused.
        proposals: Site -> what it is shown.
        trust: Knows the sites' keys.
    """

    def __init__(self, run: RunFolder, proposals: Mapping[str, Proposal], trust: Trust) -> None:
        self._run, self._proposals, self._trust = run, proposals, trust
        self._path = run.privacy / "approvals.json"
        self._standings = self._kept()
        self._said: dict[str, str] = {}
        self._turned_away: set[str] = set()

    def obtain(self, fleet: Proposing) -> list[str]:
        """Ask until every site has answered or time is over; the sites that approved.

        Raises:
            RefusedError: E-NOT-APPROVED: so many say no that too few are left.
            TimedOut: E-APPROVAL-TIMEOUT: too few have approved in time.
        """
        settings = self._run.job().federation
        deadline = time.monotonic() + settings.approval_timeout_s - self._waited_s()
        while True:
            asked = [self._proposals[site] for site in sorted(self._proposals) if not self._has("approved", site)]
            patience = min(PASS_S, max(0.0, deadline - time.monotonic()))
            for answer in fleet.propose(asked, patience):
                self._take(answer)
            self._require_possible(settings.min_sites)
            waiting = [site for site in self._proposals if not self._has("approved", site) and not self._against(site)]
            if not waiting or time.monotonic() >= deadline:
                return self._outcome(settings.min_sites, waiting)
            self._pause(deadline)

    def _waited_s(self) -> float:
        """For how long processes before this one waited for sites, since the run was last begun by hand."""
        since = None
        for event in self._run.events():
            status = event["data"].get("status") if event["type"] == "status" else None
            if status == "awaiting_approval":
                since = since or datetime.fromisoformat(event["created_at"])
            elif status in OVER:
                since = None
        return max(0.0, (datetime.now(UTC) - since).total_seconds()) if since else 0.0

    def _outcome(self, least: int, waiting: list[str]) -> list[str]:
        approved = [site for site in sorted(self._proposals) if self._has("approved", site)]
        if len(approved) < max(1, least):
            raise TimedOut(
                "E-APPROVAL-TIMEOUT",
                f"{len(approved)} of at least {max(1, least)} sites approved in time; waited for: {', '.join(waiting)}",
                param="federation.approval_timeout_s",
                hint=f"ask the sites, then: cotune resume {self._run.run_id}",
            )
        self._run.emit("approval", f"{len(approved)} sites take part: {', '.join(approved)}", sites=approved)
        return approved

    def _pause(self, deadline: float) -> None:
        until = min(deadline, time.monotonic() + PAUSE_S)
        while time.monotonic() < until:
            self._run.require_wanted()
            time.sleep(min(0.5, max(0.0, until - time.monotonic())))

    def _take(self, answer: JobStanding | SiteFailure) -> None:
        if isinstance(answer, JobStanding) and not self._is_genuine(answer):
            answer = SiteFailure(site=answer.site, code="E-STANDING", message="its answer is not signed by its own key")
        refused = isinstance(answer, SiteFailure) and answer.exit_code == RefusedError.exit_code
        (self._turned_away.add if refused else self._turned_away.discard)(answer.site)
        if isinstance(answer, JobStanding):
            self._standings[answer.site] = answer
            write_json(self._path, {s: said.model_dump() for s, said in sorted(self._standings.items())})
            by = f" by rule {answer.rule}: {answer.text}" if answer.rule else ""
            self._say(answer.site, answer.state, f"{answer.state}{by}")
        else:
            self._say(answer.site, "silent", f"{answer.message} ({answer.code})")

    def _say(self, site: str, state: str, text: str) -> None:
        """One event for each thing a site has to say, however often it says it."""
        if self._said.get(site) != text:
            self._said[site] = text
            level = "info" if state in ("approved", "waiting") else "warn"
            self._run.emit("approval", f"{site}: {text}", level, site=site, state=state)

    def _is_genuine(self, standing: JobStanding) -> bool:
        proposal = self._proposals.get(standing.site)
        key = self._trust.key_of(standing.site)
        return (
            proposal is not None
            and key is not None
            and (standing.run_id, standing.job_sha256) == (proposal.run_id, proposal.job.sha256())
            and verify(key, "cotune-standing", standing.message(), standing.signature)
        )

    def _has(self, state: str, site: str) -> bool:
        return site in self._standings and self._standings[site].state == state

    def _against(self, site: str) -> bool:
        return site in self._turned_away or any(self._has(state, site) for state in SETTLED)

    def _require_possible(self, least: int) -> None:
        against = [site for site in sorted(self._proposals) if self._against(site)]
        if len(self._proposals) - len(against) >= max(1, least):
            return
        words = [f"{site}: {self._said[site]}" for site in against]
        raise RefusedError(
            "E-NOT-APPROVED",
            f"{len(against)} of {len(self._proposals)} sites said no, at least {max(1, least)} must take part."
            f" {'; '.join(words[:3])}",
            param="federation.min_sites",
            hint=f"mend the job and submit it anew, or let the sites think again: cotune resume {self._run.run_id}",
        )

    def _kept(self) -> dict[str, JobStanding]:
        """What was approved before this process began; anything else is asked for again."""
        if not self._path.exists():
            return {}
        try:
            known = json.loads(self._path.read_bytes())
            standings = [JobStanding.model_validate(said) for said in known.values()]
        except (OSError, ValueError, AttributeError):
            raise StorageError("E-APPROVALS", f"{self._path}: cannot be read", hint="remove it, and resume") from None
        return {said.site: said for said in standings if said.state == "approved" and self._is_genuine(said)}
