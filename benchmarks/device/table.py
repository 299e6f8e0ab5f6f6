"""The tables of the device benchmarks: row i has the key ``i * odd``, and its values are a function of its number.

So the keys and expected rows of any batch can be computed when they are needed, and a table larger than the device can be
checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from measure import Machine

from hps_numba.cache.cache import EmbeddingCache
from hps_numba.device.host_memory import PinnedHostAllocator, PlainHostAllocator
from hps_numba.kernels.policies._load import load_policy
from hps_numba.kernels.policies._policy import Policy
from hps_numba.storage.host.store import HostStore

__all__ = [
    "add_rows",
    "check",
    "fill_store",
    "keys_of",
    "new_cache",
    "new_store",
    "resident_cache",
    "rows_of",
    "skewed_numbers",
]

_BITS = np.uint64  # keys are products modulo 2**64
_ODD = 0x9E3779B97F4A7C15
_ROW, _COLUMN = 0x1E3779B97F4A7C15, 0x42B2AE3D27D4EB
_SHIFT, _MASK = 21, (1 << 24) - 1
_CHUNK_BYTES = 256 << 20
_CHUNK_ROWS = 1 << 18


def keys_of(numbers: np.ndarray) -> np.ndarray:
    """The keys, int64 of both signs, of row numbers."""
    return (numbers.astype(_BITS) * _BITS(_ODD)).view(np.int64)


def skewed_numbers(rng: np.random.Generator, exponent: float, rows: int, n: int) -> np.ndarray:
    """Row numbers, 0 the most frequent, whose frequency falls with a power of the number."""
    uniform = rng.random(n)
    if exponent == 1.0:
        drawn = np.exp(uniform * np.log(rows + 1.0))
    else:
        power = 1.0 - exponent
        drawn = (1.0 + uniform * ((rows + 1.0) ** power - 1.0)) ** (1.0 / power)
    return np.minimum(drawn.astype(np.int64) - 1, rows - 1)


def rows_of(numbers: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows, float32 ``[n, dim]`` within -0.5 .. 0.5, of row numbers; the same on every device."""
    columns = torch.arange(1, dim + 1, dtype=torch.int64, device=numbers.device) * _COLUMN
    rows = torch.empty((len(numbers), dim), device=numbers.device)
    for some, target in zip(numbers.split(_CHUNK_ROWS), rows.split(_CHUNK_ROWS), strict=True):
        mixed = some[:, None] * _ROW + columns
        target.copy_((mixed >> _SHIFT) & _MASK)
    return rows.mul_(2.0**-24).sub_(0.5)


def new_store(machine: Machine, rows: int, dim: int, name: str = "table") -> HostStore:
    """An empty host store with memory for ``rows`` rows, pinned if there is a device."""
    allocator: Any = PlainHostAllocator() if machine.ordinal is None else PinnedHostAllocator()
    return HostStore(dim, name=name, rows=rows, allocator=allocator)


def add_rows(machine: Machine, store: HostStore, start: int, stop: int) -> None:
    """Write the rows with numbers ``start`` to ``stop - 1``; if rows are written in order, row i is in slot i."""
    step = max(1, _CHUNK_BYTES // (8 * store.dim))
    for first in range(start, stop, step):
        numbers = torch.arange(first, min(stop, first + step), device=machine.device)
        store.upsert(keys_of(numbers.cpu().numpy()), rows_of(numbers, store.dim).cpu().numpy())


def fill_store(machine: Machine, rows: int, dim: int) -> HostStore:
    """A host store of ``rows`` rows."""
    store = new_store(machine, rows, dim)
    add_rows(machine, store, 0, rows)
    return store


def new_cache(machine: Machine, store: HostStore, rows: int, *, policy: str | Policy = "lru", **options: Any) -> EmbeddingCache:
    """A cache for the table of the store, on the machine."""
    policy = load_policy(policy) if isinstance(policy, str) else policy
    return EmbeddingCache(store.dim, rows, device=machine.ordinal, policy=policy, store=store, **options)


def resident_cache(machine: Machine, store: HostStore, ways: int, **options: Any) -> EmbeddingCache:
    """A warm cache with all rows of the store, in ``ways`` ways."""
    cache = new_cache(machine, store, len(store), whole=True, set_count=ways // 10, **options)
    resident = cache.warm()
    if resident != len(store):
        cache.close()
        raise AssertionError(f"{resident:,} of {len(store):,} rows are resident in {ways:,} ways")
    return cache


def check(who: str, got: torch.Tensor, numbers: torch.Tensor, dim: int, *, tolerance: float = 0.0) -> None:
    """Raise unless every row fits its number: bit by bit, or up to ``tolerance`` relative to the largest element, 0.5."""
    expected = rows_of(numbers, dim)
    if tolerance:
        wrong = (got.to(torch.float32) - expected).abs().nan_to_num(nan=1.0) > tolerance * 0.5
    else:
        wrong = got.view(torch.int32) != expected.view(torch.int32)
    count = int(wrong.any(1).sum())
    if count:
        raise AssertionError(f"{who}: {count:,} of {len(numbers):,} rows are wrong")
