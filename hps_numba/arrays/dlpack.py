"""A DLPack capsule seen as a NumPy array, or as an address in CUDA memory, without consuming it.

``numpy.from_dlpack`` and its likes take the memory over and rename the capsule, so that it can be used once. HugeCTR's
``lookup_fromdlpack`` leaves its capsules alone, its users pass the same ones again and again, and it writes to one of them.
NumPy marks what comes out of an unversioned capsule read-only. So the struct is read here, by ctypes: shape, strides,
``byte_offset``, dtype and device, and the capsule is kept alive by the view instead of being consumed.

Turned down: renaming the capsule back after ``from_dlpack`` (the consumer then frees memory that the capsule still owns).
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hps_numba.arrays.kinds import one_line
from hps_numba.errors import DeviceError, HpsError, KeyDtypeError

__all__ = ["DeviceMemory", "capsule_of", "cuda_device_of", "cuda_memory_of", "device_of", "is_capsule", "view_of_capsule"]

# DLDeviceType of dlpack.h; the CPU can read and write the memory of these
_HOST_DEVICES = frozenset({1, 3, 11, 13})  # CPU, CUDA pinned host, ROCm pinned host, CUDA managed
_DEVICE_NAMES = {2: "cuda", 4: "opencl", 7: "vulkan", 8: "metal", 10: "rocm", 14: "oneapi"}
_DTYPE_KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}  # DLDataTypeCode -> numpy kind; 4 is bfloat16, which NumPy has not
_DTYPE_NAMES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_CUDA = 2  # kDLCUDA: memory that only the device reads
_READ_ONLY, _IS_COPIED = 1, 2  # flags of a versioned struct
_MAX_NDIM = 64  # of NumPy 2


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# prototypes of our own: argtypes set on ctypes.pythonapi itself would be shared with every other user of ctypes
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_Capsule = type(np.empty(0).__dlpack__())


class _Memory:
    """What NumPy reads the memory through; the array's ``base``, so it keeps the capsule and thereby the memory."""

    def __init__(self, capsule: Any, interface: dict[str, Any]) -> None:
        self.capsule = capsule
        self.__array_interface__ = interface


