"""Rounds of low-rank updates, held in memory, and the dense sums they are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from cotune.server.aggregation.updates import Matrix, Updates
from cotune.server.joining import Joiner
from cotune.shared.adapter import Layout, Vector, nested
from cotune.shared.aggregation import CONTROL, RULES, RuleName, factor_of
from cotune.shared.jobfile import parse_job

HEAD = "score.weight"
SEED = 5  # public, of every job here
Arrays = Mapping[str, Vector]


@dataclass(frozen=True)
class Held:
    """A round's updates: site -> tensors as sent and their changes, in the order of arrival."""

    sent: Mapping[str, Arrays]
    changes: Mapping[str, Arrays]
    shares: tuple[float, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.sent)

    @property
    def weights(self) -> Matrix:
        return np.array(self.shares)

    def before(self, site: str, name: str) -> Vector:
        return self.sent[site][name]

    def delta(self, site: str, name: str) -> Vector:
        return self.changes[site][name]


@dataclass(frozen=True)
class Plan:
    """A round to draw: the state's shape, the sites' ranks and weights, and the scales of B and A."""

    out: int
    wide: int
    rank: int
    ranks: tuple[int, ...]
    shares: tuple[float, ...]
    scales: tuple[float, float] = (1.0, 1.0)
    modules: int = 2
    seed: int = 0
    core: bool = False


@st.composite
def plans(draw: st.DrawFn, *, mixed: bool = False) -> Plan:
    """Shapes to 12 x 12, ranks 1 to 5 (also above a dimension), 1 to 12 sites, any weights, scales 1e-12 to 1e6."""
    out, wide, rank, sites = (draw(st.integers(1, n)) for n in (12, 12, 5, 12))
    ranks = draw(st.lists(st.integers(1, rank) if mixed else st.just(rank), min_size=sites, max_size=sites))
    counts = np.array(draw(st.lists(st.integers(1, 9), min_size=sites, max_size=sites)), dtype=np.float64)
    scales = [10.0 ** draw(st.integers(-12, 6)) for _ in range(2)]
    shares = tuple(float(share) for share in counts / counts.sum())
    seed = draw(st.integers(0, 2**32))
    return Plan(out, wide, rank, tuple(ranks), shares, (scales[0], scales[1]), modules=1, seed=seed)


def state_of(plan: Plan) -> dict[str, Vector]:
    """An adapter in which nothing is zero."""
    random = np.random.default_rng(plan.seed)
    shapes: dict[str, tuple[int, ...]] = {HEAD: (3, plan.wide)}
    for n in range(plan.modules):
        shapes |= {f"m{n}.lora_A.weight": (plan.rank, plan.wide), f"m{n}.lora_B.weight": (plan.out, plan.rank)}
        shapes |= {f"m{n}.lora_core.weight": (plan.rank, plan.rank)} if plan.core else {}
    return {name: _drawn(random, name, shape, plan.scales) for name, shape in shapes.items()}


def updates_of(
    plan: Plan,
    state: Arrays,
    trained: tuple[str, ...] = ("lora_A", "lora_B", "score"),
    sent: Callable[[Arrays, int], Mapping[str, Vector]] = nested,
) -> Held:
    """What sites of the plan's ranks send back: changes of the trained tensors as large as the tensors."""
    random = np.random.default_rng([plan.seed, 1])
    before = {f"site-{n:02}": sent(state, rank) for n, rank in enumerate(plan.ranks)}
    changes = {
        site: {
            name: _drawn(random, name, array.shape, plan.scales)
            if any(mark in name for mark in trained)
            else np.zeros_like(array)
            for name, array in arrays.items()
        }
        for site, arrays in before.items()
    }
    return Held(before, changes, plan.shares)


def agreeing(plan: Plan, state: Arrays, count: int) -> Held:
    """Sites that were sent the same and all came to the same."""
    one = updates_of(replace(plan, ranks=(plan.rank,)), state)
    names = [f"s{n}" for n in range(count)]
    return Held(
        dict.fromkeys(names, one.sent["site-00"]), dict.fromkeys(names, one.changes["site-00"]), (1 / count,) * count
    )


def unchanged(updates: Held) -> Held:
    """The same round with nothing learnt."""
    return replace(updates, changes={s: {n: 0 * v for n, v in u.items()} for s, u in updates.changes.items()})


def shuffled(updates: Held, seed: int) -> Held:
    """The same round with its updates in another order of arrival."""
    order = np.random.default_rng(seed).permutation(len(updates.sent))
    sites = [updates.sites[n] for n in order]
    return Held(
        {site: updates.sent[site] for site in sites},
        {site: updates.changes[site] for site in sites},
        tuple(updates.shares[n] for n in order),
    )


