"""Joining and leaving: whose jobs a site lets in, and what becomes of every invitation that is not for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.client.federations import COORDINATOR, STRANGER, certificate, invite_for

from cotune.client.coordinators import joined_keys
from cotune.client.courier_folder import CourierFolder, courier_folder, load_node_key
from cotune.client.guard import Guard
from cotune.client.home import SiteHome
from cotune.client.joining import join, joined, leave, write_request
from cotune.shared.cli import run
from cotune.shared.errors import CotuneError, RefusedError, StorageError
from cotune.shared.invitation import read_request
from cotune.shared.signing import key_fingerprint

Told = Callable[..., tuple[int, str, str]]


@pytest.fixture
def home(make_policy: Any, tmp_path: Path) -> SiteHome:
    """A site without a signer in its policy."""
    made = SiteHome.create(tmp_path / "home", make_policy())
    write_request(made)
    return made


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setenv("COTUNE_SITE", str(home.path))

    def tell(*arguments: object) -> tuple[int, str, str]:
        code = run(["site", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return tell


def actions(home: SiteHome) -> list[str]:
    return [entry.action for entry in SiteHome.open(home.path).ledger.entries]


def test_a_request_names_the_site_and_its_two_keys_and_holds_no_path(home: SiteHome, notes: Path) -> None:
    request = read_request(home.path / "request.json")
    assert (request.site, request.public_key) == ("st-mary", home.ledger.head.public_key)
    assert (courier_folder(home.path) / "node.pub").read_text().strip() == request.node_key
    text = (home.path / "request.json").read_text()
    assert str(notes) not in text and str(home.path) not in text


def test_the_courier_s_folder_is_its_owner_s_alone_and_holds_nothing_of_the_site_s(home: SiteHome) -> None:
    join(home, invite_for(home))
    folder = courier_folder(home.path)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "node.key").stat().st_mode & 0o777 == 0o600
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"node.key", "node.pub", "north/ca.crt", "north/courier.toml"}
    secret = (home.path / "site.key").read_bytes().splitlines()[1]
    assert not any(secret in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_node_key_stays_the_same_and_is_made_anew_only_when_it_is_gone(home: SiteHome) -> None:
    first = read_request(home.path / "request.json").node_key
    assert write_request(home).node_key == first
    (courier_folder(home.path) / "node.key").unlink()
    assert write_request(home).node_key != first


@pytest.mark.parametrize("content", [b"", b"nonsense", None], ids=["empty", "nonsense", "open to others"])
def test_a_node_key_nobody_can_trust_is_refused_by_name(home: SiteHome, content: bytes | None) -> None:
    key = courier_folder(home.path) / "node.key"
    key.chmod(0o644) if content is None else key.write_bytes(content)
    with pytest.raises(StorageError) as caught:
        write_request(home)
    assert caught.value.code == "E-KEY"


def test_joining_writes_down_where_to_go_whom_to_trust_and_that_it_was_done(home: SiteHome) -> None:
    invite = invite_for(home)
    made = join(home, invite)
    folder = CourierFolder(courier_folder(home.path) / "north")
    assert (made.address, made.ca_sha256) == ("coordinator.example:8443", invite.ca_sha256)
    assert home.coordinators.all() == {"north": made}
    assert folder.ca.decode() == certificate()
    assert (folder.settings.address, folder.settings.site) == ("coordinator.example:8443", "st-mary")
    assert folder.key.public_key() == load_node_key(folder.path.parent).public_key()
    assert joined(home) == {"north": COORDINATOR.public}
    assert actions(home)[-1] == "federation.join"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"site": "charite"}, "E-INVITE-SITE"),
        ({"site_key": STRANGER.public}, "E-INVITE-KEY"),
    ],
)
def test_an_invitation_for_another_site_or_key_changes_nothing(
    home: SiteHome, changes: dict[str, Any], code: str
) -> None:
    before = actions(home)
    with pytest.raises(RefusedError) as caught:
        join(home, invite_for(home, **changes))
    assert caught.value.code == code
    assert actions(home) == before
    assert not home.coordinators.all()
    assert not (courier_folder(home.path) / "north").exists()


def test_an_invitation_is_taken_up_once_also_after_the_site_left(home: SiteHome) -> None:
    invite = invite_for(home)
    join(home, invite)
    for _ in range(2):
        with pytest.raises(RefusedError) as caught:
            join(home, invite)
        assert caught.value.code == "E-INVITE-USED"
        if joined(home):
            leave(home, "north")
    assert actions(home).count("federation.join") == 1


@pytest.mark.parametrize("gone", ["home/coordinators/north.json", "home-courier/north/ca.crt"])
def test_an_invitation_that_a_crash_left_half_taken_up_is_finished(home: SiteHome, tmp_path: Path, gone: str) -> None:
    invite = invite_for(home)
    join(home, invite)
    (tmp_path / gone).unlink()
    (tmp_path / "home/coordinators/north.json").unlink(missing_ok=True)  # it is written last
    join(SiteHome.open(home.path), invite)
    assert (tmp_path / gone).exists()
    assert actions(home).count("federation.join") == 1


def test_a_new_invitation_moves_the_address_and_keeps_what_was_set(home: SiteHome) -> None:
    join(home, invite_for(home))
    folder = CourierFolder(courier_folder(home.path) / "north")
    (folder.path / "courier.toml").write_text((folder.path / "courier.toml").read_text() + "poll_s = 5\n")
    join(home, invite_for(home, address="10.0.0.1:9", ca=certificate("new")))
    assert (folder.settings.address, folder.settings.poll_s) == ("10.0.0.1:9", 5.0)
    assert folder.ca.decode() == certificate("new")


def test_another_coordinator_cannot_take_over_a_federation_s_name(home: SiteHome) -> None:
    join(home, invite_for(home))
    with pytest.raises(RefusedError) as caught:
        join(home, invite_for(home, STRANGER))
    assert caught.value.code == "E-FEDERATION-NAME"
    assert joined(home) == {"north": COORDINATOR.public}
    leave(home, "north")
    join(home, invite_for(home, STRANGER))
    assert joined(home) == {"north": STRANGER.public}


def test_a_site_is_in_several_federations_and_leaves_one(home: SiteHome) -> None:
    join(home, invite_for(home))
    join(home, invite_for(home, STRANGER, federation="south"))
    leave(home, "north")
    assert joined(SiteHome.open(home.path)) == {"south": STRANGER.public}
    assert sorted(home.coordinators.all()) == ["south"]
    assert not (courier_folder(home.path) / "north").exists()
    assert (courier_folder(home.path) / "south").exists()


def test_who_never_joined_is_none_and_who_left_all_is_not(home: SiteHome) -> None:
    assert joined_keys(home.ledger.entries) is None
    join(home, invite_for(home))
    leave(home, "north")
    assert joined_keys(home.ledger.entries) == {}


def test_a_courier_at_work_is_not_left_without_its_folder(home: SiteHome) -> None:
    join(home, invite_for(home))
    with CourierFolder(courier_folder(home.path) / "north").alone(), pytest.raises(RefusedError) as caught:
        leave(home, "north")
    assert caught.value.code == "E-COURIER-RUNNING"
    assert joined(home) == {"north": COORDINATOR.public}


def test_two_couriers_of_one_folder_are_one_too_many_and_a_dead_one_is_none(home: SiteHome) -> None:
    join(home, invite_for(home))
    folder = courier_folder(home.path) / "north"
    code = (
        "import sys, time; from pathlib import Path; from cotune.client.courier_folder import CourierFolder\n"
        "with CourierFolder(Path(sys.argv[1])).alone():\n    print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(RefusedError) as caught, CourierFolder(folder).alone():
            pass
        assert caught.value.code == "E-COURIER-RUNNING"
        other.kill()
    with CourierFolder(folder).alone():
        pass


def signed_by(key: Any, job: Any) -> str:
    return key.sign("cotune-job", job.sha256().encode())


def refusal(home: SiteHome, ask: Any) -> CotuneError:
    with pytest.raises(RefusedError) as caught:
        Guard(home).admit(ask, "ab" * 32)
    return caught.value


def test_a_site_that_joined_lets_in_what_its_coordinators_signed_and_nothing_else(
    home: SiteHome, ask_job: Any, desk: Any
) -> None:
    job = ask_job()
    home.jobs.approve(job, by="admin")
    Guard(home).admit(desk.plan(job), "ab" * 32)
    join(home, invite_for(home))
    for signature in (None, "forged", signed_by(STRANGER, job), signed_by(COORDINATOR, ask_job(run={"rounds": 2}))):
        error = refusal(home, desk.plan(job, signature=signature))
        assert (error.code, error.param) == ("E-POLICY", "allow.signers")
    Guard(home).admit(desk.plan(job, signature=signed_by(COORDINATOR, job)), "ab" * 32)
    leave(home, "north")
    assert refusal(home, desk.plan(job, signature=signed_by(COORDINATOR, job))).param == "allow.signers"


def test_listed_signers_stand_instead_of_the_coordinators(
    make_policy: Any, tmp_path: Path, ask_job: Any, desk: Any
) -> None:
    home = SiteHome.create(tmp_path / "listing", make_policy(allow={"signers": [STRANGER.public]}))
    join(home, invite_for(home))
    job = ask_job()
    home.jobs.approve(job, by="admin")
    Guard(home).admit(desk.plan(job, signature=signed_by(STRANGER, job)), "ab" * 32)
    assert refusal(home, desk.plan(job, signature=signed_by(COORDINATOR, job))).param == "allow.signers"


def test_the_commands_join_and_leave_offline(told: Told, home: SiteHome, tmp_path: Path) -> None:
    invite = invite_for(home, address="no-such-host.invalid:8443")
    code, out, err = told("join", invite.text())
    assert (code, err) == (0, "")
    assert "joined north at no-such-host.invalid:8443" in out
    assert key_fingerprint(COORDINATOR.public) in out
    (tmp_path / "invite.txt").write_text(invite_for(home, STRANGER, federation="south").text() + "\n")
    out = told("join", tmp_path / "invite.txt", "--fingerprint", key_fingerprint(STRANGER.public), "--json")[1]
    assert json.loads(out)["data"]["federation"] == "south"
    code, out, err = told("leave", "north")
    assert (code, err) == (0, "")
    assert "still in: south" in out
    code, _, err = told("leave", "sout")
    assert code == 4
    assert "Did you mean `south`?" in err


def test_the_command_refuses_by_name(told: Told, home: SiteHome) -> None:
    invite = invite_for(home)
    old = invite_for(home, expires=datetime.now(UTC) - timedelta(seconds=1))
    moved = invite.model_copy(update={"address": "elsewhere.example:1"})
    wrong = ["--fingerprint", key_fingerprint(STRANGER.public)]
    cases = [
        ([old.text()], 6, "E-INVITE-EXPIRED"), ([moved.text()], 6, "E-INVITE-SIGNATURE"),
        (["nonsense"], 4, "E-INVITE-FILE"), ([invite.text()[:50]], 4, "E-INVITE-FORM"),
        ([invite.text(), *wrong], 6, "E-INVITE-COORDINATOR"),
    ]  # fmt: skip
    for arguments, exit_code, name in cases:
        code, out, err = told("join", *arguments)
        assert (code, out, err.split()[0]) == (exit_code, "", name)
        code, out, _ = told("join", *arguments, "--json")
        assert (code, json.loads(out)["error"]["code"]) == (exit_code, name)
    assert not home.coordinators.all()


def test_the_command_request_writes_it_again(told: Told, home: SiteHome) -> None:
    (home.path / "request.json").unlink()
    code, out, _ = told("request", "--json")
    assert code == 0
    assert json.loads(out)["data"]["content"]["site"] == "st-mary"
    assert read_request(home.path / "request.json").site == "st-mary"


def test_a_new_node_key_replaces_the_old_one_which_is_put_aside(told: Told, home: SiteHome) -> None:
    before, key = read_request(home.path / "request.json"), courier_folder(home.path) / "node.key"
    content = key.read_bytes()
    assert told("request", "--new-node-key")[0] == 0
    after = read_request(home.path / "request.json")
    assert after.node_key != before.node_key
    assert after.public_key == before.public_key
    assert (key.with_name("node.key.old").read_bytes(), key.stat().st_mode & 0o777) == (content, 0o600)


def test_a_damaged_coordinator_s_file_is_told_by_name(home: SiteHome) -> None:
    join(home, invite_for(home))
    (home.path / "coordinators" / "north.json").write_text("{}")
    with pytest.raises(StorageError) as caught:
        home.coordinators.all()
    assert caught.value.code == "E-COORDINATORS"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_courier_folder_that_cannot_be_written_is_told_by_name(home: SiteHome) -> None:
    courier_folder(home.path).chmod(0o500)
    with pytest.raises(StorageError):
        join(home, invite_for(home))
