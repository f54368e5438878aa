"""The machines other tests of deployment run on: apart, addressed, slow or cut off when asked, gone afterwards."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.deployed.networks import NAMESPACES, Machine, machines, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

SERVE = (
    "import socket,sys; s = socket.create_server((sys.argv[1], 9000)); print('ready', flush=True)\n"
    "while True: c = s.accept()[0]; c.sendall(b'hello'); c.close()"
)
CALL = "import socket,sys; print(socket.create_connection((sys.argv[1], 9000), timeout=2).recv(5).decode())"


@pytest.fixture(scope="module")
def pair() -> Iterator[dict[str, Machine]]:
    with machines(["one", "two"]) as made:
        yield made


@contextlib.contextmanager
def serving(machine: Machine, address: str) -> Iterator[None]:
    process = subprocess.Popen(machine.command(sys.executable, "-c", SERVE, address), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def call(caller: Machine, address: str) -> str:
    return caller.run(sys.executable, "-c", CALL, address, check=False).stdout.strip()


def test_machines_reach_each_other_by_address_and_not_each_others_loopback(pair: dict[str, Machine]) -> None:
    one, two = pair["one"], pair["two"]
    with serving(one, one.address):
        assert call(two, one.address) == "hello"
        assert call(two, "127.0.0.1") == ""
    with serving(one, "127.0.0.1"):
        assert call(one, "127.0.0.1") == "hello"
        assert call(two, one.address) == ""


def test_a_machine_that_is_unplugged_is_out_of_reach_until_it_is_plugged_in(pair: dict[str, Machine]) -> None:
    one, two = pair["one"], pair["two"]
    with serving(one, one.address):
        two.unplug()
        assert call(two, one.address) == ""
        two.plug()
        assert call(two, one.address) == "hello"


def test_a_slow_line_is_one_the_kernel_knows_of(pair: dict[str, Machine]) -> None:
    two = pair["two"]
    two.slow_down(1000)
    assert "tbf" in two.run("tc", "qdisc", "show", "dev", "eth0").stdout
    two.speed_up()
    assert "tbf" not in two.run("tc", "qdisc", "show", "dev", "eth0").stdout


def test_nothing_is_left_after_a_failure_not_even_what_ran_there(tmp_path: Path) -> None:
    process = None
    with pytest.raises(RuntimeError, match="planted"), machines(["gone"]) as made:
        process = made["gone"].start(["sleep", "600"], tmp_path / "log", {})
        assert (NAMESPACES / made["gone"].namespace).exists()
        raise RuntimeError("planted")
    assert process is not None
    assert process.wait(timeout=10) != 0
    assert not (NAMESPACES / made["gone"].namespace).exists()