class DeviceMemory(NamedTuple):
    """Memory on a CUDA device, as its owner describes it. ``strides`` are in bytes; None: C order. ``dtype`` is its name."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str
    itemsize: int
    device: int
    read_only: bool


def is_capsule(value: object) -> bool:
    """True for any PyCapsule, whatever it holds."""
    return isinstance(value, _Capsule)


def device_of(array: Any) -> str | None:
    """The device of an array whose memory the CPU cannot read, e.g. ``cuda:0``; None if the CPU can. Looks at metadata only."""
    if hasattr(array, "__dlpack_device__"):
        return _device_name(*array.__dlpack_device__())
    return "cuda" if hasattr(array, "__cuda_array_interface__") else None


def _device_name(kind: int, number: int) -> str | None:
    if kind in _HOST_DEVICES:
        return None
    return f"{_DEVICE_NAMES.get(int(kind), f'DLPack device type {kind}')}:{number}"


def cuda_device_of(array: Any) -> int | None:
    """The CUDA ordinal of a capsule or of an object with ``__dlpack_device__``; None for anything else, and other memory.

    Looks at metadata only. A capsule that cannot be read gives None: its reader says why. Whatever the object raises is
    passed on.
    """
    if is_capsule(array):
        try:
            device = _struct(array, "capsule", KeyDtypeError)[0].device
        except KeyDtypeError:
            return None
        kind, number = device.type, device.id
    elif hasattr(array, "__dlpack_device__"):
        kind, number = array.__dlpack_device__()
    else:
        return None
    return int(number) if int(kind) == _CUDA else None


def cuda_memory_of(capsule: Any, *, place: str, error: type[HpsError]) -> DeviceMemory:
    """Where the memory of a capsule lies on its CUDA device; nothing is consumed, nothing on the device is read.

    Raises:
        DeviceError: the memory is not on a CUDA device.
        error: not a capsule that can be read (see :func:`view_of_capsule`), or a dtype of several lanes.

    Source: dlpack.h 1.0.
    """
    tensor, flags = _struct(capsule, place, error)
    if tensor.device.type != _CUDA:
        where = _device_name(tensor.device.type, tensor.device.id) or "host memory"
        raise DeviceError(f"{place}: expected memory on a CUDA device, got a capsule on {where}")
    code, bits = tensor.dtype.code, tensor.dtype.bits
    if code not in _DTYPE_NAMES or tensor.dtype.lanes != 1 or bits % 8:
        raise error(f"{place}: expected a known dtype, got DLPack dtype code {code}, {bits} bits, {tensor.dtype.lanes} lanes")
    shape, itemsize = _dimensions(tensor, place, error), bits // 8
    if not tensor.data and 0 not in shape:
        raise error(f"{place}: the capsule of shape {shape} has no data pointer")
    strides = tuple(tensor.strides[axis] * itemsize for axis in range(tensor.ndim)) if tensor.strides else None
    name = "bool" if code == 6 else f"{_DTYPE_NAMES[code]}{bits}"
    address = (tensor.data or 0) + tensor.byte_offset
    return DeviceMemory(address, shape, strides, name, itemsize, tensor.device.id, bool(flags & (_READ_ONLY | _IS_COPIED)))


def capsule_of(array: Any, **options: Any) -> Any:
    """A capsule of an object that has ``__dlpack__``: a versioned one from a producer that knows them, else an old one.

    ``options`` go to the producer, e.g. ``dl_device=(1, 0), copy=True``. Whatever the producer raises is passed on.
    """
    try:
        return array.__dlpack__(max_version=(1, 0), **options)
    except TypeError:  # a producer from before DLPack 1.0
        return array.__dlpack__(**options)


def view_of_capsule(
    source: Any, *, writable: bool = False, place: str = "keys", error: type[HpsError] = KeyDtypeError
) -> NDArray[Any]:
    """The memory of a DLPack capsule as a NumPy array of the same shape, strides and dtype; no copy, nothing consumed.

    Args:
        source: a ``dltensor`` or ``dltensor_versioned`` capsule, or an object with ``__dlpack__``. The view keeps it alive.
            Once another library consumes the capsule, that one owns the memory: use no view from before.
        writable: the caller will write. Without it the view is read-only.
        place: what the array is, for messages.
        error: what to raise for a source that is not a readable (or, with ``writable``, writable) capsule.

    Returns:
        An array of any integer, float, bool or complex dtype that NumPy has; the caller checks whether it suits.

    Raises:
        DeviceError: the memory lies on a device that the CPU cannot read (CPU, pinned and managed memory are fine).
        error: not a DLPack capsule, one that was consumed already, a malformed struct, a dtype that NumPy has not, or, with
            ``writable``, memory that is read-only or is a copy of the producer's.

    Source: dlpack.h 1.0.
    """
    capsule = source if is_capsule(source) else _exported(source, place, error)
    tensor, flags = _struct(capsule, place, error)
    device = _device_name(tensor.device.type, tensor.device.id)
    if device is not None:
        raise DeviceError(f"{place}: expected memory that the CPU can read, got a capsule on {device}")
    if writable and flags & (_READ_ONLY | _IS_COPIED):
        what = "is read-only" if flags & _READ_ONLY else "is a copy made for the export"
        raise error(f"{place}: expected writable memory, got a capsule whose memory {what}")
    return _view(capsule, tensor, not writable, place, error)


def _exported(source: Any, place: str, error: type[HpsError]) -> Any:
    if not hasattr(source, "__dlpack__"):
        raise error(f"{place}: expected a DLPack capsule or an object with __dlpack__, got {type(source).__name__}")
    try:
        capsule = capsule_of(source)
    except Exception as problem:
        raise error(f"{place}: {type(source).__name__} cannot be exported by DLPack: {one_line(problem)}") from problem
    if not is_capsule(capsule):
        raise error(f"{place}: __dlpack__ of {type(source).__name__}: expected a capsule, got {type(capsule).__name__}")
    return capsule


def _struct(capsule: Any, place: str, error: type[HpsError]) -> tuple[_Tensor, int]:
    """The DLTensor inside, and the flags (0 for the old form, which cannot say that it is read-only)."""
    if _is_valid(capsule, b"dltensor"):
        return _Managed.from_address(_pointer(capsule, b"dltensor")).tensor, 0
    if _is_valid(capsule, b"dltensor_versioned"):
        managed = _ManagedVersioned.from_address(_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:  # the fields after the version may have moved
            raise error(f"{place}: expected a capsule of DLPack 0.x or 1.x, got {managed.major}.{managed.minor}")
        return managed.tensor, managed.flags
    name = (_name(capsule) or b"").decode("ascii", "replace")
    if name.startswith("used_dltensor"):
        raise error(f"{place}: expected a capsule that still owns its memory, got one that was consumed already ({name})")
    raise error(f"{place}: expected 'dltensor' or 'dltensor_versioned', got a capsule named {name!r}")


def _view(capsule: Any, tensor: _Tensor, read_only: bool, place: str, error: type[HpsError]) -> NDArray[Any]:
    dtype = _dtype(tensor.dtype, place, error)
    shape = _dimensions(tensor, place, error)
    address = (tensor.data or 0) + tensor.byte_offset
    if not tensor.data and 0 not in shape:
        raise error(f"{place}: the capsule of shape {shape} has no data pointer")
    strides = tuple(tensor.strides[axis] * dtype.itemsize for axis in range(tensor.ndim)) if tensor.strides else None
    interface = {"data": (address, read_only), "shape": shape, "strides": strides, "typestr": dtype.str, "version": 3}
    try:
        return np.empty(shape, dtype) if 0 in shape else np.asarray(_Memory(capsule, interface))
    except (ValueError, OverflowError) as problem:
        raise error(f"{place}: the capsule of shape {shape} and strides {strides} is malformed: {problem}") from problem


def _dtype(dtype: _DataType, place: str, error: type[HpsError]) -> np.dtype[Any]:
    kind = _DTYPE_KINDS.get(dtype.code)
    if kind is not None and dtype.lanes == 1 and dtype.bits in (8, 16, 32, 64, 128):
        try:
            return np.dtype(f"{kind}{dtype.bits // 8}")
        except TypeError as problem:  # e.g. an 8-bit float
            raise error(f"{place}: NumPy has no {dtype.bits}-bit dtype of kind {kind!r}") from problem
    raise error(
        f"{place}: expected a dtype of NumPy, got DLPack dtype code {dtype.code}, {dtype.bits} bits, {dtype.lanes} lanes"
    )


def _dimensions(tensor: _Tensor, place: str, error: type[HpsError]) -> tuple[int, ...]:
    if not 0 <= tensor.ndim <= _MAX_NDIM:
        raise error(f"{place}: expected 0 to {_MAX_NDIM} dimensions, got a capsule of {tensor.ndim}")
    if tensor.ndim and not tensor.shape:
        raise error(f"{place}: the capsule has {tensor.ndim} dimensions but no shape pointer")
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if min(shape, default=0) < 0:
        raise error(f"{place}: expected sizes of 0 or more, got a capsule of shape {shape}")
    return shape
