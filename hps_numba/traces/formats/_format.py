"""What a format of traces is: it opens a file as blocks of keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hps_numba.errors import TraceError

__all__ = ["BLOCK", "Blocks", "TraceFormat", "as_int64"]

BLOCK = 1 << 20  # keys that a block has at most
Blocks = Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class TraceFormat:
    """A format of traces.

    Attributes:
        endings: of names of files, in small letters, by which it is recognised.
        open: ``open(path, column) -> (requests or None, blocks)``: ``blocks()`` begins anew with each call and gives integer
            arrays ``[n]`` of at most ``BLOCK`` keys; ``column`` says where the keys are, None for the usual place. Raises
            TraceError or OSError at once or while blocks are read.
    """

    endings: tuple[str, ...]
    open: Callable[[Path, str | None], tuple[int | None, Blocks]]


def as_int64(keys: np.ndarray, where: str) -> np.ndarray:
    """Keys as int64, uint64 by their bits.

    Raises:
        TraceError: they are no integers.
    """
    if keys.dtype.kind not in "iu":
        raise TraceError(f"{where}: keys are {keys.dtype}, wanted integers")
    if keys.dtype == np.uint64:
        return np.ascontiguousarray(keys).view(np.int64)
    return np.ascontiguousarray(keys, np.int64)
