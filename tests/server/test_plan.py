"""A plan against what is allocated: twelve configs, counted on the CPU and measured on a GPU, and plans that do not fit.

On the CPU a plan is exact, byte for byte. A GPU hands out memory in blocks of 2 MiB, and the code of kernels is in no plan.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.factories import COLD, Workshop
from support.internals import bytes_in_use, served_model, served_table
from support.services import DIM, Service, cache_of, stats_of
from support.waiting import HANG_SECONDS, join_all, wait_until

import hps_numba
from hps_numba import read_config
from hps_numba.cache.backends import CpuBackend, Memory
from hps_numba.cache.memory_use import CacheMemory
from hps_numba.cache.promised import promised_bytes
from hps_numba.cache.workspace import Workspace
from hps_numba.cli.plan import _show
from hps_numba.device import driver
from hps_numba.device import memory as device_memory
from hps_numba.device.host_memory import PinnedHostAllocator
from hps_numba.errors import CapacityError
from hps_numba.server.plan import DeviceRoom, make_plan

log = logging.getLogger(__name__)
MIB = 1 << 20
BLOCK = 2 * MIB  # in which devices hand out memory


@dataclass(frozen=True)
class Case:
    """A server of one table, and how it is used.

    Attributes:
        rows: on the CPU; 16 times as many on a GPU.   keys: of the largest batch.   entry: of the model.
    """

    dim: int
    rows: int
    keys: int
    entry: dict[str, Any] = field(default_factory=dict)
    cold: bool = False

    @property
    def buffers(self) -> int:
        return int(self.entry.get("num_of_worker_buffer_in_pool", 1))

    def open(self, service: Service, rows: int) -> hps_numba.HPS:
        entry = {"max_batch_size": self.keys // 2, **self.entry}  # of 2 keys each
        if self.cold:
            server, _ = service.open_cold("support.fakes:DictTier", range(rows), COLD, **entry)
            return server
        return service.open((range(rows), self.dim), **entry)


CASES = {
    "lru": Case(DIM, 20_000, 2_048, {"gpucacheper": 0.2}),
    "two_buffers": Case(128, 6_000, 8_192, {"gpucacheper": 0.1, "num_of_worker_buffer_in_pool": 2}),
    "odd_batch": Case(40, 10_000, 10_002, {"gpucacheper": 0.5, "cache_policy": "clock", "miss_path": "direct"}),
    "counts": Case(32, 20_000, 4_096, {"gpucacheper": 0.5, "cache_policy": "lfu", "cache_row_dtype": "float16"}),
    "sketch": Case(17, 30_000, 4_096, {"gpucacheper": 0.3, "cache_policy": "tinylfu", "cache_row_dtype": "int8"}),
    "sets": Case(64, 9_000, 1_024, {"gpucacheper": 0.2, "cache_policy": "s3fifo", "cache_row_dtype": "bfloat16"}),
    "whole": Case(128, 5_000, 1_024, {"gpucacheper": 1.0, "cache_row_dtype": "float8_e4m3"}),
    "by_bytes": Case(8, 40_000, 140_000, {"cache_size_bytes": 400_000, "cache_policy": "sieve"}),
    "static": Case(32, 12_000, 4_096, {"embedding_cache_type": "static"}),
    "pagelock": Case(32, 12_000, 4_096, {"embedding_cache_type": "static", "enable_pagelock": True}),
    "staged": Case(64, 9_000, 4_098, {"embedding_cache_type": "uvm", "gpucacheper": 0.3, "miss_path": "staged"}),
    "slower_tiers": Case(DIM, 8_000, 4_096, {"gpucacheper": 0.6}, cold=True),
}
each_case = pytest.mark.parametrize("name", CASES)


class IdleKernel:
    """A kernel that is not compiled and does nothing: what is allocated does not depend on answers."""

    def launch(self, blocks: int, stream: int, *args: Any, threads: int = 1, rows: int = 1) -> None:
        del blocks, stream, args, threads, rows


class Counted:
    """Counts what backends of the CPU have allocated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: dict[int, int] = {}
        for name in ("allocate", "allocate_pinned"):
            monkeypatch.setattr(CpuBackend, name, self._counting(getattr(CpuBackend, name)))

    def _counting(self, allocate: Callable[..., Memory]) -> Callable[..., Memory]:
        def counted(backend: CpuBackend, size: int, purpose: str) -> Memory:
            memory = allocate(backend, size, purpose)
            number, release = id(memory), memory.release
            self.sizes[number] = size

            def released() -> None:
                self.sizes.pop(number, None)
                release()

            memory.release = released  # type: ignore[method-assign]
            return memory

        return counted

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def at_once(monkeypatch: pytest.MonkeyPatch, buffers: int, look_up: Callable[[], object]) -> None:
    """Call ``look_up`` in so many threads, each with a workspace of its own: none ends before all have one."""
    everyone, reserve = threading.Barrier(buffers), Workspace.reserve

    def reserved(self: Workspace, n: int, absent: bool, stream: int) -> None:
        reserve(self, n, absent, stream)
        everyone.wait(HANG_SECONDS)

    with monkeypatch.context() as patch:
        if buffers > 1:
            patch.setattr(Workspace, "reserve", reserved)
        threads = [threading.Thread(target=look_up) for _ in range(buffers)]
        for thread in threads:
            thread.start()
        join_all(*threads)


