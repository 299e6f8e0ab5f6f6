"""Lookups of a cache by addresses, of two caches that answer alike, and the types that tests of missed rows go through."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.cache_bench import ints
from support.oracles import assert_same_bits

from hps_numba.cache.cache import EmbeddingCache

DTYPES = {"int64": np.int64, "checked32_in_int64": np.int64, "int32": np.int32, "uint32": np.uint32}


OUT = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}


def ask(
    cache: EmbeddingCache,
    keys: Any,
    form: str = "int64",
    out_type: str = "float32",
    *,
    shift: int = 0,
    no_answer: bool = False,
) -> tuple[np.ndarray, list[int]]:
    """Bits of the answer, and the positions of keys in no tier; ``shift``: bytes by which the answer is not aligned."""
    keys = np.asarray(keys).astype(DTYPES[form])
    out = np.full((len(keys), cache.dim), 77, OUT[out_type])
    absent = np.zeros(1 + len(keys), np.int64)
    backend, stream, room_of = cache.backend, cache.parts.state.stream, cache.parts.state.buffer
    with (
        backend.current(),
        cache.parts.state.copies(keys) as (at,),
        room_of(out.nbytes + shift) as room,
        room_of(absent.nbytes) as some,
    ):
        backend.from_host(room + shift, out, stream)
        to = 0 if no_answer else room + shift
        cache.lookup(at, len(keys), to, stream, key_form=form, out_type=out_type, absent_list=some)
        backend.to_host(out, room + shift, stream)
        backend.to_host(absent, some, stream)
    return out, sorted(absent[1 : 1 + absent[0]].tolist())


def ask_both(
    caches: tuple[EmbeddingCache, EmbeddingCache], keys: Any, form: str = "int64", out_type: str = "float32", *, shift: int = 0
) -> list[int]:
    """Ask two caches for a batch, which they answer alike, bit for bit; the positions of keys in no tier."""
    one, other = (ask(cache, keys, form, out_type, shift=shift) for cache in caches)
    assert np.array_equal(one[0], other[0])
    assert one[1] == other[1]
    return one[1]


def assert_same_content(one: EmbeddingCache, other: EmbeddingCache) -> None:
    """Two caches hold the same keys in the same places, with the same scores and the same rows."""
    assert one.entries() == other.entries()
    resident = ints(entry.key for entry in other.entries())
    assert_same_bits(one.query(resident)[0], other.query(resident)[0])


TYPES = [
    (None, "int8", "checked32_in_int64", "bfloat16", 2),
    (None, "float32", "int32", "float16", 0),
    pytest.param(0, "float16", "int32", "float16", 0, marks=pytest.mark.gpu),
    pytest.param(0, "bfloat16", "uint32", "bfloat16", 2, marks=pytest.mark.gpu),
    pytest.param(0, "int8", "checked32_in_int64", "float32", 4, marks=pytest.mark.gpu),
    pytest.param(0, "float8_e4m3", "int64", "float16", 0, marks=pytest.mark.gpu),
    pytest.param(0, "float32", "int64", "float32", 4, marks=pytest.mark.gpu),
]
