"""The round loop: reserve, ask, admit, aggregate, checkpoint, evaluate. It knows no transport."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, Protocol

from cotune.server.admission import reason_to_reject
from cotune.server.aggregation.mean import AGGREGATORS
from cotune.server.checkpoint import Progress, load_checkpoint, save_checkpoint
from cotune.server.evaluation import GlobalEvaluator
from cotune.server.spending import Spending
from cotune.server.witness import Witness
from cotune.shared.adapter import Layout, Vector, fingerprint, flat_sha256
from cotune.shared.errors import RefusedError, RunFailed, ended
from cotune.shared.files import storage_errors, write_atomic
from cotune.shared.job import Job
from cotune.shared.methods import initial_values
from cotune.shared.plan import LedgerRequest, RoundPlan, cotune_version
from cotune.shared.runs import RunFolder
from cotune.shared.update import AdapterUpdate, Answer, SiteFailure

if TYPE_CHECKING:
    from cotune.shared.evaluation import Evaluation


class Fleet(Protocol):
    """The sites, however they are reached."""

    def sites(self) -> Sequence[str]:
        """Names of the sites of this run, in order."""
        ...

    def ask(self, plans: Sequence[RoundPlan], adapter: Vector) -> Iterator[Answer]:
        """Send each site its plan; yield answers as they come, at most one a site."""
        ...

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        """Ask sites for their ledgers; yield those that come, by site."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to show."""

    arrays: Mapping[str, Vector]
    base: Evaluation | None
    final: Evaluation | None
    traffic: Mapping[str, tuple[int, int]]
    seconds: float


