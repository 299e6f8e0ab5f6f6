"""Pool rows of a host store: the rows of each bag of keys, combined to one row, without storing the rows in between.

Sums are those of TensorFlow 2.21's kernels for the CPU (x86-64), bit for bit. All is float32, every operation is rounded by
itself, and the order is this:

* *Without weights* (``SparseSegmentSum``, ``Mean``, ``SqrtN``): of ``n`` rows the first ``n % 8`` are added one by one, or 8
  more if that is less than 2. Then come groups of 8, each added up by itself. Below 10 rows a mean is multiplied by ``1 / n``
  and a sqrtn by ``1 / sqrt(n)``; from 10 on they are divided by ``n`` or ``sqrt(n)``.
* *With weights* (``Mul``, then ``SegmentSum``): rows times their weights are added one by one. From 16 rows on, the columns
  that fill whole groups of 8 have four sums, of every fourth row; these are added up, and then the last ``n % 4`` rows.
  Weights, or their squares, are added one by one; 0 divided by 0 is 0.
* *Clipping* (``clip_by_norm``): ``row * bound / max(norm, bound)``. The squares of a row are added in lanes of 8, four at a
  time, and then the rest one by one.

*Not reproduced:* norms of rows of more than 8,192 elements, which TensorFlow halves at a place that depends on the other rows;
and ``tf.pow(weights, 2)``, which TensorFlow computes inexactly unless a graph is optimized (``frontends.tensorflow.lookup``
leaves that division to TensorFlow). A maximum, which TensorFlow does not have, is taken in order of position; NaN stays NaN.
"""

from __future__ import annotations

import numba
import numpy as np

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.host.atomics import (
    array_address,
    float_pointer,
    load_word,
    load_word_acquire,
    prefetch_row,
    store_word,
)
from hps_numba.kernels.host.lookup import count_lookup, find_words, touch_recency
from hps_numba.kernels.host.probe import enter_epoch, leave_epoch, slot_of
from hps_numba.kernels.layouts.host_store import (
    META_RECENCY,
    META_RECENCY_MODE,
    META_ROWS,
    RECENCY_NONE,
)
from hps_numba.kernels.layouts.pooling import MAX, SQRTN, SUM

__all__ = ["bag_starts", "host_pool"]

_AHEAD = 16  # keys between the prefetch of a row and its use
_BATCH = 1024  # keys whose index words are found before their rows are read
_LANES = 8  # columns, or elements of a row, that TensorFlow adds at a time
_GROUP = 8  # rows without weights that are added up by themselves
_MOST_WAITING = _GROUP + 1  # rows that wait to be added
_FEWEST_DIVIDED = 10  # rows from which on a mean is divided
_FEWEST_IN_FOUR = 16  # rows with weights from which on there are four sums


@host_function
def _floats(address, n):
    return numba.carray(float_pointer(address), n)


@host_function
def _fill(target, n, value):
    """**Writes:** target."""
    values = _floats(target, n)
    for j in range(n):
        values[j] = value


@host_function
def _add(target, source, n):
    """**Writes:** target."""
    sums, row = _floats(target, n), _floats(source, n)
    for j in range(n):
        sums[j] += row[j]


@host_function
def _add_weighted(target, source, n, weight):
    """**Writes:** target."""
    sums, row = _floats(target, n), _floats(source, n)
    for j in range(n):
        sums[j] += row[j] * weight


@host_function
def _add_two(target, source, other, n, weight, other_weight):
    """**Writes:** target."""
    sums, row, second = _floats(target, n), _floats(source, n), _floats(other, n)
    for j in range(n):
        sums[j] = (sums[j] + row[j] * weight) + second[j] * other_weight


@host_function
def _take_larger(target, source, n):
    """**Writes:** target."""
    sums, row = _floats(target, n), _floats(source, n)
    for j in range(n):
        value, before = row[j], sums[j]
        sums[j] = value if (value > before) | (value != value) else before


