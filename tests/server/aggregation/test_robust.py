"""Robust rules against dense formulas written apart from them, the attacks they are there for, and their limits."""

import math
import tracemalloc
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cotune.server.aggregation.coordinatewise import CHUNK_NUMBERS
from cotune.server.aggregation.influence import influence_bound, measured_influence
from cotune.server.aggregation.robust import RobustName, RobustSettings, combine
from cotune.shared.combinations import least_sites
from cotune.shared.errors import JobError, RunFailed

RULES: tuple[RobustName, ...] = get_args(RobustName)
TRIMS = ("0.1", "0.2", "0.3", "0.45")


class Held:
    """Updates in memory; they may have come in any order."""

    def __init__(self, deltas: Mapping[str, Mapping[str, np.ndarray]], weights: Mapping[str, float] | None = None):
        self._deltas = deltas
        self.sites = tuple(sorted(deltas))
        given = weights or dict.fromkeys(deltas, 1.0)
        self.weights = np.array([given[site] for site in self.sites]) / sum(given.values())

    def before(self, site: str, name: str) -> np.ndarray:
        return np.zeros_like(self._deltas[site][name])

    def delta(self, site: str, name: str) -> np.ndarray:
        return self._deltas[site][name]


def held(rows: np.ndarray, weights: np.ndarray | None = None) -> Held:
    """One tensor `t` per site from a matrix (k, n)."""
    sites = [f"site-{n:03}" for n in range(len(rows))]
    deltas = {site: {"t": row.astype(np.float32)} for site, row in zip(sites, rows, strict=True)}
    return Held(deltas, None if weights is None else dict(zip(sites, weights.tolist(), strict=True)))


def joined(name: RobustName, updates: Held, settings: RobustSettings, tensors: tuple[str, ...] = ("t",)) -> np.ndarray:
    rule = combine(name, updates, tensors, settings)
    return np.concatenate([rule(tensor).ravel() for tensor in tensors])


# Dense references: (rows (k, n), weights (k,), bound, trim as text, f, root (n,)) -> (n,)
class Dense:
    def __init__(self, rows: np.ndarray, weights: np.ndarray, settings: RobustSettings, trim: str, root: np.ndarray):
        self.rows, self.weights, self.trim, self.root = rows, weights / weights.sum(), trim, root
        self.bound, self.hostile = settings.bound, settings.hostile

    def none(self) -> np.ndarray:
        return np.average(self.rows, axis=0, weights=self.weights)

    def norm_bound(self) -> np.ndarray:
        norms = [np.linalg.norm(row) for row in self.rows]
        kept = [row if n <= self.bound else row / n * self.bound for row, n in zip(self.rows, norms, strict=True)]
        return np.average(kept, axis=0, weights=self.weights)

    def median(self) -> np.ndarray:
        return np.median(self.rows, axis=0)

    def trimmed_mean(self) -> np.ndarray:
        cut = max(1, math.floor(Fraction(self.trim) * len(self.rows)))
        return np.array([np.mean(sorted(column)[cut : len(column) - cut]) for column in self.rows.T])

    def multi_krum(self) -> np.ndarray:
        k, scores = len(self.rows), []
        for i in range(k):
            near = sorted(np.linalg.norm(self.rows[i] - self.rows[j]) ** 2 for j in range(k) if j != i)
            scores.append(sum(near[: k - self.hostile - 2]))
        best = sorted(range(k), key=lambda i: scores[i])[: k - self.hostile]
        return self.rows[best].mean(axis=0)

    def fltrust(self) -> np.ndarray:
        length, total, weighed = np.linalg.norm(self.root), 0.0, np.zeros_like(self.root)
        for row in self.rows:
            norm = np.linalg.norm(row)
            trust = max(0.0, row @ self.root / norm / length) if norm else 0.0
            weighed += trust * row * length / (norm or 1.0)
            total += trust
        return weighed / total if total else weighed

    def join(self, name: RobustName) -> np.ndarray:
        return getattr(self, name)()

    def influence(self, name: RobustName) -> float:
        """The largest change, each site left out in turn."""
        whole = self.join(name)
        changes = []
        for out in range(len(self.rows)):
            rest = [n for n in range(len(self.rows)) if n != out]
            other = Dense.__new__(Dense)
            other.__dict__.update(self.__dict__)
            other.rows, other.weights = self.rows[rest], self.weights[rest] / self.weights[rest].sum()
            changes.append(float(np.linalg.norm(whole - other.join(name))))
        return max(changes)


