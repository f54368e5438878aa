"""A line that misbehaves when told to: a TCP proxy that delays, resets, swallows one direction, or writes all down.

Run as `python wire.py LISTEN TO [--tls CRT KEY CA FOLDER]`, addresses as HOST:PORT; with --tls it ends the TLS of
both sides, and keeps what went through in FOLDER, in clear. Each line of its standard input is a JSON object with the
fields of `Line` that are to be from now on; when that ends, so does the proxy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if __package__ is None:  # run as a program
    sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.integration.deployed.networks import Machine

CHUNK = 65_536
RESET_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: no goodbye


@dataclass(frozen=True)
class Line:
    """How the line is.

    Attributes:
        delay_s: What each piece waits, in either direction.
        resets: Share of the connections that are reset after their first piece.
        swallow: "up" or "down": what goes that way is lost, while the connection stays open; "" loses nothing.
        cut: Reset every connection there is, once.
    """

    delay_s: float = 0.0
    resets: float = 0.0
    swallow: str = ""
    cut: bool = False


@dataclass
class Proxy:
    """Carries connections to where they are meant for."""

    to: tuple[str, int]
    server_tls: ssl.SSLContext | None = None
    client_tls: ssl.SSLContext | None = None
    record: Path | None = None
    line: Line = field(default_factory=Line)
    chance: random.Random = field(default_factory=lambda: random.Random(7))  # noqa: S311 - no secret
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    open: set[asyncio.StreamWriter] = field(default_factory=set)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection until either side is done with it."""
        number, unlucky = next(self.numbers), self.chance.random() < self.line.resets
        try:
            there, back = await asyncio.open_connection(*self.to, ssl=self.client_tls)
        except OSError:
            reset(writer)
            return
        self.open |= {writer, back}
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, back, f"{number:05}-up", unlucky))
                both.create_task(self._pump(there, writer, f"{number:05}-down", False))
        except* OSError:
            pass
        finally:
            self.open -= {writer, back}
            reset(writer)
            reset(back)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str, unlucky: bool) -> None:
        while piece := await reader.read(CHUNK):
            if self.record:
                with (self.record / name).open("ab") as file:
                    file.write(piece)
            if unlucky:
                raise ConnectionResetError
            if self.line.delay_s:
                await asyncio.sleep(self.line.delay_s)
            if self.line.swallow and name.endswith(self.line.swallow):
                continue
            writer.write(piece)
            await writer.drain()
        with contextlib.suppress(OSError, NotImplementedError):
            writer.write_eof()

    def change(self, said: dict[str, Any]) -> None:
        """Be as a line of the standard input says."""
        self.line = replace(self.line, **said)
        if self.line.cut:
            self.line = replace(self.line, cut=False)
            for writer in list(self.open):
                reset(writer)


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset, as a firewall does that forgot it."""
    connection = writer.get_extra_info("socket")  # None once it is closed
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_ONCE)
    writer.transport.abort()


async def serve(proxy: Proxy, host: str, port: int) -> None:
    """Listen until the standard input ends."""
    server = await asyncio.start_server(proxy.carry, host, port, ssl=proxy.server_tls)
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while said := await lines.readline():
        proxy.change(json.loads(said))
        sys.stdout.write("changed\n")
        sys.stdout.flush()
    server.close()


@dataclass(frozen=True)
class Wire:
    """A proxy that runs on a machine."""

    process: subprocess.Popen[str]

    def be(self, **said: object) -> None:
        """Change the line; it is changed when this returns."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(said) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "changed\n"

    def heal(self) -> None:
        """Be as a line should."""
        self.be(delay_s=0.0, resets=0.0, swallow="")


@contextlib.contextmanager
def wire(machine: Machine, listen: str, to: str, tls: Sequence[Path] = ()) -> Generator[Wire]:
    """A proxy on a machine, in front of an address.

    Args:
        machine: Where it runs.
        listen: HOST:PORT of it.
        to: HOST:PORT it carries to.
        tls: Certificate, key, certificate authority and a folder: ends TLS, and writes down what goes through.
    """
    ends = ["--tls", *map(str, tls)] if tls else []
    command = machine.command(sys.executable, __file__, listen, to, *ends)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield Wire(process)
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()
        process.wait()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    """Carry connections until the standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("listen", type=_address)
    parser.add_argument("to", type=_address)
    parser.add_argument("--tls", nargs=4, type=Path, metavar=("CRT", "KEY", "CA", "FOLDER"))
    chosen = parser.parse_args()
    proxy = Proxy(chosen.to)
    if chosen.tls:
        certificate, key, ca, proxy.record = chosen.tls
        proxy.server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        proxy.server_tls.load_cert_chain(certificate, key)
        proxy.client_tls = ssl.create_default_context(cafile=str(ca))
        proxy.client_tls.check_hostname = False  # the certificate is for the proxy's address
        proxy.record.mkdir(parents=True, exist_ok=True)
    asyncio.run(serve(proxy, *chosen.listen))


if __name__ == "__main__":
    main()
