"""A site's home: whole or not there, nobody else's to read, and never a second budget for the same records."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cotune.client.home import SiteHome, default_home
from cotune.client.policy import policy_text
from cotune.shared.chain import SignedHead, head_is_genuine, head_message
from cotune.shared.errors import StorageError
from cotune.shared.signing import public_key_line, sign

MODEL = "ab" * 32


def edit(home: SiteHome, old: str, new: str) -> None:
    path = home.path / "policy.toml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def second_dataset(name: str, path: Path) -> str:
    budget = "[dataset.budget]\nepsilon_total = 9\nepsilon_per_run = 9\n"
    return f'[[dataset]]\nid = "{name}"\npath = "{path}"\nunit = "column:patient"\n{budget}\n[approve]'


def test_a_new_home_is_private_signed_and_has_its_data_set_registered(make_home: Any, desk: Any, notes: Path) -> None:
    home = make_home()
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert {p.name for p in home.path.iterdir()} == {
        "site.key", "site.pub", "policy.toml", "data.salt", "ledger.jsonl", "head.json", "jobs", "updates", "footprint"
    }  # fmt: skip
    assert desk.actions(home) == ["site.init", "data.register"]
    assert (home.path / "site.pub").read_text() == f"{home.ledger.head.public_key} st-mary\n"
    assert head_is_genuine(home.ledger.head)
    ledger = (home.path / "ledger.jsonl").read_text()
    assert str(notes) not in ledger, "no path leaves the home"
    assert hashlib.sha256(notes.read_bytes()).hexdigest() not in ledger, "nor a digest that others could test"
    assert str(home.path) not in repr(home)


def test_two_homes_of_the_same_file_have_unlike_digests(tmp_path: Path, make_policy: Any) -> None:
    made = [SiteHome.create(tmp_path / name, make_policy()) for name in ("one", "two")]
    digests = [home.ledger.entries[1].fields["digest"] for home in made]
    assert digests[0] != digests[1]


@pytest.mark.parametrize("kind", ["home", "file", "empty folder", "dangling link"])
def test_a_home_is_never_made_where_there_is_something(kind: str, tmp_path: Path, make_policy: Any, desk: Any) -> None:
    path = tmp_path / "home"
    if kind == "home":
        SiteHome.create(path, make_policy())
    elif kind == "file":
        path.write_text("kept")
    elif kind == "empty folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    before = path.read_bytes() if path.is_file() else sorted(path.rglob("*"))
    error = desk.refused(SiteHome.create, path, make_policy())
    assert (error.code, error.exit_code) == ("E-SITE-EXISTS", 4)
    assert (path.read_bytes() if path.is_file() else sorted(path.rglob("*"))) == before


def test_a_home_that_cannot_be_finished_leaves_nothing_behind(tmp_path: Path, make_policy: Any, desk: Any) -> None:
    error = desk.refused(SiteHome.create, tmp_path / "new" / "home", make_policy(dataset={"path": "/nowhere"}))
    assert error.code == "E-DATA-FILE"
    assert "/nowhere" not in error.message
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (shutil.rmtree, "E-SITE-HOME"),
        (lambda home: home.chmod(0o750), "E-SITE-HOME"),
        (lambda home: (home / "site.key").chmod(0o640), "E-KEY"),
        (lambda home: (home / "site.key").unlink(), "E-KEY"),
        (lambda home: (home / "site.pub").unlink(), "E-SITE-HOME"),
        (lambda home: (home / "site.pub").write_text("ssh-ed25519 AAAA st-mary\n"), "E-SITE-HOME"),
        (lambda home: (home / "ledger.jsonl").unlink(), "E-LEDGER-BEHIND"),
        (lambda home: [(home / f).unlink() for f in ("ledger.jsonl", "head.json")], "E-LEDGER-BEHIND"),
        (lambda home: [(home / "ledger.jsonl").write_bytes(b""), (home / "head.json").unlink()], "E-SITE-HOME"),
        (lambda home: (home / "policy.toml").unlink(), "E-POLICY-FILE"),
        (lambda home: (home / "policy.toml").write_bytes(b"\xff"), "E-POLICY-FILE"),
    ],
    ids=range(11),
)
def test_a_damaged_or_open_home_is_refused_and_never_begun_anew(
    harm: Callable[[Path], object], code: str, make_home: Any, desk: Any
) -> None:
    path = make_home().path
    harm(path)
    assert desk.refused(SiteHome.open, path).code == code
    assert desk.refused(SiteHome.open, path).code == code, "a second try is no way round"


def test_another_homes_ledger_is_refused(tmp_path: Path, make_policy: Any, desk: Any) -> None:
    one, two = (SiteHome.create(tmp_path / name, make_policy()) for name in ("one", "two"))
    for name in ("ledger.jsonl", "head.json"):
        shutil.copy(two.path / name, one.path / name)
    assert desk.refused(SiteHome.open, one.path).code == "E-LEDGER-HEAD"


def test_a_changed_policy_is_logged_with_its_hash_once_and_holds_at_once(make_home: Any, desk: Any) -> None:
    home = make_home()
    edit(home, "epsilon_total = 4.0", "epsilon_total = 5.0")
    assert home.policy.dataset[0].budget.epsilon_total == 5.0
    assert SiteHome.open(home.path).policy == home.policy
    assert desk.actions(home) == ["site.init", "data.register", "policy.change"]
    entry = SiteHome.open(home.path).ledger.entries[-1]
    assert entry.fields == {"policy_sha256": hashlib.sha256((home.path / "policy.toml").read_bytes()).hexdigest()}
    edit(home, "epsilon_total = 5.0", "epsilon_total = 4.0")
    assert len(SiteHome.open(home.path).ledger.entries) == 4, "the way back is a change too"


def test_a_policy_with_a_fault_stops_the_site(make_home: Any, desk: Any) -> None:
    home = make_home()
    edit(home, "max_lora_rank", "max_lora_rnk")
    assert desk.refused(SiteHome.open, home.path).code == "E-POLICY-KEY"
    assert desk.refused(lambda: home.policy).code == "E-POLICY-KEY"


@pytest.mark.parametrize(
    ("old", "new"),
    [('name = "st-mary"', 'name = "charite"'), ("[site]", "[site]\nsimulated = true")],
    ids=["name", "kind"],
)
def test_what_was_fixed_when_the_home_was_made_stays(old: str, new: str, make_home: Any, desk: Any) -> None:
    home = make_home()
    edit(home, old, new)
    error = desk.refused(SiteHome.open, home.path)
    assert error.code == "E-POLICY-VALUE"
    assert "stays" in error.message


def test_a_new_data_set_is_registered_when_the_policy_is_next_read(make_home: Any, desk: Any, tmp_path: Path) -> None:
    home = make_home()
    letters = tmp_path / "letters.jsonl"
    letters.write_text('{"text": "a", "patient": "p1"}\n')
    edit(home, "[approve]", second_dataset("letters", letters))
    SiteHome.open(home.path)
    assert desk.actions(home)[2:] == ["policy.change", "data.register"]


@pytest.mark.parametrize("kind", ["same path", "copy", "hard link", "symbolic link"])
def test_the_same_file_under_a_second_id_is_refused(
    kind: str, make_home: Any, desk: Any, notes: Path, tmp_path: Path
) -> None:
    home, other = make_home(), tmp_path / "other.jsonl"
    if kind == "same path":
        other = notes
    elif kind == "copy":
        shutil.copy(notes, other)
    elif kind == "hard link":
        other.hardlink_to(notes)
    else:
        other.symlink_to(notes)
    edit(home, "[approve]", second_dataset("letters", other))
    error = desk.refused(SiteHome.open, home.path)
    assert (error.code, error.exit_code) == ("E-DATASET-SAME", 6)
    assert "`letters` is registered as `notes`" in error.message


def test_the_same_file_under_a_new_name_is_refused_after_the_old_name_is_gone(make_home: Any, desk: Any) -> None:
    home = make_home()
    edit(home, 'id = "notes"', 'id = "fresh"')
    assert desk.refused(SiteHome.open, home.path).code == "E-DATASET-SAME"


def test_a_changed_file_is_logged_once_and_keeps_its_budget(
    make_home: Any, desk: Any, ask_job: Any, notes: Path
) -> None:
    home, job = make_home(), ask_job()
    facts = {"dataset": "notes", "unit": "column:patient", "run_id": "r", "job_sha256": job.sha256()}
    home.ledger.reserve(**facts, round_number=1, event=desk.event(job))
    notes.write_text(notes.read_text() + notes.read_text().splitlines()[0] + "\n")
    dataset = home.policy.dataset[0]
    home.files.note(dataset)
    home.files.note(dataset)
    assert desk.actions(home)[-1] == "data.change"
    assert desk.actions(home).count("data.change") == 1
    assert SiteHome.open(home.path).ledger.events("notes") == [desk.event(job)]


@pytest.mark.parametrize("kind", ["gone", "a pipe", "a folder"])
def test_a_data_file_that_cannot_be_read_is_named_by_its_id_only(
    kind: str, make_home: Any, desk: Any, notes: Path
) -> None:
    home = make_home()
    notes.unlink()
    if kind == "a pipe":
        subprocess.run(["mkfifo", str(notes)], check=True)
    elif kind == "a folder":
        notes.mkdir()
    error = desk.refused(home.files.note, home.policy.dataset[0])
    assert error.code == "E-DATA-FILE"
    assert str(notes) not in error.message
    assert "`notes`" in error.message


def test_a_relative_path_starts_at_the_home(make_home: Any, notes: Path) -> None:
    home = make_home()
    shutil.copy(notes, home.path / "inside.jsonl")
    edit(home, str(notes), "inside.jsonl")
    assert home.files.path(home.policy.dataset[0]) == home.path / "inside.jsonl"
    home.files.note(home.policy.dataset[0])


def test_a_simulated_home_grants_its_job_and_is_opened_the_next_time(tmp_path: Path, ask_job: Any, desk: Any) -> None:
    job = ask_job()
    folder = tmp_path / "sites" / "st-mary"
    home = SiteHome.simulated(folder, "st-mary", job, MODEL)
    again = SiteHome.simulated(folder, "st-mary", job, MODEL)
    assert home.is_simulated
    assert again.ledger.head == home.ledger.head
    assert home.jobs.standings()[job.sha256()].state == "approved"
    assert "simulated = true" in (folder / "policy.toml").read_text()
    assert desk.actions(home) == ["site.init", "job.approved"]
    assert list((tmp_path / "sites").iterdir()) == [folder]


def test_a_simulation_never_runs_in_a_real_sites_home(make_home: Any, ask_job: Any, desk: Any) -> None:
    home = make_home()
    error = desk.refused(SiteHome.simulated, home.path, "st-mary", ask_job(), MODEL)
    assert error.code == "E-SITE-HOME"
    edit(home, "[site]", "[site]\nsimulated = true")
    assert desk.refused(SiteHome.simulated, home.path, "st-mary", ask_job(), MODEL).code == "E-POLICY-VALUE"


def test_a_home_on_a_full_disk_is_not_made(mount_disk: Callable[[int], Path], make_policy: Any, desk: Any) -> None:
    disk = mount_disk(16)
    error = desk.refused(SiteHome.create, disk / "home", make_policy())
    assert isinstance(error, StorageError)
    assert list(disk.iterdir()) == []


def test_a_home_on_a_read_only_disk_is_refused(mount_disk: Callable[[int], Path], make_policy: Any, desk: Any) -> None:
    disk = mount_disk(1024)
    home = SiteHome.create(disk / "home", make_policy())
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    error = desk.refused(SiteHome.open, home.path)
    assert (error.code, error.exit_code) == ("E-LEDGER-STORAGE", 1)
    assert isinstance(desk.refused(SiteHome.create, disk / "new", make_policy()), StorageError)


def test_the_home_is_where_the_user_says_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COTUNE_SITE", str(tmp_path))
    assert default_home() == tmp_path
    monkeypatch.delenv("COTUNE_SITE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_home() == tmp_path / "cotune" / "site"


def test_heads_of_other_sites_only_ever_get_newer(make_home: Any, sign_head: Any) -> None:
    peers = make_home().peers
    peers.keep([sign_head("charite", 5), sign_head("mercy", 2)])
    forged = sign_head("charite", 9).model_copy(update={"seq": 10})
    key, sha256 = Ed25519PrivateKey.generate(), "7" * 64
    other_key = SignedHead(
        site="charite",
        seq=11,
        sha256=sha256,
        public_key=public_key_line(key.public_key()),
        signature=sign(key, "cotune-head", head_message("charite", 11, sha256)),
    )
    assert head_is_genuine(other_key), "of some key, but not of charite's"
    peers.keep([sign_head("charite", 4), forged, other_key])
    assert {site: head.seq for site, head in peers.heads().items()} == {"charite": 5, "mercy": 2}
    peers.keep([sign_head("charite", 6)])
    assert peers.heads()["charite"].seq == 6


def test_heads_that_cannot_be_read_are_an_error_not_forgotten(make_home: Any, desk: Any) -> None:
    peers = make_home().peers
    for content in (b"{", b"[]", json.dumps({"charite": {"seq": 1}}).encode()):
        peers.path.write_bytes(content)
        assert desk.refused(peers.heads).code == "E-HEADS"


def test_what_is_written_as_policy_is_what_was_made(make_home: Any, make_policy: Any) -> None:
    home = make_home(require={"min_sites": 2})
    assert (home.path / "policy.toml").read_text() == policy_text(make_policy(require={"min_sites": 2}))
