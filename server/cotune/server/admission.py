"""Is this answer acceptable? One bad site must not end the round."""

from __future__ import annotations

import numpy as np

from cotune.shared.adapter import flat_sha256
from cotune.shared.errors import CotuneError
from cotune.shared.plan import RoundPlan
from cotune.shared.privacy.event import event_from_dict
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.update import AdapterUpdate


def reason_to_reject(update: AdapterUpdate, plan: RoundPlan, size: int) -> str | None:
    """Why an update is not admitted, in public words; None if it is.

    Args:
        update: The answer.
        plan: What this site was asked.
        size: Trained parameters.
    """
    return _reason_by_header(update, plan) or _reason_by_numbers(update, plan, size)


def _reason_by_header(update: AdapterUpdate, plan: RoundPlan) -> str | None:
    header = update.header
    if (header.site, header.round) != (plan.site, plan.round):
        return "it answers another plan"
    if header.job_sha256 != plan.job.sha256() or header.base_sha256 != plan.base_sha256:
        return "it belongs to another job or starts from another adapter"
    try:
        event = event_from_dict(header.event)
    except (CotuneError, TypeError):
        return "it does not say what was released"
    if event != mechanism_of(plan.job).event(plan.job.train.local_steps):
        return "it released something else than was planned"
    return None


def _reason_by_numbers(update: AdapterUpdate, plan: RoundPlan, size: int) -> str | None:
    if update.delta.dtype != np.float32 or update.delta.shape != (size,):
        return f"expected {size} fp32 numbers, got shape {update.delta.shape} of {update.delta.dtype}"
    if not np.isfinite(update.delta).all():
        return "it has NaN or infinite numbers"
    if update.header.update_sha256 != flat_sha256(update.delta):
        return "its hash does not match"
    if update.norm > plan.job.federation.max_update_norm:
        return f"its norm {update.norm:.3g} exceeds federation.max_update_norm"
    return None
