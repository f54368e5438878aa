"""Whom to ask in a round."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from cotune.shared.job import Job
from cotune.shared.schedule import public_seed


def select(
    job: Job, round_number: int, sites: Sequence[str], taken: Mapping[str, int], absent: Collection[str]
) -> list[str]:
    """Names of the sites to ask, in order; the same for the same arguments, so a resumed run asks the same.

    Args:
        job: How many, and how they are chosen.
        round_number: From 1.
        sites: Who could be asked now.
        taken: Rounds each site took before this one; a site that took `rounds_per_site` is not asked again.
        absent: Who did not answer when last asked: `available` asks them only if there are too few others.
    """
    able = sorted(site for site in sites if taken.get(site, 0) < job.rounds_per_site)
    if job.federation.selection == "all" or len(able) <= job.sites_per_round:
        return able
    generator = np.random.Generator(np.random.PCG64(public_seed(job, "select", round_number)))
    drawn = [able[place] for place in generator.permutation(len(able))]
    if job.federation.selection == "available":
        drawn = [site for site in drawn if site not in absent] + [site for site in drawn if site in absent]
    return sorted(drawn[: job.sites_per_round])
