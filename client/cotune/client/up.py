"""`cotune site up`: the agent and one courier a federation, kept running."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cotune.client.agent_link import AgentLink
from cotune.client.courier_folder import SOCKET, CourierFolder, courier_folder
from cotune.client.home import SiteHome
from cotune.client.joining import joined
from cotune.client.serving import give, require_place
from cotune.shared.children import Child
from cotune.shared.errors import CotuneError, JobError
from cotune.shared.supervision import running, supervise

# What a courier is told of this machine: it may belong to another user, who is to see no token of the site's.
TOLD = (
    "PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "TZ", "TMPDIR", "HTTPS_PROXY", "https_proxy", "NO_PROXY",
    "no_proxy",
)  # fmt: skip


def keep_up(path: Path, courier_user: str | None, say: Callable[[str], None]) -> None:
    """Keep a site running until SIGTERM or SIGINT.

    Edge cases: what would make every round fail is said before anything starts: a faulty policy, a ledger that is
    behind, a data set whose file is missing, no federation, somebody else on the socket.

    Args:
        path: The site's home.
        courier_user: Who the couriers run as, and then owns their folder; None for this user.
        say: Gets a line for each change.

    Raises:
        CotuneError: Any of these, with the command that mends it.
    """
    home = SiteHome.open(path)
    federations = sorted(joined(home))
    require_ready(home, federations)
    folder = courier_folder(home.path)
    if running(home.path) is None:  # else `supervise` says so
        require_place(folder / SOCKET)
    if courier_user is not None:
        for each in (folder, *folder.rglob("*")):
            give(each, courier_user)
    supervise(children(home.path, federations, courier_user), home.path, say=say)


def require_ready(home: SiteHome, federations: list[str]) -> None:
    """See that a home that could be opened can take part in something.

    Raises:
        CotuneError: E-NOT-JOINED; E-DATA-FILE or E-DATASET-SAME; a fault of a federation's courier file.
    """
    if not federations:
        raise JobError(
            "E-NOT-JOINED",
            f"{home.name} has joined no federation: nobody could reach it",
            hint=f"send {home.path / 'request.json'} to the coordinator, then: cotune site join INVITE",
        )
    for dataset in home.policy.dataset:
        home.files.state(dataset)
    for federation in federations:
        _ = CourierFolder(courier_folder(home.path) / federation).settings


def children(home: Path, federations: list[str], courier_user: str | None) -> list[Child]:
    """The agent, then the couriers, which wait for it."""
    folder, logs = courier_folder(home), home / "logs"
    agent = (
        sys.executable, "-P", "-m", "cotune.client.agent", "--home", str(home), "--socket", str(folder / SOCKET),
        *(("--courier-user", courier_user) if courier_user else ()),
    )  # fmt: skip
    told = {name: os.environ[name] for name in TOLD if name in os.environ} | {"FLWR_TELEMETRY_ENABLED": "0"}
    couriers = [
        Child(
            f"courier-{federation}",
            (sys.executable, "-P", "-m", "cotune.client.courier_process", "--folder", str(folder / federation)),
            logs / f"courier-{federation}.log",
            told,
            user=courier_user,
            cwd=Path("/"),
        )
        for federation in federations
    ]
    ready = partial(answers, folder / SOCKET)
    return [Child("agent", agent, logs / "agent.log", dict(os.environ), ready, cwd=home), *couriers]


def answers(socket: Path) -> bool:
    """Whether an agent answers, also while it trains."""
    try:
        return bool(AgentLink(socket, patience_s=0.0).describe())
    except CotuneError as error:
        return error.code == "E-AGENT-BUSY"
