"""A job put before a site and its answer travel whole; what is neither is said by name."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, RecordDict

from cotune.shared.bundle import bundle_sha256
from cotune.shared.errors import ConnectionFailed, RefusedError
from cotune.shared.plan import LedgerRequest, cotune_version
from cotune.shared.proposal import MAX_TEXT, JobStanding, Proposal
from cotune.shared.signing import public_key_line, sign, verify
from cotune.shared.update import SiteFailure
from cotune.shared.wire import (
    answer_to_records,
    proposal_to_records,
    query_from_records,
    request_to_records,
    standing_from_records,
    standing_to_records,
)

STANDING = JobStanding(
    site="site-1", run_id="run-1", job_sha256="1" * 64, state="refused", rule="allow.models", text="not on the list"
)


@pytest.fixture
def proposal(make_job) -> Proposal:
    return Proposal(
        run_id="run-1", cotune=cotune_version(), job=make_job(), site="site-1", bundle_sha256=bundle_sha256()
    )


def test_a_proposal_arrives_as_it_was_sent(proposal: Proposal) -> None:
    received = query_from_records(proposal_to_records(proposal))
    assert received == proposal
    assert isinstance(received, Proposal)
    assert received.job.sha256() == proposal.job.sha256()


def test_a_query_is_a_proposal_or_a_request_for_a_ledger() -> None:
    request = LedgerRequest(run_id="run-1", site="site-1")
    assert query_from_records(request_to_records(request)) == request
    for records in (RecordDict(), standing_to_records(STANDING)):
        with pytest.raises(ConnectionFailed):
            query_from_records(records)


def test_a_proposal_of_another_version_is_refused_before_its_job_is_read() -> None:
    said = {"kind": "proposal", "json": json.dumps({"cotune": "9.9", "job": {"unheard": "of"}})}
    with pytest.raises(RefusedError) as caught:
        query_from_records(RecordDict({"header": ConfigRecord(said)}))
    assert caught.value.code == "E-VERSION"


def test_a_standing_arrives_with_a_signature_that_covers_all_of_it() -> None:
    key = Ed25519PrivateKey.generate()
    signed = STANDING.model_copy(update={"signature": sign(key, "cotune-standing", STANDING.message())})
    received = standing_from_records(standing_to_records(signed), "site-1")
    assert isinstance(received, JobStanding)
    public = public_key_line(key.public_key())
    assert verify(public, "cotune-standing", received.message(), received.signature)
    edits = {
        "state": "approved",
        "site": "site-2",
        "run_id": "run-2",
        "job_sha256": "2" * 64,
        "rule": None,
        "text": "x",
    }
    for name, value in edits.items():
        edited = received.model_copy(update={name: value})
        assert not verify(public, "cotune-standing", edited.message(), edited.signature), name


def test_a_sites_failure_stands_for_its_standing() -> None:
    failure = SiteFailure(site="elsewhere", code="E-VERSION", message="no", exit_code=6)
    found = standing_from_records(answer_to_records(failure), "site-1")
    assert found == failure.model_copy(update={"site": "site-1"})


@pytest.mark.parametrize("changes", [
    {"state": "maybe"}, {"text": "no\x1b[2J"}, {"text": "x" * (MAX_TEXT + 1)}, {"site": "site-2"}, {"more": 1},
])  # fmt: skip
def test_what_is_no_standing_of_this_site_is_the_wires_own_failure(changes: dict) -> None:
    text = json.dumps({**STANDING.model_dump(), **changes})
    found = standing_from_records(RecordDict({"header": ConfigRecord({"kind": "standing", "json": text})}), "site-1")
    assert isinstance(found, SiteFailure)
    assert (found.site, found.code) == ("site-1", "E-WIRE")


def test_an_answer_of_another_kind_is_no_standing() -> None:
    found = standing_from_records(request_to_records(LedgerRequest(run_id="run-1", site="site-1")), "site-1")
    assert isinstance(found, SiteFailure)
    assert found.code == "E-WIRE"
