"""The CUDA driver as this package sees it: devices, contexts and capture modes; ``streams`` and ``memory`` build on it.

Addresses and the handles of streams and events are plain ints, so that those of any framework fit. Everything goes through
``cuda.bindings.driver``, which is looked for when a device is first needed: without it, without a driver and without a device
this module imports as well, ``device_count`` is 0 and everything else raises ``DeviceError``.

*Contexts.* Each device's primary context is used, as Torch and CuPy do, so that memory and streams are shared with them. It is
retained once a process and device and never released: a kernel may be running until the very end.

*Graph capture.* While one thread captures in the global mode, a call of any thread that might wait (an allocation, a
registration, an event query) breaks that capture. Such calls are made in the relaxed mode here: see ``relaxed_capture``.

*Forks.* CUDA does not survive a fork. In a child of a process that used it there is no device (one WARNING), and what is
freed or destroyed there is left alone: it is the parent's.

Thread safety: every function of this package may be called from any thread. Handles of streams and events belong to the device
on which they were made; work on them under ``current`` of that device. Streams 0, 1 and 2 are the default streams of the
current device.
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
from types import TracebackType
from typing import Any

import numpy as np

from hps_numba.errors import CapacityError, DeviceError, HpsError
from hps_numba.runtime.fork import register_fork_reset

__all__ = [
    "OUT_OF_MEMORY",
    "DeviceInfo",
    "any_context",
    "check",
    "check_device",
    "context_of",
    "cuda",
    "current",
    "device_count",
    "device_info",
    "device_of_address",
    "driver_addresses",
    "driver_library",
    "failure",
    "relaxed_capture",
    "release",
    "why_no_device",
]

logger = logging.getLogger(__name__)

# values of CUresult, the same in every version
OUT_OF_MEMORY, _NOT_INITIALIZED, _NO_DEVICE = 2, 3, 100
_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_NO_DEVICES_IN_CHILD = "a child forked from a process that used CUDA serves from the CPU"


# -- what this process has ------------------------------------------------------------------------------------------------


def _load_driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


class _UnaskedDriver:
    """Takes the place of the driver until it is first needed, and for good where it cannot be used."""

    def __init__(self, cuda: Cuda) -> None:
        self._of = cuda

    def __getattr__(self, name: str) -> Any:
        if self._of.ask() == 0:
            raise DeviceError(f"no CUDA device can be used: {self._of.why}")
        return getattr(self._of.driver, name)


class Cuda:
    """What is known of CUDA in this process: determined once, and again in a forked child.

    Attributes:
        driver: ``cuda.bindings.driver``.
        contexts: handles of the primary contexts that were retained, by device.
        is_the_parents: this is a child of a process that used CUDA.
    """

    def __init__(self, load: Callable[[], Any] = _load_driver) -> None:
        self._load = load
        self.count: int | None = None
        self.why = ""
        self.is_the_parents = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Forget the driver, as a forked child must."""
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
            return 0, _no_driver(problem)

    def _initialise(self, driver: Any) -> tuple[int, str]:
        status = driver.cuInit(0)[0]
        if status == _NOT_INITIALIZED:  # the driver was used by another library before the fork
            return self._in_child()
        if status and status != _NO_DEVICE:
            return 0, str(failure("cuInit", status, driver))
        has, wants = driver.cuDriverGetVersion()[1] // 1000, driver.CUDA_VERSION // 1000
        if has < wants:
            return 0, f"the driver is of CUDA {has}, the packages of CUDA {wants}: update it or install hps-numba[cuda12]"
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
                check("cuDeviceGet", status)
                status, context = self.driver.cuDevicePrimaryCtxRetain(device)
                check(f"cuDevicePrimaryCtxRetain of device {ordinal}", status)
                self.contexts[ordinal] = int(context)
            return self.contexts[ordinal]


#: the CUDA of this process
cuda = Cuda()


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).splitlines()), type(problem).__name__).rstrip(".")


def _no_driver(problem: Exception) -> str:
    """Part of a sentence; what the bindings say of a missing library is several of their own."""
    if any(kind.__name__.startswith("DynamicLib") for kind in type(problem).__mro__):
        return "no CUDA driver is installed"
    return f"no CUDA driver: {_first_line(problem)}"


def failure(call: str, status: Any, driver: Any = None) -> HpsError:
    """The error for a status that is not success."""
    driver = driver if driver is not None else cuda.driver
    texts = (driver.cuGetErrorName(status)[1], driver.cuGetErrorString(status)[1])
    name, text = (text.decode() if isinstance(text, bytes) else f"status {int(status)}" for text in texts)
    return (CapacityError if status == OUT_OF_MEMORY else DeviceError)(f"{call}: {name}: {text}")


def check(call: str, status: Any) -> None:
    """Raise the ``failure`` of a status, unless it is success."""
    if status:
        raise failure(call, status)


def device_count() -> int:
    """Number of usable CUDA devices; 0 without packages, driver or devices. Determined once a process."""
    return cuda.ask()


