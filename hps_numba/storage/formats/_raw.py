"""Arrays that lie uncompressed in a file: read with ``readinto``, so that bytes go from the page cache to their final place.

``FileIO.readinto`` releases the GIL, and a file that was cut short gives a short read and so an error. With a memory
map it would give SIGBUS, which ends the process.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._arrays import (
    Filler,
    assign,
    check_arrays,
    is_stored_as,
    others,
    piece_rows,
    row_dtype,
    with_scales,
)
from hps_numba.storage.formats._format import SparseModelReader
from hps_numba.storage.url_files import UrlFile, open_url
from hps_numba.storage.urls import Place, UrlPath

__all__ = [
    "JoinedArray",
    "RawArray",
    "RawArrayReader",
    "RawFile",
    "RowNumbers",
    "file_size",
    "names_in",
    "open_file",
    "open_folder",
    "read_exactly",
]

RawFile: TypeAlias = io.RawIOBase

_NO_WAITING = getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait for its writer


def open_file(path: Place, *, folder: int | None = None) -> RawFile:
    """Open a regular file, or one at a URL, for unbuffered reading.

    Args:
        folder: descriptor of the directory that holds it; the file is then found there, whatever ``path`` names by now.

    Raises:
        ModelFileError: missing, not a regular file, or unreadable.
    """
    if isinstance(path, UrlPath):
        return open_url(path)
    where: Path | str = path if folder is None else path.name
    try:
        mode = os.stat(where, dir_fd=folder).st_mode
        if not stat.S_ISREG(mode):  # looked at before opening: opening a tape drive would rewind it
            raise ModelFileError(f"{path}: expected a file, got a {'directory' if stat.S_ISDIR(mode) else 'special file'}")
        file = io.FileIO(where, opener=lambda name, flags: os.open(name, flags | _NO_WAITING, dir_fd=folder))
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file") from None
    except NotADirectoryError:
        raise ModelFileError(f"{path}: no such file, as a part of the path is not a directory") from None
    except ModelFileError:
        raise
    except OSError as problem:
        raise ModelFileError(f"{path}: cannot be opened: {problem.strerror}") from problem
    if not stat.S_ISREG(mode := os.fstat(file.fileno()).st_mode):  # what is there now is another thing
        file.close()
        raise ModelFileError(f"{path}: expected a file, got another thing, which is no file")
    return file


def file_size(file: RawFile) -> int:
    """Bytes of an open file."""
    return file.size if isinstance(file, UrlFile) else os.fstat(file.fileno()).st_size


@contextmanager
def open_folder(path: Place) -> Iterator[int | None]:
    """Descriptor of a directory: files opened through it are of one model, also while ``path`` is replaced by another."""
    if isinstance(path, UrlPath) or os.open not in os.supports_dir_fd:
        yield None  # no descriptors there; on Windows, a directory with open files cannot be replaced anyway
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        yield folder
    finally:
        os.close(folder)


def names_in(path: Place, *, folder: int | None = None) -> set[str]:
    """Names of the entries of a directory, found as in :func:`open_file`."""
    if isinstance(path, UrlPath):
        return path.names()
    with os.scandir(path if folder is None else folder) as entries:
        return {entry.name for entry in entries}


def read_exactly(file: RawFile, offset: int, out: npt.NDArray[Any], path: Place) -> None:
    """Fill ``out`` (C-contiguous, not empty) with the bytes at ``offset``. **Writes:** out.

    Raises:
        ModelFileError: the file ends before ``out`` is full.
    """
    view = out.reshape(-1).view(np.uint8).data
    file.seek(offset)
    done = 0
    while done < len(view):  # one call reads 2 GiB at most
        count = file.readinto(view[done:])
        if not count:
            raise ModelFileError(
                f"{path}: ends after {offset + done} bytes, {offset + len(view)} were expected; was it cut short?"
            )
        done += count


class RawArray:
    """An array of ``shape`` and ``dtype`` in C order from byte ``offset`` of a file."""

    def __init__(
        self, file: RawFile, path: Place, name: str, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self.file = file
        self.path = path
        self.name = name
        self.offset = offset
        self.shape = shape
        self.dtype = dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one element of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read_into(self, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` from row ``start`` on; in place, or by pieces where the dtype differs. **Writes:** out."""
        if self.dtype.isnative and is_stored_as(self.dtype, out.dtype):
            read_exactly(self.file, self.offset + start * self.row_bytes, out, self.path)
            return
        step = min(len(out), piece_rows(self.row_bytes))
        buffer = np.empty((step, *self.shape[1:]), self.dtype)
        for first in range(0, len(out), step):
            piece = buffer[: len(out) - first]
            read_exactly(self.file, self.offset + (start + first) * self.row_bytes, piece, self.path)
            assign(out[first : first + len(piece)], piece, self.path, self.name)


class JoinedArray:
    """Arrays of one row shape and dtype, one after another."""

    def __init__(self, parts: Sequence[RawArray]) -> None:
        self.parts = parts
        self.dtype = parts[0].dtype
        self.shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def read_into(self, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` from row ``start`` on. **Writes:** out."""
        done = first = 0
        for part in self.parts:
            begin = max(0, start + done - first)
            count = min(len(out) - done, part.shape[0] - begin)
            if count > 0:
                part.read_into(begin, out[done : done + count])
                done += count
            first += part.shape[0]


class RowNumbers:
    """The keys of a table whose row number is the key: 0, 1, 2, ..."""

    dtype = np.dtype(np.int64)

    def __init__(self, rows: int) -> None:
        self.shape = (rows,)

    def read_into(self, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` from row ``start`` on. **Writes:** out."""
        out[...] = np.arange(start, start + len(out))


class RawArrayReader(SparseModelReader):
    """Reads a model whose arrays are all raw; takes over the open files in ``handles`` once nothing can fail any more.

    ``is_model`` as in ``SparseModelReader``.
    """

    def __init__(
        self,
        path: Place,
        dim: int | None,
        arrays: Mapping[str, Filler],
        handles: ExitStack,
        names: Iterable[str] | None = None,
        *,
        is_model: bool = True,
    ) -> None:
        used = with_scales(path, arrays)
        super().__init__(path, *check_arrays(path, arrays, dim, names), has_meta="meta" in arrays)
        self.ignored = others(arrays if names is None else names, used)
        self.row_dtype = row_dtype(arrays)
        self.is_model = is_model
        self._arrays = used
        self._handles = handles.pop_all()

    def _fill(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        self._arrays[name].read_into(start, out)

    def _close(self) -> None:
        self._handles.close()
