"""Any array in, the same kind out.

What users hold (lists, NumPy, Torch, TensorFlow, CuPy and JAX arrays, DLPack capsules, anything with ``__dlpack__``,
``__array_interface__``, ``__cuda_array_interface__``, ``__array__`` or a buffer) becomes one flat int64 array of keys; rows
become an array of the kind that the keys had. On the CPU neither copies, unless dtype, strides or byte order ask for it.

No framework is imported here: whoever holds one of its arrays has imported it, so it is found in ``sys.modules``, by the module
names of the array's classes. A user's subclass of a framework's array counts as the framework.

Arrays on a GPU are copied to the host, and rows back to the same device, by the framework's own copies on its current stream:
after the work that made the keys and before the work that reads the rows. Only arrays of unknown frameworks are copied by
DLPack: Torch refuses to export a tensor that is not on the current device.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hps_numba.arrays.buffer_pool import ALIGNMENT, aligned_empty
from hps_numba.arrays.dlpack import capsule_of, device_of, is_capsule, view_of_capsule
from hps_numba.errors import ArrayError, DeviceError, HpsError, KeyDtypeError

__all__ = ["NUMPY", "ArrayKind", "KeyBatch", "as_keys", "as_output", "as_rows", "kind_of", "new_output", "wrap_output"]

_INT64 = np.dtype(np.int64)
_UINT32_MAX = 0xFFFF_FFFF

Finish = Callable[[], None]
"""What :func:`as_output` wants called once its rows are filled."""


class ArrayKind(NamedTuple):
    """What to build for the caller: the framework's name, and the device in the framework's own terms (None for NumPy)."""

    framework: str
    device: Any = None


NUMPY = ArrayKind("numpy")


class KeyBatch(NamedTuple):
    """Keys as the tables want them.

    Attributes:
        flat: int64 ``[n]``, C-contiguous, aligned, native byte order, in the caller's (C) order. It may be the caller's own
            memory and may be read-only: never write to it.
        shape: the shape of the keys as given; rows have ``shape + (dim,)``.
        kind: what :func:`wrap_output` needs to answer with an array of the same kind.
    """

    flat: NDArray[np.int64]
    shape: tuple[int, ...]
    kind: ArrayKind


def as_keys(keys: Any, *, wide: bool, place: str = "keys") -> KeyBatch:
    """Read keys of any kind and shape.

    Args:
        keys: Python ints in (nested, rectangular) lists or tuples, or one; any array on any device; a DLPack capsule.
            n = 0 and rank 0 are fine.
        wide: 64-bit keys: every integer as its value, uint64 reinterpreted. Otherwise 32-bit keys: the bits of int32 and uint32
            zero-extended, narrower integers extended to 32 bits first, wider ones accepted within 0..2^32-1.
        place: what the keys are, for messages.

    Returns:
        A :class:`KeyBatch`; zero-copy for C-contiguous, native, aligned int64 (and uint64) in memory that the CPU can read.

    Raises:
        KeyDtypeError: not integers (float, bool, string, object, complex), ragged lists, masked or unreadable arrays, or a
            value that does not fit the key width; the message names the first such position.
        DeviceError: an array on a device from which it cannot be copied.

    Source: spec 2.5, 4.1; in 64-bit mode the original takes int64 only, and reads narrower buffers as 64-bit.
    """
    if type(keys) is np.ndarray:
        if wide and keys.ndim == 1 and keys.dtype == _INT64 and (flags := keys.flags).c_contiguous and flags.aligned:
            return KeyBatch(keys, keys.shape, NUMPY)
        return KeyBatch(_flat_keys(keys, wide, place, "numpy array"), keys.shape, NUMPY)
    host = _on_host(keys, place)
    return KeyBatch(_flat_keys(host, wide, place, type(keys).__name__), host.shape, kind_of(keys))


def kind_of(array: Any) -> ArrayKind:
    """The kind of an array. Lists, numbers, capsules and arrays of unknown frameworks count as NumPy."""
    framework = _framework_of(array)
    return NUMPY if framework is None else ArrayKind(framework, array.device)


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
        larger: accept any shape with at least as many elements; the first ones, in C order, are written (spec 4.1).
        place: what the array is, for messages.

    Returns:
        ``(rows, finish)``: fill ``rows`` (C-contiguous, aligned, of ``shape``), then call ``finish()``. For C-contiguous arrays
        on the CPU ``rows`` is the caller's memory and ``finish`` does nothing; else ``finish`` copies back.

    Raises:
        ArrayError: wrong shape or dtype, read-only or immutable (TensorFlow, JAX, Torch with ``requires_grad``), or
            overlapping with itself (expanded).
        DeviceError: memory on a device to which nothing here can copy.
    """
    dtype = np.dtype(dtype)
    if type(out) is np.ndarray and out.dtype == dtype and out.shape == shape and out.flags.carray:
        return out, _nothing_to_do
    view = out if type(out) is np.ndarray else _writable_view(out, place)
    target = _HostTarget(view, place) if view is not None else _DeviceTarget(out, place)
    if target.dtype != str(dtype):
        raise ArrayError(f"{place}: dtype {target.dtype} came, {dtype} is wanted")
    if target.shape != shape and not (larger and math.prod(target.shape) >= math.prod(shape)):
        raise ArrayError(f"{place}: shape {target.shape} came, {shape}{' or more elements' if larger else ''} is wanted")
    return target.rows(shape, dtype)


