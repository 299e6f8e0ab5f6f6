"""The interface of a trace format: it opens a file as blocks of keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hps_numba.errors import TraceError

__all__ = ["BLOCK", "Blocks", "TraceFormat", "as_int64", "blocks_of"]

BLOCK = 1 << 20  # largest number of keys in a block
Blocks = Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class TraceFormat:
    """A trace format.

    Attributes:
        endings: of file names, in lower case, by which it is recognised.
        open: ``open(path, column) -> (requests or None, blocks)``: each call of ``blocks()`` starts at the beginning and yields
            integer arrays ``[n]`` of at most ``BLOCK`` keys; ``column`` names the column of keys, None for the default one.
            Raises TraceError or OSError at once or while blocks are read.
    """

    endings: tuple[str, ...]
    open: Callable[[Path, str | None], tuple[int | None, Blocks]]


def as_int64(keys: np.ndarray, where: str) -> np.ndarray:
    """Keys as int64; uint64 is reinterpreted bit by bit.

    Raises:
        TraceError: they are not integers.
    """
    if keys.dtype.kind not in "iu":
        raise TraceError(f"{where}: expected integer keys, got {keys.dtype}")
    if keys.dtype == np.uint64:
        return np.ascontiguousarray(keys).view(np.int64)
    return np.ascontiguousarray(keys, np.int64)


def blocks_of(keys: np.ndarray) -> Blocks:
    """The blocks of an array, ``[n]``, which may be mapped from a file."""

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(keys), BLOCK):
            yield np.asarray(keys[start : start + BLOCK])

    return blocks