@host_function
def _sum_of_squares(source, dim, scratch):
    """The sum of the squares of a row.   **Writes:** scratch, four times ``_LANES`` float32."""
    row, lanes = _floats(source, dim), _floats(scratch, 4 * _LANES)
    by_four = dim // (4 * _LANES) * (4 * _LANES)
    for j in range(_LANES):
        lanes[j] = np.float32(0.0)
    if by_four:
        for j in range(_LANES, 4 * _LANES):
            lanes[j] = np.float32(0.0)
        for start in range(0, by_four, 4 * _LANES):
            for j in range(4 * _LANES):
                lanes[j] += row[start + j] * row[start + j]
        for j in range(_LANES):
            lanes[j] = lanes[j] + lanes[j + _LANES] + lanes[j + 2 * _LANES] + lanes[j + 3 * _LANES]
    whole = dim // _LANES * _LANES
    for start in range(by_four, whole, _LANES):
        for j in range(_LANES):
            lanes[j] += row[start + j] * row[start + j]
    rest = np.float32(0.0)
    for j in range(whole, dim):
        rest += row[j] * row[j]
    for j in range(4):
        lanes[j] += lanes[j + 4]
    return rest + ((lanes[0] + lanes[2]) + (lanes[1] + lanes[3]))


@host_function
def _clip(target, source, dim, bound, scratch):
    """A row whose norm is at most ``bound``; NaN for a row of zeros and a bound of 0, as in TensorFlow.

    **Writes:** target, scratch.
    """
    squares = _sum_of_squares(source, dim, scratch)
    norm = np.sqrt(squares) if squares > np.float32(0.0) else squares
    divisor = bound if norm <= bound else norm  # NaN stays NaN
    row, clipped = _floats(source, dim), _floats(target, dim)
    for j in range(dim):
        clipped[j] = (row[j] * bound) / divisor


@host_function
def _begin_sums(target, waiting, n, dim):
    """The sum of the first ``n`` rows of a bag, added one by one.   **Writes:** target."""
    sums, first = _floats(target, dim), _floats(load_word(waiting), dim)
    if n == 1:
        for j in range(dim):
            sums[j] = first[j]
        return
    second = _floats(load_word(waiting + 8), dim)
    for j in range(dim):
        sums[j] = first[j] + second[j]
    for k in range(2, n - 1, 2):
        first, second = _floats(load_word(waiting + 8 * k), dim), _floats(load_word(waiting + 8 * k + 8), dim)
        for j in range(dim):
            sums[j] = (sums[j] + first[j]) + second[j]
    if n % 2 == 1:
        _add(target, load_word(waiting + 8 * (n - 1)), dim)


@host_function
def _add_group(target, waiting, dim):
    """Add the sum of ``_GROUP`` rows.   **Writes:** target."""
    sums = _floats(target, dim)
    row0, row1 = _floats(load_word(waiting), dim), _floats(load_word(waiting + 8), dim)
    row2, row3 = _floats(load_word(waiting + 16), dim), _floats(load_word(waiting + 24), dim)
    row4, row5 = _floats(load_word(waiting + 32), dim), _floats(load_word(waiting + 40), dim)
    row6, row7 = _floats(load_word(waiting + 48), dim), _floats(load_word(waiting + 56), dim)
    for j in range(dim):
        half = ((row0[j] + row1[j]) + row2[j]) + row3[j]
        sums[j] += (((half + row4[j]) + row5[j]) + row6[j]) + row7[j]


@host_function
def _add_in_order(target, waiting, n, at, width, weights):
    """Add ``width`` columns, from byte ``at`` on, of ``n`` rows times their weights, one row after the other.

    **Writes:** target.
    """
    factors = _floats(weights, n)
    for k in range(0, n - 1, 2):
        row, other = load_word(waiting + 8 * k) + at, load_word(waiting + 8 * k + 8) + at
        _add_two(target + at, row, other, width, factors[k], factors[k + 1])
    if n % 2 == 1:
        _add_weighted(target + at, load_word(waiting + 8 * (n - 1)) + at, width, factors[n - 1])


@host_function
def _begin_weighted(target, waiting, n, dim, weights):
    """The sum of the first ``n`` rows of a bag times their weights, one row after the other.   **Writes:** target."""
    sums, first, factors = _floats(target, dim), _floats(load_word(waiting), dim), _floats(weights, n)
    if n == 1:
        for j in range(dim):
            sums[j] = first[j] * factors[0]
        return
    second = _floats(load_word(waiting + 8), dim)
    for j in range(dim):  # TensorFlow begins with 0.0, except for a row that is alone: 0.0 + -0.0 is 0.0
        sums[j] = (np.float32(0.0) + first[j] * factors[0]) + second[j] * factors[1]
    _add_in_order(target, waiting + 16, n - 2, 0, dim, weights + 8)


