"""A coordinator as its administrator runs it: real programs, real ports, killed where it hurts."""

import http.client
import json
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.free_ports import free_port

from cotune.server.authority import create_authority, ensure_server_certificate, read_certificate
from cotune.server.control import Control
from cotune.server.enrolment import approve, enrolled, revoke, withdraw
from cotune.server.fedhome import FED_FILE, FedHome
from cotune.server.up import Duties, is_healthy, is_open
from cotune.shared.errors import CotuneError
from cotune.shared.invitation import JoinRequest, read_invite, read_request
from cotune.shared.jobfile import validate
from cotune.shared.keyfile import SigningKey
from cotune.shared.supervision import running

pytestmark = pytest.mark.slow
PATIENCE_S = 240.0
CHILDREN = ("superlink", "superexec", "gateway")


def soon(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < deadline, "did not come to be"
        time.sleep(0.2)
    return found


class Coordinator:
    """A home, and the command that keeps it up."""

    def __init__(self, path: Path) -> None:
        gate = f"127.0.0.1:{free_port()}"
        settings = {
            "federation": {"name": "trial", "address": gate},
            "gateway": {"bind": gate},
            "superlink": {"port": free_port()},
        }
        self.home = FedHome.create(path, validate(settings, FED_FILE, origin="test"))
        self.process: subprocess.Popen[str] | None = None

    @property
    def control(self) -> Control:
        return Control(self.home.flwr_environment())

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cotune.shared.cli", "fed", *words, "--home", str(self.home.path), "--json"]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)

    def start(self) -> None:
        command = [sys.executable, "-m", "cotune.shared.cli", "fed", "up", "--home", str(self.home.path)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, text=True)
        soon(self.is_up)

    def is_up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "`cotune fed up` ended"
        states = [self.kept(name).get("state") for name in CHILDREN]
        return states == ["running"] * 3 and is_healthy(self.home) and is_open(self.home)

    def kept(self, name: str) -> dict[str, Any]:
        return (running(self.home.path) or {"children": {}})["children"].get(name, {})

    def program(self, name: str) -> psutil.Process:
        """The program itself, below its tether."""
        return psutil.Process(self.kept(name)["pid"]).children()[0]

    def family(self) -> list[psutil.Process]:
        """Everything that runs for this home, whoever its parent is."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("COTUNE_FED") == str(self.home.path) and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path_factory.mktemp("coordinator") / "fed")
    made.start()
    yield made
    if made.process:
        made.kill()


def asked(folder: Path, name: str, key: SigningKey | None = None, node_key: str | None = None) -> JoinRequest:
    """A site's request, written and read back."""
    key = key or SigningKey.create(folder / f"{name}-{time.monotonic_ns()}.key")
    request = JoinRequest(
        site=name, public_key=key.public, node_key=node_key or new_node_key(), policy_sha256="ab" * 32, cotune="0.1.0"
    ).signed(key.sign)
    (folder / f"{name}.json").write_text(request.to_json())
    return read_request(folder / f"{name}.json")


def new_node_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def code_of(do: Callable[[], object]) -> str:
    with pytest.raises(CotuneError) as caught:
        do()
    return caught.value.code


def request_to(address: str, method: str, path: str, ca: Path) -> int:
    context = ssl.create_default_context(cafile=str(ca))
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=30, context=context)
    try:
        connection.request(method, path, headers={"content-type": "application/protobuf"})
        return connection.getresponse().status
    finally:
        connection.close()


def listening(processes: list[psutil.Process]) -> set[object]:
    """Where these listen; one that has ended meanwhile listens nowhere."""
    found: set[object] = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            connections = process.net_connections("tcp")
            found |= {each.laddr for each in connections if each.status == psutil.CONN_LISTEN}
    return found


