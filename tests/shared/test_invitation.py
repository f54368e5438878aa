"""Requests and invitations: what is read was signed as it stands, and every fault has a name."""

import base64
import json
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.shared.errors import CotuneError, JobError, RefusedError
from cotune.shared.invitation import PREFIX, Invite, JoinRequest, Sign, read_invite, read_request
from cotune.shared.signing import Namespace, key_fingerprint, public_key_line, sign

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SITE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
COORDINATOR = Ed25519PrivateKey.from_private_bytes(bytes(32))


def signer(key: Ed25519PrivateKey) -> Sign:
    def made(namespace: Namespace, message: bytes) -> str:
        return sign(key, namespace, message)

    return made


def public(key: Ed25519PrivateKey) -> str:
    return public_key_line(key.public_key())


def node_key(curve: ec.EllipticCurve | None = None) -> str:
    key = ec.generate_private_key(curve or ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def certificate() -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a federation")])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, NOW, NOW + timedelta(days=1))
    return made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


REQUEST = JoinRequest(
    site="hospital-a",
    public_key=public(SITE),
    node_key=node_key(),
    policy_sha256="ab" * 32,
    cotune="0.1.0",
).signed(signer(SITE))
INVITE = Invite(
    federation="north",
    address="coordinator.example:8443",
    ca=certificate(),
    coordinator_key=public(COORDINATOR),
    site="hospital-a",
    site_key=public(SITE),
    expires=NOW + timedelta(days=7),
).signed(signer(COORDINATOR))


def encoded(content: bytes) -> str:
    return PREFIX + base64.urlsafe_b64encode(content).decode()


def written(path: Path, fields: dict[str, Any]) -> Path:
    path.write_text(json.dumps(fields))
    return path


def fields_of(document: JoinRequest | Invite) -> dict[str, Any]:
    return json.loads(document.model_dump_json(by_alias=True))


def refusal_of_invite(text: str, now: datetime = NOW) -> CotuneError:
    with pytest.raises(CotuneError) as caught:
        read_invite(text, now)
    assert caught.value.code.startswith("E-INVITE")
    return caught.value


def test_a_request_reads_back_and_holds_nothing_but_public_facts(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(REQUEST.to_json())
    assert read_request(tmp_path / "request.json") == REQUEST
    assert set(fields_of(REQUEST)) == {
        "schema", "site", "public_key", "node_key", "policy_sha256", "cotune", "signature",
    }  # fmt: skip


OTHER_REQUEST = {
    "site": "hospital-b",
    "public_key": public(COORDINATOR),
    "node_key": node_key(),
    "policy_sha256": "cd" * 32,
    "cotune": "9.9.9",
    "signature": sign(COORDINATOR, "cotune-request", REQUEST.message()),
}
OTHER_INVITE = {
    "federation": "south",
    "address": "elsewhere.example:8443",
    "ca": certificate(),
    "coordinator_key": public(SITE),
    "site": "hospital-b",
    "site_key": public(COORDINATOR),
    "expires": "2036-03-01T12:00:00Z",
    "signature": sign(SITE, "cotune-invite", INVITE.message()),
}


@pytest.mark.parametrize("field", OTHER_REQUEST)
def test_no_part_of_a_request_can_be_changed(tmp_path: Path, field: str) -> None:
    path = written(tmp_path / "request.json", {**fields_of(REQUEST), field: OTHER_REQUEST[field]})
    with pytest.raises(RefusedError) as caught:
        read_request(path)
    assert caught.value.code == "E-REQUEST-SIGNATURE"


def test_every_part_of_a_request_and_an_invitation_was_tried() -> None:
    assert {"schema", *OTHER_REQUEST} == set(fields_of(REQUEST))
    assert {"schema", *OTHER_INVITE} == set(fields_of(INVITE))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema", 2), ("site", "Hospital A"), ("site", "../a"), ("public_key", "ssh-rsa AAAA"),
        ("node_key", node_key(ec.SECP256R1())), ("node_key", "ecdsa-sha2-nistp384 " + "A" * 182 + "=="),
        ("policy_sha256", "x"), ("cotune", "x" * 41), ("signature", "x" * 1001), ("records", 12),
    ],
)  # fmt: skip
def test_what_is_no_request_is_told_by_its_field(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(JobError) as caught:
        read_request(written(tmp_path / "request.json", {**fields_of(REQUEST), field: value}))
    assert caught.value.code == "E-REQUEST-FORM"
    assert caught.value.param == field


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b"{" * 9000, b" " * 30_000])
def test_a_file_that_is_no_request_is_an_error_with_a_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "request.json").write_bytes(content)
    for path in (tmp_path / "request.json", tmp_path / "nothing", tmp_path):
        with pytest.raises(JobError) as caught:
            read_request(path)
        assert caught.value.code in ("E-REQUEST-FORM", "E-REQUEST-FILE")
        assert caught.value.hint


