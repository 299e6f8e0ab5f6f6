"""HugeCTR's directory form: raw ``key`` (int64), ``emb_vector`` (float32), optional ``meta`` (int64).

No headers: the number of rows is ``size(key) / 8`` and nothing records the width. ``size(emb_vector)`` must be
``4 * dim * rows``; HugeCTR HPS does not check that and serves shifted rows. Little-endian everywhere.

Rows of fewer bytes are declared: a text file ``dtype`` says ``float16``, ``bfloat16`` or ``int8`` (with ``scale``, a float32 a
row). HugeCTR HPS does not know these; without ``dtype``, rows are float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._arrays import ROW_DTYPES
from hps_numba.storage.formats._format import Chunk, SparseModelFormat
from hps_numba.storage.formats._raw import RawArray, RawArrayReader, file_size, names_in, open_file, open_folder
from hps_numba.storage.formats._rounding import as_stored
from hps_numba.storage.urls import Place

__all__ = ["PLUGIN", "DirectoryFormat"]

_KEY = np.dtype("<i8")
_VALUE = np.dtype("<f4")
_LONGEST_NAME = 64


class DirectoryFormat(SparseModelFormat):
    """A directory with files ``key`` and ``emb_vector``."""

    name = "directory"
    suffixes = ("", ".model")
    can_write = True
    row_dtypes = tuple(ROW_DTYPES)
    reads_urls = True

    def detect(self, path: Place) -> bool:
        return path.is_dir() and ((path / "key").exists() or (path / "emb_vector").exists())

    def _open(self, path: Place, dim: int | None) -> RawArrayReader:
        if not path.is_dir():
            raise ModelFileError(f"{path}: expected a directory holding key and emb_vector, got a file")
        with ExitStack() as handles, open_folder(path) as folder:
            files = {name: handles.enter_context(open_file(path / name, folder=folder)) for name in ("key", "emb_vector")}
            names = names_in(path, folder=folder)
            stored = _declared(path / "dtype", folder) if "dtype" in names else _VALUE
            for name in ("meta", "scale") if stored == ROW_DTYPES["int8"] else ("meta",):
                if name in names:
                    files[name] = handles.enter_context(open_file(path / name, folder=folder))
            sizes = {name: file_size(file) for name, file in files.items()}
            rows, dim = _rows_and_dim(path, sizes, dim, stored)
            dtypes = {"key": _KEY, "emb_vector": stored, "meta": _KEY, "scale": _VALUE}
            arrays = {
                name: RawArray(file, path / name, name, 0, (rows, dim) if name == "emb_vector" else (rows,), dtypes[name])
                for name, file in files.items()
            }
            return RawArrayReader(path, dim, arrays, handles, names - {"dtype"})

    def write(self, path: Path, dim: int, chunks: Iterable[Chunk], *, dtype: str = "float32") -> int:
        path.mkdir()
        total = 0
        with ExitStack() as handles:
            key = handles.enter_context((path / "key").open("wb"))
            emb_vector = handles.enter_context((path / "emb_vector").open("wb"))
            scale = handles.enter_context((path / "scale").open("wb")) if dtype == "int8" else None
            if dtype != "float32":
                (path / "dtype").write_text(f"{dtype}\n")
            meta_file = None
            for keys, rows, meta in chunks:
                key.write(_bytes(keys, _KEY))
                stored, scales = as_stored(rows, dtype)
                emb_vector.write(_bytes(stored, ROW_DTYPES[dtype]))
                if scale is not None and scales is not None:
                    scale.write(_bytes(scales, _VALUE))
                if meta is not None:
                    meta_file = meta_file or handles.enter_context((path / "meta").open("wb"))
                    meta_file.write(_bytes(meta, _KEY))
                total += len(keys)
        return total


def _declared(path: Place, folder: int | None) -> np.dtype[Any]:
    """What the file ``dtype`` says that rows are."""
    with open_file(path, folder=folder) as file:
        name = file.read(_LONGEST_NAME).decode("ascii", "replace").strip()
    if name not in ROW_DTYPES:
        raise ModelFileError(f"{path}: expected one of {', '.join(ROW_DTYPES)}, got {name!r}")
    return ROW_DTYPES[name]


def _bytes(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> memoryview:
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data


def _rows_and_dim(path: Place, sizes: dict[str, int], dim: int | None, stored: np.dtype[Any]) -> tuple[int, int]:
    """Rows and width from the sizes in bytes; sizes that do not fit together are an error."""
    key, emb_vector, bytes_each = sizes["key"], sizes["emb_vector"], stored.itemsize
    if key % 8:
        hint = "; are these int32 keys?" if key % 4 == 0 else ""
        raise ModelFileError(f"{path / 'key'}: expected a multiple of 8 bytes (int64 keys), got {key}{hint}")
    if emb_vector % bytes_each:
        what = f"{bytes_each} bytes ({next(name for name, dtype in ROW_DTYPES.items() if dtype == stored)} values)"
        raise ModelFileError(f"{path / 'emb_vector'}: expected a multiple of {what}, got {emb_vector}")
    if sizes.get("meta", key) != key:
        raise ModelFileError(f"{path / 'meta'}: expected {key} bytes, as in key, got {sizes['meta']}")
    rows = key // 8
    if sizes.get("scale", 4 * rows) != 4 * rows:
        raise ModelFileError(f"{path / 'scale'}: expected 4 * {rows} bytes (float32 a row), got {sizes['scale']}")
    if dim is None:
        dim = _inferred_dim(path, rows, emb_vector, bytes_each)
    if emb_vector != bytes_each * dim * rows:
        size = f"{bytes_each} * {dim} * {rows} = {bytes_each * dim * rows}"
        expected = f"{size} bytes for {rows} keys of width {dim}"
        hints = (
            {2 * dim * rows: "; are these float16 rows?", 8 * dim * rows: "; are the keys int32?"} if bytes_each == 4 else {}
        )
        raise ModelFileError(f"{path / 'emb_vector'}: expected {expected}, got {emb_vector}{hints.get(emb_vector, '')}")
    return rows, dim


def _inferred_dim(path: Place, rows: int, emb_vector: int, bytes_each: int) -> int:
    if rows == 0 and emb_vector == 0:
        raise ModelFileError(f"{path}: has no rows, so that its width is unknown; pass dim")
    if rows == 0 or emb_vector == 0 or emb_vector % (bytes_each * rows):
        expected = f"{bytes_each} * dim * {rows} bytes for {rows} keys and a whole dim"
        raise ModelFileError(f"{path / 'emb_vector'}: expected {expected}, got {emb_vector}")
    return emb_vector // (bytes_each * rows)


PLUGIN = DirectoryFormat()