def test_the_gateway_is_the_one_door_and_our_authority_the_one_to_trust(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    home = coordinator.home
    gate = home.settings.gateway.bind
    assert request_to(gate, "GET", "/health", home.tls / "ca.crt") == 200
    for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs"):
        assert request_to(gate, "POST", path, home.tls / "ca.crt") == 404
    create_authority(tmp_path, "trial", datetime.now(UTC))
    for address in (gate, home.superlink_address):
        with pytest.raises(ssl.SSLCertVerificationError):
            request_to(address, "GET", "/health", tmp_path / "ca.crt")
    ports = {int(gate.rpartition(":")[2]), home.settings.superlink.port}
    assert listening(coordinator.family()) == {("127.0.0.1", port) for port in ports}


def test_flower_asks_its_secret_of_whoever_wants_a_task(coordinator: Coordinator) -> None:
    home = coordinator.home
    assert request_to(home.superlink_address, "POST", "/v1/runtime/acquire-task", home.tls / "ca.crt") in (401, 403)


@pytest.mark.parametrize("name", CHILDREN)
def test_a_killed_child_is_back_and_the_others_stay(coordinator: Coordinator, name: str) -> None:
    before = {each: coordinator.program(each) for each in CHILDREN}
    restarts = coordinator.kept(name)["restarts"]
    before[name].kill()
    soon(lambda: coordinator.kept(name)["restarts"] == restarts + 1)
    soon(coordinator.is_up)
    after = {each: coordinator.program(each) for each in CHILDREN}
    assert [each for each in CHILDREN if after[each] != before[each]] == [name]


def test_a_second_one_is_refused_and_so_is_another_on_its_ports(coordinator: Coordinator, tmp_path: Path) -> None:
    again = coordinator.command("up")
    fault = json.loads(again.stdout)["error"]
    assert (again.returncode, fault["code"]) == (4, "E-UP-RUNNING")
    assert coordinator.process is not None
    assert str(coordinator.process.pid) in fault["message"]

    other = Coordinator(tmp_path / "other")
    settings = other.home.path / "fed.toml"
    theirs, ours = other.home.settings.superlink.port, coordinator.home.settings.superlink.port
    text = settings.read_text()
    settings.write_text(text.replace(f"port = {theirs}", f"port = {ours}"))
    refused = other.command("up")
    fault = json.loads(refused.stdout)["error"]
    assert (refused.returncode, fault["code"]) == (2, "E-SUPERLINK-FOREIGN")
    assert str(coordinator.program("superlink").pid) in fault["message"]

    settings.write_text(text.replace(other.home.settings.gateway.bind, coordinator.home.settings.gateway.bind))
    refused = other.command("up")
    fault = json.loads(refused.stdout)["error"]
    assert (refused.returncode, fault["code"], fault["param"]) == (2, "E-PORT", "gateway.bind")
    assert running(other.home.path) is None
    assert coordinator.is_up()


def test_sites_are_let_in_kept_over_a_crash_and_shut_out(coordinator: Coordinator, tmp_path: Path) -> None:
    home, control = coordinator.home, coordinator.control
    key = SigningKey.create(tmp_path / "key")
    request = asked(tmp_path, "st-mary", key)
    done = coordinator.command("approve", str(tmp_path / "st-mary.json"), "--days", "3")
    assert done.returncode == 0, done.stdout
    invite = read_invite(json.loads(done.stdout)["data"]["invite"], datetime.now(UTC))
    assert (invite.site, invite.site_key, invite.address) == ("st-mary", key.public, home.settings.federation.address)
    assert invite.coordinator_key == home.key.public
    assert invite.ca == (home.tls / "ca.crt").read_text()
    first = enrolled(home.path)["st-mary"]
    assert control.nodes()[first.node_id] == "registered"

    assert code_of(lambda: approve(home, asked(tmp_path, "st-mary"), 3, control)) == "E-SITE-NAME"
    assert code_of(lambda: approve(home, asked(tmp_path, "mercy", key), 3, control)) == "E-SITE-KEY"
    borrowed = asked(tmp_path, "mercy", node_key=request.node_key)
    assert code_of(lambda: approve(home, borrowed, 3, control)) == "E-SITE-KEY"

    coordinator.kill()
    soon(lambda: not coordinator.family())
    coordinator.start()
    approve(home, request, 3, control)
    assert enrolled(home.path)["st-mary"].node_id == first.node_id
    rows = json.loads(coordinator.command("sites").stdout)["data"]["sites"]
    assert [(row["site"], row["courier"]) for row in rows] == [("st-mary", "registered")]

    moved = asked(tmp_path, "st-mary", key)
    approve(home, moved, 3, control)
    withdraw(home, control)
    second = enrolled(home.path)["st-mary"]
    assert set(control.nodes()) == {second.node_id} != {first.node_id}

    assert coordinator.command("revoke", "st-mary").returncode == 0
    assert enrolled(home.path)["st-mary"].state == "revoked"
    assert not control.nodes()
    assert code_of(lambda: approve(home, moved, 3, control)) == "E-SITE-REVOKED"
    approve(home, asked(tmp_path, "st-mary", key), 3, control)
    assert enrolled(home.path)["st-mary"].state == "approved"


def test_a_crash_between_flower_and_our_file_is_made_good(coordinator: Coordinator, tmp_path: Path) -> None:
    home, control = coordinator.home, coordinator.control
    request = asked(tmp_path, "charite")
    node_id = control.register(request.node_key)  # and then the power went
    assert node_id is not None
    approve(home, request, 3, control)
    assert enrolled(home.path)["charite"].node_id == node_id


def test_a_site_is_shut_out_while_nothing_runs_and_flower_told_later(coordinator: Coordinator, tmp_path: Path) -> None:
    home, control = coordinator.home, coordinator.control
    approve(home, asked(tmp_path, "berlin"), 3, control)
    node_id = enrolled(home.path)["berlin"].node_id
    stopped = coordinator.command("down")
    assert json.loads(stopped.stdout)["data"]["did_run"] is True
    assert not coordinator.family()
    assert coordinator.process is not None
    assert coordinator.process.wait() == 0
    revoke(home, "berlin")
    assert code_of(lambda: approve(home, asked(tmp_path, "late"), 3, control)) == "E-SUPERLINK"
    assert "late" not in enrolled(home.path)
    coordinator.start()
    soon(lambda: not enrolled(home.path)["berlin"].withdrawn)
    assert node_id not in control.nodes()


def test_a_certificate_near_its_end_is_renewed_while_it_runs(coordinator: Coordinator) -> None:
    """The hourly duty, done at once, with a certificate of eleven months ago in its place."""
    home = coordinator.home
    hosts = [home.settings.federation.address.rpartition(":")[0]]
    (home.tls / "server.crt").unlink()
    assert ensure_server_certificate(home.tls, hosts, datetime.now(UTC) - timedelta(days=340))
    old = read_certificate(home.tls / "server.crt").serial_number
    restarts = {name: coordinator.kept(name)["restarts"] for name in CHILDREN}
    Duties(home, coordinator.control, lambda _line: None).renew()
    new = read_certificate(home.tls / "server.crt").serial_number
    assert new != old
    soon(lambda: all(coordinator.kept(name)["restarts"] > restarts[name] for name in ("superlink", "gateway")))
    soon(coordinator.is_up)
    assert coordinator.kept("superexec")["restarts"] == restarts["superexec"]
    for address in (home.settings.gateway.bind, home.superlink_address):
        host, _, port = address.rpartition(":")
        shown = ssl.get_server_certificate((host, int(port)), ca_certs=str(home.tls / "ca.crt"))
        assert shown == (home.tls / "server.crt").read_text()


def test_nothing_is_left_when_the_command_is_killed_with_a_program_stopped(coordinator: Coordinator) -> None:
    coordinator.program("superlink").send_signal(signal.SIGSTOP)
    coordinator.kill()
    soon(lambda: not coordinator.family())
    assert running(coordinator.home.path) is None
