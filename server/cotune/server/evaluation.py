"""The coordinator's own scoring of global adapters, on public data only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cotune.shared.adapter import Vector
from cotune.shared.job import Job
from cotune.shared.methods import write
from cotune.shared.records import read_records

if TYPE_CHECKING:
    from cotune.shared.evaluation import Evaluation

RELOAD_ROWS = 64


class GlobalEvaluator:
    """Scores adapters on the job's public evaluation file, or on a few public sentences if there is none."""

    def __init__(self, job: Job) -> None:
        from cotune.shared.evaluation import Evaluator, probe_records
        from cotune.shared.warm import warm_network

        network, tokenizer = warm_network(job)
        self._network = network
        self._threads = _total_threads(job)
        self.has_data = job.eval.data is not None
        records = read_records(Path(job.eval.data)) if job.eval.data else probe_records(job)
        self._evaluator = Evaluator(network, records, tokenizer, job)

    def score(self, arrays: Mapping[str, Vector], limit: int | None = None) -> Evaluation:
        """Score a global adapter on the first `limit` rows, or all."""
        import torch

        torch.set_num_threads(self._threads)
        write(self._network.adapted, arrays)
        return self._evaluator.score(limit)


def _total_threads(job: Job) -> int:
    # Sites wait while the coordinator scores, so all their threads are free.
    workers, threads = job.simulation.workers, job.simulation.threads
    return 1 if workers == "auto" or threads == "auto" else workers * threads
