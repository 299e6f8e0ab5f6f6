"""The CUDA driver as this package sees it: devices, contexts, streams, events, copies, device memory, pinned memory.

Addresses and the handles of streams and events are plain ints, so that those of any framework fit. Everything goes through
``cuda.bindings.driver``, which is looked for when a device is first asked for: without it, without a driver and without a
device this module imports as well, ``device_count`` is 0 and everything else raises ``DeviceError``.

*Contexts.* Each device's primary context is used, as Torch and CuPy do, so memory and streams are shared with them. It is
retained once a process and device and never released: somebody's kernel may run to the very end.

*Graph capture.* While one thread captures in the global mode, a call of any thread that might wait (an allocation, a
registration, a look at an event) breaks that capture. Such calls are made in the relaxed mode here: see ``relaxed_capture``.

*Forks.* CUDA does not outlive a fork. In a child of a process that used it there is no device (one WARNING), and what is
freed or destroyed there is left alone: it is the parent's.

**Threads:** every function, from any thread. Handles of streams and events belong to the device on which they were made;
work on them under ``current`` of that device. Streams 0, 1 and 2 are the default streams of the current device.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from hps_numba.errors import ArrayError, CapacityError, DeviceError, HpsError
from hps_numba.runtime.fork import register_fork_reset

__all__ = [
    "CupyDeviceAllocator",
    "DeviceAllocator",
    "DeviceInfo",
    "DeviceRegion",
    "DriverDeviceAllocator",
    "allocate",
    "check_device",
    "context_of",
    "copy",
    "current",
    "destroy_event",
    "destroy_stream",
    "device_count",
    "device_info",
    "device_of_address",
    "driver_addresses",
    "driver_library",
    "event_done",
    "fill",
    "free_bytes",
    "is_capturing",
    "new_event",
    "new_stream",
    "record",
    "register",
    "relaxed_capture",
    "synchronize",
    "to_device",
    "to_host",
    "unregister",
    "wait",
    "why_no_device",
]

logger = logging.getLogger(__name__)

# values of CUresult, the same in every version
_OUT_OF_MEMORY, _NOT_INITIALIZED, _NO_DEVICE, _NOT_READY = 2, 3, 100, 600
_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_NO_DEVICES_IN_CHILD = "a child forked from a process that used CUDA serves from the CPU"


# -- what this process has ------------------------------------------------------------------------------------------------


def _load_driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


class _UnaskedDriver:
    """Stands for the driver until somebody needs it, and for good where it cannot be used."""

    def __init__(self, cuda: _Cuda) -> None:
        self._cuda = cuda

    def __getattr__(self, name: str) -> Any:
        if self._cuda.ask() == 0:
            raise DeviceError(f"no CUDA device can be used: {self._cuda.why}")
        return getattr(self._cuda.driver, name)


class _Cuda:
    """What is known of CUDA in this process: asked once, and again in a forked child."""

    def __init__(self, load: Callable[[], Any] = _load_driver) -> None:
        self._load = load
        self.count: int | None = None
        self.why = ""
        self.is_the_parents = False  # this is a child of a process that used CUDA
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Forget the driver, as a forked child has to."""
        self.lock = threading.RLock()
        self.driver: Any = _UnaskedDriver(self)
        self.contexts: dict[int, int] = {}
        if self.count:
            self.is_the_parents, self.count = True, None

    def ask(self) -> int:
        """Number of usable devices; 0 leaves a line in ``why``."""
        if self.count is None:
            with self.lock:
                if self.count is None:
                    count, self.why = self._look()
                    self.count = count
        return self.count

    def _look(self) -> tuple[int, str]:
        if self.is_the_parents:
            return self._in_child()
        try:
            driver = self._load()
        except Exception as problem:  # ImportError; a damaged installation raises what it likes
            return 0, f"the CUDA packages cannot be imported (pip install 'hps-numba[cuda13]'): {_first_line(problem)}"
        try:
            return self._initialise(driver)
        except Exception as problem:  # the bindings raise RuntimeErrors of several makes if there is no driver library
            return 0, f"no CUDA driver: {_first_line(problem)}"

    def _initialise(self, driver: Any) -> tuple[int, str]:
        status = driver.cuInit(0)[0]
        if status == _NOT_INITIALIZED:  # how the driver says that another library used it before the fork
            return self._in_child()
        if status and status != _NO_DEVICE:
            return 0, str(_failure("cuInit", status, driver))
        has, wants = driver.cuDriverGetVersion()[1] // 1000, driver.CUDA_VERSION // 1000
        if has < wants:
            return 0, f"the driver is of CUDA {has}, the packages of CUDA {wants}: update it or take hps-numba[cuda12]"
        count = 0 if status else int(driver.cuDeviceGetCount()[1])
        if count == 0:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            return 0, "the driver shows no device" + ("" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})")
        self.driver = driver
        return count, ""

    def _in_child(self) -> tuple[int, str]:
        self.is_the_parents = True
        logger.warning(_NO_DEVICES_IN_CHILD)
        return 0, _NO_DEVICES_IN_CHILD

    def retain(self, ordinal: int) -> int:
        """Handle of the primary context of a device."""
        check_device(ordinal)
        with self.lock, relaxed_capture():
            if ordinal not in self.contexts:
                status, device = self.driver.cuDeviceGet(ordinal)
                _check("cuDeviceGet", status)
                status, context = self.driver.cuDevicePrimaryCtxRetain(device)
                _check(f"cuDevicePrimaryCtxRetain of device {ordinal}", status)
                self.contexts[ordinal] = int(context)
            return self.contexts[ordinal]


