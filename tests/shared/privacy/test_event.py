"""What a ledger holds: events that survive JSON, and nothing that cannot be priced."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from cotune.shared.errors import PrivacyError
from cotune.shared.privacy.event import DpSgdEvent, NonPrivateEvent, TruncatedDpSgdEvent, event_from_dict

GOOD = {"sampling_probability": 0.1, "noise_multiplier": 1.25, "steps": 7}
CAPPED = {**GOOD, "max_batch_size": 18, "population": 40}


@pytest.mark.parametrize(
    "event",
    [DpSgdEvent(**GOOD), TruncatedDpSgdEvent(**CAPPED), NonPrivateEvent()],
    ids=["dp-sgd", "capped", "non-private"],
)
def test_an_event_comes_back_from_json_as_it_was(event: Any) -> None:
    assert event_from_dict(json.loads(json.dumps(event.to_dict()))) == event


def test_a_round_event_holds_three_public_numbers_and_no_epsilon() -> None:
    assert DpSgdEvent(**GOOD).to_dict() == {"kind": "dp-sgd", **GOOD}


@pytest.mark.parametrize(
    "fault",
    [
        {"sampling_probability": 0.0},
        {"sampling_probability": -0.1},
        {"sampling_probability": 1.0000001},
        {"sampling_probability": math.nan},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": math.nan},
        {"steps": -1},
    ],
    ids=str,
)
def test_an_event_nobody_can_price_is_refused_when_made_and_when_read(fault: dict[str, float]) -> None:
    with pytest.raises(PrivacyError, match=next(iter(fault))) as caught:
        DpSgdEvent(**{**GOOD, **fault})
    assert caught.value.code == "E-EVENT"
    with pytest.raises(PrivacyError):
        event_from_dict({"kind": "dp-sgd", **GOOD, **fault})
    with pytest.raises(PrivacyError, match=next(iter(fault))):
        TruncatedDpSgdEvent(**{**CAPPED, **fault})
    with pytest.raises(PrivacyError):
        event_from_dict({"kind": "dp-sgd-truncated", **CAPPED, **fault})


@pytest.mark.parametrize(("cap", "population"), [(0, 40), (-1, 40), (41, 40), (1, 0)])
def test_a_cap_of_nobody_or_above_the_population_is_refused(cap: int, population: int) -> None:
    with pytest.raises(PrivacyError, match="max_batch_size") as caught:
        TruncatedDpSgdEvent(**{**CAPPED, "max_batch_size": cap, "population": population})
    assert caught.value.code == "E-EVENT"


@pytest.mark.parametrize("cap", [1, 40])
def test_a_cap_of_one_or_of_everybody_is_allowed(cap: int) -> None:
    event = TruncatedDpSgdEvent(**{**CAPPED, "max_batch_size": cap})
    assert event_from_dict(event.to_dict()) == event
    assert event.to_dict() == {"kind": "dp-sgd-truncated", **CAPPED, "max_batch_size": cap}


@pytest.mark.parametrize("good", [{"sampling_probability": 1.0}, {"steps": 0}, {"noise_multiplier": 1e-300}])
def test_the_ends_of_the_allowed_ranges_are_allowed(good: dict[str, float]) -> None:
    event = DpSgdEvent(**{**GOOD, **good})
    assert event_from_dict(event.to_dict()) == event


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "laplace", **GOOD},
        GOOD,
        {"kind": "dp-sgd"},
        {"kind": "dp-sgd", **GOOD, "epsilon": 0.1},
        {"kind": "dp-sgd", "sampling_probability": 0.1, "steps": 7},
        {"kind": "non-private", "steps": 1},
        {"kind": "dp-sgd", **CAPPED},
        {"kind": "dp-sgd-truncated", **GOOD},
        {"kind": "dp-sgd-truncated", **GOOD, "max_batch_size": 18},
    ],
    ids=str,
)
def test_unknown_kinds_and_missing_or_further_fields_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError) as caught:
        event_from_dict(data)
    assert caught.value.code == "E-EVENT"


def test_an_event_cannot_be_changed_after_the_fact() -> None:
    with pytest.raises(AttributeError):
        DpSgdEvent(**GOOD).steps = 0  # pyright: ignore[reportAttributeAccessIssue]