@host_function
def _add_in_four(target, fours, waiting, n, dim, weights, done, count):
    """Add the next 8, 4 or last rows of a bag of ``count``, so many that the columns that fill groups have four sums.

    ``fours``: three of the sums, one after the other; the first is ``target``.   **Writes:** target, fours.
    """
    whole, factors = dim // _LANES * _LANES, _floats(weights, n)
    if done == 0:
        _fill(target, dim, np.float32(0.0))
        _fill(fours, 3 * dim, np.float32(0.0))
    if n < 4:
        _add_in_order(target, waiting, n, 0, whole, weights)
    else:
        for lane in range(4):
            sums = target if lane == 0 else fours + 4 * dim * (lane - 1)
            row = load_word(waiting + 8 * lane)
            if n == 8:
                _add_two(sums, row, load_word(waiting + 8 * lane + 32), whole, factors[lane], factors[lane + 4])
            else:
                _add_weighted(sums, row, whole, factors[lane])
        if done + n == count // 4 * 4:
            for k in range(3):
                _add(target, fours + 4 * dim * k, whole)
    if whole < dim:
        _add_in_order(target, waiting, n, 4 * whole, dim - whole, weights)


@host_function
def _rows_at_a_time(done, count, weighted, combiner):
    """How many rows of a bag of ``count`` are added at once, after ``done`` of them."""
    left = count - done
    if weighted or combiner == MAX:
        if combiner == MAX or count < _FEWEST_IN_FOUR or left < 4:
            return min(left, _GROUP)
        return 8 if left >= 8 else 4
    if done > 0 or count == 1:
        return min(left, _GROUP)
    return count % _GROUP if count % _GROUP >= 2 else count % _GROUP + _GROUP


@host_function
def _add_rows(target, fours, waiting, n, dim, weights, combiner, done, count):
    """Add the next ``n`` rows of a bag of ``count``, whose addresses are at ``waiting``.   **Writes:** target, fours.

    ``weights``: address of theirs, or 0.
    """
    if combiner == MAX:
        if done == 0:
            _begin_sums(target, waiting, 1, dim)
        for k in range(1 if done == 0 else 0, n):
            _take_larger(target, load_word(waiting + 8 * k), dim)
    elif weights == 0:
        if done == 0:
            _begin_sums(target, waiting, n, dim)
        else:
            _add_group(target, waiting, dim)
    elif count >= _FEWEST_IN_FOUR:
        _add_in_four(target, fours, waiting, n, dim, weights, done, count)
    elif done == 0:
        _begin_weighted(target, waiting, n, dim, weights)
    else:
        _add_in_order(target, waiting, n, 0, dim, weights)


@host_function
def _end_bag(target, dim, weights, count, combiner):
    """Divide the sums of a bag of ``count`` rows by what its combiner says.   **Writes:** target.

    ``weights``: address of those of the bag, or 0.
    """
    if combiner in (SUM, MAX) or (count == 1 and weights == 0):
        return
    total = np.float32(count)
    if weights != 0:
        total = np.float32(0.0)
        factors = _floats(weights, count)
        for i in range(count):
            total += factors[i] * factors[i] if combiner == SQRTN else factors[i]
        if total == np.float32(0.0):
            _fill(target, dim, np.float32(0.0))
            return
    divisor = np.sqrt(total) if combiner == SQRTN else total
    sums = _floats(target, dim)
    if weights != 0 or count >= _FEWEST_DIVIDED:
        for j in range(dim):
            sums[j] /= divisor
    else:
        factor = np.float32(1.0) / divisor
        for j in range(dim):
            sums[j] *= factor


@host_function
def _skip_empty(offsets, bag, stop, out, dim):
    """The first bag from ``bag`` to ``stop`` that is not empty, else ``stop``; those before it get 0.   **Writes:** out."""
    while bag < stop and load_word(offsets + 8 * bag) == load_word(offsets + 8 * (bag + 1)):
        _fill(out + 4 * dim * bag, dim, np.float32(0.0))
        bag += 1
    return bag


