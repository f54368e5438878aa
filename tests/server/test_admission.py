"""Every reason an update is not admitted for, and no other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.server.answers import head_of, plan_of, raw, signed, update_of

from cotune.client.clipping import ClippedSum
from cotune.client.noise import draw_noise, privatise
from cotune.client.randomness import RandomStream, reproducible_stream
from cotune.server.admission import admitted_delta, least_norm, reason_by_header
from cotune.shared.adapter import Vector
from cotune.shared.codec import encode
from cotune.shared.plan import RoundPlan
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.schedule import rates_of
from cotune.shared.update import MAX_CHARGES, AdapterUpdate, UpdateHeader, payload_sha256

SIZE = 6
GOOD = np.linspace(-1, 1, SIZE, dtype=np.float32)
PRIVATE = {"delta": 1e-3, "noise_multiplier": 1.0}
ECHO = "is below that of the noise it was to carry: it echoes the global adapter"


@pytest.fixture
def plan(make_job: Any) -> RoundPlan:
    return plan_of(make_job(privacy=PRIVATE, aggregation={"max_update_norm": 5.0}), number=2)


def reason(update: AdapterUpdate, plan: RoundPlan, size: int = SIZE) -> str | None:
    found = reason_by_header(update, plan) or admitted_delta(update, plan, size)
    return found if isinstance(found, str) else None


def test_what_was_asked_is_admitted_with_its_numbers_to_the_bit(plan: RoundPlan) -> None:
    update = update_of(plan, GOOD)
    assert reason_by_header(update, plan) is None
    delta = admitted_delta(update, plan, SIZE)
    assert isinstance(delta, np.ndarray)
    assert delta.tobytes() == GOOD.tobytes()


def test_an_update_as_long_as_is_allowed_is_admitted_and_a_longer_one_not(plan: RoundPlan) -> None:
    unit = np.zeros(SIZE, dtype=np.float32)
    unit[2] = 5.0
    assert reason(update_of(plan, unit), plan) is None
    unit[2] = 5.001
    assert "exceeds aggregation.max_update_norm" in str(reason(update_of(plan, unit), plan))


EVENT = {"kind": "dp-sgd", "sampling_probability": 1 / 3, "noise_multiplier": 1.0, "steps": 2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"site": "site-2", "head": head_of("site-2", 2)}, "another plan"),
        ({"round": 1}, "another plan"),
        ({"run_id": "yesterday"}, "another plan"),
        ({"job_sha256": "0" * 64}, "another job"),
        ({"base_sha256": "0" * 64}, "another adapter"),
        ({"update_sha256": "0" * 64}, "hash"),
        ({"event": {}}, "what was released"),
        ({"event": {"kind": "laplace"}}, "what was released"),
        ({"event": {"kind": ["dp-sgd"]}}, "what was released"),
        ({"event": {k: v for k, v in EVENT.items() if k != "steps"}}, "what was released"),
        ({"event": {**EVENT, "sampling_probability": "x"}}, "was released"),
        ({"event": {**EVENT, "sampling_probability": 2.0}}, "was released"),
        ({"event": {"kind": "non-private"}}, "than was planned"),
        ({"clipping_norm": 1.0}, "clipping norm is not as planned"),
    ],
)
def test_a_header_of_something_else_is_rejected(plan: RoundPlan, changes: dict[str, Any], words: str) -> None:
    assert words in str(reason(update_of(plan, GOOD, **changes), plan))


@pytest.mark.parametrize(
    "change", [{"steps": 1}, {"steps": 3}, {"noise_multiplier": 0.99}, {"sampling_probability": 0.5}]
)
def test_another_event_than_planned_is_rejected_whichever_way_it_differs(
    plan: RoundPlan, change: dict[str, float]
) -> None:
    event = {**mechanism_of(plan.job).event(plan.job.train.local_steps).to_dict(), **change}
    assert "than was planned" in str(reason(update_of(plan, GOOD, event=event), plan))


def test_a_job_whose_clipping_norm_moves_needs_to_be_told_where_it_is(make_job: Any) -> None:
    plan = plan_of(make_job(privacy={**PRIVATE, "clipping": "adaptive"}))
    assert reason(update_of(plan, GOOD), plan) == "its clipping norm is not as planned"
    assert reason(update_of(plan, GOOD, clipping_norm=0.7), plan) is None


def test_a_training_loss_comes_if_and_only_if_the_job_pays_for_one(make_job: Any, plan: RoundPlan) -> None:
    told = plan_of(make_job(privacy={**PRIVATE, "metrics": "noised"}))
    for asked, losses in ((plan, (None, 0.5)), (told, (0.5, None))):
        assert reason(update_of(asked, GOOD, train_loss=losses[0]), asked) is None
        assert reason(update_of(asked, GOOD, train_loss=losses[1]), asked) == "its training loss is not as planned"


def test_a_round_is_charged_only_so_often(plan: RoundPlan) -> None:
    assert reason(update_of(plan, GOOD, charges=MAX_CHARGES), plan) is None
    words = "it was charged more often than a round may be"
    assert reason(update_of(plan, GOOD, charges=MAX_CHARGES + 1), plan) == words


def test_an_update_that_is_not_signed_is_rejected(plan: RoundPlan) -> None:
    update = update_of(plan, GOOD)
    bare = AdapterUpdate(update.header.model_copy(update={"signature": ""}), update.payload)
    assert reason(bare, plan) == "it is not signed"


def test_an_update_signed_by_another_key_than_its_head_is_rejected(plan: RoundPlan) -> None:
    update = update_of(plan, GOOD)
    stranger = Ed25519PrivateKey.generate()
    forged = signed(update.header.model_copy(update={"signature": ""}), stranger)
    words = "its signature is not by its own key, or it was changed on the way"
    assert reason(AdapterUpdate(forged, update.payload), plan) == words
    # With a head of its own the stranger signs well: that the site has another key, the witness knows.
    owned = update.header.model_copy(update={"head": head_of(plan.site, 2, stranger), "signature": ""})
    assert reason(AdapterUpdate(signed(owned, stranger), update.payload), plan) is None


CHANGED: dict[str, Any] = {
    "update_sha256": payload_sha256(raw(-GOOD)),
    "charges": 2,
    "head": head_of("site-1", 9),
    "witnessed": (head_of("site-2", 9),),
    "train_loss": 0.5,
    "clipping_norm": 0.5,
    "signature": "-----BEGIN SSH SIGNATURE-----",
    "event": {**EVENT, "steps": 3},
    "site": "site-2",
    "run_id": "run-2",
    "round": 3,
    "job_sha256": "1" * 64,
    "base_sha256": "1" * 64,
}


@pytest.mark.parametrize("field", UpdateHeader.model_fields)
def test_no_word_of_a_header_can_be_changed_after_it_was_signed(plan: RoundPlan, field: str) -> None:
    update = update_of(plan, GOOD)
    changed = update.header.model_copy(update={field: CHANGED[field]})
    asked = (
        plan.model_copy(update={field: CHANGED[field]}) if field in ("site", "run_id", "round", "base_sha256") else plan
    )
    words = {"job_sha256": "another job", "signature": "its signature"}.get(field, "or it was changed on the way")
    assert words in str(reason(AdapterUpdate(changed, update.payload), asked))


def test_other_numbers_under_a_signed_header_are_rejected_by_their_hash(plan: RoundPlan) -> None:
    header = update_of(plan, GOOD).header
    assert reason(AdapterUpdate(header, encode(-GOOD, "fp32", 0)), plan) == "its hash does not match"


@pytest.mark.parametrize(
    "payload",
    [
        encode(GOOD[:-1], "fp32", 0),
        encode(np.append(GOOD, np.float32(0)), "fp32", 0),
        encode(GOOD, "fp32", 0)[None],
        encode(GOOD, "fp32", 0).view(np.int8),
        GOOD,
        np.array([], dtype=np.uint8),
    ],
    ids=["short", "long", "matrix", "signed bytes", "float32", "empty"],
)
def test_another_shape_or_type_is_rejected(plan: RoundPlan, payload: Any) -> None:
    header = update_of(plan, GOOD).header.model_copy(update={"update_sha256": payload_sha256(payload), "signature": ""})
    assert "expected 24 bytes of fp32" in str(reason(AdapterUpdate(signed(header), payload), plan))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_rejected(plan: RoundPlan, value: float) -> None:
    delta = GOOD.copy()
    delta[3] = value
    assert reason(update_of(plan, delta), plan) == "its bytes are not 6 finite numbers in fp32"


def test_bytes_no_codec_writes_are_rejected(make_job: Any) -> None:
    plan = plan_of(make_job(privacy=PRIVATE, transport={"codec_up": "topk"}))
    update = update_of(plan, GOOD)
    payload = update.payload.copy()
    payload[0] = 0xFF  # more places than are kept, and some after the end
    header = update.header.model_copy(update={"update_sha256": payload_sha256(payload), "signature": ""})
    assert reason(AdapterUpdate(signed(header), payload), plan) == "its bytes are not 6 finite numbers in topk"


def test_numbers_whose_square_overflows_are_rejected_for_their_norm(plan: RoundPlan) -> None:
    delta = np.full(SIZE, 3e38, dtype=np.float32)
    assert "norm" in str(reason(update_of(plan, delta), plan))


def test_reasons_never_tell_a_value_of_the_update(plan: RoundPlan) -> None:
    delta = np.full(SIZE, 1234.5678, dtype=np.float32)
    assert "1234.5" not in str(reason(update_of(plan, delta), plan))


# Noise that is missing


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train": {"optimizer": "adamw"}},
        {"train": {"momentum": 0.9}},
        {"train": {"proximal": 0.1}},
        {"train": {"scaffold": True}},
        {"privacy": {**PRIVATE, "clipping": "adaptive"}},
        {"transport": {"codec_up": "topk"}},
        {"transport": {"codec_up": "int8", "error_feedback": True}},
        {"aggregation": {"rule": "alternating_steps"}, "train": {"local_steps": 1}},
    ],
    ids=str,
)
def test_the_global_adapter_sent_back_is_no_update_whatever_the_job(make_job: Any, settings: dict[str, Any]) -> None:
    plan = plan_of(make_job(**{"privacy": PRIVATE, **settings}))
    moved = {"clipping_norm": 1.0} if plan.job.privacy.clipping == "adaptive" else {}
    echo = update_of(plan, np.zeros(SIZE, dtype=np.float32), **moved)
    assert reason(echo, plan) == f"its norm 0 {ECHO}"


def test_a_job_without_privacy_has_no_noise_to_miss(make_job: Any) -> None:
    plan = plan_of(make_job(privacy={"level": "none"}))
    assert reason(update_of(plan, np.zeros(SIZE, dtype=np.float32)), plan) is None


def honest(plan: RoundPlan, size: int, stream: RandomStream, *, pull: float = 0.0, resting: int = 0) -> Vector:
    """A round of plain SGD with a site's own noise; the loss is flat, or pulls back all that moved by a share.

    Args:
        plan: Of the round.
        size: Numbers trained.
        stream: Of the noise.
        pull: Learning rate x curvature of a quadratic loss.
        resting: How many numbers at the end have no turn in this round.
    """
    mechanism = mechanism_of(plan.job)
    moved = np.zeros(size)
    for rate in rates_of(plan.job, plan.round):
        none = ClippedSum.zero(size)
        clipped = replace(none, gradient=mechanism.expected_batch_size * pull / rate * moved)
        step = privatise(clipped, mechanism, draw_noise(mechanism, size, stream)).gradient
        step[size - resting :] = 0
        moved -= rate * step
    return moved.astype(np.float32)


@pytest.mark.parametrize(
    ("size", "codec", "pull", "steps"),
    [
        (16, "int4", 0.0, 9),
        (16, "fp32", 1.0, 9),
        (200, "int4", 0.0, 9),
        (200, "fp32", 1.0, 9),
        (5000, "int4", 0.0, 1),
        pytest.param(5000, "fp32", 1.0, 9, marks=pytest.mark.slow),
    ],
)
def test_a_thousand_honest_updates_of_noise_alone_are_all_admitted(
    make_job: Any, size: int, codec: str, pull: float, steps: int
) -> None:
    train = {"local_steps": steps, "schedule": "linear", "learning_rate": 0.05}
    plan = plan_of(make_job(privacy=PRIVATE, train=train, transport={"codec_up": codec}))
    stream = reproducible_stream(1, "site-1", size)
    assert least_norm(plan, size) > 0.0
    for seed in range(1000):
        delta = honest(plan, size, stream, pull=pull)
        payload = encode(delta, codec, seed)
        header = UpdateHeader.model_construct(update_sha256=payload_sha256(payload))
        found = admitted_delta(AdapterUpdate(header, payload), plan, size)
        assert not isinstance(found, str), found


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_factor_that_has_no_turn_does_not_make_an_update_an_echo(make_job: Any, steps: int) -> None:
    job = make_job(privacy=PRIVATE, train={"local_steps": steps}, aggregation={"rule": "alternating_steps"})
    stream = reproducible_stream(1, "site-1", steps)
    for number in (1, 2):
        plan = plan_of(job, number=number)
        for _ in range(100):  # nine in ten numbers are A's, as where keys are narrow, and B has the only turn
            delta = honest(plan, 2000, stream, resting=1800 if steps == 1 else 0)
            assert reason(update_of(plan, delta), plan, 2000) is None


@pytest.mark.parametrize("size", [200, 5000])
def test_an_update_with_a_hundredth_of_its_noise_is_an_echo(make_job: Any, size: int) -> None:
    plan = plan_of(make_job(privacy=PRIVATE))
    stream = reproducible_stream(2, "site-1", size)
    for _ in range(20):
        words = reason(update_of(plan, honest(plan, size, stream) / np.float32(100)), plan, size)
        assert words is not None
        assert ECHO in words


def test_the_least_norm_is_the_papers_quantile_of_the_last_steps_noise(make_job: Any) -> None:
    from scipy.stats import chi2

    plan = plan_of(make_job(privacy={**PRIVATE, "noise_multiplier": 3.0}), number=2)
    alone = 0.5 * 3.0 * 1.0 / 10  # learning rate x noise multiplier x clipping norm / expected batch
    wanted = 0.5 * alone * math.sqrt(float(chi2.ppf(1e-9, 200)))
    assert least_norm(plan, 200) == pytest.approx(wanted)