_cuda = _Cuda()


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).splitlines()), type(problem).__name__)


def _failure(call: str, status: Any, driver: Any = None) -> HpsError:
    """The error for a status that is not success."""
    driver = driver if driver is not None else _cuda.driver
    texts = (driver.cuGetErrorName(status)[1], driver.cuGetErrorString(status)[1])
    name, text = (text.decode() if isinstance(text, bytes) else f"status {int(status)}" for text in texts)
    return (CapacityError if status == _OUT_OF_MEMORY else DeviceError)(f"{call}: {name}: {text}")


def _check(call: str, status: Any) -> None:
    if status:
        raise _failure(call, status)


def device_count() -> int:
    """Number of CUDA devices that can be used; 0 without packages, driver or devices. Asked once a process."""
    return _cuda.ask()


def why_no_device() -> str:
    """One line that says why ``device_count`` is 0; empty if it is not."""
    _cuda.ask()
    return _cuda.why


def driver_library() -> ctypes.CDLL:
    """The driver's own library, for calls that ``cuda.bindings`` would make slower or may not be there for.

    Raises:
        OSError: there is none.
    """
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def driver_addresses(names: Sequence[str]) -> np.ndarray:
    """Addresses of functions of the driver, int64, for calls out of compiled code.

    Raises:
        DeviceError: the driver has no such function.
    """
    library = driver_library()
    try:
        functions = [getattr(library, name) for name in names]
    except AttributeError as problem:
        raise DeviceError(f"the CUDA driver is too old: {problem}") from problem
    return np.array([ctypes.cast(function, ctypes.c_void_p).value for function in functions], np.int64)


def device_of_address(address: int) -> int:
    """Number of the device whose memory is at an address.

    Asked of the library itself: by ``cuda.bindings``, up to 13.5 at least, the answer is 0 for every device
    (NVIDIA/cuda-python, issue 2928).

    Raises:
        DeviceError: the driver knows no such memory, or there is none.
    """
    device = ctypes.c_int(-1)
    try:
        ask = driver_library().cuPointerGetAttribute
    except (OSError, AttributeError) as problem:
        raise DeviceError(f"no CUDA driver knows the memory at address {address:#x}: {_first_line(problem)}") from problem
    status = ask(ctypes.byref(device), ctypes.c_int(_DEVICE_ORDINAL), ctypes.c_uint64(address))
    if status:
        raise DeviceError(f"the driver knows no memory at address {address:#x}: {status}")
    return device.value


def context_of(ordinal: int) -> int:
    """Handle of the device's primary context.

    Raises:
        DeviceError: no such device.
    """
    return _cuda.contexts.get(ordinal) or _cuda.retain(ordinal)


def check_device(ordinal: int) -> None:
    """Raise ``DeviceError`` unless the device is there."""
    count = device_count()
    if not 0 <= ordinal < count:
        there = f"devices 0 to {count - 1} are there" if count > 1 else "only device 0 is there"
        raise DeviceError(f"device {ordinal} is wanted, " + (there if count else f"there is none: {why_no_device()}"))


@dataclass(frozen=True)
class DeviceInfo:
    """A device: number, name, compute capability, multiprocessors, bytes of memory."""

    ordinal: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    total_bytes: int


