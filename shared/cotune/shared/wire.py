"""Plans and answers as Flower records: one flat array of encoded bytes and one JSON header each."""

from __future__ import annotations

import contextlib
import json
import math

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from cotune.shared.errors import ConnectionFailed, RefusedError, one_line
from cotune.shared.plan import ClaimRequest, LedgerRequest, RoundPlan, cotune_version
from cotune.shared.proposal import JobStanding, Proposal
from cotune.shared.update import AdapterUpdate, Answer, Payload, SiteFailure, UpdateHeader

HEADER, ARRAY = "header", "adapter"
MAX_WORDS = 400
MAX_ANSWER = 2_000_000  # characters of an answer's header; read as JSON, they take up to 100 MB


def adapter_to_record(payload: Payload) -> ArrayRecord:
    """An encoded adapter, to be sent to any number of sites."""
    return ArrayRecord({ARRAY: Array(np.ascontiguousarray(payload))})


def plan_to_records(plan: RoundPlan, adapter: ArrayRecord) -> RecordDict:
    """A plan and the global adapter, to be sent."""
    return _pack("plan", plan.model_dump_json(by_alias=True), adapter)


def plan_from_records(records: RecordDict) -> tuple[RoundPlan, Payload]:
    """Read a plan and the encoded global adapter.

    Raises:
        ConnectionFailed: The message is not one of ours.
        RefusedError: E-VERSION: it is a plan of another version, with settings this one may not know.
    """
    kind, header, array = _unpack(records)
    try:
        if kind != "plan" or array is None:
            raise ValueError(kind)
        _require_version(header, "plan")
        return RoundPlan.model_validate_json(header), array
    except (ValueError, AttributeError):
        raise ConnectionFailed("E-WIRE", "the message is not a plan of this version of cotune") from None


def answer_to_records(answer: Answer) -> RecordDict:
    """A site's answer, to be sent."""
    if isinstance(answer, SiteFailure):
        return _pack("failure", answer.model_dump_json(), None)
    return _pack("update", answer.header.model_dump_json(), adapter_to_record(answer.payload))


def answer_from_records(records: RecordDict, site: str) -> Answer:
    """Read a site's answer; anything that is not one becomes that site's failure, never an exception."""
    fault = "the answer is not an update of this version of cotune"
    try:
        kind, header, array = _unpack(records, MAX_ANSWER)
        if kind == "update" and array is not None:
            update = AdapterUpdate(UpdateHeader.model_validate_json(header), array)
            if update.header.site == site:
                return update
            fault = "the answer is in the name of another site"
        if kind == "failure":
            said = SiteFailure.model_validate_json(header)
            return said.model_copy(update={"site": site, "message": one_line(said.message, MAX_WORDS)})
    except (ValueError, ConnectionFailed):
        pass
    return SiteFailure(site=site, code="E-WIRE", message=fault)


def request_to_records(request: LedgerRequest | ClaimRequest) -> RecordDict:
    """A request for a site's ledger, or for its signature of a claim, to be sent."""
    kind = "ledger-request" if isinstance(request, LedgerRequest) else "claim-request"
    return _pack(kind, request.model_dump_json(), None)


def proposal_to_records(proposal: Proposal) -> RecordDict:
    """A job that is put before a site, to be sent."""
    return _pack("proposal", proposal.model_dump_json(by_alias=True), None)


def query_from_records(records: RecordDict) -> LedgerRequest | ClaimRequest | Proposal:
    """Read what a site is asked beside training.

    Raises:
        ConnectionFailed: The message is not one of ours.
        RefusedError: E-VERSION: it is a proposal of another version, with settings this one may not know.
    """
    kind, header, _ = _unpack(records)
    try:
        if kind == "ledger-request":
            return LedgerRequest.model_validate_json(header)
        if kind == "claim-request":
            return ClaimRequest.model_validate_json(header)
        if kind != "proposal":
            raise ValueError(kind)
        _require_version(header, "proposal")
        return Proposal.model_validate_json(header)
    except (ValueError, AttributeError):
        raise ConnectionFailed("E-WIRE", "the message is not a query of this version of cotune") from None


