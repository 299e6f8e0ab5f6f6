"""A played CUDA driver: PlayedDriver, and play, which puts one in place of the driver."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest

from hps_numba.device.driver import cuda

MIB = 1 << 20


class Mode(IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


class PlayedDriver:
    """Plays ``cuda.bindings.driver``: every call is recorded, "device" memory is memory of this process."""

    CUDA_VERSION = 13050
    CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP = 1, 2
    CUstreamCaptureMode = Mode
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="9",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="0",
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="132",
    )

    def __init__(self, count: int = 2, **failing: int) -> None:
        self.count = count
        self.failing = failing
        self.calls: list[tuple[Any, ...]] = []
        self.on_thread = threading.local()
        self.memory: dict[int, Any] = {}

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] in names]

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if status := self.failing.get(name, 0):
                return (status, None, None) if name == "cuMemGetInfo" else (status, None)
            return (0, *getattr(self, f"_{name}", lambda *_: ())(*arguments))

        return call

    def cuGetErrorName(self, status: int) -> tuple[int, bytes]:
        return 0, f"CUDA_ERROR_{status}".encode()

    def cuGetErrorString(self, status: int) -> tuple[int, bytes | None]:
        return 0, b"played text" if status < 1000 else None

    def _cuDriverGetVersion(self) -> tuple[int]:
        return (13000,)

    def _cuDeviceGetCount(self) -> tuple[int]:
        return (self.count,)

    def _cuDeviceGet(self, ordinal: int) -> tuple[int]:
        return (40 + ordinal,)

    def _cuDeviceGetAttribute(self, attribute: str, device: int) -> tuple[int]:
        return (int(attribute),)

    def _cuDeviceGetName(self, length: int, device: int) -> tuple[bytes]:
        return (f"played {device}".encode() + b"\0" * 7,)

    def _cuDeviceTotalMem(self, device: int) -> tuple[int]:
        return (80 << 30,)

    def _cuMemGetInfo(self) -> tuple[int, int]:
        return 3 * MIB, 80 << 30

    def _cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int]:
        return (1000 + device,)

    def _cuCtxGetCurrent(self) -> tuple[int]:
        return (getattr(self.on_thread, "context", 0),)

    def _cuCtxSetCurrent(self, context: int) -> tuple[()]:
        self.on_thread.context = context
        return ()

    def _cuThreadExchangeStreamCaptureMode(self, mode: Mode) -> tuple[Mode]:
        before = getattr(self.on_thread, "mode", Mode.CU_STREAM_CAPTURE_MODE_GLOBAL)
        self.on_thread.mode = mode
        return (before,)

    def _cuStreamIsCapturing(self, stream: int) -> tuple[int]:
        return (1 if stream == 77 else 0,)

    def _cuStreamCreate(self, flags: int) -> tuple[int]:
        return (500 + flags,)

    def _cuEventCreate(self, flags: int) -> tuple[int]:
        return (600 + flags,)

    def _cuMemAlloc(self, size: int) -> tuple[int]:
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        return (ctypes.addressof(block),)

    def _cuMemFree(self, address: int) -> tuple[()]:
        del self.memory[address]
        return ()

    def _cuMemcpyAsync(self, dst: int, src: int, size: int, stream: int) -> tuple[()]:
        ctypes.memmove(dst, src, size)
        return ()

    _cuMemcpyHtoDAsync = _cuMemcpyDtoHAsync = _cuMemcpyAsync

    def _cuMemsetD8Async(self, address: int, byte: int, size: int, stream: int) -> tuple[()]:
        ctypes.memset(address, byte, size)
        return ()

    def _cuMemHostGetDevicePointer(self, address: int, flags: int) -> tuple[int]:
        return (address,)


def play(monkeypatch: pytest.MonkeyPatch, driver: PlayedDriver) -> PlayedDriver:
    """Let this process find the played driver, as if it had not looked for one before."""
    load_by(monkeypatch, lambda: driver)
    return driver


def load_by(monkeypatch: pytest.MonkeyPatch, load: Callable[[], Any]) -> None:
    """Let this process look for its driver again, by ``load``."""
    for name, value in vars(cuda).items():
        monkeypatch.setattr(cuda, name, value)  # put back in the end
    type(cuda).__init__(cuda, load)
