"""The Flower ServerApp: a run folder, Flower's Grid, and what the run's engine makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from cotune.server.conduct import conduct
from cotune.server.grid import GridFleet
from cotune.shared.job import Job
from cotune.shared.runs import RunFolder

RunConfig = Mapping[str, bool | float | int | str]


def server_app(
    open_run: Callable[[RunConfig], RunFolder],
    sites_of: Callable[[Job], Sequence[str]],
    at_once: Callable[[Job], int],
) -> ServerApp:
    """A ServerApp that runs the job its run configuration names, at simulated sites or at enrolled ones.

    Args:
        open_run: The run folder for a run configuration; made if need be.
        sites_of: Names of the simulated sites of a job.
        at_once: How many of them are asked at a time; what they answer is held until it is its turn.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # pyright: ignore[reportUnusedFunction]
        run = open_run(context.run_config)
        if run.engine() == "deployed":
            from cotune.server.deploying import run_deployed  # a simulation has no coordinator's home

            run_deployed(run, grid)
            return
        job = run.job()
        conduct(run, GridFleet(grid, sites_of(job), job.federation.round_timeout_s, at_once(job)), "flower")

    return app
