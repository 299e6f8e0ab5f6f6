"""Regions of host memory: reserved, committed, released."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from support.processes import environment
from support.waiting import HANG_SECONDS

from hps_numba.device import host_memory
from hps_numba.device.host_memory import PlainHostAllocator, human_bytes
from hps_numba.errors import CapacityError, ClosedError

GIB = 1 << 30


def test_a_region_stays_where_it_is_and_reads_as_zero():
    allocator = PlainHostAllocator()
    region = allocator.reserve(GIB, "test")
    address = region.address
    assert address % 64 == 0 and allocator.in_use == 0
    region.commit(100)
    view = region.view(np.uint8, (100,))
    assert not view.any()
    view[:] = 7
    region.commit(50 << 20)
    assert region.address == address
    assert region.view(np.uint8, (101,))[-1] == 0 and (region.view(np.uint8, (100,)) == 7).all()
    assert allocator.in_use == 50 << 20
    region.release()
    region.release()
    assert allocator.in_use == 0
    with pytest.raises(ClosedError):
        region.view(np.uint8, (1,))


def test_memory_is_released_with_the_last_reference():
    allocator = PlainHostAllocator()
    region = allocator.reserve(1 << 20, "test")
    region.commit(1 << 20)
    del region
    assert allocator.in_use == 0


def test_more_than_reserved_or_free_is_refused_with_numbers(monkeypatch):
    region = PlainHostAllocator().reserve(64 << 20, "rows of x")
    with pytest.raises(CapacityError, match=r"rows of x: expected at most the reserved 64\.0 MiB, got 65\.0 MiB"):
        region.commit(65 << 20)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1 << 20)
    with pytest.raises(CapacityError, match=r"rows of x: expected 32\.0 MiB more of free memory, got 1\.0 MiB"):
        region.commit(32 << 20)
    assert region.committed == 0


def test_addresses_for_hundreds_of_large_tables():
    allocator = PlainHostAllocator()
    regions = [allocator.reserve(2 << 40, "rows", least=1 << 20) for _ in range(300)]
    assert regions[0].limit == 1 << 40
    assert min(region.limit for region in regions) >= 8 << 30
    assert sum(region.limit for region in regions) < 64 << 40


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets RLIMIT_AS as Linux has it")
def test_reserve_takes_less_under_a_limit_on_addresses():
    program = (
        "import resource, numpy as np; from hps_numba.storage.host.store import HostStore;"
        "store = HostStore(4); store.upsert(np.arange(9), np.ones((9, 4), np.float32)); store.close();"  # compiled
        "size = int(open('/proc/self/statm').read().split()[0]) * 4096 + (600 << 20);"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size));"
        "store = HostStore(4); store.upsert(np.arange(1000), np.ones((1000, 4), np.float32)); print(len(store))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_SECONDS, env=environment()
    )
    assert done.stdout == "1000\n", done.stderr


def test_human_bytes():
    assert [human_bytes(n) for n in (0, 1023, 1536, 3 << 20, 5 << 30, 7 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 MiB",
        "5.0 GiB",
        "7.0 TiB",
    ]
