"""`cotune fed up`: Flower's two programs on loopback and the gateway in front, kept running.

The SuperLink alone holds state, in SQLite; the SuperExec starts our ServerApp and outlives a SuperLink that is back
within a minute, so a run goes on; the gateway holds nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cotune.server.control import Control
from cotune.server.enrolment import withdraw
from cotune.server.fedhome import FedHome
from cotune.server.ports import require_free
from cotune.server.resubmission import resubmit_due
from cotune.shared.children import Child
from cotune.shared.supervision import running, supervise

ANSWER_S = 5.0
SHOW_CERTIFICATE = ("superlink", "gateway")


def keep_up(home: FedHome, say: Callable[[str], None]) -> None:
    """Keep a coordinator running until SIGTERM or SIGINT.

    Args:
        home: The coordinator's.
        say: Gets a line for each change.

    Raises:
        JobError: It runs already (E-UP-RUNNING).
        ConnectionFailed: A port is in use (E-PORT), or has another SuperLink on it (E-SUPERLINK-FOREIGN).
        StorageError: The home's files are damaged, or cannot be written.
    """
    if running(home.path) is None:  # else `supervise` says so
        require_free("superlink.port", home.superlink_address)
        if home.settings.gateway.kind == "embedded":
            require_free("gateway.bind", home.settings.gateway.bind)
        home.renew_certificate()
    environment = home.flwr_environment()
    supervise(children(home, environment), home.path, on_tick=Duties(home, Control(environment), say).due, say=say)


def children(home: FedHome, environment: Mapping[str, str]) -> list[Child]:
    """The programs of a coordinator, in the order in which they start.

    They run in an empty folder: Flower's programs import what they find where they are, before the app they were
    given. A gateway of kind `nginx` is the machine's own; `none` is for a coordinator that nobody has to reach.
    """
    logs, tls, empty = home.path / "logs", home.tls, home.path / "empty"
    secret = str(home.path / "superlink" / "superexec.secret")
    superlink = (
        "flower-superlink", "--host", "127.0.0.1", "--port", str(home.settings.superlink.port),
        "--ssl-certfile", str(tls / "server.crt"), "--ssl-keyfile", str(tls / "server.key"),
        "--ssl-ca-certfile", str(tls / "ca.crt"), "--enable-supernode-auth",
        "--database", str(home.path / "superlink" / "state.db"),
        "--isolation", "process", "--superexec-auth-secret-file", secret, "--disable-runtime-dependency-installation",
    )  # fmt: skip
    superexec = (
        "flower-superexec", "--runtime-api-address", home.superlink_address,
        "--root-certificates", str(tls / "ca.crt"), "--superexec-auth-secret-file", secret,
    )  # fmt: skip
    gateway = (sys.executable, "-P", "-m", "cotune.server.gateway", "--home", str(home.path))
    found = [
        Child("superlink", superlink, logs / "superlink.log", environment, lambda: is_healthy(home), cwd=empty),
        Child("superexec", superexec, logs / "superexec.log", environment, cwd=empty),
    ]
    if home.settings.gateway.kind == "embedded":
        found.append(Child("gateway", gateway, logs / "gateway.log", environment, lambda: is_open(home), cwd=empty))
    return found


def is_healthy(home: FedHome) -> bool:
    """Whether the SuperLink answers, with a certificate of our authority."""
    return _answer(home, home.superlink_address) == http.client.OK


def is_open(home: FedHome) -> bool:
    """Whether the gateway answers; what it says is the SuperLink's matter."""
    host, _, port = home.settings.gateway.bind.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104 - where to knock, not where to listen
    return _answer(home, f"{host}:{port}") is not None


def _answer(home: FedHome, address: str) -> int | None:
    """The status of a health check; None if nobody with a certificate of our authority answers."""
    context = ssl.create_default_context(cafile=str(home.tls / "ca.crt"))
    context.check_hostname = False  # it may listen on an address that its certificate does not name
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=ANSWER_S, context=context)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@dataclass
class Duties:
    """What is done beside the children. A duty that fails is due again in its time, and keeps none of the others."""

    home: FedHome
    control: Control
    say: Callable[[str], None]
    next: dict[str, float] = field(default_factory=dict[str, float])

    def due(self) -> None:
        """Do what is due."""
        duties: tuple[tuple[float, Callable[[], None]], ...] = (
            (3600.0, self.renew),
            (30.0, lambda: withdraw(self.home, self.control)),
            (1.0, lambda: resubmit_due(self.home, self.control)),
        )
        now = time.monotonic()
        for number, (every_s, duty) in enumerate(duties):
            if self.next.get(str(number), 0.0) <= now:
                self.next[str(number)] = now + every_s
                duty()

    def renew(self) -> None:
        """Issue a certificate while there is time, and have it shown: who shows one reads it when it starts."""
        if self.home.renew_certificate():
            self.say("a new server certificate was issued; who shows it starts again")
            kept = (running(self.home.path) or {"children": {}})["children"]
            for name in SHOW_CERTIFICATE:
                if pid := kept.get(name, {}).get("pid"):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
