"""Coordinators that invite sites, made of the real parts and without a network."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cotune.client.home import SiteHome
from cotune.shared.invitation import Invite
from cotune.shared.keyfile import SigningKey

COORDINATOR = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))
STRANGER = SigningKey(Ed25519PrivateKey.from_private_bytes(b"\x01" * 32))


@cache
def certificate(name: str = "north") -> str:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    named = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = x509.CertificateBuilder(named, named, key.public_key(), 1, now, now + timedelta(days=1))
    return made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def invite_for(home: SiteHome, key: SigningKey = COORDINATOR, **changes: Any) -> Invite:
    """What a coordinator answers to a site's request."""
    facts: dict[str, Any] = {
        "federation": "north",
        "address": "coordinator.example:8443",
        "ca": certificate(),
        "coordinator_key": key.public,
        "site": home.name,
        "site_key": home.ledger.head.public_key,
        "expires": datetime.now(UTC) + timedelta(days=7),
    }
    return Invite.model_validate({**facts, **changes}).signed(key.sign)
