"""The federation's authority: strict programs take its certificates, they are renewed in time, faults have names."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from cotune.server.authority import create_authority, ensure_server_certificate, read_certificate
from cotune.shared.errors import StorageError

NOW = datetime.now(UTC).replace(microsecond=0)
HOSTS = ["fed.example.org"]


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    create_authority(tmp_path, "lungs", NOW)
    assert ensure_server_certificate(tmp_path, HOSTS, NOW)
    return tmp_path


def verified(tls: Path, host: str, at: datetime = NOW) -> None:
    """What a strict verifier (RFC 5280 as browsers read it) says."""
    store = Store([read_certificate(tls / "ca.crt")])
    subject = x509.DNSName(host)
    verifier = PolicyBuilder().store(store).time(at).build_server_verifier(subject)
    verifier.verify(read_certificate(tls / "server.crt"), [])


@pytest.mark.parametrize("at", [NOW, NOW - timedelta(hours=23), NOW + timedelta(days=364)])
def test_a_strict_verifier_takes_the_certificate_also_with_a_clock_that_is_late(tls: Path, at: datetime) -> None:
    for host in (*HOSTS, "localhost"):
        verified(tls, host, at)


def test_no_other_host_and_no_other_authority_is_vouched_for(
    tls: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(VerificationError):
        verified(tls, "example.org")
    other = tmp_path_factory.mktemp("other")
    create_authority(other, "lungs", NOW)
    (tls / "ca.crt").write_bytes((other / "ca.crt").read_bytes())
    with pytest.raises(VerificationError):
        verified(tls, *HOSTS)


def test_keys_are_their_owners_alone_and_the_pair_loads(tls: Path) -> None:
    for name in ("ca.key", "server.key"):
        assert (tls / name).stat().st_mode & 0o777 == 0o600
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls / "server.crt", tls / "server.key")


def test_a_server_key_may_sign_no_certificates(tls: Path) -> None:
    server, ca = read_certificate(tls / "server.crt"), read_certificate(tls / "ca.crt")
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


@pytest.mark.parametrize(("days", "renewed"), [(0, False), (334, False), (336, True), (400, True)])
def test_it_is_renewed_when_less_than_thirty_days_are_left(tls: Path, days: int, renewed: bool) -> None:
    before, key = read_certificate(tls / "server.crt").serial_number, (tls / "server.key").read_bytes()
    later = NOW + timedelta(days=days)
    assert ensure_server_certificate(tls, HOSTS, later) == renewed
    assert (read_certificate(tls / "server.crt").serial_number != before) == renewed
    assert (tls / "server.key").read_bytes() == key
    verified(tls, *HOSTS, later)
    assert not ensure_server_certificate(tls, HOSTS, later)


def test_another_address_gets_another_certificate(tls: Path) -> None:
    assert ensure_server_certificate(tls, ["10.1.2.3"], NOW)
    names = read_certificate(tls / "server.crt").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {str(address) for address in names.get_values_for_type(x509.IPAddress)} == {"10.1.2.3", "127.0.0.1"}
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]


def test_an_authority_that_ends_issues_nothing_that_outlives_it(tls: Path) -> None:
    with pytest.raises(StorageError) as caught:
        ensure_server_certificate(tls, HOSTS, NOW + timedelta(days=365 * 9 + 5))
    assert caught.value.code == "E-TLS"


def test_an_authority_is_never_made_anew_over_another(tls: Path) -> None:
    before = (tls / "ca.crt").read_bytes()
    with pytest.raises(StorageError) as caught:
        create_authority(tls, "lungs", NOW)
    assert caught.value.code == "E-KEY"
    assert (tls / "ca.crt").read_bytes() == before


@pytest.mark.parametrize("name", ["ca.crt", "server.crt"])
def test_a_damaged_certificate_is_named(tls: Path, name: str) -> None:
    (tls / name).write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(StorageError) as caught:
        ensure_server_certificate(tls, HOSTS, NOW)
    assert caught.value.code == "E-TLS"
    assert name in caught.value.message


@pytest.mark.parametrize(("harm", "code"), [("chmod", "E-KEY"), ("damage", "E-TLS"), ("remove", "E-KEY")])
def test_a_key_that_others_could_have_read_or_that_is_damaged_signs_nothing(tls: Path, harm: str, code: str) -> None:
    key = tls / "ca.key"
    match harm:
        case "chmod":
            key.chmod(0o640)
        case "damage":
            key.write_bytes(key.read_bytes()[:80])
        case _:
            key.unlink()
    with pytest.raises(StorageError) as caught:
        ensure_server_certificate(tls, ["elsewhere"], NOW)
    assert caught.value.code == code
