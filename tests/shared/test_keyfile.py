"""A key file: made once, for its owner's eyes alone, and refused if others could have read it."""

import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cotune.shared.errors import StorageError
from cotune.shared.keyfile import SigningKey
from cotune.shared.signing import verify


def refusal(path: Path) -> StorageError:
    with pytest.raises(StorageError) as caught:
        SigningKey.load(path)
    assert caught.value.code == "E-KEY"
    return caught.value


def test_a_key_is_made_for_its_owner_alone_and_reads_back(tmp_path: Path) -> None:
    made = SigningKey.create(tmp_path / "site.key")
    assert (tmp_path / "site.key").stat().st_mode & 0o777 == 0o600
    read = SigningKey.load(tmp_path / "site.key")
    assert read.public == made.public
    assert verify(made.public, "cotune-head", b"x", read.sign("cotune-head", b"x"))
    assert SigningKey.create(tmp_path / "another").public != made.public


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    made = SigningKey.create(tmp_path / "site.key")
    with pytest.raises(StorageError) as caught:
        SigningKey.create(tmp_path / "site.key")
    assert caught.value.code == "E-KEY"
    assert SigningKey.load(tmp_path / "site.key").public == made.public


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_key_that_others_may_touch_is_refused_with_the_command_that_mends_it(tmp_path: Path, mode: int) -> None:
    SigningKey.create(tmp_path / "site.key")
    (tmp_path / "site.key").chmod(mode)
    error = refusal(tmp_path / "site.key")
    assert f"{mode:o}" in error.message
    assert error.hint == f"chmod 600 {tmp_path / 'site.key'}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_key_of_another_user_is_refused(tmp_path: Path) -> None:
    SigningKey.create(tmp_path / "site.key")
    os.chown(tmp_path / "site.key", 12345, -1)
    assert "another user" in refusal(tmp_path / "site.key").message


@pytest.mark.parametrize(
    "put",
    [
        lambda path, key: None,
        lambda path, key: path.mkdir(),
        lambda path, key: os.mkfifo(path, 0o600),
        lambda path, key: path.symlink_to(key),
        lambda path, key: path.touch(0o600),
        lambda path, key: (path.touch(0o600), path.write_bytes(key.read_bytes()[:-80])),
        lambda path, key: (path.touch(0o600), path.write_bytes(b"\xff" * 200)),
    ],
    ids=["nothing", "folder", "pipe", "link", "empty", "cut short", "noise"],
)
def test_what_is_not_a_whole_key_file_is_refused(tmp_path: Path, put: Callable[[Path, Path], object]) -> None:
    SigningKey.create(tmp_path / "real")
    put(tmp_path / "site.key", tmp_path / "real")
    refusal(tmp_path / "site.key")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
@pytest.mark.parametrize(
    ("options", "said"),
    [(["-t", "ed25519", "-N", "secret"], "passphrase"), (["-t", "ecdsa", "-N", ""], "Ed25519"), (None, None)],
    ids=["passphrase", "another kind", "good"],
)
def test_keys_that_openssh_makes_are_read_or_refused_by_name(
    tmp_path: Path, options: list[str] | None, said: str | None
) -> None:
    key = tmp_path / "site.key"
    made = options or ["-t", "ed25519", "-N", ""]
    subprocess.run(["ssh-keygen", "-q", "-C", "a comment", "-f", str(key), *made], check=True)
    if said:
        assert said in refusal(key).message
    else:
        assert key.with_suffix(".key.pub").read_text().startswith(SigningKey.load(key).public)


def test_nothing_shows_a_key(tmp_path: Path) -> None:
    key = SigningKey.create(tmp_path / "site.key")
    secret = key.private.private_bytes_raw()
    assert "private" not in repr(key)
    for shown in (repr(key), str(key), str(vars(key))):
        assert secret.hex() not in shown
        assert repr(secret) not in shown
    with pytest.raises(TypeError):
        pickle.dumps(key)
