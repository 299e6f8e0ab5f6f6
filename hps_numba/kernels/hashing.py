"""Hashes of keys, as scalar functions on ``numpy.uint64``: run as plain Python and compiled from the same source.

``index_hash`` places a key in an index (the 64-bit finalizer of MurmurHash3, Austin Appleby, public domain), ``murmur3_32`` is
the hash of HugeCTR HPS's cache, ``partition_hash`` that of its databases and Kafka topics (rrxmrrxmsx_0, Pelle Evensen). Called
from plain Python, wrap-around of ``numpy.uint64`` warns unless inside ``numpy.errstate(over="ignore")``.
"""

from __future__ import annotations

import numpy as np

__all__ = ["index_hash", "murmur3_32", "partition_hash", "primary_line"]

_U = np.uint64
_LOW32 = _U(0xFFFFFFFF)

_F1, _F2, _F33 = _U(0xFF51AFD7ED558CCD), _U(0xC4CEB9FE1A85EC53), _U(33)
_32 = _U(32)

_C1, _C2, _C5, _CE = _U(0xCC9E2D51), _U(0x1B873593), _U(5), _U(0xE6546B64)
_M1, _M2 = _U(0x85EBCA6B), _U(0xC2B2AE35)
_13, _15, _16, _17, _19 = _U(13), _U(15), _U(16), _U(17), _U(19)

_P1, _P2 = _U(0xA24BAED4963EE407), _U(0x9FB21C651E98DF25)
_14, _24, _25, _28, _39, _40, _49, _50 = _U(14), _U(24), _U(25), _U(28), _U(39), _U(40), _U(49), _U(50)


def index_hash(key):
    """64-bit mix of a key: every output bit depends on every input bit."""
    x = key
    x = (x ^ (x >> _F33)) * _F1
    x = (x ^ (x >> _F33)) * _F2
    return x ^ (x >> _F33)


def primary_line(key, lines):
    """Number of the index line where the search for ``key`` starts, in 0..lines-1 (lines < 2**32)."""
    return ((index_hash(key) >> _32) * lines) >> _32


def _murmur_word(h, k):
    k = (k * _C1) & _LOW32
    k = ((k << _15) | (k >> _17)) & _LOW32
    k = (k * _C2) & _LOW32
    h = h ^ k
    h = ((h << _13) | (h >> _19)) & _LOW32
    return (h * _C5 + _CE) & _LOW32


def murmur3_32(key, key_bytes):
    """MurmurHash3_32 with seed 0 of the 4 or 8 little-endian bytes of ``key``."""
    h = _murmur_word(_U(0), key & _LOW32)
    if key_bytes == _U(8):
        h = _murmur_word(h, key >> _32)
    h = h ^ key_bytes
    h = ((h ^ (h >> _16)) * _M1) & _LOW32
    h = ((h ^ (h >> _13)) * _M2) & _LOW32
    return h ^ (h >> _16)


def partition_hash(key):
    """The partition hash of HugeCTR HPS; the partition of a key is ``partition_hash(key) % num_partitions``."""
    x = key
    x = x ^ ((x >> _25) | (x << _39)) ^ ((x >> _50) | (x << _14))
    x = x * _P1
    x = x ^ ((x >> _24) | (x << _40)) ^ ((x >> _49) | (x << _15))
    x = x * _P2
    return x ^ (x >> _28)
