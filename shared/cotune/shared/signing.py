"""Signatures in OpenSSH's own format: any machine's `ssh-keygen -Y verify` checks them without cotune.

Format: OpenSSH's PROTOCOL.sshsig, with Ed25519 keys (RFC 8032, RFC 8709) and SHA-512.
"""

from __future__ import annotations

import base64
import hashlib
import textwrap
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

Namespace = Literal[
    "cotune-claim", "cotune-head", "cotune-invite", "cotune-job", "cotune-ledger", "cotune-request", "cotune-standing",
    "cotune-update",
]  # fmt: skip

_MAGIC = b"SSHSIG"
_KEY_TYPE = b"ssh-ed25519"
_HASH = b"sha512"
_BEGIN, _END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"


def public_key_line(key: Ed25519PublicKey) -> str:
    """The key as OpenSSH writes it, `ssh-ed25519 AAAA...`, without a comment."""
    blob = _key_blob(key.public_bytes_raw())
    return f"{_KEY_TYPE.decode()} {base64.b64encode(blob).decode()}"


def key_fingerprint(public_key: str) -> str:
    """The key's fingerprint as OpenSSH shows it, `SHA256:...`, for people to compare.

    Raises:
        ValueError: It is no Ed25519 key in OpenSSH's form.
    """
    digest = hashlib.sha256(_key_blob(_raw_key(public_key))).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def sign(private_key: Ed25519PrivateKey, namespace: Namespace, message: bytes) -> str:
    """The armored signature of a message; the same key, namespace and message always give the same one.

    The namespace says what a signature is for: one made for a head never passes for one of a job.
    """
    signature = private_key.sign(_signed_data(namespace, message))
    container = _container(private_key.public_key().public_bytes_raw(), namespace, signature)
    lines = textwrap.wrap(base64.b64encode(container).decode(), 70)
    return "\n".join([_BEGIN, *lines, _END, ""])


def verify(public_key: str, namespace: Namespace, message: bytes, signature: str) -> bool:
    """Whether this key signed this message for this purpose; False, never an error, for anything else.

    Args:
        public_key: `ssh-ed25519 AAAA...`; a comment after it is ignored.
        namespace: What the signature is to be for.
        message: The exact bytes.
        signature: Armored, as `sign` or `ssh-keygen -Y sign` with an Ed25519 key gives it.
    """
    try:
        key, container = _raw_key(public_key), _unarmored(signature)
        raw = container[-64:]
        if container != _container(key, namespace, raw):
            return False
        Ed25519PublicKey.from_public_bytes(key).verify(raw, _signed_data(namespace, message))
    except (ValueError, InvalidSignature):
        return False
    return True


def _string(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


def _key_blob(key: bytes) -> bytes:
    return _string(_KEY_TYPE) + _string(key)


def _purpose(namespace: str) -> bytes:
    return _string(namespace.encode()) + _string(b"") + _string(_HASH)


def _signed_data(namespace: str, message: bytes) -> bytes:
    return _MAGIC + _purpose(namespace) + _string(hashlib.sha512(message).digest())


def _container(key: bytes, namespace: str, signature: bytes) -> bytes:
    version = (1).to_bytes(4, "big")
    wrapped = _string(_string(_KEY_TYPE) + _string(signature))
    return _MAGIC + version + _string(_key_blob(key)) + _purpose(namespace) + wrapped


def _raw_key(line: str) -> bytes:
    kind, _, rest = line.strip().partition(" ")
    blob = base64.b64decode(rest.partition(" ")[0], validate=True)
    if kind != _KEY_TYPE.decode() or blob != _key_blob(blob[-32:]):
        raise ValueError("not an Ed25519 key in OpenSSH's form")
    return blob[-32:]


def _unarmored(signature: str) -> bytes:
    first, *lines, last = signature.strip().split("\n") if "\n" in signature.strip() else ("", "")
    if (first.strip(), last.strip()) != (_BEGIN, _END):
        raise ValueError("not an armored SSH signature")
    return base64.b64decode("".join(line.strip() for line in lines), validate=True)