def as_rows(rows: Any, shape: tuple[int, ...], *, place: str = "rows") -> NDArray[np.float32]:
    """Read float rows of any kind as C-contiguous float32 of ``shape``; zero-copy where they are that already.

    Args:
        rows: what ``as_keys`` takes, of numbers that convert to float32. A Torch tensor may require a gradient: its values
            are taken.

    Raises:
        ArrayError: another shape, no numbers, not readable, or a value that float32 cannot hold.
    """
    if type(rows) is not np.ndarray:
        rows = _rows_on_host(rows, place)
    if rows.dtype.kind not in "fiub":
        raise ArrayError(f"{place}: dtype {rows.dtype} came, float32 is wanted")
    if rows.shape != shape:
        raise ArrayError(f"{place}: shape {rows.shape} came, {shape} is wanted")
    try:
        with np.errstate(over="raise"):
            return np.ascontiguousarray(rows, np.float32)
    except FloatingPointError:
        raise ArrayError(f"{place}: a value of the {rows.dtype} rows is beyond what float32 holds") from None


def _rows_on_host(rows: Any, place: str) -> NDArray[Any]:
    try:
        if isinstance(rows, (list, tuple, int, float)):
            return np.asarray(rows)
        if _framework_of(rows) == "torch":
            rows = rows.detach()
            rows = rows.float() if str(rows.dtype) == "torch.bfloat16" else rows
        return _on_host(rows, place)
    except Exception as problem:  # foreign code may raise anything
        if isinstance(problem, DeviceError):
            raise
        raise ArrayError(f"{place}: {type(rows).__name__} cannot be read as float32 rows: {_line(problem)}") from problem


# ---- keys ----------------------------------------------------------------------------------------------------------------


def _flat_keys(array: NDArray[Any], wide: bool, place: str, what: str) -> NDArray[np.int64]:
    """The dtype rules of contracts 'Keys and dtypes', on a host array of any shape and strides."""
    if array.dtype.kind not in "iu":
        raise KeyDtypeError(f"{place}: {what} of dtype {array.dtype} came, integers (int64, int32, uint64, ...) are wanted")
    native = array.dtype.newbyteorder("=")
    flat = np.ascontiguousarray(array.reshape(-1), native)
    if not flat.flags.aligned:
        flat = flat.copy()
    if native.itemsize == 8:
        if not wide:
            _check_32_bits(flat, array.shape, place)
        return flat.view(np.int64)
    if not wide and native.kind == "i":
        flat = flat.astype(np.int32, copy=False).view(np.uint32)
    return flat.astype(np.int64)


def _check_32_bits(flat: NDArray[Any], shape: tuple[int, ...], place: str) -> None:
    bits = flat.view(np.uint64)  # negative values become large ones
    if flat.size and bits.max() > _UINT32_MAX:
        first = int(np.argmax(bits > _UINT32_MAX))
        raise KeyDtypeError(f"{_at(place, first, shape)} is {flat[first]}, 32-bit keys in 0..{_UINT32_MAX} are wanted")


def _at(place: str, position: int, shape: tuple[int, ...]) -> str:
    index = ", ".join(str(i) for i in np.unravel_index(position, shape)) if shape else ""
    return f"{place}[{index}]" if index else place


