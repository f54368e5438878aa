"""Ways to be hostile, by name: what is sent, and what the run is to say of it."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, Error, RecordDict
from tests.integration.hostile import (
    HOSTILE,
    PATIENCE_S,
    Attack,
    Scene,
    edited,
    failure,
    head_by,
    header_of,
    numbers,
    records,
    sealed,
)

from cotune.shared.codec import encode
from cotune.shared.wire import answer_to_records, plan_to_records

OTHER = "site-2"
STRANGER = Ed25519PrivateKey.generate()


@dataclass(frozen=True)
class Kind:
    """One way to be hostile.

    Attributes:
        attack: What is sent.
        words: What the run says of it.
        world: Which federation it is tried on.
        told: Whether the site hears of it; not of its own words.
        patience_s: How long the coordinator waits.
    """

    attack: Attack
    words: str
    world: str = "plain"
    told: bool = True
    patience_s: float = PATIENCE_S


UNREAD, ALTERED, ECHO = "not an update of this version", "signature is not by its own key", "echoes the global adapter"
ELSEWHERE, OTHER_JOB, NAMED = "answers another plan", "another job or starts", "in the name of another site"
RELEASED, BYTES = "released something else than was planned", "bytes of fp32, got shape"


def without(scene: Scene, field: str) -> RecordDict:
    header = header_of(scene)
    del header[field]
    return records("update", header, scene.update.payload)


def constant(scene: Scene, value: float) -> RecordDict:
    """A well signed update that is this number everywhere."""
    return numbers(scene, np.full(scene.update.payload.size // 4, value, dtype=np.float32))


def one(scene: Scene, value: float) -> RecordDict:
    """A well signed update with one such number among honest ones."""
    values = scene.update.payload.view("<f4").copy()
    values[3] = value
    return numbers(scene, values)


def array(scene: Scene, content: np.ndarray | Array) -> RecordDict:
    """The honest header with another array."""
    return records("update", header_of(scene), content)


def event(scene: Scene, **changes: object) -> RecordDict:
    """A well signed claim to have released something else."""
    return sealed(scene, event={**scene.update.header.event, **changes})


def scale(scene: Scene, value: float) -> RecordDict:
    """Well signed int8 bytes whose first block has this scale."""
    payload = scene.update.payload.copy()
    payload[:4] = np.array([value], dtype="<f4").view(np.uint8)
    return sealed(scene, payload)


def forged_head(scene: Scene) -> RecordDict:
    """A head with the site's key on it that a stranger signed."""
    own = scene.update.header.head
    said = head_by(STRANGER, own.site, own.seq + 1, own.sha256)
    return sealed(scene, head={**said, "public_key": own.public_key})


