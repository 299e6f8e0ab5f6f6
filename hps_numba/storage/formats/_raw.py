"""Arrays that lie uncompressed in a file: read with ``readinto``, so that bytes go from the page cache to their final place.

``FileIO.readinto`` releases the GIL, and a file that was cut short gives a short read and so an error. With a memory
map it would give SIGBUS, which ends the process.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._arrays import assign, check_arrays, is_stored_as, others, piece_rows
from hps_numba.storage.formats._format import SparseModelReader

__all__ = ["RawArray", "RawArrayReader", "names_in", "open_file", "open_folder", "read_exactly"]

_NO_WAITING = getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait for its writer


def open_file(path: Path, *, folder: int | None = None) -> io.FileIO:
    """Open a regular file for unbuffered reading.

    Args:
        folder: descriptor of the directory that holds it; the file is then found there, whatever ``path`` names by now.

    Raises:
        ModelFileError: missing, not a regular file, or unreadable.
    """
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


@contextmanager
def open_folder(path: Path) -> Iterator[int | None]:
    """Descriptor of a directory: files opened through it are of one model, also while ``path`` is replaced by another."""
    if os.open not in os.supports_dir_fd:
        yield None  # Windows, where a directory with open files cannot be replaced anyway
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        yield folder
    finally:
        os.close(folder)


def names_in(path: Path, *, folder: int | None) -> set[str]:
    """Names of the entries of a directory, found as in :func:`open_file`."""
    with os.scandir(path if folder is None else folder) as entries:
        return {entry.name for entry in entries}


def read_exactly(file: io.FileIO, offset: int, out: npt.NDArray[Any], path: Path) -> None:
    """Fill ``out`` (C-contiguous, not empty) with the bytes at ``offset``. **Writes:** out.

    Raises:
        ModelFileError: the file ends before ``out`` is full.
    """
    view = out.data.cast("B")
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
        self, file: io.FileIO, path: Path, name: str, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]
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


class RawArrayReader(SparseModelReader):
    """Reads a model whose arrays are all raw; takes over the open files in ``handles`` once nothing can fail any more."""

    def __init__(
        self, path: Path, dim: int | None, arrays: dict[str, RawArray], handles: ExitStack, names: Iterable[str] | None = None
    ) -> None:
        super().__init__(path, *check_arrays(path, arrays, dim, names), has_meta="meta" in arrays)
        self.ignored = others(arrays if names is None else names)
        self._arrays = arrays
        self._handles = handles.pop_all()

    def _fill(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        self._arrays[name].read_into(start, out)

    def _close(self) -> None:
        self._handles.close()
