"""A dump of NVIDIA's Sparse Operation Kit: ``<table>-key`` and ``<table>-weight`` in one folder.

Each file begins with 296 bytes: the table's name (256 bytes, padded with spaces on the left), the kind of file (0 keys, 1 rows,
2 optimizer state), the name of an optimizer variable (32 bytes, padded alike) and the dtype (0..6: int32, int64, uint32,
uint64, float16, float32, float64); the two numbers are 4 bytes, big-endian. Then follow the elements as NumPy's ``tofile``
writes them. Rows and width are not recorded: they come from the sizes. Optimizer states and ``meta_info`` are not read.

Source: https://github.com/NVIDIA-Merlin/HugeCTR, ``sparse_operation_kit/sparse_operation_kit/dump_load.py``.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._format import FormatOfTables
from hps_numba.storage.formats._pairs import open_pair
from hps_numba.storage.formats._raw import RawArrayReader, RawFile, file_size, names_in, open_file, read_exactly
from hps_numba.storage.formats._tables import pick_table
from hps_numba.storage.urls import Place

__all__ = ["PLUGIN", "SokFormat"]

_KEY, _WEIGHT = "-key", "-weight"
_HEADER_BYTES = 296
_KIND_AT, _DTYPE_AT = 256, 292
_DTYPES = tuple(np.dtype(code) for code in ("<i4", "<i8", "<u4", "<u8", "<f2", "<f4", "<f8"))
_KINDS = ("keys", "rows", "optimizer state")


class SokFormat(FormatOfTables):
    """A folder of files with headers, two a table."""

    name = "sok"
    suffixes = (".sok",)
    reads_urls = True

    def detect(self, path: Place) -> bool:
        if not path.is_dir():
            return False
        for name in _tables(path):
            with open_file(path / f"{name}{_KEY}") as file:
                return _looks_like_header(file)
        return False

    def _open_table(self, path: Place, dim: int | None, table: str | None) -> RawArrayReader:
        if not path.is_dir():
            raise ModelFileError(f"{path}: expected a directory holding <table>{_KEY} and <table>{_WEIGHT}, got a file")
        name = pick_table(path, _tables(path), table)
        with ExitStack() as handles:
            files = [handles.enter_context(open_file(path / f"{name}{ending}")) for ending in (_KEY, _WEIGHT)]
            dtypes = [
                _dtype(file, path / f"{name}{ending}", kind) for kind, (file, ending) in enumerate(zip(files, (_KEY, _WEIGHT)))
            ]
            places = [path / f"{name}{ending}" for ending in (_KEY, _WEIGHT)]
            arrays = open_pair(files, places, dtypes, dim, offset=_HEADER_BYTES)
            return RawArrayReader(path, dim, arrays, handles, is_model=False)


def _tables(path: Place) -> dict[str, str]:
    names = names_in(path)
    found = sorted(name.removesuffix(_KEY) for name in names if name.endswith(_KEY))
    return {name: name for name in found if name}


def _looks_like_header(file: RawFile) -> bool:
    if file_size(file) < _HEADER_BYTES:
        return False
    head = np.empty(_HEADER_BYTES, np.uint8)
    file.seek(0)
    head[:] = np.frombuffer(file.read(_HEADER_BYTES), np.uint8)
    return _number(head, _KIND_AT) < len(_KINDS) and _number(head, _DTYPE_AT) < len(_DTYPES)


def _number(head: np.ndarray, at: int) -> int:
    return int.from_bytes(head[at : at + 4].tobytes(), "big")


def _dtype(file: RawFile, path: Place, expected: int) -> np.dtype[Any]:
    if (size := file_size(file)) < _HEADER_BYTES:
        raise ModelFileError(f"{path}: expected a header of {_HEADER_BYTES} bytes, got a file of {size}")
    head = np.empty(_HEADER_BYTES, np.uint8)
    read_exactly(file, 0, head, path)
    kind, dtype = _number(head, _KIND_AT), _number(head, _DTYPE_AT)
    if kind != expected:
        got = f"a file of {_KINDS[kind]}" if kind < len(_KINDS) else f"{kind}"
        raise ModelFileError(f"{path}: expected kind {expected}, a file of {_KINDS[expected]}, got {got}")
    if dtype >= len(_DTYPES):
        raise ModelFileError(f"{path}: expected a dtype of 0..{len(_DTYPES) - 1}, got {dtype}")
    return _DTYPES[dtype]


PLUGIN = SokFormat()
