"""Hashes of keys: the vectors of the spec, in plain Python and compiled, and an even spread over lines and partitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.oracles import murmur3_32_of_bytes

from hps_numba.kernels import hashing
from hps_numba.kernels.compiler.njit import host_function

U = np.uint64

#: the hash of HugeCTR HPS's cache: key, hash of its 8 bytes, hash of its low 4 bytes
MURMUR = [
    (0, 0x63852AFC, 0x2362F9DE),
    (1, 0x53075D44, 0xFBF1402A),
    (2, 0xC61FA2F4, 0x40B23B7F),
    (12345, 0x146C33B1, 0x26134E01),
    (2**40 + 7, 0xF47DCEE2, 0x501A90F1),
    (-1, 0x627564E8, 0x76293B50),
]
#: the partition hash of HugeCTR HPS: key, hash, partition of 16, partition of 8
PARTITION = [
    (0, 0x0, 0, 0),
    (1, 0x0DADBFEEB7D64133, 3, 3),
    (2, 0x90AEEA2043435D3E, 14, 6),
    (12345, 0x47404863DC05E5DB, 11, 3),
    (2**40 + 7, 0x85BDC75A05E9418A, 10, 2),
    (-1, 0xE398180ADC04D6FC, 12, 4),
]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as part of a compiled one, the way kernels use it."""
    inner = host_function(function)

    @numba.njit
    def outer(*args):  # type: ignore[no-untyped-def]
        return inner(*args)

    return lambda *args: outer(*args)


COMPILED = {name: compiled(getattr(hashing, name)) for name in hashing.__all__}


@pytest.fixture(params=["plain", "compiled"])
def hashes(request: pytest.FixtureRequest) -> Iterator[dict[str, Callable[..., Any]]]:
    with np.errstate(over="ignore"):
        yield COMPILED if request.param == "compiled" else {name: getattr(hashing, name) for name in hashing.__all__}


def unsigned(key: int) -> np.uint64:
    return U(key % 2**64)


@pytest.mark.parametrize(("key", "of_8", "of_4"), MURMUR)
def test_murmur3_vectors(hashes: dict[str, Callable[..., Any]], key: int, of_8: int, of_4: int) -> None:  # G01 (hash)
    assert int(hashes["murmur3_32"](unsigned(key), U(8))) == of_8
    assert int(hashes["murmur3_32"](unsigned(key), U(4))) == of_4


@pytest.mark.parametrize(("key", "hashed", "of_16", "of_8"), PARTITION)
def test_partition_vectors(hashes: dict[str, Callable[..., Any]], key: int, hashed: int, of_16: int, of_8: int) -> None:  # D08
    got = int(hashes["partition_hash"](unsigned(key)))
    assert got == hashed
    assert (got % 16, got % 8) == (of_16, of_8)


@given(st.integers(0, 2**64 - 1))
def test_plain_and_compiled_agree_on_every_key(key: int) -> None:  # D08
    with np.errstate(over="ignore"):
        for name in ("index_hash", "partition_hash"):
            assert int(getattr(hashing, name)(U(key))) == int(COMPILED[name](U(key)))
        for size in (4, 8):
            expected = murmur3_32_of_bytes(key.to_bytes(8, "little")[:size])
            assert int(hashing.murmur3_32(U(key), U(size))) == int(COMPILED["murmur3_32"](U(key), U(size))) == expected
        for lines in (2, 7, 2**32 - 1):
            line = int(hashing.primary_line(U(key), U(lines)))
            assert (
                line == int(COMPILED["primary_line"](U(key), U(lines))) == (int(hashing.index_hash(U(key))) >> 32) * lines >> 32
            )
            assert 0 <= line < lines


@given(st.integers(0, 2**64 - 1))
def test_index_hash_is_invertible(key: int) -> None:
    """A bijection: no two keys share a hash."""

    def unmixed(x: int) -> int:
        return x ^ x >> 33

    with np.errstate(over="ignore"):
        x = int(hashing.index_hash(U(key)))
    for factor in (0xC4CEB9FE1A85EC53, 0xFF51AFD7ED558CCD):
        x = unmixed(x) * pow(factor, -1, 2**64) % 2**64
    assert unmixed(x) == key


KEY_SETS = {
    "counting": np.arange(1 << 14),
    "negative": -np.arange(1 << 14),
    "every 64th": np.arange(1 << 14) * 64,
    "high bits": np.arange(1 << 14) << 48,
    "two tables": np.concatenate([np.arange(1 << 13), np.arange(1 << 13) + (1 << 40)]),
}


@pytest.mark.parametrize("name", KEY_SETS)
@pytest.mark.parametrize("bins", [16, 61, 128])
def test_usual_keys_spread_evenly(name: str, bins: int) -> None:  # D08
    """Chi-square of the counts, within 6 standard deviations of what random bins give."""
    keys = KEY_SETS[name].astype(np.uint64)
    with np.errstate(over="ignore"):
        places = {
            "primary_line": hashing.primary_line(keys, U(bins)),
            "partition_hash": hashing.partition_hash(keys) % U(bins),
            "murmur3_32": hashing.murmur3_32(keys, U(8)) % U(bins),
        }
    for what, place in places.items():
        counts = np.bincount(place.astype(np.int64), minlength=bins)
        expected = len(keys) / bins
        chi_square = float(((counts - expected) ** 2).sum() / expected)
        freedom = bins - 1
        assert len(counts) == bins
        assert chi_square < freedom + 6 * (2 * freedom) ** 0.5, what


def test_each_bit_of_a_key_moves_half_of_the_index_hash() -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, 2000, np.uint64)
    with np.errstate(over="ignore"):
        plain = hashing.index_hash(keys)
        for bit in range(64):
            moved = plain ^ hashing.index_hash(keys ^ U(1 << bit))
            share = np.bitwise_count(moved).sum() / (64 * len(keys))
            assert 0.48 < share < 0.52
