"""FLoRA and FedEx: the rules that keep what the adapter cannot hold in an offset."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.aggregation.sites import (
    SEED,
    Plan,
    agreeing,
    held_size,
    joined,
    layout_of,
    mean_product,
    plans,
    product_of,
    relative,
    state_of,
    updates_of,
)

from cotune.server.aggregation.fedex import fedex
from cotune.server.aggregation.updates import modules_of
from cotune.shared.adapter import Vector
from cotune.shared.methods import initial_values


def with_offset(state: dict[str, Vector], plan: Plan, rank: int) -> dict[str, Vector]:
    """The state after rounds that left an offset of this rank, as large as the adapter's own product."""
    drawn = state_of(replace(plan, rank=rank, seed=plan.seed + 1))
    more = {name.replace(".lora_", ".offset_"): array for name, array in drawn.items() if ".lora_" in name}
    return {**state, **more}


def offset_of(arrays: dict[str, Vector], module: str) -> np.ndarray:
    b, a = (arrays[f"{module}.offset_{factor}.weight"].astype(np.float64) for factor in "BA")
    return b @ a


def b_zero(state: dict[str, Vector]) -> dict[str, Vector]:
    return {name: np.zeros_like(array) if "lora_B" in name else array for name, array in state.items()}


@given(plan=plans(mixed=True), rank=st.integers(0, 6), turn=st.integers(1, 99))
def test_flora_adds_the_mean_of_the_products_to_the_offset(plan: Plan, rank: int, turn: int) -> None:
    plan = replace(plan, wide=max(plan.wide, plan.rank))  # no job has a rank above a dimension: A has orthonormal rows
    state = b_zero(state_of(plan))
    updates = updates_of(plan, state)
    state = with_offset(state, plan, rank) if rank else state
    fresh = initial_values(layout_of("flora_stack", state), SEED, turn)
    after = {**state, **joined("flora_stack", state, updates, turn)}
    for module in modules_of(state):
        wanted = mean_product(updates, module) + (offset_of(state, module) if rank else 0)
        assert relative(product_of(after, module), wanted) <= 1e-6
        assert not after[f"{module}.lora_B.weight"].any()
        a = f"{module}.lora_A.weight"
        assert np.array_equal(after[a], fresh[a])


@given(plan=plans(), rank=st.integers(0, 6))
def test_fedex_is_the_mean_of_the_factors_and_an_offset_that_makes_it_exact(plan: Plan, rank: int) -> None:
    state = state_of(plan)
    updates = updates_of(plan, state)
    means = {**state, **joined("fedavg_ab", state, updates)}
    state = with_offset(state, plan, rank) if rank else state
    changed = fedex(state, updates)
    for module in modules_of(state):
        old = offset_of(state, module) if rank else 0.0
        after = {**state, **changed}
        got, wanted = product_of(after, module), mean_product(updates, module) + old
        assert relative(got, wanted, held_size(after, module)) <= 1e-6
        for factor in "AB":
            name = f"{module}.lora_{factor}.weight"
            size = (np.abs(state[name]) + np.abs(means[name])).max()  # the mean change is rounded too
            assert np.allclose(changed[name], means[name], rtol=1e-6, atol=1e-6 * size)


@given(plan=plans(mixed=True))
def test_fedex_is_exact_at_mixed_ranks_too(plan: Plan) -> None:
    state = state_of(plan)
    updates = updates_of(plan, state)
    changed = fedex(state, updates)
    for module in modules_of(state):
        size = held_size(changed, module)
        assert relative(product_of(changed, module), mean_product(updates, module), size) <= 1e-6


def test_the_offset_has_one_rank_for_all_modules_and_it_stops_at_the_largest_dimension() -> None:
    plan = Plan(6, 9, 2, (2, 2, 2), (0.5, 0.3, 0.2))
    state = b_zero(state_of(plan))
    small = {"small.lora_A.weight": state["m0.lora_A.weight"][:, :4], "small.lora_B.weight": state["m0.lora_B.weight"]}
    state |= small
    ranks: list[int] = []
    for turn in range(3):
        updates = updates_of(replace(plan, seed=turn), state)
        state |= joined("flora_stack", state, updates, turn + 1)
        found = {state[f"{m}.offset_A.weight"].shape[0] for m in modules_of(state)}
        found |= {state[f"{m}.offset_B.weight"].shape[1] for m in modules_of(state)}
        assert len(found) == 1
        ranks += found
    assert ranks == [6, 6, 6]
    assert not state["small.offset_A.weight"][4:].any()


def test_the_rank_of_the_offset_is_no_more_than_the_sum_needs() -> None:
    plan = Plan(20, 30, 2, (2, 2, 2), (0.5, 0.3, 0.2))
    state = b_zero(state_of(plan))
    for updates, rank in ((updates_of(plan, state), 6), (agreeing(plan, state, 3), 2)):
        changed = joined("flora_stack", state, updates)
        assert changed["m0.offset_A.weight"].shape == (rank, 30)
        assert changed["m0.offset_B.weight"].shape == (20, rank)


@pytest.mark.parametrize("count", [1, 4])
def test_sites_that_agree_leave_no_offset(count: int) -> None:
    plan = Plan(9, 7, 3, (3,), (1.0,))
    state = state_of(plan)
    updates = agreeing(plan, state, count)
    changed = fedex(state, updates)
    for module in modules_of(state):
        assert changed[f"{module}.offset_A.weight"].shape == (1, 7)
        assert not offset_of(changed, module).any()
        assert relative(product_of(changed, module), mean_product(updates, module)) <= 1e-6


def test_a_round_without_change_leaves_the_offset_as_large_as_it_was() -> None:
    plan = Plan(9, 7, 3, (3, 3), (0.5, 0.5))
    state = with_offset(state_of(plan), plan, 4)
    still = updates_of(plan, state, ())
    changed = fedex(state, still)
    assert relative(offset_of(changed, "m0"), offset_of(state, "m0")) <= 1e-6
    assert changed["m0.offset_A.weight"].shape == (4, 7)
