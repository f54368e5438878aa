"""Ports for tests to listen on."""

from __future__ import annotations

import contextlib
import random
import socket

PORTS = range(15_000, 32_000)  # below those the kernel gives to outgoing calls, of which one may come in between


def free_port() -> int:
    """A port on which nobody listens, at any address."""
    while True:
        port = random.choice(PORTS)  # noqa: S311 - no secret
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))  # noqa: S104 - to see whether anybody has it, anywhere
            return port
