"""Checksums of 64-bit words in memory: fast, and sure to notice a change of one word.

Four chains, each of steps that are one to one in the word and in what came before, are folded by a step that is one to one in
each of them. So two blocks that differ in a single word never have the same sum; others do with a chance of 2**-64. A word is
multiplied before it is added, so that no change of few bits is undone by one of few bits in the next word of its chain.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.compiler.njit import host_function
from hps_numba.kernels.hashing import index_hash
from hps_numba.kernels.host.atomics import load_word

__all__ = ["sum_words"]

_hash = host_function(index_hash)
_M1, _M2 = np.uint64(0x9E6D62D06F6A9A9B), np.uint64(0xD6D018F5A5E3B4C7)
_29, _35, _17, _47 = np.uint64(29), np.uint64(35), np.uint64(17), np.uint64(47)


@host_function
def _mixed(chain, word):
    chain += word * _M2
    return ((chain << _29) | (chain >> _35)) * _M1


@host_function
def sum_words(address, words, seed):
    """The checksum (int64) of ``words`` 64-bit words at ``address``, which depends on ``seed``, an int64, too."""
    a = np.uint64(seed) ^ np.uint64(words)
    b = a + _M1
    c = a + _M2
    d = a ^ _M2
    whole = words & ~3
    for i in range(0, whole, 4):
        at = address + 8 * i
        a = _mixed(a, np.uint64(load_word(at)))
        b = _mixed(b, np.uint64(load_word(at + 8)))
        c = _mixed(c, np.uint64(load_word(at + 16)))
        d = _mixed(d, np.uint64(load_word(at + 24)))
    for i in range(whole, words):
        a = _mixed(a, np.uint64(load_word(address + 8 * i)))
    b = (b << _17) | (b >> _47)
    d = (d << _17) | (d >> _47)
    return np.int64(_hash(a * _M2 + b) ^ (_hash(c ^ d) * _M1))
