"""A site: the one door through which anything leaves."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from cotune.client.data import SiteExamples
from cotune.client.guard import Guard
from cotune.client.policy import DatasetPolicy
from cotune.client.randomness import RandomStream, reproducible_stream, secure_stream
from cotune.client.training import RoundResult, Start, Trainer
from cotune.shared.adapter import Layout, Vector, fingerprint, flat_sha256, nested
from cotune.shared.aggregation import CONTROL, factor_of, returned, sent
from cotune.shared.codec import Payload, decode, encode
from cotune.shared.errors import RefusedError, RunFailed
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.methods import initial_values
from cotune.shared.plan import RoundPlan, cotune_version
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.schedule import public_seed, rates_of
from cotune.shared.update import AdapterUpdate, UpdateHeader, payload_sha256

NEARLY_ALL = 0.9
LOST = "lost"  # what the codec left out of the updates so far


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
        self, plan: RoundPlan, payload: Payload, trainer: Trainer, progress: Callable[[int], None]
    ) -> AdapterUpdate:
        """Train one round and release the noised update.

        Guarantee: what is returned is a function of what `Trainer.train_round` gives away, of the plan and of
        earlier updates; its cost for each unit of this site, by the mechanism's adjacency, is the event in the
        header and nothing more. That event is in the ledger, durably, before the first example is drawn, and
        stays there whatever happens next. An update is written down before it is sent; asked for the same round
        again, the site returns the very same numbers, which costs nothing. Encoding, what error feedback carries
        over, SCAFFOLD's control variates and a B of the site's own are post-processing: all its steps were noised.

        Edge cases: a plan that does not hold together, costs more than the job promises, or breaks a rule or
        the budget of the site is refused before any record is read; records the site's own check does not
        pass, before training, in words that tell outsiders nothing of them; a round that was reserved and
        lost in a crash is charged again, once, and then refused.

        Raises:
            RefusedError: The plan, the policy or the budget says no; the rule is named.
            ConnectionFailed: E-CODEC: the payload is no adapter in the job's `transport.codec_down`.
            StorageError: The ledger cannot be written, or is older than what this site has signed.
            RunFailed: E-DIVERGED: training left the numbers float32 has; the round stays charged.
        """
        job = plan.job
        arrays = self._sent(plan, payload, trainer)
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
        start = self._start(plan, arrays, trainer.layout)
        torch.set_num_threads(job.simulation.threads if job.simulation.threads != "auto" else os.cpu_count() or 1)
        features = self._features(job, trainer, data)
        result = trainer.train_round(start, data, features, mechanism, self._stream(plan), progress)
        return self._release(plan, start, result, trainer.layout)

    def _features(self, job: Job, trainer: Trainer, data: SiteExamples) -> Features:
        features = Features(trainer.network, data.examples, self.work)
        if _draws_nearly_all(job):
            features.fill()
        return features

    def _sent(self, plan: RoundPlan, payload: Payload, trainer: Trainer) -> dict[str, Vector]:
        """The global adapter that came with a plan, which is the one the plan is about."""
        job = plan.job
        down = sent(job.rule, trainer.layout.at_rank(plan.rank), plan.offset_rank, job.train.scaffold)
        flat = decode(payload, job.transport.codec_down, down.size)
        self._check(plan, flat, trainer)
        return down.unflatten(flat)

    def _start(self, plan: RoundPlan, arrays: Mapping[str, Vector], layout: Layout) -> Start:
        """Where the round starts: what was sent, the frozen rest, a B of its own, and SCAFFOLD's correction c - c_i."""
        frozen = nested(initial_values(layout, plan.job.run.seed), plan.rank)
        own = self.guard.home.updates.memory(plan.run_id, plan.round)
        controls = {name.removesuffix(CONTROL): array for name, array in arrays.items() if name.endswith(CONTROL)}
        correction = {name: c - own.get(name + CONTROL, np.zeros_like(c)) for name, c in controls.items()}
        personal = {name: own[name] for name in layout.trained if name in own}
        return Start(plan.round, {**frozen, **arrays}, correction, personal)

    def _release(self, plan: RoundPlan, start: Start, result: RoundResult, layout: Layout) -> AdapterUpdate:
        """Encode, write down, commit and sign the round's update."""
        job = plan.job
        up = returned(job.rule, layout.at_rank(plan.rank), plan.round, job.run.rounds)
        delta = up.flatten(result.arrays) - up.flatten(start.arrays)
        lost = self.guard.home.updates.memory(plan.run_id, plan.round).get(LOST)
        carried = delta if lost is None else delta + lost
        if not np.isfinite(carried).all():
            raise RunFailed(
                "E-DIVERGED",
                f"{self.name}: round {plan.round} ended at numbers too large for float32, which no update can carry",
                param="train.learning_rate",
            )
        codec = job.transport.codec_up
        payload = encode(carried, codec, public_seed(job, "up", self.name, plan.round))
        memory = {LOST: carried - decode(payload, codec, up.size)} if job.transport.error_feedback else {}
        if job.train.scaffold:  # c_i - c + (x - y_i) / (sum of rates): Karimireddy et al. 2020, algorithm 1, option II
            rate, moved = sum(rates_of(job, plan.round)), up.unflatten(delta)
            memory |= {name + CONTROL: -c - moved[name] / np.float32(rate) for name, c in start.correction.items()}
        if job.rule.personal:
            memory |= {name: array for name, array in result.arrays.items() if factor_of(name) == "B"}
        header = UpdateHeader(
            site=self.name,
            run_id=plan.run_id,
            round=plan.round,
            job_sha256=job.sha256(),
            base_sha256=plan.base_sha256,
            update_sha256=payload_sha256(payload),
            event=mechanism_of(job, plan.clipping_norm).event(job.train.local_steps).to_dict(),
            head=self.guard.home.ledger.head,
            clipping_norm=result.clipping_norm,
            train_loss=result.loss,
        )
        return self.guard.release(plan, AdapterUpdate(header, payload), memory)

    def _stream(self, plan: RoundPlan) -> RandomStream:
        if plan.job.privacy.noise == "test":
            return reproducible_stream(plan.job.run.seed, self.name, plan.round)
        return secure_stream()

    def _check(self, plan: RoundPlan, adapter: Vector, trainer: Trainer) -> None:
        facts = {
            "cotune version": (plan.cotune, cotune_version()),
            "job": (plan.job.sha256(), trainer.job_sha256),
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
        cost = epsilon([mechanism_of(job).event(job.steps_per_site * job.data.sites_per_unit)], job.privacy.delta)
        if cost > job.privacy.epsilon:
            raise RefusedError(
                "E-BUDGET",
                f"{self.name}: this job costs epsilon {cost:.3f}, more than the {job.privacy.epsilon:g} it promises",
                param="privacy.noise_multiplier",
            )


def _draws_nearly_all(job: Job) -> bool:
    """Whether a run is expected to draw nearly all records of a site at least once."""
    steps = job.steps * job.sites_per_round / job.sites
    return 1 - (1 - min(1.0, job.sampling_probability)) ** steps >= NEARLY_ALL
