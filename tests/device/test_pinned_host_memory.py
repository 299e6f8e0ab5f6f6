"""Pinned host memory: what is registered, in which order, and that nothing stays; with marker gpu, that a device sees it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pinned import MIB, PAGE, Registrar, seen_by_device
from support.played_driver import load_by
from support.processes import environment
from support.waiting import HANG_SECONDS

from hps_numba.device import driver, host_memory, memory, streams
from hps_numba.device.host_memory import PinnedHostAllocator
from hps_numba.errors import CapacityError, DeviceError
from hps_numba.storage.host.store import HostStore


def test_a_commit_registers_pages_and_a_release_gives_all_back():
    registrar = Registrar()
    allocator = registrar.allocator()
    region = allocator.reserve(64 * MIB, "rows")
    start = region.address
    assert registrar.log == []
    region.commit(5 * MIB + 1)
    first = 5 * MIB + PAGE
    assert registrar.of(region) == [(0, first)]
    assert (region.committed, allocator.in_use) == (first, first)
    region.commit(first)
    assert len(registrar.log) == 1
    region.commit(first + 1)  # a little more takes a step
    region.commit(20 * MIB)
    second = first + 2 * MIB
    assert registrar.of(region) == [(0, first), (first, 2 * MIB), (second, 20 * MIB - second)]
    assert (region.address, region.committed, allocator.in_use) == (start, 20 * MIB, 20 * MIB)
    region.view(np.uint8, (20 * MIB,))[:] = 7
    region.release()
    region.release()
    assert registrar.ranges == {}
    assert [(what, address - start) for what, address, _ in registrar.log[3:]] == [
        ("unregister", second),
        ("unregister", first),
        ("unregister", 0),
    ]
    assert allocator.in_use == 0


@pytest.mark.parametrize("limit", [1, 64, PAGE, PAGE + 1, 2 * MIB - 5, 2 * MIB, 3 * MIB + 17])
def test_a_region_registers_no_page_beyond_its_reserve(limit: int):
    registrar = Registrar()
    region = registrar.allocator().reserve(limit, "header")
    region.commit(1)
    assert registrar.bytes == region.committed == min(-(-limit // PAGE) * PAGE, 2 * MIB)
    region.commit(limit)
    assert registrar.bytes == region.committed == -(-limit // PAGE) * PAGE
    with pytest.raises(CapacityError, match="expected at most the reserved"):
        region.commit(region.committed + 1)
    region.release()
    assert registrar.ranges == {}


@given(st.lists(st.integers(1, 5 * MIB), max_size=30), st.integers(1, 80 * MIB))
def test_what_is_registered_is_what_is_committed(steps: list[int], limit: int):
    registrar = Registrar()
    allocator = registrar.allocator()
    region = allocator.reserve(limit, "rows")
    asked = 0
    for step in steps:
        asked = min(limit, asked + step)
        region.commit(asked)
        end = 0
        for offset, size in registrar.of(region):
            assert offset == end
            end += size
        assert asked <= end == region.committed == allocator.in_use == registrar.bytes
        assert end <= max(asked + PAGE, 2 * MIB, asked + 2 * MIB)
    region.release()
    assert registrar.ranges == {} and allocator.in_use == 0


def test_a_growing_table_does_not_end_in_thousands_of_registrations(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1 << 50)
    ranges: list[int] = []
    allocator = PinnedHostAllocator(lambda address, size: ranges.append(size), lambda address: None)
    region = allocator.reserve(1 << 40, "rows")  # nothing is touched, so nothing is taken
    size = 0
    while region.committed < 256 << 30:
        size = region.committed + 4096
        region.commit(size)
    assert len(ranges) < 400
    assert min(ranges) >= 2 * MIB
    region.release()


def test_memory_is_unregistered_with_the_last_reference_too():
    registrar = Registrar()
    allocator = registrar.allocator()
    region = allocator.reserve(MIB, "test")
    region.commit(MIB)
    assert registrar.bytes == MIB
    del region
    assert registrar.ranges == {} and allocator.in_use == 0


def test_memory_that_cannot_be_pinned_is_refused_and_the_rest_stays():
    registrar = Registrar(limit=8 * MIB)
    allocator = registrar.allocator()
    region = allocator.reserve(64 * MIB, "rows of x")
    region.commit(6 * MIB)
    region.view(np.uint8, (6 * MIB,))[:] = 7
    message = r"rows of x: 4\.0 MiB of host memory cannot be pinned: cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY: out of memory"
    with pytest.raises(CapacityError, match=message):
        region.commit(10 * MIB)
    assert (region.committed, allocator.in_use, registrar.of(region)) == (6 * MIB, 6 * MIB, [(0, 6 * MIB)])
    assert (region.view(np.uint8, (6 * MIB,)) == 7).all()
    region.commit(8 * MIB)
    assert registrar.of(region) == [(0, 6 * MIB), (6 * MIB, 2 * MIB)]
    region.release()
    assert registrar.ranges == {} and allocator.in_use == 0


def test_the_machine_is_asked_for_what_is_pinned(monkeypatch: pytest.MonkeyPatch):
    registrar = Registrar()
    region = registrar.allocator().reserve(64 * MIB, "rows of x")
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 16 * MIB)
    with pytest.raises(CapacityError, match=r"rows of x: expected 17\.0 MiB more of free memory, got 16\.0 MiB"):
        region.commit(17 * MIB)
    assert (registrar.log, region.committed) == ([], 0)


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("registered", [False, True])
def test_an_interrupted_commit_is_repeated(registered: bool, caplog: Any):
    registrar = Registrar()
    interrupts = [True]

    def register(address: int, size: int) -> None:
        if registered or not interrupts:
            registrar.register(address, size)
        if interrupts and interrupts.pop():
            raise Interrupted

    region = PinnedHostAllocator(register, registrar.unregister).reserve(16 * MIB, "rows")
    with pytest.raises(Interrupted):
        region.commit(4 * MIB)
    assert region.committed == 0
    with caplog.at_level(logging.WARNING, "hps_numba.device.host_memory"):
        region.commit(5 * MIB)
    assert registrar.of(region) == [(0, 5 * MIB)]
    assert len(caplog.messages) == (not registered)
    region.release()
    assert registrar.ranges == {}


def test_a_region_is_released_even_if_the_device_is_lost(caplog: Any):
    registrar = Registrar()
    allocator = registrar.allocator()
    region = allocator.reserve(16 * MIB, "rows of x")
    region.commit(2 * MIB)
    region.commit(4 * MIB)
    registrar.ranges.clear()
    with caplog.at_level(logging.WARNING, "hps_numba.device.host_memory"):
        region.release()
    expected = (
        "rows of x: pinned host memory was not unregistered: cuMemHostUnregister: CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED: "
    )
    assert [message.startswith(expected) for message in caplog.messages] == [True, True]
    assert allocator.in_use == 0


def test_without_a_device_pinning_is_an_error(monkeypatch: pytest.MonkeyPatch):
    load_by(monkeypatch, lambda: __import__("no_such_package"))
    region = PinnedHostAllocator().reserve(MIB, "rows of x")
    with pytest.raises(
        DeviceError, match=r"rows of x: 1\.0 MiB of host memory cannot be pinned: device 0: expected a CUDA device, got none"
    ):
        region.commit(MIB)
    assert region.committed == 0
    region.release()


def test_a_host_store_in_pinned_memory():
    registrar = Registrar()
    allocator = registrar.allocator()
    store = HostStore(8, name="t", allocator=allocator, growth_bytes=64 << 10)
    rows = np.arange(20_000 * 8, dtype=np.float32).reshape(-1, 8)
    for start in range(0, 20_000, 1000):
        store.upsert(np.arange(start, start + 1000), rows[start : start + 1000])
    out = np.empty_like(rows)
    assert store.lookup(np.arange(20_000), out) == 0
    assert (out == rows).all()
    assert registrar.bytes == allocator.in_use >= rows.nbytes
    store.close()
    assert registrar.bytes == allocator.in_use == PAGE  # the header goes with the store
    del store
    assert registrar.ranges == {} and allocator.in_use == 0
    assert {what for what, _, _ in registrar.log} == {"register", "unregister"}


def run(program: str) -> str:
    """What a program prints in a process of its own, with the tests on its path."""
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", program]  # of forks beside threads
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
import os
import numpy as np
from support.pinned import Registrar, MIB
registrar = Registrar()
allocator = registrar.allocator()
region = allocator.reserve(64 * MIB, "rows")
region.commit(2 * MIB)
region.view(np.uint8, (MIB,))[:] = 7
child = os.fork()
if child == 0:
    before = len(registrar.log)
    assert (region.view(np.uint8, (MIB,)) == 7).all()
    region.commit(2 * MIB + 1)
    assert region.committed == 2 * MIB + 1
    other = allocator.reserve(MIB, "other")
    other.commit(5)
    region.view(np.uint8, (region.committed,))[:] = 9
    region.release()
    other.release()
    print(len(registrar.log) - before, allocator.in_use, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert (region.view(np.uint8, (MIB,)) == 7).all()
region.commit(4 * MIB)
print(registrar.of(region) == [(0, 2 * MIB), (2 * MIB, 2 * MIB)])
region.release()
print(registrar.ranges)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_reads_grows_and_releases_without_the_driver():
    assert run(FORK) == "0 0\nTrue\n{}\n"


# -- on a device ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_a_growing_region_is_read_by_the_device():
    allocator = PinnedHostAllocator()
    region = allocator.reserve(1 << 30, "rows")
    address = region.address
    random = np.random.default_rng(0)
    bytes_ = random.integers(0, 256, 70 * MIB, np.uint8)
    for end in (1, 100, 3 * MIB + 5, 64 * MIB, 70 * MIB):
        region.commit(end)
        region.view(np.uint8, (end,))[:] = bytes_[:end]
        assert (seen_by_device(address, end) == bytes_[:end]).all()  # also across the ends of pieces
    assert allocator.in_use == region.committed
    region.release()
    with pytest.raises(DeviceError):
        memory.unregister(address)
    assert allocator.in_use == 0


@pytest.mark.gpu
def test_gpu_the_device_writes_to_pinned_memory():
    region = PinnedHostAllocator().reserve(4 * MIB, "rows")
    region.commit(4 * MIB)
    with driver.current(0):
        stream = streams.new_stream(0)
        source = memory.allocate(0, 4 * MIB, "test")
        memory.fill(source.address, 5, 4 * MIB, stream)
        memory.copy(region.address, source.address, 4 * MIB, stream)
        streams.synchronize(stream)
        assert (region.view(np.uint8, (4 * MIB,)) == 5).all()
        source.release()
        streams.destroy_stream(stream)
    region.release()


@pytest.mark.gpu
def test_gpu_every_device_reads_what_one_registration_pinned():
    region = PinnedHostAllocator().reserve(MIB, "rows")
    region.commit(MIB)
    region.view(np.uint8, (MIB,))[:] = 9
    for ordinal in range(driver.device_count()):
        with driver.current(ordinal):
            stream, there = streams.new_stream(ordinal), memory.allocate(ordinal, MIB, "test")
            back = np.empty(MIB, np.uint8)
            memory.copy(there.address, region.address, MIB, stream)
            memory.to_host(back, there.address, stream)
            assert (back == 9).all()
            there.release()
            streams.destroy_stream(stream)
    region.release()


REAL_FORK = """
import os
import numpy as np
from support.pinned import MIB, seen_by_device
from hps_numba.device.host_memory import PinnedHostAllocator
region = PinnedHostAllocator().reserve(64 * MIB, "rows")
region.commit(16 * MIB)
view = region.view(np.uint8, (16 * MIB,))
view[:] = 1
(to_child, from_parent), (to_parent, from_child) = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    os.read(to_child, 1)                      # until the parent has written
    ok = (view == 1).all()
    view[:] = 3
    os.write(from_child, b"x")
    del view
    region.commit(20 * MIB)
    region.release()
    os._exit(0 if ok else 1)
view[:] = 2
print((seen_by_device(region.address, 16 * MIB) == 2).all())
os.write(from_parent, b"x")
os.read(to_parent, 1)
print((view == 2).all() and (seen_by_device(region.address, 16 * MIB) == 2).all())
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
region.commit(32 * MIB)
region.view(np.uint8, (32 * MIB,))[:] = 4
print((seen_by_device(region.address, 32 * MIB) == 4).all())
del view
region.release()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="is about fork as Linux has it")
def test_gpu_a_fork_separates_child_and_parent_and_the_device_stays_with_the_parent():
    assert run(REAL_FORK) == "True\nTrue\nTrue\n"
