"""Parquet: one column of integers, by its name; by default ``key`` or the only column. Needs pyarrow. Decoded as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.errors import TraceError
from hps_numba.traces.formats._format import BLOCK, Blocks, TraceFormat

__all__ = ["PLUGIN"]


def _open(path: Path, column: str | None) -> tuple[int, Blocks]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TraceError(f'{path}: Parquet needs pyarrow: pip install "hps-numba[parquet]"') from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as problem:
        raise TraceError(f"{path}: expected a Parquet file: {' '.join(str(problem).split())}") from None
    schema, rows = file.schema_arrow, file.metadata.num_rows
    name = _column(path, schema.names, column)
    if not pyarrow.types.is_integer(schema.field(name).type):
        raise TraceError(f"{path}: column {name!r}: expected integers, got {schema.field(name).type}")

    def blocks() -> Iterator[np.ndarray]:
        try:
            with pyarrow.parquet.ParquetFile(path) as opened:
                for batch in opened.iter_batches(batch_size=BLOCK, columns=[name], use_threads=False):
                    yield _keys(path, name, batch.column(0))
        except TraceError:
            raise
        except (pyarrow.ArrowException, OSError) as problem:
            raise TraceError(f"{path}: damaged: {' '.join(str(problem).split())}") from None

    return rows, blocks


def _keys(path: Path, name: str, values: Any) -> np.ndarray:
    if values.null_count:
        raise TraceError(f"{path}: column {name!r}: expected integers, got {values.null_count} nulls")
    keys: np.ndarray = values.to_numpy(zero_copy_only=False)
    return keys


def _column(path: Path, names: list[str], column: str | None) -> str:
    if column is None:
        column = "key" if len(names) != 1 else names[0]
    if column not in names:
        raise TraceError(f"{path}: column (--column): expected one of {', '.join(names)}, got {column!r}")
    return column


PLUGIN = TraceFormat((".parquet", ".pq"), _open)
