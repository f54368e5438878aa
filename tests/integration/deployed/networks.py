"""Machines of a test: network namespaces with an address each, joined by one switch and by nothing else.

Needs root and iproute2. The kernels this is for have no netem, so delay, resets and half-open connections are
`wire.py`'s, a TCP proxy; a slow line is `tc tbf`, a partition `ip link set down`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PREFIX = "cotune"
NAMESPACES = Path("/run/netns")
SUBNET = "10.77.0"
SWITCH = "switch"
BURST_BYTES, QUEUE_MS = 16_000, 400
END_S = 10.0
_NETWORKS = itertools.count(1)


@dataclass(frozen=True)
class Machine:
    """A network namespace: its own loopback, its own address, a cable to the switch.

    Attributes:
        name: Of the machine.
        namespace: Of the system.
        address: On the switch's network.
    """

    name: str
    namespace: str
    address: str

    def command(self, *words: str) -> list[str]:
        """A command line that runs on this machine; the process that is started becomes the command itself."""
        return ["nsenter", f"--net={NAMESPACES / self.namespace}", *words]

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a short command on this machine."""
        return subprocess.run(self.command(*words), capture_output=True, text=True, check=check, timeout=60)

    def start(self, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[Any]:
        """Start a long command on this machine."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self.command(*words),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def unplug(self) -> None:
        """Cut this machine off: what it sends or is sent is lost, and nobody is told."""
        self.run("ip", "link", "set", "eth0", "down")

    def plug(self) -> None:
        """Join it again."""
        self.run("ip", "link", "set", "eth0", "up")

    def slow_down(self, kbit: int) -> None:
        """Let so much out in a second, and no more."""
        shape = ["rate", f"{kbit}kbit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_MS}ms"]
        self.run("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *shape)

    def speed_up(self) -> None:
        """No limit any more."""
        self.run("tc", "qdisc", "del", "dev", "eth0", "root", check=False)


def why_not() -> str | None:
    """Why this machine cannot make namespaces; None if it can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "only root may make network namespaces"
    for program in ("ip", "tc", "nsenter"):
        if shutil.which(program) is None:
            return f"there is no `{program}` here"
    name = f"{PREFIX}-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    _delete(name)
    return f"no network namespace can be made: {made.stderr.strip()}" if made.returncode else None


@contextlib.contextmanager
def machines(names: Sequence[str]) -> Generator[dict[str, Machine]]:
    """Machines on one switch, numbered from address .1 on; gone afterwards, and so is all that runs on them.

    Nothing leads from the switch to the system that this runs on, nor to any other network.
    """
    sweep()
    prefix = f"{PREFIX}-{os.getpid()}-{next(_NETWORKS)}"
    switch = f"{prefix}-{SWITCH}"
    made = {name: Machine(name, f"{prefix}-{name}", f"{SUBNET}.{number}") for number, name in enumerate(names, start=1)}
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for port, machine in enumerate(made.values(), start=1):
            _connect(machine, switch, f"port{port}")
        yield made
    finally:
        for namespace in [machine.namespace for machine in made.values()] + [switch]:
            _delete(namespace)


def _connect(machine: Machine, switch: str, port: str) -> None:
    space = machine.namespace
    _ip("netns", "add", space)
    _ip("-n", space, "link", "set", "lo", "up")
    _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
    _ip("-n", switch, "link", "set", port, "master", "bridge")
    _ip("-n", switch, "link", "set", port, "up")
    _ip("-n", space, "address", "add", f"{machine.address}/24", "dev", "eth0")
    _ip("-n", space, "link", "set", "eth0", "up")


def sweep() -> None:
    """Remove what is left of tests that were killed: names hold the process that made them."""
    for path in NAMESPACES.glob(f"{PREFIX}-*-*") if NAMESPACES.exists() else ():
        if not psutil.pid_exists(int(path.name.split("-")[1])):
            _delete(path.name)


def _delete(namespace: str) -> None:
    """End everything in a namespace, then remove it."""
    deadline = time.monotonic() + END_S
    while time.monotonic() < deadline:
        listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
        if not (living := listed.stdout.split()):  # whoever is dead and not waited for is in no namespace
            break
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
