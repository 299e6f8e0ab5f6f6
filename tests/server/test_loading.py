"""Loading of sparse models into a server: odd sizes, keys that do not fit, duplicates, failures, and peak memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.fakes import NaiveStore
from support.internals import bytes_in_use
from support.oracles import assert_same_bits, rows_of
from support.processes import environment
from support.waiting import HANG_SECONDS, wait_until

import hps_numba
from hps_numba.device.host_memory import PlainHostAllocator
from hps_numba.errors import CapacityError, ModelFileError
from hps_numba.storage import loading

DIM = 3
BOUND = {"type": "hash_map", "num_partitions": 1, "overflow_margin": 20, "max_batch_size": 7}
DICT_TIER = {"type": "support.fakes:DictTier"}
PERSISTENT_ONLY: dict[str, Any] = {"volatile_db": {}, "persistent_db": DICT_TIER}


@pytest.fixture
def allocators(monkeypatch: pytest.MonkeyPatch) -> list[PlainHostAllocator]:
    """The allocators of all servers made in a test."""
    made: list[PlainHostAllocator] = []

    def make() -> PlainHostAllocator:
        made.append(PlainHostAllocator())
        return made[-1]

    monkeypatch.setattr("hps_numba.server.model_loader.PlainHostAllocator", make)
    return made


def left(allocators: list[PlainHostAllocator]) -> int:
    """Bytes still in use once the error and what it refers to are gone."""
    gc.collect()
    return sum(allocator.in_use for allocator in allocators)


# --- what is in the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", range(10))
@pytest.mark.parametrize("cache_type", ["dynamic", "static", "uvm"])
def test_tables_of_0_to_9_rows(workshop: Workshop, rows: int, cache_type: str) -> None:  # F09
    keys = list(range(rows))
    server = workshop.open(workshop.model((keys, DIM), embedding_cache_type=cache_type))
    assert_same_bits(server.lookup(keys, "m", 0), rows_of(keys, DIM).reshape(-1, DIM))
    assert (server.lookup([rows, -1], "m", 0) == -7.5).all()
    assert server.stats()["m"]["sparse_embedding0"].rows == rows
    assert server.insert([rows], rows_of([rows], DIM), "m", 0) == 1
    assert_same_bits(server.lookup([rows], "m", 0), rows_of([rows], DIM))


@pytest.mark.parametrize("cache_type", ["dynamic", "static", "uvm"])
@pytest.mark.parametrize("databases", [{}, {"volatile_db": BOUND, "persistent_db": DICT_TIER}, PERSISTENT_ONLY])
def test_the_last_of_equal_keys_wins(workshop: Workshop, databases: dict[str, Any], cache_type: str) -> None:  # F08
    keys = np.array([5, 1, 5, 2, 1, 5, 3])
    entry = workshop.model((keys, DIM), embedding_cache_type=cache_type)
    rows = rows_of(np.arange(7), DIM, 1)
    rows.tofile(Path(entry["sparse_files"][0], "emb_vector"))
    truth = NaiveStore(DIM)
    truth.upsert(keys, rows)
    server = workshop.open(entry, **databases)
    expected = np.stack([truth.rows[key] for key in (1, 2, 3, 5)])
    assert_same_bits(server.lookup([1, 2, 3, 5], "m", 0), expected)
    assert_same_bits(expected, rows[[4, 3, 6, 5]])


def test_the_last_of_equal_keys_wins_across_chunks(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:  # F08
    monkeypatch.setattr(loading, "_CHUNK_BYTES", 5 * (4 * DIM + 8))
    keys = np.random.default_rng(0).integers(0, 30, 98)
    entry = workshop.model((keys, DIM))
    rows = rows_of(np.arange(98), DIM)
    rows.tofile(Path(entry["sparse_files"][0], "emb_vector"))
    truth = NaiveStore(DIM)
    truth.upsert(keys, rows)
    for databases in ({}, PERSISTENT_ONLY):
        server = workshop.open(entry, **databases)
        assert_same_bits(server.lookup(list(truth.rows), "m", 0), np.stack(list(truth.rows.values())))
    bound = workshop.open(entry, volatile_db={**BOUND, "overflow_margin": 25})
    kept = [key for key in truth.rows if bound.contains([key], "m", 0)[0]]
    assert 20 <= len(kept) <= 25
    assert_same_bits(bound.lookup(kept, "m", 0), np.stack([truth.rows[key] for key in kept]))


@pytest.mark.parametrize("key", [-1, 2**32, -(2**31), 2**63 - 1])
@pytest.mark.parametrize("databases", [{}, {"volatile_db": BOUND}, PERSISTENT_ONLY])
def test_a_key_wider_than_32_bits_is_refused_by_a_32_bit_server(
    workshop: Workshop, allocators: list[PlainHostAllocator], key: int, databases: dict[str, Any]
) -> None:  # F03
    keys = [*range(40), key, 50]
    with pytest.raises(ModelFileError, match=rf"m_0\.model: key {key} at row 40 does not fit 32 bits"):
        workshop.open(workshop.model((keys, DIM)), supportlonglong=False, **databases)
    wait_until(lambda: left(allocators) == 0)
    assert_same_bits(workshop.open(workshop.model((keys, DIM)), **databases).lookup([50], "m", 0), rows_of([50], DIM))


def test_32_bit_servers_load_every_uint32_key(workshop: Workshop) -> None:  # F03
    keys = np.array([0, 2**31 - 1, 2**31, 2**32 - 1])
    server = workshop.open(workshop.model((keys, DIM)), supportlonglong=False)
    assert_same_bits(server.lookup(keys.astype(np.uint32), "m", 0), rows_of(keys, DIM))


def test_a_bounded_table_keeps_its_bound_and_counts_evictions(workshop: Workshop) -> None:  # D11
    server = workshop.open(workshop.model((range(100), DIM)), volatile_db=BOUND)
    stats = server.stats()["m"]["sparse_embedding0"]
    assert 16 <= stats.rows <= 20
    assert stats.rows + stats.evicted == 100
    kept = np.flatnonzero(server.contains(range(100), "m", 0))
    assert_same_bits(server.lookup(kept, "m", 0), rows_of(kept, DIM))
    assert server.plan().tables[0].host_rows == 27


@pytest.mark.parametrize("policy", ["evict_random", "evict_least_used", "evict_oldest"])
def test_a_bounded_table_takes_the_planned_memory(workshop: Workshop, policy: str) -> None:  # D11, F04
    bound = {**BOUND, "overflow_margin": 100, "max_batch_size": 50, "overflow_policy": policy}
    for keys in (range(80), range(1000)):
        server = workshop.open(workshop.model((keys, DIM)), volatile_db=bound)
        assert server.host_bytes <= bytes_in_use(server) <= 1.15 * server.plan().host_bytes + 64


# --- failures leave no memory in use ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "truncated", "width", "no key"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_model_leaves_no_memory_in_use(
    workshop: Workshop, allocators: list[PlainHostAllocator], which: int, damage: str
) -> None:
    entry = workshop.model((range(500), 64), (range(500), 64))
    folder = Path(entry["sparse_files"][which])
    if damage == "missing":
        entry["sparse_files"][which] = str(workshop.folder / "missing" / folder.name)
    elif damage == "truncated":
        os.truncate(folder / "emb_vector", 64 * 4 * 400)
    elif damage == "width":
        rows_of(range(500), 32).tofile(folder / "emb_vector")
    else:
        (folder / "key").unlink()
    with pytest.raises(ModelFileError, match=folder.name):
        workshop.open(entry)
    wait_until(lambda: left(allocators) == 0)


@pytest.mark.parametrize("chunk", [0, 1, 2, 5])
def test_a_disk_failure_during_loading_leaves_no_memory_in_use(
    workshop: Workshop, allocators: list[PlainHostAllocator], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    entry = workshop.model((range(100), 64), (range(600), 64))
    monkeypatch.setattr(loading, "_CHUNK_BYTES", 100 * (4 * 64 + 8))
    open_model = hps_numba.open_model
    reads = []

    def failing(path: str, dim: int) -> Any:
        reader = open_model(path, dim)
        read = reader.read

        def counted(start: int, stop: int, keys: Any, rows: Any) -> None:
            reads.append(start)
            if len(reads) == chunk + 2:
                raise ModelFileError(f"{path}: the disk failed at row {start}")
            read(start, stop, keys, rows)

        monkeypatch.setattr(reader, "read", counted)
        return reader

    monkeypatch.setattr("hps_numba.server.table_loading.open_model", failing)
    with pytest.raises(ModelFileError, match="the disk failed at row"):
        workshop.open(entry)
    wait_until(lambda: left(allocators) == 0)
    monkeypatch.setattr("hps_numba.server.table_loading.open_model", open_model)
    assert_same_bits(workshop.open(entry).lookup([599], "m", 1), rows_of([599], 64))


def test_running_out_of_memory_during_loading_leaves_no_memory_in_use(
    workshop: Workshop, allocators: list[PlainHostAllocator], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = workshop.model((range(100), 64), (range(30_000), 64))
    monkeypatch.setattr("hps_numba.device.host_memory.available_bytes", lambda: 1 << 20)  # less than when the plan was made
    with pytest.raises(CapacityError, match=r"hps_et\.m\.sparse_embedding1: rows: expected 7\.3 MiB more of free memory"):
        workshop.open(entry)
    wait_until(lambda: left(allocators) == 0)


# --- memory -----------------------------------------------------------------------------------------------------------

_MEASURE = """
import json, os, resource, sys, threading, time
import hps_numba
from hps_numba.server.plan import make_plan
from hps_numba.config import read_config

