"""Sums over units: a unit's examples are added before clipping, and no unit ever counts for more than the norm."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tests.client.oracles import BERT, CLASSIFY, examples_of, network_of
from torch import Tensor

from cotune.client.clipping import NORMALISED_OFFSET, ClippedSum, PerUnit, clipped_sum, sum_by_unit
from cotune.client.gradients import PerExample, PerExampleGradients
from cotune.shared.job import Job
from cotune.shared.privacy.mechanism import LOSS_BOUND, Mechanism

MAGNITUDES = st.one_of(
    st.floats(-1e3, 1e3, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, 1e-45, -1e-45, 1e-38, 1e-30, 3.4028234663852886e38, -3.4028234663852886e38, 1.0]),
)
NORMS = st.sampled_from([1e-6, 0.1, 1 / 3, 1.0, 7.3, 1e6])
MATRICES = st.integers(1, 6).flatmap(lambda n: arrays.arrays(np.float32, (n, 10), elements=MAGNITUDES))
LOSSES = arrays.arrays(np.float32, 6, elements=st.floats(-1, 100, width=32) | st.sampled_from([0, LOSS_BOUND, 3e38]))
BROKEN = st.sampled_from([np.nan, np.inf, -np.inf])
KINDS = st.sampled_from(["flat", "normalised"])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small matrices: threads would only wait for each other."""
    torch.set_num_threads(1)


def mechanism(norm: float = 1.0, **changes: Any) -> Mechanism:
    rule = Mechanism(sampling_probability=0.5, expected_batch_size=4, clipping_norm=norm, noise_multiplier=1.0)
    return replace(rule, **changes)


def split(matrix: Any) -> dict[str, Tensor]:
    """Ten numbers a row as two parameters, one of them a matrix."""
    values = torch.from_numpy(np.array(matrix, dtype=np.float32))
    return {"a": values[:, :6].reshape(-1, 2, 3), "b": values[:, 6:]}


def per_example(matrix: Any, losses: Any = None) -> PerExample:
    """A row an example; losses are 1 where none are given."""
    found = np.ones(len(matrix)) if losses is None else np.asarray(losses)[: len(matrix)]
    return PerExample(split(matrix), torch.from_numpy(found.astype(np.float32)))


def units(matrix: Any, losses: Any = None) -> PerUnit:
    """A row a unit."""
    return sum_by_unit(per_example(matrix, losses), range(len(matrix)), len(matrix))


def flat(per_unit: PerUnit) -> np.ndarray:
    return torch.cat([gradient.flatten(1) for gradient in per_unit.gradients.values()], 1).numpy()


# Sums by unit


def test_a_units_row_is_the_sum_of_its_examples_and_its_loss_their_mean() -> None:
    matrix = np.arange(40).reshape(4, 10)
    found = sum_by_unit(per_example(matrix, [1, 2, 4, 6]), [1, 0, 1, 1], 3)
    np.testing.assert_array_equal(flat(found), [matrix[1], matrix[0] + matrix[2] + matrix[3], np.zeros(10)])
    assert found.losses.tolist() == [2.0, pytest.approx(11 / 3), 0.0]
    assert found.counts.tolist() == [1, 3, 0]
    assert found.gradients["a"].shape == (3, 2, 3)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(owners=st.lists(st.integers(0, 3), min_size=6, max_size=6), changed=st.integers(0, 5), broken=BROKEN)
def test_a_units_row_depends_on_its_own_examples_alone(owners: list[int], changed: int, broken: float) -> None:
    matrix, losses = np.random.default_rng(2).normal(size=(6, 10)), np.arange(6.0)
    before = sum_by_unit(per_example(matrix, losses), owners, 4)
    matrix[changed], losses[changed] = broken, broken
    after = sum_by_unit(per_example(matrix, losses), owners, 4)
    others = [unit for unit in range(4) if unit != owners[changed]]
    np.testing.assert_array_equal(flat(after)[others], flat(before)[others])
    assert torch.equal(after.losses[others], before.losses[others])
    assert not np.isfinite(flat(after)[owners[changed]]).any()
    assert not bool(after.losses[owners[changed]].isfinite())


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_unit_may_come_in_pieces(cut: int) -> None:
    matrix, losses, owners = np.random.default_rng(3).normal(size=(6, 10)), np.arange(6.0), np.array([0, 1, 1, 0, 1, 2])
    whole = sum_by_unit(per_example(matrix, losses), owners, 4)
    pieces = [sum_by_unit(per_example(matrix[s], losses[s]), owners[s], 4) for s in (slice(cut), slice(cut, 6))]
    total = pieces[0] + pieces[1]
    np.testing.assert_allclose(flat(total), flat(whole), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.losses, whole.losses)
    assert torch.equal(total.counts, whole.counts)
    assert total.losses[3] == 0


