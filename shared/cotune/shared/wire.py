"""Plans and answers as Flower records: one flat array and one JSON header each."""

from __future__ import annotations

import json

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from cotune.shared.adapter import Vector
from cotune.shared.errors import ConnectionFailed
from cotune.shared.plan import LedgerRequest, RoundPlan
from cotune.shared.update import AdapterUpdate, Answer, SiteFailure, UpdateHeader

HEADER, ARRAY = "header", "adapter"


def plan_to_records(plan: RoundPlan, adapter: Vector) -> RecordDict:
    """A plan and the global adapter, to be sent."""
    return _pack("plan", plan.model_dump_json(by_alias=True), adapter)


def plan_from_records(records: RecordDict) -> tuple[RoundPlan, Vector]:
    """Read a plan and the global adapter.

    Raises:
        ConnectionFailed: The message is not one of ours.
    """
    kind, header, array = _unpack(records)
    try:
        if kind != "plan" or array is None:
            raise ValueError(kind)
        return RoundPlan.model_validate_json(header), array
    except ValueError:
        raise ConnectionFailed("E-WIRE", "the message is not a plan of this version of cotune") from None


def answer_to_records(answer: Answer) -> RecordDict:
    """A site's answer, to be sent."""
    if isinstance(answer, SiteFailure):
        return _pack("failure", answer.model_dump_json(), None)
    return _pack("update", answer.header.model_dump_json(), answer.delta)


def answer_from_records(records: RecordDict, site: str) -> Answer:
    """Read a site's answer; anything that is not one becomes that site's failure, never an exception."""
    try:
        kind, header, array = _unpack(records)
        if kind == "update" and array is not None:
            update = AdapterUpdate(UpdateHeader.model_validate_json(header), array)
            if update.header.site == site:
                return update
        if kind == "failure":
            return SiteFailure.model_validate_json(header).model_copy(update={"site": site})
    except (ValueError, ConnectionFailed):
        pass
    return SiteFailure(site=site, code="E-WIRE", message="the answer is not an update of this version of cotune")


def request_to_records(request: LedgerRequest) -> RecordDict:
    """A request for a site's ledger, to be sent."""
    return _pack("ledger-request", request.model_dump_json(), None)


def request_from_records(records: RecordDict) -> LedgerRequest:
    """Read a request for a ledger.

    Raises:
        ConnectionFailed: The message is not one of ours.
    """
    kind, header, _ = _unpack(records)
    try:
        if kind != "ledger-request":
            raise ValueError(kind)
        return LedgerRequest.model_validate_json(header)
    except ValueError:
        raise ConnectionFailed("E-WIRE", "the message is not a request of this version of cotune") from None


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


def _pack(kind: str, header: str, array: Vector | None) -> RecordDict:
    records = RecordDict({HEADER: ConfigRecord({"kind": kind, "json": header})})
    if array is not None:
        records[ARRAY] = ArrayRecord({ARRAY: Array(np.ascontiguousarray(array, dtype=np.float32))})
    return records


def _unpack(records: RecordDict) -> tuple[str, str, Vector | None]:
    try:
        header = records.config_records[HEADER]
        kind, text = header["kind"], header["json"]
        if not (isinstance(kind, str) and isinstance(text, str)):
            raise ValueError(HEADER)
        json.loads(text)
        array = records.array_records[ARRAY][ARRAY].numpy() if ARRAY in records.array_records else None
        if array is not None and (array.dtype != np.float32 or array.ndim != 1):
            raise ValueError(ARRAY)
    except Exception:  # noqa: BLE001 - the bytes come from outside: whatever they break, they are no message
        raise ConnectionFailed("E-WIRE", "the message has not the records cotune sends") from None
    return kind, text, array
