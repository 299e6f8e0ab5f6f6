"""Keys and weights in CUDA memory, seen as raw addresses: nothing is copied, nothing on the device is read, nothing waits.

What :mod:`hps_numba.arrays.host` is for arrays that the CPU can read, this is for arrays that only a kernel can: Torch tensors,
CuPy arrays, CUDA DLPack capsules, and anything of an unknown framework with ``__cuda_array_interface__`` or ``__dlpack__``.
What must be rewritten first (strides, integers narrower than 32 bits) is rewritten on the device by the framework itself.

Keys of unknown frameworks bring their stream along (``kind``): the one in their ``__cuda_array_interface__``, else the legacy
default stream. A capsule does not say which stream it belongs to: the current one of Torch is taken, or of CuPy. If the caller
names a stream, it is up to the caller that the keys are ready and ``out`` is idle in the order of that stream, as with any
operation of a framework.

TensorFlow's and JAX's arrays do not belong here even if they are on a GPU: they are immutable, and the streams that fill them
are private, so an answer could not be handed over without a wait. ``arrays.host`` copies them.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any, NamedTuple

from hps_numba.arrays.cuda_memory import (
    CudaOrigin,
    cupy_kind,
    cupy_view,
    describe,
    device_of_array,
    dtype_name,
    family,
    in_host_memory,
    is_contiguous,
    require_cupy,
    torch_kind,
)
from hps_numba.arrays.dlpack import is_capsule
from hps_numba.arrays.encodings import KEY_ALIGNMENT, KEY_ENCODINGS, NARROW_INTEGERS
from hps_numba.arrays.kinds import ArrayKind, one_line
from hps_numba.arrays.streams import cupy_order, torch_order
from hps_numba.errors import ArrayError, DeviceError, HpsError, KeyDtypeError

__all__ = ["DeviceKeys", "as_device_floats", "as_device_keys", "device_of_array"]


class DeviceKeys(NamedTuple):
    """Keys as kernels read them.

    Attributes:
        address: device address of ``n`` contiguous integers; may be 0 if ``n`` is 0.
        n: how many.
        shape: the shape of the keys as given; rows have ``shape + (dim,)``.
        form: key encoding, one of those in ``arrays.encodings``.
        kind: what ``new_device_output`` and ``stream_handle`` need.
        device: CUDA ordinal.
        keep: whatever owns the memory; hold it until the kernels that read the keys are launched.
    """

    address: int
    n: int
    shape: tuple[int, ...]
    form: str
    kind: ArrayKind
    device: int
    keep: object


_device_keys = partial(tuple.__new__, DeviceKeys)  # what ``DeviceKeys(...)`` does, without its Python frame


def as_device_keys(keys: Any, *, key_bits: int, place: str = "keys", stream: Any = None) -> DeviceKeys:
    """See keys of any integer dtype, shape and strides in CUDA memory as an address; no key is read.

    Args:
        keys: an array for which :func:`device_of_array` has an answer.
        key_bits: 64: every integer as its value, uint64 reinterpreted. 32: the bits of int32 and uint32 zero-extended, narrower
            integers extended to 32 bits first, wider ones checked by the kernel (``checked32_in_int64``).
        place: what the keys are, for messages.
        stream: the stream that the lookup runs on, if not the framework's current one; see ``arrays.streams.stream_handle``.

    Returns:
        :class:`DeviceKeys`; zero-copy for contiguous 32- and 64-bit integers. Others are copied by the framework.

    Raises:
        KeyDtypeError: not integers, masked, or not readable as an array.
        DeviceError: host memory, misaligned memory, or a copy is needed and CuPy is not there to make it.
    """
    read = _KEY_READERS.get(family(type(keys)), _foreign_keys)
    try:
        found = read(keys, key_bits, place, stream)
    except HpsError:
        raise
    except Exception as problem:  # foreign code may raise anything
        what = f"{type(keys).__name__} cannot be read as an array of integers in CUDA memory"
        raise KeyDtypeError(f"{place}: {what}: {type(problem).__name__}: {one_line(problem)}") from problem
    if found.n and (not found.address or found.address % KEY_ALIGNMENT[found.form]):
        expected = f"expected memory aligned to {KEY_ALIGNMENT[found.form]} bytes"
        raise DeviceError(f"{place}: {expected}, got {type(keys).__name__} at address {found.address:#x}")
    return found


def as_device_floats(
    array: Any, shape: tuple[int, ...], device: int, *, place: str = "weights", stream: Any = None
) -> tuple[int, object]:
    """See numbers in CUDA memory as contiguous float32.

    Args:
        array: a Torch tensor or an array of CuPy.   shape: the shape it must have.   device: where it must be.
        stream: as for ``as_device_keys``.

    Returns:
        ``(address, keep)``; zero-copy for contiguous float32.

    Raises:
        ArrayError: another shape, or no numbers.   DeviceError: not on that device.
    """
    found = device_of_array(array)
    if found != device:
        where = "in host memory" if found is None else f"on cuda:{found}"
        raise DeviceError(f"{place}: expected numbers on cuda:{device}, as the keys, got numbers {where}")
    if tuple(array.shape) != shape:
        raise ArrayError(f"{place}: expected shape {list(shape)}, got {list(array.shape)}")
    kind = family(type(array))
    if kind == "torch":
        torch = sys.modules["torch"]
        if array.is_complex():
            raise ArrayError(f"{place}: expected dtype float32, got {dtype_name(array.dtype)}")
        with torch_order(device, stream):
            floats = array.detach().to(torch.float32).contiguous()
        return floats.data_ptr(), floats
    cupy = require_cupy(place)
    with cupy_order(cupy, device, stream):
        if kind != "cupy":
            array = cupy.from_dlpack(array)
        if array.dtype.kind not in "fiub":
            raise ArrayError(f"{place}: expected dtype float32, got {array.dtype}")
        floats = cupy.ascontiguousarray(array, dtype=cupy.float32)
    return floats.data.ptr, floats


def _encoding(dtype: str, key_bits: int, keys: Any, place: str) -> str:
    encoding = KEY_ENCODINGS[key_bits].get(dtype)
    if encoding is None:
        what = "capsule" if is_capsule(keys) else type(keys).__name__
        raise KeyDtypeError(f"{place}: expected integers (int64, int32, uint64, ...), got {what} of dtype {dtype}")
    return encoding


def _torch_keys(keys: Any, key_bits: int, place: str, stream: Any) -> DeviceKeys:
    if not keys.is_cuda:
        raise in_host_memory(keys, place)
    torch, dtype = sys.modules["torch"], dtype_name(keys.dtype)
    form, device, array = _encoding(dtype, key_bits, keys, place), keys.get_device(), keys
    if dtype in NARROW_INTEGERS:
        with torch_order(device, stream):
            array = keys.to(torch.int32, memory_format=torch.contiguous_format)
    elif not keys.is_contiguous():
        with torch_order(device, stream):
            array = keys.contiguous()
    shape = tuple(keys.shape)
    return _device_keys((array.data_ptr(), math.prod(shape), shape, form, torch_kind(torch, device), device, array))


def _cupy_keys(keys: Any, key_bits: int, place: str, stream: Any) -> DeviceKeys:
    cupy = sys.modules["cupy"]
    dtype = dtype_name(keys.dtype)
    form, device, array = _encoding(dtype, key_bits, keys, place), keys.data.device_id, keys
    if dtype in NARROW_INTEGERS or not keys.flags.c_contiguous:
        with cupy_order(cupy, device, stream):
            array = _rewritten(cupy, keys, dtype)
    return _device_keys((array.data.ptr, keys.size, keys.shape, form, cupy_kind(cupy, device), device, array))


def _rewritten(cupy: Any, keys: Any, dtype: str) -> Any:
    return keys.astype(cupy.int32, order="C") if dtype in NARROW_INTEGERS else cupy.ascontiguousarray(keys)


def _foreign_keys(keys: Any, key_bits: int, place: str, stream: Any) -> DeviceKeys:
    memory, origin, keep = describe(keys, place, KeyDtypeError, stream)
    form, n = _encoding(memory.dtype, key_bits, keys, place), math.prod(memory.shape)
    address = memory.address
    if n and (memory.dtype in NARROW_INTEGERS or not is_contiguous(memory)):
        cupy = require_cupy(place)
        with cupy_order(cupy, memory.device, origin if stream is None else stream):
            keep = _rewritten(cupy, cupy_view(cupy, memory, memory.dtype, keep), memory.dtype)
        address = keep.data.ptr
    kind = ArrayKind("cuda", CudaOrigin(memory.device, origin))
    return DeviceKeys(address, n, memory.shape, form, kind, memory.device, keep)


_KEY_READERS = {"torch": _torch_keys, "cupy": _cupy_keys}
