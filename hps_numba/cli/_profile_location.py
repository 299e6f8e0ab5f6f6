"""Where the profiler's keys and rows lie, and what has to be waited for before a call counts as done."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

__all__ = ["DeviceMemory", "HostMemory", "Place", "cuda_devices", "has_cupy"]


class Place(Protocol):
    """Memory of one kind, and the stream that works on it.   **Threads:** one at a time."""

    name: str
    timing: str
    stream: Any

    def current(self) -> AbstractContextManager[Any]:
        """A block in which device and stream are the current ones of this thread."""

    def put(self, keys: np.ndarray) -> Any:
        """The same keys in this memory, ready to be read."""

    def new_rows(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Memory for rows, filled with NaN."""

    def wait(self) -> None:
        """Return when all work of the stream is done."""

    def fetch(self, rows: Any) -> np.ndarray:
        """The rows in host memory."""


class HostMemory:
    """NumPy arrays: a call is done when it returns."""

    name = "host"
    timing = "host wall time of HPS.lookup(keys, out=rows), NumPy arrays"
    stream = None

    def current(self) -> AbstractContextManager[Any]:
        """There is nothing to choose."""
        return nullcontext()

    def put(self, keys: np.ndarray) -> np.ndarray:
        """The keys themselves."""
        return keys

    def new_rows(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """A NumPy array of NaN."""
        return np.full(shape, np.nan, dtype)

    def wait(self) -> None:
        """Nothing is pending."""

    def fetch(self, rows: np.ndarray) -> np.ndarray:
        """The rows themselves."""
        return rows


class DeviceMemory:
    """CuPy arrays on one device, worked on by a CUDA stream of this object's own.

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

    def current(self) -> AbstractContextManager[Any]:
        """Device and stream are the current ones of this thread."""
        return self._entered()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with self._device, self.stream:
            yield

    def put(self, keys: np.ndarray) -> Any:
        """A copy on the device, complete."""
        with self.current():
            copied = self._cupy.array(keys)
        self.wait()
        return copied

    def new_rows(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A CuPy array of NaN, copied from the host: to fill it on the device would compile a kernel."""
        return self.put(np.full(shape, np.nan, dtype))

    def wait(self) -> None:
        """Wait for the stream."""
        self.stream.synchronize()

    def fetch(self, rows: Any) -> np.ndarray:
        """A copy in host memory."""
        with self.current():
            return np.asarray(rows.get())


def cuda_devices() -> int:
    """How many CUDA devices this process can use; 0 also where what serves them is not installed."""
    from hps_numba.device.driver import device_count

    return device_count()


def has_cupy() -> bool:
    """CuPy, which makes keys in GPU memory, is installed."""
    return find_spec("cupy") is not None
