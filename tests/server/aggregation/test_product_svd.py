from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.aggregation.sites import (
    HEAD,
    Held,
    Matrix,
    Plan,
    agreeing,
    mean_product,
    plans,
    product_of,
    relative,
    state_of,
    unchanged,
    updates_of,
)

from cotune.server.aggregation.product_svd import at_rank, product_svd
from cotune.server.aggregation.updates import factor_names, modules_of
from cotune.shared.adapter import Vector


def rounded(state: Mapping[str, Vector], rank: int) -> dict[str, Vector]:
    """A state at a rank, as a codec of eight mantissa bits would send it."""

    def coarse(array: Vector) -> Vector:
        mantissa, exponent = np.frexp(array)
        return np.ldexp(np.round(mantissa * 256) / 256, exponent).astype(np.float32)

    return {name: coarse(array) for name, array in at_rank(state, rank).items()}


def moved(state: Mapping[str, Vector], updates: Held, module: str) -> Matrix:
    """The state's product plus the weighted mean of the changes of the sites' products, dense."""
    change = mean_product(updates, module) - mean_product(unchanged(updates), module)
    return product_of(state, module) + change


def assert_best_of_rank(arrays: Mapping[str, Vector], module: str, wanted: Matrix) -> None:
    """The product's error is that of the best of its rank, by an SVD of the dense matrix."""
    rank = arrays[f"{module}.lora_A.weight"].shape[0]
    best = np.linalg.norm(np.linalg.svd(wanted, compute_uv=False)[rank:])
    error = np.linalg.norm(product_of(arrays, module) - wanted)
    assert abs(error - best) <= 1e-6 * np.linalg.norm(wanted)


@given(plan=plans())
def test_it_is_the_best_approximation_of_the_mean_of_the_products(plan: Plan) -> None:
    state = state_of(plan)
    updates = updates_of(plan, state)
    changed = product_svd(state, updates)
    for module in modules_of(state):
        assert_best_of_rank(changed, module, mean_product(updates, module))


@given(plan=plans(mixed=True), sent=st.sampled_from([at_rank, rounded]), trained=st.sampled_from(["lora", "lora_A"]))
def test_of_a_site_that_was_sent_less_than_the_state_only_the_change_counts(plan: Plan, sent, trained: str) -> None:
    state = state_of(plan)
    updates = updates_of(plan, state, (trained,), sent)
    changed = product_svd(state, updates)
    for module in modules_of(state):
        assert_best_of_rank(changed, module, moved(state, updates, module))


@given(plan=plans(), wide=st.integers(20, 40))
def test_the_mean_is_whole_where_its_rank_is_not_above_the_adapters(plan: Plan, wide: int) -> None:
    """Sites whose B lie in one plane of two dimensions, and whose stack is smaller than the matrix or larger."""
    plan = replace(plan, out=wide, wide=wide + 3, rank=4, ranks=(4,) * len(plan.ranks), modules=1)
    state = state_of(plan)
    drawn = updates_of(plan, state)
    b = "m0.lora_B.weight"
    plane = np.linalg.qr(np.random.default_rng(plan.seed).normal(size=(wide, 2)))[0]
    state[b] = np.zeros_like(state[b])
    flat = {s: {**u, b: (plane @ (plane.T @ u[b])).astype(np.float32)} for s, u in drawn.changes.items()}
    updates = replace(drawn, sent={s: {**u, b: state[b]} for s, u in drawn.sent.items()}, changes=flat)
    assert relative(product_of(product_svd(state, updates), "m0"), mean_product(updates, "m0")) <= 1e-6


def test_a_rank_that_reaches_the_dimension_loses_nothing() -> None:
    plan = Plan(3, 8, 4, (4, 2, 3), (0.5, 0.3, 0.2))
    state = state_of(plan)
    updates = updates_of(plan, state, sent=at_rank)
    changed = product_svd(state, updates)
    for module in modules_of(state):
        assert relative(product_of(changed, module), moved(state, updates, module)) <= 1e-6


@pytest.mark.parametrize("count", [1, 5])
def test_sites_with_the_same_factors_have_their_product_as_the_mean(count: int) -> None:
    plan = Plan(9, 7, 3, (3,), (1.0,))
    state = state_of(plan)
    updates = agreeing(plan, state, count)
    changed = product_svd(state, updates)
    for module in modules_of(state):
        assert relative(product_of(changed, module), mean_product(updates, module)) <= 1e-6


def test_a_round_without_change_keeps_every_product_and_every_head() -> None:
    plan = Plan(9, 7, 3, (3, 2, 1), (0.5, 0.3, 0.2))
    state = state_of(plan)
    changed = product_svd(state, updates_of(plan, state, (), at_rank))
    assert HEAD not in changed
    for module in modules_of(state):
        assert relative(product_of(changed, module), product_of(state, module)) <= 1e-6


def test_a_first_round_of_zeros_leaves_an_adapter_that_can_be_trained() -> None:
    plan = Plan(9, 7, 3, (3, 2), (0.5, 0.5))
    state = {n: np.zeros_like(v) if "lora_B" in n else v for n, v in state_of(plan).items()}
    changed = product_svd(state, updates_of(plan, state, (), at_rank))
    for b, a in map(factor_names, modules_of(state)):
        assert not changed[b].any()
        assert np.allclose(changed[a] @ changed[a].T, np.eye(3), atol=1e-6)


@given(plan=plans(), rank=st.integers(1, 6))
def test_a_site_is_sent_the_best_approximation_of_its_rank(plan: Plan, rank: int) -> None:
    state = state_of(plan)
    part = at_rank(state, rank)
    assert part.keys() == state.keys()
    assert part[HEAD] is state[HEAD]
    for module in modules_of(state):
        assert part[f"{module}.lora_A.weight"].shape[0] == min(rank, plan.rank)
        assert_best_of_rank(part, module, product_of(state, module))


@given(plan=plans(), rank=st.integers(1, 4))
def test_a_joined_adapter_is_cut_to_its_first_components(plan: Plan, rank: int) -> None:
    state = state_of(plan)
    joined = product_svd(state, updates_of(plan, state))
    part = at_rank(joined, rank)
    for names in map(factor_names, modules_of(state)):
        first = joined[names[0]][:, :rank].astype(np.float64) @ joined[names[1]][:rank]
        # Components may change places where singular values are equal to single precision; their errors may not.
        whole = joined[names[0]].astype(np.float64) @ joined[names[1]]
        got = part[names[0]].astype(np.float64) @ part[names[1]]
        assert abs(np.linalg.norm(got - whole) - np.linalg.norm(first - whole)) <= 1e-6 * np.linalg.norm(whole)


def test_at_full_rank_a_site_is_sent_the_state_itself() -> None:
    state = state_of(Plan(9, 7, 3, (), ()))
    assert all(at_rank(state, 3)[name] is array for name, array in state.items())
