"""The round loop: select, reserve, ask, join, checkpoint, evaluate. It knows no transport."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cotune.server.checkpoint import Progress, load_checkpoint, save_checkpoint
from cotune.server.collecting import Collected, Collector, Received, require_enough
from cotune.server.evaluation import GlobalEvaluator
from cotune.server.fleet import Fleet, Request
from cotune.server.joining import Joined, Joiner
from cotune.server.personal import UNSCORED, save_personal, score_personal
from cotune.server.selection import select
from cotune.server.sending import Sending, sending
from cotune.server.spending import Spending
from cotune.server.spool import Spool
from cotune.server.trust import ON_FIRST_USE, Trust
from cotune.server.witness import Witness
from cotune.shared.adapter import Layout, Vector, fingerprint
from cotune.shared.aggregation import CONTROL
from cotune.shared.chain import read_chain, require_agreement, reserved
from cotune.shared.errors import CotuneError, RunFailed
from cotune.shared.files import storage_errors, write_atomic
from cotune.shared.folding import folded
from cotune.shared.job import Job
from cotune.shared.methods import initial_values
from cotune.shared.plan import LedgerRequest, RoundPlan, cotune_version
from cotune.shared.runs import RunFolder

if TYPE_CHECKING:
    from cotune.shared.evaluation import Evaluation


LEDGER_PASSES = 3


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to show.

    Attributes:
        arrays: The plain adapter by PEFT name.
        base: Scores before the first round; None without evaluation data.
        final: Scores of the adapter.
        personal: Scores of the sites' own adapters, by site; empty for rules that give them none.
        traffic: Site -> bytes (up, down).
        seconds: Of this process; an interrupted run took longer.
    """

    arrays: Mapping[str, Vector]
    base: Evaluation | None
    final: Evaluation | None
    personal: Mapping[str, Evaluation]
    traffic: Mapping[str, tuple[int, int]]
    seconds: float


