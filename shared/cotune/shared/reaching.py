"""A coordinator's address as the network sees it: what answers there, how it is protected, and what time it has.

Nothing is asked that could change anything: a call that is there shows itself by any answer but 404.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from cryptography.x509 import load_der_x509_certificate

from cotune.shared.errors import JobError
from cotune.shared.fault import Fault

TIMEOUT_S = 10
SOON = timedelta(days=30)
SKEW_S = 2.0
MUST_NOT_ANSWER = (
    ("E-OPEN-CONTROL", "/v1/control/list-runs", "the control calls, with which code is started at every site"),
    ("E-OPEN-RUNTIME", "/v1/runtime/get-nodes", "the runtime calls, which hand out tasks and what belongs to them"),
    ("E-OPEN-DOCS", "/openapi.json", "the list of all calls"),
)
GATEWAY = "publish the gateway alone, never the SuperLink's port: `cotune fed up`, or `cotune fed files` for nginx"
RENEW = "cotune fed down, then cotune fed up: it issues a new one"


@dataclass(frozen=True)
class _Place:
    """An address, and whether it speaks TLS."""

    host: str
    port: int
    context: ssl.SSLContext | None

    def ask(self, method: str, path: str) -> http.client.HTTPResponse:
        """Send a request without a body; the answer's body is not read."""
        made = (
            http.client.HTTPSConnection(self.host, self.port, timeout=TIMEOUT_S, context=self.context)
            if self.context
            else http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT_S)
        )
        with contextlib.closing(made):
            made.request(method, path, headers={"Content-Type": "text/plain", "Connection": "close"})
            return made.getresponse()


def look_at(address: str, ca: str | None = None) -> list[Fault]:
    """All that is wrong with a coordinator's address.

    Args:
        address: HOST:PORT.
        ca: The one certificate that may vouch for it, PEM; None: not checked.

    Raises:
        JobError: The address is none (E-ADDRESS).
    """
    host, port = _split(address)
    try:
        context = None if _speaks_plainly(host, port) else _lenient()
        place = _Place(host, port, context)
        found = _protection(place, address, ca) if context else [_plaintext(address)]
        return [*found, *_paths(place, address), *_clock(place, address)]
    except (OSError, http.client.HTTPException) as error:
        what = f"{address}: no answer ({getattr(error, 'strerror', None) or type(error).__name__})"
        return [Fault("E-REACH", what, "start it with `cotune fed up`, and let the port through the firewall")]


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise JobError("E-ADDRESS", f"expected HOST:PORT, got `{address[:80]}`", param="--address")
    return host.strip("[]"), int(port)


def _speaks_plainly(host: str, port: int) -> bool:
    with socket.create_connection((host, port), TIMEOUT_S) as link:
        link.sendall(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        try:
            answer = link.recv(64)
        except OSError:
            return False
    return answer.startswith(b"HTTP/1.") and b" 400 " not in answer[:13]


def _plaintext(address: str) -> Fault:
    what = f"{address}: answers without TLS; whoever is on the way reads and changes everything"
    return Fault("E-OPEN-PLAINTEXT", what, "start the SuperLink without --insecure: `cotune fed up`")


def _lenient() -> ssl.SSLContext:
    """Takes any certificate: what it shows is looked at, nothing is told to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _handshake(place: _Place, context: ssl.SSLContext) -> bytes:
    """The certificate that is shown in a handshake."""
    with (
        socket.create_connection((place.host, place.port), TIMEOUT_S) as raw,
        context.wrap_socket(raw, server_hostname=place.host) as link,
    ):
        return link.getpeercert(binary_form=True) or b""


def _protection(place: _Place, address: str, ca: str | None) -> list[Fault]:
    found: list[Fault] = []
    certificate = load_der_x509_certificate(_handshake(place, _lenient()))
    ends = certificate.not_valid_after_utc
    if ends - datetime.now(UTC) < SOON:
        when = "ended" if ends < datetime.now(UTC) else "ends"
        found.append(Fault("E-CERT-END", f"{address}: its certificate {when} on {ends:%Y-%m-%d}", RENEW))
    if ca is not None:
        try:
            _handshake(place, ssl.create_default_context(cadata=ca))
        except ssl.SSLCertVerificationError as error:
            if "expired" not in error.verify_message:
                what = f"{address}: its certificate does not hold ({error.verify_message})"
                found.append(
                    Fault("E-CERT-CA", what, "this is not the coordinator that was joined, or ask for a new invitation")
                )
    with contextlib.suppress(OSError):
        _handshake(place, _outdated())
        what = f"{address}: takes TLS 1.1, which is broken"
        found.append(Fault("E-OPEN-TLS", what, "allow TLS 1.2 and 1.3 alone"))
    return found


def _outdated() -> ssl.SSLContext:
    context = _lenient()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that it is deprecated is the point
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


def _paths(place: _Place, address: str) -> list[Fault]:
    return [
        Fault(code, f"{address}: {what}, can be reached from here", GATEWAY)
        for code, path, what in MUST_NOT_ANSWER
        if any(place.ask(method, path).status != http.HTTPStatus.NOT_FOUND for method in ("GET", "POST"))
    ]


def _clock(place: _Place, address: str) -> list[Fault]:
    answer, now = place.ask("GET", "/health"), datetime.now(UTC)
    found: list[Fault] = []
    if answer.status != http.HTTPStatus.OK:
        what = f"{address}: answers, but the SuperLink behind it does not (status {answer.status})"
        found.append(Fault("E-UPSTREAM", what, "cotune fed up, on the coordinator's machine"))
    if date := answer.getheader("Date"):
        behind = (parsedate_to_datetime(date) - now).total_seconds()  # cut to whole seconds: up to one too small
        skew = max(behind, -behind - 1)
        if skew > SKEW_S:
            what = f"this machine's clock and that of {address} are {skew:.0f} s apart; Flower allows five"
            found.append(Fault("E-CLOCK", what, "timedatectl set-ntp true, on both machines"))
    return found