@host_kernel
def host_pool(
    header, keys, offsets, weights, first, stop, dim, out, combiner, default, bound, side, side_rows, misses, epoch, record,
    now, counters,
):  # fmt: skip
    """Write the pooled row of each of the bags ``first`` to ``stop``.

    Args (addresses and counts are int64):
        header: of the store, or 0: there is none.   keys: int64 keys.   offsets: int64, where bags begin, one more than bags.
        weights: float32, one a key, or 0: there are none.   out: float32 rows of ``dim``, one a bag; an empty bag gets 0.
        combiner: SUM, MEAN, SQRTN or MAX of ``layouts.pooling``; a maximum takes no weights.
        default: float32 that fills the row of a key that is in no tier.
        bound: float32; rows are clipped to this norm before they are weighted; negative leaves them.
        side, side_rows: where a key that the store lacks has a row: int64 row numbers, one a key, -1 for none; or 0.
        misses: int64, as many as keys: positions of keys that the store lacks, from that of the first key on; or 0.
        epoch, record, now, counters: as in ``kernels.host.lookup``.

    Returns the number of keys that the store lacks, or -1 if it is closed.   **Writes:** out, misses, recency words, counters.
    """
    begin, end = load_word(offsets + 8 * first), load_word(offsets + 8 * stop)
    row_bytes = 4 * dim
    block, rows, recency, mode = np.int64(0), np.int64(0), np.int64(0), np.int64(RECENCY_NONE)
    if header != 0:
        enter_epoch(epoch, record)
        block = load_word_acquire(header)
        if block == 0:
            leave_epoch(record)
            return -1
        rows, recency = load_word(block + META_ROWS), load_word(block + META_RECENCY)
        mode = load_word(block + META_RECENCY_MODE) if now >= 0 else np.int64(RECENCY_NONE)
    room = max(1, min(_BATCH, end - begin))
    words, late = np.zeros(room, np.int64), np.empty(room, np.int64)
    weighted, clips = weights != 0 and combiner != MAX, bound >= np.float32(0.0)
    absent, waiting = np.full(dim, default, np.float32), np.empty(_MOST_WAITING, np.int64)  # addresses of rows yet to be added
    fours = np.empty(3 * dim if weighted else 0, np.float32)
    lanes, clipped = np.empty(4 * _LANES, np.float32), np.empty(_MOST_WAITING * dim if clips else 0, np.float32)
    missing, held, done, count, step = 0, 0, 0, end - end, end - end
    bag, bag_end = _skip_empty(offsets, first, stop, out, dim), begin
    for start in range(begin, end, _BATCH):
        n = min(_BATCH, end - start)
        if header != 0:
            find_words(block, keys + 8 * start, n, words, late)
        for i in range(-_AHEAD, n):
            if header != 0 and i + _AHEAD < n:
                prefetch_row(rows + slot_of(words[i + _AHEAD]) * row_bytes, row_bytes)
            if i < 0:
                continue
            position = start + i
            if position == bag_end:
                bag_end = load_word(offsets + 8 * (bag + 1))
                count, done = bag_end - position, 0
                step = _rows_at_a_time(0, count, weighted, combiner)
            slot = slot_of(words[i]) if header != 0 else np.int64(-1)
            if slot >= 0:
                row = rows + slot * row_bytes
                touch_recency(recency, mode, slot, now)
            else:
                if misses != 0:
                    store_word(misses + 8 * (begin + missing), position)
                missing += 1
                number = load_word(side + 8 * position) if side != 0 else np.int64(-1)
                row = side_rows + number * row_bytes if number >= 0 else array_address(absent)
            if clips:
                target = array_address(clipped) + held * row_bytes
                _clip(target, row, dim, bound, array_address(lanes))
                row = target
            waiting[held] = row
            held += 1
            if held == step:
                target = out + row_bytes * bag
                given = weights + 4 * (position + 1 - held) if weighted else np.int64(0)
                _add_rows(target, array_address(fours), array_address(waiting), held, dim, given, combiner, done, count)
                done, held = done + held, 0
                if done < count:
                    step = _rows_at_a_time(done, count, weighted, combiner)
                else:
                    given = weights + 4 * (bag_end - count) if weighted else np.int64(0)
                    _end_bag(target, dim, given, count, combiner)
                    bag = _skip_empty(offsets, bag + 1, stop, out, dim)
    if header != 0:
        leave_epoch(record)
    count_lookup(counters, end - begin, missing, first == 0)
    return missing


@host_kernel
def bag_starts(bags, n, offsets):
    """Where each bag begins, from the number of the bag of each of ``n`` keys, ascending.

    Args:
        bags: int64 array of any stride: the number of the bag of each key.
        offsets: int64, one more than there are bags.

    Returns -1, or the first position whose bag does not exist or is less than the one before.   **Writes:** offsets.
    """
    last = len(offsets) - 1
    bag = -1
    for i in range(n):
        number = bags[i]
        if number < max(bag, 0) or number >= last:
            return i
        while bag < number:
            bag += 1
            offsets[bag] = i
    while bag < last:
        bag += 1
        offsets[bag] = n
    return -1
