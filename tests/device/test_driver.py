"""The CUDA driver as the package sees it: on one that is played by this file, on none, and (marker gpu) on the real one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.factories import has_cuda_device
from support.played_driver import MIB, Mode, PlayedDriver, play
from support.processes import environment

from hps_numba.device import driver as devices
from hps_numba.errors import ArrayError, CapacityError, DeviceError


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> PlayedDriver:
    """A played driver with two devices."""
    return play(monkeypatch, PlayedDriver())


@pytest.fixture
def stream() -> Iterator[int]:
    """A stream of device 0, which is current."""
    with devices.current(0):
        made = devices.new_stream(0)
        yield made
        devices.destroy_stream(made)


def python(program: str) -> str:
    """What a program prints in a process of its own, with the tests on its path."""
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", program]  # of forks beside threads
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- no device ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(has_cuda_device(), reason="is about machines without a device")
def test_this_machine_has_no_device_and_says_why():
    assert devices.device_count() == 0
    assert "CUDA" in devices.why_no_device() and "\n" not in devices.why_no_device()
    with pytest.raises(DeviceError, match=r"device 0 is wanted, there is none: .*CUDA"):
        devices.current(0)
    with pytest.raises(DeviceError, match=r"no CUDA device can be used: .*CUDA"):
        devices.record(1, 2)


def test_without_the_packages_there_is_no_device():
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['cuda', 'cuda.bindings', 'cupy', 'torch']));"
        "from hps_numba.device import driver as devices; print(devices.device_count()); print(devices.why_no_device())"
    )
    count, why = python(program).splitlines()
    assert count == "0"
    assert why.startswith("the CUDA packages cannot be imported (pip install 'hps-numba[cuda13]'): ")


def test_importing_looks_for_nothing():
    program = (
        "import sys, hps_numba.device.host_memory, hps_numba.device.driver\n"
        "print({'cuda', 'cupy', 'torch', 'numba'} & set(sys.modules))"
    )
    assert python(program) == "set()\n"


def broken() -> Any:
    raise OSError("half an installation\nand more")


def no_library(*_: Any) -> tuple[Any, ...]:
    raise RuntimeError("libcuda.so.1 is not there")


@pytest.mark.parametrize(
    ("load", "why"),
    [
        (broken, "the CUDA packages cannot be imported (pip install 'hps-numba[cuda13]'): half an installation"),
        (lambda: SimpleNamespace(cuInit=no_library), "no CUDA driver: libcuda.so.1 is not there"),
        (lambda: PlayedDriver(cuInit=100), "the driver shows no device (CUDA_VISIBLE_DEVICES='')"),
        (lambda: PlayedDriver(0), "the driver shows no device (CUDA_VISIBLE_DEVICES='')"),
        (lambda: PlayedDriver(cuInit=803), "cuInit: CUDA_ERROR_803: played text"),
        (lambda: PlayedDriver(cuInit=4321), "cuInit: CUDA_ERROR_4321: status 4321"),
    ],
)
def test_why_there_is_no_device(monkeypatch: pytest.MonkeyPatch, load: Callable[[], Any], why: str):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(devices, "_cuda", devices._Cuda(load))
    assert (devices.device_count(), devices.why_no_device()) == (0, why)


def test_a_driver_older_than_the_packages_is_named(monkeypatch: pytest.MonkeyPatch):
    old = play(monkeypatch, PlayedDriver())
    monkeypatch.setattr(old, "_cuDriverGetVersion", lambda: (12040,), raising=False)
    assert devices.device_count() == 0
    assert devices.why_no_device().startswith("the driver is of CUDA 12, the packages of CUDA 13: ")


def test_the_driver_is_asked_once(driver: PlayedDriver):
    assert [devices.device_count() for _ in range(3)] == [2, 2, 2]
    assert devices.why_no_device() == ""
    assert len(driver.named("cuInit", "cuDeviceGetCount")) == 2


@pytest.mark.parametrize(
    ("count", "ordinal", "message"),
    [(1, 1, "device 1 is wanted, only device 0 is there"), (4, -1, "device -1 is wanted, devices 0 to 3 are there")],
)
def test_a_missing_device_is_named(monkeypatch: pytest.MonkeyPatch, count: int, ordinal: int, message: str):
    driver = play(monkeypatch, PlayedDriver(count))
    for call in (devices.check_device, devices.current, devices.device_info, devices.free_bytes, devices.new_stream):
        with pytest.raises(DeviceError, match=message):
            call(ordinal)
    assert not driver.named("cuDevicePrimaryCtxRetain")


FORKED = """
import logging, os, sys
import numpy as np
from support.played_driver import PlayedDriver, play
import pytest
from hps_numba.device import driver as devices
from hps_numba.errors import DeviceError
driver = play(pytest.MonkeyPatch(), PlayedDriver({count}))
said = []
class Handler(logging.Handler):
    def emit(self, record): said.append((record.levelname, record.getMessage()))
