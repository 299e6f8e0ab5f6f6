"""Answers in CUDA memory: new arrays of the framework of the keys, and arrays of the caller's to write to."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hps_numba.arrays.cuda_memory import (
    cupy_view,
    describe,
    device_name,
    dtype_name,
    family,
    in_host_memory,
    is_contiguous,
    require_cupy,
)
from hps_numba.arrays.encodings import ELEMENT_BYTES, OUTPUT_TYPES
from hps_numba.arrays.kinds import ArrayKind, Finish, do_nothing, one_line
from hps_numba.arrays.overlap import is_shared, overlaps_itself
from hps_numba.arrays.streams import cupy_order, torch_order
from hps_numba.errors import ArrayError, CapacityError, DeviceError, HpsError

__all__ = ["as_device_output", "new_device_output"]

_CUPY_TYPES = tuple(name for name in OUTPUT_TYPES if name != "bfloat16")  # NumPy has none, and so CuPy


def new_device_output(kind: ArrayKind, shape: tuple[int, ...], dtype: str, *, stream: Any = None) -> tuple[Any, int]:
    """An uninitialised array of the framework and on the device of ``kind``, and its address. Unknown frameworks get CuPy's.

    Args:
        kind: of ``DeviceKeys``.
        shape: of the answer, ``keys.shape + (dim,)``.
        dtype: ``float32``, ``float16``, or ``bfloat16`` (Torch only).
        stream: the stream that the lookup runs on, if not the framework's current one.

    Raises:
        ArrayError: a dtype that the framework has not.
        DeviceError: ``kind`` is not of CUDA memory, or CuPy is needed and missing.
        CapacityError: the device has no room for it.
    """
    known = OUTPUT_TYPES if kind.framework == "torch" else _CUPY_TYPES
    if dtype not in known:
        raise ArrayError(f"output: expected dtype {' or '.join(known)} for keys of {kind.framework}, got {dtype}")
    try:
        if kind.framework == "torch":
            return _new_torch(kind, shape, dtype, stream)
        return _new_cupy(kind, shape, dtype, stream)
    except HpsError:
        raise
    except Exception as problem:  # foreign code may raise anything
        error = CapacityError if "OutOfMemory" in type(problem).__name__ else DeviceError
        what = f"{dtype} rows of shape {shape} on {device_name(kind)} cannot be allocated"
        raise error(f"output: {what}: {type(problem).__name__}: {one_line(problem)}") from problem


def _new_torch(kind: ArrayKind, shape: tuple[int, ...], dtype: str, stream: Any) -> tuple[Any, int]:
    torch = sys.modules["torch"]
    if stream is None:
        rows = torch.empty(shape, dtype=getattr(torch, dtype), device=kind.device)
    else:
        with torch_order(kind.device.index, stream):
            rows = torch.empty(shape, dtype=getattr(torch, dtype), device=kind.device)
    return rows, rows.data_ptr()


def _new_cupy(kind: ArrayKind, shape: tuple[int, ...], dtype: str, stream: Any) -> tuple[Any, int]:
    if kind.framework == "cuda":
        cupy, device = require_cupy("output"), kind.device.device
        stream = kind.device.stream if stream is None else stream
    elif kind.framework == "cupy":
        cupy, device = sys.modules["cupy"], kind.device.id
    else:
        raise DeviceError(f"output: expected keys in CUDA memory, got keys of {kind.framework} in host memory")
    if stream is None and cupy.cuda.runtime.getDevice() == device:
        rows = cupy.empty(shape, dtype)
    else:
        with cupy_order(cupy, device, stream):
            rows = cupy.empty(shape, dtype)
    return rows, rows.data.ptr


def as_device_output(
    out: Any,
    shape: tuple[int, ...],
    dtype: str,
    device: int,
    *,
    larger: bool = False,
    place: str = "out",
    stream: Any = None,
    read: Sequence[tuple[int, int]] = (),
) -> tuple[int, Finish, object]:
    """Make a caller's ``out=`` array in CUDA memory writable as contiguous rows.

    Args:
        out: a Torch tensor, a CuPy array, a CUDA DLPack capsule, anything with ``__cuda_array_interface__`` or ``__dlpack__``.
        shape: the shape that the answer has.
        dtype: the dtype that the answer has, by name.
        device: CUDA ordinal of the keys.
        larger: accept any shape with at least as many elements; the first ones, in C order, are written.
        place: what the array is, for messages.
        stream: the stream that the lookup runs on, if not the current one of the framework of ``out``. A caller whose keys may
            be of another framework than ``out`` passes it always.
        read: addresses and sizes in bytes of what is read while ``out`` is written.

    Returns:
        ``(address, finish, keep)``: launch what fills the rows at ``address``, then call ``finish()``; hold ``keep`` until
        then. For contiguous arrays that share no memory with what is read, the address is the caller's memory and ``finish``
        does nothing; else it is a temporary and ``finish`` launches the copy back.

    Raises:
        ArrayError: wrong shape or dtype, read-only, immutable, requiring grad, or overlapping with itself.
        DeviceError: host memory or another device, or a copy is needed and CuPy is not there to make it.
    """
    kind = family(type(out))
    try:
        size = math.prod(shape) * ELEMENT_BYTES[dtype]
        if kind == "torch" and (address := _address_of_rows(out, shape, dtype, device)) and not is_shared(address, size, read):
            return address, do_nothing, out
        target = _TARGETS.get(kind, _foreign_target)(out, place, stream)
        _check_target(target, shape, dtype, device, larger, place)
        if target.contiguous and not is_shared(target.address, size, read):
            return target.address, do_nothing, target.keep
        address, finish, temporary = target.temporary(shape)
    except HpsError:
        raise
    except Exception as problem:  # foreign code may raise anything
        raise _not_writable(out, place, problem) from problem

    def finish_or_say() -> None:
        try:
            finish()
        except Exception as problem:
            raise _not_writable(out, place, problem) from problem

    return address, finish_or_say, (temporary, target.keep)


class _Target(NamedTuple):
    """An output as its owner describes it. ``temporary`` makes contiguous memory for it and the copy back."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str
    itemsize: int
    device: int
    contiguous: bool
    read_only: bool
    temporary: Callable[[tuple[int, ...]], tuple[int, Finish, object]]
    keep: object


