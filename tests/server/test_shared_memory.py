"""Outputs that share memory with what a lookup reads: the rows are those of the keys as they were given."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.factories import KEEPING, Workshop
from support.oracles import assert_same_bits, rows_of
from support.waiting import join_all

import hps_numba
from hps_numba.errors import ArrayError, ConfigError
from hps_numba.storage.host.pooling import Bags, without_padding
from hps_numba.storage.host.store import HostStore

DIM, N = 4, 5000
KINDS = ["host", "cache", "tier", "default only"]


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, workshop: Workshop) -> hps_numba.HPS:
    entry: dict[str, Any] = {"max_batch_size": 2 * N, "hit_rate_threshold": 1.0}
    if request.param == "cache":
        return workshop.open(
            workshop.model((np.arange(N), DIM), deployed_device_list=[0], gpucacheper=0.5, **entry),
            cache_on_cpu=True,
            volatile_db={"type": "hash_map"},
        )
    if request.param == "tier":
        tier = {"type": "support.fakes:DictTier"}
        return workshop.open(workshop.model((np.arange(N), DIM), **entry), volatile_db=KEEPING, persistent_db=tier)
    if request.param == "default only":
        return workshop.open(workshop.model(([], DIM), **entry), volatile_db={"type": "hash_map"})
    return workshop.open(workshop.model((np.arange(N), DIM), **entry), volatile_db={"type": "hash_map"})


def shared(n: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and an output ``[n, DIM]`` in one piece of memory: keys begin ``offset`` bytes after the output, or before it."""
    memory = np.zeros(8 * n + 4 * DIM * n + 2 * abs(offset) + 64, np.uint8)
    start = max(0, -offset)
    out = memory[start : start + 4 * DIM * n].view(np.float32).reshape(n, DIM)
    keys = memory[start + offset : start + offset + 8 * n].view(np.int64)
    return keys, out


@pytest.mark.parametrize("offset", [0, 8, -8, 4 * DIM * 100, 4 * DIM * N - 8, 8 - 8 * N, 4 * DIM * N])
def test_an_output_over_the_keys_gets_the_rows_of_the_keys(server: hps_numba.HPS, offset: int) -> None:
    wanted = np.random.default_rng(1).permutation(N)
    keys, out = shared(N, offset)
    keys[:] = wanted
    assert server.lookup(keys, "m", 0, out=out) is out
    fresh = server.lookup(wanted, "m", 0)
    assert_same_bits(out, fresh)


def test_many_threads_work_on_an_output_over_the_keys(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((np.arange(N), DIM)), volatile_db={"type": "hash_map"})
    wanted = np.random.default_rng(2).integers(0, N, 400_000)
    keys, out = shared(len(wanted), 16)
    keys[:] = wanted
    server.lookup(keys, "m", 0, out=out)
    assert_same_bits(out, rows_of(wanted, DIM))


@pytest.mark.parametrize("output_type", ["float32", "float16"])
def test_outputs_of_other_kinds_over_the_keys(workshop: Workshop, output_type: str) -> None:
    torch = pytest.importorskip("torch")
    server = workshop.open(workshop.model((np.arange(N), DIM), output_dtype=output_type), volatile_db={"type": "hash_map"})
    wanted = np.random.default_rng(3).permutation(N)
    fresh = server.lookup(wanted, "m", 0)
    memory = torch.zeros(4 * N * DIM, dtype=torch.float32)
    out = memory[: N * DIM].view(N, DIM) if output_type == "float32" else memory.view(torch.float16)[: N * DIM].view(N, DIM)
    keys = memory.view(torch.int64)[:N]
    keys[:] = torch.from_numpy(wanted)
    server.lookup(keys, "m", 0, out=out)
    assert np.array_equal(out.numpy(), fresh)
    if output_type == "float32":
        keys[:] = torch.from_numpy(wanted)
        capsules = torch.utils.dlpack.to_dlpack(keys), torch.utils.dlpack.to_dlpack(out)
        server.lookup_fromdlpack(*capsules, "m", 0)
        assert_same_bits(out.numpy(), fresh)
        keys[:] = torch.from_numpy(wanted)
        server.direct.lookup_into(keys.numpy(), "m", 0, out.numpy())
        assert_same_bits(out.numpy(), fresh)


def test_a_recording_has_the_keys_as_they_were_given(server: hps_numba.HPS, workshop: Workshop) -> None:
    wanted = np.random.default_rng(4).permutation(N)
    keys, out = shared(N, 0)
    keys[:] = wanted
    path = workshop.folder / "trace.npy"
    with server.record_trace(path, "m", 0):
        server.lookup(keys, "m", 0, out=out)
    assert np.array_equal(np.load(path), wanted)


