"""oracleGeneral, the binary format of libCacheSim: records of 24 bytes, mapped into memory.

uint32 time in seconds, uint64 object, uint32 size in bytes, int64 position of the next request for the object; little-endian,
no header. Only the object counts here: rows of a table are of one size, and what comes next is found anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hps_numba.errors import TraceError
from hps_numba.traces.formats._format import BLOCK, Blocks, TraceFormat

__all__ = ["PLUGIN", "RECORD"]

RECORD = np.dtype([("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])
_ZSTD = b"\x28\xb5\x2f\xfd"


def _open(path: Path, column: str | None) -> tuple[int, Blocks]:
    if column is not None:
        raise TraceError(f"{path}: column {column!r} of an oracleGeneral file, wanted none: its objects are the keys")
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) == _ZSTD:
            raise TraceError(f"{path}: is compressed, wanted plain oracleGeneral: zstd -d {path.name}")
    if size % RECORD.itemsize:
        raise TraceError(f"{path}: {size:,} bytes, wanted whole records of {RECORD.itemsize}")
    records = np.memmap(path, RECORD, "r") if size else np.empty(0, RECORD)

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(records), BLOCK):
            yield np.ascontiguousarray(records["object"][start : start + BLOCK]).astype(np.uint64, copy=False)

    return len(records), blocks


PLUGIN = TraceFormat((".oraclegeneral", ".oraclegeneral.bin"), _open)
