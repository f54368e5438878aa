"""What a courier owns: its key and, for each federation, an address and a certificate. No data, no policy, no ledger.

Whoever steals the folder can talk to the coordinators in the site's name, and can neither read a record nor sign an
update.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)
from pydantic import Field

from cotune.shared.errors import RefusedError, StorageError
from cotune.shared.files import storage_errors, write_atomic
from cotune.shared.invitation import Address
from cotune.shared.jobfile import SettingsKind, parse_text, read_text, validate
from cotune.shared.keyfile import read_secret, write_secret
from cotune.shared.sections import Section, SiteName

SOCKET = "agent.sock"
NODE_KEY = "node.key"
RESTORE_KEY = "restore node.key from a backup, or make a new one: cotune site request --new-node-key"


class CourierSettings(Section):
    """`courier.toml` of a federation.

    Attributes:
        federation: Its name.
        address: HOST:PORT of its gateway.
        site: Whose courier this is.
        poll_s: How often it asks for a message.
        heartbeat_s: How often it says that it lives; Flower takes it for gone after twice that.
        max_message_mb: Larger messages are refused.
    """

    federation: SiteName
    address: Address
    site: SiteName
    poll_s: float = Field(default=1.0, ge=0.05, le=60)
    heartbeat_s: float = Field(default=30.0, ge=10, le=1800)
    max_message_mb: int = Field(default=1024, ge=1, le=16_384)


COURIER_FILE = SettingsKind(
    CourierSettings, "E-COURIER", "courier file", "cotune site join INVITE", "cotune site join --help"
)


def courier_folder(home: Path) -> Path:
    """Where a site's couriers live: beside the home, since it may belong to another user."""
    return home.with_name(f"{home.name}-courier")


@dataclass(frozen=True)
class CourierFolder:
    """The courier's folder for one federation.

    Attributes:
        path: Inside the folder with the site's node key and its agent's socket.
    """

    path: Path

    @property
    def settings(self) -> CourierSettings:
        """What courier.toml says.

        Raises:
            JobError: It is missing or has a fault.
        """
        path = self.path / "courier.toml"
        text = read_text(path, COURIER_FILE)
        return validate(parse_text(text, path, COURIER_FILE), COURIER_FILE, origin=path.name, text=text)

    @property
    def ca(self) -> bytes:
        """The one certificate that may vouch for the coordinator, as PEM.

        Raises:
            StorageError: It is gone.
        """
        try:
            return (self.path / "ca.crt").read_bytes()
        except OSError as error:
            raise StorageError(
                "E-COURIER-CA", f"{self.path}: ca.crt cannot be read ({error.strerror})", hint=COURIER_FILE.make
            ) from None

    @property
    def key(self) -> ec.EllipticCurvePrivateKey:
        """The site's node key.

        Raises:
            StorageError: E-KEY: it is gone, damaged or open to others.
        """
        return load_node_key(self.path.parent)

    @property
    def socket(self) -> Path:
        """Where the site's agent listens."""
        return self.path.parent / SOCKET

    @contextlib.contextmanager
    def alone(self) -> Generator[None]:
        """Hold the folder: two couriers with one key would take each other's messages.

        Raises:
            RefusedError: Another process holds it (E-COURIER-RUNNING).
        """
        path = self.path / "courier.lock"
        with storage_errors(path):
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RefusedError(
                    "E-COURIER-RUNNING",
                    f"{self.path}: another courier works with this folder",
                    hint="stop it first: cotune site down",
                ) from None
            yield
        finally:
            os.close(lock)

    @property
    def is_held(self) -> bool:
        """Whether a courier is at work with it; one that cannot be looked at, being another user's, may be."""
        try:
            with self.alone():
                return False
        except (RefusedError, StorageError):
            return True

    def write(self, settings: CourierSettings, ca: str) -> None:
        """Write down where a federation is and who vouches for it; intervals that were set before stay."""
        with storage_errors(self.path):
            self.path.mkdir(mode=0o700, exist_ok=True)
        write_atomic(self.path / "ca.crt", ca.encode())
        write_atomic(self.path / "courier.toml", tomli_w.dumps(settings.model_dump(exclude_unset=True)).encode())

    def remove(self) -> None:
        """Remove all of it."""
        with storage_errors(self.path):
            shutil.rmtree(self.path, ignore_errors=not self.path.exists())


def furnish_courier(folder: Path) -> str:
    """Make a site's courier folder and node key, as far as they are not there; the public node key.

    Raises:
        StorageError: The folder cannot be written, or the key that is there cannot be used.
    """
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (folder / NODE_KEY).exists():
        private = ec.generate_private_key(ec.SECP384R1())
        write_secret(folder / NODE_KEY, private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = load_node_key(folder).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    write_atomic(folder / "node.pub", f"{public}\n".encode())
    return public


def retire_node_key(folder: Path) -> None:
    """Put a node key aside, so that a new one is made: a coordinator lets each key in once.

    Raises:
        StorageError: The folder cannot be written.
    """
    with storage_errors(folder), contextlib.suppress(FileNotFoundError):
        (folder / NODE_KEY).replace(folder / f"{NODE_KEY}.old")


def load_node_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    """The node key of a courier folder.

    Raises:
        StorageError: E-KEY.
    """
    try:
        key = load_ssh_private_key(read_secret(folder / NODE_KEY), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise StorageError("E-KEY", f"{folder / NODE_KEY}: expected a P-384 key of OpenSSH's form", hint=RESTORE_KEY)
    return key
