"""A segment: a file of rows and a file of their keys (``kernels.layouts.row_log``)."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hps_numba.errors import TierError
from hps_numba.kernels.hashing import index_hash
from hps_numba.kernels.layouts.row_log import GROUP_BYTES, UNIT_BITS, UNIT_MASK

__all__ = ["Ends", "Segment", "aligned", "direct_block", "is_at", "segment_paths"]

_BLOCKS = (512, 4096)  # what disks ask of the offsets of direct reads
_DIRECT = getattr(os, "O_DIRECT", 0)
_REMAP_BYTES = 1 << 20


def aligned(size: int, step: int = GROUP_BYTES) -> int:
    """``size`` rounded up to a multiple of ``step``."""
    return -(-size // step) * step


def segment_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """The files of rows and of keys of a segment."""
    return folder / f"{number:08}.rows", folder / f"{number:08}.keys"


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file has this name, and no other file nor none.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False


def direct_block(path: Path) -> int | None:
    """What offsets of reads past the page cache must be a multiple of for a file; None if its file system has no such reads."""
    if not _DIRECT:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | _DIRECT | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, max(_BLOCKS)) as memory:
            for block in _BLOCKS:
                with memoryview(memory) as whole, whole[:block] as part:
                    try:
                        os.preadv(descriptor, [part], block)
                    except OSError:
                        continue
                    return block
        return None
    finally:
        os.close(descriptor)


class Ends(NamedTuple):
    """How far a segment is committed: bytes of rows, bytes of records, number of records; always replaced at once."""

    rows: int = 0
    keys: int = 0
    records: int = 0


class Segment:
    """The open files of a segment. They are closed with the last reference: a reader that has one may go on.

    Attributes:
        number: in its table.   seed: of its checksums.
        ends: what is committed, and in the index.
        rows_fd, keys_fd: for writing and checking.   direct_fd: for reads past the page cache, or -1.
        damaged: some committed row in it cannot be read: it is never deleted.

    Raises:
        TierError: a file is missing or cannot be opened.
    """

    def __init__(self, folder: Path, number: int, table_seed: int, *, create: bool = False, writable: bool) -> None:
        self.number = number
        self.seed = _seed(table_seed, number)
        self.rows_path, self.keys_path = segment_paths(folder, number)
        self.ends = Ends()
        self.rows_fd = self.keys_fd = self.direct_fd = -1
        self.damaged = False
        self._map: mmap.mmap | None = None
        self.map_address = self.map_bytes = 0
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if create else 0)
        path = self.rows_path
        try:
            self.rows_fd = os.open(path, flags, 0o644)
            path = self.keys_path
            self.keys_fd = os.open(path, flags, 0o644)
        except OSError as problem:
            raise TierError(f"{path}: cannot be opened: {problem.strerror}") from problem

    def open_direct(self) -> None:
        """Open the rows for reads past the page cache, on a file system that has them.

        Raises:
            TierError: the file cannot be opened.
        """
        try:
            self.direct_fd = os.open(self.rows_path, os.O_RDONLY | _DIRECT | os.O_CLOEXEC)
        except OSError as problem:
            raise TierError(f"{self.rows_path}: cannot be opened: {problem.strerror}") from problem

    @property
    def next_unit(self) -> int:
        """Unit of the next group."""
        return aligned(self.ends.rows) // 8

    @property
    def bytes(self) -> int:
        """Bytes of both files."""
        return self.ends.rows + self.ends.keys

    def locations(self, unit: int, n: int, slot_size: int) -> np.ndarray:
        """The locations of ``n`` slots from ``unit`` on, int64."""
        return (self.number << UNIT_BITS | unit) + slot_size // 8 * np.arange(n, dtype=np.int64)

    def place(self, location: int) -> str:
        """File and offset of a location, for messages."""
        return f"{self.rows_path}: offset {8 * (location & UNIT_MASK)}"

    @property
    def stays(self) -> bool:
        """Whether both files still have their names, by which they are opened next time.

        Raises:
            OSError: they cannot be looked at.
        """
        return is_at(self.rows_path, self.rows_fd) and is_at(self.keys_path, self.keys_fd)

    def map_rows(self, *, final: bool) -> None:
        """Map the committed rows, again if many are new or no more will come (``final``).

        A mapping that is replaced stays for those who read from it: they hold what ``mapping`` gives.
        """
        size = min(self.ends.rows, os.fstat(self.rows_fd).st_size)
        grown = size - self.map_bytes
        if grown <= 0 or (not final and self._map is not None and grown < max(_REMAP_BYTES, self.map_bytes // 4)):
            return
        memory = mmap.mmap(self.rows_fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            memory.madvise(mmap.MADV_RANDOM)
        self.map_address = np.frombuffer(memory, np.uint8).ctypes.data
        self._map, self.map_bytes = memory, size

    @property
    def mapping(self) -> object:
        """Keeps the mapping in memory."""
        return self._map

    def close(self) -> None:
        """Close the files."""
        for name in ("rows_fd", "keys_fd", "direct_fd"):
            descriptor = getattr(self, name, -1)
            setattr(self, name, -1)
            if descriptor >= 0:
                os.close(descriptor)

    def __del__(self, ends: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ends():  # with the process its files are closed too
            self.close()


def _seed(table_seed: int, number: int) -> int:
    with np.errstate(over="ignore"):
        return int(np.uint64(index_hash(np.uint64(table_seed) + np.uint64(number))).astype(np.int64))
