"""The site's own say: nothing is read, charged or released but by its policy, budget and ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from cotune.client.budget import account
from cotune.client.coordinators import joined_keys
from cotune.client.home import SiteHome
from cotune.client.policy import DatasetPolicy, Policy
from cotune.client.rules import BUDGET_RULES, RULES, Refusal, Request, first_refusal, over_round, unknown_dataset
from cotune.shared.adapter import Vector
from cotune.shared.chain import Entry, SignedHead, of_round, reserved
from cotune.shared.errors import DataError, RefusedError
from cotune.shared.plan import RoundPlan
from cotune.shared.privacy.event import Event
from cotune.shared.update import MAX_CHARGES, AdapterUpdate


@dataclass(frozen=True, repr=False)
class Guard:
    """What a site asks before, while and after it trains a round.

    Guarantee: once `admit`, `check_records` and `reserve` have returned, in this order, the job breaks no rule
    of the policy, the round's event is in the ledger, and everything the ledger holds for the data set costs
    at most its budget. An update leaves by `release` or `kept` alone, and a round gives one.

    Edge cases: a refusal is logged once for each job and rule, so that a flood of requests fills no disk; one
    that depends on records tells nobody else which check failed.
    """

    home: SiteHome

    @property
    def name(self) -> str:
        """The site's public name."""
        return self.home.name

    def admit(self, plan: RoundPlan, model_sha256: str | None) -> DatasetPolicy:
        """Everything that is decided without a record: heads, rules, approval, the budget of the whole run.

        Guarantee: a run gets its first round only if all its rounds fit into the budgets; later `reserve` checks each.

        Edge cases: a ledger behind a head this site once signed stops everything; a plan that is for another
        site, or that goes on with a run of another job, is refused; so is a job whose data set got another file
        after the administrator approved it, also in the middle of its run, until it is approved again.

        Args:
            plan: What is asked.
            model_sha256: Of the base model that was located here, whatever the job says of it; None before it is
                looked for, which decides all but allow.models.

        Raises:
            RefusedError: E-POLICY, E-BUDGET, E-APPROVAL or E-PLAN; a rule is named.
            StorageError: The ledger is older than a head that came with the plan, or cannot be written.
        """
        self.home.refresh()
        for head in plan.heads:
            if head.site == self.name:
                self.home.ledger.check(head)
        self.home.peers.keep(head for head in plan.heads if head.site != self.name)
        self._require_consistent(plan)
        policy = self.home.policy
        dataset = policy.find(plan.job.data.dataset)
        if dataset is None:
            raise self._refused(plan, unknown_dataset(policy, plan.job.data.dataset))
        request = self._request(plan, dataset, model_sha256)
        self._apply(plan, first_refusal(RULES, policy, dataset, request))
        self._require_approval(plan, policy)
        if plan.run_id not in request.account.runs:
            self._apply(plan, first_refusal(BUDGET_RULES, policy, dataset, request))
        if plan.notice and request.account.runs.get(plan.run_id):
            self.home.jobs.note_unused(plan.job, plan.notice)
        if not self.home.is_simulated:
            with self.data_errors(plan):
                self.home.files.note(dataset)
            self._require_approval(plan, policy)  # a new file takes back approvals of the old one
        return dataset

    @contextlib.contextmanager
    def data_errors(self, plan: RoundPlan) -> Generator[None]:
        """Records are read in here. What is wrong with them goes into the site's own log, and to nobody else.

        Guarantee: whoever sees the refusal learns that some check of the records failed, and no more.

        Edge cases: errors of the disk or of the ledger pass unchanged; they depend on no record.

        Raises:
            RefusedError: E-SITE-DATA, whatever the fault was.
        """
        try:
            yield
        except (DataError, RefusedError) as error:
            self.home.jobs.refuse_privately(plan.job, error.param or error.code, error.message)
            raise RefusedError(
                "E-SITE-DATA",
                f"{self.name}: the site's own check of its records failed; its log says why",
                hint="cotune site log",
            ) from None

    def check_records(self, plan: RoundPlan, dataset: DatasetPolicy, *, rows: int, units: int) -> None:
        """What policy and job ask of the records themselves; public numbers are in the plan.

        Guarantee: as for `data_errors`.

        Edge cases: no record at all; fewer than `require.min_records`; so many units that the job's delta
        lets one of them be published whole (delta times units at least 1).

        Raises:
            RefusedError: E-SITE-DATA.
        """
        delta, least = plan.job.privacy.delta, max(1, self.home.policy.require.min_records)
        with self.data_errors(plan):
            if rows < least:
                raise DataError(
                    "E-SITE-FEW", f"`{dataset.id}` has fewer than {least:,} records", param="require.min_records"
                )
            if plan.job.privacy.level != "none" and delta != "auto" and delta * units >= 1:
                what = f"privacy.delta = {delta:g} is not below 1 over the units of `{dataset.id}`"
                raise DataError("E-DELTA", f"{what}: one of them could be published whole", param="require.delta")

    def reserve(self, plan: RoundPlan, dataset: DatasetPolicy, event: Event) -> SignedHead:
        """Charge a round, before it is trained.

        Guarantee: once this returns, the event is in the ledger for ever, and with it the run and the data set
        are within their budgets; check and entry are one step, whatever other processes do meanwhile.

        Edge cases: a round that was charged and then lost is charged again, once; a round that gave its
        update is never trained again. On an error nothing may be trained, while the charge may stand.

        Raises:
            RefusedError: E-BUDGET, E-PLAN, E-ROUND-DONE or E-ROUND-LOST.
            StorageError: The ledger could not be written.
        """

        def rule(entries: Sequence[Entry]) -> None:
            self._check_round(plan, entries)
            if self.home.is_simulated and plan.job.privacy.level == "none":
                return
            refusal = over_round(account(entries, dataset), plan.run_id, event)
            if refusal:
                raise refusal.error(self.name)

        try:
            return self.home.ledger.reserve(
                dataset=dataset.id,
                unit=dataset.unit,
                run_id=plan.run_id,
                job_sha256=plan.job.sha256(),
                round_number=plan.round,
                event=event,
                rule=rule,
            )
        except RefusedError as error:
            if error.param:
                self.home.jobs.refuse(plan.job, error.param, error.message)
            raise

    def release(self, plan: RoundPlan, update: AdapterUpdate, memory: Mapping[str, Vector]) -> AdapterUpdate:
        """Write an update down, then commit its round; what comes back, signed, may be sent.

        Guarantee: an update is on disk before its round is committed, and committed before it is sent. So
        whoever asks again gets the same numbers, and a round never gives two updates.

        Edge cases: after a crash between the two steps, `kept` commits what was written; of two processes
        that trained one round, both return the update of the faster one.

        Raises:
            RefusedError: The round was never charged, or gave another update that is gone (E-ROUND-DONE).
            StorageError: The disk failed; nothing may be sent.
        """
        if self.home.updates.write(plan.run_id, plan.round, update, memory):
            self._commit(plan, update.header.update_sha256)
            return self._signed(plan, update)
        faster = self.kept(plan)
        if faster is None:
            raise RefusedError("E-ROUND-DONE", f"{self._round(plan)} gave another update already")
        return faster

    def kept(self, plan: RoundPlan) -> AdapterUpdate | None:
        """The update this round gave already; None if it has to be trained.

        Guarantee: its numbers are those of the round's one update, so asking again costs nothing; only the
        ledger heads in its header are today's.

        Edge cases: None for a round that was never charged, or whose update is gone, damaged, or was written
        but never sent and is for another global adapter.

        Raises:
            RefusedError: It was sent, and was for another global adapter or job (E-ROUND-BASE).
        """
        updates, ledger = self.home.updates, self.home.ledger
        update = updates.read(plan.run_id, plan.round)
        if update is None or not ledger.rounds(plan.run_id, plan.round):
            return None
        committed, header = ledger.committed(plan.run_id, plan.round), update.header
        if committed not in (None, header.update_sha256):
            return None
        if (header.job_sha256, header.base_sha256) != (plan.job.sha256(), plan.base_sha256):
            if committed is None:
                updates.path(plan.run_id, plan.round).unlink(missing_ok=True)
                return None
            raise RefusedError(
                "E-ROUND-BASE", f"{self._round(plan)} was trained from another global adapter, and gives one update"
            )
        self._commit(plan, header.update_sha256)
        return self._signed(plan, update)

    def _commit(self, plan: RoundPlan, update_sha256: str) -> None:
        ledger = self.home.ledger
        if ledger.committed(plan.run_id, plan.round) == update_sha256:
            return
        try:
            ledger.commit(run_id=plan.run_id, round_number=plan.round, update_sha256=update_sha256)
        except RefusedError:
            if ledger.committed(plan.run_id, plan.round) != update_sha256:  # another process had the same one
                raise

    def _signed(self, plan: RoundPlan, update: AdapterUpdate) -> AdapterUpdate:
        """The update with this site's newest head, and the newest it holds of the sites its plan named, signed."""
        named = {head.site for head in plan.heads} - {self.name}
        held = self.home.peers.heads()
        witnessed = tuple(held[site] for site in sorted(named & held.keys()))
        charges = len(self.home.ledger.rounds(plan.run_id, plan.round))
        said = {"head": self.home.ledger.head, "witnessed": witnessed, "charges": charges, "signature": ""}
        header = update.header.model_copy(update=said)
        signature = self.home.ledger.sign("cotune-update", header.message())
        return AdapterUpdate(header.model_copy(update={"signature": signature}), update.payload)

    def _request(self, plan: RoundPlan, dataset: DatasetPolicy, model_sha256: str | None) -> Request:
        return Request(
            job=plan.job,
            rounds=min(plan.job.run.rounds - plan.round + 1, plan.job.rounds_per_site),
            model_sha256=model_sha256,
            signature=plan.signature,
            account=account(self.home.ledger.entries, dataset),
            coordinators=joined_keys(self.home.ledger.entries),
        )

    def _require_consistent(self, plan: RoundPlan) -> None:
        if plan.site != self.name:
            raise RefusedError("E-PLAN", f"{self.name}: the plan is for {plan.site}")
        if not 1 <= plan.round <= plan.job.run.rounds:
            raise RefusedError("E-PLAN", f"{self._round(plan)} is outside the job's {plan.job.run.rounds}")
        charged = reserved(self.home.ledger.entries, run_id=plan.run_id)
        if any(entry.fields["job_sha256"] != plan.job.sha256() for entry, _ in charged):
            raise RefusedError("E-PLAN", f"{self.name}: {plan.run_id} is the run of another job")
        if plan.rank != plan.job.rank_of(self.name):
            raise RefusedError("E-PLAN", f"{self.name}: the plan's rank is not the job's for this site")
        if plan.offset_rank and not plan.job.rule.offset:
            raise RefusedError("E-PLAN", f"{self.name}: the plan adds to the base weights, the job's rule does not")
        self._require_turn(plan, self.home.ledger.entries)

    def _require_turn(self, plan: RoundPlan, entries: Sequence[Entry]) -> None:
        most = plan.job.rounds_per_site
        taken = {entry.fields["round"] for entry, _ in reserved(entries, run_id=plan.run_id)} - {plan.round}
        if len(taken) >= most:
            raise RefusedError("E-PLAN", f"{self.name}: took part in {most} rounds, the most the job lets a site")

    def _require_approval(self, plan: RoundPlan, policy: Policy) -> None:
        sha256 = plan.job.sha256()
        standing = self.home.jobs.standings().get(sha256)
        state = standing.state if standing else "waiting"
        if state == "approved":
            return
        if state != "denied" and policy.approve.mode == "auto-within-policy":
            self.home.jobs.approve(plan.job, by="policy")
            return
        kept = self.home.jobs.receive(plan.job)
        waits = "waits for approval" if kept else "was not kept: too many jobs wait already"
        raise RefusedError(
            "E-APPROVAL",
            f"{self.name}: rule approve.mode: job {sha256[:12]} {'was denied' if state == 'denied' else waits}",
            param="approve.mode",
            hint=f"cotune site approve {sha256[:12]}",
        )

    def _check_round(self, plan: RoundPlan, entries: Sequence[Entry]) -> None:
        if of_round(entries, "budget.commit", plan.run_id, plan.round):
            raise RefusedError("E-ROUND-DONE", f"{self._round(plan)} gave its update already")
        if len(of_round(entries, "budget.reserve", plan.run_id, plan.round)) >= MAX_CHARGES:
            raise RefusedError("E-ROUND-LOST", f"{self._round(plan)} was lost {MAX_CHARGES} times")
        self._require_turn(plan, entries)

    def _round(self, plan: RoundPlan) -> str:
        return f"{self.name}: round {plan.round} of {plan.run_id}"

    def _apply(self, plan: RoundPlan, refusal: Refusal | None) -> None:
        if refusal:
            raise self._refused(plan, refusal)

    def _refused(self, plan: RoundPlan, refusal: Refusal) -> RefusedError:
        self.home.jobs.refuse(plan.job, refusal.rule, refusal.text)
        return refusal.error(self.name)
