"""Where the keys and rows of the profiler are, and how to wait for the end of a call."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

__all__ = ["DeviceLocation", "HostLocation", "KeyLocation", "cuda_devices", "has_cupy"]


class KeyLocation(Protocol):
    """Memory for keys and rows, and the stream that works on it.   Thread safety: one thread at a time."""

    name: str
    timing: str
    stream: Any

    def current(self) -> AbstractContextManager[Any]:
        """A block in which the device and the stream are the current ones of this thread."""

    def put(self, keys: np.ndarray) -> Any:
        """The keys in this memory, ready to be read."""

    def new_rows(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Memory for rows, filled with NaN."""

    def wait(self) -> None:
        """Wait for all work of the stream."""

    def fetch(self, rows: Any) -> np.ndarray:
        """The rows in host memory."""


class HostLocation:
    """NumPy arrays: a call is complete when it returns."""

    name = "host"
    timing = "host wall time of HPS.lookup(keys, out=rows), NumPy arrays"
    stream = None

    def current(self) -> AbstractContextManager[Any]:
        """An empty block."""
        return nullcontext()

    def put(self, keys: np.ndarray) -> np.ndarray:
        """The keys themselves."""
        return keys

    def new_rows(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """A NumPy array of NaN."""
        return np.full(shape, np.nan, dtype)

    def wait(self) -> None:
        """Nothing to wait for."""

    def fetch(self, rows: np.ndarray) -> np.ndarray:
        """The rows themselves."""
        return rows


class DeviceLocation:
    """CuPy arrays on one device, and a CUDA stream.

    Args:
        device: number of the CUDA device.
    """

    name = "device"
    timing = "host wall time of HPS.lookup(keys, out=rows) and of the wait for its CUDA stream after each call, CuPy arrays"

    def __init__(self, device: int) -> None:
        self._cupy: Any = importlib.import_module("cupy")
        self._device = self._cupy.cuda.Device(device)
        with self._device:
            self.stream = self._cupy.cuda.Stream(non_blocking=True)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Device and stream are the current ones of this thread."""
        with self._device, self.stream:
            yield

    def put(self, keys: np.ndarray) -> Any:
        """A completed copy on the device."""
        with self.current():
            copied = self._cupy.array(keys)
        self.wait()
        return copied

    def new_rows(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A CuPy array of NaN, copied from the host: filling it on the device would compile a kernel."""
        return self.put(np.full(shape, np.nan, dtype))

    def wait(self) -> None:
        """Wait for the stream."""
        self.stream.synchronize()

    def fetch(self, rows: Any) -> np.ndarray:
        """A copy in host memory."""
        with self.current():
            return np.asarray(rows.get())


def cuda_devices() -> int:
    """Number of CUDA devices that this process can use; 0 without the packages for them."""
    from hps_numba.device.driver import device_count

    return device_count()


def has_cupy() -> bool:
    """Whether CuPy, which creates keys in GPU memory, is installed."""
    return find_spec("cupy") is not None
