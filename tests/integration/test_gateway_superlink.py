"""A real SuperLink behind the gateway: sites' calls reach it, what would start code at sites is not there.

The same against the embedded gateway and nginx.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from tests.free_ports import free_port
from tests.server.doors import Door, Tls, door, make_tls, nginx_program, rest, running, superlink, trusting

from cotune.server.link import Limits

pytestmark = pytest.mark.slow
PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return make_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def link(tls: Tls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, psutil.Process]]:
    """The port and process of a SuperLink as a coordinator runs it."""
    port, folder = free_port(), tmp_path_factory.mktemp("superlink")
    with running(superlink(port, tls, folder), port, folder / "log", FLWR_HOME=str(folder / "flwr")) as process:
        yield port, psutil.Process(process.pid)


def _kinds() -> list[object]:
    why = "nginx is not installed (Debian: nginx-light)"
    return ["embedded", pytest.param("nginx", marks=pytest.mark.skipif(nginx_program() is None, reason=why))]


@pytest.fixture(scope="module", params=_kinds())
def gate(
    request: pytest.FixtureRequest,
    link: tuple[int, psutil.Process],
    tls: Tls,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Door]:
    with door(request.param, link[0], tls, tmp_path_factory.mktemp("door"), limits=Limits()) as made:
        yield made


def signed(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """The headers by which a node shows who it is."""
    now = dt.datetime.now(dt.UTC).isoformat()
    return {
        **PROTOBUF,
        **dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata()),
        "flwr-public-key": base64.b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-signature": base64.b64encode(sign_message(key, now.encode())).decode(),
        "flwr-timestamp": now,
    }


def routes(gate: Door, port: int) -> list[tuple[str, str]]:
    """Every method and path the SuperLink itself says it serves."""
    described = httpx.get(f"https://127.0.0.1:{port}/openapi.json", verify=trusting(gate.tls.ca)).json()
    return [(method.upper(), path) for path, methods in described["paths"].items() for method in methods]


def test_of_all_the_superlink_serves_only_fleet_and_health_are_there(
    gate: Door, link: tuple[int, psutil.Process]
) -> None:
    served = routes(gate, link[0])
    assert len([path for _, path in served if path.startswith(("/v1/control/", "/v1/runtime/"))]) > 40
    hidden = [pair for pair in served if not pair[1].startswith("/v1/fleet/") and pair != ("GET", "/health")]
    assert {gate.ask(*pair)[0] for pair in hidden} == {404}
    fleet = [pair for pair in served if pair[1].startswith("/v1/fleet/")]
    assert len(fleet) == 12
    for pair in fleet:
        status, answer = gate.ask(*pair)
        assert (status, answer[:1]) == (415, b"{"), pair  # the SuperLink's own words, not the gateway's


def activate(gate: Door, key: ec.EllipticCurvePrivateKey) -> httpx.Response:
    """The first call of a site's courier."""
    request = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30)
    url = f"https://127.0.0.1:{gate.port}/v1/fleet/activate-node"
    content = request.SerializeToString()
    return httpx.post(url, content=content, headers=signed(key), verify=trusting(gate.tls.ca), timeout=30)


def test_a_key_that_nobody_enrolled_is_refused_by_the_superlink_itself(gate: Door) -> None:
    answer = activate(gate, ec.generate_private_key(ec.SECP384R1()))
    assert answer.status_code == 412
    assert answer.json()["code"] == 2004


def test_three_gigabytes_are_413_and_neither_process_grows(gate: Door, link: tuple[int, psutil.Process]) -> None:
    gate.ask("POST", "/v1/fleet/push-object", bytes(1000))
    opening = ["POST /v1/fleet/push-object HTTP/1.1", "Host: x", "Content-Type: application/protobuf"]
    before = gate.memory(), link[1].memory_info().rss
    for headers in (["Content-Length: 3221225472"], ["Transfer-Encoding: chunked"]):
        with gate.connect() as client:
            head = "\r\n".join([*opening, *headers, "", ""])
            client.sendall(head.encode())
            piece = bytes(0x100000)
            if "chunked" in headers[0]:
                piece = b"100000\r\n" + piece + b"\r\n"
            sent = 0
            with contextlib.suppress(OSError):  # it stops being listened to long before the end
                while sent < 3 << 30:
                    client.sendall(piece)
                    sent += len(piece)
            assert rest(client).split()[1:2] in ([b"413"], [])
            if gate.kind == "embedded":  # nginx reads on for two seconds, and lets go of what it reads
                assert sent < 200_000_000
    assert gate.memory() - before[0] < 50_000_000
    assert link[1].memory_info().rss - before[1] < 100_000_000


def test_a_hundred_sites_poll_at_a_time(gate: Door) -> None:
    """Each with its own connection that it keeps, as couriers do."""

    def poll(_: int) -> set[int]:
        key = ec.generate_private_key(ec.SECP384R1())
        content = PullMessagesRequest().SerializeToString()
        with httpx.Client(
            base_url=f"https://127.0.0.1:{gate.port}", verify=trusting(gate.tls.ca), timeout=60
        ) as client:
            answers: set[int] = set()
            for _ in range(3):
                answers.add(client.post("/v1/fleet/pull-messages", content=content, headers=signed(key)).status_code)
                time.sleep(3)  # as often as Flower's own nodes
        return answers

    with ThreadPoolExecutor(100) as pool:
        assert set[int]().union(*pool.map(poll, range(100))) == {401}  # every one was looked at by the SuperLink


def test_the_superlink_may_die_and_come_back(tls: Tls, tmp_path: Path) -> None:
    port = free_port()
    with door("embedded", port, tls, tmp_path / "door", limits=Limits()) as gate:
        for _ in range(2):
            assert gate.ask("GET", "/health")[0] == 503
            with running(superlink(port, tls, tmp_path), port, tmp_path / "log", FLWR_HOME=str(tmp_path)) as process:
                assert gate.ask("GET", "/health")[0] == 200
                assert activate(gate, ec.generate_private_key(ec.SECP384R1())).status_code == 412
                process.kill()
                process.wait()
