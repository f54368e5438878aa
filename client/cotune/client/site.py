"""A site: the one door through which anything leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from cotune.client.data import SiteExamples
from cotune.client.guard import Guard
from cotune.client.policy import DatasetPolicy
from cotune.client.randomness import RandomStream, reproducible_stream, secure_stream
from cotune.client.training import Trainer
from cotune.shared.adapter import Vector, fingerprint, flat_sha256
from cotune.shared.errors import RefusedError
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.methods import initial_values, read, write
from cotune.shared.plan import RoundPlan, cotune_version
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.mechanism import Mechanism, mechanism_of
from cotune.shared.update import AdapterUpdate, UpdateHeader


class SiteData(Protocol):
    """Where a site's examples come from."""

    def load(self, job: Job, site: str, dataset: DatasetPolicy) -> SiteExamples:
        """The site's records as examples with their units."""
        ...


@dataclass(frozen=True, repr=False)
class Site:
    """A site in a simulation or behind its agent.

    Attributes:
        guard: The site's own say: policy, budget, ledger.
        data: Where its examples come from; asked only after the guard let the plan in.
        work: A private folder for what is kept between rounds; None keeps it in memory for the round.
    """

    guard: Guard
    data: SiteData
    work: Path | None

    @property
    def name(self) -> str:
        """The site's public name."""
        return self.guard.name

    def train(
        self, plan: RoundPlan, adapter: Vector, trainer: Trainer, progress: Callable[[int], None]
    ) -> AdapterUpdate:
        """Train one round and release the noised update.

        Guarantee: what is returned is a function of what `Trainer.train_round` gives away and of the plan; its
        cost for each unit of this site, by the mechanism's adjacency, is the event in the header and nothing
        more. That event is in the ledger, durably, before the first example is drawn, and stays there
        whatever happens next. An update is written down before it is sent; asked for the same round again,
        the site returns the very same bytes, which costs nothing.

        Edge cases: a plan that does not hold together, costs more than the job promises, or breaks a rule or
        the budget of the site is refused before any record is read; records the site's own check does not
        pass, before training, in words that tell outsiders nothing of them; a round that was reserved and
        lost in a crash is charged again, once, and then refused.

        Raises:
            RefusedError: The plan, the policy or the budget says no; the rule is named.
            StorageError: The ledger cannot be written, or is older than what this site has signed.
        """
        job = plan.job
        self._check(plan, adapter, trainer)
        dataset = self.guard.admit(plan, trainer.model_sha256)
        self._check_promise(job)
        kept = self.guard.kept(plan)
        if kept is not None:
            return kept
        with self.guard.data_errors(plan):
            data = self.data.load(job, self.name, dataset)
        self.guard.check_records(plan, dataset, rows=len(data.examples), units=data.units)
        mechanism = mechanism_of(job, plan.clipping_norm)
        self.guard.reserve(plan, dataset, mechanism.event(job.train.local_steps))
        return self.guard.release(plan, self._train(plan, adapter, trainer, data, mechanism, progress))

    def _train(
        self,
        plan: RoundPlan,
        adapter: Vector,
        trainer: Trainer,
        data: SiteExamples,
        mechanism: Mechanism,
        progress: Callable[[int], None],
    ) -> AdapterUpdate:
        """The update of a round that has been charged."""
        job = plan.job
        torch.set_num_threads(job.simulation.threads if job.simulation.threads != "auto" else 1)
        frozen = initial_values(trainer.layout, job.run.seed)
        write(trainer.network.adapted, {**frozen, **trainer.layout.unflatten(adapter)})
        features = Features(trainer.network, data.examples, self.work)
        result = trainer.train_round(plan.round, data, features, mechanism, self._stream(plan), progress)
        delta = trainer.layout.flatten(read(trainer.network.adapted)) - adapter
        header = UpdateHeader(
            site=self.name,
            round=plan.round,
            job_sha256=job.sha256(),
            base_sha256=plan.base_sha256,
            update_sha256=flat_sha256(delta),
            event=mechanism.event(job.train.local_steps).to_dict(),
            head=self.guard.home.ledger.head,
            clipping_norm=result.clipping_norm,
            train_loss=result.loss,
        )
        return AdapterUpdate(header, delta)

    def _stream(self, plan: RoundPlan) -> RandomStream:
        if plan.job.privacy.noise == "test":
            return reproducible_stream(plan.job.run.seed, self.name, plan.round)
        return secure_stream()

    def _check(self, plan: RoundPlan, adapter: Vector, trainer: Trainer) -> None:
        facts = {
            "cotune version": (plan.cotune, cotune_version()),
            "job": (plan.job.sha256(), trainer.job_sha256),
            "size": (str(trainer.layout.size), str(adapter.size)),
            "global adapter": (plan.base_sha256, flat_sha256(adapter)),
            "frozen part": (
                plan.frozen_sha256,
                fingerprint(initial_values(trainer.layout, plan.job.run.seed)),
            ),
        }
        for what, (said, found) in facts.items():
            if said != found:
                raise RefusedError("E-PLAN", f"{self.name}: the plan's {what} is {said}, here it is {found}")
        if plan.job.privacy.clipping != "adaptive" and plan.clipping_norm != plan.job.privacy.clipping_norm:
            raise RefusedError("E-PLAN", f"{self.name}: the plan's clipping norm is not the job's")

    def _check_promise(self, job: Job) -> None:
        """A job may not cost more than the epsilon it promises a unit, at all the sites the unit may be at."""
        if job.privacy.level == "none" or job.privacy.delta == "auto":
            return  # a policy lets neither pass, but for simulations that promise nothing
        cost = epsilon([mechanism_of(job).event(job.steps * job.data.sites_per_unit)], job.privacy.delta)
        if cost > job.privacy.epsilon:
            raise RefusedError(
                "E-BUDGET",
                f"{self.name}: this job costs epsilon {cost:.3f}, more than the {job.privacy.epsilon:g} it promises",
                param="privacy.noise_multiplier",
            )
