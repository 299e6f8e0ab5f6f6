"""A checkpoint of trained tables: one file with the rows, the optimizer states of the rows, and what the caller adds.

The file is a ``.npz`` archive, so that ``np.load`` reads it: ``checkpoint.json``, and for each table ``N.key``,
``N.emb_vector``, ``N.state_key`` and ``N.state``. One file, because a file can replace another in one step and a folder cannot:
a reader finds either the old one or the new one, complete, whenever a writer is killed. The file is written beside the old one,
flushed to disk, and then renamed (``storage/formats/_atomic.py``).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._atomic import replacing
from hps_numba.storage.formats._npy_header import NpyHeader, read_npy_header

__all__ = ["CheckpointReader", "SavedTable", "open_checkpoint", "write_checkpoint"]

_VERSION = 1
_CHUNK_ROWS = 1 << 16
Read = Callable[[np.ndarray], np.ndarray]
"""From int64 keys ``[m]`` to float32 ``[m, width]``."""


@dataclass(frozen=True)
class SavedTable:
    """One table on its way to a file.

    Attributes:
        about: what identifies the table and its optimizer, as JSON values.
        keys: int64 ``[n]``.   dim: elements of a row.   rows: from some of the keys to their rows, float32 ``[m, dim]``.
        state_keys, state_width, states: the same for the optimizer states of rows.
    """

    about: Mapping[str, Any]
    keys: np.ndarray
    dim: int
    rows: Read
    state_keys: np.ndarray
    state_width: int
    states: Read


def write_checkpoint(path: Path, tables: Sequence[SavedTable], extra: Mapping[str, bytes]) -> None:
    """Write a checkpoint, replacing the file at ``path``, if any.

    Args:
        extra: more members of the archive, by names that do not begin with a dot.

    Raises:
        ModelFileError: it cannot be written; an older file is left as it was.
    """
    with replacing(path, overwrite=True) as target:
        try:
            with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                about = {"version": _VERSION, "tables": [dict(table.about) for table in tables]}
                archive.writestr("checkpoint.json", json.dumps(about))
                for number, table in enumerate(tables):
                    _write(archive, f"{number}.key", table.keys)
                    _write(archive, f"{number}.emb_vector", table.keys, table.dim, table.rows)
                    _write(archive, f"{number}.state_key", table.state_keys)
                    _write(archive, f"{number}.state", table.state_keys, table.state_width, table.states)
                for name, content in extra.items():
                    archive.writestr(name, content)
        except OSError as problem:
            raise ModelFileError(f"{path}: cannot be written: {problem}") from problem


def _write(archive: zipfile.ZipFile, name: str, keys: np.ndarray, width: int = 0, read: Read | None = None) -> None:
    """Write one array: the keys, or what ``read`` returns for them."""
    shape = (len(keys),) if read is None else (len(keys), width)
    dtype = np.dtype(np.int64 if read is None else np.float32)
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for some in _chunks(keys):
            file.write(np.ascontiguousarray(some if read is None else read(some), dtype).tobytes())


def _chunks(keys: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(keys), _CHUNK_ROWS):
        yield keys[start : start + _CHUNK_ROWS]


class CheckpointReader:
    """A complete checkpoint: opening it reads every byte and compares the checksums.

    Attributes:
        path: of the file.
        tables: ``SavedTable.about`` of each table.

    Raises:
        ModelFileError: a member is damaged, or the file is of another version.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self._archive = archive
        damaged = archive.testzip()
        if damaged is not None:
            raise ModelFileError(f"{path}: {damaged} is damaged")
        about = json.loads(archive.read("checkpoint.json"))
        if about.get("version") != _VERSION:
            raise ModelFileError(f"{path}: expected version {_VERSION}, got {about.get('version')!r}")
        self.tables: list[dict[str, Any]] = about["tables"]

    def shape(self, number: int, name: str) -> tuple[int, ...]:
        """Shape of an array of a table: ``key``, ``emb_vector``, ``state_key`` or ``state``."""
        with self._array(number, name) as (_, header):
            return header.shape

    def keys(self, number: int) -> np.ndarray:
        """int64 ``[n]``: the keys of a table."""
        with self._array(number, "key") as (file, header):
            return np.frombuffer(_exactly(file, header.data_bytes), np.int64)

    def rows(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Keys and rows of a table, in chunks: int64 ``[m]``, float32 ``[m, dim]``."""
        return self._pairs(number, "key", "emb_vector")

    def states(self, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Keys and optimizer states of their rows, in chunks: int64 ``[m]``, float32 ``[m, width]``."""
        return self._pairs(number, "state_key", "state")

    def _pairs(self, number: int, keys: str, values: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with self._array(number, keys) as (first, _), self._array(number, values) as (second, header):
            n, width = header.shape
            for start in range(0, n, _CHUNK_ROWS):
                rows = min(_CHUNK_ROWS, n - start)
                some = np.frombuffer(_exactly(first, 8 * rows), np.int64)
                yield some, np.frombuffer(_exactly(second, 4 * width * rows), np.float32).reshape(rows, width)

    @contextmanager
    def _array(self, number: int, name: str) -> Iterator[tuple[IO[bytes], NpyHeader]]:
        with self._archive.open(f"{number}.{name}.npy") as file:
            yield file, read_npy_header(file, self.path, name)

    def extra(self, name: str) -> bytes | None:
        """What the writer added under this name, or None."""
        return self._archive.read(name) if name in self._archive.namelist() else None


def _exactly(file: IO[bytes], size: int) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise EOFError(f"expected {size} more bytes, got {len(content)}")
    return content


@contextmanager
def open_checkpoint(path: Path) -> Iterator[CheckpointReader]:
    """A checkpoint, checked to be complete.

    Raises:
        ModelFileError: it is missing, damaged, or not a checkpoint.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as problem:
        raise ModelFileError(f"{path}: cannot be read as a checkpoint: {problem}") from problem
    with archive:
        try:
            reader = CheckpointReader(path, archive)
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as problem:
            if isinstance(problem, ModelFileError):
                raise
            raise ModelFileError(f"{path}: not a checkpoint, or a damaged one: {problem}") from problem
        yield reader
