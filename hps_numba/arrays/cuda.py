"""Arrays in CUDA memory, seen as raw addresses: nothing is copied, nothing on the device is read, nothing waits.

What :mod:`hps_numba.arrays.host` is for arrays that the CPU can read, this is for arrays that only a kernel can: Torch tensors,
CuPy arrays, CUDA DLPack capsules, and anything of an unknown framework with ``__cuda_array_interface__`` or ``__dlpack__``.
What must be rewritten first (strides, integers narrower than 32 bits) is rewritten on the device by the framework itself.

The order of work. A lookup runs on one stream: the one that the caller names, else the current one of the framework that made
the keys. Copies and allocations made here take place in the order of the same stream; so every function here takes the
caller's ``stream`` (None: the framework's current one). Keys of unknown frameworks bring their stream along (``kind``): the one
in their ``__cuda_array_interface__``, else the legacy default stream. A capsule does not say which stream it belongs to: the
current one of Torch is taken, or of CuPy. That the keys are ready and ``out`` is idle in the order of a stream that the caller
names is for the caller to see to, as with any framework's own operations.

TensorFlow's and JAX's arrays do not belong here even if they lie on a GPU: they cannot be written once they exist, and the
streams behind them are private, so an answer could not be handed over without a wait. ``interop`` copies them.

No framework is imported: it is found in ``sys.modules``. Only CuPy may be, for arrays of unknown frameworks, which bring no
allocator.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from hps_numba.arrays.dlpack import DeviceMemory, capsule_of, cuda_device_of, cuda_memory_of, is_capsule
from hps_numba.arrays.host import ArrayKind, Finish
from hps_numba.device.driver import device_of_address
from hps_numba.errors import ArrayError, CapacityError, DeviceError, HpsError, KeyDtypeError

__all__ = [
    "FORMS",
    "CudaOrigin",
    "DeviceKeys",
    "as_device_floats",
    "as_device_keys",
    "as_device_output",
    "device_of_array",
    "new_device_output",
    "stream_handle",
]

_LEGACY_STREAM, _PER_THREAD_STREAM = 1, 2  # cudaStreamLegacy, cudaStreamPerThread; 0 means the legacy one too
_CONVERTED = frozenset({"int8", "int16", "uint8", "uint16"})  # kernels read 32 and 64 bits only
FORMS = {  # by "are the server's keys 64 bits wide", then by dtype
    True: {"int64": "int64", "uint64": "int64", "int32": "int32", "uint32": "uint32", **dict.fromkeys(_CONVERTED, "int32")},
    False: dict.fromkeys(["int64", "uint64"], "checked32_in_int64") | dict.fromkeys(["int32", "uint32", *_CONVERTED], "uint32"),
}
_MISALIGNED = {"int64": 7, "checked32_in_int64": 7, "int32": 3, "uint32": 3}  # address bits that must be 0
_OUTPUT_DTYPES = ("float32", "float16", "bfloat16")
_HOST_TYPES = frozenset({np.ndarray, list, tuple, range, int, float, str, bytes, bytearray, memoryview, type(None)})


class CudaOrigin(NamedTuple):
    """``ArrayKind.device`` of an unknown framework's array (its ``framework`` is ``"cuda"``): where, and on which stream."""

    device: int
    stream: int


