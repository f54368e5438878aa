"""The coordinator's own scoring of global adapters, on public data only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotune.shared.adapter import Vector
from cotune.shared.aggregation import factor_of, trained_at
from cotune.shared.examples import Example, tokenize
from cotune.shared.files import write_json
from cotune.shared.job import Job
from cotune.shared.methods import trainable, write
from cotune.shared.records import read_records
from cotune.shared.schedule import rates_of

if TYPE_CHECKING:
    from cotune.shared.evaluation import Evaluation, Evaluator
    from cotune.shared.network import Network

RELOAD_ROWS = 64
ROOT_ROWS = 256  # FLTrust needs about a hundred


class GlobalEvaluator:
    """Scores adapters on the job's public evaluation file, or on a few public sentences if there is none.

    Args:
        job: The run's.
        kept: A folder for what the lower layers make of these rows, and for the scores of the untouched base, for
            other runs on this machine; None for memory.
    """

    def __init__(self, job: Job, kept: Path | None = None) -> None:
        self._job, self._kept = job, kept
        self._threads = _total_threads(job)
        self.has_data = job.eval.data is not None

    @cached_property
    def _ready(self) -> tuple[Network, Any, Evaluator]:
        """Network, tokenizer and evaluator; loaded when first needed, which may be at the end of the run."""
        from cotune.shared.evaluation import Evaluator, probe_records
        from cotune.shared.warm import warm_network

        network, tokenizer = warm_network(self._job)
        records = read_records(Path(self._job.eval.data)) if self._job.eval.data else probe_records(self._job)
        return network, tokenizer, Evaluator(network, records, tokenizer, self._job, self._kept)

    def root_update(self, state: Mapping[str, Vector], round_number: int) -> dict[str, Vector]:
        """The coordinator's own update on `aggregation.root` from a state; see `root_update`."""
        network, tokenizer, _ = self._ready
        self._take(network, state)
        root = read_records(Path(self._job.aggregation.root or ""))[:ROOT_ROWS]
        return root_update(self._job, network, tokenize(root, tokenizer, self._job), round_number)

    def score(self, arrays: Mapping[str, Vector], limit: int | None = None) -> Evaluation:
        """Score a global adapter on the first `limit` rows, or all."""
        from cotune.shared.evaluation import Evaluation

        known = self._kept / f"base-{limit or 'all'}.json" if self._kept and is_zero(arrays) else None
        if known and known.exists():
            return Evaluation(**json.loads(known.read_text(encoding="utf-8")))
        network, _, evaluator = self._ready
        self._take(network, arrays)
        found = evaluator.score(limit)
        if known:
            write_json(known, found.to_dict())
        return found

    def _take(self, network: Network, arrays: Mapping[str, Vector]) -> None:
        import torch

        torch.set_num_threads(self._threads)
        write(network.adapted, arrays)


def is_zero(arrays: Mapping[str, Vector]) -> bool:
    """Whether an adapter adds nothing to its base: all but its A is zero."""
    return not any(array.any() for name, array in arrays.items() if factor_of(name) != "A")


def root_update(job: Job, network: Network, examples: Sequence[Example], round_number: int) -> dict[str, Vector]:
    """What the round's plain gradient steps on public examples change, by tensor: FLTrust's root update.

    Each step follows the mean gradient, shortened to the sites' clipping norm so that lengths compare.
    Cao et al. 2021, section IV-A.
    """
    import torch

    from cotune.shared.network import passes

    names = trained_at(job.rule, list(trainable(network.adapted)), round_number, 0)
    parameters = {name: trainable(network.adapted)[name] for name in names}
    before = {name: parameter.detach().cpu().numpy().copy() for name, parameter in parameters.items()}
    for rate in rates_of(job, round_number):
        for places in passes(examples, job.train.microbatch):
            loss = network.losses([examples[place] for place in places], None).sum() / len(examples)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), job.privacy.clipping_norm)
        with torch.no_grad():
            for parameter in parameters.values():
                if parameter.grad is not None and bool(norm.isfinite()):
                    parameter.sub_(rate * parameter.grad)
        network.adapted.zero_grad()
    return {name: p.detach().cpu().numpy() - before[name] for name, p in parameters.items()}


def _total_threads(job: Job) -> int:
    # Sites wait while the coordinator scores, so all their threads are free.
    workers, threads = job.simulation.workers, job.simulation.threads
    return os.cpu_count() or 1 if workers == "auto" or threads == "auto" else workers * threads