def test_where_every_example_is_a_unit_nothing_is_copied() -> None:
    found = per_example(np.ones((3, 10)))
    assert sum_by_unit(found, [0, 1, 2], 3).gradients is found.gradients


@pytest.mark.parametrize("owners", [[0, 1, 3], [0, -1, 1], [0, 1], [0, 1, 2, 0], [[0], [1], [2]], []])
def test_an_owner_that_is_no_unit_is_refused(owners: list[Any]) -> None:
    with pytest.raises(IndexError):
        sum_by_unit(per_example(np.ones((3, 10))), owners, 3)


# The bound


@settings(max_examples=200, deadline=None, derandomize=True)
@given(matrix=MATRICES, norm=NORMS, kind=KINDS)
def test_no_single_unit_ever_counts_for_more_than_the_clipping_norm(matrix: Any, norm: float, kind: str) -> None:
    for row in matrix:
        counted = clipped_sum(units(row[None]), mechanism(norm, clipping=kind))
        assert float(np.linalg.norm(counted.gradient)) <= norm


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    matrix=MATRICES, losses=LOSSES, norm=NORMS, kind=KINDS, broken=st.none() | BROKEN, place=st.integers(0, 10)
)  # fmt: skip
def test_adding_or_removing_any_unit_moves_no_sum_by_more_than_its_sensitivity(
    matrix: Any, losses: Any, norm: float, kind: str, broken: float | None, place: int
) -> None:
    losses = losses[: len(matrix)].copy()
    if broken is not None:
        (matrix[0] if place < 10 else losses)[place % 10] = broken
    rule = mechanism(norm, clipping=kind)
    whole = clipped_sum(units(matrix, losses), rule)
    assert np.isfinite(whole.gradient).all()
    for row in range(len(matrix)):
        without = clipped_sum(units(np.delete(matrix, row, axis=0), np.delete(losses, row)), rule)
        assert float(np.linalg.norm(whole.gradient - without.gradient)) <= rule.sensitivity
        assert abs(whole.below - without.below) == 0.5
        assert abs(whole.loss - without.loss) <= 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(matrix=MATRICES, norm=NORMS)
