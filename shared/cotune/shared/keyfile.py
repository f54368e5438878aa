"""Key files: written once, for their owner's eyes alone, and refused if others could have read them."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_ssh_private_key

from cotune.shared.errors import StorageError
from cotune.shared.files import storage_errors, sync_folder
from cotune.shared.signing import Namespace, public_key_line, sign

MAX_BYTES = 100_000


@dataclass(frozen=True, repr=False, eq=False)
class SigningKey:
    """An Ed25519 key, of a site or a coordinator. Nothing prints it, and nothing but its file holds it.

    Attributes:
        private: The secret; use `sign`.
    """

    private: Ed25519PrivateKey

    @classmethod
    def create(cls, path: Path) -> SigningKey:
        """A new key, durable in a new file of mode 0600 before this returns: an ordinary OpenSSH private key.

        Raises:
            StorageError: There is a file already, and it stays as it is (E-KEY); or it cannot be written.
        """
        private = Ed25519PrivateKey.generate()
        write_secret(path, private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        return cls(private)

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """The key of a file that nobody but its owner could have read.

        Edge cases: what `read_secret` refuses, one with a passphrase and a key of another kind are each refused
        by name.

        Raises:
            StorageError: E-KEY.
        """
        content = read_secret(path)
        try:
            private = load_ssh_private_key(content, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise _refused(path, "expected an OpenSSH private key without a passphrase") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise _refused(path, "expected an Ed25519 key")
        return cls(private)

    @property
    def public(self) -> str:
        """The public key, `ssh-ed25519 AAAA...`."""
        return public_key_line(self.private.public_key())

    def sign(self, namespace: Namespace, message: bytes) -> str:
        """An armored SSH signature for this purpose; see `cotune.shared.signing.sign`."""
        return sign(self.private, namespace, message)


def write_secret(path: Path, content: bytes) -> None:
    """Write a secret to a new file of mode 0600, durable before this returns.

    Raises:
        StorageError: There is a file already, and it stays as it is (E-KEY); or it cannot be written.
    """
    with storage_errors(path):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise _refused(path, "there is a file already; a key is never overwritten") from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        sync_folder(path.parent)


def read_secret(path: Path) -> bytes:
    """The content of a file that nobody but its owner could have read.

    Edge cases: a link, a folder, a pipe, a file of another user and one that the group or others may touch are
    each refused by name.

    Raises:
        StorageError: E-KEY.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise _refused(path, f"cannot be opened ({error.strerror})") from None
    try:
        _check_alone(path, os.fstat(descriptor))
        return os.read(descriptor, MAX_BYTES)
    finally:
        os.close(descriptor)


def _check_alone(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise _refused(path, "expected an ordinary file")
    if info.st_uid != os.geteuid():
        raise _refused(path, "it belongs to another user", hint="run cotune as the user who owns it")
    if info.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(info.st_mode)
        raise _refused(path, f"its mode is {mode:o}: others could have read it", hint=f"chmod 600 {path}")


def _refused(path: Path, what: str, hint: str | None = None) -> StorageError:
    return StorageError("E-KEY", f"{path}: {what}", hint=hint)
