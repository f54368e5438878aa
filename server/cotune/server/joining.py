"""From the admitted updates of a round to the next global adapter: rule, robust rule, optimiser, average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from cotune.server.aggregation.bias import aggregation_bias
from cotune.server.aggregation.fedex import fedex
from cotune.server.aggregation.fedsa import fedsa
from cotune.server.aggregation.flora_stack import flora_stack
from cotune.server.aggregation.influence import influence_bound, measured_influence
from cotune.server.aggregation.product_svd import product_svd
from cotune.server.aggregation.robust import RobustSettings, combine, geometry
from cotune.server.aggregation.updates import Updates, modules_of, padded, weighted_mean
from cotune.server.optimisers import OptimiserSettings, average, step
from cotune.shared.adapter import Layout, Vector
from cotune.shared.aggregation import CONTROL, RuleName, returned
from cotune.shared.job import Job
from cotune.shared.methods import initial_values
from cotune.shared.schedule import rates_of

AVERAGE = "average|"  # begins the name of a tensor's moving average
Join = Callable[[Mapping[str, Vector], Updates, Callable[[], Mapping[str, Vector]]], dict[str, Vector]]
PRODUCT_RULES: dict[RuleName, Join] = {
    "product_svd": lambda state, updates, _fresh: product_svd(state, updates),
    "fedex": lambda state, updates, _fresh: fedex(state, updates),
    "flora_stack": lambda state, updates, fresh: flora_stack(state, updates, fresh().__getitem__),
    "fedsa": lambda state, updates, _fresh: fedsa(state, updates),
}  # the other rules are linear


@dataclass(frozen=True)
class Joined:
    """The next global adapter.

    Attributes:
        arrays: The whole state by name.
        memory: What optimiser and average go on with.
        bias: How far the mean of the products is from the product of the means, relative; None for fewer than two
            trained factors, or as long as sites keep one of them.
        influence: Largest change of the joined update, in L2 norm, when one site is left out; None for rules in
            whose coordinates updates do not add up.
        influence_bound: What it cannot exceed by the rule alone; None where no bound is known.
    """

    arrays: Mapping[str, Vector]
    memory: Mapping[str, Vector]
    bias: float | None
    influence: float | None
    influence_bound: float | None


class Joiner:
    """Joins the updates of a job's rounds.

    Args:
        job: Its rule and the rest of `[aggregation]`.
        layout: Of the adapter at full rank.
        root: The coordinator's own update on a public root set, for FLTrust: state -> update by tensor.
    """

    def __init__(
        self, job: Job, layout: Layout, root: Callable[[Mapping[str, Vector], int], Mapping[str, Vector]] | None = None
    ) -> None:
        self._job, self._layout, self._root = job, layout, root

    def join(
        self, state: Mapping[str, Vector], memory: Mapping[str, Vector], updates: Updates, round_number: int
    ) -> Joined:
        """The state after a round.

        Sums are float64 and in the order of site names: the order of arrival does not change a bit. Everything
        here works on noised updates and costs no privacy.

        Raises:
            RunFailed: Fewer updates than the robust rule needs.
        """
        influence = bound = None
        if self._job.rule.linear:
            arrays, memory, influence, bound = self._linear(state, memory, updates, round_number)
        else:
            fresh = partial(initial_values, self._layout, self._job.run.seed, turn=round_number)
            arrays = {**state, **PRODUCT_RULES[self._job.aggregation.rule](state, updates, fresh)}
        if self._job.aggregation.ema:
            kept = {n.removeprefix(AVERAGE): array for n, array in memory.items() if n.startswith(AVERAGE)}
            trained = {name: arrays[name] for name in self._layout.trained}
            kept = average(self._job.aggregation.ema, trained, kept, round_number)
            memory = {**memory, **{AVERAGE + name: array for name, array in kept.items()}}
        rule, rounds = self._job.rule, self._job.run.rounds
        both = len(rule.trains) > 1 and not (rule.personal and round_number < rounds)
        bias = aggregation_bias(updates, modules_of(state)) if both else None
        return Joined(arrays, memory, bias, influence, bound)

    def published(self, state: Mapping[str, Vector], memory: Mapping[str, Vector]) -> dict[str, Vector]:
        """The state a run publishes: the moving average where the job asks for it."""
        averaged = {n.removeprefix(AVERAGE): array for n, array in memory.items() if n.startswith(AVERAGE)}
        return {**state, **{name: averaged[name] for name in averaged if name in state}}

    def _linear(
        self, state: Mapping[str, Vector], memory: Mapping[str, Vector], updates: Updates, round_number: int
    ) -> tuple[dict[str, Vector], Mapping[str, Vector], float | None, float | None]:
        """Old state plus the joined update, by robust rule and optimiser."""
        settings, rounds = self._job.aggregation, self._job.run.rounds
        names = returned(self._job.rule, self._layout, round_number, rounds).trained
        robust = RobustSettings(
            settings.norm_bound, settings.trim, settings.hostile, self._trusted(state, round_number)
        )
        # A mean takes mixed ranks; a robust rule needs one.
        joined, found = partial(weighted_mean, updates), None
        if settings.robust != "none":
            found = geometry(settings.robust, updates, names, robust)
            joined = combine(settings.robust, updates, names, robust, found)
        optimiser = OptimiserSettings(settings.optimizer, settings.learning_rate, settings.momentum)
        share = len(updates.sites) / self._job.sites
        rate = np.float32(sum(rates_of(self._job, round_number)))
        arrays = dict(state)
        for name in names:
            delta = padded(joined(name), state[name].shape).astype(np.float32)
            added, memory = step(optimiser, {name: delta}, memory)
            arrays[name] = state[name] + added[name]
            if self._job.train.scaffold:
                # c + share x mean(c_i' - c_i), where c_i' - c_i = -c - delta_i / (sum of rates)
                control = state[name + CONTROL]
                moved = control + np.float32(share) * (-control - delta / rate)
                arrays[name + CONTROL] = moved.astype(np.float32)
        mixed = bool(self._job.lora.ranks)
        influence = None if mixed else measured_influence(settings.robust, updates, names, robust, found)
        bound = influence_bound(settings.robust, robust, updates.weights, settings.max_update_norm)
        return arrays, memory, influence, bound

    def _trusted(self, state: Mapping[str, Vector], round_number: int) -> Mapping[str, Vector] | None:
        return self._root(state, round_number) if self._root and self._job.aggregation.robust == "fltrust" else None
