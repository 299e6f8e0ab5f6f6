"""The CUDA driver as the package sees it: played, absent, and (marker gpu) real; contexts, errors and forks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.factories import has_cuda_device
from support.played_driver import MIB, Mode, PlayedDriver, load_by, play
from support.processes import environment
from support.steps import steps_of
from support.waiting import HANG_SECONDS, join_all

from hps_numba.device import driver as devices
from hps_numba.device import memory, streams
from hps_numba.errors import CapacityError, DeviceError


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


def python(program: str) -> str:
    """What a program prints in a process of its own, with the tests on its path."""
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", program]  # of forks beside threads
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- no device ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(has_cuda_device(), reason="is about machines without a device")
def test_this_machine_has_no_device_and_says_why():
    assert devices.device_count() == 0
    assert "CUDA" in devices.why_no_device() and "\n" not in devices.why_no_device()
    with pytest.raises(DeviceError, match=r"device 0: expected a CUDA device, got none: .*CUDA"):
        devices.current(0)
    with pytest.raises(DeviceError, match=r"no CUDA device can be used: .*CUDA"):
        streams.record(1, 2)


def test_without_the_packages_there_is_no_device():
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['cuda', 'cuda.bindings', 'cupy', 'torch']));"
        "from hps_numba.device import driver as devices; print(devices.device_count()); print(devices.why_no_device())"
    )
    count, why = python(program).splitlines()
    assert count == "0"
    assert why.startswith("the CUDA packages cannot be imported (pip install 'hps-numba[cuda13]'): ")


def test_importing_loads_no_driver():
    program = (
        "import sys, hps_numba.device.host_memory, hps_numba.device.driver\n"
        "print({'cuda', 'cupy', 'torch', 'numba'} & set(sys.modules))"
    )
    assert python(program) == "set()\n"


def broken() -> Any:
    raise OSError("half an installation\nand more")


def no_library(*_: Any) -> tuple[Any, ...]:
    raise RuntimeError("libcuda.so.1 is not there")


class DynamicLibNotFoundError(RuntimeError):
    """As ``cuda.pathfinder`` raises it."""


def not_installed(*_: Any) -> tuple[Any, ...]:
    raise DynamicLibNotFoundError('"cuda" is an NVIDIA driver library and can only be found via system search. Ensure that.')


@pytest.mark.parametrize(
    ("load", "why"),
    [
        (lambda: SimpleNamespace(cuInit=not_installed), "no CUDA driver is installed"),
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
    load_by(monkeypatch, load)
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
    [(1, 1, "device: expected 0, the only device, got 1"), (4, -1, "device: expected 0 to 3, got -1")],
)
def test_a_missing_device_is_named(monkeypatch: pytest.MonkeyPatch, count: int, ordinal: int, message: str):
    driver = play(monkeypatch, PlayedDriver(count))
    for call in (devices.check_device, devices.current, devices.device_info, memory.free_bytes, streams.new_stream):
        with pytest.raises(DeviceError, match=message):
            call(ordinal)
    assert not driver.named("cuDevicePrimaryCtxRetain")


FORKED = """
import logging, os, sys
import numpy as np
from support.played_driver import PlayedDriver, play
import pytest
from hps_numba.device import driver as devices, memory, streams
from hps_numba.errors import DeviceError
driver = play(pytest.MonkeyPatch(), PlayedDriver({count}))
said = []
class Handler(logging.Handler):
    def emit(self, record): said.append((record.levelname, record.getMessage()))
logging.getLogger("hps_numba.device.driver").addHandler(Handler())
region = memory.allocate(0, 64, "test") if devices.device_count() else None
child = os.fork()
if child == 0:
    made = len(driver.calls)
    devices.device_count(), devices.device_count()
    if region is not None:
        region.release()
        streams.destroy_event(5), streams.destroy_stream(6), memory.unregister(4096)
    try: memory.allocate(0, 64, "test")
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
    assert child == f"0 [('WARNING', '{why}')] 0 device 0: expected a CUDA device, got none: {why}"
    assert (parent, memory) == ("2 []", "0")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_of_a_process_without_devices_says_nothing():
    child, parent, _ = python(FORKED.format(count=0)).splitlines()
    assert child.startswith("0 [] 0 device 0: expected a CUDA device, got none: the driver shows no device")
    assert parent == "0 []"


