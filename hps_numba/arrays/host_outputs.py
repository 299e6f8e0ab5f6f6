"""Answers in host memory: new arrays of the kind of the keys, and arrays of the caller's to write to.

Rows for a GPU are copied there by the framework's own copies on its current stream: before the work that reads the rows.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hps_numba.arrays.buffer_pool import ALIGNMENT, aligned_empty
from hps_numba.arrays.dlpack import device_of, is_capsule, view_of_capsule
from hps_numba.arrays.host import as_numba_array, to_host
from hps_numba.arrays.kinds import ArrayKind, Finish, do_nothing, framework_of, one_line
from hps_numba.arrays.overlap import overlaps_itself
from hps_numba.errors import ArrayError, DeviceError, HpsError

__all__ = ["as_output", "new_output", "wrap_output"]


def new_output(kind: ArrayKind, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Uninitialised host rows that :func:`wrap_output` hands over without a copy where ``kind`` is on the CPU."""
    return aligned_empty(shape, dtype) if kind.framework in ("tensorflow", "jax") else np.empty(shape, dtype)


def wrap_output(rows: NDArray[Any], kind: ArrayKind) -> Any:
    """``rows`` as an array of ``kind``, on its device. Ownership passes: do not write to ``rows`` afterwards.

    No copy on the CPU; for TensorFlow and JAX only if ``rows`` came from :func:`new_output` (their memory must be aligned).
    ``rows`` is C-contiguous and writable.
    """
    return rows if kind.framework == "numpy" else _BUILDERS[kind.framework](rows, kind.device)


def as_output(
    out: Any, shape: tuple[int, ...], dtype: DTypeLike = np.float32, *, larger: bool = False, place: str = "out"
) -> tuple[NDArray[Any], Finish]:
    """Make a caller's ``out=`` array writable as C-contiguous host rows.

    Args:
        out: NumPy, Torch, CuPy, a DLPack capsule, or anything writable with ``__array_interface__``, ``__dlpack__``,
            ``__cuda_array_interface__`` or a buffer. ``__array__`` alone is refused: it may give a copy.
        shape: the shape that the answer has.
        dtype: the dtype that the answer has.
        larger: accept any shape with at least as many elements; the first ones, in C order, are written.
        place: what the array is, for messages.

    Returns:
        ``(rows, finish)``: fill ``rows`` (C-contiguous, aligned, of ``shape``), then call ``finish()``. For C-contiguous arrays
        on the CPU ``rows`` is the caller's memory and ``finish`` does nothing; else ``finish`` copies back. What it shares
        with other arrays of the call is not looked at here.

    Raises:
        ArrayError: wrong shape or dtype, read-only or immutable (TensorFlow, JAX, Torch with ``requires_grad``), or
            overlapping with itself (expanded, or strides that are too small).
        DeviceError: memory on a device to which nothing here can copy.
    """
    dtype = np.dtype(dtype)
    if type(out) is np.ndarray and out.dtype == dtype and out.shape == shape and out.flags.carray:
        return out, do_nothing
    view = out if type(out) is np.ndarray else _writable_view(out, place)
    target = _HostTarget(view, place) if view is not None else _DeviceTarget(out, place)
    if target.dtype != str(dtype):
        raise ArrayError(f"{place}: expected dtype {dtype}, got {target.dtype}")
    if target.shape != shape and not (larger and math.prod(target.shape) >= math.prod(shape)):
        raise ArrayError(f"{place}: expected shape {shape}{' or more elements' if larger else ''}, got {target.shape}")
    return target.rows(shape, dtype)


