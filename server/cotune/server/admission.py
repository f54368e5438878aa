"""Is this answer acceptable? One bad site must not end the round."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from cotune.shared.adapter import Vector
from cotune.shared.codec import encoded_bytes
from cotune.shared.errors import CotuneError
from cotune.shared.plan import RoundPlan
from cotune.shared.privacy.event import event_from_dict
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.schedule import rates_of
from cotune.shared.signing import verify
from cotune.shared.update import MAX_CHARGES, AdapterUpdate, payload_sha256

FALSE_ALARM = 1e-9  # chance that an honest update is taken for one without noise


def reason_by_header(update: AdapterUpdate, plan: RoundPlan) -> str | None:
    """Why an update is not admitted by what is said of it, in public words; None if it is.

    Its signature must be by the key that signs the site's ledger heads; whether that key is the site's own, the
    witness knows. The signature covers job, round, base and numbers, so nothing of it can be used elsewhere.

    Args:
        update: The answer.
        plan: What this site was asked.
    """
    return next(_faults_of_header(update, plan), None)


def _faults_of_header(update: AdapterUpdate, plan: RoundPlan) -> Iterator[str]:
    header, job = update.header, plan.job
    if (header.site, header.run_id, header.round) != (plan.site, plan.run_id, plan.round):
        yield "it answers another plan"
    if header.job_sha256 != job.sha256() or header.base_sha256 != plan.base_sha256:
        yield "it belongs to another job or starts from another adapter"
    if not header.signature:
        yield "it is not signed"
    if not verify(header.head.public_key, "cotune-update", header.message(), header.signature):
        yield "its signature is not by its own key, or it was changed on the way"
    try:
        if event_from_dict(header.event) != mechanism_of(job).event(job.train.local_steps):
            yield "it released something else than was planned"
    except (CotuneError, TypeError):
        yield "it does not say what was released"
    if (header.clipping_norm is None) == (job.privacy.clipping == "adaptive"):
        yield "its clipping norm is not as planned"
    if (header.train_loss is None) == mechanism_of(job).metrics:
        yield "its training loss is not as planned"
    if header.charges > MAX_CHARGES:
        yield "it was charged more often than a round may be"


def admitted_delta(update: AdapterUpdate, plan: RoundPlan, size: int) -> Vector | str:
    """The update's numbers, shape (size,), fp32; or why they are not admitted, in public words.

    Args:
        update: The answer, its header being as it should.
        plan: What this site was asked.
        size: How many numbers its round trains.
    """
    codec, payload = plan.job.transport.codec_up, update.payload
    expected = encoded_bytes(codec, size)
    if payload.dtype != np.uint8 or payload.shape != (expected,):
        return f"expected {expected} bytes of {codec}, got shape {payload.shape} of {payload.dtype}"
    if update.header.update_sha256 != payload_sha256(payload):
        return "its hash does not match"
    try:
        delta = update.delta(codec, size)
    except CotuneError:
        return f"its bytes are not {size} finite numbers in {codec}"
    return _fault_of_norm(delta, plan) or delta


def _fault_of_norm(delta: Vector, plan: RoundPlan) -> str | None:
    norm = float(np.linalg.norm(delta.astype(np.float64)))
    if not math.isfinite(norm):
        return "it has NaN or infinite numbers"
    if norm > plan.job.aggregation.max_update_norm:
        return f"its norm {norm:.3g} exceeds aggregation.max_update_norm"
    if norm < least_norm(plan, delta.size):
        return f"its norm {norm:.3g} is below that of the noise it was to carry: it echoes the global adapter"
    return None


def least_norm(plan: RoundPlan, size: int) -> float:
    """Norm that noise alone gives an update, but for a chance of 1e-9; just above 0 where that is not known.

    With plain SGD the last step moves a tensor by learning rate x (mean gradient + noise), and that noise is
    independent of all before it: whatever gradients did, also take earlier noise back, the squared norm over the
    variance is at least as chi-squared with `size` degrees of freedom. A codec that drops numbers, momentum, and the
    pull of FedProx or SCAFFOLD change that: there, only an update that is exactly zero is known to carry no noise.
    """
    from scipy.stats import chi2

    job = plan.job
    mechanism = mechanism_of(job, plan.clipping_norm)
    if not mechanism.private:
        return 0.0
    train, needed = job.train, 2 if job.rule.alternates == "step" else 1
    plain = train.optimizer == "sgd" and not (train.momentum or train.proximal or train.scaffold)
    lossy = job.transport.codec_up == "topk" or job.transport.error_feedback
    if not plain or lossy or mechanism.adaptive or train.local_steps < needed:  # fewer, and one factor rests all round
        return math.ulp(0.0)
    rate = min(rates_of(job, plan.round))
    deviation = rate * mechanism.noise_standard_deviation / mechanism.expected_batch_size
    # Half of it, because a codec that rounds may take a part away.
    return 0.5 * deviation * math.sqrt(float(chi2.ppf(FALSE_ALARM, size)))
