"""The coordinator's one public door: Flower's fleet calls and the health check pass, nothing else is there.

Flower serves its fleet, control and runtime calls on one port; whoever reaches that port may start code at every
site. So the SuperLink listens on loopback only, and this is what the network sees. A request line that is not on the
list is answered 404, before a byte of it goes anywhere. Every wait has an end, and no body is ever held whole.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import resource
import signal
import ssl
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import h11
import httpx

from cotune.server.fedhome import FedHome
from cotune.server.link import CHUNK, Limits, Link, Refused, date_now
from cotune.shared.errors import ConnectionFailed, CotuneError, StorageError

FLEET = re.compile(rb"/v1/fleet/[a-z]+(-[a-z]+)*")
NOT_PASSED_ON = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te"),
    *(b"trailer", b"transfer-encoding", b"upgrade", b"host", b"expect", b"forwarded", b"date", b"server"),
}
log = logging.getLogger("cotune.gateway")


@dataclass(frozen=True)
class Gate:
    """Where the door is, and what is behind it.

    Attributes:
        bind: ``host:port`` to listen on.
        upstream: The SuperLink, ``https://127.0.0.1:PORT``.
        certificate: The certificate chain shown to sites.
        key: Its private key.
        ca: The CA that the SuperLink's own certificate must come from.
        max_body: The largest body of a request, bytes.
        limits: Times and numbers.
    """

    bind: str
    upstream: str
    certificate: Path
    key: Path
    ca: Path
    max_body: int
    limits: Limits = field(default_factory=Limits)


@dataclass
class _Door:
    """What all connections of a gate share."""

    gate: Gate
    client: httpx.AsyncClient
    open: Counter[str] = field(default_factory=Counter[str])
    is_upstream_up: bool = True

    def note_upstream(self, is_up: bool, why: str = "") -> None:
        """Log when the SuperLink goes away or comes back, once each."""
        if is_up != self.is_upstream_up:
            log.warning("the SuperLink answers again" if is_up else f"the SuperLink does not answer ({why})")
        self.is_upstream_up = is_up


def passes(method: bytes, target: bytes) -> bool:
    """Whether a request line is one of those that sites need, letter for letter: nothing is decoded or tidied up."""
    return (method == b"POST" and FLEET.fullmatch(target) is not None) or (method, target) == (b"GET", b"/health")


async def serve(gate: Gate) -> None:
    """Keep the door until SIGTERM or SIGINT.

    Raises:
        ConnectionFailed: The address cannot be listened on (E-PORT).
        StorageError: A certificate or key cannot be read (E-TLS).
    """
    limits = httpx.Limits(max_connections=gate.limits.connections, keepalive_expiry=2)  # the SuperLink keeps them 5 s
    context, verify = _tls(gate)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    timeout = httpx.Timeout(60, connect=30)  # a SuperLink that is gone refuses at once, a busy one is slow
    async with httpx.AsyncClient(
        base_url=gate.upstream, verify=verify, limits=limits, timeout=timeout, trust_env=False
    ) as client:
        door = _Door(gate, client)
        server = await _listen(door, context)
        log.warning(f"open at {gate.bind}, for {gate.upstream}")
        await stop.wait()
        server.close()


async def _listen(door: _Door, context: ssl.SSLContext) -> asyncio.Server:
    host, _, port = door.gate.bind.rpartition(":")

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _meet(door, Link(reader, writer, door.gate.limits))

    try:
        return await asyncio.start_server(
            meet,
            host.strip("[]"),
            int(port),
            limit=CHUNK,
            ssl=context,
            ssl_handshake_timeout=door.gate.limits.handshake_s,
            ssl_shutdown_timeout=door.gate.limits.linger_s,
        )
    except OSError as error:
        raise ConnectionFailed(
            "E-PORT",
            f"{door.gate.bind}: cannot be listened on ({error.strerror or error})",
            param="gateway.bind",
            hint="end what listens there, or choose another [gateway] bind in fed.toml",
        ) from None


def _tls(gate: Gate) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """What is shown to sites, and what is asked of the SuperLink."""
    shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    asked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context in (shown, asked):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    shown.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    shown.set_alpn_protocols(["http/1.1"])
    try:
        shown.load_cert_chain(gate.certificate, gate.key)
        asked.load_verify_locations(gate.ca)
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or type(error).__name__
        raise StorageError("E-TLS", f"{gate.certificate.parent}: certificate, key or CA unusable ({reason})") from None
    return shown, asked


async def _meet(door: _Door, link: Link) -> None:
    """One connection, from its handshake to its end."""
    address, limits = link.address, door.gate.limits
    door.open[address] += 1
    try:
        if door.open.total() > limits.connections or door.open[address] > limits.per_address:
            log.warning(f"{address}: refused, too many connections")
            return
        while await _answer_next(door, link):
            link.http.start_next_cycle()
    except OSError:  # TimeoutError is one: the client has gone, or does not take its answer
        link.writer.transport.abort()
    finally:
        door.open[address] -= 1
        if not door.open[address]:
            del door.open[address]
        link.writer.close()


async def _answer_next(door: _Door, link: Link) -> bool:
    """Answer the next request; whether another may follow on this connection."""
    try:
        request = await link.request()
        if request is None:
            return False
        await _forward(door, link, request, _cap(door.gate, request))
    except Refused as refused:
        if refused.status != 503:
            log.warning(f"{link.address}: {refused.status}, {refused}")
        await link.refuse(refused.status)
        return False
    return link.http.our_state is h11.DONE and link.http.their_state is h11.DONE


def _cap(gate: Gate, request: h11.Request) -> int:
    """How long the body of a request may be.

    Raises:
        Refused: The request is none that passes, or says itself that it is longer, or gives two lengths.
    """
    if not passes(request.method, request.target):
        raise Refused(404, "not a path of the fleet")
    headers = dict(request.headers)
    if b"content-length" in headers and b"transfer-encoding" in headers:
        raise Refused(400, "two lengths")  # servers differ in which one counts: requests are smuggled that way
    cap = gate.max_body if request.method == b"POST" else 0
    if int(headers.get(b"content-length", 0)) > cap:
        raise Refused(413, "body too large")
    return cap


async def _forward(door: _Door, link: Link, request: h11.Request, cap: int) -> None:
    """Hand a request on and its answer back, piece by piece.

    Raises:
        Refused: Its body is refused, or the SuperLink is away (503).
    """
    headers = [*_kept(request.headers), (b"x-forwarded-for", link.address.encode())]
    if request.method == b"GET":
        async for _ in link.body(cap):  # there is none; this ends the request
            pass
    body = link.body(cap) if request.method == b"POST" else None
    asked = door.client.build_request(request.method.decode(), request.target.decode(), headers=headers, content=body)
    try:
        answer = await door.client.send(asked, stream=True)
        door.note_upstream(True)
        try:
            head = [*_kept(answer.headers.raw), (b"date", date_now())]
            await link.send(h11.Response(status_code=answer.status_code, headers=head))
            async for chunk in answer.aiter_raw(CHUNK):
                await link.send(h11.Data(data=chunk))
            await link.send(h11.EndOfMessage())
        finally:
            await answer.aclose()
    except httpx.TransportError as error:
        door.note_upstream(False, type(error).__name__)
        raise Refused(503, "the SuperLink does not answer") from None


def _kept(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers that concern both ends; who the client is, is said by us alone."""
    lower = [(name.lower(), value) for name, value in headers]
    return [(n, v) for n, v in lower if n not in NOT_PASSED_ON and not n.startswith(b"x-forwarded")]


def run(gate: Gate) -> None:
    """`serve`, in a process of its own."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * gate.limits.connections + 256  # one from the client, one to the SuperLink
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    asyncio.run(serve(gate))


def gate_of(home: FedHome) -> Gate:
    """The gate that a coordinator's home asks for."""
    wanted, tls = home.settings.gateway, home.tls
    upstream = f"https://{home.superlink_address}"
    return Gate(
        wanted.bind, upstream, tls / "server.crt", tls / "server.key", tls / "ca.crt", wanted.max_body_mb * 1_000_000
    )


def main(arguments: list[str] | None = None) -> int:
    """`python -m cotune.server.gateway --home HOME`: what `cotune fed up` keeps running."""
    parser = argparse.ArgumentParser(prog="cotune.server.gateway", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="The coordinator's home.")
    try:
        run(gate_of(FedHome.open(parser.parse_args(arguments).home)))
    except CotuneError as error:
        sys.stderr.write(f"{error.code}  {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