class _HostTarget:
    """An output in memory that the CPU can write, seen as ``view``."""

    def __init__(self, view: NDArray[Any], place: str) -> None:
        self.view, self.shape, self.dtype = view, view.shape, str(view.dtype)
        if not view.flags.writeable:
            raise ArrayError(f"{place}: expected a writable array, got a read-only one")
        if not view.flags.c_contiguous and overlaps_itself(view.shape, view.strides, view.itemsize):
            raise ArrayError(f"{place}: expected memory for every row, got strides {view.strides}: the array overlaps itself")

    def rows(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[NDArray[Any], Finish]:
        view, size = self.view, math.prod(shape)
        if view.flags.c_contiguous and view.flags.aligned:
            return (view if view.shape == shape else view.reshape(-1)[:size].reshape(shape)), do_nothing
        rows = np.empty(shape, dtype)

        def finish() -> None:
            view.flat[:size] = rows.reshape(-1)

        return rows, finish


class _DeviceTarget:
    """An output on a device: rows are made on the host and copied there at the end, on the framework's current stream."""

    def __init__(self, out: Any, place: str) -> None:
        framework = framework_of(out)
        if framework is None:
            out = _cuda_array(out, place)
        self.out, self.place = out, place
        self.write = out.copy_to_device if framework is None else functools.partial(_WRITERS[framework], out)
        self.shape, self.dtype = tuple(out.shape), str(out.dtype).removeprefix("torch.")

    def rows(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[NDArray[Any], Finish]:
        # a larger array keeps its tail: it is read, and written back whole
        same = self.shape == shape
        whole = np.empty(shape, dtype) if same else np.array(to_host(self.out, self.place), order="C")
        rows = whole.reshape(-1)[: math.prod(shape)].reshape(shape)
        return rows, lambda: self.write(whole)


def _cuda_array(out: Any, place: str) -> Any:
    """An unknown framework's GPU array as numba's, which can be written if it is contiguous and not read-only."""
    try:
        read_only = out.__cuda_array_interface__["data"][1]
        array = as_numba_array(out)
    except Exception as problem:  # foreign code may raise anything
        what = f"{type(out).__name__} on {device_of(out)}"
        raise DeviceError(
            f"{place}: {what} cannot be written from here: {type(problem).__name__}: {one_line(problem)}"
        ) from problem
    if read_only or not array.is_c_contiguous():
        raise ArrayError(f"{place}: expected a writable and contiguous GPU array, got a read-only or non-contiguous one")
    return array


def _writable_view(out: Any, place: str) -> NDArray[Any] | None:
    """The memory of ``out`` itself, never a copy of it; None if it is on a device."""
    framework = framework_of(out)
    if framework is not None and framework not in _WRITERS:  # their arrays are immutable
        raise ArrayError(f"{place}: {framework} arrays cannot be written; leave out= away and take the answer")
    if getattr(out, "requires_grad", False):
        raise ArrayError(f"{place}: expected a tensor that does not require grad, got one that does")
    try:
        if not is_capsule(out) and device_of(out) is not None:
            return None
        return _shared(out, framework, place)
    except HpsError:
        raise
    except Exception as problem:  # foreign code may raise anything
        raise ArrayError(
            f"{place}: {type(out).__name__} cannot be written from here: {type(problem).__name__}: {one_line(problem)}"
        ) from problem


def _shared(out: Any, framework: str | None, place: str) -> NDArray[Any]:
    # the answer would be lost in the copy that __array__ alone may give; Torch's is known to share
    if framework == "torch" or hasattr(out, "__array_interface__"):
        return np.asarray(out)
    if is_capsule(out) or hasattr(out, "__dlpack__"):
        return view_of_capsule(out, writable=True, place=place, error=ArrayError)
    return np.asarray(memoryview(out))


def _torch_from(rows: NDArray[Any], device: Any) -> Any:
    tensor = sys.modules["torch"].from_numpy(rows)
    return tensor if device.type == "cpu" else tensor.to(device)


def _tensorflow_from(rows: NDArray[Any], device: str) -> Any:
    tensorflow = sys.modules["tensorflow"]
    # a tensor over unaligned memory is accepted, and kills the process in the first op that reads it
    if "CPU" in device and rows.size and rows.flags.carray and rows.ctypes.data % ALIGNMENT == 0:
        return tensorflow.experimental.dlpack.from_dlpack(rows.__dlpack__())
    with tensorflow.device(device):
        return tensorflow.convert_to_tensor(rows)


def _cupy_from(rows: NDArray[Any], device: Any) -> Any:
    with device:
        return sys.modules["cupy"].asarray(rows)


def _cupy_write(out: Any, rows: NDArray[Any]) -> None:
    with out.device:
        out[...] = sys.modules["cupy"].asarray(rows)


_BUILDERS: dict[str, Callable[[NDArray[Any], Any], Any]] = {
    "torch": _torch_from,
    "tensorflow": _tensorflow_from,
    "cupy": _cupy_from,
    "jax": lambda rows, device: sys.modules["jax"].device_put(rows, device),
}
_WRITERS = {"torch": lambda out, rows: out.copy_(sys.modules["torch"].from_numpy(rows)), "cupy": _cupy_write}
