"""Types of rows, answers and keys: their names, the numbers by which kernels know them, and their sizes. Said here only.

A cache stores rows as one of ``TYPE_NUMBERS`` and answers in one of ``OUT_TYPES`` (``cache.conversions`` converts). Keys lie in
the caller's memory in one of ``KEY_FORMS`` (``cache.keys`` reads them).
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "BFLOAT16",
    "CHECKED32_IN_INT64",
    "ELEMENT_BYTES",
    "FLOAT8_E4M3",
    "FLOAT16",
    "FLOAT32",
    "INT8",
    "INT32",
    "INT64",
    "KEY_BYTES",
    "KEY_DTYPES",
    "KEY_FORMS",
    "OUT_TYPES",
    "TYPE_NUMBERS",
    "UINT32",
    "row_stride",
    "scale_offset",
]

#: row types, by number
FLOAT32, FLOAT16, BFLOAT16, INT8, FLOAT8_E4M3 = range(5)
TYPE_NUMBERS = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16, "int8": INT8, "float8_e4m3": FLOAT8_E4M3}
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3": 1}
OUT_TYPES = ("float32", "float16", "bfloat16")
_SCALED = ("int8", "float8_e4m3")

#: key encodings, by number: int64; int32, sign-extended; uint32, zero-extended; int64 of which only 0..2**32-1 are legal keys
INT64, INT32, UINT32, CHECKED32_IN_INT64 = range(4)
KEY_FORMS = {"int64": INT64, "int32": INT32, "uint32": UINT32, "checked32_in_int64": CHECKED32_IN_INT64}
KEY_DTYPES: dict[str, Any] = {"int64": np.int64, "int32": np.int32, "uint32": np.uint32, "checked32_in_int64": np.int64}
KEY_BYTES = {form: np.dtype(dtype).itemsize for form, dtype in KEY_DTYPES.items()}


def scale_offset(dim: int, stored: str) -> int:
    """Offset in bytes of the scale in a stored row, or 0 if the type has none."""
    return -(-dim // 4) * 4 if stored in _SCALED else 0


def row_stride(dim: int, stored: str) -> int:
    """Bytes from one stored row to the next: a multiple of 16, or a power of two below."""
    size = scale_offset(dim, stored) + 4 if stored in _SCALED else dim * ELEMENT_BYTES[stored]
    if size >= 16:
        return -(-size // 16) * 16
    return 1 << max(2, (size - 1).bit_length())
