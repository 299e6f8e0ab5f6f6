"""A ``.nve`` file of NVIDIA's embedding cache (``pynve.torch.nve_export``): matrices whose row number is the key.

The file begins with three uint32: 0x4e564500 and the version, 0 and 2. Each matrix follows as four uint64 and its bytes:
``columns | element bytes << 16 | rows << 20``, the id of the layer, the offset of the next matrix, and the number of bytes; all
little-endian. Elements of 4 bytes are taken for float32. What elements of 2 bytes are says only ``metadata.json`` of the export
(``layers``: ``id``, ``dtype``), which lies in the folder above ``weights/``; without it they are an error.

Source: https://github.com/NVIDIA/nv-embedding-cache, ``include/serialization.hpp``, ``src/serialization.cpp`` and
``python/pynve/torch/nve_export.py``.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._arrays import BFLOAT16
from hps_numba.storage.formats._format import FormatOfTables
from hps_numba.storage.formats._raw import RawArray, RawArrayReader, RawFile, RowNumbers, file_size, open_file, read_exactly
from hps_numba.storage.formats._tables import pick_table
from hps_numba.storage.urls import Place

__all__ = ["PLUGIN", "NveFormat"]

_MAGIC = 0x4E564500
_VERSION = (0, 2)
_FIRST = 12
_ENTRY_BYTES = 32
_METADATA_LIMIT = 16 << 20
_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": BFLOAT16}


class _Matrix(NamedTuple):
    layer: str
    rows: int
    columns: int
    element_bytes: int
    offset: int


class NveFormat(FormatOfTables):
    """One file of matrices."""

    name = "nve"
    suffixes = (".nve",)
    reads_urls = True

    def detect(self, path: Place) -> bool:
        if not path.is_file():
            return False
        with open_file(path) as file:
            return file.read(4) == _MAGIC.to_bytes(4, "little")

    def _open_table(self, path: Place, dim: int | None, table: str | None) -> RawArrayReader:
        with ExitStack() as handles:
            file = handles.enter_context(open_file(path))
            matrix = pick_table(path, _matrices(file, path), table)
            shape = matrix.rows, matrix.columns
            rows = RawArray(file, path, "emb_vector", matrix.offset, shape, _dtype(path, matrix))
            return RawArrayReader(path, dim, {"key": RowNumbers(matrix.rows), "emb_vector": rows}, handles, is_model=False)


def _matrices(file: RawFile, path: Place) -> dict[str, _Matrix]:
    """Layer -> its matrix."""
    size = file_size(file)
    if size < _FIRST:
        raise ModelFileError(f"{path}: expected a header of {_FIRST} bytes, got a file of {size}")
    head = np.empty(3, "<u4")
    read_exactly(file, 0, head, path)
    magic, *version = (int(number) for number in head)
    if magic != _MAGIC or tuple(version) != _VERSION:
        expected = f"{_MAGIC:#x} and version {_VERSION[0]}.{_VERSION[1]}"
        raise ModelFileError(f"{path}: expected {expected}, got {magic:#x} and version {version[0]}.{version[1]}")
    found: dict[str, _Matrix] = {}
    offset = _FIRST
    while offset < size:
        matrix, offset = _matrix(file, path, offset, size)
        if matrix.layer in found:
            raise ModelFileError(f"{path}: expected one matrix a layer, got another one of layer {matrix.layer}")
        found[matrix.layer] = matrix
    return found


def _matrix(file: RawFile, path: Place, offset: int, size: int) -> tuple[_Matrix, int]:
    """The matrix whose entry is at ``offset``, and where the next entry is."""
    if offset + _ENTRY_BYTES > size:
        raise ModelFileError(f"{path}: expected an entry of {_ENTRY_BYTES} bytes at byte {offset}, got a file of {size}")
    entry = np.empty(4, "<u8")
    read_exactly(file, offset, entry, path)
    shape, layer, after, length = (int(number) for number in entry)
    columns, element_bytes, rows = shape & 0xFFFF, shape >> 16 & 0xF, shape >> 20
    start = offset + _ENTRY_BYTES
    expected = columns * element_bytes * rows
    if length != expected or after != start + length or after > size:
        raise ModelFileError(
            f"{path}: layer {layer}: expected {expected} bytes for {rows} x {columns} elements of {element_bytes} bytes, "
            f"from byte {start} to {start + expected} of {size}, got {length} bytes to {after}"
        )
    return _Matrix(str(layer), rows, columns, element_bytes, start), after


def _dtype(path: Place, matrix: _Matrix) -> np.dtype[Any]:
    if matrix.element_bytes == _DTYPES["float32"].itemsize:
        return _DTYPES["float32"]
    name = _declared(path, matrix.layer)
    if name not in _DTYPES or _DTYPES[name].itemsize != matrix.element_bytes:
        where = f"{path}: layer {matrix.layer}: expected float32, float16 or bfloat16"
        raise ModelFileError(f"{where}, got elements of {matrix.element_bytes} bytes, which metadata.json says are {name}")
    return _DTYPES[name]


def _declared(path: Place, layer: str) -> str:
    """The dtype of a layer in the ``metadata.json`` of the export."""
    metadata = path.parent.parent / "metadata.json"
    if not metadata.is_file():
        raise ModelFileError(f"{path}: expected {metadata}, which tells float16 from bfloat16, found none")
    with open_file(metadata) as file:
        if file_size(file) > _METADATA_LIMIT:
            raise ModelFileError(f"{metadata}: expected {_METADATA_LIMIT} bytes at most, got {file_size(file)}")
        text = np.empty(file_size(file), np.uint8)
        if len(text):
            read_exactly(file, 0, text, metadata)
    try:
        content = json.loads(text.tobytes())
        layers = content["layers"] if isinstance(content, dict) else content
        names = {str(entry["dtype"]) for entry in layers if str(entry["id"]) == layer}
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        raise ModelFileError(f"{metadata}: expected layers with id and dtype, got something else: {problem!r:.200}") from None
    return next(iter(names)) if len(names) == 1 else "nothing certain"


PLUGIN = NveFormat()
