"""An HDF5 file with datasets ``key``, ``emb_vector`` and, optionally, ``meta`` at its root.

Problem: where bytes are missing, HDF5 answers zeros: for chunks that were never written, for a source of a virtual
dataset that is gone, and past the end of a file that was cut short. Choice: a dataset that is virtual, external or not
wholly allocated is refused (``_hdf5_storage.py``), and the size of the file is looked at after every read. Files written
here carry checksums on metadata and on every chunk.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._arrays import (
    NAMES,
    PIECE_BYTES,
    ROW_DTYPES,
    assign,
    check_arrays,
    is_stored_as,
    others,
    piece_rows,
    row_dtype,
    with_scales,
)
from hps_numba.storage.formats._format import Chunk, SparseModelFormat, SparseModelReader
from hps_numba.storage.formats._hdf5_storage import check_storage, chunk_counts, find_dataset
from hps_numba.storage.formats._raw import RawFile, file_size, open_file
from hps_numba.storage.formats._rounding import as_stored
from hps_numba.storage.urls import Place, UrlPath

if TYPE_CHECKING:
    import h5py

__all__ = ["PLUGIN", "Hdf5Format", "Hdf5Reader"]

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_CHUNK_BYTES = 128 << 10  # a table of one row takes a chunk, too


class Hdf5Reader(SparseModelReader):
    """Reads rows with ``read_direct``: unpacked chunks go straight to the caller's arrays."""

    def __init__(self, path: Place, dim: int | None, file: h5py.File, raw: RawFile | None, handles: ExitStack) -> None:
        import h5py

        found = {name: _dataset(file, path, name) for name in NAMES}
        self._datasets = {name: dataset for name, dataset in found.items() if dataset is not None}
        super().__init__(path, *check_arrays(path, self._datasets, dim, list(file)), has_meta="meta" in self._datasets)
        self._arrays = with_scales(path, {name: _Array(self, name, set_) for name, set_ in self._datasets.items()})
        self.ignored = others(file, self._arrays)
        self.row_dtype = row_dtype(self._datasets)
        self._descriptor: int | None = file.id.get_vfd_handle() if raw is None else None
        self._size = file_size(raw) if raw is not None else os.fstat(file.id.get_vfd_handle()).st_size
        for name, dataset in self._datasets.items():
            check_storage(h5py, path, name, dataset, self._size)
        self.working_bytes = _working_bytes(self._datasets.values())
        self._handles = handles.pop_all()

    def _fill(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        self._arrays[name].read_into(start, out)

    def fill_stored(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` from a dataset of the file. **Writes:** out."""
        dataset = self._datasets[name]
        if is_stored_as(dataset.dtype, out.dtype):
            dataset.read_direct(out, np.s_[start : start + len(out)])
        else:
            self._fill_by_pieces(name, start, out)
        if self._descriptor is None:  # a URL, where every read checks what came
            return
        size = os.fstat(self._descriptor).st_size
        if size < self._size:
            raise ModelFileError(f"{self.path}: {size} bytes, had {self._size} when it was opened; was it cut short?")

    def _fill_by_pieces(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        """HDF5's own conversion clips integers and turns large floats into infinity, both silently."""
        dataset = self._datasets[name]
        step = min(len(out), piece_rows(dataset.dtype.itemsize * (self.dim if out.ndim > 1 else 1)))
        buffer = np.empty((step, *out.shape[1:]), dataset.dtype.newbyteorder("="))
        for first in range(0, len(out), step):
            piece = buffer[: len(out) - first]
            dataset.read_direct(piece, np.s_[start + first : start + first + len(piece)])
            assign(out[first : first + len(piece)], piece, self.path, name)

    def _close(self) -> None:
        self._arrays.clear()
        self._datasets.clear()
        self._handles.close()


class _Array:
    """One dataset of a reader."""

    def __init__(self, reader: Hdf5Reader, name: str, dataset: h5py.Dataset) -> None:
        self._reader, self._name = reader, name
        self.shape, self.dtype = dataset.shape, dataset.dtype

    def read_into(self, start: int, out: npt.NDArray[Any]) -> None:
        self._reader.fill_stored(self._name, start, out)


class Hdf5Format(SparseModelFormat):
    """An HDF5 file, read and written with h5py."""

    name = "hdf5"
    suffixes = (".h5", ".hdf5")
    can_write = True
    row_dtypes = ("float32", "float16", "int8")
    reads_urls = True

    def detect(self, path: Place) -> bool:
        if not path.is_file():
            return False
        with open_file(path) as file:
            return file.read(8) == _SIGNATURE

    def _open(self, path: Place, dim: int | None) -> Hdf5Reader:
        import h5py

        with ExitStack() as handles:
            raw = handles.enter_context(open_file(path))  # a clear message for what is not a readable file
            if isinstance(path, UrlPath):
                file = handles.enter_context(h5py.File(raw, "r"))
                return Hdf5Reader(path, dim, file, raw, handles)
            raw.close()
            file = handles.enter_context(h5py.File(path, "r", locking="best-effort"))
            return Hdf5Reader(path, dim, file, None, handles)

    def write(self, path: Path, dim: int, chunks: Iterable[Chunk], *, dtype: str = "float32") -> int:
        import h5py

        total = 0
        with io.FileIO(path, "xb+") as raw:
            disk = _Disk(raw)
            with h5py.File(disk, "w", libver=("v110", "v110")) as file:
                _create(file, "key", np.int64, ())
                _create(file, "emb_vector", ROW_DTYPES[dtype], (dim,))
                if dtype == "int8":
                    _create(file, "scale", np.float32, ())
                for keys, rows, meta in chunks:
                    if meta is not None and "meta" not in file:
                        _create(file, "meta", np.int64, ())
                    stored, scales = as_stored(rows, dtype)
                    for name, array in (("key", keys), ("emb_vector", stored), ("meta", meta), ("scale", scales)):
                        if array is not None:
                            file[name].resize(total + len(array), axis=0)
                            file[name][total:] = array
                    total += len(keys)
                    disk.check()
            disk.check()
        return total


class _Disk:
    """The file that HDF5 writes to. After a first failure it takes everything and keeps nothing; :meth:`check` tells.

    When HDF5 itself meets a full disk, closing the file fails, and the process ends with SIGSEGV when it exits.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._problem: OSError | None = None

    def check(self) -> None:
        """Raise what the first failure was, if any."""
        if self._problem is not None:
            raise self._problem

    def write(self, data: bytearray) -> int:
        try:
            view = memoryview(data).cast("B")
            while len(view) and self._problem is None:
                view = view[self._file.write(view) :]
        except OSError as problem:
            self._problem = problem
        return len(data)

    def truncate(self, size: int) -> int:
        try:
            if self._problem is None:
                self._file.truncate(size)
        except OSError as problem:
            self._problem = problem
        return size

    def flush(self) -> None:
        """Nothing is buffered here."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def readinto(self, buffer: memoryview) -> int:
        return self._file.readinto(buffer)


def _create(file: h5py.File, name: str, dtype: npt.DTypeLike, row_shape: tuple[int, ...]) -> None:
    rows = max(1, _CHUNK_BYTES // (np.dtype(dtype).itemsize * math.prod(row_shape)))
    shape, limit, chunk = (0, *row_shape), (None, *row_shape), (rows, *row_shape)
    file.create_dataset(name, shape, dtype, maxshape=limit, chunks=chunk, fletcher32=True)


def _dataset(file: h5py.File, path: Place, name: str) -> h5py.Dataset | None:
    """The dataset, with a chunk cache for all chunks of a row, so that no chunk is unpacked twice; None if there is none."""
    import h5py

    place = find_dataset(h5py, file, path, name)
    if place is None:
        return None
    dataset = h5py.Dataset(h5py.h5d.open(*place))
    if dataset.shape is None:
        raise ModelFileError(f"{path}: {name}: expected a dataset of numbers, got a Dataset without a shape")
    if dataset.chunks is None:
        return dataset
    if (size := _cache_bytes(dataset)) <= PIECE_BYTES:  # HDF5's default
        return dataset
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    access.set_chunk_cache(521, size, 1.0)
    del dataset  # HDF5 keeps the cache of a dataset that is open already
    return h5py.Dataset(h5py.h5d.open(*place, access))


def _working_bytes(datasets: Iterable[h5py.Dataset]) -> int:
    """Chunks that HDF5 holds unpacked, and the largest one while it passes through filters."""
    chunked = [dataset for dataset in datasets if dataset.chunks is not None and _cache_bytes(dataset) > PIECE_BYTES]
    filtered = [dataset for dataset in chunked if dataset.id.get_create_plist().get_nfilters()]
    passing = max((math.prod(dataset.chunks) * dataset.dtype.itemsize for dataset in filtered), default=0)
    return sum(map(_cache_bytes, chunked)) + passing


def _cache_bytes(dataset: h5py.Dataset) -> int:
    """Bytes of all chunks of a row."""
    return math.prod(dataset.chunks) * dataset.dtype.itemsize * math.prod(chunk_counts(dataset)[1:])


PLUGIN = Hdf5Format()
