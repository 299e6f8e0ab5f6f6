"""What a sparse-model format promises.

A sparse model is one embedding table on disk: ``key`` (n integers), ``emb_vector`` (n rows of ``dim`` floats) and, optionally,
``meta`` (n integers). A format is one file in this folder that defines ``PLUGIN``, a :class:`SparseModelFormat` that opens
files as :class:`SparseModelReader`; an entry point of the group ``hps_numba.formats``; or an object of the user's own, named as
``module:NAME`` or ``file.py:NAME``. To add one, write ``_fill`` and ``_close`` of a reader, and ``detect`` and ``_open`` of a
format; :mod:`hps_numba.storage.formats._arrays` holds the checks that all formats share. Every format passes
``hps_numba.testing.FormatContract``.

Problem: tables are larger than what host memory can hold twice, and a damaged file must never load as zeros. Choice: the caller
owns the arrays and says which rows go where; a reader fills them in place. Ranges ascend, so that compressed streams serve them
too, and each array has a position of its own, so that a loader may read the keys first and the rows later. Turned down: readers
that return arrays (a second copy of every byte) and memory maps (a file that shrinks kills the process).
"""

from __future__ import annotations

import abc
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from hps_numba.config.arguments import as_count, as_optional
from hps_numba.errors import ArrayError, ClosedError, ConfigError, HpsError, ModelFileError
from hps_numba.runtime.paths import safe_to_show
from hps_numba.storage.formats._tables import split_table
from hps_numba.storage.urls import Place, UrlPath, place_of

__all__ = [
    "CHUNK_BYTES",
    "Chunk",
    "FormatOfTables",
    "Keys",
    "PathLike",
    "Progress",
    "Rows",
    "SparseModelFormat",
    "SparseModelReader",
    "rows_per_chunk",
    "translated",
]

Keys: TypeAlias = npt.NDArray[np.int64]
Rows: TypeAlias = npt.NDArray[np.float32]
Chunk: TypeAlias = tuple[Keys, Rows, Keys | None]
PathLike: TypeAlias = str | os.PathLike[str]
Progress: TypeAlias = Callable[[int, int], None]
MAX_DIM = (1 << 31) - 1
log = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20
"""Keys and rows that are in flight at once where a table is streamed, in bytes."""


