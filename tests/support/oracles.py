"""Oracles: slow and obvious. A table is a dict, a server is a list of dicts that are asked one after the other.

Also the rows that the server's tests are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from support.fakes import NaiveStore

#: keys that other servers reserve, cut off or sign-extend
EXTREME_64 = (0, -1, 1, -(2**63), 2**63 - 1, 2**32 - 1, 2**32, -(2**31), 2**31)
EXTREME_32 = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)


def rows_of(keys: Any, dim: int, stamp: int = 0) -> np.ndarray:
    """float32 rows that tell key and column exactly, times ``2**stamp``."""
    base = (np.asarray(keys).astype(np.int64) % 65521 + 1).astype(np.float32)
    return (base[..., None] + np.arange(dim, dtype=np.float32) / 128) * np.float32(2.0**stamp)


def bits(rows: Any) -> np.ndarray:
    """The bits of float32 rows, so that NaN equals NaN and -0 does not equal 0."""
    return np.ascontiguousarray(rows, np.float32).view(np.uint32)


def assert_same_bits(got: Any, expected: Any) -> None:
    """Equal shape, dtype and bits."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(bits(got), bits(expected), strict=True)


class NaiveServer:
    """One table in several places, fastest first, and its default value."""

    def __init__(self, dim: int, default: float, places: int = 1) -> None:
        self.dim = dim
        self.default = default
        self.places = [NaiveStore(dim) for _ in range(places)]
        #: keys answered by each place, and by the default
        self.answered = [0] * (places + 1)

    def lookup(self, keys: Any) -> np.ndarray:
        """The row of each key from the first place that has it, else the default."""
        flat = np.asarray(keys).reshape(-1)
        rows = np.empty((len(flat), self.dim), np.float32)
        for i, key in enumerate(flat):
            for number, place in enumerate([*self.places, None]):
                if place is None or int(key) in place.rows:
                    self.answered[number] += 1
                    rows[i] = np.float32(self.default) if place is None else place.rows[int(key)]
                    break
        return rows.reshape(*np.shape(keys), self.dim)

    def insert(self, keys: Any, rows: Any) -> int:
        """To every place; returns how many were new to the first."""
        new = [place.upsert(keys, rows) for place in self.places]
        return new[0]

    def update(self, keys: Any, rows: Any) -> int:
        """Where a row is, there; returns how many of ``keys`` had one somewhere."""
        present = sum(any(int(key) in place.rows for place in self.places) for key in keys)
        for place in self.places:
            place.update(keys, rows)
        return present

    def erase(self, keys: Any) -> int:
        """From every place; returns how many distinct keys had a row somewhere."""
        present = len({int(key) for key in keys if any(int(key) in place.rows for place in self.places)})
        for place in self.places:
            place.erase(keys)
        return present


def murmur3_32_of_bytes(data: Sequence[int], seed: int = 0) -> int:
    """MurmurHash3_x86_32 (A. Appleby) of whole 4-byte words, by Python integers of any size."""
    h = seed
    for start in range(0, len(data), 4):
        k = int.from_bytes(bytes(data[start : start + 4]), "little") * 0xCC9E2D51 % 2**32
        k = (k << 15 | k >> 17) % 2**32 * 0x1B873593 % 2**32
        h ^= k
        h = ((h << 13 | h >> 19) % 2**32 * 5 + 0xE6546B64) % 2**32
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def partition_of(key: int, count: int) -> int:
    """The partition of a key in HugeCTR's databases (rrxmrrxmsx_0, Pelle Evensen), in plain integers."""

    def ror(x: int, n: int) -> int:
        return ((x >> n) | (x << (64 - n))) & (2**64 - 1)

    x = key & (2**64 - 1)
    x ^= ror(x, 25) ^ ror(x, 50)
    x = x * 0xA24BAED4963EE407 & (2**64 - 1)
    x ^= ror(x, 24) ^ ror(x, 49)
    x = x * 0x9FB21C651E98DF25 & (2**64 - 1)
    return (x ^ (x >> 28)) % count