logging.getLogger("hps_numba.device.driver").addHandler(Handler())
region = devices.allocate(0, 64, "test") if devices.device_count() else None
child = os.fork()
if child == 0:
    made = len(driver.calls)
    devices.device_count(), devices.device_count()
    if region is not None:
        region.release()
        devices.destroy_event(5), devices.destroy_stream(6), devices.unregister(4096)
    try: devices.allocate(0, 64, "test")
    except DeviceError as problem: print(devices.device_count(), said, len(driver.calls) - made, problem, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(devices.device_count(), said, flush=True)
if region is not None: region.release()
print(len(driver.memory))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_of_a_process_that_used_cuda_has_no_device():
    why = "a child forked from a process that used CUDA serves from the CPU"
    child, parent, memory = python(FORKED.format(count=2)).splitlines()
    assert child == f"0 [('WARNING', '{why}')] 0 device 0 is wanted, there is none: {why}"
    assert (parent, memory) == ("2 []", "0")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_of_a_process_without_devices_says_nothing():
    child, parent, _ = python(FORKED.format(count=0)).splitlines()
    assert child.startswith("0 [] 0 device 0 is wanted, there is none: the driver shows no device")
    assert parent == "0 []"


def test_a_driver_that_another_library_used_before_the_fork(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    play(monkeypatch, PlayedDriver(cuInit=3))
    with caplog.at_level(logging.WARNING, "hps_numba.device.driver"):
        assert devices.device_count() == devices.device_count() == 0
    assert caplog.messages == ["a child forked from a process that used CUDA serves from the CPU"]
    devices.destroy_stream(5)  # whatever it is, it is the parent's


# -- on the played driver -------------------------------------------------------------------------------------------------


def test_device_info(driver: PlayedDriver):
    assert devices.device_info(1) == devices.DeviceInfo(1, "played 41", (9, 0), 132, 80 << 30)
    assert devices.free_bytes(1) == 3 * MIB
    assert driver.on_thread.context == 0


def test_current_switches_once_and_back(driver: PlayedDriver):
    with devices.current(1):
        made = len(driver.calls)
        with devices.current(1), devices.current(1):
            pass
        assert [call[0] for call in driver.calls[made:]] == ["cuCtxGetCurrent"] * 2
        with devices.current(0):
            assert driver.on_thread.context == 1040
        assert driver.on_thread.context == 1041
        with pytest.raises(KeyError), devices.current(0):
            raise KeyError
        assert driver.on_thread.context == 1041
    assert driver.on_thread.context == 0


def test_a_context_is_retained_once_by_all_threads(driver: PlayedDriver):
    start = threading.Barrier(4)

    def use() -> None:
        start.wait(30)
        for ordinal in (0, 1, 0):
            with devices.current(ordinal):
                assert driver.on_thread.context == 1040 + ordinal

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(driver.named("cuDevicePrimaryCtxRetain")) == [
        (("cuDevicePrimaryCtxRetain"), 40),
        ("cuDevicePrimaryCtxRetain", 41),
    ]


def test_memory_is_taken_and_given_back(driver: PlayedDriver):
    region = devices.allocate(1, 100, "rows of x")
    assert (region.size, region.ordinal, list(driver.memory)) == (100, 1, [region.address])
    region.release()
    region.release()
    assert (region.address, driver.memory) == (0, {})
    devices.allocate(0, 100, "dropped")
    assert driver.memory == {}
    empty = devices.allocate(0, 0, "nothing")
    empty.release()
    assert (empty.address, len(driver.named("cuMemAlloc"))) == (0, 2)


def test_too_much_device_memory_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch):
    play(monkeypatch, PlayedDriver(cuMemAlloc=2))
    with pytest.raises(CapacityError, match=r"rows of x: 5\.0 MiB of device 1 wanted, 3\.0 MiB are free"):
        devices.allocate(1, 5 * MIB, "rows of x")


def test_memory_that_cannot_be_given_back_is_reported(driver: PlayedDriver, caplog: Any):
    region = devices.allocate(0, 64, "test")
    driver.failing["cuMemFree"] = 700
    with caplog.at_level(logging.WARNING, "hps_numba.device.driver"):
        del region
    assert caplog.messages == ["device memory was not given back: cuMemFree: CUDA_ERROR_700: played text"]


@pytest.mark.parametrize("array", [np.arange(12.0).reshape(3, 4), np.arange(24).reshape(4, 6)[::2, ::-1], np.float32(5)])
def test_arrays_go_to_the_device_and_back(driver: PlayedDriver, array: Any):
    region = devices.allocate(0, array.nbytes * 2, "test")
    devices.to_device(region.address, array, 9)
    devices.copy(region.address + array.nbytes, region.address, array.nbytes, 9)
    back = np.empty(np.shape(array), array.dtype)
    devices.to_host(back, region.address + array.nbytes, 9)
    assert (back == array).all()
    assert [call[-1] for call in driver.named("cuMemcpyHtoDAsync", "cuMemcpyAsync", "cuMemcpyDtoHAsync")] == [9, 9, 9]
    assert driver.calls[-2] == ("cuStreamSynchronize", 9)  # then the capture mode is put back
    devices.fill(region.address, 3, array.nbytes, 9)
    devices.to_host(back, region.address, 9)
    assert (np.frombuffer(back.tobytes(), np.uint8) == 3).all()
    region.release()


def test_empty_copies_call_nothing(driver: PlayedDriver):
    devices.to_device(64, np.empty(0), 1)
    devices.to_host(np.empty((0, 4)), 64, 1)
    devices.fill(64, 0, 0, 1)
    devices.copy(64, 128, 0, 1)
    devices.register(4096, 0)
    assert driver.calls == []


def test_an_array_that_cannot_be_filled_is_refused(driver: PlayedDriver):
    frozen = np.zeros(4)
    frozen.flags.writeable = False
    for array in (frozen, np.zeros((4, 4), np.float32)[:, ::2]):
        with pytest.raises(ArrayError, match=r"to_host: an array of float\d\d\[4.*contiguous and writeable"):
            devices.to_host(array, 64, 0)
    assert driver.calls == []


CALLS: dict[str, Callable[[], object]] = {
    "cuCtxGetCurrent": lambda: devices.current(0),
    "cuCtxSetCurrent": lambda: devices.new_stream(0),
    "cuDeviceGet": lambda: devices.device_info(0),
    "cuDeviceGetAttribute": lambda: devices.device_info(0),
    "cuDeviceGetName": lambda: devices.device_info(0),
    "cuDeviceTotalMem": lambda: devices.device_info(0),
    "cuDevicePrimaryCtxRetain": lambda: devices.current(0),
    "cuEventCreate": lambda: devices.new_event(0),
    "cuEventDestroy": lambda: devices.destroy_event(5),
    "cuEventQuery": lambda: devices.event_done(5),
    "cuEventRecord": lambda: devices.record(5, 6),
    "cuMemAlloc": lambda: devices.allocate(0, 64, "test"),
    "cuMemGetInfo": lambda: devices.free_bytes(0),
    "cuMemHostGetDevicePointer": lambda: devices.register(4096, 4096),
    "cuMemHostUnregister": lambda: devices.unregister(4096),
    "cuMemcpyAsync": lambda: devices.copy(64, 128, 8, 6),
    "cuMemcpyDtoHAsync": lambda: devices.to_host(np.empty(4), 64, 6),
    "cuMemcpyHtoDAsync": lambda: devices.to_device(64, np.empty(4), 6),
    "cuMemsetD8Async": lambda: devices.fill(64, 0, 8, 6),
    "cuStreamCreate": lambda: devices.new_stream(0),
    "cuStreamDestroy": lambda: devices.destroy_stream(6),
    "cuStreamIsCapturing": lambda: devices.is_capturing(6),
    "cuStreamSynchronize": lambda: devices.synchronize(6),
    "cuStreamWaitEvent": lambda: devices.wait(6, 5),
    "cuThreadExchangeStreamCaptureMode": lambda: devices.event_done(5),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, call: str):
    driver = play(monkeypatch, PlayedDriver(**{call: 700}))
    with pytest.raises(DeviceError, match=f"{call}.*: CUDA_ERROR_700: played text"):
        CALLS[call]()
    assert getattr(driver.on_thread, "mode", 0) == Mode.CU_STREAM_CAPTURE_MODE_GLOBAL
    if call != "cuMemAlloc":
        driver.failing[call] = 2
        with pytest.raises(CapacityError, match=f"{call}.*: CUDA_ERROR_2"):
            CALLS[call]()


def test_hot_calls_are_one_call_each(driver: PlayedDriver):
    assert devices.device_count() == 2
    with devices.current(0):
        made = len(driver.calls)
        devices.record(5, 6)
        devices.wait(7, 5)
        assert devices.is_capturing(77) is True
        assert devices.is_capturing(6) is False
    assert driver.calls[made:-1] == [
        ("cuEventRecord", 5, 6),
        ("cuStreamWaitEvent", 7, 5, 0),
        ("cuStreamIsCapturing", 77),
        ("cuStreamIsCapturing", 6),
    ]


def test_streams_and_events_are_made_on_their_device(driver: PlayedDriver):
    assert devices.new_stream(1) == 501  # does not wait for the default stream
    assert devices.new_event(1) == 602  # takes no time stamps
    with devices.current(0):
        assert devices.new_event() == 602
        driver.failing["cuEventQuery"] = 600
        assert devices.event_done(602) is False
        driver.failing.clear()
        assert devices.event_done(602) is True


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
    devices.allocate(0, 64, "test").release()
    devices.register(4096, 4096)
    devices.unregister(4096)
    devices.event_done(5)
    devices.synchronize(6)
    assert len(modes) == 6 and set(modes.values()) == {Mode.CU_STREAM_CAPTURE_MODE_RELAXED}
    assert driver.on_thread.mode == Mode.CU_STREAM_CAPTURE_MODE_GLOBAL


def test_registered_for_all_devices_at_one_address(driver: PlayedDriver):
    with devices.current(1):
        pass
    devices.register(8192, 4096)
    assert driver.named("cuMemHostRegister") == [("cuMemHostRegister", 8192, 4096, 3)]
    devices.unregister(8192)
    assert driver.named("cuMemHostUnregister") == [("cuMemHostUnregister", 8192)]
    assert driver.named("cuDevicePrimaryCtxRetain") == [("cuDevicePrimaryCtxRetain", 41)]  # no context is made for this


def test_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch):
    play(monkeypatch, PlayedDriver(cuMemHostRegister=801))
    with pytest.raises(CapacityError, match=r"2\.0 MiB at 0x2000: cuMemHostRegister: CUDA_ERROR_801: played text"):
        devices.register(8192, 2 * MIB)


