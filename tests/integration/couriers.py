"""A real SuperLink of a coordinator's home, a courier of a real site, and the test in the coordinator's place."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Message, RecordDict
from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from tests.client.agents import RealSite, until
from tests.free_ports import free_port

from cotune.client.courier_folder import CourierFolder, courier_folder
from cotune.client.home import SiteHome
from cotune.client.joining import join, write_request
from cotune.server.control import Control
from cotune.server.enrolment import approve
from cotune.server.fedhome import FedHome, FedSettings
from cotune.server.up import children, is_healthy
from cotune.shared.bundle import write_bundle
from cotune.shared.plan import RoundPlan
from cotune.shared.wire import adapter_to_record, plan_to_records

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


def make_fed(folder: Path, name: str = "north", address: str | None = None) -> FedHome:
    """A coordinator without a gateway: its SuperLink is reached as the address says, or directly."""
    port = free_port()
    settings = {
        "federation": {"name": name, "address": address or f"localhost:{port}"},
        "gateway": {"kind": "none"},
        "superlink": {"port": port},
    }
    return FedHome.create(folder, FedSettings.model_validate(settings))


@dataclass
class SuperLink:
    """The SuperLink of a coordinator's home."""

    home: FedHome
    process: subprocess.Popen[bytes] | None = None

    @property
    def control(self) -> Control:
        """How it is told what to do."""
        return Control(self.home.flwr_environment())

    def start(self) -> None:
        """Start it as `cotune fed up` does."""
        child = children(self.home, self.home.flwr_environment())[0]
        with child.log.open("ab") as log:
            self.process = subprocess.Popen(
                child.command, env=dict(child.env), cwd=child.cwd, stdout=log, stderr=log, start_new_session=True
            )
        until(lambda: is_healthy(self.home))

    def kill(self) -> None:
        """End it as a power cut does, with all that it started."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def superlink(home: FedHome) -> Generator[SuperLink]:
    """A SuperLink that runs."""
    made = SuperLink(home)
    made.start()
    try:
        yield made
    finally:
        made.kill()


class Desk:
    """A run of which the test is the ServerApp: it asks for the task as Flower's own program would."""

    def __init__(self, link: SuperLink, folder: Path, change: Callable[[Path], object] = lambda _bundle: None) -> None:
        write_bundle(folder)
        change(folder)
        self.run_id = link.control.run(folder, {})
        secret = (link.home.path / "superlink" / "superexec.secret").read_bytes()
        where = (link.home.superlink_address, False, (link.home.tls / "ca.crt").read_bytes())
        guard = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[ACQUIRE])
        with RuntimeHttpClient.from_server_address(*where, interceptors=[guard]) as client:
            task = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        self._grid = HttpGrid(*where, token=task.token)
        self._client = self._grid._runtime_client  # pyright: ignore[reportPrivateUsage]
        given = self._client.PullTaskInput(PullTaskInputRequest())
        self._identity = (given.task_id, given.run.run_id, given.context.node_id)
        self._grid.set_run(run_from_proto(given.run))
        self._over = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def ask(self, node_id: int, kind: str, records: RecordDict, ttl: float = 600.0) -> str:
        """Send a message; its number."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = self._identity
        [number] = self._grid.push_messages([Message(records, node_id, kind, ttl=ttl)])
        assert number
        return number

    def heard(self, number: str) -> Message | None:
        """The answer, if it is there."""
        return next(iter(self._grid.pull_messages([number])), None)

    def answer(self, number: str, patience_s: float = 120.0) -> Message:
        """The answer, waited for."""
        found: list[Message] = []
        until(lambda: found.extend(m for m in [self.heard(number)] if m) or found, patience_s)
        return found[0]

    def nodes(self) -> list[int]:
        """The nodes that are online."""
        return [node.node_id for node in self._grid.get_nodes()]

    def close(self) -> None:
        """Go, as a ServerApp that died does."""
        self._over.set()
        self._grid.close()

    def _beat(self) -> None:
        while not self._over.wait(5):
            with contextlib.suppress(Exception):  # the SuperLink is away; the next one may come through
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())


@dataclass
class Courier:
    """A courier as `cotune site up` starts it."""

    folder: Path
    log: Path
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start it."""
        command = [sys.executable, "-m", "cotune.client.courier_process", "--folder", str(self.folder)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, env=dict(self.environment))
        return self.process

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it with a signal; its exit code."""
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def state(self) -> dict[str, Any]:
        """What it says of itself."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / "courier.json").read_bytes())
        return {}

    def await_state(self, state: str, code: str | None = None, patience_s: float = 120.0) -> None:
        """Wait until it says so."""

        def so() -> bool:
            assert self.process and self.process.poll() is None, self.log.read_text()
            said = self.state()
            return (said.get("pid"), said.get("state")) == (self.process.pid, state) and (
                code is None or said.get("code") == code
            )

        until(so, patience_s)


