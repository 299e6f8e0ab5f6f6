"""A NumPy array of integers, of any shape, in C order; mapped into memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hps_numba.errors import TraceError
from hps_numba.traces.formats._format import BLOCK, Blocks, TraceFormat

__all__ = ["PLUGIN"]


def _open(path: Path, column: str | None) -> tuple[int, Blocks]:
    if column is not None:
        raise TraceError(f"{path}: column {column!r} of an .npy file, wanted none: it has no columns")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as problem:
        raise TraceError(f"{path}: not an .npy file of integers: {' '.join(str(problem).split())}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise TraceError(f"{path}: holds {getattr(array, 'dtype', type(array).__name__)}, wanted an array of integers")
    if not array.flags.c_contiguous:
        raise TraceError(f"{path}: is in Fortran order, wanted C order")
    flat = array.reshape(-1)

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(flat), BLOCK):
            yield np.asarray(flat[start : start + BLOCK])

    return len(flat), blocks


PLUGIN = TraceFormat((".npy",), _open)
