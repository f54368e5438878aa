"""What is tried from a machine of the network: paths, ports, authorities, keys of others."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.integration.deployed.networks import Machine
from tests.integration.deployed.study import QUIET

ASK = """
import http.client, json, ssl, sys
host, port, ca, paths = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
context = ssl.create_default_context(cafile=ca); context.check_hostname = False
found = {}
for path in paths:
    there = http.client.HTTPSConnection(host, port, timeout=30, context=context)
    there.request("GET" if path == "/health" else "POST", path, body=b"")
    found[path] = there.getresponse().status
print(json.dumps(found))
"""
SHAKE = """
import socket, ssl, sys
host, port, ca, most = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
context = ssl.create_default_context(cafile=ca or None); context.check_hostname = False
context.minimum_version = ssl.TLSVersion.TLSv1; context.maximum_version = ssl.TLSVersion[most]
try:
    with context.wrap_socket(socket.create_connection((host, port), timeout=30)) as there: there.getpeercert()
except OSError as error: print(error)
"""
SCAN = """
import json, select, socket, sys
host, found = sys.argv[1], []
for first in range(1, 65536, 500):
    tried = {}
    for port in range(first, min(first + 500, 65536)):
        there = socket.socket(); there.setblocking(False)
        if there.connect_ex((host, port)) == 0: found.append(port)
        tried[there] = port
    waiting = set(tried)
    while waiting:
        _, ready, broken = select.select([], list(waiting), list(waiting), 3)
        if not ready and not broken: break
        found += [tried[s] for s in ready if s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0]
        waiting -= set(ready) | set(broken)
    for there in tried: there.close()
print(json.dumps(sorted(set(found))))
"""


def answers(machine: Machine, host: str, port: int, ca: Path, paths: Sequence[str]) -> dict[str, int]:
    """The status that each path answers with, over TLS."""
    return json.loads(machine.run(sys.executable, "-c", ASK, host, str(port), str(ca), *paths).stdout)


def tls_refusal(machine: Machine, host: str, port: int, ca: Path | None, newest: str) -> str:
    """Why a TLS handshake failed, that knows this authority and TLS up to this version; empty if it did not."""
    return machine.run(sys.executable, "-c", SHAKE, host, str(port), str(ca or ""), newest).stdout.strip()


def open_ports(machine: Machine, host: str) -> list[int]:
    """All ports of an address that accept a connection from a machine."""
    command = machine.command(sys.executable, "-c", SCAN, host)
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return json.loads(done.stdout)


def courier_state(machine: Machine, folder: Path, seconds: float) -> dict[str, Any]:
    """Where a courier with this folder stands on a machine once it was refused, or after so many seconds."""
    (folder / "courier.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "cotune.client.courier_process", "--folder", str(folder)]
    process = machine.start(command, folder.parent / "courier.log", QUIET)
    said: dict[str, Any] = {}
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline and said.get("state") not in ("online", "refused"):
            with contextlib.suppress(OSError, ValueError):
                said = json.loads((folder / "courier.json").read_bytes())
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    return said
