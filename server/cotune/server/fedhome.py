"""A coordinator's home: the folder that holds its key, its authority, who is enrolled, Flower's state and the runs.

fed.toml                              settings
coordinator.key coordinator.pub       with which it signs jobs and invitations
tls/                                  its own certificate authority, and the server's certificate
sites/NAME.json                       who is enrolled
superlink/                            Flower's state, and the secret between its two programs
flwr/                                 settings of the `flwr` program
runs/ logs/                           what runs leave behind; what the programs said
empty/                                where Flower's programs run: they import what they find there
up.json up.lock                       who runs now
"""

from __future__ import annotations

import os
import secrets
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import tomli_w
from pydantic import Field

from cotune.server.authority import create_authority, ensure_server_certificate
from cotune.server.control import CONNECTION
from cotune.shared.errors import JobError, StorageError
from cotune.shared.files import storage_errors, write_atomic
from cotune.shared.homes import make_home, require_private
from cotune.shared.invitation import Address
from cotune.shared.jobfile import SettingsKind, parse_text, read_text, validate
from cotune.shared.keyfile import SigningKey, write_secret
from cotune.shared.sections import Section, SiteName

FOLDERS = ("tls", "sites", "superlink", "flwr", "runs", "logs", "empty")
SECRET_BYTES = 32
INIT = "cotune fed init"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_COLOR": "1",
}

Port = Annotated[int, Field(ge=1, le=65_535)]


class FederationSection(Section):
    """What it is called, and where sites reach it."""

    name: SiteName
    address: Address


class GatewaySection(Section):
    """The one public door."""

    kind: Literal["embedded", "nginx", "none"] = "embedded"
    bind: Address = "0.0.0.0:8443"
    max_body_mb: int = Field(default=64, ge=1, le=10_000)


class SuperlinkSection(Section):
    """Flower's server, which listens on loopback alone."""

    port: Port = 9080


class FedSettings(Section):
    """The file fed.toml."""

    federation: FederationSection
    gateway: GatewaySection = GatewaySection()
    superlink: SuperlinkSection = SuperlinkSection()


FED_FILE = SettingsKind(FedSettings, "E-FED", "coordinator's settings file", INIT, "cotune fed init --help")


@dataclass(frozen=True, repr=False)
class FedHome:
    """An open home. It holds secrets, so it has no repr.

    Attributes:
        path: The folder, mode 0700.
        settings: What fed.toml says.
        key: With which jobs and invitations are signed.
    """

    path: Path
    settings: FedSettings
    key: SigningKey

    @classmethod
    def create(cls, path: Path, settings: FedSettings) -> FedHome:
        """Make a home with a new key and authority, whole or not at all.

        Raises:
            JobError: There is something at this path already; it stays as it is (E-FED-EXISTS).
            StorageError: The folder cannot be written.
        """
        path = path.absolute()
        make_home(path, lambda draft: _furnish(draft, settings), _taken(path))
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> FedHome:
        """Open a home.

        Edge cases: a folder that others may enter, a public key that is not the private key's and settings with a
        fault are each refused.

        Raises:
            StorageError: It is missing, damaged or open to others.
            JobError: fed.toml has a fault.
        """
        path = path.absolute()
        require_private(path, "E-FED-HOME", "a coordinator's home", INIT)
        key = SigningKey.load(path / "coordinator.key")
        try:
            public = (path / "coordinator.pub").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            public = ""
        if public.rpartition(" ")[0] != key.public:
            raise StorageError("E-FED-HOME", f"{path}: coordinator.pub is not the public half of coordinator.key")
        file = path / "fed.toml"
        text = read_text(file, FED_FILE)
        return cls(path, validate(parse_text(text, file, FED_FILE), FED_FILE, origin=file.name, text=text), key)

    @property
    def name(self) -> str:
        """The federation's name."""
        return self.settings.federation.name

    @property
    def runs(self) -> Path:
        """Where runs go."""
        return self.path / "runs"

    @property
    def tls(self) -> Path:
        """The authority's folder."""
        return self.path / "tls"

    @property
    def superlink_address(self) -> str:
        """HOST:PORT of the SuperLink, on loopback."""
        return f"127.0.0.1:{self.settings.superlink.port}"

    def renew_certificate(self) -> bool:
        """Issue a server certificate if there is none that lasts; whether one was issued.

        Raises:
            StorageError: See `authority.ensure_server_certificate`.
        """
        host = self.settings.federation.address.rpartition(":")[0].strip("[]")
        return ensure_server_certificate(self.tls, [host], datetime.now(UTC))

    def flwr_environment(self) -> dict[str, str]:
        """The environment of everything of Flower's that this home starts.

        It is written out anew each time: a home that was moved, or whose port was changed, still finds itself.
        """
        superlink = {"address": self.superlink_address, "root-certificates": str(self.tls / "ca.crt")}
        config = tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: superlink}})
        file = self.path / "flwr" / "config.toml"
        if not file.exists() or file.read_text(encoding="utf-8") != config:
            write_atomic(file, config.encode())
        return {
            **os.environ,
            **QUIET,
            "FLWR_HOME": str(self.path / "flwr"),
            "COTUNE_FED": str(self.path),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }


def _furnish(folder: Path, settings: FedSettings) -> None:
    """Everything a home needs."""
    key = SigningKey.create(folder / "coordinator.key")
    write_atomic(folder / "coordinator.pub", f"{key.public} {settings.federation.name}\n".encode())
    with storage_errors(folder):
        for name in FOLDERS:
            (folder / name).mkdir(mode=0o700)
    write_atomic(folder / "fed.toml", tomli_w.dumps(settings.model_dump(mode="json")).encode())
    write_secret(folder / "superlink" / "superexec.secret", secrets.token_bytes(SECRET_BYTES))
    create_authority(folder / "tls", settings.federation.name, datetime.now(UTC))
    FedHome(folder, settings, key).renew_certificate()


def _taken(path: Path) -> JobError:
    return JobError(
        "E-FED-EXISTS",
        f"{path}: there is something already; a coordinator's home is never overwritten",
        param="--home",
        hint="cotune fed up, or give another --home",
    )
