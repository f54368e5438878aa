from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.aggregation.sites import (
    HEAD,
    TRAINED,
    Held,
    Plan,
    joined,
    plans,
    product_of,
    relative,
    shuffled,
    state_of,
    updates_of,
)

from cotune.server.aggregation.bias import aggregation_bias
from cotune.server.aggregation.updates import factor_names, modules_of, padded, weighted_mean
from cotune.shared.adapter import nested
from cotune.shared.aggregation import RULES, RuleName


@given(rule=st.sampled_from(sorted(RULES)), plan=plans(), order=st.integers(0, 99))
def test_every_order_of_arrival_gives_the_same_bits(rule: RuleName, plan: Plan, order: int) -> None:
    plan = replace(plan, core=RULES[rule].core)
    state = state_of(plan)
    updates = updates_of(plan, state, TRAINED[rule])
    other = shuffled(updates, order)
    first, second = joined(rule, state, updates), joined(rule, state, other)
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert aggregation_bias(updates, modules_of(state)) == aggregation_bias(other, modules_of(state))


@pytest.mark.parametrize("rule", RULES)
def test_results_are_single_precision_and_the_state_is_left_as_it_was(rule: RuleName) -> None:
    plan = Plan(6, 9, 3, (3, 3, 3), (0.5, 0.25, 0.25), core=RULES[rule].core)
    state = state_of(plan)
    kept = {name: array.tobytes() for name, array in state.items()}
    changed = joined(rule, state, updates_of(plan, state, TRAINED[rule]))
    assert {array.dtype for array in changed.values()} == {np.dtype(np.float32)}
    assert all(changed[name].shape == state[name].shape for name in changed if "offset" not in name)
    for array in changed.values():
        array.fill(7)
    assert {name: array.tobytes() for name, array in state.items()} == kept


@given(rule=st.sampled_from(sorted(RULES)), plan=plans())
def test_a_head_moves_by_the_weighted_mean_of_its_changes_under_every_rule(rule: RuleName, plan: Plan) -> None:
    plan = replace(plan, core=RULES[rule].core)
    state = state_of(plan)
    updates = updates_of(plan, state, TRAINED[rule])
    mean = sum(w * updates.delta(s, HEAD).astype(np.float64) for s, w in zip(updates.sites, plan.shares, strict=True))
    assert np.allclose(joined(rule, state, updates)[HEAD], state[HEAD] + mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_no_update_is_an_error(rule: RuleName) -> None:
    state = state_of(Plan(3, 3, 1, (), (), core=RULES[rule].core))
    with pytest.raises(ValueError, match="no update"):
        joined(rule, state, Held({}, {}, ()))


@given(plan=plans(mixed=True))
def test_a_smaller_rank_counts_as_zero_where_it_has_no_entry(plan: Plan) -> None:
    state = state_of(plan)
    updates = updates_of(plan, state)
    for name in state:
        whole = [padded(updates.delta(site, name), state[name].shape) for site in updates.sites]
        expected = np.tensordot(plan.shares, np.array(whole), 1)
        got = padded(weighted_mean(updates, name), state[name].shape)
        assert np.allclose(got, expected, rtol=1e-12, atol=1e-13 * np.abs(whole).max())


@given(plan=plans(), rank=st.integers(1, 6))
def test_a_nested_adapter_holds_the_first_components(plan: Plan, rank: int) -> None:
    state = state_of(plan)
    part = nested(state, rank)
    for b, a in map(factor_names, modules_of(state)):
        assert np.array_equal(part[a], state[a][:rank])
        assert np.array_equal(part[b], state[b][:, :rank])
        assert part[b].flags.c_contiguous
    assert np.array_equal(part[HEAD], state[HEAD])


@pytest.mark.parametrize("rule", RULES)
def test_what_the_state_holds_beside_the_adapter_is_left_alone(rule: RuleName) -> None:
    plan = Plan(6, 9, 3, (3, 3), (0.5, 0.5), core=RULES[rule].core)
    state = state_of(plan)
    updates = updates_of(plan, state, TRAINED[rule])
    wider = state | {f"{name}|control": array for name, array in state.items()}
    assert modules_of(wider) == modules_of(state) == ["m0", "m1"]
    assert joined(rule, wider, updates).keys() == joined(rule, state, updates).keys()


def test_sums_do_not_overflow_or_cancel_in_single_precision() -> None:
    numbers = {"a": [1e8, 3e38], "b": [1.0, 3e38], "c": [-1e8, 3e38]}
    arrays = {site: {HEAD: np.array(value, dtype=np.float32)} for site, value in numbers.items()}
    mean = weighted_mean(Held(arrays, arrays, (1 / 3,) * 3), HEAD)
    assert np.allclose(mean, [1 / 3, np.float32(3e38)], rtol=1e-6)


@pytest.mark.parametrize("rule", [name for name, facts in RULES.items() if facts.exact and name != "product_svd"])
def test_an_exact_rule_gives_the_dense_mean_of_the_products(rule: RuleName) -> None:
    plan = Plan(40, 56, 6, (6,) * 5, (0.3, 0.25, 0.2, 0.15, 0.1), core=RULES[rule].core)
    state = state_of(plan)
    if rule == "flora_stack":
        state |= {name: np.zeros_like(array) for name, array in state.items() if "lora_B" in name}
    updates = updates_of(plan, state, TRAINED[rule])
    after = {**state, **joined(rule, state, updates)}
    for module in modules_of(state):
        sites = [
            product_of({n: updates.before(s, n).astype(np.float64) + updates.delta(s, n) for n in state}, module)
            for s in updates.sites
        ]
        assert relative(product_of(after, module), np.tensordot(plan.shares, sites, 1)) <= 1e-6