small, big = sys.argv[1:]
with hps_numba.HPS(small, progress=False) as server:        # compiles kernels and imports all there is to import
    server.lookup([1, 2], "m", 0)
def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
before, peak, stop = rss(), 0, threading.Event()
def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, rss())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
plan = make_plan(read_config(big))
server = hps_numba.HPS(big, progress=False)
after = rss()
stop.set(); watcher.join()
print(json.dumps({"planned": plan.host_bytes, "loading": plan.loading_bytes, "peak": peak - before, "after": after - before,
                  "rows": server.host_bytes}))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
@pytest.mark.parametrize("format", ["", ".h5"])
def test_peak_memory_of_loading_stays_within_the_plan(workshop: Workshop, format: str) -> None:  # F04
    rows, dim = 800_000, 64  # 205 MB of rows
    path = workshop.folder / f"big{format}"
    hps_numba.generate_model(path, rows, dim, seed=1)
    configs = []
    small = workshop.folder / f"small{format}"  # of the same format: its reader is imported before memory is measured
    hps_numba.generate_model(small, 9, dim)
    for name, model in (("small", small), ("big", path)):
        entry = workshop.model(([], dim), sparse_files=[str(model)])
        configs.append(workshop.folder / f"{name}.json")
        configs[-1].write_text(json.dumps({"supportlonglong": True, "models": [entry]}))
    command = [sys.executable, "-c", _MEASURE, *map(str, configs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["planned"] >= rows * dim * 4
    assert measured["rows"] == measured["planned"]
    assert measured["peak"] <= 1.15 * (measured["planned"] + measured["loading"])
    assert measured["after"] <= 1.15 * measured["planned"]
    assert measured["peak"] >= rows * dim * 4  # else nothing was measured
