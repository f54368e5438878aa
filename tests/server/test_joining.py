"""From a round's updates to the next adapter: the mean that was promised, and what the job adds to it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.rounds import HEAD, SITES, deltas_of, fill, job_of, layout_of, spool_of, state_of

from cotune.server.joining import Joined, Joiner
from cotune.server.spool import Spool
from cotune.shared.adapter import Layout, Vector, fingerprint
from cotune.shared.aggregation import CONTROL, RULES, RuleName, factor_of, returned
from cotune.shared.folding import folded
from cotune.shared.job import Job
from cotune.shared.methods import initial_values
from cotune.shared.schedule import rates_of

Deltas = Mapping[str, Vector]


def start_of(job: Job) -> dict[str, Vector]:
    """A state as it comes to a round: B is zero where the rule says so, controls are there if it has them."""
    state = state_of(layout_of(job))
    if job.aggregation.rule == "flora_stack":
        state |= {name: np.zeros_like(array) for name, array in state.items() if factor_of(name) == "B"}
    return state | (
        {n + CONTROL: np.zeros_like(state[n]) for n in layout_of(job).trained} if job.train.scaffold else {}
    )


def joined(
    folder: Path,
    job: Job,
    deltas: Deltas,
    *,
    number: int = 1,
    state: Mapping[str, Vector] | None = None,
    memory: Mapping[str, Vector] | None = None,
    root: Any = None,
) -> Joined:
    state = state or start_of(job)
    with spool_of(folder / "spool", job, state, number) as spool:
        fill(spool, job, deltas)
        return Joiner(job, layout_of(job), root).join(state, memory or {}, spool, number)


def mean_of(folder: Path, *columns: tuple[str, list[float]]) -> Vector:
    """The joined update of a single tensor, from a state of zeros."""
    layout = Layout({HEAD: (len(columns[0][1]),)}, (HEAD,))
    state = {HEAD: np.zeros(layout.size, dtype=np.float32)}
    with Spool(folder / "spool", {3: layout}, {3: state}, {}) as spool:
        for site, values in columns:
            spool.add(site, 3, np.array(values, dtype=np.float32))
        return Joiner(job_of(), layout).join(state, {}, spool, 1).arrays[HEAD]


def same(one: Joined, other: Joined) -> bool:
    figures = [(j.bias, j.influence, j.influence_bound) for j in (one, other)]
    return (
        fingerprint(one.arrays) == fingerprint(other.arrays)
        and fingerprint(one.memory) == fingerprint(other.memory)
        and figures[0] == figures[1]
    )


# What the mean promises


@pytest.mark.parametrize("rule", RULES)
def test_every_order_of_arrival_gives_the_same_bits(tmp_path: Path, rule: RuleName) -> None:
    job = job_of(aggregation={"rule": rule})
    deltas = {s: d * np.float32(10.0 ** (3 * n)) for n, (s, d) in enumerate(deltas_of(job).items())}
    first = joined(tmp_path, job, deltas)
    for order in itertools.islice(itertools.permutations(SITES), 1, 120, 17):
        assert same(joined(tmp_path, job, {site: deltas[site] for site in order}), first)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.linear])
def test_a_linear_rule_adds_the_mean_of_equal_weights_to_what_the_round_trains(tmp_path: Path, rule: RuleName) -> None:
    job = job_of(aggregation={"rule": rule})
    state = start_of(job)
    for number in (1, 2):
        deltas = deltas_of(job, number)
        arrays = joined(tmp_path, job, deltas, number=number).arrays
        assert arrays.keys() == state.keys()
        mean = np.mean([delta.astype(np.float64) for delta in deltas.values()], axis=0).astype(np.float32)
        moved = returned(job.rule, layout_of(job), number, job.run.rounds).unflatten(mean)
        for name in state:
            if name in moved:
                np.testing.assert_allclose(arrays[name], state[name] + moved[name], rtol=1e-6, atol=1e-6)
            else:
                assert arrays[name].tobytes() == state[name].tobytes()


def test_public_weights_count_and_a_site_without_one_counts_once(tmp_path: Path) -> None:
    job = job_of(aggregation={"weights": {"site-2": 3.0, "site-5": 0.5}})
    deltas, state = deltas_of(job), start_of(job)
    arrays = joined(tmp_path, job, deltas).arrays
    mean = np.average([deltas[site].astype(np.float64) for site in SITES], axis=0, weights=[1, 3, 1, 1, 0.5])
    for name, moved in layout_of(job).unflatten(mean.astype(np.float32)).items():
        np.testing.assert_allclose(arrays[name], state[name] + moved, rtol=1e-5, atol=1e-6)


def test_one_update_is_its_own_mean_and_equal_updates_theirs(tmp_path: Path) -> None:
    values = [1 / 3, -2e-30, 1e30]
    alone = np.array(values, dtype=np.float32)
    assert mean_of(tmp_path, ("a", values)).tobytes() == alone.tobytes()
    np.testing.assert_array_max_ulp(mean_of(tmp_path, ("a", values), ("b", values), ("c", values)), alone, maxulp=0)


def test_sums_do_not_overflow_or_cancel_in_single_precision(tmp_path: Path) -> None:
    large = np.float32(3e38)
    assert mean_of(tmp_path, ("a", [3e38]), ("b", [3e38]))[0] == large
    assert mean_of(tmp_path, ("a", [1e8]), ("b", [1.0]), ("c", [-1e8]))[0] == pytest.approx(1 / 3, rel=1e-6)


@given(st.lists(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3), min_size=1, max_size=8))
def test_the_mean_lies_between_the_smallest_and_the_largest(
    tmp_path_factory: pytest.TempPathFactory, values: list[list[float]]
) -> None:
    rows = np.array(values, dtype=np.float32)
    result = mean_of(tmp_path_factory.getbasetemp(), *((f"s{n}", row) for n, row in enumerate(values)))
    assert (result >= rows.min(axis=0)).all()
    assert (result <= rows.max(axis=0)).all()


@pytest.mark.parametrize("rule", RULES)
def test_no_update_has_no_mean(tmp_path: Path, rule: RuleName) -> None:
    with pytest.raises(ValueError, match="no update"):
        joined(tmp_path, job_of(aggregation={"rule": rule}), {})


@pytest.mark.parametrize("rule", RULES)
def test_the_state_and_the_memory_given_are_left_as_they_were(tmp_path: Path, rule: RuleName) -> None:
    job = job_of(aggregation={"rule": rule})
    state = start_of(job)
    before = fingerprint(state)
    result = joined(tmp_path, job, deltas_of(job), state=state)
    assert fingerprint(state) == before != fingerprint(result.arrays)
    assert all(array.dtype == np.float32 for array in result.arrays.values())


# Products


def products(arrays: Mapping[str, Vector]) -> dict[str, Any]:
    plain = folded(arrays)
    return {m: plain[f"{m}.lora_B.weight"].astype("f8") @ plain[f"{m}.lora_A.weight"] for m in ("m0", "m1")}


@pytest.mark.parametrize("rule", [n for n, rule in RULES.items() if rule.exact and n not in ("product_svd", "fed_sb")])
def test_an_exact_rules_product_is_the_mean_of_the_sites_products(tmp_path: Path, rule: RuleName) -> None:
    job = job_of(aggregation={"rule": rule})
    state, deltas = start_of(job), deltas_of(job)
    up = returned(job.rule, layout_of(job), 1, job.run.rounds)
    each = [
        products({**state, **{n: state[n] + moved for n, moved in up.unflatten(delta).items()}})
        for delta in deltas.values()
    ]
    found = products(joined(tmp_path, job, deltas).arrays)
    for module, product in found.items():
        np.testing.assert_allclose(product, np.mean([p[module] for p in each], axis=0), rtol=1e-4, atol=1e-4)


def test_flora_draws_a_anew_by_seed_and_round_and_b_begins_at_zero(tmp_path: Path) -> None:
    job = job_of(aggregation={"rule": "flora_stack"})
    for number in (1, 2):
        arrays = joined(tmp_path, job, deltas_of(job), number=number).arrays
        drawn = initial_values(layout_of(job), job.run.seed, turn=number)
        for name in layout_of(job).shapes:
            if factor_of(name) == "A":
                assert arrays[name].tobytes() == drawn[name].tobytes()
            elif factor_of(name) == "B":
                assert not arrays[name].any()


@pytest.mark.parametrize("rule", ["ffa", "product_svd", "fedavg_ab", "flora_stack"])
def test_sites_of_several_ranks_are_joined_to_the_jobs_rank(tmp_path: Path, rule: RuleName) -> None:
    job = job_of(lora={"ranks": {"site-1": 1, "site-4": 2}}, aggregation={"rule": rule})
    result = joined(tmp_path, job, deltas_of(job))
    shapes = {name: array.shape for name, array in result.arrays.items() if "offset" not in name}
    assert shapes == dict(layout_of(job).shapes)
    assert result.influence is None


# Figures


def test_how_far_a_rule_is_from_the_mean_of_products_is_said_where_both_factors_move(tmp_path: Path) -> None:
    bias: dict[str, float | None] = {}
    for rule in RULES:
        job = job_of(aggregation={"rule": rule})
        bias[rule] = joined(tmp_path, job, deltas_of(job)).bias
    assert bias["ffa"] is None
    assert bias["fed_sb"] is None
    assert bias["alternating_rounds"] == pytest.approx(0, abs=1e-6)
    for rule in ("fedavg_ab", "alternating_steps", "fedex", "product_svd"):
        assert bias[rule] is not None
        assert bias[rule] > 0.1


def test_how_much_one_site_moves_the_mean_is_what_leaving_it_out_does(tmp_path: Path) -> None:
    job = job_of(aggregation={"max_update_norm": 50.0})
    deltas = deltas_of(job)
    whole = joined(tmp_path, job, deltas)
    moved = []
    for site in SITES:
        less = joined(tmp_path, job, {name: delta for name, delta in deltas.items() if name != site})
        parts = [whole.arrays[n].astype("f8") - less.arrays[n] for n in layout_of(job).trained]
        moved.append(np.sqrt(sum((part**2).sum() for part in parts)))
    assert whole.influence == pytest.approx(max(moved), rel=1e-5)
    assert whole.influence_bound == pytest.approx(50.0 / 5)
    assert (
        joined(
            tmp_path,
            job_of(aggregation={"rule": "product_svd"}),
            deltas_of(job_of(aggregation={"rule": "product_svd"})),
        ).influence
        is None
    )


# What the job adds


ROBUST = ["norm_bound", "median", "trimmed_mean", "multi_krum", "fltrust"]


@pytest.mark.parametrize("robust", ROBUST)
def test_a_robust_rule_keeps_one_huge_update_from_carrying_the_mean_away(tmp_path: Path, robust: str) -> None:
    root = {"root": "/r.jsonl"} if robust == "fltrust" else {}
    job = job_of(aggregation={"robust": robust, **root}, federation={"min_sites": 5})
    deltas = deltas_of(job)
    shared = deltas["site-1"]
    deltas = {site: shared + 0.1 * delta for site, delta in deltas.items()}
    deltas["site-3"] = -1e6 * shared
    asked: list[int] = []

    def trusted(state: Mapping[str, Vector], number: int) -> Mapping[str, Vector]:
        assert fingerprint(state) == fingerprint(start_of(job))
        asked.append(number)
        return layout_of(job).unflatten(shared)

    arrays = joined(tmp_path, job, deltas, number=2, root=trusted).arrays
    moved = layout_of(job).flatten(arrays) - layout_of(job).flatten(start_of(job))
    assert np.linalg.norm(moved) < 2 * np.linalg.norm(shared)
    plain = joined(tmp_path, job_of(), deltas, number=2).arrays
    assert np.linalg.norm(layout_of(job).flatten(plain)) > 1e4
    assert asked == ([2] if robust == "fltrust" else [])


def test_momentum_goes_on_from_round_to_round_by_the_papers_formula(tmp_path: Path) -> None:
    job = job_of(aggregation={"optimizer": "fedavgm", "momentum": 0.5, "learning_rate": 0.25})
    state, memory = start_of(job), {}
    flat = layout_of(job).flatten(state).astype(np.float64)
    m = np.zeros_like(flat)
    for number in (1, 2, 3):
        deltas = deltas_of(job, number)
        result = joined(tmp_path, job, deltas, number=number, state=state, memory=memory)
        state, memory = dict(result.arrays), result.memory
        m = 0.5 * m + np.mean(list(deltas.values()), axis=0)
        flat += 0.25 * m
        np.testing.assert_allclose(layout_of(job).flatten(state), flat, rtol=1e-5, atol=1e-5)


def test_a_moving_average_is_what_is_published_and_training_goes_on_from_the_state(tmp_path: Path) -> None:
    job = job_of(aggregation={"ema": 0.75})
    plain, averaged = job_of(), Joiner(job, layout_of(job))
    state, memory, seen = start_of(job), {}, []
    assert averaged.published(state, memory) == state
    for number in (1, 2, 3):
        result = joined(tmp_path, job, deltas_of(job, number), number=number, state=state, memory=memory)
        without = joined(tmp_path, plain, deltas_of(job, number), number=number, state=state)
        assert fingerprint(result.arrays) == fingerprint(without.arrays)
        state, memory = dict(result.arrays), result.memory
        seen.append(layout_of(job).flatten(state).astype(np.float64))
        weights = [0.75**age for age in range(len(seen))][::-1]
        wanted = np.average(seen, axis=0, weights=weights)
        published = averaged.published(state, memory)
        np.testing.assert_allclose(layout_of(job).flatten(published), wanted, rtol=1e-5, atol=1e-5)
        assert published.keys() == state.keys()
        frozen = [name for name in state if name not in layout_of(job).trained]
        assert frozen
        assert all(published[name].tobytes() == state[name].tobytes() for name in frozen)


def test_scaffolds_controls_move_by_the_share_of_sites_that_answered(tmp_path: Path) -> None:
    job = job_of(train={"scaffold": True})
    layout, state = layout_of(job), start_of(job)
    rate = sum(rates_of(job, 1))
    control = np.zeros(layout.size)
    for number, sites in ((1, SITES), (2, SITES[:2])):
        deltas = deltas_of(job, number, sites)
        state = dict(joined(tmp_path, job, deltas, number=number, state=state).arrays)
        own = [-control - delta / rate for delta in deltas.values()]  # c_i' - c_i, had each started from c
        control = control + len(sites) / 5 * np.mean(own, axis=0)
        found = layout.flatten({name: state[name + CONTROL] for name in layout.trained})
        np.testing.assert_allclose(found, control, rtol=1e-5, atol=1e-5)


def test_a_round_that_is_joined_again_from_what_was_kept_gives_the_same_bits(tmp_path: Path) -> None:
    from safetensors.numpy import load, save

    job = job_of(aggregation={"optimizer": "fedyogi", "learning_rate": 0.1, "ema": 0.5}, train={"scaffold": True})
    first = joined(tmp_path, job, deltas_of(job, 1))
    again = [load(save({n: np.ascontiguousarray(a) for n, a in part.items()})) for part in (first.arrays, first.memory)]
    second = joined(tmp_path, job, deltas_of(job, 2), number=2, state=first.arrays, memory=first.memory)
    assert same(joined(tmp_path, job, deltas_of(job, 2), number=2, state=again[0], memory=again[1]), second)
