import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.server.aggregation.sites import dense, relative

from cotune.server.aggregation.lowrank import best_of_rank, lossless, norms_of_sums, truncate

Terms = list[tuple[float, NDArray[np.float32], NDArray[np.float32]]]


@st.composite
def sums(draw: st.DrawFn) -> Terms:
    """One to six products of any ranks 1 to 5, (out, in) to 12 x 12, scales 1e-12 to 1e6 of either factor."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    out, wide = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    terms: Terms = []
    for _ in range(draw(st.integers(1, 6))):
        rank, up, down = draw(st.integers(1, 5)), draw(st.integers(-12, 6)), draw(st.integers(-12, 6))
        b, a = random.normal(size=(out, rank)) * 10.0**up, random.normal(size=(rank, wide)) * 10.0**down
        terms.append((float(random.normal()), b.astype(np.float32), a.astype(np.float32)))
    return terms


def total(terms: Terms) -> NDArray[np.float64]:
    return np.sum([weight * dense(b, a) for weight, b, a in terms], axis=0)


@given(terms=sums(), rank=st.integers(1, 14))
def test_no_matrix_of_the_rank_is_nearer_to_the_sum(terms: Terms, rank: int) -> None:
    whole = total(terms)
    values = np.linalg.svd(whole, compute_uv=False)
    b, a = best_of_rank(terms, rank)
    assert b.shape == (whole.shape[0], rank)
    assert a.shape == (rank, whole.shape[1])
    error = np.linalg.norm(dense(b, a) - whole)
    assert abs(error - np.linalg.norm(values[rank:])) <= 1e-6 * np.linalg.norm(whole)


@given(terms=sums(), rank=st.integers(1, 14))
def test_factors_are_balanced_sorted_and_of_fixed_signs(terms: Terms, rank: int) -> None:
    b, a = (factor.astype(np.float64) for factor in best_of_rank(terms, rank))
    used = np.flatnonzero(b.any(axis=0))
    b, a = b[:, used], a[used]
    sizes = np.linalg.norm(b, axis=0)
    assert np.allclose(b.T @ b, np.diag(sizes**2), rtol=0, atol=1e-6 * sizes.max(initial=0) ** 2)
    assert np.allclose(a @ a.T, np.diag(sizes**2), rtol=0, atol=1e-6 * sizes.max(initial=0) ** 2)
    assert (np.diff(sizes) <= 1e-6 * sizes.max(initial=0)).all()
    assert (b[np.abs(b).argmax(axis=0), np.arange(len(used))] > 0).all()


@given(terms=sums())
def test_a_lossless_sum_is_whole_and_of_its_own_rank(terms: Terms) -> None:
    whole = total(terms)
    b, a = lossless(terms)
    assert relative(dense(b, a), whole) <= 1e-6
    assert b.shape[1] == a.shape[0] <= min(whole.shape)


@given(terms=sums())
def test_the_norms_are_those_of_the_dense_sums(terms: Terms) -> None:
    *_, more = terms
    wanted = [np.linalg.norm(total(summed)) for summed in (terms, [*terms, more])]
    assert np.allclose(norms_of_sums(terms, more), wanted, rtol=1e-9, atol=0)


@given(terms=sums())
def test_what_cancels_leaves_nothing(terms: Terms) -> None:
    gone = [*terms, *((-weight, b, a) for weight, b, a in reversed(terms))]
    assert norms_of_sums(gone[:-1], gone[-1])[1] == 0.0
    assert norms_of_sums(gone, terms[0])[0] == 0.0
    assert lossless(gone)[0].shape[1] == 0


def test_products_far_apart_in_scale_within_one_factor_are_kept() -> None:
    b = np.diag(np.float32([1e6, 1e-12])).astype(np.float32)
    a = np.array([[0, 0, 0], [0, 1e-12, 0]], dtype=np.float32)
    assert relative(dense(*truncate(b, a, 1)), dense(b, a)) <= 1e-6


def test_a_component_without_a_singular_value_can_still_be_trained() -> None:
    random = np.random.default_rng(3)
    b = random.normal(size=(9, 1)) @ np.ones((1, 4))
    b, a = truncate(b.astype(np.float32), random.normal(size=(4, 7)).astype(np.float32), 4)
    assert not b[:, 1:].any()
    assert np.allclose(a[1:] @ a[1:].T, np.eye(3), atol=1e-6)


def test_a_start_with_b_zero_is_cut_to_orthonormal_rows_of_its_own_a() -> None:
    start = np.linalg.qr(np.random.default_rng(4).normal(size=(20, 4)))[0].T.astype(np.float32)
    b, a = truncate(np.zeros((9, 4), dtype=np.float32), start, 2)
    assert not b.any()
    assert np.allclose(a @ a.T, np.eye(2), atol=1e-6)
    assert np.allclose(a @ start.T @ start, a, atol=1e-6)


def test_the_dense_matrix_is_not_formed_while_the_stack_is_smaller() -> None:
    random = np.random.default_rng(5)
    side, rank = 1500, 4
    factors = [random.normal(size=(side, rank)).astype(np.float32) for _ in range(4)]
    terms = [(0.25, b, b.T) for b in factors]
    stack = 2 * 8 * side * rank * len(terms)
    tracemalloc.start()
    try:
        best_of_rank(terms, rank)
        norms_of_sums(terms[:-1], terms[-1])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 6 * stack < side * side * 8 / 3
