"""Plans, and updates signed as sites sign them, without a model and without training."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cotune.shared.adapter import Vector
from cotune.shared.chain import SignedHead, head_message
from cotune.shared.codec import encode
from cotune.shared.job import Job
from cotune.shared.plan import RoundPlan, cotune_version
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.signing import public_key_line, sign
from cotune.shared.update import AdapterUpdate, UpdateHeader, payload_sha256

KEYS: dict[str, Ed25519PrivateKey] = {}


def key_of(site: str) -> Ed25519PrivateKey:
    """A site's key, the same throughout a session."""
    return KEYS.setdefault(site, Ed25519PrivateKey.generate())


def head_of(site: str, seq: int, key: Ed25519PrivateKey | None = None) -> SignedHead:
    """A site's signed ledger head: the same site and number always give the same head."""
    key = key or key_of(site)
    sha256 = hashlib.sha256(f"{site} {seq}".encode()).hexdigest()
    public = public_key_line(key.public_key())
    signature = sign(key, "cotune-head", head_message(site, seq, sha256))
    return SignedHead(site=site, seq=seq, sha256=sha256, public_key=public, signature=signature)


def signed(header: UpdateHeader, key: Ed25519PrivateKey | None = None) -> UpdateHeader:
    """The header, signed by its site's key or by another."""
    signature = sign(key or key_of(header.site), "cotune-update", header.message())
    return header.model_copy(update={"signature": signature})


def plan_of(job: Job, site: str = "site-1", number: int = 1, **changes: Any) -> RoundPlan:
    """A plan of the run `run`."""
    facts = {
        "run_id": "run", "cotune": cotune_version(), "job": job, "site": site, "round": number,
        "base_sha256": "b" * 64, "rank": job.rank_of(site), "frozen_sha256": "f" * 64,
        "clipping_norm": job.privacy.clipping_norm,
    }  # fmt: skip
    return RoundPlan(**{**facts, **changes})


def update_of(plan: RoundPlan, delta: Vector, **changes: Any) -> AdapterUpdate:
    """A signed update of the right form with these numbers; what is said of it can be changed before it is signed."""
    payload = encode(delta, plan.job.transport.codec_up, 0) if np.isfinite(delta).all() else raw(delta)
    header = {
        "site": plan.site,
        "run_id": plan.run_id,
        "round": plan.round,
        "job_sha256": plan.job.sha256(),
        "base_sha256": plan.base_sha256,
        "update_sha256": payload_sha256(payload),
        "event": mechanism_of(plan.job).event(plan.job.train.local_steps).to_dict(),
        "head": head_of(plan.site, plan.round),
        **changes,
    }
    return AdapterUpdate(signed(UpdateHeader.model_validate(header)), payload)


def raw(delta: Vector) -> Any:
    """Numbers as fp32 bytes, whatever they are."""
    return delta.astype("<f4").view(np.uint8)
