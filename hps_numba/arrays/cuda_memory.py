"""CUDA memory as its owner describes it: which framework, which device, address, shape, strides; and CuPy's view of it.

No framework is imported: it is found in ``sys.modules``. Only CuPy may be, for arrays of unknown frameworks, which bring no
allocator.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hps_numba.arrays.dlpack import DeviceMemory, capsule_of, cuda_device_of, cuda_memory_of, is_capsule
from hps_numba.arrays.kinds import ArrayKind, one_line
from hps_numba.arrays.streams import LEGACY_STREAM, ambient_stream, stream_handle
from hps_numba.device.driver import device_of_address
from hps_numba.errors import DeviceError, HpsError

__all__ = [
    "CudaOrigin",
    "cupy_kind",
    "cupy_view",
    "describe",
    "device_name",
    "device_of_array",
    "dtype_name",
    "family",
    "in_host_memory",
    "is_contiguous",
    "require_cupy",
    "torch_kind",
]

_HOST_TYPES = frozenset({np.ndarray, list, tuple, range, int, float, str, bytes, bytearray, memoryview, type(None)})


class CudaOrigin(NamedTuple):
    """``ArrayKind.device`` of an unknown framework's array (its ``framework`` is ``"cuda"``): where, and on which stream."""

    device: int
    stream: int


def device_of_array(array: Any) -> int | None:
    """CUDA ordinal of an array that can be served where it lies; None for all that :mod:`hps_numba.arrays.host` serves.

    That is: arrays in memory that the CPU reads (pinned memory too), lists, arrays of TensorFlow and JAX, and whatever cannot
    be read at all; ``arrays.host`` then says why. Raises nothing.
    """
    if type(array) is np.ndarray:
        return None
    name = family(type(array))
    if name == "torch":
        return array.get_device() if array.is_cuda else None
    if name == "cupy":
        return array.data.device_id
    return _foreign_device(array) if name == "foreign" else None


# ---- frameworks ----------------------------------------------------------------------------------------------------------


def _family_of(kind: type) -> str:
    if kind in _HOST_TYPES:
        return "host"
    for package, name in (("torch", "Tensor"), ("cupy", "ndarray")):
        base = getattr(sys.modules.get(package), name, None)
        if isinstance(base, type) and issubclass(kind, base):
            return package
    packages = {base.__module__.partition(".")[0] for base in kind.__mro__}
    return "foreign" if packages.isdisjoint({"tensorflow", "jax", "jaxlib"}) else "private"


family: Callable[[type], str] = functools.lru_cache(maxsize=256)(_family_of)
"""What an array of this class is: ``torch``, ``cupy``, ``private`` (TensorFlow, JAX), ``host``, or ``foreign``."""


@functools.lru_cache(maxsize=64)
def dtype_name(dtype: Any) -> str:
    """NumPy's name of a dtype of Torch, CuPy or NumPy; ``bfloat16`` for Torch's."""
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=64)
def torch_kind(torch: Any, device: int) -> ArrayKind:
    """The kind of Torch tensors on a GPU."""
    return ArrayKind("torch", torch.device("cuda", device))


@functools.lru_cache(maxsize=64)
def cupy_kind(cupy: Any, device: int) -> ArrayKind:
    """The kind of CuPy arrays on a GPU."""
    return ArrayKind("cupy", cupy.cuda.Device(device))


def device_name(kind: ArrayKind) -> str:
    """The device of a kind, for messages."""
    return f"cuda:{kind.device.device}" if kind.framework == "cuda" else str(kind.device)


def in_host_memory(array: Any, place: str) -> DeviceError:
    """The error for an array that should be in CUDA memory and is not."""
    return DeviceError(f"{place}: expected an array in CUDA memory, got {type(array).__name__} in host memory")


# ---- arrays of unknown frameworks ----------------------------------------------------------------------------------------


