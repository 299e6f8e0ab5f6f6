"""Pooled rows as TensorFlow 2.21's kernels for the CPU compute them (x86-64), one NumPy operation for each of theirs."""

from __future__ import annotations

import numpy as np

__all__ = ["LENGTHS", "clipped_row", "odd_rows", "pooled_row", "same_bits"]

#: rows of bags at which the order changes
LENGTHS = (1, 2, 3, 0, 7, 8, 9, 10, 11, 15, 16, 17, 18, 19, 20, 0, 23, 24, 25, 32, 63, 64, 65, 66, 199, 200, 1)


def odd_rows(n: int, dim: int) -> np.ndarray:
    """``n`` rows of very different sizes; the first eight hold zeros of both signs, NaN, infinities and what overflows."""
    random = np.random.default_rng(dim)
    rows = (random.normal(size=(n, dim)) * 10.0 ** random.integers(-3, 3, (n, 1))).astype(np.float32)
    rows[0], rows[1], rows[2, ::3] = 0.0, -0.0, -0.0
    rows[3, dim // 2], rows[4, -1] = np.nan, np.inf
    rows[5], rows[6], rows[7] = 1e30, 1e-30, 1e-42
    return rows


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal, zeros of both signs apart; any NaN equals any other."""
    nan = np.isnan(one)
    if one.shape != other.shape or not np.array_equal(nan, np.isnan(other)):
        return False
    return np.where(nan, np.float32(0), one).tobytes() == np.where(nan, np.float32(0), other).tobytes()


def _in_order(rows: np.ndarray, first: np.ndarray | None = None) -> np.ndarray:
    sums = np.zeros(rows.shape[1], np.float32) if first is None else first
    for row in rows:
        sums = sums + row
    return sums


def clipped_row(row: np.ndarray, bound: float) -> np.ndarray:
    """``tf.clip_by_norm`` of a row of up to 8,192 elements."""
    squares, dim = row * row, len(row)
    by_four = dim // 32 * 32
    four = [_in_order(squares[:by_four].reshape(-1, 4, 8)[:, k]) for k in range(4)]
    lanes = _in_order(squares[by_four : dim // 8 * 8].reshape(-1, 8), ((four[0] + four[1]) + four[2]) + four[3])
    rest = np.float32(0)
    for square in squares[dim // 8 * 8 :]:
        rest = rest + square
    half = lanes[:4] + lanes[4:]
    total = rest + ((half[0] + half[2]) + (half[1] + half[3]))
    norm = np.sqrt(total) if total > 0 else total
    clipped: np.ndarray = (row * np.float32(bound)) / np.maximum(norm, np.float32(bound))
    return clipped


def pooled_row(rows: np.ndarray, weights: np.ndarray | None, combiner: str) -> np.ndarray:
    """One row of ``tf.nn.embedding_lookup_sparse`` from those of its ids, squares of weights as a graph computes them."""
    n = len(rows)
    if not n:
        return np.zeros(rows.shape[1], np.float32)
    return _unweighted(rows, n, combiner) if weights is None else _weighted(rows, n, weights, combiner)


def _unweighted(rows: np.ndarray, n: int, combiner: str) -> np.ndarray:
    if n == 1:
        return rows[0].copy()
    first = n % 8 if n % 8 >= 2 else n % 8 + 8
    divisor = np.float32(n) if combiner == "mean" else np.sqrt(np.float32(n))
    sums = _in_order(rows[1:first], rows[0])
    if combiner != "sum" and n < 10:
        return sums * (np.float32(1) / divisor)
    for start in range(first, n, 8):
        sums = sums + _in_order(rows[start + 1 : start + 8], rows[start])
    return sums if combiner == "sum" else sums / divisor


def _weighted(rows: np.ndarray, n: int, weights: np.ndarray, combiner: str) -> np.ndarray:
    terms, whole, by_four = rows * weights[:, None], rows.shape[1] // 8 * 8, n // 4 * 4
    if n == 1:
        sums = terms[0]
    elif n < 16:
        sums = _in_order(terms)
    else:
        four = [_in_order(terms[k:by_four:4, :whole]) for k in range(4)]
        left = _in_order(terms[by_four:, :whole], ((four[0] + four[1]) + four[2]) + four[3])
        sums = np.concatenate([left, _in_order(terms[:, whole:])])
    if combiner == "sum":
        return sums
    total = _in_order((weights if combiner == "mean" else weights * weights)[:, None])[0]
    if total == 0:
        return np.zeros(rows.shape[1], np.float32)
    return sums / (np.sqrt(total) if combiner == "sqrtn" else total)