def test_a_driver_that_another_library_used_before_the_fork(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    play(monkeypatch, PlayedDriver(cuInit=3))
    with caplog.at_level(logging.WARNING, "hps_numba.device.driver"):
        assert devices.device_count() == devices.device_count() == 0
    assert caplog.messages == ["a child forked from a process that used CUDA serves from the CPU"]
    streams.destroy_stream(5)  # whatever it is, it is the parent's


# -- on the played driver -------------------------------------------------------------------------------------------------


def test_device_info(driver: PlayedDriver):
    assert devices.device_info(1) == devices.DeviceInfo(1, "played 41", (9, 0), 132, 80 << 30)
    assert memory.free_bytes(1) == 3 * MIB
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
        start.wait(HANG_SECONDS)
        for ordinal in (0, 1, 0):
            with devices.current(ordinal):
                assert driver.on_thread.context == 1040 + ordinal

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert sorted(driver.named("cuDevicePrimaryCtxRetain")) == [
        (("cuDevicePrimaryCtxRetain"), 40),
        ("cuDevicePrimaryCtxRetain", 41),
    ]


CALLS: dict[str, Callable[[], object]] = {
    "cuCtxGetCurrent": lambda: devices.current(0),
    "cuCtxSetCurrent": lambda: streams.new_stream(0),
    "cuDeviceGet": lambda: devices.device_info(0),
    "cuDeviceGetAttribute": lambda: devices.device_info(0),
    "cuDeviceGetName": lambda: devices.device_info(0),
    "cuDeviceTotalMem": lambda: devices.device_info(0),
    "cuDevicePrimaryCtxRetain": lambda: devices.current(0),
    "cuEventCreate": lambda: streams.new_event(0),
    "cuEventDestroy": lambda: streams.destroy_event(5),
    "cuEventQuery": lambda: streams.event_done(5),
    "cuEventRecord": lambda: streams.record(5, 6),
    "cuMemAlloc": lambda: memory.allocate(0, 64, "test"),
    "cuMemGetInfo": lambda: memory.free_bytes(0),
    "cuMemHostGetDevicePointer": lambda: memory.register(4096, 4096),
    "cuMemHostUnregister": lambda: memory.unregister(4096),
    "cuMemcpyAsync": lambda: memory.copy(64, 128, 8, 6),
    "cuMemcpyDtoHAsync": lambda: memory.to_host(np.empty(4), 64, 6),
    "cuMemcpyHtoDAsync": lambda: memory.to_device(64, np.empty(4), 6),
    "cuMemsetD8Async": lambda: memory.fill(64, 0, 8, 6),
    "cuStreamCreate": lambda: streams.new_stream(0),
    "cuStreamDestroy": lambda: streams.destroy_stream(6),
    "cuStreamIsCapturing": lambda: streams.is_capturing(6),
    "cuStreamSynchronize": lambda: streams.synchronize(6),
    "cuStreamWaitEvent": lambda: streams.wait(6, 5),
    "cuThreadExchangeStreamCaptureMode": lambda: streams.event_done(5),
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


# -- on the real one ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_devices_are_there():
    assert devices.device_count() >= 1, devices.why_no_device()
    info = devices.device_info(0)
    assert info.capability >= (7, 0) and info.multiprocessors > 0 and info.name
    assert 0 < memory.free_bytes(0) <= info.total_bytes
    with pytest.raises(DeviceError, match=r"device: expected 0.*, got 99"):
        devices.check_device(99)


@pytest.mark.gpu
def test_gpu_current_is_nearly_free():
    def again() -> None:
        with devices.current(0):
            pass

    with devices.current(0):
        assert 0 < steps_of(again) <= 20  # 12 on an H200


REAL_FORK = """
import os
from hps_numba.device import driver as devices, memory
region = memory.allocate(0, 1 << 20, "test")
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
