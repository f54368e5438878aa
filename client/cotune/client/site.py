"""A site: the one door through which anything leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from cotune.client.randomness import RandomStream, reproducible_stream, secure_stream
from cotune.client.training import Trainer
from cotune.shared.adapter import Vector, fingerprint, flat_sha256
from cotune.shared.errors import DataError, PrivacyError, RefusedError
from cotune.shared.examples import Example
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.methods import initial_values, read, write
from cotune.shared.plan import RoundPlan, cotune_version
from cotune.shared.privacy.accounting import MIN_NOISE_MULTIPLIER, epsilon
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.update import AdapterUpdate, UpdateHeader


class SiteData(Protocol):
    """Where a site's examples come from."""

    def examples(self, job: Job, site: str) -> list[Example]:
        """The site's records as examples."""
        ...


@dataclass(frozen=True, repr=False)
class Site:
    """A site in a simulation or behind its agent.

    Attributes:
        name: Its public name.
        data: Where its examples come from; asked only after the plan was checked.
        work: A private folder for what is kept between rounds; None keeps it in memory for the round.
    """

    name: str
    data: SiteData
    work: Path | None

    def train(
        self, plan: RoundPlan, adapter: Vector, trainer: Trainer, progress: Callable[[int], None]
    ) -> AdapterUpdate:
        """Train one round and release the noised update.

        Guarantee: what is returned is a function of `Trainer.train_round`'s adapter and the plan; its cost
        for each record of this site, add-or-remove-one, is the event in the header and nothing more.

        Edge cases: a plan that asks for more than the job's own epsilon over all rounds, or that starts from
        another model than it says, is refused before any record is read; a delta that lets one of this
        site's records leak whole, before training; a site without records is an error, not an update.

        Raises:
            RefusedError: The plan does not hold together, or asks for too much.
            DataError: The site has no valid record.
        """
        job = plan.job
        self._check(plan, adapter, trainer)
        examples = self.data.examples(job, self.name)
        self._check_records(len(examples), job)
        torch.set_num_threads(job.simulation.threads if job.simulation.threads != "auto" else 1)
        mechanism = mechanism_of(job)
        frozen = initial_values(trainer.layout, job.run.seed)
        write(trainer.network.adapted, {**frozen, **trainer.layout.unflatten(adapter)})
        features = Features(trainer.network, examples, self.work)
        trainer.train_round(plan.round, examples, features, mechanism, self._stream(plan), progress)
        delta = trainer.layout.flatten(read(trainer.network.adapted)) - adapter
        header = UpdateHeader(
            site=self.name,
            round=plan.round,
            job_sha256=job.sha256(),
            base_sha256=plan.base_sha256,
            update_sha256=flat_sha256(delta),
            event=mechanism.event(job.train.local_steps).to_dict(),
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
            "site": (plan.site, self.name),
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
        if not 1 <= plan.round <= plan.job.run.rounds:
            raise RefusedError("E-PLAN", f"{self.name}: round {plan.round} is outside the job's {plan.job.run.rounds}")
        if plan.job.privacy.level != "none":
            self._check_budget(plan.job)

    def _check_budget(self, job: Job) -> None:
        delta = job.privacy.delta
        if delta == "auto":
            raise PrivacyError("E-UNRESOLVED", "privacy.delta is still `auto`: resolve the job first")
        mechanism = mechanism_of(job)
        if mechanism.noise_multiplier < MIN_NOISE_MULTIPLIER:
            raise RefusedError(
                "E-BUDGET",
                f"{self.name}: noise multiplier {mechanism.noise_multiplier:g} is below {MIN_NOISE_MULTIPLIER:g},"
                " which no budget allows",
                param="privacy.noise_multiplier",
            )
        cost = epsilon([mechanism.event(job.steps)], delta)
        if cost > job.privacy.epsilon:
            raise RefusedError(
                "E-BUDGET",
                f"{self.name}: this job costs epsilon {cost:.3f}, more than the {job.privacy.epsilon:g} it promises",
                param="privacy.noise_multiplier",
            )

    def _check_records(self, count: int, job: Job) -> None:
        if count == 0:
            raise DataError("E-DATA-SITE-EMPTY", f"{self.name}: no valid record", hint="cotune data check FILE")
        if job.privacy.level != "none" and job.privacy.delta != "auto" and job.privacy.delta * count >= 1:
            raise RefusedError(
                "E-DELTA",
                f"{self.name}: privacy.delta = {job.privacy.delta:g} is not below 1 over this site's number of"
                " records: one record could leak whole",
                param="privacy.delta",
                hint="raise data.records_per_site to what the largest site holds, or lower privacy.delta",
            )
