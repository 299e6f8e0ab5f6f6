"""Bags of keys while they are pooled: what describes them, and how rows are added up and finished bags written."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hps_numba.kernels.cache.keys import load_key
from hps_numba.kernels.cache.parts import (
    add_part,
    add_rounded,
    divide_part,
    fill_part,
    float_of_lane,
    max_part,
    multiply_rounded,
    new_part,
    put_part,
    root_rounded,
    word_of_lane,
)
from hps_numba.kernels.layouts.pooling import EMPTY_DEFAULT, EQUAL, MAX, MEAN, OFFSETS32, OPEN_END, PADDED, SQRTN
from hps_numba.kernels.simt.reference import any_in_warp, bits_float, lane_in_warp, ld32, ld64, noinline

__all__ = ["BagSums", "CacheMemory", "PoolCall", "Run", "add_row", "close_bags", "key_at", "open_bag", "open_run", "weight_at"]

# bound when specialized
OUT_STRIDE = 4
POOL_LANES = 1  # lanes that share a bag


class CacheMemory(NamedTuple):
    """A cache, and the workspace of a batch: addresses, and the number of sets."""

    lines: Any
    rows: Any
    sets: Any
    state: Any
    workspace: Any


class PoolCall(NamedTuple):
    """What a pooled lookup asks for, as ``pool_kernel`` takes it."""

    keys: Any
    weights: Any
    out: Any
    combiner: Any
    default: Any
    options: Any
    padding: Any


class Run(NamedTuple):
    """Consecutive bags of a tile: ``count`` (int32) from bag ``first`` (int64) on, with the keys up to position ``end``.

    Each lane has in ``stops`` the position where one of the bags ends (int32 both).
    """

    first: Any
    count: Any
    stops: Any
    end: Any


class BagSums(NamedTuple):
    """The bag that is being added up: number ``bag`` of its run, which ends at position ``stop`` (int32 both).

    ``sums`` is a part; ``total`` that of the weights, or of their squares (float32); ``filled``: there is a row in it.
    """

    sums: Any
    total: Any
    filled: Any
    bag: Any
    stop: Any


def bag_start(offsets, bag, bags, n, options):
    """Position of the first key of a bag, within 0..n; that of bag ``bags`` is the end of the last one."""
    if options & EQUAL:
        return min(bag * offsets, np.int64(n))
    if bag == bags and options & OPEN_END:
        return np.int64(n)
    if options & OFFSETS32:
        start = ld32(offsets + 4 * bag)
    else:
        start = ld64(offsets + 8 * bag)
    return min(max(start, np.int64(0)), np.int64(n))


def start_of(combiner):
    """What sums, or maxima, begin with."""
    return np.float32(-np.inf) if combiner == MAX else np.float32(0.0)


def open_run(offsets, first, run, bags, n, options):
    """``(position, end, count, stops)`` of up to ``run`` of ``bags`` bags from bag ``first`` on; see ``Run``.

    ``position``: of their first key.
    """
    begin, last = min(first, bags), min(first + run, bags)
    lane = lane_in_warp() % POOL_LANES
    stops = np.int32(bag_start(offsets, min(begin + 1 + lane, last), bags, n, options))
    position = np.int32(bag_start(offsets, begin, bags, n, options))
    return position, word_of_lane(stops, run - 1), np.int32(last - begin), stops


def open_bag(combiner, stops):
    """BagSums of the first bag of a run, not bundled."""
    return fill_part(new_part(), start_of(combiner)), np.float32(0.0), False, np.int32(0), word_of_lane(stops, 0)


def close_bags(run, call, bags, position):
    """Write the bags that end at or before ``position``; returns the sums of the one that goes on.   **Writes:** out."""
    sums, total, filled, bag, stop = bags
    while any_in_warp((position >= stop) & (bag < run.count)):
        if (position >= stop) & (bag < run.count):
            target = call.out + (run.first + np.int64(bag)) * OUT_STRIDE
            answer_bag(target, sums, total, filled, call.combiner, call.default, call.options)
            sums = fill_part(sums, start_of(call.combiner))
            total = np.float32(0.0)
            filled = False
            bag = np.int32(bag + 1)
        stop = word_of_lane(run.stops, min(bag, POOL_LANES - 1))
    return BagSums(sums, total, filled, bag, stop)


def answer_bag(target, sums, total, filled, combiner, default, options):
    """Write the pooled row of a bag.   **Writes:** target."""
    noinline()
    if not filled:
        sums = fill_part(sums, default if options & EMPTY_DEFAULT else np.float32(0.0))
    elif combiner in (MEAN, SQRTN):
        divisor = root_rounded(total) if combiner == SQRTN else total
        if divisor == np.float32(0.0):
            sums = fill_part(sums, np.float32(0.0))
        else:
            sums = divide_part(sums, divisor)
    put_part(target, sums)


def add_row(bags, part, weight, used, number, combiner):
    """``bags`` with the row of lane ``number``, if that is among the ``used`` ones (bits).

    ``part``: of that row.   ``weight``: of each lane.
    """
    sums, total, filled, bag, stop = bags
    factor = float_of_lane(weight, number)
    present = (used >> number) & 1 != 0
    if present:
        if combiner == MAX:
            sums = max_part(sums, part)
        else:
            sums = add_part(sums, part, factor)
            total = add_rounded(total, multiply_rounded(factor, factor) if combiner == SQRTN else factor)
    return BagSums(sums, total, filled | present, bag, stop)


def key_at(call, position, end):
    """``(key, active, legal)``: the key at a position, active if that is before ``end`` and the key is not padding."""
    active = position < end
    key, legal = load_key(call.keys, np.int64(position) if active else np.int64(0))
    return key, active & (not ((call.options & PADDED) != 0 and key == call.padding)), legal


def weight_at(call, position, end):
    """The weight of a key, 1 if there are none."""
    weights = call.weights
    return bits_float(ld32(weights + 4 * np.int64(position))) if (weights != 0) & (position < end) else np.float32(1.0)
