"""Files by which a machine keeps a coordinator or a site running, with no more rights than it needs."""

from __future__ import annotations

import json
import pwd
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from cotune.shared.errors import JobError
from cotune.shared.files import storage_errors, write_atomic
from cotune.shared.packages import cache_dir
from cotune.shared.plan import cotune_version

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Service:
    """A program of ours as the machine is to run it.

    Attributes:
        name: Of the unit.
        description: One line.
        arguments: Of `cotune`.
        user: Who it runs as.
        writable: The only folders it may write to.
        readable: Other files it needs, where it would not see them by itself.
        port: The one that is published, if any.
        peers: Addresses it may talk to beside this machine's own; None: any.
        capabilities: Rights it may have.
        ambient: Of those, the ones it has from the start without being root.
        has_devices: Whether it computes on GPUs.
    """

    name: str
    description: str
    arguments: tuple[str, ...]
    user: str
    writable: tuple[Path, ...]
    readable: tuple[Path, ...] = ()
    port: int | None = None
    peers: tuple[str, ...] | None = None
    capabilities: tuple[str, ...] = ()
    ambient: tuple[str, ...] = ()
    has_devices: bool = False
    program: Path = field(default_factory=lambda: Path(sys.executable).parent / "cotune")

    @property
    def environment(self) -> Mapping[str, str]:
        """Nothing reports home or installs anything, and models come from one cache."""
        return {**QUIET, "COTUNE_CACHE": str(cache_dir())}


def unit_text(service: Service) -> str:
    """A unit of systemd."""
    return render("cotune.shared", "service.j2", service=service, quoted=_quoted)


def compose_text(service: Service) -> str:
    """A file for `docker compose`."""
    owner = pwd.getpwnam(service.user)
    return render(
        "cotune.shared",
        "compose.yaml.j2",
        service=service,
        version=cotune_version(),
        owner=f"{owner.pw_uid}:{owner.pw_gid}",
        literal=_literal,
    )


def render(package: str, template: str, **values: object) -> str:
    """A generated file: a value that a template asks for and does not get is an error."""
    from jinja2 import Environment, StrictUndefined

    text = (resources.files(package) / "templates" / template).read_text(encoding="utf-8")
    environment = Environment(  # noqa: S701 - no HTML
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text).render(values)


def owner_of(home: Path, user: str | None) -> str:
    """Who a service runs as: the user that is named, else the one who owns the home.

    Raises:
        JobError: There is no such user (E-USER).
    """
    try:
        return pwd.getpwnam(user).pw_name if user else pwd.getpwuid(home.stat().st_uid).pw_name
    except KeyError:
        raise JobError(
            "E-USER", f"there is no user {user or home.stat().st_uid}", param="--user", hint="useradd"
        ) from None


def write_files(out: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write generated files into a folder, in place of older ones.

    Raises:
        StorageError: The folder cannot be written.
    """
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomic(out / name, text.encode())
    return [out / name for name in texts]


def _quoted(words: Iterable[object]) -> str:
    """Words as systemd reads them: nothing in a path is expanded or split."""
    escaped = (
        str(word).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$") for word in words
    )
    return " ".join(f'"{word}"' for word in escaped)


def _literal(value: object) -> str:
    """A value as YAML; compose would expand a dollar sign."""
    return json.dumps(value, default=str).replace("$", "$$")