def test_an_invitation_reads_back_as_a_line_a_wrapped_line_and_a_file(tmp_path: Path) -> None:
    text = INVITE.text()
    (tmp_path / "invite.txt").write_text(text + "\n")
    wrapped = "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    for form in (text, wrapped, f"  {text}\n", text.rstrip("="), str(tmp_path / "invite.txt")):
        found = read_invite(form, NOW)
        assert found == INVITE
        assert found.sha256() == INVITE.sha256()


@pytest.mark.parametrize("field", OTHER_INVITE)
def test_no_part_of_an_invitation_can_be_changed(field: str) -> None:
    changed = {**fields_of(INVITE), field: OTHER_INVITE[field]}
    assert refusal_of_invite(encoded(json.dumps(changed).encode())).code == "E-INVITE-SIGNATURE"


def test_an_invitation_is_no_use_from_the_second_on_in_which_it_expires() -> None:
    assert read_invite(INVITE.text(), INVITE.expires - timedelta(seconds=1)) == INVITE
    for now in (INVITE.expires, INVITE.expires + timedelta(days=400)):
        error = refusal_of_invite(INVITE.text(), now)
        assert error.code == "E-INVITE-EXPIRED"
        assert "2026-03-08 12:00 UTC" in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema", 2), ("federation", ""), ("address", "coordinator.example"), ("address", "a b:1"), ("address", "a:0"),
        ("address", "a:65536"), ("address", "https://a:1"), ("address", "a:1/x"), ("ca", "x"),
        ("ca", INVITE.ca + INVITE.ca), ("coordinator_key", "x"), ("site_key", "x"), ("expires", "tomorrow"),
        ("expires", "2026-03-08T12:00:00"), ("secret", "x"),
    ],
)  # fmt: skip
def test_what_is_no_invitation_is_told_by_its_field(field: str, value: object) -> None:
    error = refusal_of_invite(encoded(json.dumps({**fields_of(INVITE), field: value}).encode()))
    assert (error.code, error.param) == ("E-INVITE-FORM", field)


@pytest.mark.parametrize("address", ["10.1.2.3:8443", "[fd00::1]:443", "a-b.example.org:65535", "localhost:1"])
def test_an_address_is_a_name_or_a_number_and_a_port(address: str) -> None:
    moved = INVITE.model_copy(update={"address": address}).signed(signer(COORDINATOR))
    assert read_invite(moved.text(), NOW).address == address


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "E-INVITE-FILE"), ("nothing/here", "E-INVITE-FILE"), ("x" * 5000, "E-INVITE-FILE"),
        ("\0", "E-INVITE-FILE"), (PREFIX, "E-INVITE-FORM"), (PREFIX + "!!", "E-INVITE-FORM"),
        ("cotune-invite-2.AAAA", "E-INVITE-FORM"), (INVITE.text()[:-40], "E-INVITE-FORM"),
        (PREFIX + "A" * 30_000, "E-INVITE-FORM"), (INVITE.text()[:300] + INVITE.text()[301:], "E-INVITE-FORM"),
    ],
)  # fmt: skip
def test_a_text_that_is_no_invitation_is_an_error_with_a_name(text: str, code: str) -> None:
    error = refusal_of_invite(text)
    assert error.code == code
    assert error.exit_code == 4


def test_an_invitation_of_a_newer_version_is_told_as_that() -> None:
    assert "newer cotune" in refusal_of_invite("cotune-invite-7.AAAA").message


@settings(max_examples=200, deadline=None, derandomize=True)
@given(content=st.binary(max_size=200))
def test_no_bytes_break_the_reader(content: bytes) -> None:
    assert refusal_of_invite(encoded(content)).exit_code == 4


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_changed_letter_gives_another_invitation(data: st.DataObject) -> None:
    text = INVITE.text()
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + data.draw(st.characters(codec="ascii")) + text[place + 1 :]
    try:
        assert read_invite(changed, NOW) == INVITE
    except CotuneError as error:
        assert error.code.startswith("E-INVITE")


def test_the_pin_is_of_the_certificate_and_not_of_its_spelling() -> None:
    assert len(INVITE.ca_sha256) == 64
    spaced = INVITE.model_copy(update={"ca": INVITE.ca.replace("\n", "\n\n", 1) + "\n"})
    assert spaced.ca_sha256 == INVITE.ca_sha256
    assert INVITE.model_copy(update={"ca": certificate()}).ca_sha256 != INVITE.ca_sha256


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
def test_a_key_has_the_fingerprint_that_openssh_shows(tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_text(public(SITE) + "\n")
    done = subprocess.run(["ssh-keygen", "-l", "-f", str(tmp_path / "key.pub")], capture_output=True, check=True)
    assert done.stdout.decode().split()[1] == key_fingerprint(public(SITE))
