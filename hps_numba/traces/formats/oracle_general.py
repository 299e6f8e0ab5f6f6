"""oracleGeneral, the binary format of libCacheSim: records of 24 bytes.

uint32 time in seconds, uint64 object, uint32 size in bytes, int64 position of the next request for the object; little-endian,
without a header. Only the object is read: the rows of a table have one size, and next requests are computed by the simulator.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hps_numba.errors import TraceError
from hps_numba.traces.formats._format import Blocks, TraceFormat, file_blocks

__all__ = ["PLUGIN", "RECORD"]

RECORD = np.dtype([("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])
_ZSTD = b"\x28\xb5\x2f\xfd"


def _open(path: Path, column: str | None) -> tuple[int, Blocks]:
    if column is not None:
        raise TraceError(f"{path}: column: expected none, as the objects of an oracleGeneral file are the keys, got {column!r}")
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) == _ZSTD:
            raise TraceError(f"{path}: expected plain oracleGeneral, got a compressed file: zstd -d {path.name}")
    if size % RECORD.itemsize:
        raise TraceError(f"{path}: expected whole records of {RECORD.itemsize} bytes, got {size:,} bytes")
    count = size // RECORD.itemsize
    return count, file_blocks(path, RECORD, count, field="object")


PLUGIN = TraceFormat((".oraclegeneral", ".oraclegeneral.bin"), _open)