def _on_host(keys: Any, place: str) -> NDArray[Any]:
    """Keys of any kind but a plain ndarray, as an ndarray of whatever dtype they have."""
    try:
        if isinstance(keys, (list, tuple, int)):
            return _array_of_sequence(keys, place)
        framework = _framework_of(keys)
        return _foreign_to_host(keys, place) if framework is None else _READERS.get(framework, np.asarray)(keys)
    except HpsError:
        raise
    except Exception as problem:  # foreign code may raise anything
        what = f"{type(keys).__name__} of dtype {keys.dtype}" if hasattr(keys, "dtype") else type(keys).__name__
        raise KeyDtypeError(
            f"{place}: {what} cannot be read as an array of integers: {type(problem).__name__}: {_line(problem)}"
        ) from problem


def _array_of_sequence(keys: Any, place: str) -> NDArray[Any]:
    array = np.asarray(keys)
    if array.dtype.kind not in "fO":
        return array
    if array.size == 0:  # [] has no dtype; NumPy says float64
        return array.astype(np.int64)
    return _exact_integers(np.asarray(keys, dtype=object), place)


def _exact_integers(items: NDArray[Any], place: str) -> NDArray[Any]:
    """Integers that NumPy made float64 (it does for ``[1, 2**63]``) or object: as int64 or uint64, whichever holds them all."""
    flat = list(items.flat)
    for position, item in enumerate(flat):
        if isinstance(item, (bool, np.bool)) or not isinstance(item, (int, np.integer)):
            where = _at(place, position, items.shape)
            raise KeyDtypeError(f"{where} is {_line(repr(item))} ({type(item).__name__}), integers are wanted")
    dtype = np.dtype(np.int64 if min(flat) < 0 else np.uint64)
    limits = np.iinfo(dtype)
    for position, item in enumerate(flat):
        if not limits.min <= int(item) <= limits.max:
            where = _at(place, position, items.shape)
            beside = " beside negative keys" if dtype == _INT64 else ""
            raise KeyDtypeError(f"{where} is {item}, {dtype} keys in {limits.min}..{limits.max} are wanted{beside}")
    return items.astype(dtype)


def _foreign_to_host(keys: Any, place: str) -> NDArray[Any]:
    """Keys of no framework known here: the protocols, cheapest first."""
    if is_capsule(keys):
        return view_of_capsule(keys, place=place)
    device = device_of(keys)
    if device is not None:
        return _copied_from_device(keys, device, place)
    if hasattr(keys, "__dlpack__") and not any(hasattr(keys, name) for name in ("__array_interface__", "__array__")):
        return view_of_capsule(keys, place=place)
    if np.ma.is_masked(keys):
        raise KeyDtypeError(f"{place}: masked keys came, keys without a mask are wanted")
    return np.asarray(keys)


# ---- outputs -------------------------------------------------------------------------------------------------------------


