from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.aggregation.sites import (
    HEAD,
    Plan,
    joined,
    mean_product,
    moved_size,
    plans,
    product_of,
    relative,
    state_of,
    unchanged,
    updates_of,
)

from cotune.server.aggregation.updates import modules_of
from cotune.shared.aggregation import RULES, RuleName

ROUNDS = {"lora_B": 1, "lora_A": 2}  # in which alternation trains the factor


@given(plan=plans())
def test_with_a_frozen_the_product_of_the_mean_is_the_mean_of_the_products(plan: Plan) -> None:
    state = state_of(plan)
    updates = updates_of(plan, state, ("lora_B",))
    after = {**state, **joined("ffa", state, updates)}
    for module in modules_of(state):
        size = moved_size(state, after, module)
        assert relative(product_of(after, module), mean_product(updates, module), size) <= 1e-6


@given(plan=plans(), factor=st.sampled_from(sorted(ROUNDS)))
def test_alternation_is_exact_while_one_factor_is_shared(plan: Plan, factor: str) -> None:
    state = state_of(plan)
    updates = updates_of(plan, state, (factor,))
    changed = joined("alternating_rounds", state, updates, ROUNDS[factor])
    assert changed.keys() == {name for name in state if factor in name}
    after = {**state, **changed}
    for module in modules_of(state):
        size = moved_size(state, after, module)
        assert relative(product_of(after, module), mean_product(updates, module), size) <= 1e-6


@given(plan=plans(mixed=True), factor=st.sampled_from(sorted(ROUNDS)))
def test_the_change_of_the_product_is_the_mean_of_the_sites_changes_at_nested_ranks(plan: Plan, factor: str) -> None:
    state = state_of(plan)
    updates = updates_of(plan, state, (factor,))
    after = {**state, **joined("alternating_rounds", state, updates, ROUNDS[factor])}
    for module in modules_of(state):
        change = mean_product(updates, module) - mean_product(unchanged(updates), module)
        size = moved_size(state, after, module)
        assert relative(product_of(after, module), product_of(state, module) + change, size) <= 1e-6


@given(plan=plans())
def test_a_core_between_frozen_factors_is_exact(plan: Plan) -> None:
    state = state_of(replace(plan, core=True))
    updates = updates_of(plan, state, ("lora_core", "score"))
    changed = joined("fed_sb", state, updates)
    after = {**state, **changed}
    assert changed.keys() == {name for name in state if "lora_core" in name or name == HEAD}
    for module in modules_of(state):
        core = f"{module}.lora_core.weight"
        cores = [state[core].astype(np.float64) + updates.delta(site, core) for site in updates.sites]
        sites = [product_of({**state, core: moved}, module) for moved in cores]
        size = moved_size(state, after, module)
        assert relative(product_of(after, module), np.tensordot(plan.shares, sites, 1), size) <= 1e-6


@pytest.mark.parametrize("rule", [name for name, facts in RULES.items() if facts.linear])
def test_what_nobody_changed_stays_bit_by_bit(rule: RuleName) -> None:
    plan = Plan(5, 6, 2, (2, 2), (0.5, 0.5), core=RULES[rule].core)
    state = state_of(plan)
    assert joined(rule, state, updates_of(plan, state, ())) == {}


def test_the_only_site_is_its_own_mean() -> None:
    plan = Plan(5, 6, 2, (2,), (1.0,))
    state = state_of(plan)
    updates = updates_of(plan, state)
    changed = joined("fedavg_ab", state, updates)
    assert changed.keys() == state.keys()
    for name, array in changed.items():
        assert (
            array.tobytes() == (state[name].astype(np.float64) + updates.delta("site-00", name)).astype("f4").tobytes()
        )
