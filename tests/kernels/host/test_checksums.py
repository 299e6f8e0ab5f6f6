"""Checksums of words: equal to a slow one, and never blind to a change of one word."""

from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.kernels.hashing import index_hash
from hps_numba.kernels.host.atomics import array_address
from hps_numba.kernels.host.checksums import sum_words

MASK = 2**64 - 1
M1, M2 = 0x9E6D62D06F6A9A9B, 0xD6D018F5A5E3B4C7


@host_kernel
def sum_of(words, seed):
    return sum_words(array_address(words), len(words), seed)


def rotated(value: int, by: int) -> int:
    return (value << by | value >> (64 - by)) & MASK


def hashed(value: int) -> int:
    with np.errstate(over="ignore"):
        return int(index_hash(np.uint64(value & MASK)))


def naive(words: np.ndarray, seed: int) -> int:
    start = (seed & MASK) ^ len(words)
    chains = [start, (start + M1) & MASK, (start + M2) & MASK, start ^ M2]
    whole = len(words) // 4 * 4
    for i, word in enumerate(words.view(np.uint64).tolist()):
        chain = i % 4 if i < whole else 0
        chains[chain] = rotated(chains[chain] + word * M2 & MASK, 29) * M1 & MASK
    a, b, c, d = chains
    found = hashed(a * M2 + rotated(b, 17)) ^ (hashed(c ^ rotated(d, 17)) * M1 & MASK)
    return found - 2**64 if found >= 2**63 else found


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 8, 17, 65])
def test_sums_are_those_of_the_slow_one(n: int) -> None:
    rng = np.random.default_rng(n)
    for seed in (0, 1, -1, 2**63 - 1):
        words = rng.integers(-(2**63), 2**63 - 1, n)
        assert sum_of(words, seed) == naive(words, seed)


@pytest.mark.parametrize("n", [1, 4, 7, 17])
def test_every_flipped_bit_changes_the_sum(n: int) -> None:
    words = np.zeros(n, np.int64)
    whole = sum_of(words, 5)
    sums = {whole}
    for bit in range(64 * n):
        words.view(np.uint64)[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
        sums.add(sum_of(words, 5))
        words[:] = 0
    assert len(sums) == 64 * n + 1
    assert sum_of(words, 6) != whole
    assert sum_of(np.zeros(n + 1, np.int64), 5) != whole


def test_words_that_change_places_change_the_sum() -> None:
    words = np.arange(1, 18)
    sums = {sum_of(words, 0)}
    for i in range(16):
        swapped = words.copy()
        swapped[[i, i + 1]] = swapped[[i + 1, i]]
        sums.add(sum_of(swapped, 0))
    assert len(sums) == 17
