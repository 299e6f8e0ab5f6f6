"""Streams and events of a device; handles are plain ints. ``device.driver`` says what holds for all of them."""

from __future__ import annotations

from contextlib import nullcontext

from hps_numba.device.driver import check, cuda, current, failure, relaxed_capture, release

__all__ = [
    "destroy_event",
    "destroy_stream",
    "event_done",
    "is_capturing",
    "new_event",
    "new_stream",
    "record",
    "synchronize",
    "synchronize_device",
    "wait",
    "wait_for",
]

_NOT_READY = 600  # of CUresult


def is_capturing(stream: int) -> bool:
    """Whether work on this stream is being captured into a graph. One call of the driver.

    Raises:
        DeviceError: the default stream, while a stream is captured that waits for it; bad handle.
    """
    status, state = cuda.driver.cuStreamIsCapturing(stream)
    if status:
        raise failure("cuStreamIsCapturing", status)
    return bool(state)


def new_stream(ordinal: int) -> int:
    """A stream of the device that does not wait for the default stream."""
    with current(ordinal), relaxed_capture():
        driver = cuda.driver
        status, stream = driver.cuStreamCreate(int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        check("cuStreamCreate", status)
        return int(stream)


def destroy_stream(stream: int) -> None:
    """Destroy a stream; work that is on it still runs to its end."""
    release("cuStreamDestroy", stream)


def synchronize(stream: int) -> None:
    """Wait until all work on the stream is done; the GIL is released. Not while the stream is being captured."""
    with relaxed_capture():
        check("cuStreamSynchronize", cuda.driver.cuStreamSynchronize(stream)[0])


def synchronize_device(ordinal: int) -> None:
    """Wait until all work of all streams of a device is done; the GIL is released. Not while a stream is being captured."""
    with current(ordinal), relaxed_capture():
        check("cuCtxSynchronize", cuda.driver.cuCtxSynchronize()[0])


def new_event(ordinal: int | None = None) -> int:
    """An event that takes no time stamps, on a device (default: the current one)."""
    with nullcontext() if ordinal is None else current(ordinal), relaxed_capture():
        driver = cuda.driver
        status, event = driver.cuEventCreate(int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        check("cuEventCreate", status)
        return int(event)


def record(event: int, stream: int) -> None:
    """Record the event after all work that is on the stream now. Both are of one device. One call of the driver."""
    if status := cuda.driver.cuEventRecord(event, stream)[0]:
        raise failure("cuEventRecord", status)


def wait(stream: int, event: int) -> None:
    """Let later work on the stream wait for the event, on the device; they may be of two. One call of the driver."""
    if status := cuda.driver.cuStreamWaitEvent(stream, event, 0)[0]:
        raise failure("cuStreamWaitEvent", status)


def event_done(event: int) -> bool:
    """Whether the work before the event is done, or it was never recorded. Breaks no capture; does not wait."""
    with relaxed_capture():
        status = cuda.driver.cuEventQuery(event)[0]
        if status and status != _NOT_READY:
            raise failure("cuEventQuery", status)
        return not status


def wait_for(event: int) -> None:
    """Wait until the work before the event is done, if it was ever recorded; the GIL is released."""
    with relaxed_capture():
        check("cuEventSynchronize", cuda.driver.cuEventSynchronize(event)[0])


def destroy_event(event: int) -> None:
    """Destroy an event; what waits for it still does."""
    release("cuEventDestroy", event)