class Coordinator:
    """Runs a job's rounds over a fleet, into a run folder."""

    def __init__(
        self,
        run: RunFolder,
        layout: Layout,
        config: Mapping[str, Any],
        evaluator: GlobalEvaluator,
        trust: Trust = ON_FIRST_USE,
    ) -> None:
        self._run = run
        self._job: Job = run.job()
        self._layout = layout
        self._config = config
        self._evaluator = evaluator
        self._spending = Spending(run, self._job)
        self._trust = trust
        self._witness = Witness(run.privacy / "heads.json", trust)
        self._joiner = Joiner(self._job, layout, evaluator.root_update)
        self._initial = initial_values(layout, self._job.run.seed)
        self._frozen_sha256 = fingerprint(self._initial)

    def run(self, fleet: Fleet) -> Outcome:
        """Run every round that is left and return the result.

        A run that was interrupted goes on from its newest checkpoint. Sites answer what they were asked before
        with the same bytes, so it ends as it would have without the interruption, and every round is charged once.

        Raises:
            RunFailed: Too few sites answered.
            CotuneError: Every site failed or refused for the same reason: that reason.
            StorageError: A checkpoint could not be written; earlier ones are whole.
        """
        started = time.monotonic()
        progress = load_checkpoint(self._run) or self._start()
        self._run.forget_metrics_after(progress.round)
        base = self._score(0, self._published(self._start()), full=True)
        if self._job.rule.personal and not progress.round:
            self._run.emit("evaluation", UNSCORED)
        if self._is_scored(progress.round):
            self._score(progress.round, self._published(progress), full=False)  # perhaps it had not come to that
        for number in range(progress.round + 1, self._job.run.rounds + 1):
            self._run.set_state("running", number)
            progress = self._round(number, progress, fleet)
            published = self._published(progress)
            save_checkpoint(self._run, progress, published, self._config)
            if self._is_scored(number):
                self._score(number, published, full=False)
        published = self._published(progress)
        final = self._score(progress.round, published, full=True)
        personal = score_personal(self._run, self._evaluator) if self._job.rule.personal else {}
        self._collect_ledgers(fleet)
        return Outcome(published, base, final, personal, progress.traffic, time.monotonic() - started)

    def _start(self) -> Progress:
        controls = {n + CONTROL: np.zeros_like(self._initial[n]) for n in self._layout.trained}
        arrays = {**self._initial, **(controls if self._job.train.scaffold else {})}
        return Progress(0, arrays, self._job.privacy.clipping_norm)

    def _published(self, progress: Progress) -> dict[str, Vector]:
        return folded(self._joiner.published(progress.arrays, progress.memory))

    def _round(self, number: int, progress: Progress, fleet: Fleet) -> Progress:
        job, available = self._job, fleet.sites()
        asked = select(job, number, available, self._spending.taken(number), progress.absent)
        if not asked:
            raise RunFailed("E-NO-SITE", f"round {number}: there is no site to ask", hint="cotune resume RUN")
        ranks = {job.rank_of(site) for site in asked}
        sent = {rank: sending(job, self._layout, progress.arrays, rank, number) for rank in sorted(ranks)}
        requests = self._requests(asked, available, progress, sent)
        self._spending.reserve(number, asked)
        ups, before = ({r: s.up for r, s in sent.items()}, {r: s.arrays for r, s in sent.items()})
        with Spool(self._run.path / ".spool", ups, before, job.aggregation.weights) as spool:
            sizes = {site: ups[job.rank_of(site)].size for site in asked}
            collector = Collector(self._run, requests, sizes, self._witness, spool)
            found = collector.collect(fleet, job.federation.quorum or len(asked))
            charges = {site: received.charges for site, received in found.received.items()}
            self._spending.answered(number, found.refused, charges)
            self._witness.save()
            self._record_sites(number, found.received)
            require_enough(found, job.federation.min_sites, number, self._run.run_id)
            joined = self._joiner.join(progress.arrays, progress.memory, spool, number)
            if job.rule.personal and number == job.run.rounds:
                save_personal(self._run, joined.arrays, spool, self._config, available)
        self._say(number, found, joined)
        return self._after(number, progress, found, joined)

    def _requests(
        self, asked: Sequence[str], available: Sequence[str], progress: Progress, sent: Mapping[int, Sending]
    ) -> dict[str, Request]:
        """What each site is asked in the round after `progress`."""
        requests: dict[str, Request] = {}
        for site in asked:
            rank = self._job.rank_of(site)
            plan = RoundPlan(
                run_id=self._run.run_id,
                cotune=cotune_version(),
                job=self._job,
                site=site,
                round=progress.round + 1,
                base_sha256=sent[rank].sha256,
                rank=rank,
                offset_rank=sent[rank].offset_rank,
                frozen_sha256=self._frozen_sha256,
                clipping_norm=progress.clipping_norm,
                heads=self._witness.heads_for(site, available),
                notice=progress.notices.get(site),
                signature=self._trust.signature,
            )
            requests[site] = Request(plan, sent[rank].payload)
        return requests

    def _after(self, number: int, progress: Progress, found: Collected, joined: Joined) -> Progress:
        norms = [received.clipping_norm for received in found.received.values() if received.clipping_norm]
        traffic = dict(progress.traffic)
        for site, received in found.received.items():
            up, down = traffic.get(site, (0, 0))
            traffic[site] = (up + received.bytes_up, down + received.bytes_down)
        answered = found.received.keys() | found.rejected.keys()
        told = {site: text for site, text in progress.notices.items() if site not in found.received}
        return replace(
            progress,
            round=number,
            arrays=joined.arrays,
            memory=joined.memory,
            clipping_norm=_moved(progress.clipping_norm, norms, self._job),
            traffic=traffic,
            absent=tuple(sorted({failure.site for failure in found.failures} | (set(progress.absent) - answered))),
            notices={**told, **{site: f"round {number}: {why}" for site, why in sorted(found.notices.items())}},
        )

    def _say(self, number: int, found: Collected, joined: Joined) -> None:
        facts = {"bias": joined.bias, "influence": joined.influence, "influence_bound": joined.influence_bound}
        self._run.emit(
            "round",
            f"round {number}: {len(found.received)} updates joined",
            round=number,
            admitted=len(found.received),
            rejected=sorted(found.rejected),
            **{name: value for name, value in facts.items() if value is not None and np.isfinite(value)},
        )

    def _collect_ledgers(self, fleet: Fleet) -> None:
        """Keep the ledger of every site that gave an update: what `cotune verify` recomputes epsilon from.

        It corrects the account where it is the chain whose heads the site signed in the run and has every round
        of which an update was admitted: no ledger of a site can take back what the run saw.
        """
        given: dict[str, set[int]] = {}
        for row in (row for row in self._run.metrics() if row.get("site")):
            given.setdefault(row["site"], set()).add(row["round"])
        for site, ledger in self._ledgers(fleet, given):
            with storage_errors(self._run.ledger(site)):
                self._run.ledger(site).parent.mkdir(exist_ok=True)
            write_atomic(self._run.ledger(site), ledger)
            try:
                entries = read_chain(ledger)
                for head in self._witness.heads_for(site, [site]):
                    require_agreement(head, entries)
                rounds = [int(entry.fields["round"]) for entry, _ in reserved(entries, run_id=self._run.run_id)]
            except (CotuneError, AttributeError, KeyError, TypeError, ValueError, OverflowError):
                rounds = []
            if site in given and given[site] <= set(rounds):
                self._spending.settle(site, rounds)
            else:
                self._run.emit("site", f"{site}: its ledger is not one chain of what it released", "warn", site=site)

    def _ledgers(self, fleet: Fleet, sites: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """The sites' ledgers as they come; who does not answer, as when a courier died, is asked again."""
        silent = set(sites)
        for _ in range(LEDGER_PASSES):
            requests = [LedgerRequest(run_id=self._run.run_id, site=site) for site in sorted(silent)]
            for site, ledger in fleet.ledgers(requests):
                silent.discard(site)
                yield site, ledger
            if not silent:
                return
        for site in sorted(silent):
            self._run.emit("privacy", f"{site}: its ledger did not come; the run will not verify", "warn", site=site)

    def _record_sites(self, number: int, received: Mapping[str, Received]) -> None:
        for site, figures in sorted(received.items()):
            self._run.record_metrics(
                round=number,
                site=site,
                epsilon=self._spending.epsilon(site),
                update_norm=figures.norm,
                train_loss=figures.train_loss,
                bytes_up=figures.bytes_up,
                bytes_down=figures.bytes_down,
                seconds=figures.seconds,
            )

    def _is_scored(self, number: int) -> bool:
        """Whether the adapter is scored between rounds; see `personal.UNSCORED`."""
        between = 0 < number < self._job.run.rounds
        return between and number % self._job.eval.every == 0 and not self._job.rule.personal

    def _score(self, number: int, arrays: Mapping[str, Vector], *, full: bool) -> Evaluation | None:
        if not self._evaluator.has_data:
            return None
        started = time.monotonic()
        self._run.emit("evaluation", f"scoring after round {number}", round=number)
        rows = [row for row in self._run.metrics() if row["round"] == number]
        known = any("site" not in row for row in rows)  # a resumed run says so only once
        if known and not full:
            return None
        result = self._evaluator.score(arrays, None if full else self._job.eval.limit)
        if known:
            return result
        self._run.record_metrics(
            round=number,
            valid_loss=result.loss,
            accuracy=result.accuracy,
            accuracy_low=result.accuracy_low,
            accuracy_high=result.accuracy_high,
            **({"accuracy_gap": result.groups["gap"]} if result.groups else {}),
            examples=result.examples,
            epsilon=max((row["epsilon"] for row in rows if row["epsilon"] is not None), default=None),
            bytes_up=sum(row["bytes_up"] for row in rows),
            bytes_down=sum(row["bytes_down"] for row in rows),
            seconds=round(time.monotonic() - started, 3),
        )
        return result


def _moved(norm: float, said: Sequence[float], job: Job) -> float:
    """The geometric mean of the clipping norms the sites say; each counts as no further than it can honestly get.

    A step moves the norm by a factor of exp(clipping_rate x (quantile - share below)), and a share is 0 to 1 but for
    its noise. What is cut off is noise, or a site that says anything.
    """
    most = job.privacy.clipping_rate * job.train.local_steps
    moves = [max(-most, min(most, math.log(other) - math.log(norm))) for other in said]
    return norm * math.exp(math.fsum(moves) / len(moves)) if moves else norm
