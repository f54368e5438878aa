"""`cotune doctor` on installations that are really bad: each fault is found, named, and says how it is mended."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.free_ports import free_port
from tests.server.doors import Tls, door, make_tls, nginx_program, running, superlink

from cotune.server.fedhome import FedHome, FedSettings
from cotune.server.inspection import SECRETS, inspect
from cotune.shared import cli
from cotune.shared.errors import JobError
from cotune.shared.fault import Fault, flower_faults
from cotune.shared.reaching import look_at

SOUND = {"/health": 200}


@contextlib.contextmanager
def answering(
    statuses: Mapping[str, int], tls: Tls | None, behind_s: float = 0, host: str = "127.0.0.1"
) -> Iterator[str]:
    """A server with these answers, 404 for all else, and a clock that is behind."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(statuses.get(self.path, 404))
            self.send_header("Date", formatdate(time.time() - behind_s, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

        do_POST = do_GET

    server = ThreadingHTTPServer((host, 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that goes away is no error here
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.key)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return make_tls(tmp_path_factory.mktemp("tls"), days=90)


def codes(faults: list[Fault]) -> list[str]:
    assert all(fault.mend and fault.what for fault in faults)
    return [fault.code for fault in faults]


def told(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """Exit code, and the faults by what was looked at."""
    code = cli.run(["doctor", *map(str, arguments), "--json"])
    envelope = json.loads(capsys.readouterr().out)
    assert (envelope["status"] == "error") == (code != 0)
    return code, envelope["data"]["looked_at"]


def test_a_sound_address_has_no_fault(tls: Tls) -> None:
    with answering(SOUND, tls) as address:
        assert look_at(address, tls.ca.read_text()) == []


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/control/list-runs", 405, "E-OPEN-CONTROL"),
        ("/v1/control/list-runs", 401, "E-OPEN-CONTROL"),  # refused, but there
        ("/v1/runtime/get-nodes", 415, "E-OPEN-RUNTIME"),
        ("/openapi.json", 200, "E-OPEN-DOCS"),
    ],
)
def test_a_call_that_is_there_is_found(path: str, status: int, code: str, tls: Tls) -> None:
    with answering({**SOUND, path: status}, tls) as address:
        assert codes(look_at(address, tls.ca.read_text())) == [code]


def test_an_address_without_tls_is_found(tls: Tls) -> None:
    with answering(SOUND, None) as address:
        assert codes(look_at(address, tls.ca.read_text())) == ["E-OPEN-PLAINTEXT"]


@pytest.mark.parametrize(("days", "word"), [(-1, "ended"), (20, "ends")])
def test_a_certificate_that_has_ended_or_will_soon_is_found(days: int, word: str, tmp_path: Path) -> None:
    old = make_tls(tmp_path, days=days)
    with answering(SOUND, old) as address:
        [fault] = look_at(address, old.ca.read_text())
    assert fault.code == "E-CERT-END"
    assert f"certificate {word} on" in fault.what


def test_a_certificate_of_another_authority_is_found(tls: Tls, tmp_path: Path) -> None:
    other = make_tls(tmp_path)
    with answering(SOUND, tls) as address:
        assert codes(look_at(address, other.ca.read_text())) == ["E-CERT-CA"]


def test_a_certificate_of_another_name_is_found(tls: Tls) -> None:
    with answering(SOUND, tls, host="127.0.0.2") as address:
        [fault] = look_at(address, tls.ca.read_text())
    assert fault.code == "E-CERT-CA"
    assert "127.0.0.2" in fault.what


@pytest.mark.parametrize(("behind_s", "found"), [(600, True), (-600, True), (4, True), (-4, True), (0, False)])
def test_clocks_that_are_apart_are_found(behind_s: float, found: bool, tls: Tls) -> None:
    with answering(SOUND, tls, behind_s) as address:
        assert codes(look_at(address, tls.ca.read_text())) == ["E-CLOCK"] * found


def test_a_gateway_without_its_superlink_is_found(tls: Tls) -> None:
    with answering({"/health": 503}, tls) as address:
        assert codes(look_at(address)) == ["E-UPSTREAM"]


def test_broken_tls_is_found(tls: Tls) -> None:
    port = free_port()
    command = ["openssl", "s_server", "-accept", str(port), "-cert", str(tls.certificate), "-key", str(tls.key), "-www"]
    with running([*command, "-cipher", "ALL:@SECLEVEL=0"], port, tls.ca.parent / "log"):
        assert "E-OPEN-TLS" in codes(look_at(f"127.0.0.1:{port}", tls.ca.read_text()))


@pytest.mark.parametrize("address", ["nowhere", "host:", ":1", "host:port", "host:70000", ""])
def test_what_is_no_address_is_said_to_be_none(address: str) -> None:
    with pytest.raises(JobError, match="HOST:PORT"):
        look_at(address)


def test_nobody_at_an_address_is_found_and_fails_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{free_port()}"
    code, looked = told(["--address", address], capsys)
    assert code == 1
    assert [fault["code"] for fault in looked[f"address {address}"]] == ["E-REACH"]


def test_a_sound_address_ends_the_command_well(tls: Tls, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(SOUND, tls) as address:
        code, looked = told(["--address", address, "--ca", tls.ca], capsys)
        assert (code, looked) == (0, {"Flower": [], f"address {address}": []})
        assert cli.run(["doctor", "--address", address]) == 0
        assert "nothing to mend" in capsys.readouterr().out


def test_a_fault_is_printed_with_what_mends_it(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(SOUND, None) as address:
        assert cli.run(["doctor", "--address", address]) == 1
    out, err = capsys.readouterr()
    assert "E-OPEN-PLAINTEXT" in out
    assert "mend it: " in out
    assert err.startswith("E-DOCTOR  1 thing to mend")


def test_a_ca_that_is_no_certificate_is_an_error_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["doctor", "--address", "127.0.0.1:1", "--ca", str(tmp_path / "none")]) == 4
    assert capsys.readouterr().err.startswith("E-TLS")


def test_a_flower_of_another_version_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flower_faults() == []
    other = tmp_path / "flwr-1.30.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: flwr\nVersion: 1.30.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    [fault] = flower_faults()
    assert fault.code == "E-FLWR-VERSION"
    assert "1.30.0" in fault.what
    assert "pip install" in fault.mend


# a coordinator's home


@pytest.fixture
def fed(tmp_path: Path) -> FedHome:
    settings = FedSettings.model_validate(
        {
            "federation": {"name": "trial", "address": f"127.0.0.1:{free_port()}"},
            "gateway": {"bind": "127.0.0.1:1"},
        }
    )
    return FedHome.create(tmp_path / "fed", settings)


def test_a_new_home_has_no_fault_but_that_nothing_runs(fed: FedHome) -> None:
    assert codes(inspect(fed.path)) == ["E-REACH"]


def test_a_home_that_others_may_enter_is_found(fed: FedHome) -> None:
    fed.path.chmod(0o755)
    [fault] = inspect(fed.path)
    assert (fault.code, fault.mend) == ("E-FED-HOME", f"chmod 700 {fed.path}")


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_that_others_may_read_is_found(name: str, fed: FedHome) -> None:
    (fed.path / name).chmod(0o640)
    found = inspect(fed.path)
    assert [fault.mend for fault in found if fault.code == "E-KEY"] == [f"chmod 600 {fed.path / name}"]


def test_every_secret_file_of_a_home_is_looked_at(fed: FedHome) -> None:
    private = {
        path.relative_to(fed.path).as_posix()
        for path in fed.path.rglob("*")
        if path.is_file() and (b"PRIVATE KEY" in path.read_bytes() or path.suffix == ".secret")
    }
    assert private == set(SECRETS)


def test_a_server_certificate_that_ends_soon_is_found(fed: FedHome) -> None:
    made = make_tls(fed.path.parent / "old", days=10)
    (fed.tls / "server.crt").write_bytes(made.certificate.read_bytes())
    assert "E-CERT-END" in codes(inspect(fed.path))
    (fed.tls / "server.crt").write_bytes(b"none")
    assert "E-TLS" in codes(inspect(fed.path))


def test_a_home_that_is_not_there_is_one_fault(tmp_path: Path) -> None:
    assert codes(inspect(tmp_path / "none")) == ["E-FED-HOME"]


# Flower as it starts by itself, and as cotune starts it

ALL_OPEN = {"E-SUPERLINK-PLAIN", "E-SUPERLINK-NODES", "E-SUPERLINK-TASKS", "E-SUPERLINK-MEMORY"}


def of_process(looked: dict[str, list[dict[str, str]]], pid: int) -> set[str]:
    return {each["code"] for each in looked["SuperLinks of this machine"] if f"process {pid}:" in each["what"]}


@pytest.mark.slow
def test_flowers_defaults_are_found_open(fed: FedHome, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    stock = [
        str(Path(sys.executable).parent / "flower-superlink"),
        "--insecure",
        "--host",
        "0.0.0.0",  # noqa: S104 - this is what is to be found
        "--port",
        str(port),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it starts flower-superexec by name
    env = {"FLWR_HOME": str(tmp_path), "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "0", "PATH": path}
    with running(stock, port, tmp_path / "log", **env) as process:
        code, looked = told(["--fed", fed.path, "--address", f"127.0.0.1:{port}"], capsys)
    assert code == 1
    assert {each["code"] for each in looked[f"address 127.0.0.1:{port}"]} == {
        "E-OPEN-PLAINTEXT", "E-OPEN-CONTROL", "E-OPEN-RUNTIME", "E-OPEN-DOCS",
    }  # fmt: skip
    assert of_process(looked, process.pid) == {*ALL_OPEN, "E-SUPERLINK-PUBLIC", "E-SUPERLINK-INSTALLS"}


def test_a_superlink_that_reports_home_is_found(
    fed: FedHome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program of that name and environment which only waits: the real one would report this very test."""
    program = tmp_path / "flower-superlink"
    program.write_text("print(flush=True); input()")
    env = {**os.environ, "FLWR_TELEMETRY_ENABLED": "1"}
    process = subprocess.Popen([sys.executable, program], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout
        process.stdout.readline()
        _, looked = told(["--fed", fed.path], capsys)
        process.communicate(b"\n")
    assert "E-TELEMETRY" in of_process(looked, process.pid)


WITHOUT_NGINX = pytest.mark.skipif(nginx_program() is None, reason="nginx is not installed (Debian: nginx-light)")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedded", pytest.param("nginx", marks=WITHOUT_NGINX)])
def test_a_superlink_behind_the_gateway_has_no_fault(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tls, port = make_tls(tmp_path / "tls", days=90), free_port()
    with (
        running(superlink(port, tls, tmp_path), port, tmp_path / "log", FLWR_HOME=str(tmp_path)) as process,
        door(kind, port, tls, tmp_path / "door") as gate,
    ):
        assert look_at(f"127.0.0.1:{gate.port}", tls.ca.read_text()) == []
        published = set(codes(look_at(f"127.0.0.1:{port}", tls.ca.read_text())))
        _, looked = told(["--fed", tmp_path / "none"], capsys)
    assert of_process(looked, process.pid) == set()
    assert published == {"E-OPEN-CONTROL", "E-OPEN-RUNTIME", "E-OPEN-DOCS"}
