"""Memory of a device: on a played driver, and (marker gpu) on the real one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.played_driver import MIB, PlayedDriver, play

from hps_numba.device import driver as devices
from hps_numba.device import memory, streams
from hps_numba.errors import ArrayError, CapacityError, DeviceError


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


def test_memory_is_allocated_and_released(driver: PlayedDriver):
    region = memory.allocate(1, 100, "rows of x")
    assert (region.size, region.ordinal, list(driver.memory)) == (100, 1, [region.address])
    region.release()
    region.release()
    assert (region.address, driver.memory) == (0, {})
    memory.allocate(0, 100, "dropped")
    assert driver.memory == {}
    empty = memory.allocate(0, 0, "nothing")
    empty.release()
    assert (empty.address, len(driver.named("cuMemAlloc"))) == (0, 2)


def test_too_much_device_memory_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch):
    play(monkeypatch, PlayedDriver(cuMemAlloc=2))
    with pytest.raises(CapacityError, match=r"rows of x: expected 5\.0 MiB of free memory on device 1, got 3\.0 MiB"):
        memory.allocate(1, 5 * MIB, "rows of x")


def test_memory_that_cannot_be_freed_is_reported(driver: PlayedDriver, caplog: Any):
    region = memory.allocate(0, 64, "test")
    driver.failing["cuMemFree"] = 700
    with caplog.at_level(logging.WARNING, "hps_numba.device.driver"):
        del region
    assert caplog.messages == ["device memory was not freed: cuMemFree: CUDA_ERROR_700: played text"]


@pytest.mark.parametrize("array", [np.arange(12.0).reshape(3, 4), np.arange(24).reshape(4, 6)[::2, ::-1], np.float32(5)])
def test_arrays_go_to_the_device_and_back(driver: PlayedDriver, array: Any):
    region = memory.allocate(0, array.nbytes * 2, "test")
    memory.to_device(region.address, array, 9)
    memory.copy(region.address + array.nbytes, region.address, array.nbytes, 9)
    back = np.empty(np.shape(array), array.dtype)
    memory.to_host(back, region.address + array.nbytes, 9)
    assert (back == array).all()
    assert [call[-1] for call in driver.named("cuMemcpyHtoDAsync", "cuMemcpyAsync", "cuMemcpyDtoHAsync")] == [9, 9, 9]
    assert driver.calls[-2] == ("cuStreamSynchronize", 9)  # then the capture mode is put back
    memory.fill(region.address, 3, array.nbytes, 9)
    memory.to_host(back, region.address, 9)
    assert (np.frombuffer(back.tobytes(), np.uint8) == 3).all()
    region.release()


def test_empty_copies_call_nothing(driver: PlayedDriver):
    memory.to_device(64, np.empty(0), 1)
    memory.to_host(np.empty((0, 4)), 64, 1)
    memory.fill(64, 0, 0, 1)
    memory.copy(64, 128, 0, 1)
    memory.register(4096, 0)
    assert driver.calls == []


def test_an_array_that_cannot_be_filled_is_refused(driver: PlayedDriver):
    frozen = np.zeros(4)
    frozen.flags.writeable = False
    for array in (frozen, np.zeros((4, 4), np.float32)[:, ::2]):
        with pytest.raises(ArrayError, match=r"to_host: expected a contiguous, writeable array, got float\d\d\[4"):
            memory.to_host(array, 64, 0)
    assert driver.calls == []


def test_registered_for_all_devices_at_one_address(driver: PlayedDriver):
    with devices.current(1):
        pass
    memory.register(8192, 4096)
    assert driver.named("cuMemHostRegister") == [("cuMemHostRegister", 8192, 4096, 3)]
    memory.unregister(8192)
    assert driver.named("cuMemHostUnregister") == [("cuMemHostUnregister", 8192)]
    assert driver.named("cuDevicePrimaryCtxRetain") == [("cuDevicePrimaryCtxRetain", 41)]  # no context is made for this


def test_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch):
    play(monkeypatch, PlayedDriver(cuMemHostRegister=801))
    with pytest.raises(CapacityError, match=r"2\.0 MiB at 0x2000: cuMemHostRegister: CUDA_ERROR_801: played text"):
        memory.register(8192, 2 * MIB)


def test_a_device_that_sees_another_address_is_refused(driver: PlayedDriver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver, "_cuMemHostGetDevicePointer", lambda address, flags: (address + 16,))
    with pytest.raises(DeviceError, match="host memory: expected address 0x2000 on the device too, got 0x2010"):
        memory.register(8192, 4096)
    assert driver.named("cuMemHostUnregister") == [("cuMemHostUnregister", 8192)]


class PlayedCupy:
    """Plays CuPy: a pool that has 100 bytes."""

    def __init__(self) -> None:
        self.held = 0
        self.cuda = SimpleNamespace(alloc=self.alloc, Device=lambda ordinal: devices.current(ordinal))
        self.cuda.memory = SimpleNamespace(OutOfMemoryError=type("OutOfMemoryError", (MemoryError,), {}))

    def alloc(self, size: int) -> Any:
        if size > 100:
            raise self.cuda.memory.OutOfMemoryError
        pool = self

        class Block:
            ptr = 4096

            def __init__(self) -> None:
                pool.held += 1

            def __del__(self) -> None:
                pool.held -= 1

        return Block()


def test_memory_from_the_pool_of_cupy(driver: PlayedDriver, monkeypatch: pytest.MonkeyPatch):
    cupy = PlayedCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    allocator: memory.DeviceAllocator = memory.CupyDeviceAllocator()
    region = allocator.allocate(1, 100, "rows")
    assert (region.address, region.size, region.ordinal, cupy.held) == (4096, 100, 1, 1)
    region.release()
    assert cupy.held == 0
    with pytest.raises(CapacityError, match=r"rows: expected 0\.0 MiB of free memory on device 1, got 3\.0 MiB"):
        allocator.allocate(1, 101, "rows")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match="rows: expected CuPy for its memory, got an import error"):
        allocator.allocate(1, 1, "rows")


@pytest.mark.gpu
def test_gpu_round_trip(stream: int):
    array = np.random.default_rng(0).standard_normal((1000, 33)).astype(np.float32)
    region = memory.allocate(0, 2 * array.nbytes, "test")
    assert region.address % 256 == 0
    memory.to_device(region.address, array, stream)
    memory.copy(region.address + array.nbytes, region.address, array.nbytes, stream)
    memory.fill(region.address, 0xFF, array.nbytes, stream)
    back = np.empty_like(array)
    memory.to_host(back, region.address + array.nbytes, stream)
    assert (back == array).all()
    memory.to_host(back, region.address, stream)
    assert np.isnan(back).all()
    region.release()
    region.release()


@pytest.mark.gpu
def test_gpu_too_much_memory_is_refused_and_the_device_goes_on():
    with pytest.raises(CapacityError, match=r"rows of x: expected .* MiB of free memory on device 0, got .* MiB"):
        memory.allocate(0, 1 << 43, "rows of x")
    memory.allocate(0, MIB, "test").release()


@pytest.mark.gpu
def test_gpu_a_wrong_call_is_an_error_and_the_device_goes_on(stream: int):
    with pytest.raises(DeviceError, match=r"cuMemHostUnregister: CUDA_ERROR_[A-Z_]+: \w+"):
        memory.unregister(4096)
    streams.synchronize(stream)


@pytest.mark.gpu
def test_gpu_memory_and_streams_are_shared_with_cupy():
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True) as stream:
        array = cupy.arange(1000, dtype=np.int64)
        region = memory.CupyDeviceAllocator().allocate(0, array.nbytes, "test")
        memory.copy(region.address, array.data.ptr, array.nbytes, stream.ptr)
        back = np.empty(1000, np.int64)
        memory.to_host(back, region.address, stream.ptr)
        assert (back == np.arange(1000)).all()
        assert not streams.is_capturing(stream.ptr)
        stream.begin_capture()
        assert streams.is_capturing(stream.ptr)
        stream.end_capture()
        region.release()
