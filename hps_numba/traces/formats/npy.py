"""A NumPy array of integers of any shape, in C order."""

from __future__ import annotations

import math
import os
from pathlib import Path

from numpy.lib import format as npy_format

from hps_numba.errors import TraceError
from hps_numba.traces.formats._format import Blocks, TraceFormat, file_blocks

__all__ = ["PLUGIN"]


def _open(path: Path, column: str | None) -> tuple[int, Blocks]:
    if column is not None:
        raise TraceError(f"{path}: column: expected none, as an .npy file has no columns, got {column!r}")
    try:
        with path.open("rb") as file:
            version = npy_format.read_magic(file)
            read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
            shape, fortran_order, dtype = read(file)
            offset = file.tell()
            left = os.fstat(file.fileno()).st_size - offset
    except OSError:
        raise
    except Exception as problem:  # whatever NumPy's parser raises for a damaged header
        raise TraceError(f"{path}: expected an .npy file of integers: {' '.join(str(problem).split())}") from None
    if dtype.hasobject:
        raise TraceError(f"{path}: expected an .npy file of integers, got one of Python objects")
    if dtype.kind not in "iu":
        raise TraceError(f"{path}: expected an array of integers, got {dtype}")
    if fortran_order and len(shape) > 1:
        raise TraceError(f"{path}: expected C order, got Fortran order")
    count = math.prod(shape)
    if not 0 <= count * dtype.itemsize <= left:
        raise TraceError(
            f"{path}: expected an .npy file of integers with {count * dtype.itemsize:,} bytes of them, got {left:,}"
        )
    return count, file_blocks(path, dtype, count, offset)


PLUGIN = TraceFormat((".npy",), _open)
