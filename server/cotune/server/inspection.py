"""What is open at a coordinator, or about to break."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from cotune.server.authority import RENEW_DAYS, read_certificate
from cotune.server.fedhome import FedHome
from cotune.shared.errors import CotuneError
from cotune.shared.fault import Fault, fault_of
from cotune.shared.keyfile import read_secret
from cotune.shared.reaching import RENEW, look_at

SECRETS = ("coordinator.key", "tls/ca.key", "tls/server.key", "superlink/superexec.secret")


def inspect(path: Path) -> list[Fault]:
    """A coordinator's home, its secrets and certificates, and its address as sites reach it."""
    path = path.absolute()
    if not path.is_dir():
        return fault_of(lambda: FedHome.open(path))
    found = [fault for name in SECRETS for fault in fault_of(lambda name=name: read_secret(path / name))]
    found += [fault for name in ("ca.crt", "server.crt") for fault in _certificate(path / "tls" / name)]
    try:
        home = FedHome.open(path)
        ca = (home.tls / "ca.crt").read_text(encoding="ascii")
    except CotuneError as error:
        said = Fault(error.code, error.message, error.hint or "restore it from a backup")
        return [*found, *([] if said in found else [said])]
    except (OSError, UnicodeDecodeError):
        return found  # said of the certificate already
    return [*found, *look_at(home.settings.federation.address, ca)]


def _certificate(path: Path) -> list[Fault]:
    missing = fault_of(lambda: read_certificate(path))
    if missing:
        return missing
    ends = read_certificate(path).not_valid_after_utc
    if (ends - datetime.now(UTC)).days >= RENEW_DAYS:
        return []
    return [Fault("E-CERT-END", f"{path}: ends on {ends:%Y-%m-%d}", RENEW)]
