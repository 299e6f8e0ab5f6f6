"""HugeCTR's ``.bin`` dump of one table of a database.

::

    62 69 6e 00   uint32 version = 1   uint32 key bytes (4 or 8)   uint32 value bytes   [key][value] [key][value] ...

Little-endian. An empty table has value bytes 0; a table that did not exist has no field of value bytes at all, and
reads as empty. HugeCTR aborts the process on a wrong header and does not check the length; here both are errors.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from hps_numba.errors import ModelFileError
from hps_numba.runtime.replacing import file_judge
from hps_numba.storage.formats._arrays import piece_rows
from hps_numba.storage.formats._chunks import checked_chunks, writing
from hps_numba.storage.formats._format import Chunk, Keys, PathLike, Rows, rows_per_chunk, translated
from hps_numba.storage.formats._raw import file_size, open_file, read_exactly
from hps_numba.storage.replacing import head_judge, replacing
from hps_numba.storage.urls import Place, UrlPath, place_of

__all__ = ["BinDump", "Dump", "read_bin", "write_bin"]

_MAGIC = b"bin\0"
_VERSION = 1
_HEADER_BYTES = 16
_HEADER_BYTES_NO_TABLE = 12


def _is_dump(head: bytes) -> bool:
    return head.startswith(_MAGIC)


_WHAT = "a .bin dump"
_JUDGE, _URL_JUDGE = file_judge(_WHAT, _is_dump), head_judge(_WHAT, _is_dump)


@dataclass(frozen=True)
class Dump(abc.ABC):
    """A checked dump of a table, in whichever form.

    Attributes:
        key_bytes: 4 or 8.
        value_bytes: bytes of a row, ``4 * dim``; 0 if the table is empty.
        pairs: number of key-value pairs.
    """

    path: Place
    key_bytes: int
    value_bytes: int
    pairs: int

    @property
    def dim(self) -> int:
        """Floats in a row; 0 if the table is empty."""
        return self.value_bytes // 4

    def chunks(self, chunk_pairs: int | None = None) -> Iterator[tuple[Keys, Rows]]:
        """All pairs in the order of the file as ``(keys int64[m], rows float32[m, dim])``, by default about 8 MiB at a time.

        Keys of 4 bytes are zero-extended. Each step gives new arrays; each call reads from the start.

        Raises:
            ModelFileError: the file was changed or removed since it was checked.
        """
        step = rows_per_chunk(self.dim) if chunk_pairs is None else chunk_pairs
        if step < 1:
            raise ValueError(f"chunk_pairs: expected at least 1, got {step}")
        yield from self._chunks(step)

    @abc.abstractmethod
    def _chunks(self, step: int) -> Iterator[tuple[Keys, Rows]]:
        """``chunks`` of ``step`` pairs."""


class BinDump(Dump):
    """A dump as a ``.bin`` file."""

    def _chunks(self, step: int) -> Iterator[tuple[Keys, Rows]]:
        pair = _pair(self.key_bytes, self.dim)
        with open_file(self.path) as file:
            for start in range(0, self.pairs, step):
                pairs = np.empty(min(step, self.pairs - start), pair)
                read_exactly(file, _HEADER_BYTES + start * pair.itemsize, pairs.view(np.uint8), self.path)
                yield pairs["key"].astype(np.int64), pairs["row"].astype(np.float32)


def _pair(key_bytes: int, dim: int) -> np.dtype[Any]:
    return np.dtype([("key", "<i8" if key_bytes == 8 else "<u4"), ("row", "<f4", (dim,))])


def read_bin(path: PathLike | UrlPath) -> BinDump:
    """Check header and length of a dump. The rows are read by :meth:`BinDump.chunks`.

    Raises:
        ModelFileError: missing, not a dump, another version, or a length that is not a whole number of pairs.
    """
    where = place_of(path)
    with open_file(where) as file:
        size = file_size(file)
        if size < _HEADER_BYTES_NO_TABLE:
            raise ModelFileError(f"{where}: expected a header of {_HEADER_BYTES} bytes, got {size} bytes")
        header = np.zeros(4, "<u4")
        read_exactly(file, 0, header[: min(size, _HEADER_BYTES) // 4], where)
    if header[:1].tobytes() != _MAGIC:
        raise ModelFileError(f"{where}: expected a file that starts with {_MAGIC!r}, got {header[:1].tobytes()!r}")
    version, key_bytes, value_bytes = (int(field) for field in header[1:])
    if version != _VERSION:
        raise ModelFileError(f"{where}: expected version {_VERSION}, got {version}")
    if key_bytes not in (4, 8):
        raise ModelFileError(f"{where}: expected keys of 4 or 8 bytes, got {key_bytes}")
    if size == _HEADER_BYTES_NO_TABLE:
        return BinDump(where, key_bytes, 0, 0)
    return BinDump(where, key_bytes, value_bytes, _pairs(where, size, key_bytes, value_bytes))


def _pairs(path: Place, size: int, key_bytes: int, value_bytes: int) -> int:
    data_bytes = size - _HEADER_BYTES
    if value_bytes % 4 or data_bytes < 0:
        raise ModelFileError(
            f"{path}: expected a whole header and float32 values, got {size} bytes with values of {value_bytes} bytes"
        )
    if value_bytes == 0 and data_bytes:
        raise ModelFileError(f"{path}: expected no bytes after the header of an empty table, got {data_bytes}")
    if data_bytes % (key_bytes + value_bytes):
        raise ModelFileError(f"{path}: expected a multiple of {key_bytes} + {value_bytes} bytes of pairs, got {data_bytes}")
    return data_bytes // (key_bytes + value_bytes)


def write_bin(
    path: PathLike | UrlPath, key_bytes: int, dim: int, chunks: Iterable[tuple[Any, Any]], *, overwrite: bool = False
) -> int:
    """Write a dump and return its number of pairs. It appears whole or not at all.

    Args:
        key_bytes: 8, or 4 for keys in 0 .. 2**32 - 1.
        dim: floats in a row, at least 1.
        chunks: yields ``(keys int64[m], rows float32[m, dim])``.
        overwrite: replace a dump that exists; no other file is replaced.

    Raises:
        ModelFileError: ``path`` exists and may not be replaced, a chunk or key does not fit, or the disk refuses.
        KeyDtypeError: keys are not integers.
        ValueError: ``key_bytes`` is not 4 or 8, or ``dim`` is less than 1.
    """
    if key_bytes not in (4, 8):
        raise ValueError(f"key_bytes: expected 4 or 8, got {key_bytes}")
    if dim < 1:
        raise ValueError(f"dim: expected at least 1, got {dim}")
    target = place_of(path)
    with translated(target):
        if target.is_dir():
            raise ModelFileError(f"{target}: expected a file, got a directory")
    checked = checked_chunks(target, dim, chunks)
    with (
        replacing(target, overwrite=overwrite, judge=_JUDGE, url_judge=_URL_JUDGE) as new,
        writing(target, checked) as source,
        new.open("wb") as file,
    ):
        return _write_pairs(file, target, key_bytes, dim, source)


def _write_pairs(file: BinaryIO, path: Place, key_bytes: int, dim: int, chunks: Iterable[Chunk]) -> int:
    total = 0
    file.write(_header(key_bytes, 0))
    for keys, rows, _ in chunks:
        if key_bytes == 4:
            _check_4_bytes(path, keys)
        step = piece_rows(key_bytes + 4 * dim)
        for start in range(0, len(keys), step):
            pairs = np.empty(min(step, len(keys) - start), _pair(key_bytes, dim))
            pairs["key"], pairs["row"] = keys[start : start + step], rows[start : start + step]
            file.write(pairs.data)
        total += len(keys)
    if total:
        file.seek(0)
        file.write(_header(key_bytes, 4 * dim))
    return total


def _header(key_bytes: int, value_bytes: int) -> bytes:
    return _MAGIC + np.array([_VERSION, key_bytes, value_bytes], "<u4").tobytes()


def _check_4_bytes(path: Place, keys: Keys) -> None:
    wrong = keys[(keys < 0) | (keys >= 1 << 32)]
    if wrong.size:
        raise ModelFileError(f"{path}: expected keys in 0..{(1 << 32) - 1}, which fit 4 bytes, got {wrong[0]}")
