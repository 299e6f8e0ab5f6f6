"""Histograms of what kernels and tiers do, added to without a lock; and which lookups are timed.

Problem: to read the clock twice takes about as long as to find a key and copy its row, so timing every lookup would cost too
much. Choice: one lookup in ``SAMPLED`` is timed, chosen by a hash of its number, so that no rhythm of a caller
(every second lookup is a large one) meets that of the samples. What is counted is exact, and is not counted by this.
Turned down: the time stamp counter of the processor, whose frequency differs and may change.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hps_numba.kernels.compiler.njit import host_function, host_kernel
from hps_numba.kernels.host.atomics import add_word, load_word
from hps_numba.kernels.host.clock import monotonic_ns
from hps_numba.kernels.layouts.histogram import BUCKETS, SUM
from hps_numba.kernels.layouts.host_store import COUNTER_CALLS, COUNTER_LATENCY

__all__ = ["FETCH_WORDS", "SAMPLED", "begin_sample", "begin_timed", "end_sample", "end_timed", "record", "record_fetch"]

_SAMPLE_BITS = 4
#: one lookup in so many is timed
SAMPLED = 1 << _SAMPLE_BITS
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 over the golden ratio, odd
_TOP = 64 - _SAMPLE_BITS
_MASK = SAMPLED - 1
_WORD = ir.IntType(64)
#: words before the histogram of the fetches of a tier: keys, those that were found, failures
FETCH_WORDS = 3


@intrinsic
def _leading_zeros(typingctx, value):
    """How many of the highest bits of an int64 above 0 are 0."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(_WORD, [_WORD, ir.IntType(1)])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.ctlz.i64")
        return builder.call(call, [args[0], ir.Constant(ir.IntType(1), 1)])

    return types.int64(types.int64), codegen


@host_function
def add_value(words, value):
    """Count a value in the histogram at an address.   **Writes:** words."""
    bucket = max(value - 1, 0)
    if bucket >= 4:
        octave = 63 - _leading_zeros(bucket)
        bucket = min(4 * (octave - 1) + (bucket >> (octave - 2) & 3), BUCKETS - 1)
    add_word(words + 8 * bucket, 1)
    add_word(words + SUM, value)


@host_function
def begin_sample(counters):
    """The time in ns if the lookup that begins is one of those that are timed, else 0.

    Args:
        counters: address of the words ``COUNTER_*``, or 0: no lookup is timed.
    """
    if counters == 0:
        return np.int64(0)
    if (load_word(counters + COUNTER_CALLS) * _GOLDEN) >> _TOP & _MASK != 0 or load_word(counters + COUNTER_LATENCY) == 0:
        return np.int64(0)
    return monotonic_ns()


@host_function
def end_sample(counters, since):
    """Count the time since ``begin_sample``, unless that is 0.   **Writes:** the histogram of the counters."""
    if since != 0:
        add_value(load_word(counters + COUNTER_LATENCY), monotonic_ns() - since)


@host_kernel
def begin_timed(counters):
    """``begin_sample`` for a lookup of several kernels."""
    return begin_sample(counters)


@host_kernel
def end_timed(counters, since):
    """``end_sample`` for a lookup of several kernels; ``since`` is not 0."""
    end_sample(counters, since)


@host_kernel
def record(words, value):
    """Count a value in the histogram at an address.   **Writes:** words."""
    add_value(words, value)


@host_kernel
def record_fetch(words, keys, found, failed, nanoseconds):
    """Count a fetch from a tier; ``words``: address of ``FETCH_WORDS`` and a histogram.   **Writes:** words."""
    add_word(words, keys)
    add_word(words + 8, found)
    add_word(words + 16, np.int64(failed))
    add_value(words + 8 * FETCH_WORDS, nanoseconds)
