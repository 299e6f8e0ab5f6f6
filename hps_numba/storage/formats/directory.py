"""HugeCTR's directory form: raw ``key`` (int64), ``emb_vector`` (float32), optional ``meta`` (int64).

No headers: the number of rows is ``size(key) / 8`` and nothing records the width. ``size(emb_vector)`` must be
``4 * dim * rows``; HugeCTR HPS does not check that and serves shifted rows. Little-endian everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._format import Chunk, SparseModelFormat
from hps_numba.storage.formats._raw import RawArray, RawArrayReader, names_in, open_file, open_folder

__all__ = ["PLUGIN", "DirectoryFormat"]

_KEY = np.dtype("<i8")
_VALUE = np.dtype("<f4")


class DirectoryFormat(SparseModelFormat):
    """A directory with files ``key`` and ``emb_vector``."""

    name = "directory"
    suffixes = ("", ".model")
    can_write = True

    def detect(self, path: Path) -> bool:
        return path.is_dir() and ((path / "key").exists() or (path / "emb_vector").exists())

    def _open(self, path: Path, dim: int | None) -> RawArrayReader:
        if not path.is_dir():
            raise ModelFileError(f"{path}: expected a directory holding key and emb_vector, got a file")
        with ExitStack() as handles, open_folder(path) as folder:
            files = {name: handles.enter_context(open_file(path / name, folder=folder)) for name in ("key", "emb_vector")}
            names = names_in(path, folder=folder)
            if "meta" in names:
                files["meta"] = handles.enter_context(open_file(path / "meta", folder=folder))
            sizes = {name: os.fstat(file.fileno()).st_size for name, file in files.items()}
            rows, dim = _rows_and_dim(path, sizes, dim)
            arrays = {
                name: RawArray(file, path / name, name, 0, (rows, dim) if name == "emb_vector" else (rows,), _dtype(name))
                for name, file in files.items()
            }
            return RawArrayReader(path, dim, arrays, handles, names)

    def write(self, path: Path, dim: int, chunks: Iterable[Chunk]) -> int:
        path.mkdir()
        total = 0
        with ExitStack() as handles:
            key = handles.enter_context((path / "key").open("wb"))
            emb_vector = handles.enter_context((path / "emb_vector").open("wb"))
            meta_file = None
            for keys, rows, meta in chunks:
                key.write(_bytes(keys, _KEY))
                emb_vector.write(_bytes(rows, _VALUE))
                if meta is not None:
                    meta_file = meta_file or handles.enter_context((path / "meta").open("wb"))
                    meta_file.write(_bytes(meta, _KEY))
                total += len(keys)
        return total


def _dtype(name: str) -> np.dtype[Any]:
    return _VALUE if name == "emb_vector" else _KEY


def _bytes(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> memoryview:
    return np.ascontiguousarray(array, dtype).data


def _rows_and_dim(path: Path, sizes: dict[str, int], dim: int | None) -> tuple[int, int]:
    """Rows and width from the sizes in bytes; sizes that do not fit together are an error."""
    key, emb_vector = sizes["key"], sizes["emb_vector"]
    if key % 8:
        hint = "; are these int32 keys?" if key % 4 == 0 else ""
        raise ModelFileError(f"{path / 'key'}: expected a multiple of 8 bytes (int64 keys), got {key}{hint}")
    if emb_vector % 4:
        raise ModelFileError(f"{path / 'emb_vector'}: expected a multiple of 4 bytes (float32 values), got {emb_vector}")
    if sizes.get("meta", key) != key:
        raise ModelFileError(f"{path / 'meta'}: expected {key} bytes, as in key, got {sizes['meta']}")
    rows = key // 8
    if dim is None:
        dim = _inferred_dim(path, rows, emb_vector)
    if emb_vector != 4 * dim * rows:
        expected = f"4 * {dim} * {rows} = {4 * dim * rows} bytes for {rows} keys of width {dim}"
        hint = {2 * dim * rows: "; are these float16 rows?", 8 * dim * rows: "; are the keys int32?"}.get(emb_vector, "")
        raise ModelFileError(f"{path / 'emb_vector'}: expected {expected}, got {emb_vector}{hint}")
    return rows, dim


def _inferred_dim(path: Path, rows: int, emb_vector: int) -> int:
    if rows == 0 and emb_vector == 0:
        raise ModelFileError(f"{path}: has no rows, so that its width is unknown; pass dim")
    if rows == 0 or emb_vector == 0 or emb_vector % (4 * rows):
        raise ModelFileError(
            f"{path / 'emb_vector'}: expected 4 * dim * {rows} bytes for {rows} keys and a whole dim, got {emb_vector}"
        )
    return emb_vector // (4 * rows)


PLUGIN = DirectoryFormat()
