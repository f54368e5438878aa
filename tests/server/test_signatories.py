"""The coordinator signs its claim, keeps what sites sign, and says who did not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.shared.privacy.test_claim import entries, make_job

from cotune.server import signatories
from cotune.server.signatories import Signatories
from cotune.server.trust import ON_FIRST_USE, Trust
from cotune.shared.chain import SignedHead, head_message
from cotune.shared.errors import JobError
from cotune.shared.keyfile import SigningKey
from cotune.shared.plan import ClaimRequest
from cotune.shared.privacy.claim import ClaimSubject, build_claim, claim_bytes
from cotune.shared.runs import RunFolder
from cotune.shared.signers import COORDINATOR, signature_path, signers_path
from cotune.shared.signing import verify
from cotune.shared.update import SiteFailure

KEYS = {site: SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n, site in enumerate("abc", 1)}


class Sites:
    """A fleet that only signs: a as it should, b with another's key, c not at all."""

    def __init__(self) -> None:
        self.asked: list[ClaimRequest] = []

    def countersign(self, requests: Sequence[ClaimRequest]) -> Iterator[tuple[str, str | SiteFailure]]:
        self.asked += requests
        for request in requests:
            if request.site == "c":
                yield "c", SiteFailure(site="c", code="E-CLAIM-ENTRY", message="c: steps is 4", exit_code=6)
            else:
                yield request.site, KEYS["a"].sign("cotune-claim", request.claim.encode())
        yield "d", KEYS["a"].sign("cotune-claim", b"")  # nobody asked it


def head(site: str) -> dict[str, Any]:
    key, message = KEYS[site], head_message(site, 4, "e" * 64)
    signature = key.sign("cotune-head", message)
    return SignedHead(site=site, seq=4, sha256="e" * 64, public_key=key.public, signature=signature).model_dump()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run-1")
    run.privacy.mkdir(parents=True)
    (run.path / "events.jsonl").touch()
    return run


def claim_of(signers: Signatories) -> dict[str, Any]:
    job = make_job()
    subject = ClaimSubject("run-1", {}, None, {s: head(s) for s in KEYS}, ("base", "c" * 64), signers.coordinator())
    return build_claim(job, {site: entries(job, 2) for site in KEYS}, subject)


def test_what_is_kept_was_signed_by_the_key_of_the_ledger_and_the_rest_is_said(run: RunFolder) -> None:
    fleet = Sites()
    signers = Signatories(run, fleet, ON_FIRST_USE)
    claim = claim_of(signers)
    signers.sign(claim)
    content = (run.privacy / "claim.json").read_bytes()
    assert content == claim_bytes(claim)
    assert [request.claim.encode() for request in fleet.asked] == [content] * 3
    assert sorted(path.stem for path in (run.privacy / "signatures").iterdir()) == ["a", COORDINATOR]
    said = signature_path(run, COORDINATOR).read_text()
    assert verify(claim["coordinator"]["public_key"], "cotune-claim", content, said)
    assert claim["coordinator"]["simulated"] is True
    warnings = {event["data"]["site"]: event["message"] for event in run.events()}
    assert "not by its own key" in warnings["b"]
    assert "c: steps is 4 (E-CLAIM-ENTRY)" in warnings["c"]
    assert set(warnings) == {"b", "c", "d"}
    assert len(signers_path(run).read_text().splitlines()) == 4


def test_a_deployed_coordinator_signs_with_the_key_of_its_home(run: RunFolder, tmp_path: Path) -> None:
    key = SigningKey.create(tmp_path / "key")
    signers = Signatories(run, Sites(), Trust(key=key))
    assert signers.coordinator() == {"public_key": key.public, "simulated": False}
    assert not run.sites.exists()


def test_a_simulated_coordinators_key_is_the_same_when_the_run_goes_on(run: RunFolder) -> None:
    first, second = (Signatories(run, Sites(), ON_FIRST_USE).coordinator() for _ in range(2))
    assert first == second
    assert (run.sites / "coordinator.key").stat().st_mode & 0o777 == 0o600


def test_signatures_of_an_earlier_claim_are_removed(run: RunFolder) -> None:
    signers = Signatories(run, Sites(), ON_FIRST_USE)
    signature_path(run, "c").parent.mkdir()
    signature_path(run, "c").write_text("stale")
    signers.sign(claim_of(signers))
    assert not signature_path(run, "c").exists()


def test_a_claim_without_its_form_is_not_signed(run: RunFolder) -> None:
    signers = Signatories(run, Sites(), ON_FIRST_USE)
    with pytest.raises(JobError) as caught:
        signers.sign({**claim_of(signers), "unprotected": []})
    assert caught.value.code == "E-CLAIM-FORM"
    assert not (run.privacy / "claim.json").exists()


def test_a_claim_too_large_for_a_message_is_published_without_the_sites(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signatories, "MAX_CLAIM", 100)
    fleet = Sites()
    signers = Signatories(run, fleet, ON_FIRST_USE)
    signers.sign(claim_of(signers))
    assert not fleet.asked
    assert json.loads((run.privacy / "claim.json").read_bytes())
    assert all("the most is 100" in event["message"] for event in run.events())
    assert len(run.events()) == 3


def test_a_site_called_as_the_coordinator_has_no_signature_of_its_own(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KEYS, COORDINATOR, KEYS["a"])
    fleet = Sites()
    signers = Signatories(run, fleet, ON_FIRST_USE)
    claim = claim_of(signers)
    signers.sign(claim)
    assert COORDINATOR not in {request.site for request in fleet.asked}
    said, content = signature_path(run, COORDINATOR).read_text(), (run.privacy / "claim.json").read_bytes()
    assert verify(claim["coordinator"]["public_key"], "cotune-claim", content, said)