def standing_to_records(standing: JobStanding) -> RecordDict:
    """Where a job stands at a site, to be sent."""
    return _pack("standing", standing.model_dump_json(), None)


def standing_from_records(records: RecordDict, site: str) -> JobStanding | SiteFailure:
    """Read where a job stands at a site; anything else becomes that site's failure, never an exception."""
    with contextlib.suppress(ValueError, ConnectionFailed):
        kind, header, _ = _unpack(records, MAX_ANSWER)
        if kind == "standing":
            said = JobStanding.model_validate_json(header)
            if said.site == site:
                return said
    answer = answer_from_records(records, site)
    if isinstance(answer, SiteFailure) and answer.code != "E-WIRE":
        return answer
    return SiteFailure(site=site, code="E-WIRE", message="the answer does not say where the job stands")


def ledger_to_records(ledger: bytes) -> RecordDict:
    """A site's ledger, to be sent."""
    return _pack("ledger", json.dumps(ledger.decode()), None)


def ledger_from_records(records: RecordDict) -> bytes | None:
    """Read a site's ledger; None for anything that is not one."""
    try:
        kind, text, _ = _unpack(records)
        ledger = json.loads(text)
        return ledger.encode() if kind == "ledger" and isinstance(ledger, str) else None
    except (ValueError, ConnectionFailed):
        return None


def signature_to_records(signature: str) -> RecordDict:
    """A site's signature of a claim, to be sent."""
    return _pack("claim-signature", json.dumps(signature), None)


def signature_from_records(records: RecordDict, site: str) -> str | SiteFailure:
    """Read a site's signature, of which nothing is known yet; anything else becomes that site's failure."""
    with contextlib.suppress(ValueError, ConnectionFailed):
        kind, text, _ = _unpack(records, MAX_ANSWER)
        signature = json.loads(text)
        if kind == "claim-signature" and isinstance(signature, str):
            return signature
    answer = answer_from_records(records, site)
    if isinstance(answer, SiteFailure) and answer.code != "E-WIRE":
        return answer
    return SiteFailure(site=site, code="E-WIRE", message="the answer is no signature of the claim")


def _require_version(header: str, what: str) -> None:
    """Refuse a message of another version, before anything else of it is read."""
    said = json.loads(header).get("cotune")
    if said != cotune_version():
        raise RefusedError(
            "E-VERSION",
            f"the {what} is of cotune {str(said)[:40]}, installed here is {cotune_version()}",
            hint="install the coordinator's version, or ask it to install yours",
        )


def _pack(kind: str, header: str, array: ArrayRecord | None) -> RecordDict:
    records = RecordDict({HEADER: ConfigRecord({"kind": kind, "json": header})})
    if array is not None:
        records[ARRAY] = array
    return records


def _unpack(records: RecordDict, most: float = math.inf) -> tuple[str, str, Payload | None]:
    try:
        # Not through `config_records` and `array_records`: each such view is a cycle that holds the whole message
        # until the garbage collector next looks at old objects, which may be after the round.
        header, arrays = records[HEADER], records.get(ARRAY)
        if not isinstance(header, ConfigRecord):
            raise ValueError(HEADER)
        kind, text = header["kind"], header["json"]
        if not (isinstance(kind, str) and isinstance(text, str) and len(text) <= most):
            raise ValueError(HEADER)
        json.loads(text)
        array = arrays[ARRAY].numpy() if isinstance(arrays, ArrayRecord) else None
        if array is not None and (array.dtype != np.uint8 or array.ndim != 1):
            raise ValueError(ARRAY)
    except Exception:  # noqa: BLE001 - the bytes come from outside: whatever they break, they are no message
        raise ConnectionFailed("E-WIRE", "the message has not the records cotune sends") from None
    return kind, text, array
