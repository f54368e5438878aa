"""Whether an address is free to listen on, and who has it if not."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import time

import psutil

from cotune.shared.errors import ConnectionFailed

FREE_WITHIN_S = 5.0  # what a killed supervisor leaves takes a moment to end
LOOK_S = 0.25
ANSWER_S = 2.0
SUPERLINK = "flower-superlink"


def require_free(setting: str, address: str) -> None:
    """Refuse to start where another program listens.

    Args:
        setting: Where fed.toml says the address.
        address: HOST:PORT.

    Raises:
        ConnectionFailed: It is in use or cannot be listened on (E-PORT), or another SuperLink has it
            (E-SUPERLINK-FOREIGN).
    """
    deadline = time.monotonic() + FREE_WITHIN_S
    while (fault := _fault(address)) is not None:
        if time.monotonic() > deadline:
            raise _taken(setting, address, fault)
        time.sleep(LOOK_S)


def _fault(address: str) -> str | None:
    """Why an address cannot be listened on; None if it can."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, *_, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _taken(setting: str, address: str, fault: str) -> ConnectionFailed:
    owner = _listener(int(address.rpartition(":")[2]))
    name, whose = _described(owner)
    is_superlink = SUPERLINK in name if owner else _answers_as_a_superlink(address)
    code = "E-SUPERLINK-FOREIGN" if is_superlink else "E-PORT"
    what = "has a SuperLink that this command did not start" if is_superlink else f"cannot be listened on ({fault})"
    hint = f"end it, or choose another `{setting}` in fed.toml"
    return ConnectionFailed(code, f"{address} {what}{whose}", param=setting, hint=hint)


def _listener(port: int) -> psutil.Process | None:
    """Who listens on a port, as far as we may know."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.pid
                and getattr(connection.laddr, "port", None) == port
            ):
                return psutil.Process(connection.pid)
    return None


def _described(owner: psutil.Process | None) -> tuple[str, str]:
    """A process's command, and words that tell whose it is."""
    if owner is None:
        return "", ""
    try:
        words = owner.cmdline()
        return " ".join(words), f": process {owner.pid} ({owner.name()}) of user {owner.username()}"
    except psutil.Error:
        return "", f": process {owner.pid}"


def _answers_as_a_superlink(address: str) -> bool:
    """Whether who listens, and is not ours to look at, answers a health check as Flower's server does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is told to it, and nothing that it says is believed but this
    host, _, port = address.rpartition(":")
    secure = http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=ANSWER_S, context=context)
    for connection in (secure, http.client.HTTPConnection(host.strip("[]"), int(port), timeout=ANSWER_S)):
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            return answer.status == http.client.OK and answer.getheader("server") == "uvicorn"
        except (OSError, http.client.HTTPException):
            continue
        finally:
            connection.close()
    return False
