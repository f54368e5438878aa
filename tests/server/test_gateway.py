"""The public door: what passes, what is not there, and that nobody can hold it open or fill it up.

The same table is held against the embedded gateway and against nginx with the generated configuration.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tests.free_ports import free_port
from tests.server.doors import QUICK, Door, Tls, door, make_tls, nginx_program, rest, running, trusting

from cotune.server.fedhome import FedHome, FedSettings
from cotune.server.gateway import gate_of, passes
from cotune.server.link import Limits

BACKEND = Path(__file__).parent / "backend.py"
ABSOLUTE = ("POST", "http://127.0.0.1:1/v1/fleet/pull-messages")
MALFORMED = {
    ("POST", "/v1/fleet/pull-messages\x00"),
    ("POST", "/../v1/control/start-run"),
    ("post", "/v1/fleet/pull-messages"),
    ("TRACE", "/v1/fleet/pull-messages"),
    ("CONNECT", "127.0.0.1:1"),
}
NOT_THERE = [
    ("GET", "/"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("POST", "/v1/control/start-run"),
    ("POST", "/v1/control/list-nodes"),
    ("POST", "/v1/runtime/acquire-task"),
    ("POST", "/v1/runtime/responses"),
    ("POST", "/v1/fleet"),
    ("POST", "/v1/fleet/"),
    ("POST", "/v1/fleet/pull-messages/"),
    ("POST", "/v1/fleet/pull-messages?x=1"),
    ("POST", "//v1/fleet/pull-messages"),
    ("POST", "/v1//fleet/pull-messages"),
    ("POST", "//v1/fleet/../control/start-run"),
    ("POST", "/v1/fleet/../control/start-run"),
    ("POST", "/v1/fleet/./pull-messages"),
    ("POST", "/v1/fleet/..;/control/start-run"),
    ("POST", "/v1/fleet/..%2fcontrol/start-run"),
    ("POST", "/v1/fleet/%2e%2e/control/start-run"),
    ("POST", "/v1%2ffleet/pull-messages"),
    ("POST", "/v1/fleet/pull%2dmessages"),
    ("POST", "/v1/fleet/..\\control\\start-run"),
    ("POST", "/V1/FLEET/PULL-MESSAGES"),
    ("POST", "/v1/fleet/Pull-Messages"),
    ("POST", "/v1/fleet/pull-messages#x"),
    ("POST", "/health"),
    ("HEAD", "/health"),
    ("GET", "/health/"),
    ("GET", "/health?x=1"),
    ("GET", "/HEALTH"),
    ("POST", "https://localhost/v1/control/start-run"),
    ABSOLUTE,
    *MALFORMED,
    *((method, "/v1/fleet/pull-messages") for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH")),
]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return make_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def upstream(tls: Tls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    command = [sys.executable, str(BACKEND), str(port), str(tls.certificate), str(tls.key)]
    with running(command, port, tmp_path_factory.mktemp("upstream") / "log"):
        yield port


def _kinds() -> list[object]:
    why = "nginx is not installed (Debian: nginx-light)"
    marks = [pytest.mark.slow, pytest.mark.skipif(nginx_program() is None, reason=why)]
    return ["embedded", pytest.param("nginx", marks=marks)]


@pytest.fixture(scope="module", params=_kinds())
def gate(
    request: pytest.FixtureRequest, upstream: int, tls: Tls, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Door]:
    with door(request.param, upstream, tls, tmp_path_factory.mktemp("door")) as made:
        yield made


def seen(gate: Door) -> list[dict[str, object]]:
    """The requests that reached the upstream."""
    return json.loads(gate.ask("POST", "/v1/fleet/seen")[1])


def status(answer: bytes) -> int:
    return int(answer.split(None, 2)[1]) if answer else 0


def request(line: str, *headers: str) -> bytes:
    return "\r\n".join([line, "Host: x", *headers, "", ""]).encode("latin-1")


def test_fleet_calls_and_the_health_check_pass(gate: Door) -> None:
    assert gate.ask("POST", "/v1/fleet/pull-messages", b"abc") == (200, b"3")
    assert gate.ask("GET", "/health")[0] == 200


def test_everything_else_is_not_there_and_reaches_nobody(gate: Door) -> None:
    before = len(seen(gate))
    ending = ("Content-Length: 0", "Connection: close")
    answers = {pair: status(gate.raw(request(f"{pair[0]} {pair[1]} HTTP/1.1", *ending))) for pair in NOT_THERE}
    malformed = {pair for pair, code in answers.items() if code in (400, 405)}  # answered before anything is looked up
    assert malformed <= MALFORMED
    others = {pair: code for pair, code in answers.items() if pair not in malformed and code != 404}
    assert set(others.items()) <= {(ABSOLUTE, 200)}  # nginx takes the path of it: the same fleet call
    assert [each["path"] for each in seen(gate)[before:]] == ["/v1/fleet/pull-messages"] * len(others)


def test_who_the_client_is_cannot_be_said_by_the_client(gate: Door) -> None:
    forged = {"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "http", "Forwarded": "for=6.6.6.6"}
    assert gate.ask("POST", "/v1/fleet/who", **forged)[0] == 200
    headers = seen(gate)[-1]["headers"]
    assert isinstance(headers, dict)
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert "6.6.6.6" not in json.dumps(headers)
    assert not {"forwarded", "x-forwarded-proto"} & set(headers)


def test_answers_tell_the_time_and_not_the_software(gate: Door) -> None:
    answer = gate.raw(request("GET /health HTTP/1.1", "Connection: close")).decode().lower()
    assert "\r\ndate: " in answer
    assert not [word for word in ("uvicorn", "h11", "python", "secret-name", "/1.22") if word in answer]


@pytest.mark.parametrize("declared", ["Content-Length: 3221225472", "Transfer-Encoding: chunked"])
def test_a_body_over_the_cap_is_413_and_is_not_kept(gate: Door, declared: str) -> None:
    assert gate.ask("POST", "/v1/fleet/warm", b"x")[0] == 200
    before = gate.memory()
    with gate.connect() as link:
        link.sendall(request("POST /v1/fleet/push-object HTTP/1.1", declared))
        piece = b"100000\r\n" + b"x" * 0x100000 + b"\r\n" if "chunked" in declared else b"x" * 0x100000
        try:
            for _ in range(64):
                link.sendall(piece)
        except OSError:  # the gateway has stopped listening to it
            pass
        answer = rest(link)
    assert status(answer) == 413
    assert gate.memory() - before < 20_000_000


@pytest.mark.parametrize("more", [(), ("Expect: 100-continue",)])
def test_a_body_that_says_itself_that_it_is_too_large_is_refused_unread(gate: Door, more: tuple[str, ...]) -> None:
    with gate.connect() as link:
        link.sendall(request("POST /v1/fleet/push-object HTTP/1.1", "Content-Length: 3221225472", *more))
        assert link.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_just_within_the_cap_passes_and_one_byte_more_does_not(gate: Door) -> None:
    assert gate.ask("POST", "/v1/fleet/push-object", bytes(gate.gate.max_body)) == (
        200,
        str(gate.gate.max_body).encode(),
    )
    assert gate.ask("POST", "/v1/fleet/push-object", bytes(gate.gate.max_body + 1))[0] == 413


@pytest.mark.slow
def test_large_answers_and_large_bodies_stream_through(upstream: int, tls: Tls, tmp_path: Path) -> None:
    for kind in ("embedded", "nginx") if nginx_program() else ("embedded",):
        with door(kind, upstream, tls, tmp_path / kind, mb=40) as wide:
            before = wide.memory()
            assert wide.ask("POST", "/v1/fleet/push-object", bytes(30_000_000)) == (200, b"30000000")
            answer, content = wide.ask("POST", "/v1/fleet/big")
            assert (answer, len(content)) == (200, 30_000_000)
            assert wide.memory() - before < 20_000_000


@pytest.mark.parametrize(
    "slow",
    [
        b"POST /v1/fleet/pull",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nX-A: ",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"",
    ],
    ids=["line", "headers", "body", "chunked", "silent"],
)
def test_a_client_that_stalls_is_cut_off_while_others_are_served(gate: Door, slow: bytes) -> None:
    with gate.connect() as link:
        link.sendall(slow)
        assert gate.ask("POST", "/v1/fleet/pull-messages", b"abc") == (200, b"3")
        assert status(rest(link)) in (0, 408)


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nX-A: ", b"a"),
        (b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", b"a"),
        (b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    ],
    ids=["headers", "body", "chunked"],
)
def test_a_client_that_drips_is_cut_off_while_others_are_served(gate: Door, start: bytes, drop: bytes) -> None:
    if gate.kind == "nginx" and b"X-A" not in start:
        pytest.skip("nginx limits the pause between two pieces of a body, not how long all of it takes")
    link = gate.connect()
    link.settimeout(0.2)
    with link:
        link.sendall(start)
        answer = None
        for _ in range(100):
            try:
                answer = link.recv(1000)
                break
            except TimeoutError:
                link.sendall(drop)
    assert answer is not None, "still listened to after 100 drops"
    assert status(answer) in (0, 408)
    assert gate.ask("POST", "/v1/fleet/pull-messages", b"abc") == (200, b"3")


def test_a_connection_that_never_begins_tls_is_cut_off(gate: Door) -> None:
    with socket.create_connection(("127.0.0.1", gate.port), 20) as link:
        assert link.recv(100) == b""


def test_plaintext_old_tls_and_another_ca_are_refused(gate: Door, tmp_path: Path) -> None:
    with socket.create_connection(("127.0.0.1", gate.port), 20) as plain:
        plain.sendall(request("POST /v1/fleet/pull-messages HTTP/1.1", "Content-Length: 0"))
        assert b" 200 " not in plain.recv(1000)
    with pytest.raises(ssl.SSLCertVerificationError), socket.create_connection(("127.0.0.1", gate.port)) as raw:
        trusting(make_tls(tmp_path / "other").ca).wrap_socket(raw, server_hostname="127.0.0.1")
    for version in ("-tls1", "-tls1_1"):
        assert "Protocol version: TLS" not in handshake(gate, version, "-cipher", "ALL:@SECLEVEL=0")
    assert "TLSv1.2" in handshake(gate, "-tls1_2")
    assert "TLSv1.3" in handshake(gate)


def handshake(gate: Door, *options: str) -> str:
    done = subprocess.run(
        ["openssl", "s_client", "-brief", "-connect", f"127.0.0.1:{gate.port}", *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        check=False,
    )
    return (done.stdout + done.stderr).decode()


SMUGGLED = [
    ("Content-Length: 5", "Transfer-Encoding: chunked"),
    ("Transfer-Encoding: chunked", "Content-Length: 5"),
    ("Content-Length: 5", "Content-Length: 6"),
    ("Transfer-Encoding: xchunked",),
    ("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
    ("Transfer-Encoding : chunked",),
    ("Content-Length: +5",),
    ("Content-Length: 0x5",),
    ("Content-Length: -1",),
    ("Content-Length: 99999999999999999999999",),
]


@pytest.mark.parametrize("headers", SMUGGLED, ids=" & ".join)
def test_a_request_of_two_lengths_or_none_that_counts_is_refused_whole(gate: Door, headers: tuple[str, ...]) -> None:
    before = len(seen(gate))
    inner = "0\r\n\r\nPOST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    answer = gate.raw(request("POST /v1/fleet/pull-messages HTTP/1.1", *headers) + inner.encode())
    assert status(answer) in (400, 413, 501)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert len(seen(gate)) == before


def test_requests_in_one_piece_are_answered_in_turn_and_each_is_looked_at(gate: Door) -> None:
    good = request("POST /v1/fleet/one HTTP/1.1", "Content-Length: 2") + b"ab"
    bad = request("POST /v1/control/start-run HTTP/1.1", "Content-Length: 0", "Connection: close")
    answer = gate.raw(good + good + bad)
    assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 200, 404]


def test_a_client_that_asks_first_is_told_to_go_on(gate: Door) -> None:
    with gate.connect() as link:
        link.sendall(request("POST /v1/fleet/one HTTP/1.1", "Content-Length: 2", "Expect: 100-continue"))
        assert link.recv(1000).startswith(b"HTTP/1.1 100 ")
        link.sendall(b"ab")
        assert link.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_headers_without_end_are_refused(gate: Door) -> None:
    many = [f"X-{number}: {'a' * 1000}" for number in range(60)]
    answer = gate.raw(request("POST /v1/fleet/one HTTP/1.1", "Content-Length: 0", *many))
    assert status(answer) in (400, 431)


@pytest.mark.slow
def test_without_a_superlink_the_answer_is_503_until_it_is_back(tls: Tls, tmp_path: Path) -> None:
    for kind in ("embedded", "nginx") if nginx_program() else ("embedded",):
        port = free_port()
        command = [sys.executable, str(BACKEND), str(port), str(tls.certificate), str(tls.key)]
        with door(kind, port, tls, tmp_path / kind) as gate:
            assert gate.ask("POST", "/v1/fleet/pull-messages", b"abc")[0] == 503
            assert gate.ask("GET", "/health")[0] == 503
            assert gate.ask("GET", "/docs")[0] == 404
            with running(command, port, tmp_path / "log"):
                assert gate.ask("POST", "/v1/fleet/pull-messages", b"abc") == (200, b"3")
            assert gate.ask("POST", "/v1/fleet/pull-messages", b"abc")[0] == 503


def test_an_upstream_of_another_ca_is_no_upstream(upstream: int, tls: Tls, tmp_path: Path) -> None:
    other = make_tls(tmp_path / "other")
    mixed = Tls(other.ca, tls.certificate, tls.key)
    for kind in ("embedded", "nginx") if nginx_program() else ("embedded",):
        with door(kind, upstream, mixed, tmp_path / kind) as gate:
            shown = Door(kind, gate.gate, tls, gate.process)  # the client trusts the right one
            assert shown.ask("POST", "/v1/fleet/pull-messages", b"abc")[0] == 503


@pytest.mark.slow
def test_a_hundred_clients_are_served_at_a_time(gate: Door, upstream: int, tmp_path: Path) -> None:
    with door(gate.kind, upstream, gate.tls, tmp_path / "door", limits=Limits()) as patient:

        def poll(_: int) -> list[tuple[int, bytes]]:
            return [patient.ask("POST", "/v1/fleet/pull-messages", b"abc") for _ in range(3)]

        with ThreadPoolExecutor(100) as pool:
            answers = [answer for answers in pool.map(poll, range(100)) for answer in answers]
    assert answers == [(200, b"3")] * 300


@pytest.mark.parametrize("limits", [replace(QUICK, connections=3), replace(QUICK, per_address=3)])
def test_more_connections_than_may_be_are_closed_and_make_room_again(
    limits: Limits, upstream: int, tls: Tls, tmp_path: Path
) -> None:
    with door("embedded", upstream, tls, tmp_path, limits=limits) as gate:
        held = [gate.connect() for _ in range(3)]
        for link in held:  # each is served before the next thing happens
            link.sendall(request("POST /v1/fleet/one HTTP/1.1", "Content-Length: 0"))
            assert link.recv(1000).startswith(b"HTTP/1.1 200 ")
        with gate.connect() as one_more:
            with contextlib.suppress(OSError):  # closed already
                one_more.sendall(request("POST /v1/fleet/one HTTP/1.1", "Content-Length: 0"))
            assert rest(one_more) == b""
        for link in held:
            link.close()
        assert _in_the_end(lambda: gate.ask("POST", "/v1/fleet/one")[0] == 200)


def test_a_client_that_does_not_take_its_answer_is_cut_off(upstream: int, tls: Tls, tmp_path: Path) -> None:
    limits = replace(QUICK, send_s=0.5)
    with door("embedded", upstream, tls, tmp_path, limits=limits) as gate, gate.connect() as link:
        link.sendall(request("POST /v1/fleet/big HTTP/1.1", "Content-Length: 0"))
        assert _in_the_end(lambda: _is_met(gate, link))
        assert _in_the_end(lambda: not _is_met(gate, link))
        assert len(rest(link)) < 30_000_000


def _is_met(gate: Door, link: ssl.SSLSocket) -> bool:
    """Whether the gateway still has this connection."""
    ours = link.getsockname()[1]
    return any(each.raddr and each.raddr.port == ours for each in gate.process.net_connections("tcp"))


def _in_the_end(is_so: Callable[[], bool]) -> bool:
    """Whether something comes true within half a minute."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if is_so():
                return True
        time.sleep(0.05)
    return False