@pytest.mark.parametrize("over", ["keys", "weights", "offsets"])
def test_pooled_rows_over_what_is_read(server: hps_numba.HPS, over: str) -> None:
    rng = np.random.default_rng(5)
    given = {
        "keys": rng.integers(0, N, N),
        "offsets": np.arange(0, N + 1, 2),
        "weights": rng.uniform(0.5, 2, N).astype(np.float32),
    }
    bags = len(given["offsets"]) - 1
    expected = server.lookup_pooled(given["keys"], given["offsets"], "m", 0, weights=given["weights"])
    memory = np.zeros(4 * bags * DIM + 8 * N, np.uint8)
    placed = memory[: given[over].nbytes].view(given[over].dtype)
    placed[:] = given[over]
    given[over] = placed
    out = memory[: 4 * bags * DIM].view(np.float32).reshape(bags, DIM)
    server.lookup_pooled(given["keys"], given["offsets"], "m", 0, weights=given["weights"], out=out)
    assert_same_bits(out, expected)


def test_a_store_reads_keys_before_it_writes_over_them() -> None:
    store = HostStore(DIM)
    store.upsert(np.arange(N), rows_of(np.arange(N), DIM))
    keys, out = shared(N, 24)
    keys[:] = np.arange(N)[::-1]
    assert store.lookup(keys, out) == 0
    assert_same_bits(out, rows_of(np.arange(N)[::-1], DIM))


def test_an_output_that_overlaps_itself_is_refused(server: hps_numba.HPS) -> None:
    memory = np.zeros(3 * DIM, np.float32)
    for strides in ((0, 4), (8, 4), (4, 4), (-8, 4)):
        out = np.lib.stride_tricks.as_strided(memory[DIM:], (3, DIM), strides)
        with pytest.raises(ArrayError, match="overlaps itself"):
            server.lookup([1, 2, 3], "m", 0, out=out)


# -- arrays that another thread changes meanwhile --------------------------------------------------------------------------


def test_offsets_are_read_once() -> None:
    """They are checked, and what kernels read afterwards is what was checked."""
    offsets = np.array([0, 2, 4])
    bags = Bags(np.arange(4), offsets)
    offsets[:] = 1 << 40
    assert bags.offsets.tolist() == [0, 2, 4]
    with pytest.raises(ConfigError, match="offsets"):
        Bags(np.arange(4), offsets)
    kept, starts, _ = without_padding(np.arange(4), np.array([0, 2, 4]), None, 1)
    assert kept.tolist() == [0, 2, 3] and starts.tolist() == [0, 1, 3]


def _while_changing(array: np.ndarray, values: tuple[np.ndarray, ...], call: Callable[[], None]) -> None:
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for value in values:
                array[:] = value

    thread = threading.Thread(target=change)
    thread.start()
    try:
        call()
    finally:
        stop.set()
        join_all(thread)


def test_offsets_that_change_meanwhile_read_no_foreign_memory(server: hps_numba.HPS) -> None:
    keys, good = np.arange(N), np.arange(0, N + 1, 2)
    bad = np.full_like(good, 1 << 45)
    offsets = good.copy()

    def call() -> None:
        for _ in range(200):
            try:
                assert server.lookup_pooled(keys, offsets, "m", 0).shape == (len(good) - 1, DIM)
            except ConfigError:
                continue

    _while_changing(offsets, (good, bad, -bad), call)


def test_keys_and_rows_that_change_meanwhile_harm_no_other_row(server: hps_numba.HPS) -> None:
    others = np.arange(N, 2 * N)
    server.insert(others, rows_of(others, DIM), "m", 0)
    keys, rows = np.arange(1000), rows_of(np.arange(1000), DIM)

    def call() -> None:
        for _ in range(30):
            server.insert(keys, rows, "m", 0)
            server.lookup(keys, "m", 0)
            server.update(keys, rows, "m", 0)
            server.erase(keys, "m", 0)

    _while_changing(keys, (np.arange(1000), np.arange(1000)[::-1], np.arange(500, 1500)), call)
    assert_same_bits(server.lookup(others, "m", 0), rows_of(others, DIM))
    everything = np.arange(2 * N)
    present = server.contains(everything, "m", 0)
    defaults = (server.lookup(everything, "m", 0) == -7.5).all(1)
    assert np.array_equal(present, ~defaults), "cache and store differ"
