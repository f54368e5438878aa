"""Who is enrolled: one name is one key, who was shut out stays out, and a damaged file is never a forgotten site.

What needs Flower is in tests/integration/test_fed_up.py; here no SuperLink runs, and none is asked.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cotune.server.control import Control
from cotune.server.enrolment import Enrolled, approve, enrolled, revoke
from cotune.server.fedhome import FED_FILE, FedHome
from cotune.shared.errors import JobError, RefusedError, StorageError
from cotune.shared.invitation import JoinRequest, read_invite
from cotune.shared.jobfile import validate
from cotune.shared.keyfile import SigningKey

SETTINGS = validate({"federation": {"name": "lungs", "address": "127.0.0.1:8443"}}, FED_FILE, origin="test")


@pytest.fixture
def home(tmp_path: Path) -> FedHome:
    return FedHome.create(tmp_path / "fed", SETTINGS)


def node_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def request_of(name: str, key: SigningKey, node: str) -> JoinRequest:
    request = JoinRequest(site=name, public_key=key.public, node_key=node, policy_sha256="ab" * 32, cotune="0.1.0")
    return request.signed(key.sign)


@pytest.fixture
def known(home: FedHome, tmp_path: Path) -> JoinRequest:
    """A site that is in already, with Flower's number 7."""
    request = request_of("st-mary", SigningKey.create(tmp_path / "site.key"), node_key())
    fields: dict[str, Any] = request.model_dump(include={"public_key", "node_key", "policy_sha256", "cotune"})
    site = Enrolled(name="st-mary", node_id=7, state="approved", approved=datetime.now(UTC), **fields)
    (home.path / "sites" / "st-mary.json").write_text(site.model_dump_json())
    return request


def control(home: FedHome) -> Control:
    return Control(home.flwr_environment())


def test_a_site_that_is_in_gets_another_invitation_without_flower(home: FedHome, known: JoinRequest) -> None:
    before = datetime.now(UTC)
    invite = read_invite(approve(home, known, 3, control(home)).text(), before)
    assert (invite.site, invite.site_key) == ("st-mary", known.public_key)
    assert (invite.federation, invite.address) == ("lungs", "127.0.0.1:8443")
    assert invite.coordinator_key == home.key.public
    assert invite.ca == (home.tls / "ca.crt").read_text()
    assert timedelta(days=3, seconds=-1) <= invite.expires - before <= timedelta(days=3, minutes=1)
    assert enrolled(home.path)["st-mary"].node_id == 7


def test_one_name_is_one_key_and_one_key_one_name(home: FedHome, known: JoinRequest, tmp_path: Path) -> None:
    other, mary = SigningKey.create(tmp_path / "other"), SigningKey.load(tmp_path / "site.key")
    for request, code in (
        (request_of("st-mary", other, node_key()), "E-SITE-NAME"),
        (request_of("mercy", mary, node_key()), "E-SITE-KEY"),
        (request_of("mercy", other, known.node_key), "E-SITE-KEY"),
    ):
        with pytest.raises(RefusedError) as caught:
            approve(home, request, 3, control(home))
        assert caught.value.code == code
    assert set(enrolled(home.path)) == {"st-mary"}


def test_who_is_shut_out_stays_out(home: FedHome, known: JoinRequest) -> None:
    first = revoke(home, "st-mary")
    assert (first.state, first.withdrawn) == ("revoked", (7,))
    assert enrolled(home.path)["st-mary"] == first == revoke(home, "st-mary")
    with pytest.raises(RefusedError) as caught:
        approve(home, known, 3, control(home))
    assert caught.value.code == "E-SITE-REVOKED"
    assert enrolled(home.path)["st-mary"] == first


def test_who_was_never_in_is_named_with_the_nearest(home: FedHome, known: JoinRequest) -> None:
    with pytest.raises(JobError) as caught:
        revoke(home, "st-marry")
    assert caught.value.code == "E-SITE-UNKNOWN"
    assert "Did you mean `st-mary`?" in caught.value.message


@pytest.mark.parametrize("harm", ["cut", "renamed", "edited"])
def test_a_damaged_file_is_named_and_no_site_forgotten(home: FedHome, known: JoinRequest, harm: str) -> None:
    file = home.path / "sites" / "st-mary.json"
    text = file.read_text()
    match harm:
        case "cut":
            file.write_text(text[:-20])
        case "renamed":
            file = file.rename(file.with_name("mercy.json"))
        case _:
            file.write_text(text.replace("approved", "welcome", 1))
    for asked in (lambda: enrolled(home.path), lambda: revoke(home, "st-mary")):
        with pytest.raises(StorageError) as caught:
            asked()
        assert caught.value.code == "E-ENROLMENT"
        assert str(file) in caught.value.message