class Coordinator:
    """Runs a job's rounds over a fleet, into a run folder."""

    def __init__(self, run: RunFolder, layout: Layout, config: Mapping[str, Any], evaluator: GlobalEvaluator) -> None:
        self._run = run
        self._job: Job = run.job()
        self._layout = layout
        self._config = config
        self._evaluator = evaluator
        self._spending = Spending(run, self._job)
        self._witness = Witness(run.privacy / "heads.json")
        self._initial = initial_values(layout, self._job.run.seed)
        self._frozen_sha256 = fingerprint(self._initial)

    def run(self, fleet: Fleet) -> Outcome:
        """Run every round that is left and return the result.

        A run that was interrupted goes on from its newest checkpoint. A round that sites were asked for but
        that was never finished stays spent, so it counts as one of the job's rounds.

        Raises:
            RunFailed: Too few sites answered.
            CotuneError: Every site failed or refused for the same reason: that reason.
            StorageError: A checkpoint could not be written; earlier ones are whole.
        """
        started = time.monotonic()
        progress = load_checkpoint(self._run) or Progress(0, self._initial, self._job.privacy.clipping_norm)
        base = self._score(0, self._initial, full=True)
        left = self._spending.rounds_left(progress.round)
        for number in left:
            self._run.set_state("running", number)
            progress = self._round(number, progress, fleet)
            save_checkpoint(self._run, progress, self._config)
            if number % self._job.eval.every == 0 and number != left[-1]:
                self._score(number, progress.arrays, full=False)
        if not progress.round:
            raise RunFailed("E-NO-ROUND", "no round is left to take: interruptions have spent the whole budget")
        final = self._score(progress.round, progress.arrays, full=True)
        self._collect_ledgers(fleet)
        return Outcome(progress.arrays, base, final, progress.traffic, time.monotonic() - started)

    def _round(self, number: int, progress: Progress, fleet: Fleet) -> Progress:
        started = time.monotonic()
        flat = self._layout.flatten(progress.arrays)
        plans = self._plans(fleet.sites(), progress, flat)
        self._spending.reserve(number, plans)
        aggregate = AGGREGATORS[self._job.federation.aggregation]()
        traffic = dict(progress.traffic)
        norms: list[float] = []
        refusals: list[SiteFailure] = []
        seen: set[str] = set()
        for answer in fleet.ask(list(plans.values()), flat):
            if isinstance(answer, SiteFailure):
                refusals.append(answer)
                if answer.exit_code == RefusedError.exit_code:
                    self._spending.refused(number, answer.site)
                self._run.emit("site", f"{answer.site}: {answer.message}", "warn", failure=answer.model_dump())
            elif self._admit(answer, plans, number, seen):
                site = answer.header.site
                aggregate.add(site, answer.delta)
                norms += [answer.header.clipping_norm] if answer.header.clipping_norm else []
                down = int(flat.nbytes) + len(plans[site].model_dump_json())
                traffic[site] = _plus(traffic.get(site, (0, 0)), (answer.bytes, down))
                self._record_site(number, answer, down, time.monotonic() - started)
        admitted = len(seen)
        self._require(admitted, refusals, number)
        arrays = {**progress.arrays, **self._layout.unflatten(flat + aggregate.result())}
        self._run.emit("round", f"round {number}: {admitted} updates joined", round=number, admitted=admitted)
        norm = geometric_mean(norms) if norms else progress.clipping_norm
        return replace(progress, round=number, arrays=arrays, clipping_norm=norm, traffic=traffic)

    def _collect_ledgers(self, fleet: Fleet) -> None:
        """Keep the ledger of every site that gave an update: what `cotune verify` recomputes epsilon from."""
        sites = sorted({row["site"] for row in self._run.metrics() if row.get("site")})
        requests = [LedgerRequest(run_id=self._run.run_id, site=site) for site in sites]
        for site, ledger in fleet.ledgers(requests):
            with storage_errors(self._run.ledger(site)):
                self._run.ledger(site).parent.mkdir(exist_ok=True)
            write_atomic(self._run.ledger(site), ledger)

    def _plans(self, sites: Sequence[str], progress: Progress, flat: Vector) -> dict[str, RoundPlan]:
        """What each site is asked in the round after `progress`."""
        common = RoundPlan(
            run_id=self._run.run_id,
            cotune=cotune_version(),
            job=self._job,
            site=sites[0],
            round=progress.round + 1,
            base_sha256=flat_sha256(flat),
            frozen_sha256=self._frozen_sha256,
            clipping_norm=progress.clipping_norm,
        )
        return {
            site: common.model_copy(update={"site": site, "heads": self._witness.heads_for(site, sites)})
            for site in sites
        }

    def _admit(self, update: AdapterUpdate, plans: Mapping[str, RoundPlan], number: int, seen: set[str]) -> bool:
        """Whether an answer counts; the sites whose answer does are collected in `seen`."""
        site = update.header.site
        plan = plans.get(site)
        reason = "nobody asked it" if plan is None else reason_to_reject(update, plan, self._layout.size)
        if site in seen:
            reason = "it has answered already"
        reason = reason or self._witness.keep(update.header)
        if reason is None:
            seen.add(site)
        else:
            self._run.emit("site", f"{site}: update rejected: {reason}", "warn", site=site, round=number)
        return reason is None

    def _require(self, admitted: int, refusals: Sequence[SiteFailure], number: int) -> None:
        if admitted >= max(1, self._job.federation.min_sites):
            return
        if not admitted and len({(refusal.code, refusal.exit_code) for refusal in refusals}) == 1:
            raise ended(refusals[0].code, refusals[0].message, refusals[0].exit_code)
        reasons = "; ".join(f"{refusal.site}: {refusal.message}" for refusal in refusals[:3])
        raise RunFailed(
            "E-MIN-SITES",
            f"round {number}: {admitted} of at least {self._job.federation.min_sites} sites gave an update. {reasons}",
            param="federation.min_sites",
            hint=f"mend the sites, then: cotune simulate --resume {self._run.run_id}",
        )

    def _record_site(self, number: int, update: AdapterUpdate, down: int, seconds: float) -> None:
        self._run.record_metrics(
            round=number,
            site=update.header.site,
            epsilon=self._spending.epsilon(update.header.site),
            update_norm=update.norm,
            train_loss=update.header.train_loss,
            bytes_up=update.bytes,
            bytes_down=down,
            seconds=round(seconds, 3),
        )

    def _score(self, number: int, arrays: Mapping[str, Vector], *, full: bool) -> Evaluation | None:
        if not self._evaluator.has_data:
            return None
        started = time.monotonic()
        self._run.emit("evaluation", f"scoring after round {number}", round=number)
        result = self._evaluator.score(arrays, None if full else self._job.eval.limit)
        rows = [row for row in self._run.metrics() if row["round"] == number]
        if any("site" not in row for row in rows):
            return result  # a resumed run scores its base again, and says so only once
        self._run.record_metrics(
            round=number,
            valid_loss=result.loss,
            accuracy=result.accuracy,
            accuracy_low=result.accuracy_low,
            accuracy_high=result.accuracy_high,
            examples=result.examples,
            epsilon=max((row["epsilon"] for row in rows if row["epsilon"] is not None), default=None),
            bytes_up=sum(row["bytes_up"] for row in rows),
            bytes_down=sum(row["bytes_down"] for row in rows),
            seconds=round(time.monotonic() - started, 3),
        )
        return result


def _plus(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]