@pytest.fixture
def home(tmp_path: Path) -> FedHome:
    settings = {"federation": {"name": "trial", "address": "127.0.0.1:1"}, "gateway": {"bind": "127.0.0.1:1"}}
    return FedHome.create(tmp_path / "fed", FedSettings.model_validate(settings))


def _main(home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cotune.server.gateway", "--home", str(home)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_gate_of_a_home_is_what_its_settings_say(home: FedHome) -> None:
    gate = gate_of(home)
    assert (gate.bind, gate.upstream, gate.max_body) == ("127.0.0.1:1", "https://127.0.0.1:9080", 64_000_000)
    assert [gate.ca, gate.certificate, gate.key] == [home.tls / n for n in ("ca.crt", "server.crt", "server.key")]


def test_without_a_home_it_ends_with_a_named_error(tmp_path: Path) -> None:
    done = _main(tmp_path / "none")
    assert (done.returncode, done.stderr.split()[0]) == (1, "E-FED-HOME")


def test_with_a_damaged_certificate_it_ends_with_a_named_error(home: FedHome) -> None:
    (home.tls / "server.crt").write_text("none")
    done = _main(home.path)
    assert (done.returncode, done.stderr.split()[0]) == (1, "E-TLS")
    assert "Traceback" not in done.stderr


def test_on_a_port_that_is_taken_it_ends_with_a_named_error(home: FedHome) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        file = home.path / "fed.toml"
        file.write_text(file.read_text().replace('127.0.0.1:1"', f'127.0.0.1:{taken.getsockname()[1]}"'))
        done = _main(home.path)
    assert (done.returncode, done.stderr.split()[0]) == (2, "E-PORT")
    assert "Traceback" not in done.stderr


def test_the_filter_reads_request_lines_letter_for_letter() -> None:
    assert passes(b"POST", b"/v1/fleet/pull-messages")
    assert passes(b"GET", b"/health")
    assert not [pair for pair in NOT_THERE if passes(pair[0].encode(), pair[1].encode())]