def test_a_device_that_sees_another_address_is_refused(driver: PlayedDriver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver, "_cuMemHostGetDevicePointer", lambda address, flags: (address + 16,))
    with pytest.raises(DeviceError, match="host memory at 0x2000 is at 0x2010 for the device"):
        devices.register(8192, 4096)
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
    allocator: devices.DeviceAllocator = devices.CupyDeviceAllocator()
    region = allocator.allocate(1, 100, "rows")
    assert (region.address, region.size, region.ordinal, cupy.held) == (4096, 100, 1, 1)
    region.release()
    assert cupy.held == 0
    with pytest.raises(CapacityError, match=r"rows: 0\.0 MiB of device 1 wanted, 3\.0 MiB are free"):
        allocator.allocate(1, 101, "rows")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match="rows: memory from CuPy is wanted, and it cannot be imported"):
        allocator.allocate(1, 1, "rows")


# -- on the real one ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_devices_are_there():
    assert devices.device_count() >= 1, devices.why_no_device()
    info = devices.device_info(0)
    assert info.capability >= (7, 0) and info.multiprocessors > 0 and info.name
    assert 0 < devices.free_bytes(0) <= info.total_bytes
    with pytest.raises(DeviceError, match=r"device 99 is wanted, .* there"):
        devices.check_device(99)


