"""Keys and rows of any library, read by the CPU.

What users hold (lists, NumPy, Torch, TensorFlow, CuPy and JAX arrays, DLPack capsules, anything with ``__dlpack__``,
``__array_interface__``, ``__cuda_array_interface__``, ``__array__`` or a buffer) becomes one flat int64 array of keys, or
float32 rows. On the CPU neither copies, unless dtype, strides or byte order ask for it.

Arrays on a GPU are copied to the host by the framework's own copies on its current stream: after the work that made the keys.
Only arrays of unknown frameworks are copied by DLPack: Torch refuses to export a tensor that is not on the current device.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hps_numba.arrays.dlpack import capsule_of, device_of, is_capsule, view_of_capsule
from hps_numba.arrays.kinds import NUMPY, ArrayKind, framework_of, kind_of, one_line
from hps_numba.errors import ArrayError, DeviceError, HpsError, KeyDtypeError

__all__ = ["NUMPY", "ArrayKind", "KeyBatch", "as_keys", "as_numba_array", "as_rows", "kind_of", "to_host"]

_INT64 = np.dtype(np.int64)
_UINT32_MAX = 0xFFFF_FFFF


class KeyBatch(NamedTuple):
    """Keys as the tables take them.

    Attributes:
        flat: int64 ``[n]``, C-contiguous, aligned, native byte order, in the caller's (C) order. It may be the caller's own
            memory and may be read-only: never write to it.
        shape: the shape of the keys as given; rows have ``shape + (dim,)``.
        kind: what ``wrap_output`` needs to answer with an array of the same kind.
    """

    flat: NDArray[np.int64]
    shape: tuple[int, ...]
    kind: ArrayKind


_key_batch = partial(tuple.__new__, KeyBatch)  # what ``KeyBatch(...)`` does, without its Python frame


def as_keys(keys: Any, *, key_bits: int, place: str = "keys") -> KeyBatch:
    """Read keys of any kind and shape.

    Args:
        keys: Python ints in (nested, rectangular) lists or tuples, or one; any array on any device; a DLPack capsule.
            n = 0 and rank 0 are fine.
        key_bits: 64: every integer as its value, uint64 reinterpreted. 32: the bits of int32 and uint32 zero-extended, narrower
            integers extended to 32 bits first, wider ones accepted within 0..2^32-1.
        place: what the keys are, for messages.

    Returns:
        A :class:`KeyBatch`; zero-copy for C-contiguous, native, aligned int64 (and uint64) in memory that the CPU can read.

    Raises:
        KeyDtypeError: not integers (float, bool, string, object, complex), ragged lists, masked or unreadable arrays, or a
            value that does not fit the key width; the message names the first such position.
        DeviceError: an array on a device from which it cannot be copied.

    HugeCTR HPS takes int64 only for 64-bit keys, and reads narrower buffers as 64-bit.
    """
    if type(keys) is np.ndarray:
        if key_bits == 64 and keys.ndim == 1 and keys.dtype == _INT64 and (flags := keys.flags).c_contiguous and flags.aligned:
            return _key_batch((keys, keys.shape, NUMPY))
        return _key_batch((_flat_keys(keys, key_bits, place, "numpy array"), keys.shape, NUMPY))
    host = to_host(keys, place)
    return _key_batch((_flat_keys(host, key_bits, place, type(keys).__name__), host.shape, kind_of(keys)))


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
        raise ArrayError(f"{place}: expected dtype float32, got {rows.dtype}")
    if rows.shape != shape:
        raise ArrayError(f"{place}: expected shape {shape}, got {rows.shape}")
    try:
        with np.errstate(over="raise"):
            return np.ascontiguousarray(rows, np.float32)
    except FloatingPointError:
        raise ArrayError(f"{place}: a value of the {rows.dtype} rows is out of the range of float32") from None


def _rows_on_host(rows: Any, place: str) -> NDArray[Any]:
    try:
        if isinstance(rows, (list, tuple, int, float)):
            return np.asarray(rows)
        if framework_of(rows) == "torch":
            rows = rows.detach()
            rows = rows.float() if str(rows.dtype) == "torch.bfloat16" else rows
        return to_host(rows, place)
    except Exception as problem:  # foreign code may raise anything
        if isinstance(problem, DeviceError):
            raise
        raise ArrayError(f"{place}: {type(rows).__name__} cannot be read as float32 rows: {one_line(problem)}") from problem


def to_host(array: Any, place: str) -> NDArray[Any]:
    """Integers of any kind but a plain ndarray, as an ndarray of whatever dtype they have.

    Raises:
        KeyDtypeError: not readable as an array of integers.   DeviceError: it cannot be copied from its device.
    """
    try:
        if isinstance(array, (list, tuple, int)):
            return _array_of_sequence(array, place)
        framework = framework_of(array)
        return _foreign_to_host(array, place) if framework is None else _READERS.get(framework, np.asarray)(array)
    except HpsError:
        raise
    except Exception as problem:  # foreign code may raise anything
        what = f"{type(array).__name__} of dtype {array.dtype}" if hasattr(array, "dtype") else type(array).__name__
        raise KeyDtypeError(
            f"{place}: {what} cannot be read as an array of integers: {type(problem).__name__}: {one_line(problem)}"
        ) from problem


# ---- keys ----------------------------------------------------------------------------------------------------------------


def _flat_keys(array: NDArray[Any], key_bits: int, place: str, what: str) -> NDArray[np.int64]:
    """The dtype rules of ``as_keys``, on a host array of any shape and strides."""
    if array.dtype.kind not in "iu":
        raise KeyDtypeError(f"{place}: expected integers (int64, int32, uint64, ...), got {what} of dtype {array.dtype}")
    native = array.dtype.newbyteorder("=")
    flat = np.ascontiguousarray(array.reshape(-1), native)
    if not flat.flags.aligned:
        flat = flat.copy()
    if native.itemsize == 8:
        if key_bits == 32:
            _check_32_bits(flat, array.shape, place)
        return flat.view(np.int64)
    if key_bits == 32 and native.kind == "i":
        flat = flat.astype(np.int32, copy=False).view(np.uint32)
    return flat.astype(np.int64)


def _check_32_bits(flat: NDArray[Any], shape: tuple[int, ...], place: str) -> None:
    bits = flat.view(np.uint64)  # negative values become large ones
    if flat.size and bits.max() > _UINT32_MAX:
        first = int(np.argmax(bits > _UINT32_MAX))
        raise KeyDtypeError(f"{_at(place, first, shape)}: expected 32-bit keys in 0..{_UINT32_MAX}, got {flat[first]}")


def _at(place: str, position: int, shape: tuple[int, ...]) -> str:
    index = ", ".join(str(i) for i in np.unravel_index(position, shape)) if shape else ""
    return f"{place}[{index}]" if index else place


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
            raise KeyDtypeError(f"{where}: expected integers, got {one_line(repr(item))} ({type(item).__name__})")
    dtype = np.dtype(np.int64 if min(flat) < 0 else np.uint64)
    limits = np.iinfo(dtype)
    for position, item in enumerate(flat):
        if not limits.min <= int(item) <= limits.max:
            where = _at(place, position, items.shape)
            beside = " beside negative keys" if dtype == _INT64 else ""
            raise KeyDtypeError(f"{where}: expected {dtype} keys in {limits.min}..{limits.max}{beside}, got {item}")
    return items.astype(dtype)


def _foreign_to_host(keys: Any, place: str) -> NDArray[Any]:
    """An array of no framework known here: the protocols, cheapest first."""
    if is_capsule(keys):
        return view_of_capsule(keys, place=place)
    device = device_of(keys)
    if device is not None:
        return _copied_from_device(keys, device, place)
    if hasattr(keys, "__dlpack__") and not any(hasattr(keys, name) for name in ("__array_interface__", "__array__")):
        return view_of_capsule(keys, place=place)
    if np.ma.is_masked(keys):
        raise KeyDtypeError(f"{place}: expected keys without a mask, got masked keys")
    return np.asarray(keys)


# ---- devices and frameworks ----------------------------------------------------------------------------------------------


def _copied_from_device(array: Any, device: str, place: str) -> NDArray[Any]:
    problems = []
    for copy in (_copy_by_dlpack, _copy_by_method, _copy_by_cuda_interface):
        try:
            return copy(array, place)
        except Exception as problem:  # foreign code may raise anything; what it said goes into the message
            problems.append(f"{type(problem).__name__}: {one_line(problem)}")
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
    return as_numba_array(array).copy_to_host()


def as_numba_array(array: Any) -> Any:
    """An array with ``__cuda_array_interface__`` as numba's; whatever the producer or numba raises is passed on."""
    return importlib.import_module("numba.cuda").as_cuda_array(array)


_READERS = {
    "torch": lambda tensor: np.asarray(tensor.cpu()),
    "cupy": lambda array: array.get(),
}  # the others convert themselves
