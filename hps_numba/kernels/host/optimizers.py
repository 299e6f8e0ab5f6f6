"""Train rows in host memory: one step of an optimizer on the rows of distinct keys, and rows for keys that are new.

Everything is float32 and in a fixed order, so that a step gives the same bits however its rows are divided among threads.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.hashing import index_hash
from hps_numba.kernels.host.atomics import (
    copy_row,
    fill_row,
    full_fence,
    load_float,
    load_word,
    prefetch_row,
    store_float,
    stream_row,
)
from hps_numba.kernels.host.row_math import adam_row, add_to_row, step_row, sum_of_squares

__all__ = ["BLOCK", "LEVELS", "adagrad_rows", "adam_rows", "normal_rows", "sgd_rows", "sum_rows", "uniform_rows"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_11 = np.uint64(11)
_UNIT = 1.0 / (1 << 53)
_AHEAD = 8  # rows between the prefetch of a row and its use

#: Sums are taken in blocks: so many rows, one after the other; then the sums of blocks likewise, until there is one. So a
#: device has many threads for a key that is in a tenth of a batch, and rounding errors grow with the logarithm of the rows.
BLOCK = 64
LEVELS = 11  # of blocks of blocks: 64 ** 10 rows of a key


@host_kernel
def sum_rows(rows, stride, dim, order, starts, out, sums, start, stop):
    """``out[i]`` is the sum of the rows of ``order[j]`` for j from ``starts[i]`` to ``starts[i + 1]``, in blocks (``BLOCK``).

    Args:
        rows: address of float32 rows, ``stride`` bytes apart.   order: int64 ``[n]``.   starts: int64 ``[m + 1]``.
        sums: address of float32 ``[LEVELS, dim]``, for what is not summed up yet.   start, stop: of the ``m`` sums.

    **Writes:** sums; out, address of float32 ``[m, dim]``.
    """
    size = 4 * dim
    counts = np.zeros(LEVELS, np.int64)
    for i in range(start, stop):
        counts[:] = 0
        for number in range(starts[i], starts[i + 1]):
            if number + _AHEAD < starts[stop]:
                prefetch_row(rows + stride * order[number + _AHEAD], size)
            source, level = rows + stride * order[number], 0
            while True:  # a full block becomes a row of the next level
                if counts[level] == 0:
                    copy_row(sums + size * level, source, size)
                else:
                    add_to_row(sums + size * level, source, size)
                counts[level] += 1
                if counts[level] < BLOCK:
                    break
                counts[level] = 0
                source = sums + size * level
                level += 1
        total, level = np.int64(0), 0
        for level in range(LEVELS):  # the blocks that are not full, the lowest level first
            if counts[level] > 0:
                if total != 0:
                    add_to_row(sums + size * level, total, size)
                total = sums + size * level
        if total != 0:
            copy_row(out + size * i, total, size)
        else:
            fill_row(out + size * i, np.float32(0.0), size)


@host_function
def _prefetch_later(places, i, stop, size):
    """Ask for the row, of ``size`` bytes, of a later position; ``places`` is the address of the addresses of rows."""
    if i + _AHEAD < stop:
        prefetch_row(load_word(places + 8 * (i + _AHEAD)), size)


@host_function
def _is_streamed(new, size, keep):
    """A row is made over its gradient, where it stays, and written past the caches: the old content is not read for it."""
    return keep and (new | size) & 63 == 0


@host_function
def _hand_on(new, gradient, size, keep):
    """Copy a row that was made over its gradient to its place, or one that was made there over the gradient to ``keep``."""
    if _is_streamed(new, size, keep):
        stream_row(new, gradient, size)
    elif keep:
        copy_row(gradient, new, size)


@host_kernel
def sgd_rows(rows, to, gradients, dim, states, states_to, start, stop, keep, rate):
    """``row - rate * gradient`` for rows ``start`` to ``stop``. All optimizers have these arguments, but for their settings.

    Args:
        rows, to: addresses of the int64 addresses of rows before and after; they may be the same rows.
        gradients: address of float32 ``[n, dim]``.
        states, states_to: as ``rows`` and ``to``, of the states; not read where there is none.
        keep: whether the new row takes the place of the gradient too.

    **Writes:** rows, states, and with ``keep`` gradients.
    """
    size = 4 * dim
    for i in range(start, stop):
        _prefetch_later(rows, i, stop, size)
        new, gradient = load_word(to + 8 * i), gradients + size * i
        streamed = _is_streamed(new, size, keep)
        if not streamed:
            _prefetch_later(to, i, stop, size)
        step_row(gradient if streamed else new, load_word(rows + 8 * i), gradient, rate, size)
        _hand_on(new, gradient, size, keep)
    full_fence()


@host_kernel
def adagrad_rows(rows, to, gradients, dim, states, states_to, start, stop, keep, rate, epsilon):
    """Row-wise Adagrad: the state, one float32, sums the mean square of a row's gradient.

    As ``sgd_rows``; squares are added as ``row_math.sum_of_squares`` does.   **Writes:** rows, states, with ``keep`` gradients.
    """
    size = 4 * dim
    for i in range(start, stop):
        _prefetch_later(rows, i, stop, size)
        _prefetch_later(states, i, stop, 4)
        new, gradient = load_word(to + 8 * i), gradients + size * i
        streamed = _is_streamed(new, size, keep)
        if not streamed:
            _prefetch_later(to, i, stop, size)
        total = load_float(load_word(states + 8 * i)) + sum_of_squares(gradient, size) / np.float32(dim)
        store_float(load_word(states_to + 8 * i), total)
        made = gradient if streamed else new
        step_row(made, load_word(rows + 8 * i), gradient, rate / (np.sqrt(total) + epsilon), size)
        _hand_on(new, gradient, size, keep)
    full_fence()


@host_kernel
def adam_rows(rows, to, gradients, dim, states, states_to, start, stop, keep, rate, epsilon, forget, forget_squares):
    """Adam on the rows that have a gradient: a state is ``2 * dim`` float32, the means of gradients and of their squares.

    As ``sgd_rows``; ``rate`` includes the bias corrections; ``forget`` and ``forget_squares`` are 1 - beta1 and 1 - beta2.

    **Writes:** rows, states, and with ``keep`` gradients.
    """
    size = 4 * dim
    for i in range(start, stop):
        _prefetch_later(rows, i, stop, size)
        _prefetch_later(states, i, stop, 2 * size)
        new, gradient = load_word(to + 8 * i), gradients + size * i
        streamed = _is_streamed(new, size, keep)
        if not streamed:
            _prefetch_later(to, i, stop, size)
        state, old_state = load_word(states_to + 8 * i), load_word(states + 8 * i)
        made = gradient if streamed else new
        adam_row(made, load_word(rows + 8 * i), gradient, state, old_state, rate, epsilon, forget, forget_squares, size)
        _hand_on(new, gradient, size, keep)
    full_fence()


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