@st.composite
def cases(draw: st.DrawFn, least: int = 1, most: int = 12) -> tuple[Held, Dense, RobustSettings, tuple[str, ...]]:
    """Two tensors of any shape at k sites, with weights, at scales from 1e-6 to 1e3, and their dense form."""
    k = draw(st.integers(least, most))
    shapes = {name: draw(st.tuples(st.integers(1, 5), st.integers(1, 6))) for name in ("a", "b")}
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = 10.0 ** draw(st.integers(-6, 3))
    drawn = [
        {
            name: (generator.standard_normal(shape) * scale * 3.0 ** generator.integers(-2, 3)).astype(np.float32)
            for name, shape in shapes.items()
        }
        for _ in range(k + 1)
    ]
    sites = [f"s{n:02}" for n in range(k)]
    weights = generator.uniform(0.1, 1.0, k)
    arrived = [sites[n] for n in generator.permutation(k)]
    updates = Held({s: drawn[sites.index(s)] for s in arrived}, dict(zip(sites, weights.tolist(), strict=True)))
    dense = np.array([np.concatenate([d["a"].ravel(), d["b"].ravel()]) for d in drawn], dtype=np.float64)
    trim, hostile = draw(st.sampled_from(TRIMS)), draw(st.integers(0, 3))
    settings = RobustSettings(2.0 * scale, float(trim), hostile, drawn[k])
    return updates, Dense(dense[:k], weights, settings, trim, dense[k]), settings, ("a", "b")


@pytest.mark.parametrize("name", RULES)
@hypothesis_settings(max_examples=50)
@given(case=cases(most=16))
def test_a_rule_is_its_dense_formula_or_refuses_for_too_few_sites(name: RobustName, case) -> None:
    updates, dense, settings, tensors = case
    if len(updates.sites) < least_sites(name, settings.trim, settings.hostile):
        with pytest.raises(
            RunFailed,
            match=f"{name}: expected updates of at least {least_sites(name, settings.trim, settings.hostile)}",
        ):
            combine(name, updates, tensors, settings)
        return
    expected = dense.join(name)
    assert np.abs(joined(name, updates, settings, tensors) - expected).max() <= 1e-12 * np.abs(dense.rows).max()


@pytest.mark.parametrize("name", RULES)
@hypothesis_settings(max_examples=25)
@given(case=cases(least=10, most=16))
def test_influence_is_the_largest_change_by_leaving_each_site_out(name: RobustName, case) -> None:
    updates, dense, settings, tensors = case
    assert measured_influence(name, updates, tensors, settings) == pytest.approx(dense.influence(name), rel=1e-9)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sites", [40, 41])
def test_influence_is_exact_for_many_sites_too(name: RobustName, sites: int) -> None:
    generator = np.random.default_rng(4)
    rows = generator.standard_normal((sites, 30)).astype(np.float32).astype(np.float64)
    root = generator.standard_normal(30).astype(np.float32)
    settings = RobustSettings(1.0, 0.2, 5, {"t": root})
    dense = Dense(rows, np.ones(sites), settings, "0.2", root.astype(np.float64))
    assert measured_influence(name, held(rows), ["t"], settings) == pytest.approx(dense.influence(name), rel=1e-9)


@pytest.mark.parametrize("name", ["norm_bound", "median"])
def test_a_tensor_of_several_chunks_is_joined_and_measured_whole(name: RobustName) -> None:
    rows = np.random.default_rng(10).standard_normal((5, 300_001)) * np.linspace(1, 2, 300_001)
    rows = rows.astype(np.float32).astype(np.float64)
    assert CHUNK_NUMBERS < rows.size < 2 * CHUNK_NUMBERS
    settings = RobustSettings(500.0)
    dense = Dense(rows, np.ones(5), settings, "0.2", rows[0])
    assert np.abs(joined(name, held(rows), settings) - dense.join(name)).max() <= 1e-9
    assert measured_influence(name, held(rows), ["t"], settings) == pytest.approx(dense.influence(name), rel=1e-9)


