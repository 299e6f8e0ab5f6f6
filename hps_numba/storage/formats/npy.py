"""A directory with ``key.npy``, ``emb_vector.npy`` and, optionally, ``meta.npy``; or one file with a matrix, whose keys are
its row numbers. Both as ``np.save`` writes them. (The rows of a ``scale.npy`` go with int8.)
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import IO, cast

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._arrays import NAMES
from hps_numba.storage.formats._format import SparseModelFormat
from hps_numba.storage.formats._npy_header import read_npy_header
from hps_numba.storage.formats._raw import (
    RawArray,
    RawArrayReader,
    RawFile,
    RowNumbers,
    file_size,
    names_in,
    open_file,
    open_folder,
)
from hps_numba.storage.urls import Place

__all__ = ["PLUGIN", "NpyFormat"]

_MAGIC = b"\x93NUMPY"


class NpyFormat(SparseModelFormat):
    """A directory of ``.npy`` files, or one of two dimensions."""

    name = "npy"
    suffixes = (".npy",)
    reads_urls = True

    def detect(self, path: Place) -> bool:
        if path.is_dir():
            return (path / "key.npy").exists() or (path / "emb_vector.npy").exists()
        if not path.is_file():
            return False
        with open_file(path) as file:
            return file.read(len(_MAGIC)) == _MAGIC

    def _open(self, path: Place, dim: int | None) -> RawArrayReader:
        return self._open_folder(path, dim) if path.is_dir() else self._open_matrix(path, dim)

    def _open_matrix(self, path: Place, dim: int | None) -> RawArrayReader:
        with ExitStack() as handles:
            matrix = _array(handles.enter_context(open_file(path)), path, "emb_vector")
            if len(matrix.shape) != 2:
                expected = "two dimensions, rows by their keys 0, 1, 2, ..."
                raise ModelFileError(f"{path}: expected {expected}, got shape {list(matrix.shape)}")
            return RawArrayReader(
                path, dim, {"key": RowNumbers(matrix.shape[0]), "emb_vector": matrix}, handles, is_model=False
            )

    def _open_folder(self, path: Place, dim: int | None) -> RawArrayReader:
        with ExitStack() as handles, open_folder(path) as folder:
            arrays, names = {}, names_in(path, folder=folder)
            for name in NAMES:
                file_name = f"{name}.npy"
                if name in ("key", "emb_vector") or file_name in names:
                    file = handles.enter_context(open_file(path / file_name, folder=folder))
                    arrays[name] = _array(file, path / file_name, name)
            return RawArrayReader(path, dim, arrays, handles, [name.removesuffix(".npy") for name in names])


def _array(file: RawFile, path: Place, name: str) -> RawArray:
    header = read_npy_header(cast(IO[bytes], file), path, name)
    offset, size = file.tell(), file_size(file)
    if size != offset + header.data_bytes:
        expected = f"{offset} + {header.data_bytes} bytes for {header.dtype}{list(header.shape)}"
        raise ModelFileError(f"{path}: expected {expected}, got {size}")
    return RawArray(file, path, name, offset, header.shape, header.dtype)


PLUGIN = NpyFormat()
