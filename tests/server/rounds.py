"""Rounds of a small adapter for tests of what the coordinator keeps and joins: two modules and a head, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cotune.server.spool import Spool
from cotune.shared.adapter import Layout, Vector, nested
from cotune.shared.aggregation import CORE, A, B, factor_of, returned
from cotune.shared.job import Job
from cotune.shared.jobfile import parse_job

RANK = 3
HEAD = "score.weight"
SITES = ("site-1", "site-2", "site-3", "site-4", "site-5")


def job_of(**sections: dict[str, Any]) -> Job:
    """A resolved job over five sites; settings are given as section=dict."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"base": "owner/name"},
        "lora": {"r": RANK},
        "data": {"train": "/a.jsonl", "records_per_site": 100},
        "train": {"local_steps": 2, "learning_rate": 0.5},
        "privacy": {"delta": 1e-3, "noise_multiplier": 1.0},
        "federation": {"sites": 5},
    }
    for section, changes in sections.items():
        settings[section] = {**settings.get(section, {}), **changes}
    return parse_job(settings, origin="test")


def layout_of(job: Job) -> Layout:
    """The adapter of the job's rule: A (3, 7), B (5, 3) or (9, 3), and with a core (3, 3)."""
    shapes: dict[str, tuple[int, ...]] = {HEAD: (2, 7)}
    for module, out in (("m0", 5), ("m1", 9)):
        shapes |= {f"{module}{A}weight": (RANK, 7), f"{module}{B}weight": (out, RANK)}
        shapes |= {f"{module}{CORE}weight": (RANK, RANK)} if job.rule.core else {}
    trained = (name for name in shapes if factor_of(name) in (None, *job.rule.trains))
    return Layout({name: shapes[name] for name in sorted(shapes)}, tuple(sorted(trained)))


def state_of(layout: Layout, seed: int = 0) -> dict[str, Vector]:
    """An adapter in which nothing is zero."""
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in layout.shapes.items()}


def deltas_of(job: Job, number: int = 1, sites: Sequence[str] = SITES) -> dict[str, Vector]:
    """What sites send back in a round: flat, at their ranks; a site's numbers depend on its name and the round."""
    made: dict[str, Vector] = {}
    for site in sites:
        size = returned(job.rule, layout_of(job).at_rank(job.rank_of(site)), number, job.run.rounds).size
        made[site] = np.random.default_rng([number, *site.encode()]).normal(size=size).astype(np.float32)
    return made


def spool_of(folder: Path, job: Job, state: Mapping[str, Vector], number: int = 1) -> Spool:
    """An empty spool for a round that starts from a state."""
    ranks = {job.rank_of(site) for site in SITES}
    ups = {rank: returned(job.rule, layout_of(job).at_rank(rank), number, job.run.rounds) for rank in ranks}
    return Spool(folder, ups, {rank: nested(state, rank) for rank in ranks}, job.aggregation.weights)


def fill(spool: Spool, job: Job, deltas: Mapping[str, Vector]) -> None:
    """Put updates into a spool, in the order given."""
    for site, delta in deltas.items():
        spool.add(site, job.rank_of(site), delta)
