"""A gateway as sites meet it: real certificates, a real process or nginx before it, and bytes sent by hand."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.client
import ipaddress
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from tests.free_ports import free_port

from cotune.server.gateway import Gate
from cotune.server.link import Limits
from cotune.server.nginx import nginx_text

QUICK = Limits(handshake_s=1, header_s=1, idle_s=3, body_s=1, body_rate=100_000, send_s=5, linger_s=1)
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


@dataclass(frozen=True)
class Tls:
    """A CA and a certificate for this machine."""

    ca: Path
    certificate: Path
    key: Path


def make_tls(folder: Path, *, days: int = 30) -> Tls:
    """Both, in a folder; the certificate ends in so many days."""
    folder.mkdir(parents=True, exist_ok=True)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
    now = dt.datetime.now(dt.UTC)

    def certificate(name: x509.Name, public: ec.EllipticCurvePublicKey, *more: x509.ExtensionType) -> bytes:
        start = now - dt.timedelta(days=60)
        made = x509.CertificateBuilder().subject_name(name).issuer_name(ca_name).public_key(public)
        made = made.serial_number(x509.random_serial_number()).not_valid_before(start)
        made = made.not_valid_after(now + dt.timedelta(days=days if name != ca_name else 3650))
        for each in more:
            made = made.add_extension(each, critical=isinstance(each, x509.BasicConstraints))
        return made.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM)

    here = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    made = Tls(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    constraints = x509.BasicConstraints(ca=True, path_length=0)
    made.ca.write_bytes(certificate(ca_name, ca_key.public_key(), constraints, usage))
    host = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    made.certificate.write_bytes(certificate(host, key.public_key(), here))
    made.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    made.key.chmod(0o600)
    return made


def until(port: int, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Wait until a process listens."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, f"ended with {process.returncode}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError("does not listen")


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that listens, until the block ends."""
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **QUIET, **env}, cwd=log.parent)
    try:
        until(port, process)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def superlink(port: int, tls: Tls, folder: Path) -> list[str]:
    """The command of a SuperLink as `cotune fed up` starts it."""
    (folder / "secret").write_bytes(b"s" * 32)
    return [
        str(Path(sys.executable).parent / "flower-superlink"),
        *("--host", "127.0.0.1", "--port", str(port), "--isolation", "process", "--enable-supernode-auth"),
        *("--ssl-certfile", str(tls.certificate), "--ssl-keyfile", str(tls.key), "--ssl-ca-certfile", str(tls.ca)),
        *("--superexec-auth-secret-file", str(folder / "secret"), "--database", str(folder / "state.db")),
        "--disable-runtime-dependency-installation",
    ]


@dataclass(frozen=True)
class Door:
    """A gateway that runs."""

    kind: str
    gate: Gate
    tls: Tls
    process: psutil.Process

    @property
    def port(self) -> int:
        return int(self.gate.bind.rpartition(":")[2])

    def memory(self) -> int:
        """Resident bytes of the gateway and its workers."""
        processes = [self.process, *self.process.children(recursive=True)]
        return sum(each.memory_info().rss for each in processes)

    def connect(self, timeout: float = 20) -> ssl.SSLSocket:
        """A connection of a client that trusts this CA alone."""
        raw = socket.create_connection(("127.0.0.1", self.port), timeout)
        return trusting(self.tls.ca).wrap_socket(raw, server_hostname="127.0.0.1")

    def ask(self, method: str, target: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Status and body of one answer; the target goes out as it stands."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=trusting(self.tls.ca), timeout=30)
        with contextlib.closing(connection):
            connection.putrequest(method, target, skip_host=False, skip_accept_encoding=True)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def raw(self, content: bytes) -> bytes:
        """All that comes back for these bytes, until the other side ends."""
        with self.connect() as link:
            link.sendall(content)
            return rest(link)


def trusting(ca: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    return context


def rest(link: ssl.SSLSocket) -> bytes:
    """What comes until the other side ends; a reset ends it too."""
    parts: list[bytes] = []
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while part := link.recv(65_536):
            parts.append(part)
    return b"".join(parts)


@contextlib.contextmanager
def door(kind: str, upstream: int, tls: Tls, folder: Path, *, limits: Limits = QUICK, mb: int = 4) -> Generator[Door]:
    """A gateway of a kind before a port of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    gate = Gate(
        f"127.0.0.1:{free_port()}", f"https://127.0.0.1:{upstream}", tls.certificate, tls.key, tls.ca, mb << 20, limits
    )
    made = Door(kind, gate, tls, psutil.Process())
    command = embedded(gate) if kind == "embedded" else nginx(gate, folder)
    with running(command, made.port, folder / f"{kind}.log") as process:
        yield replace(made, process=psutil.Process(process.pid))


def embedded(gate: Gate) -> list[str]:
    """The gateway's own process; its values are plain ones."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(gate).items() if k != "limits"}
    code = f"""
from pathlib import Path
from cotune.server.gateway import Gate, run
from cotune.server.link import Limits
values = {values!r}
paths = {{name: Path(values[name]) for name in ("certificate", "key", "ca")}}
run(Gate(**{{**values, **paths}}, limits=Limits(**{asdict(gate.limits)!r})))
"""
    return [sys.executable, "-c", code]


def nginx(gate: Gate, folder: Path) -> list[str]:
    """nginx with the generated file in its http section, run by whoever runs the tests."""
    (folder / "gate.conf").write_text(nginx_text(gate))
    (folder / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr;\n"
        + ("user root;\n" if os.geteuid() == 0 else "")
        + "events { worker_connections 2048; }\nhttp { access_log off;\n"
        + "".join(
            f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        + f"include {folder}/gate.conf; }}\n"
    )
    return [str(nginx_program()), "-p", str(folder), "-c", str(folder / "nginx.conf")]


def nginx_program() -> str | None:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
