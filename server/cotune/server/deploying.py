"""A deployed run: the coordinator's key and enrolment on one side, Flower's Grid on the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cotune.server.approval import Approval
from cotune.server.conduct import conduct_deployed
from cotune.server.deployed import AGAIN_S, POLL_S, DeployedFleet
from cotune.server.enrolment import enrolled
from cotune.server.fedhome import FedHome
from cotune.server.grid import Exchange
from cotune.server.trust import Trust
from cotune.shared.bundle import bundle_sha256
from cotune.shared.plan import cotune_version
from cotune.shared.proposal import Proposal
from cotune.shared.runs import RunFolder

if TYPE_CHECKING:
    from cotune.server.grid import Grid


def run_deployed(run: RunFolder, grid: Grid) -> None:
    """Run a prepared run over the sites that are enrolled at its coordinator. Raises as `conduct_deployed` does."""
    home = FedHome.open(run.path.parent.parent)
    job = run.job()
    signature = home.key.sign("cotune-job", job.sha256().encode())

    def key_of(site: str) -> str | None:
        """The key of its enrolment, whether it is revoked or not: that its answers do not count, the fleet says."""
        found = enrolled(home.path).get(site)
        return found.public_key if found else ""

    trust = Trust(signature, key_of, home.key)
    proposals = {
        site: Proposal(
            run_id=run.run_id,
            cotune=cotune_version(),
            job=job,
            site=site,
            bundle_sha256=bundle_sha256(),
            signature=signature,
        )
        for site in sorted(job.data.sites)
    }
    exchange = Exchange(grid, at_once=job.sites, poll_s=POLL_S, watch=run.require_wanted, again_s=AGAIN_S)
    fleet = DeployedFleet(exchange, lambda: enrolled(home.path), job.federation.round_timeout_s)
    conduct_deployed(run, fleet, Approval(run, proposals, trust), trust)