def test_influence_where_leaving_one_out_leaves_fewer_than_the_rule_asks_for() -> None:
    """Five sites are the least of three rules; without one of them they still cut, or choose."""
    rows = np.array([[0.9], [1.0], [1.1], [1.2], [-50.0]])
    settings = RobustSettings(1.0)
    for name in ("median", "trimmed_mean", "multi_krum"):
        assert least_sites(name, settings.trim, settings.hostile) == 5
        assert measured_influence(name, held(rows), ["t"], settings) < 0.2
    assert measured_influence("none", held(rows), ["t"], settings) > 10


@pytest.mark.parametrize("name", ["none", "norm_bound", "fltrust"])
def test_without_the_only_site_nothing_is_joined(name: RobustName) -> None:
    settings = RobustSettings(2.5, root={"t": np.array([0.0, 2.0], dtype=np.float32)})
    updates = held(np.array([[3.0, 4.0]]))
    length = {"none": 5.0, "norm_bound": 2.5, "fltrust": 2.0}[name]
    assert joined(name, updates, settings) == pytest.approx(np.array([0.6, 0.8]) * length)
    assert measured_influence(name, updates, ["t"], settings) == pytest.approx(length)


@hypothesis_settings(max_examples=50)
@given(case=cases(), name=st.sampled_from(["none", "norm_bound"]))
def test_no_part_exceeds_the_bound_and_no_change_twice_of_it(name: RobustName, case) -> None:
    updates, dense, settings, tensors = case
    norms = np.linalg.norm(dense.rows, axis=1)
    bound = influence_bound(name, settings, updates.weights, float(norms.max()))
    assert bound is not None
    parts = updates.weights * (np.minimum(norms, settings.bound) if name == "norm_bound" else norms)
    assert parts.max() <= bound * (1 + 1e-12)
    assert measured_influence(name, updates, tensors, settings) <= 2 * bound * (1 + 1e-12)


def test_opposite_updates_reach_twice_the_bound() -> None:
    updates, settings = held(np.array([[3.0], [-3.0]])), RobustSettings(1.0)
    assert influence_bound("norm_bound", settings, updates.weights, 9.0) == 0.5
    assert measured_influence("norm_bound", updates, ["t"], settings) == pytest.approx(1.0)


def test_a_bound_is_named_only_where_one_is_known() -> None:
    weights, settings = np.array([0.2, 0.5, 0.3]), RobustSettings(2.0)
    found = {name: influence_bound(name, settings, weights, 8.0) for name in RULES}
    assert found == {**dict.fromkeys(RULES), "none": 4.0, "norm_bound": 1.0}
    assert influence_bound("norm_bound", settings, weights, 1.0) == 0.5  # what is not admitted is not joined


def attacked(hostile: np.ndarray, honest: int = 10) -> tuple[Held, np.ndarray]:
    """Honest sites at 1.0 +- 0.01 in a thousand coordinates, hostile ones in between by name; a root like them."""
    generator = np.random.default_rng(5)
    good = generator.normal(1.0, 0.01, (honest + 1, 1000))
    rows = np.insert(good[:-1], [3] * len(hostile), hostile, axis=0)
    return held(rows), good[-1].astype(np.float32)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("none", 0.95, 1.05),
        ("norm_bound", 0.28, 0.38),  # two of twelve, scaled to the length of the others, the other way: 1/3
        ("median", 0, 0.05),
        ("trimmed_mean", 0, 0.05),
        ("multi_krum", 0, 0.05),
        ("fltrust", 0, 0.05),
    ],
)
def test_two_of_twelve_sites_at_minus_five(name: RobustName, least: float, most: float) -> None:
    updates, root = attacked(np.full((2, 1000), -5.0))
    settings = RobustSettings(math.sqrt(1000), 0.2, 2, {"t": root})
    assert least <= np.abs(joined(name, updates, settings) - 1).max() <= most


@pytest.mark.parametrize("name", RULES)
def test_one_site_a_million_times_too_large(name: RobustName) -> None:
    updates, root = attacked(np.full((1, 1000), 1e6))
    settings = RobustSettings(math.sqrt(1000), 0.2, 1, {"t": root})
    deviation = np.abs(joined(name, updates, settings) - 1).max()
    assert deviation > 9e4 if name == "none" else deviation <= 0.05


