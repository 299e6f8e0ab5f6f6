"""How keys and rows lie in a caller's arrays, in the words that kernels are specialized by: said once.

``key_bits`` is the width of a server's keys: 64, or 32 (``supportlonglong`` false). A key encoding tells a kernel how to read
one integer of the caller's memory: ``int64``; ``int32``, sign-extended; ``uint32``, zero-extended; ``checked32_in_int64``, an
int64 that is an absent key unless it lies in 0..2^32-1.
"""

from __future__ import annotations

from hps_numba.kernels.dtypes import ELEMENT_BYTES, KEY_BYTES, OUT_TYPES

__all__ = ["ELEMENT_BYTES", "KEY_ALIGNMENT", "KEY_ENCODINGS", "NARROW_INTEGERS", "OUTPUT_TYPES", "as_key"]

#: kernels read integers of 32 and 64 bits only; these are converted to int32 first
NARROW_INTEGERS = frozenset({"int8", "int16", "uint8", "uint16"})
#: key encoding by the server's key bits, then by the dtype of the keys
KEY_ENCODINGS: dict[int, dict[str, str]] = {
    64: {"int64": "int64", "uint64": "int64", "int32": "int32", "uint32": "uint32", **dict.fromkeys(NARROW_INTEGERS, "int32")},
    32: dict.fromkeys(["int64", "uint64"], "checked32_in_int64")
    | dict.fromkeys(["int32", "uint32", *NARROW_INTEGERS], "uint32"),
}
#: bytes to which keys of an encoding must be aligned
KEY_ALIGNMENT = KEY_BYTES
#: element types that answers may have; caches may store others
OUTPUT_TYPES = OUT_TYPES


def as_key(number: int, *, key_bits: int) -> int:
    """An integer as kernels see a key of that value."""
    return ((number + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63) if key_bits == 64 else number & 0xFFFFFFFF