@contextlib.contextmanager
def running(courier: Courier) -> Generator[Courier]:
    """A courier that runs, until the end."""
    courier.start()
    try:
        yield courier
    finally:
        if courier.process and courier.process.poll() is None:
            courier.end(signal.SIGKILL)


class Proxy:
    """What stands between a courier and the SuperLink, speaks both sides' TLS, sees all bytes, and fails when told.

    Attributes:
        seen: Every byte the courier sent as the body of a request.
        failing: Ends of paths that are answered with 500.
    """

    def __init__(self, home: FedHome) -> None:
        self.seen, self.failing = bytearray(), set[str]()
        trusting = ssl.create_default_context(cafile=str(home.tls / "ca.crt"))
        self._upstream = upstream = httpx.Client(
            base_url=f"https://{home.superlink_address}", verify=trusting, timeout=60
        )
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                proxy.seen += body
                if any(self.path.endswith(end) for end in proxy.failing):
                    self._say(500, b"")
                    return
                wanted = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                try:
                    answer = upstream.post(self.path, content=body, headers=wanted)
                    self._say(answer.status_code, answer.content, answer.headers.get("content-type", ""))
                except httpx.HTTPError:
                    self._say(503, b"")

            def _say(self, status: int, content: bytes, kind: str = "text/plain") -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library calls it so
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        shown = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        shown.load_cert_chain(home.tls / "server.crt", home.tls / "server.key")
        self.server.socket = shown.wrap_socket(self.server.socket, server_side=True)
        self.address = f"localhost:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Go away."""
        self.server.shutdown()
        self.server.server_close()
        self._upstream.close()


@dataclass(frozen=True)
class JoinedSite:
    """A site that is in a federation, and what its coordinator asks of it."""

    site: RealSite
    home: FedHome
    node_id: int
    folder: Path

    def plan(self, number: int = 1, **changes: Any) -> RoundPlan:
        """A plan that its coordinator signed."""
        signature = self.home.key.sign("cotune-job", self.site.job.sha256().encode())
        return self.site.plan(number, **{"signature": signature, **changes})

    def records(self, number: int = 1, **changes: Any) -> RecordDict:
        """The same with the adapter, as it travels."""
        return plan_to_records(self.plan(number, **changes), adapter_to_record(self.site.adapter))

    @contextlib.contextmanager
    def told(self, **settings: str) -> Generator[None]:
        """Its courier.toml with other settings, for a while."""
        toml = self.folder / "courier.toml"
        before = toml.read_text()
        kept = [line for line in before.splitlines() if line.partition(" =")[0] not in settings]
        toml.write_text("\n".join([*kept, *(f"{name} = {value}" for name, value in settings.items()), ""]))
        try:
            yield
        finally:
            toml.write_text(before)

    def courier(self, name: str) -> Courier:
        """Its courier."""
        return Courier(self.folder, self.folder.parent.parent / f"{name}.log")


def join_site(site: RealSite, home: FedHome, control: Control, **settings: float) -> JoinedSite:
    """Bring a site into a federation, as the two administrators do; settings are those of courier.toml."""
    opened = SiteHome.open(site.home)
    invite = approve(home, write_request(opened), 7, control)
    join(opened, invite)
    folder = CourierFolder(courier_folder(site.home) / home.name)
    quick = folder.settings.model_copy(update={"poll_s": 0.2, "heartbeat_s": 60.0, **settings})
    folder.write(type(quick).model_validate(quick.model_dump()), invite.ca)
    node_id = next(iter(control.nodes()))
    return JoinedSite(replace(site, socket=folder.socket), home, node_id, folder.path)
