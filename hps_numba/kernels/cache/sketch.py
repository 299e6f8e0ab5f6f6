"""How often keys were requested lately: a count-min sketch that forgets, for policies that admit.

::

    word (int64)        bits 0-7   epoch as of which the counters are
                        bits 8-59  13 counters of 4 bits, in rows of 4, 3, 3 and 3
    epoch               requests so far >> shift, modulo 2**8

A key has one word, and in it one counter of each row. A request adds 1 to its four counters, none beyond 15; the smallest is
the estimate. With each new epoch all counters halve, which a word does when it is next looked at (G. Cormode, S. Muthukrishnan,
"An improved data stream summary: the count-min sketch and its applications", Journal of Algorithms 55(1), 2005; counters of 4
bits that are halved: G. Einziger, R. Friedman, B. Manes, "TinyLFU: a highly efficient cache admission policy", ACM
Transactions on Storage 13(4), 2017).

*Why one word.* A request is then one read and one exchange, and for keys whose counters are full, which are those that many
lanes request together, only the read. Turned down: counters all over the sketch (four times the traffic), counting up the
smallest only (the result would depend on the order of lanes), and a pass that halves all (a batch would wait for it).
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.keys import load_key
from hps_numba.kernels.hashing import index_hash
from hps_numba.kernels.layouts.cache import (
    STATE_KEYS,
    WORKSPACE_SKETCH,
    WORKSPACE_SKETCH_SHIFT,
    WORKSPACE_SKETCH_WORDS,
)
from hps_numba.kernels.simt.reference import cas64, grid_dependency_sync, grid_warps, lane_in_warp, ld64, warp_number

__all__ = ["EPOCHS", "MAX_COUNT", "estimate", "sketch_kernel", "sketch_places", "sketch_shape"]

GROUP = 1  # bound when specialized: keys that a warp takes at a time

EPOCHS = 0x100
MAX_COUNT = 15
#: bits of all counters but the highest of each
_HALVES = 0x0777_7777_7777_7700
_AGED_OUT = 4  # halvings after which nothing is left
#: mixed into the hash, so that the keys of one set are not those of one word
_APART = np.uint64(0x9E3779B97F4A7C15)


def sketch_shape(capacity: int) -> tuple[int, int]:
    """``(words, shift)`` of the sketch of a cache: a word a row, and an epoch of 8 to 16 requests a row."""
    words = 1 << max(0, capacity - 1).bit_length()
    return words, words.bit_length() + 2


def sketch_places(words, key):
    """``(word, a, b, c, d)``: the number of a key's word, and the bits where its four counters begin."""
    mixed = index_hash(index_hash(np.uint64(np.int64(key))) + _APART)
    word = np.int64(((mixed >> np.uint64(32)) * np.uint64(words)) >> np.uint64(32))
    low = np.int64(mixed & np.uint64(0xFFFFFFFF))
    a = low & 3
    b = 4 + (((low >> 2) & 0x3FF) * 3 >> 10)
    c = 7 + (((low >> 12) & 0x3FF) * 3 >> 10)
    d = 10 + (((low >> 22) & 0x3FF) * 3 >> 10)
    return word, 8 + 4 * a, 8 + 4 * b, 8 + 4 * c, 8 + 4 * d


def epoch_of(state, workspace):
    """The epoch of the requests so far."""
    return (ld64(state + STATE_KEYS) >> ld64(workspace + WORKSPACE_SKETCH_SHIFT)) & (EPOCHS - 1)


def as_of(word, epoch):
    """A word with its counters as of an epoch: halved once for each one since."""
    passed = (epoch - word) & (EPOCHS - 1)
    for _ in range(min(passed, _AGED_OUT)):
        word = (word >> 1) & _HALVES
    return (word & ~(EPOCHS - 1)) | epoch


def estimate(state, workspace, key):
    """About how often a key was requested lately, 0 to ``MAX_COUNT``; never underestimated."""
    number, a, b, c, d = sketch_places(ld64(workspace + WORKSPACE_SKETCH_WORDS), key)
    word = as_of(ld64(ld64(workspace + WORKSPACE_SKETCH) + 8 * number), epoch_of(state, workspace))
    return min(min((word >> a) & MAX_COUNT, (word >> b) & MAX_COUNT), min((word >> c) & MAX_COUNT, (word >> d) & MAX_COUNT))


def count_request(place, a, b, c, d, epoch):
    """Add 1 to four counters of the word at ``place``.   **Writes:** sketch."""
    while True:
        there = ld64(place)
        word = as_of(there, epoch)
        word += np.int64((word >> a) & MAX_COUNT < MAX_COUNT) << a
        word += np.int64((word >> b) & MAX_COUNT < MAX_COUNT) << b
        word += np.int64((word >> c) & MAX_COUNT < MAX_COUNT) << c
        word += np.int64((word >> d) & MAX_COUNT < MAX_COUNT) << d
        if word == there or cas64(place, there, word) == there:
            return


def sketch_kernel(state, keys, n, skips, skipped, workspace):
    """Count the requests of a batch; between its lookup and its insertion.

    Args (int64):
        state: of the cache.   keys: address of ``n`` keys (KEY_FORM).   workspace: of this batch.
        skips: 1: the key ``skipped`` (padding of bags) is not a request.

    **Writes:** sketch.
    """
    grid_dependency_sync()
    epoch = epoch_of(state, workspace)
    sketch = ld64(workspace + WORKSPACE_SKETCH)
    words = ld64(workspace + WORKSPACE_SKETCH_WORDS)
    number = lane_in_warp()
    base = warp_number() * GROUP
    while base < n:
        if number < GROUP and base + number < n:
            key, legal = load_key(keys, base + number)
            if legal and (skips == 0 or key != skipped):
                word, a, b, c, d = sketch_places(words, key)
                count_request(sketch + 8 * word, a, b, c, d, epoch)
        base += grid_warps() * GROUP
