"""A Parquet file with columns ``key``, ``emb_vector`` (a list of floats a row) and, optionally, ``meta``.

Column chunks are decoded as streams, one batch of about 1 MiB at a time, through plain reads. Lists of fixed or free size are
accepted; every row must have the same length, and a null is an error. Needs pyarrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._arrays import (
    NAMES,
    PIECE_BYTES,
    Filler,
    StoredArray,
    assign,
    check_arrays,
    others,
    piece_rows,
    row_dtype,
    with_scales,
)
from hps_numba.storage.formats._format import SparseModelFormat, SparseModelReader
from hps_numba.storage.formats._raw import open_file
from hps_numba.storage.urls import Place, UrlPath

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

__all__ = ["PLUGIN", "ParquetFormat", "ParquetReader"]

_MAGIC = b"PAR1"


class _Declared(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class _Column:
    """One column, decoded from first to last row."""

    def __init__(
        self, file: pyarrow.parquet.ParquetFile, path: Place, name: str, declared: StoredArray, row_bytes: int
    ) -> None:
        self.shape, self.dtype = declared.shape, declared.dtype
        batches = file.iter_batches(batch_size=piece_rows(row_bytes), columns=[name], use_threads=False)
        self.path = path
        self.name = name
        self.row_shape = row_shape = declared.shape[1:]
        self._arrays: Iterator[pyarrow.Array] = (batch.column(0) for batch in batches)
        self._rest: npt.NDArray[Any] = np.empty((0, *row_shape))
        self._position = 0

    def read_into(self, start: int, out: npt.NDArray[Any]) -> None:
        while self._position < start:
            self._next_piece(start)
        stop, first = start + len(out), 0
        while self._position < stop:
            piece = self._next_piece(stop)
            assign(out[first : first + len(piece)], piece, self.path, self.name)
            first += len(piece)

    def _next_piece(self, stop: int) -> npt.NDArray[Any]:
        while not len(self._rest):
            array = next(self._arrays, None)
            if array is None:
                raise ModelFileError(f"{self.path}: {self.name}: expected {stop} rows or more, got {self._position}")
            self._rest = self._numbers(array)
        piece = self._rest[: stop - self._position]
        self._rest = self._rest[len(piece) :]
        self._position += len(piece)
        return piece

    def _numbers(self, array: pyarrow.Array) -> npt.NDArray[Any]:
        """A batch as an array of shape [m, *row_shape], without a copy."""
        self._reject_nulls(array)
        if not self.row_shape:
            return array.to_numpy(zero_copy_only=True)
        lengths = array.value_lengths().to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != self.row_shape[0])
        if wrong.size:
            row = self._position + int(wrong[0])
            raise ModelFileError(
                f"{self.path}: emb_vector row {row}: expected {self.row_shape[0]} values, got {lengths[wrong[0]]}"
            )
        values = array.flatten()
        self._reject_nulls(values)
        return values.to_numpy(zero_copy_only=True).reshape(len(array), *self.row_shape)

    def _reject_nulls(self, array: pyarrow.Array) -> None:
        if array.null_count:
            where = f"rows {self._position}..{self._position + len(array)}"
            raise ModelFileError(f"{self.path}: {self.name}: expected no nulls, got {array.null_count} in {where}")


class ParquetReader(SparseModelReader):
    """Streams the columns of one file; each column has a stream of its own."""

    def __init__(self, path: Place, dim: int | None, file: pyarrow.parquet.ParquetFile, handles: ExitStack) -> None:
        arrays = _declared(file, path, dim)
        super().__init__(path, *check_arrays(path, arrays, dim, file.schema_arrow.names), has_meta="meta" in arrays)
        columns: dict[str, Filler] = {}
        for name, array in arrays.items():
            row_bytes = array.dtype.itemsize * (self.dim if name == "emb_vector" else 1)
            columns[name] = _Column(file, path, name, array, row_bytes)
        self._columns = with_scales(path, columns)
        self.row_dtype = row_dtype(arrays)
        self.ignored = others(file.schema_arrow.names, self._columns)
        self._handles = handles.pop_all()

    def _fill(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        self._columns[name].read_into(start, out)

    def _close(self) -> None:
        self._columns.clear()
        self._handles.close()


class ParquetFormat(SparseModelFormat):
    """A Parquet file, read with pyarrow."""

    name = "parquet"
    suffixes = (".parquet",)
    reads_urls = True

    def detect(self, path: Place) -> bool:
        if not path.is_file():
            return False
        with open_file(path) as file:
            return file.read(4) == _MAGIC

    def _open(self, path: Place, dim: int | None) -> ParquetReader:
        if not isinstance(path, UrlPath):
            open_file(path).close()  # a clear message for what is not a readable file
        pa, parquet = _pyarrow(path)
        with ExitStack() as handles:
            if isinstance(path, UrlPath):
                source = handles.enter_context(pa.PythonFile(handles.enter_context(open_file(path)), mode="r"))
            else:
                source = handles.enter_context(pa.OSFile(str(path)))
            file = parquet.ParquetFile(source, buffer_size=PIECE_BYTES, pre_buffer=False, page_checksum_verification=True)
            return ParquetReader(path, dim, file, handles)


def _pyarrow(path: Place) -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as problem:
        raise ModelFileError(f'{path}: a Parquet file needs pyarrow: pip install "hps-numba[parquet]" ({problem})') from problem
    return pyarrow, pyarrow.parquet


def _declared(file: pyarrow.parquet.ParquetFile, path: Place, dim: int | None) -> dict[str, _Declared]:
    """Shapes and dtypes according to the footer."""
    schema, rows = file.schema_arrow, file.metadata.num_rows
    groups = sum(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))
    if groups != rows:
        raise ModelFileError(f"{path}: the footer counts {rows} rows, its row groups hold {groups}")
    arrays: dict[str, _Declared] = {}
    for name in NAMES:
        if name in schema.names:
            kind = schema.field(name).type
            if name == "emb_vector":
                arrays[name] = _Declared((rows, _width(file, path, kind, dim)), _number_type(path, name, kind.value_type))
            else:
                arrays[name] = _Declared((rows,), _number_type(path, name, kind))
    return arrays


def _number_type(path: Place, name: str, kind: pyarrow.DataType) -> np.dtype[Any]:
    try:
        return np.dtype(kind.to_pandas_dtype())
    except NotImplementedError:
        raise ModelFileError(f"{path}: {name}: expected numbers, got type {kind}") from None


def _width(file: pyarrow.parquet.ParquetFile, path: Place, kind: pyarrow.DataType, dim: int | None) -> int:
    """Values in a row: of the type, else as the caller says, else those of the first row."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise ModelFileError(f"{path}: emb_vector: expected lists of float32, got type {kind}")
    if dim is not None:
        return dim
    for batch in file.iter_batches(batch_size=1, columns=["emb_vector"], use_threads=False):
        if len(batch) and batch.column(0)[0].is_valid:
            return len(batch.column(0)[0])
        break
    raise ModelFileError(f"{path}: has no first row to tell the width of emb_vector; pass dim")


PLUGIN = ParquetFormat()