def planned_and_taken(server: hps_numba.HPS) -> tuple[CacheMemory, CacheMemory]:
    (table,) = server.plan().tables
    return table.cache, cache_of(server).memory


# -- counted on the CPU -----------------------------------------------------------------------------------------------


@each_case
def test_plan_is_exactly_what_is_allocated(on_cpu: Service, monkeypatch: pytest.MonkeyPatch, name: str) -> None:  # P7
    case, counted = CASES[name], Counted(monkeypatch)
    if case.entry.keys() & {"cache_policy", "cache_row_dtype"} or case.dim != DIM:
        monkeypatch.setattr(CpuBackend, "kernel", lambda backend, spec: IdleKernel())
    server = case.open(on_cpu, case.rows)
    before, _ = planned_and_taken(server)
    keys = np.arange(case.keys) % case.rows
    at_once(monkeypatch, case.buffers, lambda: server.lookup(keys, "m", 0))
    planned, taken = planned_and_taken(server)
    assert planned == taken == before
    assert counted.bytes == planned.bytes == cache_of(server).bytes
    assert planned.pinned_bytes == 0  # in host memory it is memory like any other
    (of_rows,) = server.plan().tables
    assert of_rows.host == stats_of(server).memory
    assert server.plan().host_bytes == of_rows.host_bytes + planned.bytes


