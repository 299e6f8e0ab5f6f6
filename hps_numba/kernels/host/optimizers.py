"""Train rows in host memory: one step of an optimizer on the rows of distinct keys, and rows for keys that are new.

Everything is float32 and in a fixed order, so that a step gives the same bits however its rows are divided among threads.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.hashing import index_hash

__all__ = ["adagrad_rows", "adam_rows", "normal_rows", "sgd_rows", "sum_rows", "uniform_rows"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_11 = np.uint64(11)
_UNIT = 1.0 / (1 << 53)


@host_kernel
def sum_rows(rows, order, starts, out, start, stop):
    """``out[i]`` is the sum of ``rows[order[j]]`` for j from ``starts[i]`` to ``starts[i + 1]``, in that order.

    Args:
        rows: float32 ``[n, dim]``.   order: int64 ``[n]``.   starts: int64 ``[m + 1]``.   start, stop: of the ``m`` sums.

    **Writes:** out, float32 ``[m, dim]``.
    """
    for i in range(start, stop):
        for j in range(rows.shape[1]):
            out[i, j] = rows[order[starts[i]], j]
        for number in range(starts[i] + 1, starts[i + 1]):
            row = order[number]
            for j in range(rows.shape[1]):
                out[i, j] += rows[row, j]


@host_kernel
def sgd_rows(rows, gradients, state, start, stop, rate):
    """``row -= rate * gradient`` for rows ``start`` to ``stop``; float32 ``[n, dim]``, no state.   **Writes:** rows."""
    for i in range(start, stop):
        for j in range(rows.shape[1]):
            rows[i, j] -= rate * gradients[i, j]


@host_kernel
def adagrad_rows(rows, gradients, state, start, stop, rate, epsilon):
    """Row-wise Adagrad: ``state`` float32 ``[n, 1]`` sums the mean square of a row's gradient.   **Writes:** rows, state."""
    dim = rows.shape[1]
    for i in range(start, stop):
        squares = np.float32(0.0)
        for j in range(dim):
            squares += gradients[i, j] * gradients[i, j]
        state[i, 0] += squares / np.float32(dim)
        factor = rate / (np.sqrt(state[i, 0]) + epsilon)
        for j in range(dim):
            rows[i, j] -= factor * gradients[i, j]


@host_kernel
def adam_rows(rows, gradients, state, start, stop, rate, epsilon, forget, forget_squares):
    """Adam on the rows that have a gradient: ``state`` float32 ``[n, 2 * dim]``, the means of gradients and of their squares.

    ``rate`` includes the bias corrections; ``forget`` and ``forget_squares`` are 1 - beta1 and 1 - beta2.

    **Writes:** rows, state.
    """
    dim = rows.shape[1]
    for i in range(start, stop):
        for j in range(dim):
            gradient = gradients[i, j]
            mean = state[i, j] + (gradient - state[i, j]) * forget
            square = state[i, dim + j] + (gradient * gradient - state[i, dim + j]) * forget_squares
            state[i, j] = mean
            state[i, dim + j] = square
            rows[i, j] -= rate * mean / (np.sqrt(square) + epsilon)


@host_function
def _unit_of(seed, key, number):
    """A number of 53 bits in [0, 1), determined by seed, key and position of the element."""
    bits = index_hash(index_hash(key ^ seed) + number * _GOLDEN)
    return np.float64(bits >> _11) * _UNIT


@host_kernel
def uniform_rows(keys, rows, seed, bound):
    """Rows of numbers between -bound and bound, the same for a key every time.   **Writes:** rows.

    Args:
        keys: uint64 ``[n]``.   rows: float32 ``[n, dim]``.   seed: uint64.
    """
    for i in range(len(keys)):
        for j in range(rows.shape[1]):
            rows[i, j] = np.float32((2.0 * _unit_of(seed, keys[i], np.uint64(j + 1)) - 1.0) * bound)


@host_kernel
def normal_rows(keys, rows, seed, deviation):
    """Rows of normal numbers (G. E. P. Box, M. E. Muller, 1958), the same for a key every time.   **Writes:** rows."""
    for i in range(len(keys)):
        for j in range(rows.shape[1]):
            radius = np.sqrt(-2.0 * np.log(1.0 - _unit_of(seed, keys[i], np.uint64(2 * j + 1))))
            angle = 2.0 * np.pi * _unit_of(seed, keys[i], np.uint64(2 * j + 2))
            rows[i, j] = np.float32(radius * np.cos(angle) * deviation)
