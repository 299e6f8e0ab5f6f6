"""A directory with ``key.npy``, ``emb_vector.npy`` and, optionally, ``meta.npy``, as ``np.save`` writes them."""

from __future__ import annotations

import io
import os
from contextlib import ExitStack
from pathlib import Path

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._format import SparseModelFormat
from hps_numba.storage.formats._npy_header import read_npy_header
from hps_numba.storage.formats._raw import RawArray, RawArrayReader, names_in, open_file, open_folder

__all__ = ["PLUGIN", "NpyFormat"]


class NpyFormat(SparseModelFormat):
    """A directory of ``.npy`` files."""

    name = "npy"
    suffixes = (".npy",)

    def detect(self, path: Path) -> bool:
        return (path / "key.npy").exists() or (path / "emb_vector.npy").exists()

    def _open(self, path: Path, dim: int | None) -> RawArrayReader:
        if not path.is_dir():
            raise ModelFileError(f"{path}: expected a directory holding key.npy and emb_vector.npy, got a file")
        with ExitStack() as handles, open_folder(path) as folder:
            arrays, names = {}, names_in(path, folder=folder)
            for name in ("key", "emb_vector", "meta"):
                file_name = f"{name}.npy"
                if name != "meta" or file_name in names:
                    file = handles.enter_context(open_file(path / file_name, folder=folder))
                    arrays[name] = _array(file, path / file_name, name)
            return RawArrayReader(path, dim, arrays, handles, [name.removesuffix(".npy") for name in names])


def _array(file: io.FileIO, path: Path, name: str) -> RawArray:
    header = read_npy_header(file, path, name)
    offset, size = file.tell(), os.fstat(file.fileno()).st_size
    if size != offset + header.data_bytes:
        expected = f"{offset} + {header.data_bytes} bytes for {header.dtype}{list(header.shape)}"
        raise ModelFileError(f"{path}: expected {expected}, got {size}")
    return RawArray(file, path, name, offset, header.shape, header.dtype)


PLUGIN = NpyFormat()
