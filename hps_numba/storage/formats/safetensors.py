"""A ``.safetensors`` file with ``key``, ``emb_vector`` and, optionally, ``meta``.

Problem: the library maps the file into memory, so that a file that is cut short while it is read ends the process with
SIGBUS, and every slice is a copy. Choice: the header (8 bytes of length, then JSON) is read here and rows come by
``readinto``; a side effect is that nothing needs to be installed. Source: https://github.com/huggingface/safetensors,
"Format".
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from typing import Any

import numpy as np

from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._arrays import BFLOAT16, NAMES
from hps_numba.storage.formats._format import SparseModelFormat
from hps_numba.storage.formats._raw import RawArray, RawArrayReader, RawFile, file_size, open_file, read_exactly
from hps_numba.storage.urls import Place

__all__ = ["PLUGIN", "SafetensorsFormat"]

_HEADER_LIMIT = 100_000_000
_NUMBERS = {
    **{f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    "BF16": BFLOAT16,
}


class SafetensorsFormat(SparseModelFormat):
    """A safetensors file."""

    name = "safetensors"
    suffixes = (".safetensors",)
    reads_urls = True

    def detect(self, path: Place) -> bool:
        if not path.is_file():
            return False
        with open_file(path) as file:
            start, size = file.read(9), file_size(file)
        return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8

    def _open(self, path: Place, dim: int | None) -> RawArrayReader:
        with ExitStack() as handles:
            file = handles.enter_context(open_file(path))
            header, offset = _header(file, path)
            _check_end(path, header, file_size(file) - offset)
            names: list[str] = [name for name in NAMES if name in header]
            arrays = {name: _array(file, path, name, header[name], offset) for name in names}
            return RawArrayReader(path, dim, arrays, handles, list(header))


def _header(file: RawFile, path: Place) -> tuple[dict[str, Any], int]:
    """The entries of the header by name, and the offset of the data."""
    size = np.zeros(1, "<u8")
    read_exactly(file, 0, size, path)
    length = int(size[0])
    if not 2 <= length <= _HEADER_LIMIT:
        raise ModelFileError(f"{path}: expected a header of 2 to {_HEADER_LIMIT} bytes, got {length}: not a safetensors file?")
    text = np.empty(length, np.uint8)
    read_exactly(file, 8, text, path)
    header = json.loads(text.tobytes())
    if not isinstance(header, dict):
        raise ModelFileError(f"{path}: expected a JSON object as the header, got {type(header).__name__}")
    header.pop("__metadata__", None)
    return header, 8 + length


def _check_end(path: Place, header: dict[str, Any], data_bytes: int) -> None:
    """The data of the last tensor ends with the file; so a file that was cut or has grown is noticed at once."""
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != data_bytes:
        raise ModelFileError(f"{path}: expected {end} bytes of data, as the header says, got {data_bytes}")


def _array(file: RawFile, path: Place, name: str, entry: dict[str, Any], offset: int) -> RawArray:
    if entry["dtype"] not in _NUMBERS:
        raise ModelFileError(f"{path}: {name}: expected a dtype of {', '.join(_NUMBERS)}, got {entry['dtype']}")
    dtype, shape = _NUMBERS[entry["dtype"]], tuple(int(length) for length in entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ModelFileError(
            f"{path}: {name} has {end - begin} bytes from {begin} on, but its shape is {entry['dtype']}{list(shape)}"
        )
    return RawArray(file, path, name, offset + begin, shape, dtype)


PLUGIN = SafetensorsFormat()