class _HostTarget:
    """An output in memory that the CPU can write, seen as ``view``."""

    def __init__(self, view: NDArray[Any], place: str) -> None:
        self.view, self.shape, self.dtype = view, view.shape, str(view.dtype)
        if not view.flags.writeable:
            raise ArrayError(f"{place}: the array is read-only, one that can be written is wanted")
        if view.size and any(stride == 0 and size > 1 for stride, size in zip(view.strides, view.shape)):
            raise ArrayError(f"{place}: the array overlaps itself (strides {view.strides}), memory for every row is wanted")

    def rows(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[NDArray[Any], Finish]:
        view, size = self.view, math.prod(shape)
        if view.flags.c_contiguous and view.flags.aligned:
            return (view if view.shape == shape else view.reshape(-1)[:size].reshape(shape)), _nothing_to_do
        rows = np.empty(shape, dtype)

        def finish() -> None:
            view.flat[:size] = rows.reshape(-1)

        return rows, finish


class _DeviceTarget:
    """An output on a device: rows are made on the host and copied there at the end, on the framework's current stream."""

    def __init__(self, out: Any, place: str) -> None:
        framework = _framework_of(out)
        if framework is None:
            out = _cuda_array(out, place)
        self.out, self.place = out, place
        self.write = out.copy_to_device if framework is None else functools.partial(_WRITERS[framework], out)
        self.shape, self.dtype = tuple(out.shape), str(out.dtype).removeprefix("torch.")

    def rows(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[NDArray[Any], Finish]:
        # a larger array keeps its tail: it is read, and written back whole
        same = self.shape == shape
        whole = np.empty(shape, dtype) if same else np.array(_on_host(self.out, self.place), order="C")
        rows = whole.reshape(-1)[: math.prod(shape)].reshape(shape)
        return rows, lambda: self.write(whole)


def _nothing_to_do() -> None:
    """``finish`` of an output that was written in place."""


def _cuda_array(out: Any, place: str) -> Any:
    """An unknown framework's GPU array as numba's, which can be written if it is contiguous and not read-only."""
    try:
        read_only = out.__cuda_array_interface__["data"][1]
        array = importlib.import_module("numba.cuda").as_cuda_array(out)
    except Exception as problem:  # foreign code may raise anything
        what = f"{type(out).__name__} on {device_of(out)}"
        raise DeviceError(
            f"{place}: {what} cannot be written from here: {type(problem).__name__}: {_line(problem)}"
        ) from problem
    if read_only or not array.is_c_contiguous():
        raise ArrayError(f"{place}: a read-only or non-contiguous GPU array came, a writable and contiguous one is wanted")
    return array


def _writable_view(out: Any, place: str) -> NDArray[Any] | None:
    """The memory of ``out`` itself, never a copy of it; None if it is on a device."""
    framework = _framework_of(out)
    if framework is not None and framework not in _WRITERS:  # their arrays are immutable
        raise ArrayError(f"{place}: {framework} arrays cannot be written; leave out= away and take the answer")
    if getattr(out, "requires_grad", False):
        raise ArrayError(f"{place}: a tensor that requires grad came, one that does not is wanted")
    try:
        if not is_capsule(out) and device_of(out) is not None:
            return None
        return _shared(out, framework, place)
    except HpsError:
        raise
    except Exception as problem:  # foreign code may raise anything
        raise ArrayError(
            f"{place}: {type(out).__name__} cannot be written from here: {type(problem).__name__}: {_line(problem)}"
        ) from problem


def _shared(out: Any, framework: str | None, place: str) -> NDArray[Any]:
    # the answer would be lost in the copy that __array__ alone may give; Torch's is known to share
    if framework == "torch" or hasattr(out, "__array_interface__"):
        return np.asarray(out)
    if is_capsule(out) or hasattr(out, "__dlpack__"):
        return view_of_capsule(out, writable=True, place=place, error=ArrayError)
    return np.asarray(memoryview(out))


# ---- devices and frameworks ----------------------------------------------------------------------------------------------


def _copied_from_device(array: Any, device: str, place: str) -> NDArray[Any]:
    problems = []
    for copy in (_copy_by_dlpack, _copy_by_method, _copy_by_cuda_interface):
        try:
            return copy(array, place)
        except Exception as problem:  # foreign code may raise anything; what it said goes into the message
            problems.append(f"{type(problem).__name__}: {_line(problem)}")
    reasons = "; ".join(problems)
    raise DeviceError(f"{place}: {type(array).__name__} is on {device} and cannot be copied to the host: {reasons}")


def _copy_by_dlpack(array: Any, place: str) -> NDArray[Any]:
    return view_of_capsule(capsule_of(array, dl_device=(1, 0), copy=True), place=place)


def _copy_by_method(array: Any, place: str) -> NDArray[Any]:
    for name in ("get", "cpu", "copy_to_host"):
        if hasattr(array, name):
            return np.asarray(getattr(array, name)())
    raise AttributeError("it has no method get, cpu or copy_to_host")


def _copy_by_cuda_interface(array: Any, place: str) -> NDArray[Any]:
    return importlib.import_module("numba.cuda").as_cuda_array(array).copy_to_host()


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


_READERS = {
    "torch": lambda tensor: np.asarray(tensor.cpu()),
    "cupy": lambda array: array.get(),
}  # the others convert themselves
_BUILDERS: dict[str, Callable[[NDArray[Any], Any], Any]] = {
    "torch": _torch_from,
    "tensorflow": _tensorflow_from,
    "cupy": _cupy_from,
    "jax": lambda rows, device: sys.modules["jax"].device_put(rows, device),
}
_WRITERS = {"torch": lambda out, rows: out.copy_(sys.modules["torch"].from_numpy(rows)), "cupy": _cupy_write}
_PACKAGES = {"torch": "torch", "tensorflow": "tensorflow", "cupy": "cupy", "jax": "jax", "jaxlib": "jax"}


def _framework_of(array: Any) -> str | None:
    for base in type(array).__mro__:
        framework = _PACKAGES.get(base.__module__.partition(".")[0])
        if framework is not None:
            return None if isinstance(array, tuple) else framework  # torch.Size is a tuple of ints
    return None


def _line(text: object) -> str:
    """Foreign text as one line of bearable length."""
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else f"{line[:200]}..."
