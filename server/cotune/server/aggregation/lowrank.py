"""Sums of products B A by their factors: QR of the stacked factors, then an SVD of the small core.

    sum_i c_i B_i A_i = [c_1 B_1 ... c_k B_k] [A_1; ...; A_k] = Q_B (R_B R_A^T) Q_A^T

The (out, in) matrix is formed only for a sum whose stacked rank exceeds min(out, in): there it is the smaller of
the two. Inside all is float64; results are fp32. The stacked factors of one module are held once: each QR is made in
their memory, and Q is never formed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import get_lapack_funcs, qr, svd

from cotune.server.aggregation.updates import Matrix, Term
from cotune.shared.adapter import Vector

Reflectors = tuple[Matrix, Matrix]
"""Q of a QR as LAPACK's geqrf leaves it: Householder vectors (n, m), and their scales (m,)."""
LOSSLESS = 1e-9  # singular values below this share of the largest are far below what fp32 can hold


def best_of_rank(terms: Iterable[Term], rank: int) -> tuple[Vector, Vector]:
    """The matrix of this rank nearest to a sum of products, as balanced factors (Eckart and Young 1936).

    Args:
        terms: At least one; all of the same (out, in).
        rank: Of the result. Components beyond min(out, in) or the stacked rank are zero.

    Returns:
        B = U S^1/2 of shape (out, rank) and A = S^1/2 V^T of shape (rank, in), in falling order; the largest entry
        of each column of B is positive. A component whose singular value is zero has a zero column in B and a row
        of length 1 in A, as before the first round: were both zero, no gradient could ever reach it.
    """
    left, values, right = _components(terms, rank)
    root = np.sqrt(values)
    b, a = left * root, right * np.where(values > 0, root, 1.0)[:, None]
    missing = rank - len(values)
    return _single(np.pad(b, [(0, 0), (0, missing)])), _single(np.pad(a, [(0, missing), (0, 0)]))


def truncate(b: NDArray[np.floating], a: NDArray[np.floating], rank: int) -> tuple[Vector, Vector]:
    """The product of B (out, r) and A (r, in) at this rank: see `best_of_rank`."""
    return best_of_rank([(1.0, b, a)], rank)


def lossless(terms: Iterable[Term]) -> tuple[Vector, Vector]:
    """A sum of products as balanced factors of its own rank, at most min(out, in); 0 for a sum of zero."""
    left, values, right = _components(terms, None)
    kept = int(np.sum(values > LOSSLESS * values.max(initial=0.0)))
    root = np.sqrt(values[:kept])
    return _single(left[:, :kept] * root), _single(right[:kept] * root[:, None])


def norms_of_sums(terms: Iterable[Term], more: Term) -> tuple[float, float]:
    """Frobenius norms of a sum of products, and of it with one more; 0 where nothing but rounding is left."""
    left, right, floor = _gathered(terms)
    b, a = _factors(more)
    if right is None:
        whole = left + b.T @ a
    else:
        rank = len(right)
        _append(left, b)
        _append(right, a)
        left, right = _reflected(left)[1], _reflected(right)[1]
        whole, left = left @ right.T, left[:, :rank] @ right[:, :rank].T
    return _norm(left, floor), _norm(whole, floor + _rounding(b, a))


def _factors(term: Term) -> tuple[Matrix, Matrix]:
    """Both factors by rows, the coefficient in the first: (r, out) and (r, in)."""
    weight, b, a = term
    return weight * np.ascontiguousarray(b.T, dtype=np.float64), np.ascontiguousarray(a, dtype=np.float64)


def _rounding(b: Matrix, a: Matrix) -> float:
    """The level of rounding of a product of factors by rows.

    QR rounds each column in proportion to its length, so the level is in proportion to the sum of
    |column of B| |row of A|, however unlike the scales of B and A are.
    """
    sizes = np.linalg.norm(b, axis=1) @ np.linalg.norm(a, axis=1)
    return 4 * max(b.shape[1], a.shape[1]) * float(np.finfo(np.float64).eps) * float(sizes)


def _norm(array: Matrix, floor: float) -> float:
    norm = float(np.linalg.norm(array))
    return norm if norm > floor else 0.0


def _gathered(terms: Iterable[Term]) -> tuple[Matrix, Matrix | None, float]:
    """The stacked factors by rows, (m, out) and (m, in), or the dense sum (out, in) and None; the level of rounding."""
    left, right = np.empty((0, 0)), np.empty((0, 0))
    dense: Matrix | None = None
    rank, floor = 0, 0.0
    for b, a in map(_factors, terms):
        _append(left, b)
        _append(right, a)
        floor += _rounding(b, a)
        rank += len(a)
        if rank > min(b.shape[1], a.shape[1]):
            more = left.T @ right
            dense = more if dense is None else dense + more
            left, right = np.empty((0, 0)), np.empty((0, 0))
    return (left, right, floor) if dense is None else (dense, None, floor)


def _append(stack: Matrix, rows: Matrix) -> None:
    """Put rows at the end of a stack of which there is no view; a list of parts would be held beside their stack."""
    start = len(stack)
    stack.resize((start + len(rows), rows.shape[1]), refcheck=False)
    stack[start:] = rows


def _components(terms: Iterable[Term], rank: int | None) -> tuple[Matrix, Matrix, Matrix]:
    """The first `rank` (None: all) singular vectors and values: U (out, m), S (m,), V^T (m, in)."""
    left, right, floor = _gathered(terms)
    if right is None:
        u, values, vt = np.linalg.svd(left, full_matrices=False)
        u, vt = u[:, :rank], vt[:rank]
    else:
        basis, rows, core = _core(left, right)
        u, values, vt = svd(core, overwrite_a=True, check_finite=False)
        u, vt = _turned(basis, u[:, :rank]), _turned(rows, vt[:rank].T).T
    values = np.where(values > floor, values, 0.0)[:rank]
    largest = np.take_along_axis(u, np.abs(u).argmax(axis=0)[None], axis=0)[0]
    signs = np.where(largest < 0, -1.0, 1.0)
    return u * signs, values, vt * signs[:, None]


def _core(left: Matrix, right: Matrix) -> tuple[Reflectors, Reflectors, Matrix]:
    """Q_B, Q_A, and R_B R_A^T (m, m) between them."""
    (basis, inner), (rows, outer) = _reflected(left), _reflected(right)
    return basis, rows, inner @ outer.T


def _reflected(rows: Matrix) -> tuple[Reflectors, Matrix]:
    """QR of a stack (m, n) as columns (n, m), in its memory: Q, and R (min(m, n), m)."""
    found: Any = qr(rows.T, mode="raw", overwrite_a=True, check_finite=False)
    return found


def _turned(reflectors: Reflectors, part: Matrix) -> Matrix:
    """Q (n, m) times `part` (m, c)."""
    packed, scales = reflectors
    [ormqr] = get_lapack_funcs(("ormqr",), (packed,))
    product = np.zeros((len(packed), part.shape[1]), order="F")
    product[: len(part)] = part
    return ormqr("L", "N", packed, scales, product, 64 * max(1, part.shape[1]), overwrite_c=True)[0]


def _single(array: Matrix) -> Vector:
    return np.ascontiguousarray(array, dtype=np.float32)
