"""What Flower's door opens on: the server and client app of a run, each loaded only where it runs.

A deployed run has no client app: its sites read their messages by themselves and run nothing that comes along.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cotune.shared.errors import RefusedError
from cotune.shared.plan import cotune_version
from cotune.shared.runs import RunFolder

if TYPE_CHECKING:
    from cotune.server.app import RunConfig
    from cotune.shared.job import Job


WAITING = 2  # sites asked beyond those that train: enough that no worker waits, and few answers are held


class Apps:
    """Flower's two apps, for the cotune of one version.

    Raises:
        RefusedError: The bundle was made by another version than is installed here.
    """

    def __init__(self, bundle_version: str) -> None:
        if bundle_version != cotune_version():
            raise RefusedError(
                "E-VERSION",
                f"the bundle is of cotune {bundle_version}, installed here is {cotune_version()}",
                hint=f"pip install cotune=={bundle_version}",
            )

    @cached_property
    def server(self) -> object:
        """The coordinator: a ServerApp."""
        from cotune.server.app import server_app

        return server_app(open_run, _sites, lambda job: int(job.simulation.workers) + WAITING)

    @cached_property
    def client(self) -> object:
        """The courier of every simulated site: a ClientApp."""
        from cotune.client.courier import client_app
        from cotune.simulations.scenario import read_ledger, sign_claim
        from cotune.simulations.worker import answer

        return client_app(answer, read_ledger, sign_claim)


def _sites(job: Job) -> list[str]:
    from cotune.simulations.scenario import site_names

    return site_names(job)


def open_run(config: RunConfig) -> RunFolder:
    """The prepared run that `run-dir` names, or a new one for `job`; in the user's data folder if unsaid."""
    folder = Path(str(config["run-dir"])) if config["run-dir"] else _data_folder() / "runs"
    found = (folder / "resolved.toml").exists()
    if found and RunFolder(folder).engine() == "deployed":
        return RunFolder(folder)
    from cotune.simulations.scenario import begin, prepare_run

    run = RunFolder(folder) if found else prepare_run(str(config["job"]), (), folder, print)
    begin(run)
    return run


def _data_folder() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "cotune"
