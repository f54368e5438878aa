"""Every reason an update is not admitted for, and no other."""

import numpy as np
import pytest

from cotune.server.admission import reason_to_reject
from cotune.shared.adapter import flat_sha256
from cotune.shared.chain import SignedHead
from cotune.shared.plan import RoundPlan, cotune_version
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.update import AdapterUpdate, UpdateHeader

SIZE = 6
HEAD = SignedHead(
    site="site-1", seq=1, sha256="0" * 64, public_key="ssh-ed25519 " + "A" * 68, signature="the witness checks it"
)
GOOD = np.linspace(-1, 1, SIZE, dtype=np.float32)


@pytest.fixture
def plan(make_job) -> RoundPlan:
    return RoundPlan(
        run_id="run",
        cotune=cotune_version(),
        job=make_job(privacy={"delta": 1e-3, "noise_multiplier": 1.0}, federation={"max_update_norm": 5.0}),
        site="site-1",
        round=2,
        base_sha256="b" * 64,
        clipping_norm=1.0,
        frozen_sha256="f" * 64,
    )


def answer(plan: RoundPlan, delta: np.ndarray = GOOD, **changes: object) -> AdapterUpdate:
    header = {
        "site": plan.site,
        "round": plan.round,
        "job_sha256": plan.job.sha256(),
        "base_sha256": plan.base_sha256,
        "update_sha256": flat_sha256(delta) if delta.dtype.kind == "f" else "0" * 64,
        "event": mechanism_of(plan.job).event(plan.job.train.local_steps).to_dict(),
        "head": HEAD,
        **changes,
    }
    return AdapterUpdate(UpdateHeader.model_validate(header), delta)


def test_what_was_asked_is_admitted(plan: RoundPlan) -> None:
    assert reason_to_reject(answer(plan), plan, SIZE) is None
    assert reason_to_reject(answer(plan, np.zeros(SIZE, dtype=np.float32)), plan, SIZE) is None


def test_an_update_as_long_as_is_allowed_is_admitted_and_a_longer_one_not(plan: RoundPlan) -> None:
    unit = np.zeros(SIZE, dtype=np.float32)
    unit[2] = 5.0
    assert reason_to_reject(answer(plan, unit), plan, SIZE) is None
    unit[2] = 5.001
    assert "federation.max_update_norm" in str(reason_to_reject(answer(plan, unit), plan, SIZE))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"site": "site-2"}, "another plan"),
        ({"round": 1}, "another plan"),
        ({"job_sha256": "0" * 64}, "another job"),
        ({"base_sha256": "0" * 64}, "another adapter"),
        ({"update_sha256": "0" * 64}, "hash"),
        ({"event": {}}, "what was released"),
        ({"event": {"kind": "laplace"}}, "what was released"),
        ({"event": {"kind": ["dp-sgd"]}}, "what was released"),
        ({"event": {"kind": "dp-sgd", "sampling_probability": 0.3, "noise_multiplier": 1.0}}, "what was released"),
        ({"event": {"kind": "dp-sgd", "sampling_probability": "x", "noise_multiplier": 1, "steps": 2}}, "was released"),
        ({"event": {"kind": "dp-sgd", "sampling_probability": 2.0, "noise_multiplier": 1, "steps": 2}}, "was released"),
        ({"event": {"kind": "non-private"}}, "than was planned"),
    ],
)
def test_a_header_of_something_else_is_rejected(plan: RoundPlan, changes: dict, reason: str) -> None:
    assert reason in str(reason_to_reject(answer(plan, **changes), plan, SIZE))


@pytest.mark.parametrize(
    "change", [{"steps": 1}, {"steps": 3}, {"noise_multiplier": 0.99}, {"sampling_probability": 0.5}]
)
def test_another_event_than_planned_is_rejected_whichever_way_it_differs(plan: RoundPlan, change: dict) -> None:
    event = {**mechanism_of(plan.job).event(plan.job.train.local_steps).to_dict(), **change}
    assert "than was planned" in str(reason_to_reject(answer(plan, event=event), plan, SIZE))


@pytest.mark.parametrize(
    "delta",
    [GOOD[:-1], np.append(GOOD, np.float32(0)), GOOD[None], GOOD.astype(np.float64), np.array([], dtype=np.float32)],
    ids=["short", "long", "matrix", "float64", "empty"],
)
def test_another_shape_or_type_is_rejected(plan: RoundPlan, delta: np.ndarray) -> None:
    assert "expected 6 fp32 numbers" in str(reason_to_reject(answer(plan, delta), plan, SIZE))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_rejected(plan: RoundPlan, value: float) -> None:
    delta = GOOD.copy()
    delta[3] = value
    assert "NaN or infinite" in str(reason_to_reject(answer(plan, delta), plan, SIZE))


def test_numbers_whose_square_overflows_are_rejected_for_their_norm(plan: RoundPlan) -> None:
    delta = np.full(SIZE, 3e38, dtype=np.float32)
    assert "norm" in str(reason_to_reject(answer(plan, delta), plan, SIZE))


def test_reasons_never_tell_a_value_of_the_update(plan: RoundPlan) -> None:
    delta = np.full(SIZE, 1234.5678, dtype=np.float32)
    assert "1234.5" not in str(reason_to_reject(answer(plan, delta), plan, SIZE))
