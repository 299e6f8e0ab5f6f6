"""A NumPy array of integers of any shape, in C order; memory-mapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hps_numba.errors import TraceError
from hps_numba.traces.formats._format import Blocks, TraceFormat, blocks_of

__all__ = ["PLUGIN"]


def _open(path: Path, column: str | None) -> tuple[int, Blocks]:
    if column is not None:
        raise TraceError(f"{path}: column: expected none, as an .npy file has no columns, got {column!r}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as problem:
        raise TraceError(f"{path}: expected an .npy file of integers: {' '.join(str(problem).split())}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise TraceError(f"{path}: expected an array of integers, got {getattr(array, 'dtype', type(array).__name__)}")
    if not array.flags.c_contiguous:
        raise TraceError(f"{path}: expected C order, got Fortran order")
    flat = array.reshape(-1)
    return len(flat), blocks_of(flat)


PLUGIN = TraceFormat((".npy",), _open)
