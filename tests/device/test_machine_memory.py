"""What this process may take: of the machine, of its control groups at every level, and under its resource limits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.processes import environment
from support.waiting import HANG_SECONDS, join_all

from hps_numba.device import host_memory, machine_memory
from hps_numba.device.host_memory import PlainHostAllocator
from hps_numba.device.machine_memory import available_bytes, total_bytes
from hps_numba.errors import CapacityError

GIB, MIB = 1 << 30, 1 << 20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits as Linux has them")


def test_the_machine_has_memory():
    assert 0 < available_bytes() <= total_bytes() and total_bytes() > 1 << 28


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes the files of control groups, and the file that says in which ones this process is."""
    monkeypatch.setattr(machine_memory, "_CGROUPS", tmp_path / "sys")
    monkeypatch.setattr(machine_memory, "_PROCESS", tmp_path / "proc")
    (tmp_path / "proc").mkdir()

    def write(own: str, **files: dict[str, str]) -> None:
        (tmp_path / "proc" / "cgroup").write_text(own)
        for folder, contents in files.items():
            (tmp_path / "sys" / folder).mkdir(parents=True, exist_ok=True)
            for name, text in contents.items():
                (tmp_path / "sys" / folder / name).write_text(text)

    return write


def test_the_limit_of_the_own_group_counts(groups):
    groups(
        "0::/system.slice/serve.service\n",
        **{"system.slice/serve.service": {"memory.max": str(64 * MIB), "memory.current": str(16 * MIB), "memory.stat": ""}},
    )
    assert total_bytes() == 64 * MIB and available_bytes() == 48 * MIB


def test_the_tightest_of_the_groups_above_counts(groups):
    groups(
        "0::/slurm/job_1/step_0/task_0\n",
        **{
            "slurm": {"memory.max": "max", "memory.current": str(900 * MIB)},
            "slurm/job_1": {"memory.max": str(80 * MIB), "memory.current": str(70 * MIB), "memory.stat": "anon 1\n"},
            "slurm/job_1/step_0": {"memory.max": str(60 * MIB), "memory.current": str(10 * MIB)},
            "slurm/job_1/step_0/task_0": {"memory.max": "max", "memory.current": "1"},
        },
    )
    assert total_bytes() == 60 * MIB and available_bytes() == 10 * MIB


def test_files_in_memory_are_available(groups):
    stat = f"anon 5\ninactive_file {30 * MIB}\nfile 7\n"
    groups("0::/a\n", a={"memory.max": str(64 * MIB), "memory.current": str(60 * MIB), "memory.stat": stat})
    assert available_bytes() == 34 * MIB


def test_version_1_groups_are_read(groups):
    of_job = {"memory.limit_in_bytes": str(64 * MIB), "memory.usage_in_bytes": str(50 * MIB)}
    of_job["memory.stat"] = f"inactive_file 0\ntotal_inactive_file {10 * MIB}\n"
    root = {"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": str(GIB), "memory.stat": ""}
    groups("12:pids:/x\n4:cpu,memory:/job\n0::/\n", **{"memory/job": of_job, "memory": root})
    assert total_bytes() == 64 * MIB and available_bytes() == 24 * MIB


def test_a_container_that_sees_its_group_as_the_root(groups):
    groups("0::/../../outside\n", **{".": {"memory.max": str(64 * MIB), "memory.current": str(MIB)}})
    assert total_bytes() == 64 * MIB and available_bytes() == 63 * MIB


@pytest.mark.parametrize("stat", ["inactive_file\n", "inactive_file x\n", "inactive_file \n", "\0\n"])
def test_files_of_groups_that_nothing_can_be_read_from(groups, stat):
    groups("0::/a\n", a={"memory.max": str(64 * MIB), "memory.current": str(60 * MIB), "memory.stat": stat})
    assert available_bytes() == 4 * MIB


def test_names_of_groups_are_any_bytes(groups, tmp_path):
    groups("", **{os.fsdecode(b"a\xff:b"): {"memory.max": str(64 * MIB), "memory.current": "0"}})
    (tmp_path / "proc" / "cgroup").write_bytes(b"no colon\n0::/a\xff:b\n")
    assert total_bytes() == 64 * MIB


def test_without_control_groups_the_machine_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_memory, "_CGROUPS", tmp_path / "none")
    monkeypatch.setattr(machine_memory, "_PROCESS", tmp_path / "none")
    assert available_bytes() <= total_bytes()


@linux
def test_address_space_left_under_ulimit():
    program = (
        "import resource; from hps_numba.device.machine_memory import address_space_left as left; print(left());"
        "size = int(open('/proc/self/statm').read().split()[0]) * 4096;"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (300 << 20),) * 2); print(left() >> 20);"
        "resource.setrlimit(resource.RLIMIT_DATA, (200 << 20,) * 2); print(left() < 200 << 20)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_SECONDS, env=environment()
    )
    assert done.returncode == 0, done.stderr
    unlimited, of_addresses, of_data = done.stdout.split()
    assert unlimited == "None" and 250 < int(of_addresses) <= 300 and of_data == "True"


