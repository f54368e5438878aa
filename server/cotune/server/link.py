"""One client's connection to the gateway: HTTP/1.1 read strictly, piece by piece, and never waited for without end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from email.utils import formatdate

import h11

CHUNK = 65_536
HEADER_BYTES = 16_384
LINGER_CHUNKS = 256


@dataclass(frozen=True)
class Limits:
    """How long a client is waited for, and how many may come.

    Attributes:
        handshake_s: For the TLS handshake.
        header_s: From the first byte of a request to the end of its headers.
        idle_s: Between two requests.
        body_s: How far a body may fall behind `body_rate`; no pause in it may be longer.
        body_rate: The slowest a body may be sent for long, bytes a second.
        send_s: For each piece of an answer to be taken.
        linger_s: For a client that was refused to read why, before the connection is cut.
        connections: Open at a time.
        per_address: Of those, from one address.
    """

    handshake_s: float = 10
    header_s: float = 10
    idle_s: float = 75
    body_s: float = 20
    body_rate: int = 1024
    send_s: float = 60
    linger_s: float = 2
    connections: int = 1024
    per_address: int = 512


class Refused(Exception):
    """A request that goes no further; the status is all that its sender is told."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass
class Link:
    """One client's connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    limits: Limits
    http: h11.Connection = field(default_factory=lambda: h11.Connection(h11.SERVER, HEADER_BYTES))

    @property
    def address(self) -> str:
        """Where the client calls from."""
        return str((self.writer.get_extra_info("peername") or ("unknown",))[0])

    async def event(self, until: float) -> h11.Event | type[h11.PAUSED]:
        """The next piece of a request.

        Raises:
            Refused: It breaks the protocol, or did not come in time.
        """
        try:
            while (event := self.http.next_event()) is h11.NEED_DATA:
                async with asyncio.timeout_at(until):
                    self.http.receive_data(await self.reader.read(CHUNK))
        except h11.RemoteProtocolError as error:
            raise Refused(error.error_status_hint, "not HTTP/1.1 as it must be") from None
        except TimeoutError:
            raise Refused(408, "too slow") from None
        return event  # pyright: ignore[reportReturnType] - NEED_DATA was dealt with

    async def request(self) -> h11.Request | None:
        """The next request's line and headers; None once the client has gone or stayed silent."""
        clock = asyncio.get_running_loop().time
        if self.http.trailing_data == (b"", False):
            try:
                async with asyncio.timeout(self.limits.idle_s):
                    self.http.receive_data(await self.reader.read(CHUNK))
            except TimeoutError:
                return None
        event = await self.event(clock() + self.limits.header_s)
        return event if isinstance(event, h11.Request) else None

    async def body(self, cap: int) -> AsyncGenerator[bytes]:
        """A request's body as it comes.

        Raises:
            Refused: It is longer than the cap, or comes too slowly.
        """
        if self.http.they_are_waiting_for_100_continue:
            await self.send(h11.InformationalResponse(status_code=100, headers=[]))
        clock, size, patience_s = asyncio.get_running_loop().time, 0, self.limits.body_s
        while True:
            began = clock()
            event = await self.event(began + patience_s)
            if not isinstance(event, h11.Data):
                return
            size += len(event.data)
            if size > cap:
                raise Refused(413, "body too large")
            earned_s = len(event.data) / self.limits.body_rate
            patience_s = min(self.limits.body_s, patience_s - (clock() - began) + earned_s)
            yield bytes(event.data)  # what the SuperLink takes its time for is not the client's fault

    async def send(self, event: h11.Event) -> None:
        """Send a piece of an answer.

        Raises:
            TimeoutError: The client does not take it.
        """
        self.writer.write(self.http.send(event) or b"")
        async with asyncio.timeout(self.limits.send_s):
            await self.writer.drain()

    async def refuse(self, status: int) -> None:
        """Answer with a status alone; then read on for a moment, so that the answer is not lost to a reset."""
        if self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.writer.transport.abort()  # half an answer was sent: it must not look whole
            return
        headers = [(b"date", date_now()), (b"content-length", b"0"), (b"connection", b"close")]
        await self.send(h11.Response(status_code=status, headers=headers))
        await self.send(h11.EndOfMessage())
        until = asyncio.get_running_loop().time() + self.limits.linger_s
        with contextlib.suppress(Refused):
            for _ in range(LINGER_CHUNKS):
                if not isinstance(await self.event(until), h11.Data):
                    break


def date_now() -> bytes:
    """The time, as HTTP writes it."""
    return formatdate(usegmt=True).encode()