def rows_per_chunk(dim: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows of ``dim`` float32 with their int64 keys that fit ``chunk_bytes``; at least 1."""
    return max(1, chunk_bytes // (8 + 4 * dim))


@contextmanager
def translated(path: PathLike | UrlPath) -> Iterator[None]:
    """Turn whatever a library raises about a damaged file into one ``ModelFileError`` that names the file.

    h5py, pyarrow, zipfile and numpy raise about a dozen types between them, down to ``RecursionError`` and ``MemoryError`` for
    a header that asks for the impossible; a reader promises a single type.
    """
    try:
        yield
    except HpsError:
        raise
    except Exception as problem:
        text = safe_to_show(" ".join(str(problem).split())[:300])
        cause = None if isinstance(path, UrlPath) else problem  # what it holds might show credentials
        raise ModelFileError(f"{_shown(path)}: cannot be read: {type(problem).__name__}: {text}") from cause


def _shown(path: PathLike | UrlPath) -> str:
    return str(path) if isinstance(path, UrlPath) else safe_to_show(os.fspath(path))


class SparseModelReader(abc.ABC):
    """One open sparse model, a context manager.

    Attributes:
        path: the file or directory: a ``Path``, or the place of a URL, whose ``str`` has no credentials.
        rows: number of rows, n.
        dim: floats in a row.
        has_meta: whether there is a ``meta`` array.
        row_dtype: what rows are stored as; they are read as float32.
        is_model: whether what was opened is one sparse model and nothing else, so that it may be overwritten by another one.
        ignored: names of further arrays in the file, which this package has no use for (HugeCTR's ``slot_id``).
        working_bytes: memory that reading takes beside the caller's arrays, in bytes, where it is more than a few MiB.

    Thread safety: one thread at a time. A second thread opens a second reader; both may read any range.
    """

    working_bytes: int = 0
    row_dtype: str = "float32"
    is_model: bool = True
    ignored: tuple[str, ...] = ()

    def __init__(self, path: Place, rows: int, dim: int, *, has_meta: bool) -> None:
        self.path = path
        self.rows = rows
        self.dim = dim
        self.has_meta = has_meta
        self._position = {"key": 0, "emb_vector": 0, "meta": 0}
        self._closed = False
        self._failed = False
        self._afterwards = ExitStack()

    @abc.abstractmethod
    def _fill(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` (never empty) with elements ``start .. start + len(out)`` of array ``name``, or raise."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Close every file handle; called once."""

    def read(self, start: int, stop: int, keys: Keys | None, rows: Rows | None) -> None:
        """Fill the caller's arrays with rows ``start .. stop``; None leaves an array out.

        Bytes go from the file to their final place: where the file holds that dtype uncompressed, no other copy is made;
        else the intermediate is about 1 MiB. Some damage (a checksum over a whole array) shows only at the last row, so nothing
        that was read may be trusted before the table was read to its end.

        Args:
            start, stop: ``0 <= start <= stop <= self.rows``; for each array, ranges ascend and do not overlap. Gaps are
                skipped.
            keys: int64[stop - start], C-contiguous, or None.
            rows: float32[stop - start, dim], C-contiguous, or None.

        **Writes:** keys, rows.

        Raises:
            ModelFileError: the file is damaged, was cut short since it was opened, or holds a value that does not fit.
            ConfigError (a ValueError): a range is not as above.   ArrayError (a ValueError): an array is not.
            ClosedError: the reader was closed.
        """
        start, stop = self._check_range(start, stop)
        count = stop - start
        if keys is not None:
            self._check_out("keys", keys, np.int64, (count,))
            self._advance("key", start, keys)
        if rows is not None:
            self._check_out("rows", rows, np.float32, (count, self.dim))
            self._advance("emb_vector", start, rows)

    def read_meta(self, start: int, stop: int) -> Keys:
        """Elements ``start .. stop`` of ``meta``, int64[stop - start]; ranges and errors as in :meth:`read`.

        Raises:
            ModelFileError: also if the model has no ``meta``.
        """
        start, stop = self._check_range(start, stop)
        if not self.has_meta:
            raise ModelFileError(f"{self.path}: has no meta array")
        out = np.empty(stop - start, np.int64)
        self._advance("meta", start, out)
        return out

    def chunks(self, chunk_rows: int | None = None) -> Iterator[Chunk]:
        """All rows from first to last as ``(keys int64[m], rows float32[m, dim], meta int64[m] or None)``.

        ``keys`` and ``rows`` are views of one buffer that the next step overwrites. ``chunk_rows`` defaults to about 8 MiB.
        """
        step = rows_per_chunk(self.dim) if chunk_rows is None else as_count(chunk_rows, "chunk_rows", 1)
        step = min(step, self.rows)
        with translated(self.path):  # a damaged header may ask for rows of any width
            keys, rows = np.empty(step, np.int64), np.empty((step, self.dim), np.float32)
        for start in range(0, self.rows, max(step, 1)):
            count = min(step, self.rows - start)
            self.read(start, start + count, keys[:count], rows[:count])
            yield keys[:count], rows[:count], self.read_meta(start, start + count) if self.has_meta else None

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        if not self._closed:
            self._closed = True
            with self._afterwards:
                self._close()

    def keep_until_closed(self, held: ExitStack) -> None:
        """Close ``held`` after this reader."""
        self._afterwards = held.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check_range(self, start: int, stop: int) -> tuple[int, int]:
        if self._closed:
            raise ClosedError(f"{self.path}: this reader was closed")
        if self._failed:
            raise ModelFileError(f"{self.path}: an earlier read of this reader failed; open the model again")
        first, last = as_count(start, "start"), as_count(stop, "stop")
        if not 0 <= first <= last <= self.rows:
            raise ConfigError(f"{self.path}: rows: expected a range within 0..{self.rows}, got {first}..{last}")
        return first, last

    def _check_out(self, name: str, out: npt.NDArray[Any], dtype: type, shape: tuple[int, ...]) -> None:
        expected = f"{np.dtype(dtype).name}{list(shape)}"
        if not isinstance(out, np.ndarray):
            raise ArrayError(f"{self.path}: {name}: expected a NumPy array, {expected}, got {type(out).__name__}")
        if out.dtype != dtype or out.shape != shape:
            raise ArrayError(f"{self.path}: {name}: expected {expected}, got {out.dtype.name}{list(out.shape)}")
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise ArrayError(f"{self.path}: {name}: expected a C-contiguous, writeable array")

    def _advance(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        if not len(out):
            return
        if start < self._position[name]:
            raise ConfigError(f"{self.path}: {name}: expected a range from row {self._position[name]} on, got row {start}")
        self._position[name] = start + len(out)
        try:
            with translated(self.path):
                self._fill(name, start, out)
        except BaseException:
            self._failed = True  # a stream that stopped midway would go on at the wrong row
            raise


def _downloaded(place: UrlPath, held: ExitStack) -> Path:
    """A local copy of a file, for a format that reads local files only; it goes when ``held`` is closed."""
    info = place.info()
    if info is None or info["type"] != "file":
        raise ModelFileError(f"{place}: expected a file, got {'nothing' if info is None else 'a directory'}")
    copy = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="hps_numba_download_"))) / (place.name or "model")
    log.info("%s: downloading %s bytes to %s, as its format reads local files only", place, info.get("size"), copy)
    with io.FileIO(copy, "xb") as file:
        place.download(file)
    return copy


