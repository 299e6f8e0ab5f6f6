"""How large the caches of a table are, from the config."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from hps_numba.cache.sizing import CacheGeometry, CacheShape
from hps_numba.config import ModelConfig, TableSpec

__all__ = ["CAPACITY_STEP", "cache_shape", "geometry_of", "shape_bytes"]

CAPACITY_STEP = 64  # rows: a set of HugeCTR HPS, in whose multiples its capacities come (checklist G09)


def cache_shape(model: ModelConfig, spec: TableSpec, rows: int) -> CacheShape | None:
    """The shape of the caches of a table with ``rows`` rows, or None if it is not cached.

    The capacity is ``floor(gpucacheper * rows)``, at least 64 and rounded up to a multiple of 64 (checklist G09); with
    ``cache_size_bytes``, as many rows as fit into so many bytes (checklist G10).
    """
    kind = model.embedding_cache_type
    if kind == "static":
        return CacheShape("static", max(rows, 1), True)
    if kind == "dynamic" and not model.gpucache:
        return None
    if spec.cache_size_bytes:
        return _shape_of_bytes(spec, kind, rows)
    capacity = math.floor(rows * Fraction(repr(spec.gpucacheper)))
    if kind == "uvm":
        return CacheShape("uvm", max(capacity, 1), False)
    rounded = -(-max(capacity, CAPACITY_STEP) // CAPACITY_STEP) * CAPACITY_STEP
    return CacheShape("dynamic", rounded, spec.gpucacheper == 1)


def _shape_of_bytes(spec: TableSpec, kind: str, rows: int) -> CacheShape:
    if kind == "uvm":
        return CacheShape(kind, _max_rows(spec, rows, fixed=True, whole=False), False)
    if shape_bytes(spec, CacheShape(kind, max(rows, CAPACITY_STEP), True)) <= spec.cache_size_bytes:
        return CacheShape(kind, max(rows, CAPACITY_STEP), True)
    return CacheShape(kind, _max_rows(spec, 1 << 40, fixed=False, whole=False), False)


def _max_rows(spec: TableSpec, limit: int, *, fixed: bool, whole: bool) -> int:
    """The most rows, up to ``limit`` and at least one, whose cache fits into the bytes of the config."""
    kind = "uvm" if fixed else "dynamic"
    low, high = 1, max(1, min(limit, spec.cache_size_bytes))
    while low < high:
        middle = (low + high + 1) // 2
        if shape_bytes(spec, CacheShape(kind, middle, whole)) <= spec.cache_size_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def geometry_of(spec: TableSpec, shape: CacheShape) -> CacheGeometry:
    """The geometry of the caches of a table in this shape."""
    whole = shape.whole and shape.kind == "dynamic"
    default = np.float32(spec.default_value)
    return CacheGeometry(spec.tag, spec.dim, shape.rows, shape.kind, whole, spec.cache_row_dtype, default, None)


def shape_bytes(spec: TableSpec, shape: CacheShape) -> int:
    """Bytes of a device that a cache of the table takes in this shape (``CacheShape.bytes``)."""
    return shape.bytes(spec.dim, row_type=spec.cache_row_dtype, policy=spec.cache_policy)