def describe(array: Any, place: str, error: type[HpsError], stream: Any) -> tuple[DeviceMemory, int, object]:
    """The memory of an array of no framework known here, its stream, and what keeps the memory alive.

    Raises:
        error: it cannot be read.   DeviceError: it is not in CUDA memory, or in that of TensorFlow or JAX.
    """
    if is_capsule(array):
        memory = cuda_memory_of(array, place=place, error=error)
        return memory, ambient_stream(memory.device), array
    if family(type(array)) == "private":
        framework = type(array).__module__.partition(".")[0]
        raise DeviceError(f"{place}: {framework} arrays cannot be served in CUDA memory, only by copies through the host")
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is not None:
        return _memory_of_interface(array, interface, place, error), int(interface.get("stream") or 0), array
    device = cuda_device_of(array)
    if device is None:
        raise in_host_memory(array, place)
    # the producer makes this stream wait for its own; DLPack has no 0
    ordered = stream_handle(stream, ArrayKind("cuda", CudaOrigin(device, 0)), device) or LEGACY_STREAM
    capsule = capsule_of(array, stream=ordered)
    return cuda_memory_of(capsule, place=place, error=error), 0, capsule


def _memory_of_interface(array: Any, interface: dict[str, Any], place: str, error: type[HpsError]) -> DeviceMemory:
    if interface.get("mask") is not None:
        raise error(f"{place}: expected an array without a mask, got a masked array")
    dtype, strides = np.dtype(interface["typestr"]), interface.get("strides")
    address, read_only = interface["data"]
    device = cuda_device_of(array)
    return DeviceMemory(
        address=int(address or 0),
        shape=tuple(interface["shape"]),
        strides=None if strides is None else tuple(strides),
        dtype=str(dtype),  # with the byte order where that is not the machine's
        itemsize=dtype.itemsize,
        device=_device_of_address(int(address or 0)) if device is None else device,
        read_only=bool(read_only),
    )


def _foreign_device(array: Any) -> int | None:
    try:
        device = cuda_device_of(array)
        if device is None and (interface := getattr(array, "__cuda_array_interface__", None)) is not None:
            device = _device_of_address(int(interface["data"][0] or 0))
        return device
    except Exception:  # foreign code may raise anything; arrays.host meets it again, and says so
        return None


def _device_of_address(address: int) -> int:
    """The CUDA ordinal of the memory at ``address``, by the driver; for 0 (an empty array) the current device."""
    if address:
        return device_of_address(address)
    status, device = importlib.import_module("cuda.bindings.driver").cuCtxGetDevice()
    return 0 if int(status) else int(device)


def is_contiguous(memory: DeviceMemory) -> bool:
    """Whether elements lie one after the other, in C order."""
    if memory.strides is None or 0 in memory.shape:
        return True
    step = memory.itemsize
    for size, stride in zip(reversed(memory.shape), reversed(memory.strides)):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def require_cupy(place: str) -> Any:
    """CuPy, imported if need be.

    Raises:
        DeviceError: it cannot be imported.
    """
    try:
        return importlib.import_module("cupy")
    except Exception as problem:  # its own imports fail in many ways where CUDA is half there
        reason = f"{type(problem).__name__}: {one_line(problem)}"
        raise DeviceError(
            f"{place}: an array of an unknown framework needs CuPy here, which does not import: {reason}"
        ) from problem


def cupy_view(cupy: Any, memory: DeviceMemory, dtype: str, keep: object) -> Any:
    """The memory as a CuPy array. Not by ``cupy.asarray``: that waits for the stream of the array."""
    strides = memory.strides or _c_strides(memory)
    span = memory.itemsize + sum(abs(stride) * (size - 1) for stride, size in zip(strides, memory.shape))
    chunk = cupy.cuda.UnownedMemory(memory.address, span, keep, memory.device)
    return cupy.ndarray(memory.shape, dtype, cupy.cuda.MemoryPointer(chunk, 0), strides)


def _c_strides(memory: DeviceMemory) -> tuple[int, ...]:
    return tuple(memory.itemsize * math.prod(memory.shape[axis + 1 :]) for axis in range(len(memory.shape)))
