"""A survey of all rows of a sparse model, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.cli._models import size_on_disk
from hps_numba.storage.formats._format import SparseModelReader
from hps_numba.storage.formats._tables import split_table
from hps_numba.storage.model_files import formats, open_model
from hps_numba.storage.urls import Place

__all__ = ["Survey", "count_duplicates", "survey_model"]

_SAMPLE = 1 << 14  # keys, and values, that are looked at for signs of another dtype
_FEWEST = 64
_FIRST = 3  # rows shown in the report
_KEYS_AT_ONCE = 1 << 25  # 256 MiB


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The content of a sparse model.

    Attributes:
        row_dtype: what the rows are stored as.
        bytes: on disk.
        key_range: smallest and largest key; None without rows.
        ascending: whether every key is greater than the one before it.
        duplicates: number of rows whose key occurs in an earlier row.
        nan, infinite: number of values that are NaN or infinite.
        value_range: smallest and largest finite value; None without one.
        mean: of the finite values; NaN without one.
        first_rows: keys and values of the first rows.
        ignored: names of further arrays in the file, which are not read.
        warnings: what the content looks like, if it is not what the format says.
    """

    path: str
    format: str
    row_dtype: str
    rows: int
    dim: int
    bytes: int
    has_meta: bool
    key_range: tuple[int, int] | None
    ascending: bool
    duplicates: int
    nan: int
    infinite: int
    value_range: tuple[float, float] | None
    mean: float
    first_rows: list[tuple[int, list[float]]]
    ignored: tuple[str, ...]
    warnings: list[str]


def survey_model(path: Place, dim: int | None, on_rows: Callable[[str, int], None]) -> Survey:
    """Read a whole model: one pass over keys and rows, then more passes over the keys if they do not ascend.

    Raises:
        ModelFileError: the model is missing or damaged.
    """
    keys, values = _KeyFacts(), _ValueFacts()
    first: list[tuple[int, list[float]]] = []
    warnings: list[str] = []
    with open_model(path, dim) as model:
        for some_keys, some_rows, _ in model.chunks():
            if not first:
                first = [(int(key), row.tolist()) for key, row in zip(some_keys[:_FIRST], some_rows[:_FIRST], strict=True)]
                warnings = _misread(some_keys, some_rows)
            keys.add(some_keys)
            values.add(some_rows)
            on_rows("reading", len(some_keys))
        return Survey(
            path=str(path),
            format=_format_name(path),
            row_dtype=model.row_dtype,
            rows=model.rows,
            dim=model.dim,
            bytes=size_on_disk(path),
            has_meta=model.has_meta,
            key_range=keys.range,
            ascending=keys.ascending,
            duplicates=0 if keys.ascending else count_duplicates(path, model.rows, dim),
            nan=values.nan,
            infinite=values.infinite,
            value_range=values.range,
            mean=values.mean,
            first_rows=first,
            ignored=model.ignored,
            warnings=warnings,
        )


def _misread(keys: np.ndarray, rows: np.ndarray) -> list[str]:
    """Signs that raw bytes are of another dtype: the sizes of a directory fit int32 keys and float16 rows, too."""
    found = []
    if _look_like_int32(keys[:_SAMPLE]):
        found.append("every key looks like two int32 keys: a sparse model has int64 keys, so are there twice as many rows?")
    if _look_like_float16(rows.reshape(-1)[:_SAMPLE]):
        found.append("every value looks like two float16 values: a directory has float32 rows, so is the width twice that?")
    return found


def _look_like_int32(keys: np.ndarray) -> bool:
    """Both halves of all keys are small and different numbers; of hashed keys, half of the lower halves are negative."""
    low, high = np.ascontiguousarray(keys).view(np.int32).reshape(-1, 2).T
    if len(keys) < _FEWEST or min(low.min(), high.min()) < 0 or len(np.unique(high)) < len(high) // 2:
        return False
    larger, smaller = sorted((int(low.max()), int(high.max())), reverse=True)
    return larger < 16 * max(1, smaller)


def _look_like_float16(values: np.ndarray) -> bool:
    """Both halves of all values are numbers of one magnitude; of float32 values, the lower halves are any bits, or few."""
    low, high = np.abs(np.ascontiguousarray(values).view(np.float16).reshape(-1, 2).astype(np.float32)).T
    if len(np.unique(low)) < _FEWEST or not (np.isfinite(low).all() and np.isfinite(high).all()):
        return False
    middle_low, middle_high = float(np.median(low)), float(np.median(high))
    return 0 < middle_low < 30 * middle_high and middle_high < 30 * middle_low and float(low.max()) < 1000 * middle_low


def count_duplicates(path: Place, rows: int, dim: int | None = None, *, at_once: int = _KEYS_AT_ONCE) -> int:
    """The exact number of rows whose key occurs in an earlier row.

    About ``at_once`` keys are sorted at a time: a longer table is read in several passes, each for another share of all
    possible keys, chosen by a hash.
    """
    shares = max(1, -(-rows // at_once))
    distinct = 0
    for share in range(shares):
        with open_model(path, dim) as model:
            distinct += len(np.unique(_keys_of_share(model, share, shares)))
    return rows - distinct


def _keys_of_share(model: SparseModelReader, share: int, shares: int, step: int = 1 << 20) -> np.ndarray:
    found = [np.empty(0, np.int64)]
    for start in range(0, model.rows, step):
        keys = np.empty(min(step, model.rows - start), np.int64)
        model.read(start, start + len(keys), keys, None)
        if shares > 1:
            keys = np.unique(keys)  # so that many copies of a key take no memory
            keys = keys[_hashes(keys) % np.uint64(shares) == share]
        found.append(keys)
    return np.concatenate(found)


def _hashes(keys: np.ndarray) -> np.ndarray:
    """The high half of a product with 2**64 / golden ratio (Knuth): distributes ranges of keys over all shares."""
    return (keys.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)


class _KeyFacts:
    def __init__(self) -> None:
        self.range: tuple[int, int] | None = None
        self.ascending = True
        self._last: int | None = None

    def add(self, keys: np.ndarray) -> None:
        low, high = int(keys.min()), int(keys.max())
        self.range = (low, high) if self.range is None else (min(low, self.range[0]), max(high, self.range[1]))
        if self.ascending:
            continues = self._last is None or int(keys[0]) > self._last
            self.ascending = continues and bool((keys[1:] > keys[:-1]).all())
        self._last = int(keys[-1])


class _ValueFacts:
    def __init__(self) -> None:
        self.nan = self.infinite = self._finite = 0
        self._sum = 0.0
        self._low, self._high = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        total: Any = values.sum(dtype=np.float64)
        if not np.isfinite(total):
            self.nan += int(np.count_nonzero(np.isnan(values)))
            self.infinite += int(np.count_nonzero(np.isinf(values)))
            values = values[np.isfinite(values)]
            total = values.sum(dtype=np.float64)
        if values.size:
            self._finite += values.size
            self._sum += float(total)
            self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))

    @property
    def range(self) -> tuple[float, float] | None:
        return (self._low, self._high) if self._finite else None

    @property
    def mean(self) -> float:
        return self._sum / self._finite if self._finite else math.nan


def _format_name(given: Place) -> str:
    path, _ = split_table(given)
    readers = [found for found in formats() if isinstance(path, Path) or found.reads_urls]
    return next((found.name for found in readers if found.detect(path)), path.suffix.lstrip("."))
