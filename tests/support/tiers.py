"""Shared by tests: DIM, IN_MEMORY, PACKAGE, TAG, content_of, fetch, ints."""

from __future__ import annotations

import numpy as np

from hps_numba.storage.tiers._tier import Fetched, Tier

PACKAGE = "hps_numba.storage.tiers"


IN_MEMORY = ["hash_map", "parallel_hash_map"]


TAG, OTHER = "hps_et.m.a", "hps_et.m.b"


DIM = 3


def ints(*keys: int) -> np.ndarray:
    return np.array(keys, np.int64)


def fetch(tier: Tier, table: str, keys: np.ndarray, dim: int = DIM) -> tuple[Fetched, np.ndarray]:
    rows = np.full((len(keys), dim), np.nan, np.float32)
    return tier.fetch(table, keys, rows), rows


def content_of(tier: Tier, table: str, chunk_rows: int = 2) -> dict[int, bytes]:
    pairs = [
        (int(key), row.tobytes()) for keys, rows in tier.scan(table, chunk_rows) for key, row in zip(keys, rows, strict=True)
    ]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)