@each_case
def test_plan_before_the_start_is_that_of_the_server(on_cpu: Service, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(CpuBackend, "kernel", lambda backend, spec: IdleKernel())
    server = CASES[name].open(on_cpu, CASES[name].rows)
    assert make_plan(server.config).tables == server.plan().tables


def test_smaller_batches_take_what_is_planned_from_the_first_one_on(on_cpu: Service) -> None:
    case = CASES["lru"]
    server = case.open(on_cpu, case.rows)
    for n in (1, 300, case.keys, 5):
        server.lookup(np.arange(n), "m", 0)
        planned, taken = planned_and_taken(server)
        assert planned == taken


def test_larger_batches_than_the_config_says_grow_and_are_counted(on_cpu: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    server = on_cpu.open((range(1000), 17), max_batch_size=100)
    for n in (200, 3000, 70_000):
        server.lookup(np.arange(n) % 1000, "m", 0)
        planned, taken = planned_and_taken(server)
        assert counted.bytes == taken.bytes
    assert taken.workspaces > planned.workspaces
    assert (taken.index, taken.rows, taken.policy) == (planned.index, planned.rows, planned.policy)


def test_plan_follows_a_change_of_the_policy(on_cpu: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    server = on_cpu.open((range(4000), 17), max_batch_size=512)
    for policy in ("tinylfu", "lfu"):
        server.set_policy(policy, "m")
        server.lookup(np.arange(1024), "m", 0)
        planned, taken = planned_and_taken(server)
        assert planned == taken and planned.policy > 0
        assert counted.bytes == taken.bytes


@pytest.mark.parametrize("volatile", [{}, {"overflow_policy": "evict_oldest", "overflow_margin": 10_000}])
def test_plan_of_host_memory_is_exactly_what_is_committed(workshop: Workshop, volatile: dict[str, Any]) -> None:
    section = {"type": "parallel_hash_map", "num_partitions": 1, "allocation_rate": 1 << 20, **volatile}
    server = workshop.open(workshop.model((range(3000), 24)), volatile_db=section)
    (table,) = server.plan().tables
    memory = stats_of(server).memory
    assert (table.host, table.host_bytes) == (memory, memory.bytes) and memory.spare == 0
    assert bytes_in_use(server) - table.host_bytes <= 4096  # the word that readers start from
    server.insert([5000], np.ones((1, 24)), "m", 0)
    grown = stats_of(server).memory
    assert grown.bytes - memory.bytes == table.growth_bytes
    assert grown.rows == memory.rows + 4 * 24


# -- several tables, graphs -------------------------------------------------------------------------------------------


def played_devices(monkeypatch: pytest.MonkeyPatch, room: DeviceRoom) -> None:
    monkeypatch.setattr(driver, "device_count", lambda: 2)
    monkeypatch.setattr("hps_numba.server.plan.room_on", lambda device: room if device < 2 else None)


def on_played_device(monkeypatch: pytest.MonkeyPatch, room: DeviceRoom) -> None:
    """Let caches of device 0 live in memory of the process, which nothing pins."""

    def backend_for(device: int | None) -> CpuBackend:
        backend = CpuBackend()
        backend.ordinal = device
        return backend

    monkeypatch.setattr(driver, "device_count", lambda: 1)
    monkeypatch.setattr("hps_numba.cache.parts.backend_for", backend_for)
    monkeypatch.setattr(CpuBackend, "kernel", lambda backend, spec: IdleKernel())
    monkeypatch.setattr(driver, "check_device", lambda device: None)
    monkeypatch.setattr(driver, "device_info", lambda device: SimpleNamespace(total_bytes=room.total))
    monkeypatch.setattr(device_memory, "free_bytes", lambda device: room.free)
    monkeypatch.setattr(
        "hps_numba.server.model_loader.PinnedHostAllocator",
        lambda: PinnedHostAllocator(lambda address, size: None, lambda address: None),
    )


def device_plan(workshop: Workshop, *tables: tuple[Any, int], top: Any = None, **entry: Any) -> hps_numba.Plan:
    model = workshop.model(*tables, **{"deployed_device_list": [0, 1], "max_batch_size": 1024, **entry})
    return make_plan(read_config({"supportlonglong": True, "models": [model], **(top or {})}))


def test_plan_of_fused_tables_has_one_selection_of_them(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    played_devices(monkeypatch, DeviceRoom(64 << 30, 60 << 30))
    tables = ((range(1000), 16), (range(500), 16), (range(500), 8))
    apart = device_plan(workshop, *tables)
    fused = device_plan(workshop, *tables, top={"fuse_embedding_table": True})
    sizes = [table.group_bytes for table in apart.tables]
    assert sizes[0] > 0 and sizes[1] > 0 and sizes[2] == 0  # nothing shares the launch of the last one
    assert [table.cache.group_workspaces for table in apart.tables] == [0, 0, 0]
    assert [table.cache.group_workspaces for table in fused.tables] == sizes
    assert fused.device_bytes[1] - apart.device_bytes[1] == sum(sizes)


def test_pinned_memory_of_devices_counts_as_host_memory(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    played_devices(monkeypatch, DeviceRoom(64 << 30, 60 << 30))
    plan = device_plan(workshop, (range(1000), 16), embedding_cache_type="static", enable_pagelock=True)
    (table,) = plan.tables
    assert table.cache.rows == 0 and table.cache.pinned_rows >= 1000 * 64
    assert table.pinned_bytes == plan.pinned_bytes == 2 * table.cache.pinned_bytes  # two devices
    assert plan.host_bytes == table.host_bytes + plan.pinned_bytes
    staged = device_plan(workshop, (range(1000), 16), miss_path="staged").tables[0].cache
    assert staged.pinned_staging > 3 * 2048 * 64 and staged.staging > 16 * 2048 and staged.index_mirror == 0


@each_case
def test_plan_of_a_device_is_exactly_what_is_allocated(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:  # P7
    """On a device that there is not: its memory is that of the process, and its kernels do nothing."""
    case, counted = CASES[name], Counted(monkeypatch)
    on_played_device(monkeypatch, DeviceRoom(64 << 30, 60 << 30))
    server = case.open(Service(workshop, 0), case.rows)
    before, _ = planned_and_taken(server)
    cache = served_table(server).cache_on(0)
    assert cache is not None
    keys, out = np.arange(case.keys) % case.rows, np.empty((case.keys, case.dim), np.float32)
    absent = np.empty(1 + case.keys, np.int64)
    at = [array.__array_interface__["data"][0] for array in (keys, out, absent)]
    at_once(monkeypatch, case.buffers, lambda: cache.lookup(at[0], len(keys), at[1], 0, absent_list=at[2] if case.cold else 0))
    if case.cold:
        cache.insert(keys, out)
    wait_for_mirror(server)
    planned, taken = planned_and_taken(server)
    assert planned == taken == before
    assert counted.bytes == planned.bytes + planned.pinned_bytes
    assert (planned.index_mirror > 0) == (
        name in ("lru", "two_buffers", "counts", "sketch", "sets", "by_bytes", "slower_tiers")
    )
    assert promised_bytes(0) == 0
    assert server.plan().device_bytes == {0: planned.bytes}
    assert server.plan().tables[0].host == stats_of(server).memory
    server.close()


def test_promised_memory_is_not_free_for_one_more_model(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    on_played_device(monkeypatch, DeviceRoom(64 << 30, 60 << 30))
    server = Service(workshop, 0).open((range(1000), 16), max_batch_size=1 << 16)
    promised = promised_bytes(0)
    assert promised == server.plan().tables[0].cache.workspaces > MIB
    more = workshop.model((range(1000), 16), name="n", deployed_device_list=[0], max_batch_size=1 << 16)
    needed = make_plan(read_config({"supportlonglong": True, "models": [more]})).devices[0].needed_bytes
    monkeypatch.setattr(device_memory, "free_bytes", lambda device: promised + needed - 1)
    with pytest.raises(CapacityError, match="of device 0"):
        server.load_model(more)
    assert server.models == ("m",) and promised_bytes(0) == promised
    monkeypatch.setattr(device_memory, "free_bytes", lambda device: promised + needed)
    server.load_model(more)
    assert promised_bytes(0) == 2 * promised
    server.close()
    assert promised_bytes(0) == 0


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_a_plan_that_does_not_fit_a_device_names_it_and_the_bytes(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    played_devices(monkeypatch, DeviceRoom(64 << 30, 60 << 30))
    needed = device_plan(workshop, (range(1000), 16)).devices[1].needed_bytes
    played_devices(monkeypatch, DeviceRoom(64 << 30, needed - 1))
    plan = device_plan(workshop, (range(1000), 16))
    assert not plan.fits
    with pytest.raises(
        CapacityError, match=rf"\({needed} bytes\) of device 0, .*\({needed - 1} bytes\) are free; it is workspaces"
    ):
        plan.check()
    played_devices(monkeypatch, DeviceRoom(64 << 30, needed))
    plan = device_plan(workshop, (range(1000), 16))
    plan.check()
    assert plan.index_mirror_bytes == {0: 0, 1: 0}  # no room for what only makes it faster


def test_nothing_is_opened_if_a_device_has_too_little_memory(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    played_devices(monkeypatch, DeviceRoom(64 << 30, 1000))
    monkeypatch.setattr(driver, "check_device", lambda device: None)
    opened: list[object] = []
    monkeypatch.setattr("hps_numba.server.model_loader.open_tiers", lambda *given, **more: opened.append(given))
    with pytest.raises(CapacityError, match="of device 0, 1000 B"):
        workshop.open(workshop.model((range(100), 16), deployed_device_list=[0]))
    assert not opened


def test_a_plan_for_another_machine_says_what_that_needs(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played_devices(monkeypatch, DeviceRoom(64 << 30, 60 << 30))
    plan = device_plan(workshop, (range(1000), 16), deployed_device_list=[0, 5])
    known, unknown = plan.devices
    assert known.memory == unknown.memory and unknown.free_bytes is None and plan.fits
    _show(plan)
    text = capsys.readouterr().out
    assert "on device 0" in text and "of 64.0 GiB free: fits" in text and "device 5" in text
    assert "which this machine does not have" in text


def test_only_mirrors_with_room_are_planned(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = ((range(1000), 16), (range(9000), 16), (range(500), 16))
    played_devices(monkeypatch, DeviceRoom(64 << 30, 60 << 30))
    sizes = [table.index_mirror_bytes for table in device_plan(workshop, *tables).tables]
    played_devices(monkeypatch, DeviceRoom(16 * (sizes[0] + sizes[2]), 60 << 30))  # a 16th is for mirrors
    assert device_plan(workshop, *tables).index_mirror_bytes == {0: sizes[0] + sizes[2], 1: sizes[0] + sizes[2]}


def test_plan_of_a_replacement_takes_no_caches_twice(on_cpu: Service) -> None:
    server = on_cpu.open((range(1000), 17), gpucacheper=0.5)
    plan = served_model(server).plan_of_replacement()
    assert plan.tables[0].cache == CacheMemory() and plan.host_bytes == server.plan().tables[0].host_bytes


def test_cli_shows_the_plan_by_what_it_is_for(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played_devices(monkeypatch, DeviceRoom(64 << 30, 60 << 30))
    plan = device_plan(workshop, (range(1000), 16), (range(500), 16), cache_policy="lfu")
    _show(plan)
    text = capsys.readouterr().out
    for head in ("index mirror", "workspaces", "policy", "device 1", "on top: up to"):
        assert head in text
    told = plan.as_dict()
    assert told["device_bytes"] == {"0": plan.devices[0].bytes, "1": plan.devices[1].bytes}
    assert plan.devices[0].bytes == sum(table.cache.bytes for table in plan.tables)
    assert told["devices"][0]["memory"] == asdict(plan.devices[0].memory)


# -- measured on a GPU ------------------------------------------------------------------------------------------------


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the blocks of device memory that are taken, in order; those that are freed stay on the list."""
    sizes: list[int] = []
    allocate = device_memory.DriverDeviceAllocator.allocate

    def noted(self: Any, ordinal: int, size: int, purpose: str) -> Any:
        sizes.append(size)
        return allocate(self, ordinal, size, purpose)

    monkeypatch.setattr(device_memory.DriverDeviceAllocator, "allocate", noted)
    yield sizes


class OnGpu:
    """Lookups of the largest batch of a case on as many streams as there are worker buffers; their arrays are made first."""

    def __init__(self, case: Case, rows: int) -> None:
        import cupy

        self.case = case
        self.streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(case.buffers)]
        self.keys = cupy.arange(case.keys) % rows
        self.outs = [cupy.empty((case.keys, case.dim), cupy.float32) for _ in self.streams]
        cupy.cuda.Device(0).synchronize()

    def look_up(self, server: hps_numba.HPS, *tables: int) -> None:
        for _ in range(2):  # by then nothing is taken for the first time
            for stream, out in zip(self.streams, self.outs):
                server.lookup(self.keys, "m", 0, 0, out=out, stream=stream.ptr)
        for stream in self.streams:
            stream.synchronize()


@pytest.mark.gpu
@each_case
def test_gpu_plan_is_what_a_device_gives(workshop: Workshop, blocks: list[int], name: str) -> None:  # P7
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("needs the device to itself: run this file without -n")
    case, service = CASES[name], Service(workshop, 0)
    rows = 16 * case.rows
    entry = dict(case.entry)
    if "cache_size_bytes" in entry:
        entry["cache_size_bytes"] *= 16
    case = Case(case.dim, rows, 16 * case.keys, entry, case.cold)
    on_gpu = OnGpu(case, rows)
    with case.open(service, rows) as first:  # loads the code of the kernels, which is in no plan
        on_gpu.look_up(first)
        wait_for_mirror(first)
    free, taken_blocks = device_memory.free_bytes(0), len(blocks)
    server = case.open(service, rows)
    at_start = server.plan()
    on_gpu.look_up(server)
    wait_for_mirror(server)
    planned, taken = planned_and_taken(server)
    measured = free - device_memory.free_bytes(0)
    log.info("%s: planned %d bytes, measured %d: %.3f", name, planned.bytes, measured, planned.bytes / measured)
    pinned = taken.pinned_staging - planned.pinned_staging  # in whole pages
    assert asdict(taken) == {**asdict(planned), "pinned_staging": planned.pinned_staging + pinned} and 0 <= pinned <= 4 * 4096
    assert at_start.device_bytes == {0: planned.bytes}
    assert at_start.tables[0].host == stats_of(server).memory
    assert abs(measured - planned.bytes) <= 0.05 * planned.bytes + BLOCK * (len(blocks) - taken_blocks)
    assert promised_bytes(0) == 0


def wait_for_mirror(server: hps_numba.HPS) -> None:
    """Wait for the index mirror, if the plan has one and the cache may need it."""
    (table,) = server.plan().tables
    cache = served_table(server).cache_on(0)
    assert cache is not None
    if table.index_mirror_bytes and not cache.parts.residency.complete:
        wait_until(lambda: cache.index_mirror_bytes)


@pytest.mark.gpu
def test_gpu_lookups_of_several_tables_and_graphs_take_what_is_planned(workshop: Workshop) -> None:
    cupy = pytest.importorskip("cupy")
    tables, keys = ((range(9000), 32), (range(7000), 32)), cupy.arange(8192) % 7000
    server = Service(workshop, 0).open(*tables, fuse=True, max_batch_size=4096)
    for table in (0, 1):
        server.lookup(keys, "m", table)
    server.lookup_many([keys, keys], "m")
    stream = cupy.cuda.Stream(non_blocking=True)
    out = cupy.empty((len(keys), 32), cupy.float32)
    with stream:
        stream.begin_capture()
        server.lookup(keys, "m", 0, out=out, stream=stream.ptr)
        graph = stream.end_capture()
    graph.launch(stream)
    stream.synchronize()
    plans = server.plan().tables
    caches = [cache_of(server, table) for table in (0, 1)]
    assert [cache.memory.workspaces for cache in caches] == [plan.cache.workspaces for plan in plans]
    assert [cache.memory.group_workspaces for cache in caches] == [plan.group_bytes for plan in plans]
    assert [cache.memory.graphs for cache in caches] == [plans[0].graph_bytes, 0]
