"""``.sst`` dumps of one table of a database: RocksDB's sorted string table, key = raw key bytes, value = raw row bytes.

HugeCTR writes the same, but sorts keys by number: RocksDB expects the order of their bytes, little-endian from the first
on (256 is ``00 01 ..``, and comes before 1), and HugeCTR aborts. Needs rocksdict, ``pip install "hps-numba[rocksdb]"``.

*Reading.* rocksdict opens databases only. So the file is made the only one of a temporary database, by a link: nothing is
copied. Before a row is inserted, the whole file is read once: the checksums of its blocks, the widths of all keys and rows.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.errors import ModelFileError, TierError
from hps_numba.runtime.paths import checked_path
from hps_numba.runtime.replacing import replacing
from hps_numba.storage.bin_dump import Dump
from hps_numba.storage.formats._chunks import checked_chunks, writing
from hps_numba.storage.formats._format import Chunk, Keys, PathLike, Rows, rows_per_chunk, translated
from hps_numba.storage.formats._raw import open_file, read_exactly
from hps_numba.storage.rocksdb.database import Database
from hps_numba.storage.rocksdb.keys import keys_of, raw_keys, raw_rows, rows_of, uneven
from hps_numba.storage.rocksdb.library import column_options, next_pairs, rocksdict, typed_errors

__all__ = ["SstDump", "read_sst", "write_sst"]

log = logging.getLogger(__name__)
_MAGIC = (0x88E241B785F4CFF7).to_bytes(8, "little")  # the last bytes of a block-based table
_COLUMN = "dump"
_CHECKED_PAIRS = 1 << 16


class SstDump(Dump):
    """A dump as a ``.sst`` file. ``path`` is a local one."""

    path: Path

    def _chunks(self, step: int) -> Iterator[tuple[Keys, Rows]]:
        for keys, rows in _raw_chunks(self.path, step):
            _check(self.path, keys, rows, self.key_bytes, self.value_bytes)
            yield keys_of(keys, self.key_bytes), rows_of(rows, self.dim)


def read_sst(path: PathLike) -> SstDump:
    """Check a dump: the checksums of all blocks, and that all keys and all rows have one width.

    Raises:
        ModelFileError: missing, damaged, not a table of RocksDB, or not one of keys of 4 or 8 bytes and float32 rows.
        TierUnavailable: rocksdict is not installed.
    """
    where = checked_path(path)
    rocksdict(str(where))
    _check_mark(where)
    key_bytes = value_bytes = pairs = 0
    for keys, rows in _raw_chunks(where, _CHECKED_PAIRS):
        if not pairs:
            key_bytes, value_bytes = len(keys[0]), len(rows[0])
            if key_bytes not in (4, 8):
                raise ModelFileError(f"{where}: expected keys of 4 or 8 bytes, got {key_bytes}")
            if not value_bytes or value_bytes % 4:
                raise ModelFileError(f"{where}: expected rows of float32, got one of {value_bytes} bytes")
        _check(where, keys, rows, key_bytes, value_bytes)
        pairs += len(keys)
    return SstDump(where, key_bytes, value_bytes, pairs)


def _check_mark(path: Path) -> None:
    end = np.empty(len(_MAGIC), np.uint8)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < len(end):
            raise ModelFileError(f"{path}: expected a table of RocksDB, got {size} bytes")
        read_exactly(file, size - len(end), end, path)
    if end.tobytes() != _MAGIC:
        raise ModelFileError(f"{path}: expected a table of RocksDB, which ends with {_MAGIC!r}, got {end.tobytes()!r}")


def _check(path: Path, keys: list[bytes], rows: list[bytes], key_bytes: int, value_bytes: int) -> None:
    for what, raw, expected in (("keys", keys, key_bytes), ("rows", rows, value_bytes)):
        got = uneven(raw, expected)
        if got is not None:
            raise ModelFileError(f"{path}: expected {what} of {expected} bytes, as the first has, got one of {got}")


def _raw_chunks(path: Path, pairs: int) -> Iterator[tuple[list[bytes], list[bytes]]]:
    last: bytes | None = None
    with _as_column(path) as (column, in_use):
        while True:
            with typed_errors(f"{path}: cannot be read", ModelFileError):
                some = next_pairs(column, last, pairs, in_use)
            if not some:
                return
            last = some[-1][0]
            yield [key for key, _ in some], [row for _, row in some]


@contextmanager
def _as_column(path: Path) -> Iterator[tuple[Any, set[Any]]]:
    """The column family of a temporary database that has this file only, and where to note iterators."""
    process = os.getpid()
    try:
        folder = Path(tempfile.mkdtemp(prefix="hps_sst_"))
    except OSError as problem:
        raise ModelFileError(f"{path}: expected a folder for temporary files, got: {problem.strerror or problem}") from problem
    try:
        database = Database(folder / "database", 1, read_only=False)
        try:
            column = database.create(_COLUMN)
            with typed_errors(f"{path}: cannot be read", ModelFileError):
                _ingest(database, column, path, folder / "link.sst")
            yield column, database.in_use
        finally:
            column = None
            database.close()
    finally:
        if os.getpid() == process:  # what a forked child finds is its parent's
            shutil.rmtree(folder, ignore_errors=True)


def _ingest(database: Database, column: Any, path: Path, link: Path) -> None:
    """RocksDB takes over the link in place of the file; where it cannot, as on a read-only file system, it copies the file."""
    options = database.package.IngestExternalFileOptions()
    options.set_move_files(True)
    try:
        link.symlink_to(path.absolute())
        column.ingest_external_file([str(link)], options)
    except Exception as problem:
        log.debug("%s: read from a copy: %s", path, problem)
        column.ingest_external_file([str(path)])


def write_sst(path: PathLike, key_bytes: int, dim: int, chunks: Iterable[tuple[Any, Any]], *, overwrite: bool = False) -> int:
    """Write a dump and return its number of pairs. It appears whole or not at all.

    Args:
        key_bytes: 8, or 4 for keys in 0 .. 2**32 - 1.
        dim: floats in a row, at least 1.
        chunks: yields ``(keys int64[m], rows float32[m, dim])``, all keys in the order of their bytes (``Tier.scan_by_bytes``).
        overwrite: replace a dump that exists; no other file is replaced.

    Raises:
        ModelFileError: ``path`` exists and may not be replaced, a chunk or key does not fit or is out of order, or the disk
            refuses.
        TierError: there are no rows: RocksDB has no empty files.   TierUnavailable: rocksdict is not installed.
        KeyDtypeError: keys are not integers.
        ValueError: ``key_bytes`` is not 4 or 8, or ``dim`` is less than 1.
    """
    if key_bytes not in (4, 8):
        raise ValueError(f"key_bytes: expected 4 or 8, got {key_bytes}")
    if dim < 1:
        raise ValueError(f"dim: expected at least 1, got {dim}")
    target = checked_path(path)
    package = rocksdict(str(target))
    with translated(target):
        if target.is_dir():
            raise ModelFileError(f"{target}: expected a file, got a directory")
    checked = checked_chunks(target, dim, chunks)
    with replacing(target, overwrite=overwrite, judge=_objection) as new, writing(target, checked) as source:
        writer = package.SstFileWriter(column_options(package))
        writer.open(str(new))
        total = _write_pairs(writer, target, key_bytes, source)
        if not total:
            raise TierError(f"{target}: expected a table with rows, got none: an .sst file cannot be empty, a .bin file can")
        writer.finish()
        return total


def _write_pairs(writer: Any, path: Path, key_bytes: int, chunks: Iterable[Chunk]) -> int:
    total = 0
    for keys, rows, _ in chunks:
        wrong = keys[(keys < 0) | (keys >= 1 << 32)] if key_bytes == 4 else keys[:0]
        if wrong.size:
            raise ModelFileError(f"{path}: expected keys in 0..{(1 << 32) - 1}, which fit 4 bytes, got {wrong[0]}")
        step = rows_per_chunk(rows.shape[1])
        for start in range(0, len(keys), step):
            some = slice(start, start + step)
            deque(map(writer.__setitem__, raw_keys(keys[some], key_bytes), raw_rows(rows[some])), maxlen=0)
        total += len(keys)
    return total


def _objection(place: Path) -> str | None:
    """A judge of ``replacing``: only a table of RocksDB may be replaced."""
    if place.is_dir():
        return "is a directory, where an .sst dump was to be written"
    with suppress(FileNotFoundError):
        try:
            _check_mark(place)
        except ModelFileError:
            return "is a file, but not an .sst dump"
    return None