def why_no_device() -> str:
    """One line that says why ``device_count`` is 0; empty if it is not."""
    cuda.ask()
    return cuda.why


def driver_library() -> ctypes.CDLL:
    """The driver's own library, for calls that ``cuda.bindings`` makes slower or may lack.

    Raises:
        OSError: it is not installed.
    """
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def driver_addresses(names: Sequence[str]) -> np.ndarray:
    """Addresses of functions of the driver, int64, for calls from compiled code.

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

    Asks the library itself: ``cuda.bindings``, up to 13.5 at least, answers 0 for every device (NVIDIA/cuda-python,
    issue 2928).

    Raises:
        DeviceError: the driver does not know the memory, or there is no driver.
    """
    device = ctypes.c_int(-1)
    try:
        ask = driver_library().cuPointerGetAttribute
    except (OSError, AttributeError) as problem:
        raise DeviceError(f"no CUDA driver knows the memory at address {address:#x}: {_first_line(problem)}") from problem
    status = ask(ctypes.byref(device), ctypes.c_int(_DEVICE_ORDINAL), ctypes.c_uint64(address))
    if status:
        raise DeviceError(f"the driver does not know the memory at address {address:#x}: {status}")
    return device.value


def context_of(ordinal: int) -> int:
    """Handle of the device's primary context.

    Raises:
        DeviceError: no such device.
    """
    return cuda.contexts.get(ordinal) or cuda.retain(ordinal)


def check_device(ordinal: int) -> None:
    """Raise ``DeviceError`` unless the device exists."""
    count = device_count()
    if not 0 <= ordinal < count:
        if not count:
            raise DeviceError(f"device {ordinal}: expected a CUDA device, got none: {why_no_device()}")
        expected = f"expected 0 to {count - 1}" if count > 1 else "expected 0, the only device"
        raise DeviceError(f"device: {expected}, got {ordinal}")


@dataclass(frozen=True)
class DeviceInfo:
    """A device: number, name, compute capability, multiprocessors, bytes of memory."""

    ordinal: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    total_bytes: int


def device_info(ordinal: int) -> DeviceInfo:
    """What the driver reports about a device; makes no context.

    Raises:
        DeviceError: no such device.
    """
    check_device(ordinal)
    driver = cuda.driver
    attributes = driver.CUdevice_attribute

    def ask(call: str, *arguments: Any) -> Any:
        status, answer = getattr(driver, call)(*arguments)
        check(call, status)
        return answer

    device = ask("cuDeviceGet", ordinal)
    names = ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MULTIPROCESSOR_COUNT")
    numbers = (getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}") for name in names)
    major, minor, multiprocessors = (int(ask("cuDeviceGetAttribute", number, device)) for number in numbers)
    name = ask("cuDeviceGetName", 256, device).split(b"\0")[0].decode(errors="replace")
    return DeviceInfo(ordinal, name, (major, minor), multiprocessors, int(ask("cuDeviceTotalMem", device)))


# -- contexts and capture -------------------------------------------------------------------------------------------------


_NOTHING = nullcontext()


class _ContextSwitch:
    __slots__ = ("_context", "_previous")

    def __init__(self, context: int, previous: int) -> None:
        self._context, self._previous = context, previous

    def __enter__(self) -> None:
        check("cuCtxSetCurrent", cuda.driver.cuCtxSetCurrent(self._context)[0])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        check("cuCtxSetCurrent", cuda.driver.cuCtxSetCurrent(self._previous)[0])


def current(ordinal: int) -> AbstractContextManager[None]:
    """Make the device current in this thread for the ``with`` block of this call, then the previous one again.

    Raises:
        DeviceError: no such device.
    """
    context = context_of(ordinal)
    status, previous = cuda.driver.cuCtxGetCurrent()
    if status:
        raise failure("cuCtxGetCurrent", status)
    before = int(previous)
    return _NOTHING if before == context else _ContextSwitch(context, before)


def any_context() -> AbstractContextManager[None]:
    """A context for calls that concern all devices: the oldest one, so that none is made just for this."""
    return current(next(iter(tuple(cuda.contexts)), 0))


class _RelaxedCapture:
    __slots__ = ("_previous",)

    def __enter__(self) -> None:
        driver = cuda.driver
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        status, self._previous = driver.cuThreadExchangeStreamCaptureMode(relaxed)
        check("cuThreadExchangeStreamCaptureMode", status)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = cuda.driver.cuThreadExchangeStreamCaptureMode(self._previous)[0]
        check("cuThreadExchangeStreamCaptureMode", status)


def relaxed_capture() -> AbstractContextManager[None]:
    """Let this thread make calls that would break a capture of another thread, or its own, in the global mode."""
    return _RelaxedCapture()


def release(call: str, handle: int) -> None:
    """Free or destroy what this process made, by the call of this name; in a forked child it is the parent's, and stays."""
    if not cuda.is_the_parents:
        with relaxed_capture():
            check(call, getattr(cuda.driver, call)(handle)[0])
