"""A site's signing key: an ordinary OpenSSH private key file that only its owner may read."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_ssh_private_key

from cotune.shared.chain import Entry, SignedHead, head_message
from cotune.shared.errors import StorageError
from cotune.shared.files import storage_errors, sync_folder
from cotune.shared.signing import Namespace, public_key_line, sign


@dataclass(frozen=True, repr=False, eq=False)
class SiteKey:
    """An Ed25519 key. Nothing prints it, and nothing but its file holds it.

    Attributes:
        private: The secret; use `sign`.
    """

    private: Ed25519PrivateKey

    @classmethod
    def create(cls, path: Path) -> SiteKey:
        """A new key, durable in a new file of mode 0600 before this returns.

        Raises:
            StorageError: There is a file already, and it stays as it is (E-KEY); or it cannot be written.
        """
        private = Ed25519PrivateKey.generate()
        content = private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
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
        return cls(private)

    @classmethod
    def load(cls, path: Path) -> SiteKey:
        """The key of a file that nobody but its owner could have read.

        Edge cases: a link, a folder, a pipe, a file of another user, one that the group or others may touch,
        one with a passphrase and a key of another kind are each refused by name.

        Raises:
            StorageError: E-KEY.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise _refused(path, f"cannot be opened ({error.strerror})") from None
        try:
            _check_alone(path, os.fstat(descriptor))
            content = os.read(descriptor, 100_000)
        finally:
            os.close(descriptor)
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

    def sign_head(self, site: str, entry: Entry) -> SignedHead:
        """The signed head of a site's ledger that ends with this entry."""
        signature = self.sign("cotune-head", head_message(site, entry.seq, entry.sha256))
        return SignedHead(site=site, seq=entry.seq, sha256=entry.sha256, public_key=self.public, signature=signature)


def _check_alone(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise _refused(path, "expected an ordinary file")
    if info.st_uid != os.geteuid():
        raise _refused(path, "it belongs to another user", hint="run cotune as the user who owns the site's home")
    if info.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(info.st_mode)
        raise _refused(path, f"its mode is {mode:o}: others could have read it", hint=f"chmod 600 {path}")


def _refused(path: Path, what: str, hint: str | None = None) -> StorageError:
    return StorageError("E-KEY", f"{path}: {what}", hint=hint)
