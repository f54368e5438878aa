import math
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tests.server.aggregation.sites import (
    Held,
    Plan,
    joined,
    mean_product,
    moved_size,
    plans,
    product_of,
    state_of,
    updates_of,
)

from cotune.server.aggregation.bias import aggregation_bias
from cotune.server.aggregation.updates import modules_of, padded


@given(plan=plans())
def test_it_is_the_error_that_averaging_the_factors_apart_makes(plan: Plan) -> None:
    plan = replace(plan, modules=2)
    state = state_of(plan)
    updates = updates_of(plan, state)
    after = {**state, **joined("fedavg_ab", state, updates)}
    modules = modules_of(state)
    wanted = np.stack([mean_product(updates, module) for module in modules])
    got = np.stack([product_of(after, module) for module in modules])
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    rounding = np.linalg.norm([moved_size(state, after, module) for module in modules]) / np.linalg.norm(wanted)
    assert abs(aggregation_bias(updates, modules) - error) <= 1e-6 * rounding


def test_averaging_the_factors_apart_is_not_exact() -> None:
    plan = Plan(12, 16, 4, (4,) * 6, (1 / 6,) * 6)
    state = state_of(plan)
    assert aggregation_bias(updates_of(plan, state), modules_of(state)) > 0.1


@given(plan=plans(), trained=st.sampled_from(["lora_A", "lora_B", "score"]))
def test_there_is_none_where_one_factor_is_shared(plan: Plan, trained: str) -> None:
    state = state_of(plan)
    assert aggregation_bias(updates_of(plan, state, (trained,)), modules_of(state)) <= 1e-9


@given(plan=plans(mixed=True))
def test_a_smaller_rank_counts_as_zero_where_it_has_no_entry(plan: Plan) -> None:
    state = state_of(plan)
    updates = updates_of(plan, state)
    sent, changes = (
        {s: {n: padded(v, state[n].shape).astype(np.float32) for n, v in u.items()} for s, u in held.items()}
        for held in (updates.sent, updates.changes)
    )
    modules = modules_of(state)
    whole = aggregation_bias(Held(sent, changes, plan.shares), modules)
    assert math.isclose(aggregation_bias(updates, modules), whole, rel_tol=1e-6, abs_tol=1e-9)


def test_no_update_and_a_single_site_have_none() -> None:
    plan = Plan(5, 6, 2, (2,), (1.0,))
    state = state_of(plan)
    assert aggregation_bias(Held({}, {}, ()), modules_of(state)) == 0.0
    assert aggregation_bias(updates_of(plan, state), modules_of(state)) == 0.0


def test_zeros_have_none() -> None:
    plan = Plan(5, 6, 2, (2, 2), (0.5, 0.5))
    state = {name: np.zeros_like(array) for name, array in state_of(plan).items()}
    assert aggregation_bias(updates_of(plan, state, ()), modules_of(state)) == 0.0


def test_it_is_infinite_where_the_products_cancel_and_the_means_do_not() -> None:
    b, a = "m.lora_B.weight", "m.lora_A.weight"
    one, three = np.float32([[1]]), np.float32([[3]])
    sent = {"x": {b: three, a: one}, "y": {b: -one, a: three}}
    zeros = {site: {name: 0 * array for name, array in arrays.items()} for site, arrays in sent.items()}
    assert aggregation_bias(Held(sent, zeros, (0.5, 0.5)), ["m"]) == math.inf