def _check_target(target: _Target, shape: tuple[int, ...], dtype: str, device: int, larger: bool, place: str) -> None:
    if target.device != device:
        raise DeviceError(f"{place}: expected an array on cuda:{device}, as the keys, got one on cuda:{target.device}")
    if target.dtype != dtype:
        raise ArrayError(f"{place}: expected dtype {dtype}, got {target.dtype}")
    size = math.prod(target.shape)
    if target.shape != shape and not (larger and size >= math.prod(shape)):
        raise ArrayError(f"{place}: expected shape {shape}{' or more elements' if larger else ''}, got {target.shape}")
    if target.read_only:
        raise ArrayError(f"{place}: expected a writable array, got a read-only one")
    if target.strides and not target.contiguous and overlaps_itself(target.shape, target.strides, target.itemsize):
        raise ArrayError(f"{place}: expected memory for every row, got strides {target.strides}: the array overlaps itself")
    if size and (not target.address or target.address % target.itemsize):
        raise ArrayError(f"{place}: expected aligned memory, got an array at address {target.address:#x}")


def _address_of_rows(out: Any, shape: tuple[int, ...], dtype: str, device: int) -> int:
    """The address of a tensor that can be written as it is, 0 for others: in a third of the time of :class:`_Target`."""
    if out.requires_grad or out.shape != shape or dtype_name(out.dtype) != dtype or out.get_device() != device:
        return 0
    if not out.is_cuda or not out.is_contiguous() or out.is_neg():  # an imaginary part may be negated on reading only
        return 0
    address: int = out.data_ptr()
    return 0 if address & 3 else address


def _torch_target(out: Any, place: str, stream: Any) -> _Target:
    if out.requires_grad:
        raise ArrayError(f"{place}: expected a tensor that does not require grad, got one that does")
    if not out.is_cuda:
        raise in_host_memory(out, place)
    contiguous = out.is_contiguous() and not out.is_neg()
    itemsize = out.element_size()
    strides = tuple(itemsize * stride for stride in out.stride())
    memory = (out.data_ptr(), tuple(out.shape), strides, dtype_name(out.dtype), itemsize, out.get_device())
    return _Target(*memory, contiguous, False, functools.partial(_torch_temporary, out, stream), out)


def _torch_temporary(out: Any, stream: Any, shape: tuple[int, ...]) -> tuple[int, Finish, object]:
    order = functools.partial(torch_order, out.get_device(), stream)
    with order():
        whole = sys.modules["torch"].empty(out.shape, dtype=out.dtype, device=out.device)
        if tuple(out.shape) != shape:  # a larger array keeps its tail
            whole.copy_(out)

    def finish() -> None:
        with order():
            out.copy_(whole)

    return whole.data_ptr(), finish, whole


def _cupy_target(out: Any, place: str, stream: Any) -> _Target:
    memory = (out.data.ptr, out.shape, out.strides, dtype_name(out.dtype), out.itemsize, out.data.device_id)
    temporary = functools.partial(_cupy_temporary, sys.modules["cupy"], out, stream, out.data.device_id)
    return _Target(*memory, out.flags.c_contiguous, False, temporary, out)


def _cupy_temporary(cupy: Any, out: Any, stream: Any, device: int, shape: tuple[int, ...]) -> tuple[int, Finish, object]:
    order = functools.partial(cupy_order, cupy, device, stream)
    with order():  # a larger array keeps its tail
        whole = cupy.empty(shape, out.dtype) if out.shape == shape else cupy.ascontiguousarray(out)

    def finish() -> None:
        with order():
            out[...] = whole

    return whole.data.ptr, finish, whole


def _foreign_target(out: Any, place: str, stream: Any) -> _Target:
    memory, origin, keep = describe(out, place, ArrayError, stream)

    def temporary(shape: tuple[int, ...]) -> tuple[int, Finish, object]:
        cupy = require_cupy(place)
        view = cupy_view(cupy, memory, f"uint{8 * memory.itemsize}", keep)  # bits: NumPy has no bfloat16
        return _cupy_temporary(cupy, view, origin if stream is None else stream, memory.device, shape)

    seen = (memory.address, memory.shape, memory.strides, memory.dtype, memory.itemsize, memory.device)
    return _Target(*seen, is_contiguous(memory), memory.read_only, temporary, keep)


def _private_target(out: Any, place: str, stream: Any) -> _Target:
    framework = type(out).__module__.partition(".")[0]
    raise ArrayError(f"{place}: {framework} arrays cannot be written; leave out= away and take the answer")


_TARGETS = {"torch": _torch_target, "cupy": _cupy_target, "private": _private_target}


def _not_writable(out: Any, place: str, problem: Exception) -> ArrayError:
    what = f"{type(out).__name__} cannot be written from here"
    return ArrayError(f"{place}: {what}: {type(problem).__name__}: {one_line(problem)}")
