"""Tensors on the wire: shapes and values that a peer sent, checked before memory is taken for them.

A tensor is either bytes, little-endian in row-major order, or a JSON list, flat or nested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np

from hps_numba.frontends.inference.problems import InferenceError

__all__ = ["check_bytes", "checked_parameters", "checked_shape", "tensor_of_bytes", "tensor_of_list"]

MAX_DIMENSIONS = 16
_MAX_SIZE = 1 << 40  # elements of an axis: more than any memory, so that products stay small integers
_FEW = 4096  # bytes, whose copy costs nothing
_NUMBERS: Mapping[str, tuple[type, ...]] = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float)}


def checked_shape(value: Any, place: str) -> tuple[int, ...]:
    """The shape that a peer sent.

    Raises:
        InferenceError: 400, it is no list of sizes.
    """
    sizes = tuple(value) if isinstance(value, list) else None
    if sizes is None or len(sizes) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size <= _MAX_SIZE for size in sizes):
        raise InferenceError(
            400, f"{place}.shape: expected a list of at most {MAX_DIMENSIONS} sizes from 0 to 2**40, got {_shown(value)}"
        )
    return sizes


def checked_parameters(value: Any, place: str) -> dict[str, Any]:
    """The parameters that a peer sent: strings, numbers and bools by name.

    Raises:
        InferenceError: 400, they are something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InferenceError(400, f"{place}.parameters: expected an object, got {_shown(value)}")
    for name, one in value.items():
        if not isinstance(one, (str, bool, int, float)):
            raise InferenceError(
                400, f"{place}.parameters.{name[:40]}: expected a string, a number or a bool, got {_shown(one)}"
            )
    return value


def check_bytes(size: int, dtype: np.dtype[Any], shape: tuple[int, ...], place: str) -> None:
    """Refuse a number of bytes that a tensor of this shape and dtype does not have.

    Raises:
        InferenceError: 400.
    """
    needed = math.prod(shape) * dtype.itemsize
    if size != needed:
        raise InferenceError(400, f"{place}: expected {needed} bytes for shape {list(shape)} of {dtype}, got {size}")


def tensor_of_bytes(
    memory: bytes | bytearray | memoryview, offset: int, size: int, dtype: np.dtype[Any], shape: tuple[int, ...], place: str
) -> np.ndarray:
    """A tensor in ``size`` bytes at ``offset``: a view of them, except where they are few or not aligned to the dtype.

    Args:
        size: that ``check_bytes`` takes.

    Raises:
        InferenceError: 400, there are fewer bytes, or a BOOL is neither 0 nor 1.
    """
    if offset + size > len(memory):
        raise InferenceError(400, f"{place}: expected {size} bytes, got {max(0, len(memory) - offset)}")
    if not size:
        return np.empty(shape, dtype)
    if dtype.kind == "b":
        _check_bools(np.frombuffer(memory, np.uint8, size, offset), place)
    array = np.frombuffer(memory, dtype, size // dtype.itemsize, offset)
    is_view = size > _FEW and array.flags.aligned  # a copy can be written to, which makes a small lookup faster
    return (array if is_view else array.copy()).reshape(shape)


def tensor_of_list(values: Any, dtype: np.dtype[Any], shape: tuple[int, ...], place: str) -> np.ndarray:
    """A tensor whose values are a JSON list, flat or nested as its shape.

    Raises:
        InferenceError: 400, they do not fit the shape or the dtype.
    """
    flat = _flattened(values, shape, place)
    kinds = set(map(type, flat))
    if not kinds.issubset(_NUMBERS[dtype.kind]):
        wrong = next(value for value in flat if type(value) not in _NUMBERS[dtype.kind])
        raise InferenceError(400, f"{place}.data: expected values of {dtype}, got {_shown(wrong)}")
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype).reshape(shape)
    except OverflowError:
        raise InferenceError(400, f"{place}.data: expected values of {dtype}, got one out of its range") from None
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise InferenceError(400, f"{place}.data: expected values of {dtype}, got one out of its range")
    return array


def _flattened(values: Any, shape: tuple[int, ...], place: str) -> list[Any]:
    if not isinstance(values, list):
        raise InferenceError(400, f"{place}.data: expected a list, got {_shown(values)}")
    if not (values and isinstance(values[0], list)):
        if len(values) != math.prod(shape):
            raise InferenceError(
                400, f"{place}.data: expected {math.prod(shape)} values for shape {list(shape)}, got {len(values)}"
            )
        return values
    if not shape or len(values) != shape[0]:
        raise InferenceError(400, f"{place}.data: expected lists nested as shape {list(shape)}, got {len(values)} at the top")
    for size in shape[1:]:
        if not all(isinstance(part, list) and len(part) == size for part in values):
            raise InferenceError(400, f"{place}.data: expected lists nested as shape {list(shape)}, got others")
        values = list(chain.from_iterable(values))
    return values


def _check_bools(values: np.ndarray, place: str) -> None:
    if values.max() > 1:
        raise InferenceError(400, f"{place}: expected bytes 0 or 1 for BOOL, got {values.max()}")


def _shown(value: Any) -> str:
    """A value in a message: of a list or an object only what it is, as it may be large."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, dict) else repr(value)[:40]
