"""Streams, events and capture: on a played driver, and (marker gpu) on the real one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.played_driver import MIB, Mode, PlayedDriver, play
from support.waiting import join_all

from hps_numba.device import driver as devices
from hps_numba.device import memory, streams


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> PlayedDriver:
    """A played driver with two devices."""
    return play(monkeypatch, PlayedDriver())


@pytest.fixture
def stream() -> Iterator[int]:
    """A stream of device 0, which is current."""
    with devices.current(0):
        made = streams.new_stream(0)
        yield made
        streams.destroy_stream(made)


def test_hot_calls_are_one_call_each(driver: PlayedDriver):
    assert devices.device_count() == 2
    with devices.current(0):
        made = len(driver.calls)
        streams.record(5, 6)
        streams.wait(7, 5)
        assert streams.is_capturing(77) is True
        assert streams.is_capturing(6) is False
    assert driver.calls[made:-1] == [
        ("cuEventRecord", 5, 6),
        ("cuStreamWaitEvent", 7, 5, 0),
        ("cuStreamIsCapturing", 77),
        ("cuStreamIsCapturing", 6),
    ]


def test_streams_and_events_are_made_on_their_device(driver: PlayedDriver):
    assert streams.new_stream(1) == 501  # does not wait for the default stream
    assert streams.new_event(1) == 602  # takes no time stamps
    with devices.current(0):
        assert streams.new_event() == 602
        driver.failing["cuEventQuery"] = 600
        assert streams.event_done(602) is False
        driver.failing.clear()
        assert streams.event_done(602) is True


def test_what_might_wait_is_called_in_the_relaxed_mode(driver: PlayedDriver):
    modes = {}
    for name in (
        "_cuMemAlloc",
        "_cuMemFree",
        "_cuMemHostRegister",
        "_cuMemHostUnregister",
        "_cuEventQuery",
        "_cuStreamSynchronize",
    ):
        played = getattr(driver, name, lambda *_: ())

        def watched(*arguments: Any, name: str = name, played: Any = played) -> Any:
            modes[name] = driver.on_thread.mode
            return played(*arguments)

        setattr(driver, name, watched)
    memory.allocate(0, 64, "test").release()
    memory.register(4096, 4096)
    memory.unregister(4096)
    streams.event_done(5)
    streams.synchronize(6)
    assert len(modes) == 6 and set(modes.values()) == {Mode.CU_STREAM_CAPTURE_MODE_RELAXED}
    assert driver.on_thread.mode == Mode.CU_STREAM_CAPTURE_MODE_GLOBAL


@pytest.mark.gpu
def test_gpu_events_order_streams(stream: int):
    other, event = streams.new_stream(0), streams.new_event()
    size = 256 * MIB
    region = memory.allocate(0, size, "test")
    assert streams.event_done(event)  # was never recorded
    back = np.empty(1, np.uint8)
    waited = 0
    for value in range(20):
        for _ in range(20):
            memory.fill(region.address, 255, size, stream)
        memory.fill(region.address, value, size, stream)
        streams.record(event, stream)
        waited += not streams.event_done(event)
        streams.wait(other, event)
        memory.to_host(back, region.address + size - 1, other)
        assert back[0] == value
        assert streams.event_done(event)
    assert waited > 0
    streams.synchronize(stream)
    streams.destroy_event(event)
    streams.destroy_stream(other)
    region.release()


class Capture:
    """Captures a stream into a graph, in the global mode, straight by the driver."""

    def __init__(self, stream: int) -> None:
        from cuda.bindings import driver

        self.driver, self.stream = driver, stream

    def __enter__(self) -> None:
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
        assert not self.driver.cuStreamBeginCapture(self.stream, mode)[0]

    def __exit__(self, *problem: object) -> None:
        status, graph = self.driver.cuStreamEndCapture(self.stream)
        assert not status, status
        self.driver.cuGraphDestroy(graph)


@pytest.mark.gpu
def test_gpu_capture_is_seen(stream: int):
    other = streams.new_stream(0)
    assert not streams.is_capturing(stream)
    with Capture(stream):
        assert streams.is_capturing(stream)
        assert not streams.is_capturing(other)
    assert not streams.is_capturing(stream)
    streams.destroy_stream(other)


@pytest.mark.gpu
def test_gpu_another_thread_works_while_a_stream_is_captured(stream: int):
    region = memory.allocate(0, MIB, "test")
    page = np.zeros(3 * 4096, np.uint8)
    start = -(-page.ctypes.data // 4096) * 4096
    done = []

    def write() -> None:
        own, event = streams.new_stream(0), streams.new_event(0)
        with devices.current(0):
            more = memory.allocate(0, MIB, "in another thread")
            memory.register(start, 8192)
            memory.to_device(more.address, np.arange(100), own)
            back = np.empty(100, np.int64)
            memory.to_host(back, more.address, own)
            streams.record(event, own)
            streams.synchronize(own)
            assert streams.event_done(event)
            memory.unregister(start)
            more.release()
            streams.destroy_event(event)
            streams.destroy_stream(own)
        done.append((back == np.arange(100)).all())

    with Capture(stream):
        memory.fill(region.address, 1, MIB, stream)
        thread = threading.Thread(target=write)
        thread.start()
        join_all(thread)
        memory.fill(region.address, 2, MIB, stream)
    assert done == [True]
    region.release()


@pytest.mark.gpu
def test_gpu_capture_by_torch_is_seen():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    x = torch.zeros(16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = streams.is_capturing(torch.cuda.current_stream().cuda_stream)
        memory.allocate(0, MIB, "while this thread captures").release()
        y = x + 1
    assert seen
    graph.replay()
    torch.cuda.synchronize()
    assert (y == 1).all()
