"""What goes over the agent's socket and a worker's pipe: one line of JSON, then encoded numbers. No pickle, no schema
compiler: both ends are of one version, and what is read is validated by the models of the shared room.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from cotune.shared.codec import Payload
from cotune.shared.errors import ConnectionFailed
from cotune.shared.plan import RoundPlan
from cotune.shared.update import AdapterUpdate, Answer, SiteFailure, UpdateHeader

MAX_FRAME = 2**29  # 512 MiB: LoRA of rank 64 on every projection of a model of seven billion, in fp32
MAX_LINE = 2**24


def pack(header: Mapping[str, Any], payload: Payload | None = None) -> bytes:
    """A frame."""
    return json.dumps(header).encode() + b"\n" + (b"" if payload is None else payload.tobytes())


def unpack(frame: bytes) -> tuple[dict[str, Any], Payload]:
    """A frame's header and its payload, which may be empty.

    Raises:
        ConnectionFailed: E-WIRE: it is not a frame.
    """
    end = frame.find(b"\n", 0, MAX_LINE)
    try:
        header = json.loads(frame[: max(end, 0)])
        if not isinstance(header, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise foreign("a frame") from None
    return header, np.frombuffer(frame, dtype=np.uint8, offset=end + 1)


def plan_frame(plan: RoundPlan, adapter: Payload) -> bytes:
    """A plan and the encoded global adapter."""
    return pack({"plan": plan.model_dump(mode="json", by_alias=True)}, adapter)


def read_plan(frame: bytes) -> tuple[RoundPlan, Payload]:
    """Read a plan and the encoded global adapter.

    Raises:
        ConnectionFailed: E-WIRE: it is none of this version.
    """
    header, adapter = unpack(frame)
    try:
        return RoundPlan.model_validate(header.get("plan")), adapter
    except ValidationError:
        raise foreign("a plan") from None


def answer_frame(answer: Answer) -> bytes:
    """A site's answer."""
    if isinstance(answer, SiteFailure):
        return pack({"failure": answer.model_dump()})
    return pack({"update": answer.header.model_dump(mode="json")}, answer.payload)


def read_answer(frame: bytes) -> Answer:
    """Read a site's answer.

    Raises:
        ConnectionFailed: E-WIRE: it is none of this version.
    """
    header, payload = unpack(frame)
    try:
        if "failure" in header:
            return SiteFailure.model_validate(header["failure"])
        return AdapterUpdate(UpdateHeader.model_validate(header.get("update")), payload)
    except ValidationError:
        raise foreign("an answer") from None


def foreign(what: str) -> ConnectionFailed:
    """The error for bytes that are not what they should be."""
    return ConnectionFailed("E-WIRE", f"expected {what} of this version of cotune, got other bytes")