def device_info(ordinal: int) -> DeviceInfo:
    """What the driver says of a device; makes no context.

    Raises:
        DeviceError: no such device.
    """
    check_device(ordinal)
    driver = _cuda.driver
    attributes = driver.CUdevice_attribute

    def ask(call: str, *arguments: Any) -> Any:
        status, answer = getattr(driver, call)(*arguments)
        _check(call, status)
        return answer

    device = ask("cuDeviceGet", ordinal)
    wanted = ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MULTIPROCESSOR_COUNT")
    numbers = (getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}") for name in wanted)
    major, minor, multiprocessors = (int(ask("cuDeviceGetAttribute", number, device)) for number in numbers)
    name = ask("cuDeviceGetName", 256, device).split(b"\0")[0].decode(errors="replace")
    return DeviceInfo(ordinal, name, (major, minor), multiprocessors, int(ask("cuDeviceTotalMem", device)))


def free_bytes(ordinal: int) -> int:
    """Bytes of device memory that nobody has taken."""
    with current(ordinal), relaxed_capture():
        status, free, _ = _cuda.driver.cuMemGetInfo()
        _check("cuMemGetInfo", status)
        return int(free)


# -- contexts and capture -------------------------------------------------------------------------------------------------


_NOTHING = nullcontext()


class _ContextSwitch:
    __slots__ = ("_previous", "_wanted")

    def __init__(self, wanted: int, previous: int) -> None:
        self._wanted, self._previous = wanted, previous

    def __enter__(self) -> None:
        _check("cuCtxSetCurrent", _cuda.driver.cuCtxSetCurrent(self._wanted)[0])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _check("cuCtxSetCurrent", _cuda.driver.cuCtxSetCurrent(self._previous)[0])


def current(ordinal: int) -> AbstractContextManager[None]:
    """Make the device current in this thread for the ``with`` block that this call stands in, then the one before again.

    Raises:
        DeviceError: no such device.
    """
    wanted = context_of(ordinal)
    status, previous = _cuda.driver.cuCtxGetCurrent()
    if status:
        raise _failure("cuCtxGetCurrent", status)
    before = int(previous)
    return _NOTHING if before == wanted else _ContextSwitch(wanted, before)


def _any_context() -> AbstractContextManager[None]:
    """A context for calls that concern all devices: the one that is there longest, so that none is made for this alone."""
    return current(next(iter(tuple(_cuda.contexts)), 0))


class _RelaxedCapture:
    __slots__ = ("_previous",)

    def __enter__(self) -> None:
        driver = _cuda.driver
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        status, self._previous = driver.cuThreadExchangeStreamCaptureMode(relaxed)
        _check("cuThreadExchangeStreamCaptureMode", status)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = _cuda.driver.cuThreadExchangeStreamCaptureMode(self._previous)[0]
        _check("cuThreadExchangeStreamCaptureMode", status)


def relaxed_capture() -> AbstractContextManager[None]:
    """Let this thread make calls that would break a capture of another thread, or its own, in the global mode."""
    return _RelaxedCapture()


def is_capturing(stream: int) -> bool:
    """Work on this stream is being captured into a graph. One call of the driver.

    Raises:
        DeviceError: the default stream, while a stream is captured that waits for it; bad handle.
    """
    status, state = _cuda.driver.cuStreamIsCapturing(stream)
    if status:
        raise _failure("cuStreamIsCapturing", status)
    return bool(state)


# -- streams and events ---------------------------------------------------------------------------------------------------


