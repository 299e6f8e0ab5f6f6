"""The header of a ``.npy`` array, wherever it lies. Nothing is unpickled: an object dtype is an error before data is read."""

from __future__ import annotations

import math
from typing import IO, Any, NamedTuple

import numpy as np

from hps_numba.errors import ModelFileError
from hps_numba.storage.urls import Place

__all__ = ["NpyHeader", "read_npy_header"]


class NpyHeader(NamedTuple):
    """Shape, dtype and size in bytes of the array that follows."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def data_bytes(self) -> int:
        """Bytes after the header."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_npy_header(stream: IO[bytes], path: Place, name: str) -> NpyHeader:
    """Read the header and leave the stream at the first byte of data.

    Raises:
        ModelFileError: an unknown version, Python objects, or an order of elements that cannot be read row by row.
    """
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ModelFileError(f"{path}: {name}: expected .npy version 1.0 or 2.0, got {version[0]}.{version[1]}")
    if dtype.hasobject or dtype.subdtype is not None or dtype.names is not None:
        raise ModelFileError(f"{path}: {name}: expected plain numbers, got {dtype}")
    if fortran and len(shape) > 1:
        raise ModelFileError(f"{path}: {name} is stored by columns; save it from np.ascontiguousarray(...)")
    return NpyHeader(shape, dtype)
