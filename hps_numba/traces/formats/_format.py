"""The interface of a trace format: it opens a file as blocks of keys."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hps_numba.errors import TraceError

__all__ = ["BLOCK", "Blocks", "TraceFormat", "as_int64", "blocks_of", "file_blocks"]

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
    """The blocks of an array, ``[n]``."""

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(keys), BLOCK):
            yield np.asarray(keys[start : start + BLOCK])

    return blocks


def file_blocks(path: Path, dtype: np.dtype, count: int, offset: int = 0, field: str | None = None) -> Blocks:
    """The blocks of a file that contains ``count`` values of ``dtype`` from byte ``offset`` on; ``field`` selects one field.

    The file is read and not mapped: a mapped file that another process truncates kills the reader.
    """
    status = path.stat()
    opened = (status.st_dev, status.st_ino)

    def blocks() -> Iterator[np.ndarray]:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_dev, status.st_ino) != opened:
                raise TraceError(f"{path}: expected the file that was opened as a trace, got another one of that name")
            file.seek(offset)
            for start in range(0, count, BLOCK):
                expected = min(BLOCK, count - start)
                values = np.fromfile(file, dtype, expected)
                if len(values) < expected:
                    raise TraceError(f"{path}: expected {count:,} requests, got {start + len(values):,}: it has become shorter")
                yield values if field is None else values[field]

    return blocks