@pytest.mark.gpu
def test_gpu_round_trip(stream: int):
    array = np.random.default_rng(0).standard_normal((1000, 33)).astype(np.float32)
    region = devices.allocate(0, 2 * array.nbytes, "test")
    assert region.address % 256 == 0
    devices.to_device(region.address, array, stream)
    devices.copy(region.address + array.nbytes, region.address, array.nbytes, stream)
    devices.fill(region.address, 0xFF, array.nbytes, stream)
    back = np.empty_like(array)
    devices.to_host(back, region.address + array.nbytes, stream)
    assert (back == array).all()
    devices.to_host(back, region.address, stream)
    assert np.isnan(back).all()
    region.release()
    region.release()


@pytest.mark.gpu
def test_gpu_too_much_memory_is_refused_and_the_device_goes_on():
    with pytest.raises(CapacityError, match=r"rows of x: .* MiB of device 0 wanted, .* MiB are free"):
        devices.allocate(0, 1 << 43, "rows of x")
    devices.allocate(0, MIB, "test").release()


@pytest.mark.gpu
def test_gpu_events_order_streams(stream: int):
    other, event = devices.new_stream(0), devices.new_event()
    size = 256 * MIB
    region = devices.allocate(0, size, "test")
    assert devices.event_done(event)  # was never recorded
    back = np.empty(1, np.uint8)
    waited = 0
    for value in range(20):
        for _ in range(20):
            devices.fill(region.address, 255, size, stream)
        devices.fill(region.address, value, size, stream)
        devices.record(event, stream)
        waited += not devices.event_done(event)
        devices.wait(other, event)
        devices.to_host(back, region.address + size - 1, other)
        assert back[0] == value
        assert devices.event_done(event)
    assert waited > 0
    devices.synchronize(stream)
    devices.destroy_event(event)
    devices.destroy_stream(other)
    region.release()


