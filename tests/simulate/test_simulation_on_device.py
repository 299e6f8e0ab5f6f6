"""Policies have the same hits, misses and evictions in the simulator, the CPU cache and the GPU cache over a long trace; and
recordings of keys in GPU memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.factories import Workshop
from support.key_streams import MINE, skewed

from hps_numba import simulate
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.device.host_memory import PinnedHostAllocator, PlainHostAllocator
from hps_numba.kernels.policies._load import load_policy
from hps_numba.storage.host.store import HostStore
from hps_numba.traces.recording import metadata_path

REQUESTS, KEYS, ROWS, BATCH = 1_000_000, 100_000, 10_000, 1000
DEVICES = [pytest.param(None, id="cpu"), pytest.param(0, id="gpu", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def trace() -> np.ndarray:
    return skewed(REQUESTS, KEYS, 9)


@pytest.fixture(params=DEVICES)
def store(request: pytest.FixtureRequest, trace: np.ndarray) -> Iterator[tuple[int | None, HostStore]]:
    known = np.unique(trace)
    allocator = PlainHostAllocator() if request.param is None else PinnedHostAllocator()
    created = HostStore(1, allocator=allocator, rows=len(known))
    created.upsert(known, known.astype(np.float32).reshape(-1, 1))
    yield request.param, created
    created.close()


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "mine.py:Fading"])
def test_simulator_and_cache_agree_on_a_long_trace(
    store: tuple[int | None, HostStore], policy: str, trace: np.ndarray, tmp_path: Path
) -> None:
    if ":" in policy:
        (tmp_path / "mine.py").write_text(MINE)
        policy = str(tmp_path / policy)
    device, backing = store
    loaded = load_policy(policy, allow_code=True)
    cache = EmbeddingCache(1, ROWS, device=device, policy=loaded, default=0.5, store=backing)
    out = np.empty((BATCH, 1), np.float32)
    for start in range(0, REQUESTS, BATCH):
        batch = trace[start : start + BATCH]
        cache.lookup_arrays(batch, out)
        assert np.array_equal(out[:, 0], batch.astype(np.float32))
    counters = cache.counters()
    (run,) = simulate.run(trace, policy, ROWS, batch=BATCH, geometry="gpu", bounds=False, allow_code=True, progress=False).runs
    assert (run.requests - counters.misses, run.misses) == (run.hits, counters.misses)
    assert (run.admissions, run.evictions, run.resident) == (counters.inserted, counters.evicted, cache.resident())
    cache.close()


@pytest.mark.gpu
def test_recording_of_keys_in_gpu_memory(workshop: Workshop, tmp_path: Path) -> None:
    cupy = pytest.importorskip("cupy")
    model = workshop.model((range(500), 3), deployed_device_list=[0], gpucacheper=0.5)
    server = workshop.open(model, volatile_db={"type": "hash_map"})
    requested = np.random.default_rng(2).integers(-10, 500, 3000)
    with (
        server.record_trace(tmp_path / "all.npy", "m", 0),
        server.record_trace(tmp_path / "some.npy", "m", 0, rate=0.3, every=2),
    ):
        for start in range(0, 3000, 100):
            some = requested[start : start + 100]
            keys = cupy.asarray(some.astype(np.int32) if start % 200 else some)
            server.lookup(keys, "m", 0)
        graph_keys, stream = cupy.arange(9), cupy.cuda.Stream(non_blocking=True)
        rows = cupy.empty((9, 3), np.float32)
        with stream:
            server.lookup(graph_keys, "m", 0, out=rows, stream=stream)  # compiles; recorded
            stream.begin_capture()
            server.lookup(graph_keys, "m", 0, out=rows, stream=stream)
            graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    recorded = np.load(tmp_path / "all.npy")
    assert recorded.tolist() == [*requested.tolist(), *range(9)]
    kept = np.load(tmp_path / "some.npy")
    even = np.concatenate([requested[at : at + 100] for at in range(0, 3000, 200)])
    chosen = set(kept.tolist())
    assert kept.tolist() == [key for key in [*even.tolist(), *range(9)] if key in chosen] and 80 < len(chosen) < 250
    assert metadata_path(tmp_path / "all.npy").exists()