def test_clipping_only_shortens_and_only_what_is_too_long(matrix: Any, norm: float) -> None:
    for row in matrix:
        long = np.asarray(row, dtype=np.float64)
        length = float(np.linalg.norm(long))
        counted = clipped_sum(units(row[None]), mechanism(norm))
        if length <= norm * (1 - 2e-6):
            np.testing.assert_array_equal(counted.gradient, long)
        elif length > 0:
            np.testing.assert_allclose(counted.gradient, long * (norm / length), rtol=3e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(matrix=MATRICES, norm=NORMS)
def test_normalised_clipping_brings_every_gradient_near_the_norm(matrix: Any, norm: float) -> None:
    for row in matrix:
        length = float(np.linalg.norm(np.asarray(row, dtype=np.float64)))
        counted = clipped_sum(units(row[None]), mechanism(norm, clipping="normalised"))
        wanted = norm * length / (length + NORMALISED_OFFSET)
        assert float(np.linalg.norm(counted.gradient)) == pytest.approx(wanted, rel=3e-6)


def test_the_check_of_the_bound_notices_a_norm_taken_per_parameter() -> None:
    gradients, one = split(np.full((1, 10), 5.0)), torch.ones(1)
    by_part = [clipped_sum(PerUnit({name: g}, one, one), mechanism()).gradient for name, g in gradients.items()]
    assert float(np.linalg.norm(np.concatenate(by_part))) > 1
    assert float(np.linalg.norm(clipped_sum(PerUnit(gradients, one, one), mechanism()).gradient)) <= 1


@pytest.mark.parametrize("kind", ["flat", "normalised"])
@pytest.mark.parametrize("width", [3, 40, 4001])
def test_what_a_unit_adds_depends_on_that_unit_alone(kind: str, width: int) -> None:
    matrix = np.random.default_rng(4).normal(size=(33, width)).astype(np.float32)
    rule = mechanism(math.sqrt(width), clipping=kind)

    def counted(rows: Any) -> ClippedSum:
        tensor, one = torch.from_numpy(matrix[rows]), torch.ones(len(matrix[rows]))
        return clipped_sum(PerUnit({"w": tensor}, one, one), rule)

    alone = [counted([row]) for row in range(33)]
    whole = counted(slice(None))
    np.testing.assert_allclose(whole.gradient, np.sum([a.gradient for a in alone], axis=0), rtol=0, atol=1e-12)
    assert whole.below == sum(a.below for a in alone)
    assert abs(whole.below) < 10, "half of these should be within the norm"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(matrix=MATRICES, broken=BROKEN, place=st.integers(0, 10), private=st.booleans(), kind=KINDS)
def test_a_unit_with_nan_or_infinity_counts_as_zero_and_leaves_the_others(
    matrix: Any, broken: float, place: int, private: bool, kind: str
) -> None:
    rule = mechanism(private=private, clipping=kind)
    spoilt, losses = np.insert(matrix, 0, 0.1, axis=0), np.full(len(matrix) + 1, 3.0)
    (spoilt[0] if place < 10 else losses)[place % 10] = broken
    got, wanted = clipped_sum(units(spoilt, losses), rule), clipped_sum(units(matrix, losses[1:]), rule)
    np.testing.assert_allclose(got.gradient, wanted.gradient, rtol=1e-12)
    assert got.below == wanted.below - 0.5
    assert got.loss == pytest.approx(wanted.loss, abs=1e-12)


@pytest.mark.parametrize("private", [True, False])
def test_no_unit_gives_zero(private: bool) -> None:
    nothing = clipped_sum(units(np.zeros((0, 10))), mechanism(private=private))
    assert nothing.gradient.shape == (10,)
    assert not nothing.gradient.any()
    assert (nothing.below, nothing.loss) == (0, 0)


@pytest.mark.parametrize("kind", ["flat", "normalised"])
def test_a_zero_gradient_stays_zero(kind: str) -> None:
    found = clipped_sum(units(np.zeros((3, 10))), mechanism(clipping=kind))
    assert not found.gradient.any()
    assert found.below == 1.5


@pytest.mark.parametrize(("length", "below"), [(0.999, 0.5), (1.0, 0.5), (1.001, -0.5)])
def test_a_unit_of_exactly_the_norm_is_below_it(length: float, below: float) -> None:
    row = np.zeros((1, 10))
    row[0, 3] = length
    assert clipped_sum(units(row), mechanism()).below == below


@pytest.mark.parametrize(("loss", "share"), [(0, -1), (-5, -1), (2, -0.5), (4, 0), (8, 1), (8.1, 1), (3e38, 1)])
def test_a_loss_counts_from_minus_one_to_one(loss: float, share: float) -> None:
    assert clipped_sum(units(np.ones((1, 10)), [loss]), mechanism()).loss == share


def test_without_privacy_nothing_is_scaled() -> None:
    matrix = np.random.default_rng(1).normal(size=(4, 10)).astype(np.float32) * 1e4
    got = clipped_sum(units(matrix), mechanism(1e-3, private=False))
    np.testing.assert_allclose(got.gradient, matrix.astype(np.float64).sum(0), rtol=1e-12)


# What comes of it


def test_the_sum_is_flat_float64_in_the_order_of_the_parameters() -> None:
    got = clipped_sum(units(np.arange(10)[None]), mechanism(1e3)).gradient
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, np.arange(10))


def test_sums_add_up_from_zero() -> None:
    matrix, rule = np.random.default_rng(6).normal(size=(5, 10)), mechanism(0.5)
    whole = clipped_sum(units(matrix, np.arange(5.0)), rule)
    parts = [clipped_sum(units(matrix[s], np.arange(5.0)[s]), rule) for s in (slice(2), slice(2, 5))]
    total = ClippedSum.zero(10) + parts[0] + parts[1]
    np.testing.assert_allclose(total.gradient, whole.gradient, atol=1e-12)
    assert (total.below, total.loss) == (whole.below, pytest.approx(whole.loss))
    for value in (total, units(matrix)):
        assert "array" not in repr(value) and "tensor" not in repr(value)


@pytest.fixture(params=["completion", "classify"])
def job(request: pytest.FixtureRequest, make_job: Any, tiny_encoder: Path) -> Job:
    if request.param == "completion":
        return make_job(aggregation={"rule": "fedavg_ab"})
    lora, both = {"target_modules": BERT}, {"rule": "fedavg_ab"}
    return make_job(model={"base": str(tiny_encoder)}, task=CLASSIFY, lora=lora, aggregation=both)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_splitting_a_batch_into_microbatches_does_not_change_the_sum(job: Job, size: int) -> None:
    network, examples = network_of(job), examples_of(job)
    gradients, rule = PerExampleGradients(network), mechanism(0.1)

    def counted(some: list[Any]) -> ClippedSum:
        return clipped_sum(sum_by_unit(gradients.of(some, None), range(len(some)), len(some)), rule)

    whole, total = counted(examples), ClippedSum.zero(counted(examples).gradient.size)
    for start in range(0, len(examples), size):
        total = total + counted(examples[start : start + size])
    np.testing.assert_allclose(total.gradient, whole.gradient, atol=1e-6)
    assert float(np.abs(whole.gradient).max()) > 1e-3
    assert total.below == whole.below
    assert total.loss == pytest.approx(whole.loss, abs=1e-5)
