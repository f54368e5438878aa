"""What both sides agree on of each rule: what is trained when, what travels, and that the table says true."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from cotune.shared.adapter import Layout
from cotune.shared.aggregation import (
    CONTROL,
    RULES,
    RuleName,
    factor_of,
    returned,
    sent,
    trained_at,
    what_is_trained,
)
from cotune.shared.methods import layout_of
from cotune.shared.model import locate

HEAD = "score.weight"
SHAPES: dict[str, tuple[int, ...]] = {
    "m.k.lora_A.weight": (4, 7), "m.k.lora_B.weight": (5, 4), "m.q.lora_A.weight": (4, 7), "m.q.lora_B.weight": (9, 4),
    HEAD: (3, 7),
}  # fmt: skip
NAMES = tuple(SHAPES)
OF_A = ("m.k.lora_A.weight", "m.q.lora_A.weight", HEAD)
OF_B = ("m.k.lora_B.weight", "m.q.lora_B.weight", HEAD)


def test_every_rule_there_is_has_its_facts_and_the_default_is_exact_and_suits_privacy() -> None:
    assert set(RULES) == set(get_args(RuleName))
    assert RULES["ffa"].exact
    assert RULES["ffa"].suits_dp
    for name, rule in RULES.items():
        assert rule.core == (name == "fed_sb")
        assert not (rule.linear and rule.needs_individual_updates), "a mean needs only the sum"
        assert not (rule.offset and rule.suits_dp), "an offset keeps every update's noise"


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("base.q_proj.lora_A.weight", "A"),
        ("base.q_proj.lora_B.weight", "B"),
        ("base.q_proj.lora_core.weight", "core"),
        ("base.q_proj.offset_A.weight", None),
        ("base.classifier.bias", None),
        ("base.lora_alpha.weight", None),
    ],
)
def test_a_tensor_is_the_factor_its_name_says(name: str, factor: str | None) -> None:
    assert factor_of(name) == factor


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.alternates is None])
def test_a_rule_that_does_not_alternate_trains_everything_at_every_step(rule: RuleName) -> None:
    for number, step in ((1, 0), (2, 3), (5, 8)):
        assert trained_at(RULES[rule], NAMES, number, step) == NAMES
        if not RULES[rule].personal:
            assert returned(RULES[rule], Layout(SHAPES, NAMES), number, 8).trained == NAMES


def test_a_personal_b_is_trained_at_every_step_never_sent_and_returned_in_the_last_round_alone() -> None:
    rule, layout = RULES["fedsa"], Layout(SHAPES, NAMES)
    assert sent(rule, layout, 0, controls=False).trained == OF_A
    assert [returned(rule, layout, number, 3).trained for number in (1, 2, 3)] == [OF_A, OF_A, NAMES]
    assert returned(rule, layout, 1, 1).trained == NAMES


def test_alternating_by_round_begins_with_b_and_heads_are_always_trained() -> None:
    rule = RULES["alternating_rounds"]
    for number, expected in ((1, OF_B), (2, OF_A), (3, OF_B), (8, OF_A)):
        for step in (0, 1, 7):
            assert trained_at(rule, NAMES, number, step) == expected
        assert returned(rule, Layout(SHAPES, NAMES), number, 8).trained == expected
    sizes = [returned(rule, Layout(SHAPES, NAMES), number, 8).size for number in (1, 2)]
    assert sizes == [14 * 4 + 21, 2 * 4 * 7 + 21]


def test_alternating_by_step_begins_with_b_goes_on_over_rounds_and_returns_both() -> None:
    rule = RULES["alternating_steps"]
    for step, expected in ((0, OF_B), (1, OF_A), (2, OF_B), (7, OF_A)):
        for number in (1, 2):
            assert trained_at(rule, NAMES, number, step) == expected
            assert returned(rule, Layout(SHAPES, NAMES), number, 8).trained == NAMES


def test_what_is_sent_is_what_is_trained_then_the_offset_then_the_controls() -> None:
    rule, layout = RULES["fedex"], Layout(SHAPES, OF_B)
    assert sent(rule, layout, 0, controls=False) == layout
    with_offset = sent(rule, layout, 3, controls=False)
    assert with_offset.trained[:3] == OF_B
    offsets = {name: with_offset.shapes[name] for name in with_offset.trained[3:]}
    assert offsets == {
        "m.k.offset_A.weight": (3, 7), "m.k.offset_B.weight": (5, 3),
        "m.q.offset_A.weight": (3, 7), "m.q.offset_B.weight": (9, 3),
    }  # fmt: skip
    whole = sent(rule, layout, 3, controls=True)
    assert whole.trained == (*with_offset.trained, *(name + CONTROL for name in OF_B))
    assert all(whole.shapes[name + CONTROL] == SHAPES[name] for name in OF_B)
    assert whole.size == with_offset.size + layout.size
    values = {name: np.full(whole.shapes[name], place, dtype=np.float32) for place, name in enumerate(whole.trained)}
    back = whole.unflatten(whole.flatten(values))
    assert all(np.array_equal(back[name], values[name]) for name in whole.trained)


@pytest.mark.parametrize("rule", RULES)
def test_a_real_adapter_trains_the_factors_its_rule_names(make_job: Any, rule: RuleName) -> None:
    job = make_job(aggregation={"rule": rule})
    layout = layout_of(job, locate(job))[0]
    assert {factor_of(name) for name in layout.trained} == set(RULES[rule].trains)
    assert {factor_of(name) for name in layout.shapes} == {"A", "B"} | ({"core"} if RULES[rule].core else set())


def test_the_words_for_what_is_trained_tell_the_rules_apart() -> None:
    assert what_is_trained(RULES["ffa"]) == "B (A public and frozen)"
    assert what_is_trained(RULES["fedavg_ab"]) == "A and B"
    assert what_is_trained(RULES["fedsa"]) == "A and B (A shared, B each site's own)"
    assert what_is_trained(RULES["alternating_rounds"]) == "A and B, in turn each round"
    assert what_is_trained(RULES["alternating_steps"]) == "A and B, in turn each step"
    assert what_is_trained(RULES["fed_sb"]) == "the core between public, frozen A and B"