@pytest.mark.gpu
def test_gpu_a_wrong_call_is_an_error_and_the_device_goes_on(stream: int):
    with pytest.raises(DeviceError, match=r"cuMemHostUnregister: CUDA_ERROR_[A-Z_]+: \w+"):
        devices.unregister(4096)
    devices.synchronize(stream)


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
    other = devices.new_stream(0)
    assert not devices.is_capturing(stream)
    with Capture(stream):
        assert devices.is_capturing(stream)
        assert not devices.is_capturing(other)
    assert not devices.is_capturing(stream)
    devices.destroy_stream(other)


@pytest.mark.gpu
def test_gpu_another_thread_works_while_a_stream_is_captured(stream: int):
    region = devices.allocate(0, MIB, "test")
    page = np.zeros(3 * 4096, np.uint8)
    start = -(-page.ctypes.data // 4096) * 4096
    done = []

    def write() -> None:
        own, event = devices.new_stream(0), devices.new_event(0)
        with devices.current(0):
            more = devices.allocate(0, MIB, "in another thread")
            devices.register(start, 8192)
            devices.to_device(more.address, np.arange(100), own)
            back = np.empty(100, np.int64)
            devices.to_host(back, more.address, own)
            devices.record(event, own)
            devices.synchronize(own)
            assert devices.event_done(event)
            devices.unregister(start)
            more.release()
            devices.destroy_event(event)
            devices.destroy_stream(own)
        done.append((back == np.arange(100)).all())

    with Capture(stream):
        devices.fill(region.address, 1, MIB, stream)
        thread = threading.Thread(target=write)
        thread.start()
        thread.join(60)
        devices.fill(region.address, 2, MIB, stream)
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
        seen = devices.is_capturing(torch.cuda.current_stream().cuda_stream)
        devices.allocate(0, MIB, "while this thread captures").release()
        y = x + 1
    assert seen
    graph.replay()
    torch.cuda.synchronize()
    assert (y == 1).all()


@pytest.mark.gpu
def test_gpu_memory_and_streams_are_shared_with_cupy():
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True) as stream:
        array = cupy.arange(1000, dtype=np.int64)
        region = devices.CupyDeviceAllocator().allocate(0, array.nbytes, "test")
        devices.copy(region.address, array.data.ptr, array.nbytes, stream.ptr)
        back = np.empty(1000, np.int64)
        devices.to_host(back, region.address, stream.ptr)
        assert (back == np.arange(1000)).all()
        assert not devices.is_capturing(stream.ptr)
        stream.begin_capture()
        assert devices.is_capturing(stream.ptr)
        stream.end_capture()
        region.release()


@pytest.mark.gpu
def test_gpu_current_is_nearly_free():
    def seconds(calls: int = 2000) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            with devices.current(0):
                pass
        return (time.perf_counter() - start) / calls

    with devices.current(0):
        assert min(seconds() for _ in range(10)) < 2e-6  # half a microsecond, on a machine that is not too busy


REAL_FORK = """
import os
from hps_numba.device import driver as devices
region = devices.allocate(0, 1 << 20, "test")
child = os.fork()
if child == 0:
    region.release()
    print(devices.device_count(), devices.why_no_device(), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
region.release()
print(devices.device_count() > 0)
"""


@pytest.mark.gpu
def test_gpu_a_forked_child_has_no_device():
    why = "a child forked from a process that used CUDA serves from the CPU"
    assert python(REAL_FORK) == f"0 {why}\nTrue\n"
