"""The federation's own certificate authority: sites trust its one certificate, and no other authority."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cotune.shared.errors import StorageError
from cotune.shared.files import write_atomic
from cotune.shared.keyfile import read_secret, write_secret

CA_YEARS = 10
SERVER_DAYS = 365
RENEW_DAYS = 30
CLOCK_SKEW = timedelta(days=1)  # a site whose clock is late still takes a certificate made today
LOOPBACK = ("localhost", "127.0.0.1")
RESTORE = "restore the tls folder from a backup"


def create_authority(folder: Path, federation: str, now: datetime) -> None:
    """Make the authority: `ca.key`, which signs server certificates alone, and `ca.crt`, which every site gets.

    Raises:
        StorageError: There is one already (E-KEY), or the folder cannot be written.
    """
    key = _new_key(folder / "ca.key")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"cotune {federation}")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _certificate(key, name, now, timedelta(days=365 * CA_YEARS))
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, SHA256())
    )
    write_atomic(folder / "ca.crt", certificate.public_bytes(Encoding.PEM))


def ensure_server_certificate(folder: Path, hosts: Sequence[str], now: datetime) -> bool:
    """Issue `server.crt` where there is none for these hosts that lasts another 30 days; whether one was issued.

    Its key, `server.key`, stays: replacing one file is whole or not at all, replacing two is not.

    Args:
        folder: Of the authority.
        hosts: Names and addresses by which the server is reached; loopback is added.
        now: The time.

    Raises:
        StorageError: The authority's files are missing, damaged or open to others (E-KEY, E-TLS), or it ends
            before the certificate would.
    """
    wanted = _alternatives([*hosts, *LOOPBACK])
    path = folder / "server.crt"
    ca = read_certificate(folder / "ca.crt")
    if path.exists():
        current = read_certificate(path)
        lasts = current.not_valid_after_utc - now > timedelta(days=RENEW_DAYS)
        if lasts and current.issuer == ca.subject and _alternatives_of(current) == set(wanted):
            return False
    if ca.not_valid_after_utc < now + timedelta(days=SERVER_DAYS):
        what = f"{folder / 'ca.crt'}: the authority ends on {ca.not_valid_after_utc:%Y-%m-%d}"
        raise StorageError(
            "E-TLS", what, hint="make a new federation with `cotune fed init`, and invite the sites anew"
        )
    key = _read_key(folder / "server.key") if (folder / "server.key").exists() else _new_key(folder / "server.key")
    write_atomic(path, _issued(folder, ca, key, hosts[0], wanted, now).public_bytes(Encoding.PEM))
    return True


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate file.

    Raises:
        StorageError: There is none, or it is damaged (E-TLS).
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        raise StorageError("E-TLS", f"{path}: expected a certificate in PEM form", hint=RESTORE) from None


def _issued(
    folder: Path,
    ca: x509.Certificate,
    key: EllipticCurvePrivateKey,
    host: str,
    alternatives: Sequence[x509.GeneralName],
    now: datetime,
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    signer = _read_key(folder / "ca.key")
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        _certificate(key, name, now, timedelta(days=SERVER_DAYS))
        .issuer_name(ca.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(authority, critical=False)
        .sign(signer, SHA256())
    )


def _certificate(
    key: EllipticCurvePrivateKey, name: x509.Name, now: datetime, lasts: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + lasts)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(hosts: Sequence[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            found.append(x509.DNSName(host))
    return found


def _alternatives_of(certificate: x509.Certificate) -> set[x509.GeneralName]:
    return set(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)


def _new_key(path: Path) -> EllipticCurvePrivateKey:
    key = generate_private_key(SECP256R1())
    write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def _read_key(path: Path) -> EllipticCurvePrivateKey:
    content = read_secret(path)
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise StorageError("E-TLS", f"{path}: expected an EC private key in PEM form", hint=RESTORE)
    return key
