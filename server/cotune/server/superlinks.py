"""The SuperLinks that run on this machine, and how each was started: Flower's defaults are open."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from cotune.shared.fault import Fault

SUPERLINK = "flower-superlink"
RESTART = "end it, and let `cotune fed up` start it"
YES = ("1", "true", "yes", "on")


class Started(NamedTuple):
    """How a program was started."""

    arguments: Sequence[str]
    environment: Mapping[str, str]

    def has(self, flag: str) -> bool:
        """Whether a switch is on."""
        return flag in self.arguments

    def value(self, flag: str, default: str = "") -> str:
        """What follows a flag, or is joined to it by an equals sign."""
        for number, argument in enumerate(self.arguments):
            if argument == flag and number + 1 < len(self.arguments):
                return self.arguments[number + 1]
            if argument.startswith(f"{flag}="):
                return argument.partition("=")[2]
        return default


def _is_public(started: Started) -> bool:
    host = started.value("--host", "127.0.0.1").strip("[]")
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def _hands_out_tasks(started: Started) -> bool:
    secret = started.value("--superexec-auth-secret-file")
    return not secret or started.value("--isolation", "subprocess") != "process"


def _installs(started: Started) -> bool:
    switch = started.environment.get("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "").lower()
    return switch not in YES and not started.has("--disable-runtime-dependency-installation")


FAULTS: dict[str, tuple[Callable[[Started], bool], str]] = {
    "E-SUPERLINK-PLAIN": (lambda s: s.has("--insecure"), "runs with --insecure: no TLS"),
    "E-SUPERLINK-PUBLIC": (_is_public, "listens beyond loopback, where the calls that start code at sites are too"),
    "E-SUPERLINK-NODES": (
        lambda s: not s.has("--enable-supernode-auth"),
        "runs without --enable-supernode-auth: whoever reaches it is a site",
    ),
    "E-SUPERLINK-TASKS": (
        _hands_out_tasks,
        "gives tasks, and what belongs to them, to whoever asks: it needs --isolation process and a "
        "--superexec-auth-secret-file",
    ),
    "E-SUPERLINK-INSTALLS": (_installs, "installs packages that a run asks for"),
    "E-SUPERLINK-MEMORY": (
        lambda s: not s.value("--database"),
        "keeps its state in memory alone: a restart forgets every site",
    ),
    "E-TELEMETRY": (
        lambda s: s.environment.get("FLWR_TELEMETRY_ENABLED", "1") == "1",
        "reports its use to Flower's makers",
    ),
}  # fmt: skip


def superlink_faults() -> list[Fault]:
    """What is open at the SuperLinks of this machine. Those of a simulation, on loopback, are left out."""
    return [fault for process in psutil.process_iter() if (fault_list := _faults(process)) for fault in fault_list]


def _faults(process: psutil.Process) -> list[Fault]:
    try:
        command = process.cmdline()
        if SUPERLINK not in {Path(part).name for part in command[:2]} or "--simulation" in command:
            return []
        environment = process.environ()
    except psutil.AccessDenied:
        what = f"process {process.pid}: how it was started cannot be seen"
        return [Fault("E-SUPERLINK-UNSEEN", what, "run cotune doctor as its owner")]
    except psutil.Error:
        return []
    started = Started(command, environment)
    who = f"SuperLink, process {process.pid}: "
    return [Fault(code, who + what, RESTART) for code, (is_so, what) in FAULTS.items() if is_so(started)]