def test_multi_krum_may_choose_a_site_that_did_nothing() -> None:
    """Among updates with more noise than direction, zero is the nearest to all; its part of the mean is lost."""
    generator = np.random.default_rng(6)
    rows = 0.01 + generator.standard_normal((9, 1000))
    rows[4] = 0
    chosen = joined("multi_krum", held(rows), RobustSettings(1.0, hostile=1))
    honest = np.delete(rows.astype(np.float32).astype(np.float64), 4, axis=0)
    without_one = [np.abs(chosen - np.delete(honest, n, axis=0).sum(axis=0) / 8).max() for n in range(8)]
    assert min(without_one) <= 1e-12
    assert np.abs(chosen - honest.mean(axis=0)).max() > 0.1


def test_multi_krum_decides_ties_by_site_name() -> None:
    rows = np.eye(5)  # all at the same distance from each other
    assert joined("multi_krum", held(rows), RobustSettings(1.0, hostile=1)).tolist() == [0.25] * 4 + [0.0]


def test_equal_updates_are_their_own_joined_update() -> None:
    row = np.array([1 / 3, -2e-30, 1e30])
    root = {"t": row.astype(np.float32)}
    for name in RULES:
        found = joined(name, held(np.tile(row, (7, 1))), RobustSettings(2e30, root=root))
        assert found == pytest.approx(row.astype(np.float32), rel=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_updates_of_zeros_give_zeros(name: RobustName) -> None:
    updates, settings = held(np.zeros((7, 4))), RobustSettings(1.0, root={"t": np.ones(4, dtype=np.float32)})
    assert joined(name, updates, settings).tolist() == [0.0] * 4
    assert measured_influence(name, updates, ["t"], settings) == 0


def test_fltrust_without_any_trust_or_without_a_root_direction_changes_nothing() -> None:
    rows, root = np.array([[-1.0, 5.0], [-2.0, 0.0]]), np.array([1.0, 0.0], dtype=np.float32)
    for direction in (root, 0 * root):
        assert joined("fltrust", held(rows), RobustSettings(1.0, root={"t": direction})).tolist() == [0.0, 0.0]


@hypothesis_settings(max_examples=50)
@given(case=cases(), factors=st.lists(st.integers(-20, 20), min_size=12, max_size=12))
def test_fltrust_sees_directions_only_and_never_exceeds_the_roots_norm(case, factors: list[int]) -> None:
    updates, dense, settings, tensors = case
    found = joined("fltrust", updates, settings, tensors)
    length = np.linalg.norm(dense.root)
    assert np.linalg.norm(found) <= length * (1 + 1e-9)
    scaled = {
        site: {t: updates.delta(site, t) * np.float32(2.0**n) for t in tensors}
        for site, n in zip(updates.sites, factors, strict=False)
    }
    assert np.abs(joined("fltrust", Held(scaled), settings, tensors) - found).max() <= 1e-9 * length


@pytest.mark.parametrize(
    ("root", "error"),
    [
        (None, JobError),
        ({}, JobError),
        ({"u": np.ones(3, dtype=np.float32)}, JobError),
        ({"t": np.ones(1, dtype=np.float32)}, ValueError),
    ],
)
def test_fltrust_needs_a_root_update_of_the_same_tensors(root, error: type[Exception]) -> None:
    with pytest.raises(error, match="root"):
        combine("fltrust", held(np.ones((3, 3))), ["t"], RobustSettings(1.0, root=root))


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_arrival_changes_no_bit(name: RobustName) -> None:
    generator = np.random.default_rng(7)
    drawn = {f"s{n}": {"t": (generator.standard_normal(50) * 10.0**n).astype(np.float32)} for n in range(-3, 4)}
    settings = RobustSettings(1.0, root={"t": generator.standard_normal(50).astype(np.float32)})
    results: set[bytes] = set()
    figures: set[float] = set()
    for _ in range(10):
        updates = Held({str(site): drawn[str(site)] for site in generator.permutation(list(drawn))})
        results.add(joined(name, updates, settings).tobytes())
        figures.add(measured_influence(name, updates, ["t"], settings))
    assert (len(results), len(figures)) == (1, 1)


@hypothesis_settings(max_examples=50)
@given(case=cases(least=10), name=st.sampled_from(["median", "trimmed_mean", "multi_krum", "fltrust"]))
def test_weights_do_not_count_where_every_site_is_one_vote(case, name: RobustName) -> None:
    updates, _, settings, tensors = case
    equal = Held({site: {t: updates.delta(site, t) for t in tensors} for site in updates.sites})
    assert joined(name, updates, settings, tensors).tobytes() == joined(name, equal, settings, tensors).tobytes()


def test_the_least_number_of_sites() -> None:
    found = {name: least_sites(name, 0.2, 1) for name in RULES}
    assert found == {"none": 1, "norm_bound": 1, "median": 5, "trimmed_mean": 5, "multi_krum": 5, "fltrust": 1}
    assert [least_sites("multi_krum", 0.2, f) for f in range(4)] == [3, 5, 7, 9]


@given(st.integers(1, 49))
def test_trimmed_means_cut_and_leave_a_number_from_the_least_number_of_sites_on(percent: int) -> None:
    trim = Fraction(percent, 100)
    enough = [math.floor(trim * k) >= 1 and k > 2 * math.floor(trim * k) for k in range(1, 120)]
    assert least_sites("trimmed_mean", percent / 100, 1) == enough.index(True) + 1


def test_a_share_that_is_no_exact_binary_number_cuts_as_it_reads() -> None:
    assert math.floor(0.29 * 100) == 28
    rows = np.zeros((100, 1))
    rows[:29] = 1e9
    assert joined("trimmed_mean", held(rows), RobustSettings(1.0, trim=0.29)).tolist() == [0.0]


@pytest.mark.parametrize("name", [rule for rule in RULES if rule != "none"])
def test_tensors_of_different_shapes_are_refused_and_never_stretched(name: RobustName) -> None:
    settings = RobustSettings(1.0, root={"t": np.ones((2, 3), dtype=np.float32)})
    for shape in ((1, 3), (2, 1), (3, 2), (1, 1)):
        deltas = {f"s{n}": {"t": np.ones(shape if n == 3 else (2, 3), dtype=np.float32)} for n in range(7)}
        with pytest.raises(ValueError, match=r"t: expected shape \(2, 3\) .* of s3"):
            joined(name, Held(deltas), settings)


def test_without_a_rule_sites_of_smaller_ranks_count_as_zero_in_what_they_lack() -> None:
    deltas = {"a": {"t": np.ones((1, 2), dtype=np.float32)}, "b": {"t": np.ones((2, 2), dtype=np.float32)}}
    assert combine("none", Held(deltas), ["t"], RobustSettings(1.0))("t").tolist() == [[1.0, 1.0], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("bound", v) for v in (0.0, -1.0, math.nan, math.inf)]
    + [("trim", v) for v in (0.0, 0.5, -0.1, math.nan)]
    + [("hostile", -1)],
)
def test_impossible_settings_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(JobError, match=f"{setting}: expected") as caught:
        RobustSettings(**{"bound": 1.0, setting: value})
    assert caught.value.param == setting


