"""The proxy other tests of deployment rely on: what it says it does to a connection, it does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.integration.deployed.networks import Machine, machines, why_not
from tests.integration.deployed.wire import Wire, wire

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ECHO = """
import socket, threading
def answer(c):
    with c:
        while piece := c.recv(100): c.sendall(piece)
s = socket.create_server(("127.0.0.1", 9000)); print("ready", flush=True)
while True: threading.Thread(target=answer, args=(s.accept()[0],), daemon=True).start()
"""
CALL = """
import socket, time
c = socket.create_connection(("127.0.0.1", 9001), timeout=2); began = time.monotonic()
try:
    c.sendall(b"hello"); print(c.recv(5).decode(), time.monotonic() - began > 0.3)
except ConnectionResetError: print("reset")
except TimeoutError: print("silence")
"""


@pytest.fixture(scope="module")
def line() -> Iterator[tuple[Machine, Wire]]:
    with machines(["one"]) as made:
        one = made["one"]
        echo = subprocess.Popen(one.command(sys.executable, "-c", ECHO), stdout=subprocess.PIPE, text=True)
        assert echo.stdout is not None
        assert echo.stdout.readline() == "ready\n"
        with wire(one, "127.0.0.1:9001", "127.0.0.1:9000") as proxy:
            yield one, proxy
        echo.kill()
        echo.communicate()


def call(machine: Machine) -> str:
    return machine.run(sys.executable, "-c", CALL).stdout.strip()


def test_a_line_delays_resets_swallows_and_heals(line: tuple[Machine, Wire]) -> None:
    machine, proxy = line
    assert call(machine) == "hello False"
    proxy.be(delay_s=0.2)
    assert call(machine) == "hello True"
    proxy.heal()
    proxy.be(resets=1.0)
    assert call(machine) == "reset"
    proxy.heal()
    proxy.be(swallow="down")
    assert call(machine) == "silence"
    proxy.heal()
    assert call(machine) == "hello False"