TRAINED: dict[RuleName, tuple[str, ...]] = {
    "ffa": ("lora_B", "score"),
    "alternating_rounds": ("lora_A", "score"),  # in a second round
    "alternating_steps": ("lora_A", "lora_B", "score"),
    "fedavg_ab": ("lora_A", "lora_B", "score"),
    "fedsa": ("lora_A", "score"),  # before the last round
    "fed_sb": ("lora_core", "score"),
    "product_svd": ("lora_A", "lora_B", "score"),
    "fedex": ("lora_A", "lora_B", "score"),
    "flora_stack": ("lora_A", "lora_B", "score"),
}


def layout_of(rule: RuleName, state: Arrays) -> Layout:
    """The adapter in a state, without what the state holds beside it."""
    shapes = {name: array.shape for name, array in state.items() if "offset" not in name and CONTROL not in name}
    return Layout(shapes, tuple(name for name in sorted(shapes) if factor_of(name) in (*RULES[rule].trains, None)))


def joined(rule: RuleName, state: Arrays, updates: Updates, round_number: int = 2) -> dict[str, Vector]:
    """What a rule makes of a round: the tensors that are others than before."""
    a = next(name for name in state if "lora_A" in name)
    rank, ranks = len(state[a]), {site: len(updates.before(site, a)) for site in updates.sites}
    job = parse_job(
        {
            "schema": 1,
            "run": {"seed": SEED},
            "model": {"base": "unread"},
            "lora": {"r": rank, "ranks": {} if {rank}.issuperset(ranks.values()) else ranks},
            "data": {"train": "unread", "records_per_site": 100},
            "federation": {"sites": 100},
            "aggregation": {"rule": rule},
        },
        origin="test",
    )
    arrays = Joiner(job, layout_of(rule, state)).join(state, {}, updates, round_number).arrays
    assert arrays.keys() >= state.keys()
    return {name: array for name, array in arrays.items() if array.tobytes() != state.get(name, array[:0]).tobytes()}


def dense(b: NDArray[np.floating], a: NDArray[np.floating]) -> Matrix:
    return b.astype(np.float64) @ a.astype(np.float64)


def product_of(arrays: Arrays, module: str) -> Matrix:
    """What the adapter adds to the base weight of a module, offset and core included."""
    b, a = (arrays[f"{module}.lora_{factor}.weight"] for factor in "BA")
    core = arrays.get(f"{module}.lora_core.weight")
    total = dense(b, a) if core is None else dense(b, core) @ a.astype(np.float64)
    if f"{module}.offset_A.weight" in arrays:
        total = total + dense(*(arrays[f"{module}.offset_{factor}.weight"] for factor in "BA"))
    return total


def products_after(updates: Updates, module: str) -> list[Matrix]:
    """What each site's own factors make of the module after its training, as dense matrices."""
    found: list[Matrix] = []
    for site in updates.sites:
        names = [f"{module}.lora_{factor}.weight" for factor in "BA"]
        b, a = (updates.before(site, n).astype(np.float64) + updates.delta(site, n) for n in names)
        found.append(b @ a)
    return found


def mean_product(updates: Updates, module: str) -> Matrix:
    """The dense weighted mean of the sites' products."""
    return np.einsum("k,koi->oi", updates.weights, np.array(products_after(updates, module)))


def held_size(arrays: Arrays, module: str) -> float:
    """Norm of the product were all its terms positive: what rounding the factors to single precision is a share of.

    Where terms cancel, the product is smaller than this, and no fp32 factors are nearer to it.
    """
    return float(np.linalg.norm(product_of({name: np.abs(array) for name, array in arrays.items()}, module)))


def moved_size(before: Arrays, after: Arrays, module: str) -> float:
    """The same of linear rules, which round the change too: where it cancels, it is larger than what is left."""
    return held_size({name: np.abs(before[name]) + np.abs(after[name]) for name in before}, module)


def relative(got: NDArray[np.floating], wanted: NDArray[np.floating], size: float | None = None) -> float:
    """Frobenius norm of the error over that of what was wanted, or over another size; 0 if both are zero."""
    error = float(np.linalg.norm(got - wanted))
    size = float(np.linalg.norm(wanted)) if size is None else size
    return error / size if size else error


def _drawn(random: np.random.Generator, name: str, shape: tuple[int, ...], scales: tuple[float, float]) -> Vector:
    scale = scales[0] if "lora_B" in name else scales[1] if "lora_A" in name else 1.0
    return (random.normal(size=shape) * scale).astype(np.float32)