def new_stream(ordinal: int) -> int:
    """A stream of the device that does not wait for the default stream."""
    with current(ordinal), relaxed_capture():
        driver = _cuda.driver
        status, stream = driver.cuStreamCreate(int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        _check("cuStreamCreate", status)
        return int(stream)


def destroy_stream(stream: int) -> None:
    """Give a stream back; work that is on it still runs to its end."""
    _give_back("cuStreamDestroy", stream)


def synchronize(stream: int) -> None:
    """Wait until all work on the stream is done; the GIL is released. Not while the stream is being captured."""
    with relaxed_capture():
        _check("cuStreamSynchronize", _cuda.driver.cuStreamSynchronize(stream)[0])


def new_event(ordinal: int | None = None) -> int:
    """An event that takes no time stamps, on a device (default: the current one)."""
    with _NOTHING if ordinal is None else current(ordinal), relaxed_capture():
        driver = _cuda.driver
        status, event = driver.cuEventCreate(int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        _check("cuEventCreate", status)
        return int(event)


def record(event: int, stream: int) -> None:
    """Let the event stand for all work that is on the stream now. Both are of one device. One call of the driver."""
    if status := _cuda.driver.cuEventRecord(event, stream)[0]:
        raise _failure("cuEventRecord", status)


def wait(stream: int, event: int) -> None:
    """Let later work on the stream wait for the event, on the device; they may be of two. One call of the driver."""
    if status := _cuda.driver.cuStreamWaitEvent(stream, event, 0)[0]:
        raise _failure("cuStreamWaitEvent", status)


def event_done(event: int) -> bool:
    """The work that the event stands for is done, or it was never recorded. Harms no capture; does not wait."""
    with relaxed_capture():
        status = _cuda.driver.cuEventQuery(event)[0]
        if status and status != _NOT_READY:
            raise _failure("cuEventQuery", status)
        return not status


def wait_for(event: int) -> None:
    """Wait until the work that the event stands for is done, if it was ever recorded; the GIL is released."""
    with relaxed_capture():
        _check("cuEventSynchronize", _cuda.driver.cuEventSynchronize(event)[0])


def destroy_event(event: int) -> None:
    """Give an event back; those who wait for it still do."""
    _give_back("cuEventDestroy", event)


def _give_back(call: str, handle: int) -> None:
    """Undo what this process made; in a forked child that is the parent's, and stays."""
    if not _cuda.is_the_parents:
        with relaxed_capture():
            _check(call, getattr(_cuda.driver, call)(handle)[0])


# -- copies ---------------------------------------------------------------------------------------------------------------


def to_device(address: int, array: np.ndarray, stream: int) -> None:
    """Copy an array to device memory, behind the work on the stream. When this returns the array may be changed.

    It waits for the stream, which must not be captured, whatever memory the array is in: on some hosts the driver reads
    pageable memory late, too. To copy from pinned memory without a wait use ``copy``.
    """
    array = np.ascontiguousarray(array)
    _copy_now("cuMemcpyHtoDAsync", address, array.__array_interface__["data"][0], array.nbytes, stream)


def to_host(array: np.ndarray, address: int, stream: int) -> None:
    """Fill an array from device memory, behind the work on the stream. When this returns the array is filled.

    Raises:
        ArrayError: the array is not contiguous, or cannot be written.
    """
    if not (array.flags.c_contiguous and array.flags.writeable):
        raise ArrayError(f"to_host: an array of {array.dtype}{list(array.shape)} that is contiguous and writeable is wanted")
    _copy_now("cuMemcpyDtoHAsync", array.__array_interface__["data"][0], address, array.nbytes, stream)


def _copy_now(call: str, dst: int, src: int, size: int, stream: int) -> None:
    if size:
        with relaxed_capture():
            _check(call, getattr(_cuda.driver, call)(dst, src, size, stream)[0])
            _check("cuStreamSynchronize", _cuda.driver.cuStreamSynchronize(stream)[0])


def fill(address: int, byte: int, size: int, stream: int) -> None:
    """Set ``size`` bytes of device memory to ``byte``, in stream order."""
    if size:
        _check("cuMemsetD8Async", _cuda.driver.cuMemsetD8Async(address, byte, size, stream)[0])


def copy(dst: int, src: int, size: int, stream: int) -> None:
    """Copy ``size`` bytes in stream order; both addresses are of device memory (of any device) or of pinned memory."""
    if size:
        _check("cuMemcpyAsync", _cuda.driver.cuMemcpyAsync(dst, src, size, stream)[0])


# -- device memory --------------------------------------------------------------------------------------------------------


class DeviceRegion:
    """``size`` bytes of memory of one device at ``address`` (0 if there are none, or after ``release``).

    **Threads:** ``release`` by one thread at a time, and when no stream uses the memory any more.
    """

    def __init__(self, address: int, size: int, ordinal: int, free: Callable[[], object] | None) -> None:
        self.address = address
        self.size = size
        self.ordinal = ordinal
        self._free = free

    def release(self) -> None:
        """Give the memory back; again does nothing."""
        free, self._free, self.address = self._free, None, 0
        if free is not None and not _cuda.is_the_parents:
            free()

    def __del__(self, ends: Callable[[], bool] = sys.is_finalizing) -> None:
        if self._free is None or ends():  # with the process the memory goes too
            return
        try:
            self.release()
        except HpsError as problem:  # nobody is there to take it
            logger.warning("device memory was not given back: %s", problem)


class DeviceAllocator(Protocol):
    """Hands out device memory; injected, so that a framework's pool can be shared."""

    def allocate(self, ordinal: int, size: int, purpose: str) -> DeviceRegion:
        """``size`` bytes of a device, aligned to 256; ``CapacityError`` if it has not got them."""


class DriverDeviceAllocator:
    """Memory straight from the driver.   **Threads:** all methods."""

    def allocate(self, ordinal: int, size: int, purpose: str) -> DeviceRegion:
        """``size`` bytes of a device, not cleared.

        Raises:
            DeviceError: no such device.
            CapacityError: it has not got them.
        """
        with current(ordinal), relaxed_capture():
            if size == 0:
                return DeviceRegion(0, 0, ordinal, None)
            status, pointer = _cuda.driver.cuMemAlloc(size)
            if status == _OUT_OF_MEMORY:
                raise _does_not_fit(ordinal, size, purpose)
            _check(f"{purpose}: cuMemAlloc", status)
            address = int(pointer)
            return DeviceRegion(address, size, ordinal, partial(_free_memory, ordinal, address))


def _free_memory(ordinal: int, address: int) -> None:
    with current(ordinal):
        _give_back("cuMemFree", address)


class CupyDeviceAllocator:
    """Memory from CuPy's current allocator, usually its pool.   **Threads:** all methods.

    The pool may hand released memory to CuPy's current stream at once, so release when every stream is done with it.
    """

    def allocate(self, ordinal: int, size: int, purpose: str) -> DeviceRegion:
        """As ``DriverDeviceAllocator.allocate``; also raises ``DeviceError`` if CuPy is not installed."""
        check_device(ordinal)
        try:
            cupy = importlib.import_module("cupy")
        except ImportError as problem:
            raise DeviceError(f"{purpose}: memory from CuPy is wanted, and it cannot be imported: {problem}") from problem
        with relaxed_capture(), cupy.cuda.Device(ordinal):
            try:
                held = [cupy.cuda.alloc(size)]
            except cupy.cuda.memory.OutOfMemoryError as problem:
                raise _does_not_fit(ordinal, size, purpose) from problem
        return DeviceRegion(int(held[0].ptr), size, ordinal, held.clear)


def _does_not_fit(ordinal: int, size: int, purpose: str) -> CapacityError:
    return CapacityError(f"{purpose}: {_mib(size)} of device {ordinal} wanted, {_mib(free_bytes(ordinal))} are free")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def allocate(ordinal: int, size: int, purpose: str) -> DeviceRegion:
    """``size`` bytes of a device straight from the driver, not cleared: see ``DriverDeviceAllocator``."""
    return DriverDeviceAllocator().allocate(ordinal, size, purpose)


# -- pinned memory --------------------------------------------------------------------------------------------------------


def register(address: int, size: int) -> None:
    """Pin host memory, so that kernels of every device may read and write it at the same address.

    Start and end should be at page boundaries. A range is registered once, and must stay mapped until ``unregister``.

    Raises:
        DeviceError: there is no device, or it sees the memory at another address.
        CapacityError: the driver refuses (with its text): too little memory, a limit, a system that cannot pin.
    """
    if size == 0:
        return
    with _any_context(), relaxed_capture():
        driver = _cuda.driver
        flags = int(driver.CU_MEMHOSTREGISTER_PORTABLE) | int(driver.CU_MEMHOSTREGISTER_DEVICEMAP)
        if status := driver.cuMemHostRegister(address, size, flags)[0]:
            raise CapacityError(str(_failure(f"{_mib(size)} at {address:#x}: cuMemHostRegister", status)))
        status, pointer = driver.cuMemHostGetDevicePointer(address, 0)
        if status or int(pointer) != address:
            driver.cuMemHostUnregister(address)
            _check("cuMemHostGetDevicePointer", status)
            raise DeviceError(f"host memory at {address:#x} is at {int(pointer):#x} for the device, one address is wanted")


def unregister(address: int) -> None:
    """Undo the ``register`` that began at ``address``, when no stream uses the memory any more.

    Raises:
        DeviceError: nothing was registered there.
    """
    if not _cuda.is_the_parents:
        with _any_context():
            _give_back("cuMemHostUnregister", address)
