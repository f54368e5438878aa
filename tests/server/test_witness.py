"""Ledger heads at the coordinator: the newest of each site, by its own key, also when this coordinator forgot."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.server.answers import head_of

from cotune.server.trust import Trust
from cotune.server.witness import Witness
from cotune.shared.chain import SignedHead
from cotune.shared.errors import StorageError
from cotune.shared.update import UpdateHeader

Sign = Callable[[str, int], SignedHead]
SITES = [f"site-{number}" for number in range(1, 7)]
EVENT = {"kind": "dp-sgd", "sampling_probability": 0.1, "noise_multiplier": 1.0, "steps": 2}


def header(head: SignedHead, site: str = "site-1", witnessed: tuple[SignedHead, ...] = ()) -> UpdateHeader:
    sha256 = "0" * 64
    return UpdateHeader(
        site=site, run_id="run", round=1, job_sha256=sha256, base_sha256=sha256, update_sha256=sha256, event=EVENT,
        head=head, witnessed=witnessed,
    )  # fmt: skip


def keep(witness: Witness, header: UpdateHeader) -> str | None:
    """What the coordinator does with an answer: the reason it is not acceptable, or else it is kept, durably."""
    reason = witness.reason(header)
    if reason is None:
        witness.keep(header)
        witness.save()
    return reason


def test_a_site_gets_its_own_head_and_those_of_the_next_three(tmp_path: Path, sign_head: Sign) -> None:
    witness = Witness(tmp_path / "heads.json")
    for site in SITES:
        assert keep(witness, header(sign_head(site, 4), site)) is None
    again = Witness(tmp_path / "heads.json")
    assert [head.site for head in again.heads_for("site-5", SITES)] == ["site-5", "site-6", "site-1", "site-2"]
    assert [head.site for head in again.heads_for("site-1", SITES[:1])] == ["site-1"]


def test_an_older_head_a_forged_one_and_another_key_are_refused(tmp_path: Path, sign_head: Sign) -> None:
    witness = Witness(tmp_path / "heads.json")
    newest = sign_head("site-1", 5)
    assert keep(witness, header(newest)) is None
    assert keep(witness, header(newest)) is None  # the same update, sent again
    assert keep(witness, header(sign_head("site-1", 4))) == "its ledger is older than one it signed before"
    fork = newest.model_copy(update={"sha256": "f" * 64})
    stolen = sign_head("site-2", 9).model_copy(update={"site": "site-1"})
    for forged in (fork, stolen, newest.model_copy(update={"seq": 6}), sign_head("site-2", 9)):
        assert keep(witness, header(forged)) == "its ledger head is not signed by its own key"
    assert Witness(tmp_path / "heads.json").heads_for("site-1", SITES) == (newest,)


def test_a_genuine_head_by_another_key_than_the_first_is_refused_however_new(tmp_path: Path) -> None:
    witness = Witness(tmp_path / "heads.json")
    assert keep(witness, header(head_of("site-1", 5))) is None
    other = head_of("site-1", 6, Ed25519PrivateKey.generate())
    assert keep(witness, header(other)) == "its ledger head is signed by another key than before"
    assert keep(witness, header(head_of("site-2", 1), "site-2", (other,))) is None
    assert witness.heads_for("site-1", SITES)[0].seq == 5, "nor does another site's word change it"


def test_an_answer_that_is_not_admitted_leaves_no_head_behind(tmp_path: Path, sign_head: Sign) -> None:
    witness = Witness(tmp_path / "heads.json")
    assert witness.reason(header(sign_head("site-1", 9))) is None
    witness.save()
    assert Witness(tmp_path / "heads.json").heads_for("site-1", SITES) == ()
    assert keep(witness, header(sign_head("site-1", 3))) is None


def test_what_was_not_saved_is_asked_for_again_and_taken_again(tmp_path: Path, sign_head: Sign) -> None:
    witness = Witness(tmp_path / "heads.json")
    witness.keep(header(sign_head("site-1", 4)))
    again = Witness(tmp_path / "heads.json")
    assert again.heads_for("site-1", SITES) == ()
    assert keep(again, header(sign_head("site-1", 4))) is None


def test_a_fork_signed_by_the_site_itself_is_refused(tmp_path: Path, sign_head: Sign) -> None:
    (tmp_path / "heads.json").write_text(
        '{"site-1": ' + sign_head("site-1", 5).model_copy(update={"sha256": "f" * 64}).model_dump_json() + "}"
    )
    witness = Witness(tmp_path / "heads.json")
    assert keep(witness, header(sign_head("site-1", 5))) == "its ledger is older than one it signed before"


def test_what_one_coordinator_forgot_the_other_sites_bring_back(tmp_path: Path, sign_head: Sign) -> None:
    forgetful = Witness(tmp_path / "heads.json")
    assert keep(forgetful, header(sign_head("site-1", 3))) is None
    held = (sign_head("site-1", 8), sign_head("site-3", 2).model_copy(update={"seq": 3}))
    assert keep(forgetful, header(sign_head("site-2", 4), "site-2", held)) is None
    assert forgetful.heads_for("site-1", SITES)[0].seq == 8
    assert "site-3" not in {head.site for head in forgetful.heads_for("site-1", SITES)}


def test_heads_that_cannot_be_read_are_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_text("{")
    with pytest.raises(StorageError, match=r"heads\.json"):
        Witness(tmp_path / "heads.json")


def test_an_enrolled_site_signs_with_the_key_it_is_enrolled_with_from_its_first_head_on(
    tmp_path: Path, sign_head: Sign
) -> None:
    known = {"site-1": sign_head("site-1", 1).public_key, "site-2": sign_head("site-2", 1).public_key}
    witness = Witness(tmp_path / "heads.json", Trust("signature", lambda site: known.get(site, "")))
    assert keep(witness, header(sign_head("site-1", 4))) is None
    said = "its ledger head is not signed by the key it is enrolled with"
    assert keep(witness, header(head_of("site-2", 1), "site-2")) == said
    assert keep(witness, header(sign_head("site-3", 1), "site-3")) == said, "it is not enrolled at all"
    assert [head.site for head in witness.heads_for("site-1", SITES)] == ["site-1"]
