"""How large the cache of a table is: what the config says, in rows and in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from hps_numba import parts
from hps_numba.cache_layout import SET_BYTES, STATE_BYTES, WAYS
from hps_numba.cache_memory import index_sets
from hps_numba.cache_policy_memory import policy_bytes
from hps_numba.config import ModelConfig, TableSpec
from hps_numba.kernels.policies._policy import load_policy
from hps_numba.kernels.row_elements import row_stride

__all__ = ["CacheShape", "cache_bytes", "cache_shape"]

_SET_OF_THE_ORIGINAL = 64  # ways: capacities are rounded up to it (spec 6.4)


@dataclass(frozen=True)
class CacheShape:
    """How a table is cached: what the config says, for a number of rows.

    Attributes:
        kind: dynamic, static or uvm.   rows: that it has room for.   whole: every row of the table is to be resident.
    """

    kind: str
    rows: int
    whole: bool


def cache_shape(model: ModelConfig, spec: TableSpec, rows: int) -> CacheShape | None:
    """The shape of the caches of a table with ``rows`` rows, or None if it is not cached.

    Capacity after spec 6.4: ``floor(gpucacheper * rows)``, at least 64, in steps of 64; with ``cache_size_bytes``, as many rows
    as fit into so many bytes.
    """
    kind = model.embedding_cache_type
    if kind == "static":
        return CacheShape("static", max(rows, 1), True)
    if kind == "dynamic" and not model.gpucache:
        return None
    if spec.cache_size_bytes:
        return _shape_of_bytes(spec, kind, rows)
    wanted = math.floor(rows * Fraction(repr(spec.gpucacheper)))
    if kind == "uvm":
        return CacheShape("uvm", max(wanted, 1), False)
    rounded = -(-max(wanted, _SET_OF_THE_ORIGINAL) // _SET_OF_THE_ORIGINAL) * _SET_OF_THE_ORIGINAL
    return CacheShape("dynamic", rounded, spec.gpucacheper == 1)


def _shape_of_bytes(spec: TableSpec, kind: str, rows: int) -> CacheShape:
    if kind == "uvm":
        return CacheShape(kind, _most_rows(spec, rows, fixed=True, whole=False), False)
    if cache_bytes(spec, CacheShape(kind, max(rows, _SET_OF_THE_ORIGINAL), True)) <= spec.cache_size_bytes:
        return CacheShape(kind, max(rows, _SET_OF_THE_ORIGINAL), True)
    return CacheShape(kind, _most_rows(spec, 1 << 40, fixed=False, whole=False), False)


def _most_rows(spec: TableSpec, limit: int, *, fixed: bool, whole: bool) -> int:
    """The most rows, up to ``limit`` and at least one, whose cache fits into the bytes of the config."""
    kind = "uvm" if fixed else "dynamic"
    low, high = 1, max(1, min(limit, spec.cache_size_bytes))
    while low < high:
        middle = (low + high + 1) // 2
        if cache_bytes(spec, CacheShape(kind, middle, whole)) <= spec.cache_size_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def cache_bytes(spec: TableSpec, shape: CacheShape) -> int:
    """Bytes of a device that a cache takes, without the buffers of batches.

    Those of the policy count if it is built in: one of the user's own is code, which is not run to tell a size.
    """
    fixed = shape.kind != "dynamic"
    sets = index_sets(shape.rows, fixed=fixed, whole=shape.whole and not fixed)
    rows = shape.rows if fixed else sets * WAYS
    own = fixed or parts.is_reference(spec.cache_policy)
    policy = 0 if own else policy_bytes(load_policy(spec.cache_policy), sets)
    return sets * SET_BYTES + rows * row_stride(spec.dim, spec.cache_row_dtype) + 2 * STATE_BYTES + policy
