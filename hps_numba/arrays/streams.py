"""The CUDA stream that a lookup runs on, and work of Torch and CuPy in its order.

A lookup runs on one stream: the one that the caller names, else the current one of the framework that made the keys. Copies and
allocations for it take place in the order of the same stream; so every function of ``arrays`` that may copy or allocate takes
the caller's ``stream`` (None: the framework's current one).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from hps_numba.arrays.kinds import ArrayKind, one_line
from hps_numba.errors import DeviceError, HpsError

__all__ = ["LEGACY_STREAM", "ambient_stream", "cupy_order", "stream_handle", "torch_order", "torch_streams"]

LEGACY_STREAM = 1  # cudaStreamLegacy; 0 means the same
_PER_THREAD_STREAM = 2  # cudaStreamPerThread


def stream_handle(stream: Any, kind: ArrayKind, device: int) -> int:
    """The CUDA stream (``cudaStream_t``, as an integer) that a lookup runs on.

    Args:
        stream: None: the current stream of the framework of ``kind`` on ``device`` (an unknown framework's own). Else a handle,
            a stream of Torch or CuPy, or anything with ``__cuda_stream__`` (cuda.core, numba-cuda).
        kind: of the keys.
        device: CUDA ordinal of the keys.

    Raises:
        DeviceError: something else, or a stream of another device.
    """
    if stream is None:
        current = _CURRENT_STREAMS.get(kind.framework)
        return ambient_stream(device) if current is None else current(kind, device)
    if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
        return int(stream)
    try:
        return _handle_of(stream, device)
    except HpsError:
        raise
    except Exception as problem:  # foreign code may raise anything
        expected = "expected a handle, a Torch or CuPy stream or an object with __cuda_stream__"
        got = f"{type(stream).__name__} {one_line(repr(stream))}"
        raise DeviceError(f"stream: {expected}, got {got}: {one_line(problem)}") from problem


def _handle_of(stream: Any, device: int) -> int:
    for name in ("device_index", "device_id"):  # Torch, CuPy (-1 for a stream of any device)
        other = getattr(stream, name, -1)
        if isinstance(other, int) and other not in (-1, device):
            raise DeviceError(f"stream: expected a stream of cuda:{device}, got one of cuda:{other}")
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        version, handle = protocol() if callable(protocol) else protocol
        if version != 0:
            raise ValueError(f"expected version 0 of __cuda_stream__, got {version}")
        return int(handle)
    for name in ("cuda_stream", "ptr"):  # Torch, CuPy
        handle = getattr(stream, name, None)
        if isinstance(handle, int):
            return handle
    raise TypeError("it has no stream handle")


def torch_streams() -> Callable[[int], int]:
    """The function that gives the handle of Torch's current stream on a GPU, by CUDA ordinal."""
    function: Callable[[int], int]  # 20 times cheaper than the object; not promised by Torch
    function = getattr(sys.modules["torch"]._C, "_cuda_getCurrentRawStream", _stream_of_object)
    return function


def _stream_of_object(device: int) -> int:
    return sys.modules["torch"].cuda.current_stream(device).cuda_stream


def _torch_current(device: int) -> int:
    return torch_streams()(device)


def _cupy_current(device: int) -> int:
    return sys.modules["cupy"].cuda.get_current_stream(device).ptr


def ambient_stream(device: int) -> int:
    """The stream for memory that does not say which framework made it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return _torch_current(device)
    return _cupy_current(device) if sys.modules.get("cupy") is not None else 0


_CURRENT_STREAMS: dict[str, Callable[[ArrayKind, int], int]] = {
    "torch": lambda kind, device: _torch_current(device),
    "cupy": lambda kind, device: _cupy_current(device),
    "cuda": lambda kind, device: kind.device.stream,
}


def torch_order(device: int, stream: Any) -> AbstractContextManager[Any]:
    """Inside, Torch allocates and copies in the order of ``stream``."""
    if stream is None:
        return contextlib.nullcontext()
    torch, handle = sys.modules["torch"], stream_handle(stream, ArrayKind("torch"), device)
    if handle == _torch_current(device):
        return contextlib.nullcontext()
    if handle == _PER_THREAD_STREAM:
        raise DeviceError(
            "stream: expected a stream in whose order Torch can work, got the per-thread default stream (2); create a stream"
        )
    if handle in (0, LEGACY_STREAM):
        return torch.cuda.stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(torch.cuda.ExternalStream(handle, device=device))


@contextlib.contextmanager
def cupy_order(cupy: Any, device: int, stream: Any) -> Iterator[None]:
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
    from_external = getattr(getattr(cupy.cuda, "Stream", None), "from_external", None)
    return cupy.cuda.ExternalStream(handle) if from_external is None else from_external(_Handle(handle))
