"""Files of allowed signers, as people write them for ssh-keygen."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.shared.errors import JobError
from cotune.shared.signers import read_signers, signers_text

KEY, OTHER = "ssh-ed25519 " + "A" * 68, "ssh-ed25519 " + "B" * 68


def read(folder: Path, text: str) -> dict[str, frozenset[str]]:
    (folder / "signers").write_text(text)
    return read_signers(folder / "signers")


def test_what_a_run_writes_is_read_back(tmp_path: Path) -> None:
    keys = {"coordinator": KEY, "site-1": OTHER}
    assert read(tmp_path, signers_text(keys)) == {name: frozenset({key}) for name, key in keys.items()}


def test_lines_as_people_write_them(tmp_path: Path) -> None:
    text = f"""# officers
site-1,site-2 {KEY} admin@hospital
site-1 namespaces="git,cotune-claim" {OTHER}   second key
site-3 namespaces="git" {KEY}
site-4 ssh-rsa AAAAB3Nza

"""
    assert read(tmp_path, text) == {"site-1": frozenset({KEY, OTHER}), "site-2": frozenset({KEY})}


@pytest.mark.parametrize(
    "line",
    [
        f"*@hospital {KEY}",
        f"site-1 cert-authority {KEY}",
        f'site-1 valid-before="20200101" {KEY}',
        f'site-1 namespaces="cotune-claim",valid-after="20300101" {KEY}',
        "ssh-ed25519",
    ],
)
def test_what_cotune_does_not_check_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    with pytest.raises(JobError) as caught:
        read(tmp_path, f"\n{line}\n")
    assert caught.value.code == "E-SIGNERS"
    assert "line 2" in caught.value.message


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("none", "binary"):
        with pytest.raises(JobError) as caught:
            read_signers(tmp_path / name)
        assert caught.value.code == "E-SIGNERS"