class DeviceKeys(NamedTuple):
    """Keys as kernels want them.

    Attributes:
        address: device address of ``n`` contiguous integers; may be 0 if ``n`` is 0.
        n: how many.
        shape: the shape of the keys as given; rows have ``shape + (dim,)``.
        form: how to read one: ``int64``; ``int32``, sign-extended; ``uint32``, zero-extended; ``checked32_in_int64``, an int64
            that is an absent key unless it lies within 0..2^32-1.
        kind: what :func:`new_device_output` and :func:`stream_handle` need.
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


def device_of_array(array: Any) -> int | None:
    """CUDA ordinal of an array that can be served where it lies; None for all that :mod:`hps_numba.arrays.host` serves.

    That is: arrays in memory that the CPU reads (pinned memory too), lists, arrays of TensorFlow and JAX, and whatever cannot
    be read at all; ``interop`` then says why. Raises nothing.
    """
    if type(array) is np.ndarray:
        return None
    family = _family(type(array))
    if family == "torch":
        return array.get_device() if array.is_cuda else None
    if family == "cupy":
        return array.data.device_id
    return _foreign_device(array) if family == "foreign" else None


def as_device_keys(keys: Any, *, wide: bool, place: str = "keys", stream: Any = None) -> DeviceKeys:
    """See keys of any integer dtype, shape and strides in CUDA memory as an address; no key is read.

    Args:
        keys: an array for which :func:`device_of_array` has an answer.
        wide: 64-bit keys: every integer as its value, uint64 reinterpreted. Otherwise 32-bit keys: the bits of int32 and uint32
            zero-extended, narrower integers extended to 32 bits first, wider ones left to the kernel (``checked32_in_int64``).
        place: what the keys are, for messages.
        stream: the stream that the lookup runs on, if not the framework's current one; see :func:`stream_handle`.

    Returns:
        :class:`DeviceKeys`; zero-copy for contiguous 32- and 64-bit integers. Others are copied by the framework.

    Raises:
        KeyDtypeError: not integers, masked, or not readable as an array.
        DeviceError: host memory, misaligned memory, or a copy is needed and CuPy is not there to make it.

    Source: spec 2.5, 4.1; contracts, "Keys and dtypes".
    """
    read = _KEY_READERS.get(_family(type(keys)), _foreign_keys)
    try:
        found = read(keys, wide, place, stream)
    except HpsError:
        raise
    except Exception as problem:  # foreign code may raise anything
        what = f"{type(keys).__name__} cannot be read as an array of integers in CUDA memory"
        raise KeyDtypeError(f"{place}: {what}: {type(problem).__name__}: {_line(problem)}") from problem
    if found.n and (not found.address or found.address & _MISALIGNED[found.form]):
        wanted = f"memory aligned to {_MISALIGNED[found.form] + 1} bytes is wanted"
        raise DeviceError(f"{place}: {type(keys).__name__} at address {found.address:#x} came, {wanted}")
    return found


def as_device_floats(array: Any, shape: tuple[int, ...], device: int, *, place: str = "weights", stream: Any = None) -> Any:
    """See numbers in CUDA memory as contiguous float32.

    Args:
        array: a Torch tensor or an array of CuPy.   shape: that it has to have.   device: where it has to be.   stream: as for
            ``as_device_keys``.

    Returns:
        ``(address, keep)``; zero-copy for contiguous float32.

    Raises:
        ArrayError: another shape, or no numbers.   DeviceError: not on that device.
    """
    came = device_of_array(array)
    if came != device:
        raise DeviceError(f"{place}: numbers {_place_name(came)} came, ones on cuda:{device}, as the keys, are wanted")
    if tuple(array.shape) != shape:
        raise ArrayError(f"{place}: shape {list(array.shape)} came, {list(shape)} is wanted")
    family = _family(type(array))
    if family == "torch":
        torch = sys.modules["torch"]
        if array.is_complex():
            raise ArrayError(f"{place}: dtype {_dtype_name(array.dtype)} came, float32 is wanted")
        with _torch_order(device, stream):
            floats = array.detach().to(torch.float32).contiguous()
        return floats.data_ptr(), floats
    cupy = _cupy(place)
    with _cupy_order(cupy, device, stream):
        if family != "cupy":
            array = cupy.from_dlpack(array)
        if array.dtype.kind not in "fiub":
            raise ArrayError(f"{place}: dtype {array.dtype} came, float32 is wanted")
        floats = cupy.ascontiguousarray(array, dtype=cupy.float32)
    return floats.data.ptr, floats


def _place_name(device: int | None) -> str:
    return "in host memory" if device is None else f"on cuda:{device}"


def new_device_output(kind: ArrayKind, shape: tuple[int, ...], dtype: str, *, stream: Any = None) -> tuple[Any, int]:
    """An uninitialised array of the framework and on the device of ``kind``, and its address. Unknown frameworks get CuPy's.

    Args:
        kind: of :class:`DeviceKeys`.
        shape: of the answer, ``keys.shape + (dim,)``.
        dtype: ``float32``, ``float16``, or ``bfloat16`` (Torch only).
        stream: the stream that the lookup runs on, if not the framework's current one.

    Raises:
        ArrayError: a dtype that the framework has not.
        DeviceError: ``kind`` is not of CUDA memory, or CuPy is needed and missing.
        CapacityError: the device has no room for it.
    """
    if dtype not in _OUTPUT_DTYPES or (dtype == "bfloat16" and kind.framework != "torch"):
        wanted = ", ".join(_OUTPUT_DTYPES if kind.framework == "torch" else _OUTPUT_DTYPES[:2])
        raise ArrayError(f"output: dtype {dtype} came, one of {wanted} is wanted for keys of {kind.framework}")
    try:
        if kind.framework == "torch":
            return _new_torch(kind, shape, dtype, stream)
        return _new_cupy(kind, shape, dtype, stream)
    except HpsError:
        raise
    except Exception as problem:  # foreign code may raise anything
        error = CapacityError if "OutOfMemory" in type(problem).__name__ else DeviceError
        what = f"{dtype} rows of shape {shape} on {_device_name(kind)} cannot be allocated"
        raise error(f"output: {what}: {type(problem).__name__}: {_line(problem)}") from problem


def as_device_output(
    out: Any,
    shape: tuple[int, ...],
    dtype: str,
    device: int,
    *,
    larger: bool = False,
    place: str = "out",
    stream: Any = None,
) -> tuple[int, Finish, object]:
    """Make a caller's ``out=`` array in CUDA memory writable as contiguous rows.

    Args:
        out: a Torch tensor, a CuPy array, a CUDA DLPack capsule, anything with ``__cuda_array_interface__`` or ``__dlpack__``.
        shape: the shape that the answer has.
        dtype: the dtype that the answer has, by name.
        device: CUDA ordinal of the keys.
        larger: accept any shape with at least as many elements; the first ones, in C order, are written (spec 4.1).
        place: what the array is, for messages.
        stream: the stream that the lookup runs on, if not the current one of the framework of ``out``. A caller whose keys may
            be of another framework than ``out`` passes it always.

    Returns:
        ``(address, finish, keep)``: launch what fills the rows at ``address``, then call ``finish()``; hold ``keep`` until
        then. For contiguous arrays the address is the caller's memory and ``finish`` does nothing; else it is a temporary and
        ``finish`` launches the copy back.

    Raises:
        ArrayError: wrong shape or dtype, read-only, immutable, requiring grad, or overlapping with itself.
        DeviceError: host memory or another device, or a copy is needed and CuPy is not there to make it.
    """
    family = _family(type(out))
    try:
        if family == "torch" and (address := _address_of_rows(out, shape, dtype, device)):
            return address, _nothing_to_do, out
        target = _TARGETS.get(family, _foreign_target)(out, place, stream)
        _check_target(target, shape, dtype, device, larger, place)
        if target.contiguous:
            return target.address, _nothing_to_do, target.keep
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


def stream_handle(stream: Any, kind: ArrayKind, device: int) -> int:
    """The CUDA stream (``cudaStream_t``, as an integer) that a lookup runs on.

    Args:
        stream: None: the current stream of the framework of ``kind`` on ``device`` (an unknown framework's own). Else a handle,
            a stream of Torch or CuPy, or anything with ``__cuda_stream__`` (cuda.core, numba-cuda).
        kind: of :class:`DeviceKeys`.
        device: CUDA ordinal of the keys.

    Raises:
        DeviceError: something else, or a stream of another device.
    """
    if stream is None:
        current = _CURRENT_STREAMS.get(kind.framework)
        return _ambient_stream(device) if current is None else current(kind, device)
    if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
        return int(stream)
    try:
        return _handle_of(stream, device)
    except HpsError:
        raise
    except Exception as problem:  # foreign code may raise anything
        came = f"{type(stream).__name__} {_line(repr(stream))}"
        wanted = "a handle, a Torch or CuPy stream or an object with __cuda_stream__ is wanted"
        raise DeviceError(f"stream: {came} came, {wanted}: {_line(problem)}") from problem


# ---- streams -------------------------------------------------------------------------------------------------------------


def _handle_of(stream: Any, device: int) -> int:
    for name in ("device_index", "device_id"):  # Torch, CuPy (-1 for a stream of any device)
        other = getattr(stream, name, -1)
        if isinstance(other, int) and other not in (-1, device):
            raise DeviceError(f"stream: a stream of cuda:{other} came, one of cuda:{device} is wanted")
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        version, handle = protocol() if callable(protocol) else protocol
        if version != 0:
            raise ValueError(f"version {version} of __cuda_stream__, 0 is known")
        return int(handle)
    for name in ("cuda_stream", "ptr"):  # Torch, CuPy
        handle = getattr(stream, name, None)
        if isinstance(handle, int):
            return handle
    raise TypeError("it has no stream handle")


def _torch_current(device: int) -> int:
    torch = sys.modules["torch"]
    try:
        return torch._C._cuda_getCurrentRawStream(device)  # 20 times cheaper; not promised by Torch
    except AttributeError:
        return torch.cuda.current_stream(device).cuda_stream


def _cupy_current(device: int) -> int:
    return sys.modules["cupy"].cuda.get_current_stream(device).ptr


def _ambient_stream(device: int) -> int:
    """The stream of memory that does not say what framework made it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return _torch_current(device)
    return _cupy_current(device) if sys.modules.get("cupy") is not None else 0


_CURRENT_STREAMS: dict[str, Callable[[ArrayKind, int], int]] = {
    "torch": lambda kind, device: _torch_current(device),
    "cupy": lambda kind, device: _cupy_current(device),
    "cuda": lambda kind, device: kind.device.stream,
}


def _torch_order(device: int, stream: Any) -> AbstractContextManager[Any]:
    """Inside, Torch allocates and copies in the order of ``stream``."""
    if stream is None:
        return contextlib.nullcontext()
    torch, handle = sys.modules["torch"], stream_handle(stream, ArrayKind("torch"), device)
    if handle == _torch_current(device):
        return contextlib.nullcontext()
    if handle == _PER_THREAD_STREAM:
        raise DeviceError("stream: the per-thread default stream (2) came, Torch cannot work in its order: make a stream")
    if handle in (0, _LEGACY_STREAM):
        return torch.cuda.stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(torch.cuda.ExternalStream(handle, device=device))


@contextlib.contextmanager
def _cupy_order(cupy: Any, device: int, stream: Any) -> Iterator[None]:
    """Inside, CuPy allocates and copies on ``device``, in the order of ``stream``."""
    with cupy.cuda.Device(device):
        if stream is None:
            yield
        else:
            with _cupy_stream(cupy, stream_handle(stream, ArrayKind("cupy"), device)):
                yield


class _Handle:
    """A stream by its handle, in the CUDA stream protocol."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


def _cupy_stream(cupy: Any, handle: int) -> Any:
    """CuPy's object for a stream; since version 14 it is made by the protocol."""
    made_from = getattr(getattr(cupy.cuda, "Stream", None), "from_external", None)
    return cupy.cuda.ExternalStream(handle) if made_from is None else made_from(_Handle(handle))


# ---- keys ----------------------------------------------------------------------------------------------------------------


def _form(name: str, wide: bool, keys: Any, place: str) -> str:
    form = FORMS[wide].get(name)
    if form is None:
        what = "capsule" if is_capsule(keys) else type(keys).__name__
        raise KeyDtypeError(f"{place}: {what} of dtype {name} came, integers (int64, int32, uint64, ...) are wanted")
    return form


def _torch_keys(keys: Any, wide: bool, place: str, stream: Any) -> DeviceKeys:
    if not keys.is_cuda:
        raise _in_host_memory(keys, place)
    torch, name = sys.modules["torch"], _dtype_name(keys.dtype)
    form, device, array = _form(name, wide, keys, place), keys.get_device(), keys
    if name in _CONVERTED:
        with _torch_order(device, stream):
            array = keys.to(torch.int32, memory_format=torch.contiguous_format)
    elif not keys.is_contiguous():
        with _torch_order(device, stream):
            array = keys.contiguous()
    shape = tuple(keys.shape)
    return DeviceKeys(array.data_ptr(), math.prod(shape), shape, form, _torch_kind(torch, device), device, array)


def _cupy_keys(keys: Any, wide: bool, place: str, stream: Any) -> DeviceKeys:
    cupy = sys.modules["cupy"]
    name = _dtype_name(keys.dtype)
    form, device, array = _form(name, wide, keys, place), keys.data.device_id, keys
    if name in _CONVERTED or not keys.flags.c_contiguous:
        with _cupy_order(cupy, device, stream):
            array = _rewritten(cupy, keys, name)
    return DeviceKeys(array.data.ptr, keys.size, keys.shape, form, _cupy_kind(cupy, device), device, array)


def _rewritten(cupy: Any, keys: Any, name: str) -> Any:
    return keys.astype(cupy.int32, order="C") if name in _CONVERTED else cupy.ascontiguousarray(keys)


def _foreign_keys(keys: Any, wide: bool, place: str, stream: Any) -> DeviceKeys:
    memory, origin, keep = _described(keys, place, KeyDtypeError, stream)
    form, n = _form(memory.dtype, wide, keys, place), math.prod(memory.shape)
    address = memory.address
    if n and (memory.dtype in _CONVERTED or not _is_contiguous(memory)):
        cupy = _cupy(place)
        with _cupy_order(cupy, memory.device, origin if stream is None else stream):
            keep = _rewritten(cupy, _cupy_view(cupy, memory, memory.dtype, keep), memory.dtype)
        address = keep.data.ptr
    kind = ArrayKind("cuda", CudaOrigin(memory.device, origin))
    return DeviceKeys(address, n, memory.shape, form, kind, memory.device, keep)


_KEY_READERS = {"torch": _torch_keys, "cupy": _cupy_keys}


# ---- outputs -------------------------------------------------------------------------------------------------------------


def _new_torch(kind: ArrayKind, shape: tuple[int, ...], dtype: str, stream: Any) -> tuple[Any, int]:
    torch = sys.modules["torch"]
    if stream is None:
        rows = torch.empty(shape, dtype=getattr(torch, dtype), device=kind.device)
    else:
        with _torch_order(kind.device.index, stream):
            rows = torch.empty(shape, dtype=getattr(torch, dtype), device=kind.device)
    return rows, rows.data_ptr()


def _new_cupy(kind: ArrayKind, shape: tuple[int, ...], dtype: str, stream: Any) -> tuple[Any, int]:
    if kind.framework == "cuda":
        cupy, device = _cupy("output"), kind.device.device
        stream = kind.device.stream if stream is None else stream
    elif kind.framework == "cupy":
        cupy, device = sys.modules["cupy"], kind.device.id
    else:
        raise DeviceError(f"output: keys of {kind.framework} in host memory came, keys in CUDA memory are wanted")
    if stream is None and cupy.cuda.runtime.getDevice() == device:
        rows = cupy.empty(shape, dtype)
    else:
        with _cupy_order(cupy, device, stream):
            rows = cupy.empty(shape, dtype)
    return rows, rows.data.ptr


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
        raise DeviceError(f"{place}: an array on cuda:{target.device} came, one on cuda:{device}, as the keys, is wanted")
    if target.dtype != dtype:
        raise ArrayError(f"{place}: dtype {target.dtype} came, {dtype} is wanted")
    size = math.prod(target.shape)
    if target.shape != shape and not (larger and size >= math.prod(shape)):
        raise ArrayError(f"{place}: shape {target.shape} came, {shape}{' or more elements' if larger else ''} is wanted")
    if target.read_only:
        raise ArrayError(f"{place}: the array is read-only, one that can be written is wanted")
    if size and target.strides and any(stride == 0 and n > 1 for stride, n in zip(target.strides, target.shape)):
        raise ArrayError(f"{place}: the array overlaps itself (strides {target.strides}), memory for every row is wanted")
    if size and (not target.address or target.address % target.itemsize):
        raise ArrayError(f"{place}: an array at address {target.address:#x} came, aligned memory is wanted")


def _address_of_rows(out: Any, shape: tuple[int, ...], dtype: str, device: int) -> int:
    """The address of a tensor that is just what is wanted, 0 for others: a third of the way through :class:`_Target`."""
    if out.requires_grad or out.shape != shape or _dtype_name(out.dtype) != dtype or out.get_device() != device:
        return 0
    if not out.is_cuda or not out.is_contiguous() or out.is_neg():  # an imaginary part may be negated on reading only
        return 0
    address: int = out.data_ptr()
    return 0 if address & 3 else address


def _torch_target(out: Any, place: str, stream: Any) -> _Target:
    if out.requires_grad:
        raise ArrayError(f"{place}: a tensor that requires grad came, one that does not is wanted")
    if not out.is_cuda:
        raise _in_host_memory(out, place)
    contiguous = out.is_contiguous() and not out.is_neg()
    memory = (out.data_ptr(), tuple(out.shape), out.stride(), _dtype_name(out.dtype), out.element_size(), out.get_device())
    return _Target(*memory, contiguous, False, functools.partial(_torch_temporary, out, stream), out)


def _torch_temporary(out: Any, stream: Any, shape: tuple[int, ...]) -> tuple[int, Finish, object]:
    order = functools.partial(_torch_order, out.get_device(), stream)
    with order():
        whole = sys.modules["torch"].empty(out.shape, dtype=out.dtype, device=out.device)
        if tuple(out.shape) != shape:  # a larger array keeps its tail
            whole.copy_(out)

    def finish() -> None:
        with order():
            out.copy_(whole)

    return whole.data_ptr(), finish, whole


def _cupy_target(out: Any, place: str, stream: Any) -> _Target:
    memory = (out.data.ptr, out.shape, out.strides, _dtype_name(out.dtype), out.itemsize, out.data.device_id)
    temporary = functools.partial(_cupy_temporary, sys.modules["cupy"], out, stream, out.data.device_id)
    return _Target(*memory, out.flags.c_contiguous, False, temporary, out)


def _cupy_temporary(cupy: Any, out: Any, stream: Any, device: int, shape: tuple[int, ...]) -> tuple[int, Finish, object]:
    order = functools.partial(_cupy_order, cupy, device, stream)
    with order():  # a larger array keeps its tail
        whole = cupy.empty(shape, out.dtype) if out.shape == shape else cupy.ascontiguousarray(out)

    def finish() -> None:
        with order():
            out[...] = whole

    return whole.data.ptr, finish, whole


def _foreign_target(out: Any, place: str, stream: Any) -> _Target:
    memory, origin, keep = _described(out, place, ArrayError, stream)

    def temporary(shape: tuple[int, ...]) -> tuple[int, Finish, object]:
        cupy = _cupy(place)
        view = _cupy_view(cupy, memory, f"uint{8 * memory.itemsize}", keep)  # bits: NumPy has no bfloat16
        return _cupy_temporary(cupy, view, origin if stream is None else stream, memory.device, shape)

    seen = (memory.address, memory.shape, memory.strides, memory.dtype, memory.itemsize, memory.device)
    return _Target(*seen, _is_contiguous(memory), memory.read_only, temporary, keep)


def _private_target(out: Any, place: str, stream: Any) -> _Target:
    framework = type(out).__module__.partition(".")[0]
    raise ArrayError(f"{place}: {framework} arrays cannot be written; leave out= away and take the answer")


_TARGETS = {"torch": _torch_target, "cupy": _cupy_target, "private": _private_target}


def _nothing_to_do() -> None:
    """``finish`` of an output that was written in place."""


def _not_writable(out: Any, place: str, problem: Exception) -> ArrayError:
    what = f"{type(out).__name__} cannot be written from here"
    return ArrayError(f"{place}: {what}: {type(problem).__name__}: {_line(problem)}")


# ---- arrays of unknown frameworks ----------------------------------------------------------------------------------------


def _described(array: Any, place: str, error: type[HpsError], stream: Any) -> tuple[DeviceMemory, int, object]:
    """The memory of an array of no framework known here, its stream, and what keeps the memory alive."""
    if is_capsule(array):
        memory = cuda_memory_of(array, place=place, error=error)
        return memory, _ambient_stream(memory.device), array
    if _family(type(array)) == "private":
        framework = type(array).__module__.partition(".")[0]
        raise DeviceError(f"{place}: {framework} arrays cannot be served in CUDA memory, only by copies through the host")
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is not None:
        return _memory_of_interface(array, interface, place, error), int(interface.get("stream") or 0), array
    device = cuda_device_of(array)
    if device is None:
        raise _in_host_memory(array, place)
    # the producer makes this stream wait for its own; DLPack has no 0
    ordered = stream_handle(stream, ArrayKind("cuda", CudaOrigin(device, 0)), device) or _LEGACY_STREAM
    capsule = capsule_of(array, stream=ordered)
    return cuda_memory_of(capsule, place=place, error=error), 0, capsule


def _memory_of_interface(array: Any, interface: dict[str, Any], place: str, error: type[HpsError]) -> DeviceMemory:
    if interface.get("mask") is not None:
        raise error(f"{place}: a masked array came, one without a mask is wanted")
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
    except Exception:  # foreign code may raise anything; interop meets it again, and says so
        return None


def _device_of_address(address: int) -> int:
    """The CUDA ordinal of the memory at ``address``, by the driver; for 0 (an empty array) the current device."""
    if address:
        return device_of_address(address)
    status, device = importlib.import_module("cuda.bindings.driver").cuCtxGetDevice()
    return 0 if int(status) else int(device)


def _is_contiguous(memory: DeviceMemory) -> bool:
    if memory.strides is None or 0 in memory.shape:
        return True
    step = memory.itemsize
    for size, stride in zip(reversed(memory.shape), reversed(memory.strides)):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _cupy(place: str) -> Any:
    try:
        return importlib.import_module("cupy")
    except Exception as problem:  # its own imports fail in many ways where CUDA is half there
        reason = f"{type(problem).__name__}: {_line(problem)}"
        raise DeviceError(
            f"{place}: an array of an unknown framework needs CuPy here, which does not import: {reason}"
        ) from problem


def _cupy_view(cupy: Any, memory: DeviceMemory, dtype: str, keep: object) -> Any:
    """The memory as a CuPy array. Not by ``cupy.asarray``: that waits for the stream of the array."""
    strides = memory.strides or _c_strides(memory)
    span = memory.itemsize + sum(abs(stride) * (size - 1) for stride, size in zip(strides, memory.shape))
    chunk = cupy.cuda.UnownedMemory(memory.address, span, keep, memory.device)
    return cupy.ndarray(memory.shape, dtype, cupy.cuda.MemoryPointer(chunk, 0), strides)


def _c_strides(memory: DeviceMemory) -> tuple[int, ...]:
    return tuple(memory.itemsize * math.prod(memory.shape[axis + 1 :]) for axis in range(len(memory.shape)))


# ---- frameworks ----------------------------------------------------------------------------------------------------------


def _family_of(kind: type) -> str:
    """What an array of this class is: ``torch``, ``cupy``, ``private`` (TensorFlow, JAX), ``host``, or ``foreign``."""
    if kind in _HOST_TYPES:
        return "host"
    for package, name in (("torch", "Tensor"), ("cupy", "ndarray")):
        base = getattr(sys.modules.get(package), name, None)
        if isinstance(base, type) and issubclass(kind, base):
            return package
    packages = {base.__module__.partition(".")[0] for base in kind.__mro__}
    return "foreign" if packages.isdisjoint({"tensorflow", "jax", "jaxlib"}) else "private"


_family: Callable[[type], str] = functools.lru_cache(maxsize=256)(_family_of)


@functools.lru_cache(maxsize=64)
def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=64)
def _torch_kind(torch: Any, device: int) -> ArrayKind:
    return ArrayKind("torch", torch.device("cuda", device))


@functools.lru_cache(maxsize=64)
def _cupy_kind(cupy: Any, device: int) -> ArrayKind:
    return ArrayKind("cupy", cupy.cuda.Device(device))


def _device_name(kind: ArrayKind) -> str:
    return f"cuda:{kind.device.device}" if kind.framework == "cuda" else str(kind.device)


def _in_host_memory(array: Any, place: str) -> DeviceError:
    return DeviceError(f"{place}: {type(array).__name__} in host memory came, an array in CUDA memory is wanted")


def _line(text: object) -> str:
    """Foreign text as one line of bearable length."""
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else f"{line[:200]}..."
