"""What the hostile programs share: rows that check themselves, a server on them, and time that ends.

Element 0 of a row is its version; the others follow from key, column and version, so that a row of another key, a row of two
versions, or a row that was never written is recognised by itself. All values are whole numbers below 2**24, which float32
holds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import hps_numba

DIM, KEYS, DEFAULT, MODEL = 16, 2000, -1.0, "m"
_COLUMNS = np.arange(1, DIM, dtype=np.int64)


def rows_of(keys: Any, version: int) -> np.ndarray:
    """float32 ``[n, DIM]``: the rows of some keys in a version below 1,000."""
    keys = np.asarray(keys, np.int64)
    rows = np.empty((len(keys), DIM), np.float32)
    rows[:, 0] = version
    rows[:, 1:] = (keys[:, None] * 31 + version * 1009 + _COLUMNS * 7) % 1_000_003
    return rows


def versions_of(keys: Any, rows: np.ndarray, where: str) -> np.ndarray:
    """int64 ``[n]``: the version of each row, -1 for the default; fails if a row is neither."""
    keys, versions = np.asarray(keys, np.int64), rows[:, 0].astype(np.int64)
    expected = rows_of(keys, 0)
    expected[:, 0] = versions
    expected[:, 1:] = (keys[:, None] * 31 + versions[:, None] * 1009 + _COLUMNS * 7) % 1_000_003
    absent = (rows == DEFAULT).all(1)
    wrong = ~absent & (rows != expected).any(1)
    assert not wrong.any(), f"{where}: {wrong.sum()} of {len(keys)} rows are torn or of another key: {rows[wrong][:2]}"
    return np.where(absent, -1, versions)


def write_version(folder: Path, version: int, tables: int = 2, n: int = KEYS) -> list[str]:
    """Sparse models of one version, one a table."""
    paths = [folder / f"v{version}.{table}.model" for table in range(tables)]
    for path in paths:
        hps_numba.write_model(path, DIM, [(np.arange(n), rows_of(np.arange(n), version))], overwrite=True)
    return [str(path) for path in paths]


def open_server(sources: list[str], *, cached: bool, **top: Any) -> hps_numba.HPS:
    """A server of one model with these tables; ``cached``: with a cache in host memory that holds a third of the rows."""
    entry: dict[str, Any] = {
        "model": MODEL,
        "sparse_files": sources,
        "embedding_vecsize_per_table": [DIM] * len(sources),
        "maxnum_catfeature_query_per_table_per_sample": [8] * len(sources),
        "default_value_for_each_table": [DEFAULT] * len(sources),
        "max_batch_size": 64,
        "gpucacheper": 0.3,
        "deployed_device_list": [0] if cached else [],
    }
    return hps_numba.HPS({"supportlonglong": True, "models": [entry], "cache_on_cpu": cached, **top})


class Clock:
    """``for _ in Clock(seconds)`` runs for that long, at least ``least`` times, and until there was ``enough``."""

    def __init__(self, seconds: float, least: int = 20, enough: Callable[[], object] = lambda: True) -> None:
        self._end, self._least, self.enough = time.monotonic() + seconds, least, enough

    def __iter__(self) -> Clock:
        return self

    def __next__(self) -> None:
        self._least -= 1
        if self._least < 0 and time.monotonic() > self._end and self.enough():
            raise StopIteration


def some_keys(chance: random.Random, most: int = 300) -> np.ndarray:
    """Distinct keys, of which a few have no row at the start."""
    return np.array(chance.sample(range(KEYS + KEYS // 10), chance.randint(1, most)), np.int64)