def npy(descr: str, content: bytes) -> Array:
    """An array of one element in NumPy's file format, pickled objects among them."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': (1,), }}".encode().ljust(117) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content
    return Array("uint8", (1,), "numpy.ndarray", data)


HASH, BOMB = "0" * 64, "[" * 100_000
EDITS: dict[str, tuple[object, str]] = {
    "site": (OTHER, NAMED),
    "run_id": ("another", ELSEWHERE),
    "round": (77, ELSEWHERE),
    "job_sha256": (HASH, OTHER_JOB),
    "base_sha256": (HASH, OTHER_JOB),
    "update_sha256": (HASH, ALTERED),
    "event": ({"kind": "non-private"}, ALTERED),
    "charges": (2, ALTERED),
    "clipping_norm": (1.0, ALTERED),
    "train_loss": (0.1, ALTERED),
    "witnessed": ([head_by(STRANGER, OTHER, 99, HASH)], ALTERED),
    "head": (head_by(STRANGER, HOSTILE, 99, HASH), ALTERED),
    "signature": ("", "not signed"),
}
KINDS: dict[str, Kind] = {
    # the header
    "a version in the header": Kind(lambda s: edited(s, cotune="9.9.9"), UNREAD),
    "an unknown kind": Kind(lambda s: records("gift", header_of(s), s.update.payload), UNREAD),
    "not JSON": Kind(lambda s: records("update", "{", s.update.payload), UNREAD),
    "JSON nested 100,000 deep": Kind(lambda s: records("update", BOMB, s.update.payload), UNREAD),
    "JSON nested 190 deep in the event": Kind(
        lambda s: edited(s, event={"kind": json.loads("[" * 190 + "]" * 190)}), ALTERED
    ),
    "JSON of 4 MB": Kind(lambda s: records("update", "[" + "[]," * 1_300_000 + "[]]", s.update.payload), UNREAD),
    "a number of 5,000 digits": Kind(
        lambda s: records("update", json.dumps(header_of(s)).replace('"round": ', '"round": ' + "9" * 5000), None),
        UNREAD,
    ),
    "a huge integer in the event": Kind(lambda s: event(s, steps=10**4000), RELEASED),
    "a round that is NaN": Kind(lambda s: edited(s, round=float("nan")), UNREAD),
    "NaN in the event": Kind(lambda s: event(s, noise_multiplier=float("nan")), "does not say what was released"),
    "an extra field": Kind(lambda s: edited(s, num_examples=10**12), UNREAD),
    "a missing field": Kind(lambda s: without(s, "base_sha256"), UNREAD),
    "nothing at all": Kind(lambda _: RecordDict(), UNREAD),
    "no array": Kind(lambda s: records("update", header_of(s), None), UNREAD),
    "its own plan": Kind(lambda s: plan_to_records(s.plan, ArrayRecord({"adapter": Array(s.update.payload)})), UNREAD),
    # whose, and to what
    "another round": Kind(lambda s: sealed(s, round=s.plan.round + 1), ELSEWHERE),
    "another run": Kind(lambda s: sealed(s, run_id="another"), ELSEWHERE),
    "another job": Kind(lambda s: sealed(s, job_sha256=HASH), OTHER_JOB),
    "another adapter": Kind(lambda s: sealed(s, base_sha256=HASH), OTHER_JOB),
    "another site's name under its own key": Kind(lambda s: sealed(s, site=OTHER), NAMED),
    "another site's genuine answer": Kind(lambda s: answer_to_records(s.peers[OTHER]), NAMED),
    "another site's answer with its own name": Kind(
        lambda s: records(
            "update", {**s.peers[OTHER].header.model_dump(mode="json"), "site": HOSTILE}, s.peers[OTHER].payload
        ),
        ALTERED,
    ),
    "its answer of the round before": Kind(lambda s: answer_to_records(s.past[-1]), ELSEWHERE, "late"),
    # signatures
    "garbage for a signature": Kind(lambda s: edited(s, signature="garbage"), ALTERED),
    "a stranger's signature": Kind(lambda s: sealed(s, by=STRANGER), ALTERED),
    "a signature of the round before": Kind(
        lambda s: edited(s, signature=s.past[-1].header.signature), ALTERED, "late"
    ),
    **{
        f"{field} edited after signing": Kind(lambda s, f=field, v=value: edited(s, **{f: v}), words)
        for field, (value, words) in EDITS.items()
    },
    # ledger heads
    "another site's head": Kind(lambda s: sealed(s, head=s.peers[OTHER].header.head.model_dump(mode="json")), ALTERED),
    "a head in another site's name": Kind(
        lambda s: sealed(s, head=head_by(s.key, OTHER, 9, HASH)), "ledger head is not signed by its own key"
    ),
    "a forged head": Kind(forged_head, "ledger head is not signed by its own key"),
    "an older head": Kind(
        lambda s: sealed(s, head=head_by(s.key, HOSTILE, s.past[0].header.head.seq - 1, HASH)), "is older", "late"
    ),
    "another line at the same place": Kind(
        lambda s: sealed(s, head=head_by(s.key, HOSTILE, s.past[0].header.head.seq, HASH)), "is older", "late"
    ),
    "a new key for everything": Kind(
        lambda s: sealed(s, by=STRANGER, head=head_by(STRANGER, HOSTILE, 99, HASH)), "another key than before", "late"
    ),
    "ten thousand witnessed heads": Kind(
        lambda s: edited(s, witnessed=[s.update.header.head.model_dump(mode="json")] * 10_000), UNREAD
    ),
    # the array
    "fewer bytes": Kind(lambda s: sealed(s, s.update.payload[:-1]), BYTES),
    "more bytes": Kind(lambda s: sealed(s, np.append(s.update.payload, s.update.payload)), BYTES),
    "no bytes": Kind(lambda s: sealed(s, s.update.payload[:0]), BYTES),
    "fp16 for fp32": Kind(lambda s: sealed(s, encode(s.update.payload.view("<f4").copy(), "fp16", 0)), BYTES),
    "int8 for fp32": Kind(lambda s: sealed(s, encode(s.update.payload.view("<f4").copy(), "int8", 0)), BYTES),
    "other bytes than were signed": Kind(lambda s: array(s, s.update.payload[::-1].copy()), "hash does not match"),
    "an array of fp32": Kind(lambda s: array(s, s.update.payload.view("<f4")), UNREAD),
    "an array of signed bytes": Kind(lambda s: array(s, s.update.payload.view(np.int8)), UNREAD),
    "an array of complex numbers": Kind(lambda s: array(s, s.update.payload.astype(np.complex128)), UNREAD),
    "a matrix": Kind(lambda s: array(s, s.update.payload[None]), UNREAD),
    "a scalar": Kind(lambda s: array(s, np.array(1, dtype=np.uint8)), UNREAD),
    "a pickled object": Kind(lambda s: array(s, npy("|O", b"cos\nsystem\n(S'false'\ntR.")), UNREAD),
    "half of a number": Kind(lambda s: array(s, npy("<f8", b"half")), UNREAD),
    "NaN": Kind(lambda s: one(s, np.nan), "finite numbers in fp32"),
    "infinity": Kind(lambda s: one(s, -np.inf), "finite numbers in fp32"),
    "a norm beyond the largest": Kind(lambda s: one(s, 1.001e4), "exceeds aggregation.max_update_norm"),
    "a norm whose square overflows fp32": Kind(lambda s: constant(s, 3e38), "exceeds aggregation.max_update_norm"),
    "the global adapter, unchanged": Kind(lambda s: constant(s, 0.0), ECHO),
    "the global adapter, almost unchanged": Kind(lambda s: constant(s, 1e-6), ECHO),
    "subnormal numbers": Kind(lambda s: constant(s, 1e-45), ECHO),
    "a negative scale": Kind(lambda s: scale(s, -1.0), "finite numbers in int8", "rich"),
    "a scale that is NaN": Kind(lambda s: scale(s, np.nan), "finite numbers in int8", "rich"),
    "a huge scale": Kind(lambda s: scale(s, 3e38), "exceeds aggregation.max_update_norm", "rich"),
    "fp32 for int8": Kind(lambda s: sealed(s, np.zeros(4 * s.update.payload.size, np.uint8)), "bytes of int8", "rich"),
    "nothing but zeros in int8": Kind(lambda s: sealed(s, np.zeros_like(s.update.payload)), ECHO, "rich"),
    # claims
    "less noise": Kind(lambda s: event(s, noise_multiplier=0.5), RELEASED),
    "more noise": Kind(lambda s: event(s, noise_multiplier=1.5), RELEASED),
    "fewer steps": Kind(lambda s: event(s, steps=1), RELEASED),
    "no event": Kind(lambda s: sealed(s, event={}), "does not say what was released"),
    "a list for a probability": Kind(lambda s: event(s, sampling_probability=[1]), "does not say what was released"),
    "a thousand charges": Kind(lambda s: sealed(s, charges=1000), "charged more often than a round may be"),
    "no charge": Kind(lambda s: edited(s, charges=0), UNREAD),
    "a clipping norm nobody asked for": Kind(lambda s: sealed(s, clipping_norm=2.0), "clipping norm is not as planned"),
    "a loss nobody asked for": Kind(lambda s: sealed(s, train_loss=0.1), "training loss is not as planned"),
    "no clipping norm": Kind(lambda s: sealed(s, clipping_norm=None), "clipping norm is not as planned", "rich"),
    "no loss": Kind(lambda s: sealed(s, train_loss=None), "training loss is not as planned", "rich"),
    # failures
    "a failure with an absurd code": Kind(lambda _: failure(code="e storage\n"), UNREAD),
    "a failure with a code of 1 MB": Kind(lambda _: failure(code="E" * 10**6), UNREAD),
    "a failure that exits with 300": Kind(lambda _: failure(exit_code=300), UNREAD),
    "a failure that exits with 0": Kind(lambda _: failure(exit_code=0), UNREAD),
    "a failure of 1 MB of words": Kind(lambda _: failure(message="blah " * 200_000), "blah", told=False),
    "a failure in the terminal's own codes": Kind(
        lambda _: failure(message="\x1b[2J\x1b]0;owned\x07\r\n\u202eevil"),
        f"{HOSTILE}:  [2J ]0;owned    evil",
        told=False,
    ),
    "a failure in HTML": Kind(lambda _: failure(message="<script>alert(1)</script>"), "<script>", told=False),
    "a failure in another site's name": Kind(lambda _: failure(site=OTHER), "the disk is full", told=False),
    "a refusal": Kind(lambda _: failure(code="E-BUDGET", message="no budget", exit_code=6), "no budget", told=False),
    "a crash it tells of itself": Kind(lambda _: failure(code="E-SITE-CRASH"), "the disk is full"),
    "a crash Flower tells of": Kind(lambda _: Error(code=0, reason="secret"), "failed (Flower code 0)"),
    "no answer in time": Kind(lambda _: [], "no answer within", patience_s=0.2),
}