class SparseModelFormat(abc.ABC):
    """A kind of sparse model file; without state, so one object serves everybody.

    Attributes:
        name: as in ``format=``; the name of the file that defines it.
        suffixes: file name endings, lower case with the dot, that stand for this format.
        can_write: whether :meth:`write` is implemented.
        row_dtypes: what rows may be written as; with more than float32, :meth:`write` takes ``dtype=``.
        reads_urls: whether ``detect`` and ``_open`` also take the place of a URL, which has ``/``, ``name``, ``is_file`` and
            the like but no local file; False: what is at a URL is downloaded first.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    can_write: ClassVar[bool] = False
    row_dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    reads_urls: ClassVar[bool] = False

    @abc.abstractmethod
    def detect(self, path: Any) -> bool:
        """True if the content at ``path`` (which exists) looks like this format; the name does not count. Reads a few bytes."""

    @abc.abstractmethod
    def _open(self, path: Any, dim: int | None) -> SparseModelReader:
        """Open and check everything that can be checked without reading rows; errors of libraries may pass through."""

    def _open_table(self, path: Any, dim: int | None, table: str) -> SparseModelReader:
        """:meth:`_open` for one table of several, named as ``path#table``."""
        raise ModelFileError(f"{path}: expected a path without '#{table}', as format {self.name} holds one table")

    def open(self, path: PathLike | UrlPath, dim: int | None = None) -> SparseModelReader:
        """Open the model at ``path``, a local one or a URL; one of several tables is named as ``path#table``.

        Args:
            dim: width of a row that the file must have; None takes the file's.

        Raises:
            ModelFileError: missing, damaged, of another width, or what it needs is not installed.
            ConfigError (a ValueError): ``dim`` is no integer of at least 1.
        """
        dim = as_optional(dim, partial(as_count, low=1), "dim")
        place, table = split_table(given := place_of(path))
        with translated(given), ExitStack() as held:
            local = _downloaded(place, held) if isinstance(place, UrlPath) and not self.reads_urls else place
            found = self._open(local, dim) if table is None else self._open_table(local, dim, table)
            found.keep_until_closed(held)
        found.path = given
        return found

    def write(self, path: Path, dim: int, chunks: Iterable[Chunk]) -> int:
        """Write a new model at ``path``, which does not exist, and return its number of rows. Not atomic, not synced.

        For users: :func:`hps_numba.storage.model_files.write_model`, which is both and checks the chunks. Either all chunks
        have meta or none; a chunk is consumed before the next one is asked for.
        """
        raise ModelFileError(f"{path}: format {self.name} is read only")


class FormatOfTables(SparseModelFormat):
    """A format whose files or folders hold several tables."""

    def _open(self, path: Any, dim: int | None) -> SparseModelReader:
        return self._open_table(path, dim, None)

    @abc.abstractmethod
    def _open_table(self, path: Any, dim: int | None, table: str | None) -> SparseModelReader:
        """:meth:`_open` for one of the tables; None: the only one."""