@linux
def test_tables_load_under_a_limit_on_addresses():
    """Four tables of 64 MiB under a limit that leaves room for little more: no table reserves what the next one needs.

    On one thread: each of the pool takes addresses for its stack and its arena, and there are as many as cores.
    """
    program = (
        "import resource, numpy as np; from hps_numba.storage.host.store import HostStore;"
        "from hps_numba.runtime import threads; threads._pool.threads = 1;"
        "store = HostStore(4); store.upsert(np.arange(9), np.ones((9, 4), np.float32)); store.close();"
        "size = int(open('/proc/self/statm').read().split()[0]) * 4096 + (600 << 20);"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size));"
        "keys = np.arange(1 << 17); stores = []\n"
        "for _ in range(4):\n"
        "    stores.append(HostStore(128, rows=1 << 17)); stores[-1].upsert(keys, np.ones((1 << 17, 128), np.float32))\n"
        "print([len(store) for store in stores])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_SECONDS, env=environment()
    )
    assert done.stdout == f"{[1 << 17] * 4}\n", done.stderr


def test_a_plan_counts_the_addresses_that_are_left(monkeypatch):
    from hps_numba.server import plan

    monkeypatch.setattr(plan, "address_space_left", lambda: 1 << 20)
    made = plan.plan_of([])
    assert made.available_bytes == 1 << 20 and not made.fits
    monkeypatch.setattr(plan, "address_space_left", lambda: None)
    monkeypatch.setattr(plan, "available_bytes", lambda: plan.LOADING_BYTES)
    assert plan.plan_of([]).fits


@linux
def test_tables_that_grow_together_are_not_promised_the_same_memory(monkeypatch):
    monkeypatch.setattr(host_memory, "_promises", host_memory._Promises())  # without the tables of other tests
    free = 100 * MIB
    monkeypatch.setattr(host_memory, "available_bytes", lambda: free)
    allocator = PlainHostAllocator()
    first, second = (allocator.reserve(GIB, name) for name in ("first", "second"))
    first.commit(64 * MIB)  # not written yet, so the machine still has 100 MiB free
    with pytest.raises(CapacityError, match=r"second: .*64\.0 MiB more .*other tables were promised 64\.0 MiB"):
        second.commit(64 * MIB)
    first.view(np.uint8, (64 * MIB,))[:] = 1  # written: what is free now says it
    second.commit(64 * MIB)
    assert allocator.in_use == 128 * MIB
    with pytest.raises(CapacityError):
        first.commit(128 * MIB)
    second.release()
    first.commit(128 * MIB)


def test_a_commit_that_failed_promises_nothing(monkeypatch):
    monkeypatch.setattr(host_memory, "_promises", host_memory._Promises())  # without the tables of other tests
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 100 * MIB)
    allocator = PlainHostAllocator()
    first, second = (allocator.reserve(GIB, name) for name in ("first", "second"))

    def refuse(region, end):
        raise CapacityError("cannot be pinned")

    with monkeypatch.context() as patch:
        patch.setattr(allocator, "on_commit", refuse)
        with pytest.raises(CapacityError, match="pinned"):
            first.commit(64 * MIB)
    second.commit(64 * MIB)
    assert first.committed == 0 and second.committed == 64 * MIB


def test_a_signal_handler_may_commit_inside_a_commit(monkeypatch):
    """The handler of a signal, or ``__del__``, may write to another table in the midst of a commit."""
    monkeypatch.setattr(host_memory, "_promises", host_memory._Promises())  # without the tables of other tests
    allocator = PlainHostAllocator()
    first, second, third = (allocator.reserve(GIB, name) for name in ("first", "second", "third"))
    for region in (first, second):
        region.commit(8 * MIB)
        region.view(np.uint8, (8 * MIB,))[:] = 1
    unwritten = host_memory._unwritten_bytes

    def nested(region, start, end):
        monkeypatch.setattr(host_memory, "_unwritten_bytes", unwritten)
        allocator.reserve(GIB, "fourth").commit(8 * MIB)
        return unwritten(region, start, end)

    monkeypatch.setattr(host_memory, "_unwritten_bytes", nested)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 60 * MIB)
    thread = threading.Thread(target=third.commit, args=(48 * MIB,), daemon=True)
    thread.start()
    join_all(thread)
    assert third.committed == 48 * MIB


@linux
def test_many_tables_that_load_at_a_time_are_not_refused(monkeypatch):
    """30 tables in 8 threads, which take nearly all that is free."""
    monkeypatch.setattr(host_memory, "_promises", host_memory._Promises())
    allocator, tables, size = PlainHostAllocator(), 30, 8 * MIB
    regions = [allocator.reserve(GIB, f"table {i}") for i in range(tables)]
    written = np.zeros(tables, np.int64)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: (tables + 1) * size - int(written.sum()))

    def load(number):
        for part in range(2):
            end = (part + 1) * size // 2
            regions[number].commit(end)
            regions[number].view(np.uint8, (end,))[end - size // 2 :] = 1
            written[number] = end

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load, range(tables)))
    assert allocator.in_use == tables * size