class Drawn:
    """Updates of one large tensor, made when they are asked for."""

    def __init__(self, sites: int) -> None:
        self.sites = tuple(f"s{n:03}" for n in range(sites))
        self.weights = np.full(sites, 1 / sites)
        self._pool = np.random.default_rng(8).standard_normal(520 * 512 + sites).astype(np.float32)

    def before(self, site: str, name: str) -> np.ndarray:
        return np.zeros((520, 512), dtype=np.float32)

    def delta(self, site: str, name: str) -> np.ndarray:
        start = int(site[1:])
        return self._pool[start : start + 520 * 512].reshape(520, 512).copy()


def peak(work: Callable[[Drawn], object], sites: int) -> int:
    """Bytes taken at most while updates of so many sites are worked on."""
    updates = Drawn(sites)
    tracemalloc.start()
    try:
        work(updates)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["none", "norm_bound", "median", "multi_krum", "fltrust"])
def test_memory_does_not_grow_with_the_number_of_sites(name: RobustName) -> None:
    settings = RobustSettings(100.0, hostile=0, root={"t": Drawn(1).delta("s000", "t")})

    def join(updates: Drawn) -> None:
        combine(name, updates, ["t"], settings)("t")

    few, many = peak(join, max(4, least_sites(name, settings.trim, settings.hostile))), peak(join, 64)
    assert many < 1.5 * few
    assert many < 64 * 520 * 512 * 4 / 2  # half of the updates themselves
