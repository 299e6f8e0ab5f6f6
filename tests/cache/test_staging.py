"""Missed rows that host threads gather (``miss_path``): the same answers and the same cache as by direct reads, bit for bit.

On the CPU, whose work is done when a call returns, and (marker gpu) on a device.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.cache_bench import DEFAULT, DIM, Bench, Versions, ints
from support.cache_pairs import OPERATIONS, Pair
from support.factories import KEEPING, ON_BOTH, Workshop
from support.oracles import EXTREME_64, assert_same_bits, rows_of
from support.services import Service, assert_adds_up, cache_of, defaults, stats_of, without_devices
from support.staging import TYPES, ask, ask_both, assert_same_content

from hps_numba.cache import lookup as cache_lookup
from hps_numba.cache import parts as cache_parts
from hps_numba.cache import staging
from hps_numba.cache.backends import CpuBackend
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.staging import NEVER
from hps_numba.errors import CapacityError, ClosedError, ConfigError
from hps_numba.kernels.compiler.spec import KernelSpec
from hps_numba.kernels.layouts.host_store import FIRST_SLOT, META_ROWS, SLOT_MASK
from hps_numba.kernels.policies._policy import Policy
from hps_numba.storage.host import reading
from hps_numba.storage.host import store as host_store
from hps_numba.storage.host.store import HostStore


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows of DIM at a time, so that buffers are used again within a batch."""
    monkeypatch.setattr(staging, "PIECE_BYTES", 7 * 4 * DIM)
    monkeypatch.setattr(staging, "MIN_PIECE_BYTES", 0)


def both(bench: Bench, store: HostStore, rows: int = 0, **options: Any) -> tuple[EmbeddingCache, EmbeddingCache]:
    """A cache that is staged, and its like that is not."""
    staged, direct = (bench.cache(store, rows, miss_path=path, **options) for path in ("staged", "direct"))
    return staged, direct


def assert_alike(staged: EmbeddingCache, direct: EmbeddingCache) -> None:
    assert_same_content(staged, direct)
    mine, theirs = asdict(staged.counters()), asdict(direct.counters())
    assert mine.pop("staged") > 0 and theirs.pop("staged") == 0
    assert mine == theirs


# -- as by direct reads -----------------------------------------------------------------------------


class StagedBench(Bench):
    def cache(self, store: HostStore | None, rows: int = 0, *, policy: str | Policy = "lru", **options: Any) -> EmbeddingCache:
        return super().cache(store, rows, policy=policy, miss_path="staged", **options)


@pytest.mark.parametrize("device", ON_BOTH)
@pytest.mark.parametrize(("policy", "dim"), [("lru", 17), ("lfu", 17)])
def test_any_sequence_of_operations_equals_the_oracle(device: int | None, policy: str, dim: int) -> None:
    bench = StagedBench(device)
    pair = Pair(bench, policy, dim, seed=dim)
    for _ in range(100):
        getattr(pair, pair.rng.choice(OPERATIONS))()
        pair.check()
    assert pair.cache.counters().staged > 10
    bench.close()


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "tinylfu"])
def test_staged_and_direct_batches_are_alike(bench: Bench, policy: str) -> None:
    rng = np.random.default_rng(3)
    store = bench.store(range(800))
    caches = both(bench, store, 120, policy=policy)
    for n in (1, 3, 40, 700, 700, 20, 2500, 1):
        keys = rng.zipf(1.2, n) % 1000  # many duplicates, some in no tier
        assert ask_both(caches, keys) == np.flatnonzero(keys >= 800).tolist()
        assert_alike(*caches)
    assert caches[0].counters().evicted > 0


@pytest.mark.parametrize("kind", ["static", "uvm"])
def test_fixed_caches_are_staged(bench: Bench, kind: str) -> None:
    store = bench.store(range(100))
    caches = both(bench, store, 100, kind=kind)
    for cache in caches:
        cache.warm()
    store.upsert(np.arange(100, 400), rows_of(np.arange(100, 400), DIM))
    keys = np.random.default_rng(1).integers(0, 450, 900)
    assert ask_both(caches, keys) == np.flatnonzero(keys >= 400).tolist()
    assert_alike(*caches)
    assert caches[0].counters().misses == (keys >= 100).sum()


@pytest.mark.parametrize(("device", "row_type", "form", "out_type", "shift"), TYPES)
def test_staging_serves_every_type_of_rows_keys_and_answers(
    device: int | None, row_type: str, form: str, out_type: str, shift: int
) -> None:
    bench = Bench(device)
    rng = np.random.default_rng(5)
    keys = {"int32": [-1, -(2**31)], "uint32": [2**32 - 1, 2**31], "checked32_in_int64": [2**32 - 1], "int64": EXTREME_64}[form]
    store = bench.store([*keys, *range(300)])
    caches = both(bench, store, 60, row_type=row_type)
    known = np.array([*keys, *range(330), *([-1, 2**32, -(2**63)] if form == "checked32_in_int64" else [])])
    for n in (4, 300, 300):
        batch = rng.choice(known, n)
        ask_both(caches, batch, form, out_type, shift=shift)
        assert_alike(*caches)
    bench.close()


def test_lookup_without_output_fills_the_cache(bench: Bench) -> None:
    caches = both(bench, bench.store(range(50)), 600)
    for cache in caches:
        out, absent = ask(cache, [*range(40), 99], no_answer=True)
        assert (out == 77).all() and absent == [40]
    assert_alike(*caches)
    assert caches[0].resident() == 40


def test_lookups_larger_than_a_batch_are_split(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_lookup, "MAX_BATCH", 64)
    caches = both(bench, bench.store(range(300)), 200)
    keys = np.random.default_rng(2).integers(0, 320, 1000)
    first, second = (cache.lookup_arrays(keys) for cache in caches)
    assert_same_bits(first, second)
    assert_same_bits(first[keys < 300], rows_of(keys[keys < 300], DIM))
    assert_alike(*caches)
    assert caches[0].counters().staged == -(-1000 // 64)


def test_staged_batch_without_misses(bench: Bench) -> None:
    staged = bench.cache(bench.store(range(20)), 100, miss_path="staged")
    staged.warm()
    for _ in range(3):
        assert_same_bits(staged.lookup_arrays(np.arange(20)), rows_of(range(20), DIM))
    assert staged.lookup_arrays(ints([])).shape == (0, DIM)
    assert (staged.counters().misses, staged.counters().staged) == (0, 3)


def test_policy_changes_between_staged_batches(bench: Bench) -> None:
    from hps_numba.kernels.policies._load import load_policy

    store = bench.store(range(200))
    caches = both(bench, store, 60)
    rng = np.random.default_rng(8)
    for policy in ("lfu", "lru", "lfu"):
        keys = rng.integers(0, 220, 300)
        assert_same_bits(*(cache.lookup_arrays(keys) for cache in caches))
        for cache in caches:
            cache.set_policy(load_policy(policy))
        assert_alike(*caches)


# -- rows that change on their way -------------------------------------------------------------------------------


def between(cache: EmbeddingCache, monkeypatch: pytest.MonkeyPatch, change: Callable[[], Any]) -> None:
    """Let ``change`` happen once, after the rows of the next batch were gathered and before they are inserted."""
    finish, left = cache.parts.plan.finish_lookup, [change]

    def change_and_finish(*args: Any) -> None:
        if left:
            left.pop()()
        finish(*args)

    monkeypatch.setattr(cache.parts.plan, "finish_lookup", change_and_finish)


def old_and_new(bench: Bench) -> tuple[HostStore, EmbeddingCache, Callable[[Any], None]]:
    store = bench.store([5, 6, 7])
    cache = bench.cache(store, 40, miss_path="staged")

    def overwrite(keys: Any) -> None:
        store.upsert(ints(keys), rows_of(keys, DIM, 1))
        cache.update(ints(keys))

    return store, cache, overwrite


def test_stale_row_is_not_inserted_and_others_are(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _, cache, overwrite = old_and_new(bench)
    between(cache, monkeypatch, lambda: overwrite([5]))
    assert_same_bits(cache.lookup_arrays(ints([5, 6])), rows_of([5, 6], DIM))
    assert [entry.key for entry in cache.entries()] == [6]
    assert cache.counters().stale_dropped == 1
    assert_same_bits(cache.lookup_arrays(ints([5, 6])), np.vstack([rows_of([5], DIM, 1), rows_of([6], DIM)]))
    assert cache.counters().stale_dropped == 1 and cache.resident() == 2


def test_change_of_another_row_does_not_prevent_insertion(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _, cache, overwrite = old_and_new(bench)
    between(cache, monkeypatch, lambda: overwrite([7]))
    cache.lookup_arrays(ints([5, 6]))
    assert sorted(entry.key for entry in cache.entries()) == [5, 6]
    assert cache.counters().stale_dropped == 0


@pytest.mark.parametrize("change", ["erase", "refresh"])
def test_insertion_notices_every_kind_of_change(bench: Bench, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    store, cache, _ = old_and_new(bench)

    def work() -> None:
        store.erase(ints([5]))
        if change == "erase":
            cache.erase(ints([5]))
        else:
            cache.refresh()

    between(cache, monkeypatch, work)
    cache.lookup_arrays(ints([5, 6]))
    assert [entry.key for entry in cache.entries()] == [6]
    assert (cache.lookup_arrays(ints([5])) == np.float32(DEFAULT)).all()


def test_rows_of_a_replaced_table_are_not_inserted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the new content is at the address of the one before, with the same index words."""
    store, cache, _ = old_and_new(bench)

    def work() -> None:
        words = np.empty(3, np.int64)
        before = store.gather(ints([5, 6, 7]), np.empty((3, DIM), np.float32), words)
        cache.clear()
        monkeypatch.setattr(store, "gather", gather)
        after = np.empty(3, np.int64)
        assert store.gather(ints([5, 6, 7]), np.empty((3, DIM), np.float32), after) == before
        assert np.array_equal(words, after)  # the words alone would tell no difference

    gather = store.gather
    between(cache, monkeypatch, work)
    cache.lookup_arrays(ints([5, 6]))
    assert cache.entries() == [] and cache.counters().stale_dropped == 2


def test_direct_batches_insert_after_staged_ones_and_a_clearing(bench: Bench) -> None:
    """What a staged batch knew of changes is not taken for what the next one of its workspace knows."""
    _, cache, _ = old_and_new(bench)
    cache.lookup_arrays(ints([5]))
    cache.clear()
    cache.parts.lookups.staged_from = NEVER
    cache.lookup_arrays(ints([5, 6]))
    assert sorted(entry.key for entry in cache.entries()) == [5, 6]
    assert (cache.counters().staged, cache.counters().stale_dropped) == (1, 0)


def test_row_changed_while_the_batch_waits_is_read_as_it_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    store, cache, overwrite = old_and_new(bench)
    gather, left = store.gather, [lambda: overwrite([5])]

    def change_and_gather(*args: Any) -> Any:
        if left:
            left.pop()()
        return gather(*args)

    monkeypatch.setattr(store, "gather", change_and_gather)
    expected = np.vstack([rows_of([5], DIM, 1), rows_of([6], DIM)])
    assert_same_bits(cache.lookup_arrays(ints([5, 6])), expected)
    assert cache.counters().stale_dropped == 0 and cache.resident() == 2
    assert_same_bits(cache.query(ints([5, 6]))[0], expected)


def test_table_replaced_between_two_pieces(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_store, "_GRACE_SECONDS", 0.01)  # the lookup reads it
    keys = np.arange(30)
    store = bench.store(keys)
    cache = bench.cache(store, 60, miss_path="staged")
    gather, calls = store.gather, []

    def replace_and_gather(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            sibling = store.sibling()
            sibling.upsert(keys, rows_of(keys, DIM, 1))
            store.adopt(sibling)
        return gather(*args)

    monkeypatch.setattr(store, "gather", replace_and_gather)
    rows = cache.lookup_arrays(keys)
    old, new = rows_of(keys, DIM), rows_of(keys, DIM, 1)
    is_old, is_new = ((rows == some).all(1) for some in (old, new))
    assert (is_old.sum(), is_new.sum()) == (14, 16)  # two pieces of seven rows, then the others
    cache.clear()
    cache.warm()
    assert_same_bits(cache.lookup_arrays(keys), new)


# -- the order of work ------------------------------------------------------------------------------------------


class LateBackend(CpuBackend):
    """Memory of the process whose one stream does nothing before somebody waits for it: as late as a device may be."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], Any]] = deque()
        self.given = self.done = 0
        self.marks: list[int] = [0]

    def later(self, work: Callable[..., Any], *args: Any, **options: Any) -> None:
        self.waiting.append(partial(work, *args, **options))
        self.given += 1

    def run(self, end: int) -> None:
        while self.done < end:
            self.waiting.popleft()()
            self.done += 1

    def kernel(self, spec: KernelSpec) -> Any:
        launch = super().kernel(spec).launch
        return SimpleNamespace(launch=partial(self.later, launch))

    def fill(self, address: int, byte: int, size: int, stream: int) -> None:
        self.later(super().fill, address, byte, size, stream)

    def copy(self, dst: int, src: int, size: int, stream: int) -> None:
        self.later(super().copy, dst, src, size, stream)

    def from_host(self, address: int, array: np.ndarray, stream: int) -> None:
        self.run(self.given)
        super().from_host(address, array, stream)

    def to_host(self, array: np.ndarray, address: int, stream: int) -> None:
        self.run(self.given)
        super().to_host(array, address, stream)

    def synchronize(self, stream: int) -> None:
        self.run(self.given)

    def new_event(self) -> int:
        self.marks.append(0)
        return len(self.marks) - 1

    def record(self, event: int, stream: int) -> None:
        self.marks[event] = self.given

    def wait_for(self, event: int) -> None:
        self.run(self.marks[event])

    def event_done(self, event: int) -> bool:
        return self.done >= self.marks[event]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateBackend:
    backend = LateBackend()
    monkeypatch.setattr(cache_parts, "backend_for", lambda device: backend)
    return backend


def test_a_buffer_is_not_written_before_it_was_read(cpu_bench: Bench, late: LateBackend) -> None:
    cache = cpu_bench.cache(cpu_bench.store(range(300)), 400, policy="lfu", miss_path="staged")
    for keys in (np.arange(200), np.arange(100, 300), np.arange(300)):  # up to 29 pieces of seven rows
        for _ in range(2):
            assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    assert cache.counters().staged == 6
    resident = np.sort(cache.dump())
    assert_same_bits(cache.query(resident)[0], rows_of(resident, DIM))


def test_call_returns_when_its_work_is_enqueued(cpu_bench: Bench, late: LateBackend) -> None:
    cache = cpu_bench.cache(cpu_bench.store(range(100)), 200, miss_path="staged")
    keys, answers = np.arange(100), np.full((2, 100, DIM), np.nan, np.float32)
    for out in answers:
        cache.lookup(keys.ctypes.data, 100, out.ctypes.data, 0)
        assert late.waiting and late.given - late.done <= 8  # three pieces, the insertion, and small things
    late.synchronize(0)
    for out in answers:
        assert_same_bits(out, rows_of(keys, DIM))


def test_buffers_are_not_read_after_a_failure(cpu_bench: Bench, late: LateBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    store = cpu_bench.store(range(100))
    cache = cpu_bench.cache(store, 200, miss_path="staged")
    keys, out = np.arange(100), np.full((100, DIM), np.nan, np.float32)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging._Staging, "sent", fail)  # the kernel was started, and no event recorded
        with pytest.raises(KeyboardInterrupt):
            cache.lookup(keys.ctypes.data, 100, out.ctypes.data, 0)
    misses: Any = cache.parts.misses
    for rows, words in misses._idle[0]._buffers:
        rows[:], words[:] = -1, 0
    assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    assert_same_bits(out[:7], rows_of(range(7), DIM))


# -- failures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_cache_serves_after_a_batch_that_failed_halfway(bench: Bench, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    store = bench.store(range(100))
    cache = bench.cache(store, 200, policy=policy, miss_path="staged")
    cache.lookup_arrays(np.arange(10))
    gather, calls = store.gather, []

    def fail(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise CapacityError("on purpose")
        return gather(*args)

    with monkeypatch.context() as patch:
        patch.setattr(store, "gather", fail)
        with pytest.raises(CapacityError, match="on purpose"):
            cache.lookup_arrays(np.arange(60))
    assert len(calls) == 3
    assert cache.resident() == 10 + 14  # those before, and two pieces of seven
    for _ in range(2):
        assert_same_bits(cache.lookup_arrays(np.arange(100)), rows_of(range(100), DIM))
    if policy == "lfu":
        scores = {entry.key: entry.score for entry in cache.entries()}
        assert {scores[key] for key in range(10)} == {4}  # also the hits of the batch that failed


def test_store_closed_meanwhile_raises(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_store, "_CLOSE_SECONDS", 0.01)  # the lookup reads it
    store = bench.store(range(10))
    cache = bench.cache(store, 40, miss_path="staged")
    gather = store.gather

    def close_and_gather(*args: Any) -> Any:
        store.close()
        return gather(*args)

    monkeypatch.setattr(store, "gather", close_and_gather)
    with pytest.raises(ClosedError, match="the store is closed"):
        cache.lookup_arrays(np.arange(5))


def test_unknown_miss_path_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="miss_path: expected one of direct, staged, auto, got 'fast'"):
        bench.cache(bench.store([1]), 40, miss_path="fast")


# -- memory --------------------------------------------------------------------------------------------


def test_memory_grows_with_batches_and_is_reused(bench: Bench) -> None:
    store = bench.store(range(3000))
    cache = bench.cache(store, 300, miss_path="staged")
    misses: Any = cache.parts.misses
    sizes = []
    for n in (10, 200, 2000, 50, 1500):
        assert_same_bits(cache.lookup_arrays(np.arange(n)), rows_of(range(n), DIM))
        sizes.append(misses.bytes)
        assert len(misses._all) == len(misses._idle) == 1
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3] == sizes[4]
    assert cache.bytes > misses.bytes
    cache.close()
    assert misses.bytes == 0


def test_cache_serves_after_staging_found_no_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = bench.cache(bench.store(range(30)), 40, miss_path="staged")
    allocate = cache.backend.allocate_pinned

    def refuse(size: int, purpose: str) -> Any:
        if "rows for the device" in purpose:
            raise CapacityError(f"{purpose}: none, on purpose")
        return allocate(size, purpose)

    with monkeypatch.context() as patch:
        patch.setattr(cache.backend, "allocate_pinned", refuse)
        with pytest.raises(CapacityError, match="table: rows for the device: none, on purpose"):
            cache.lookup_arrays(np.arange(30))
    misses: Any = cache.parts.misses
    assert misses.bytes == 0
    assert_same_bits(cache.lookup_arrays(np.arange(30)), rows_of(range(30), DIM))


# -- many threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ON_BOTH)
def test_threads_with_concurrent_writers_see_whole_fresh_rows(device: int | None) -> None:
    bench = Bench(device)
    table = Versions(bench)
    cache = bench.cache(table.store, 100, miss_path="staged", buffers=3)
    batches = table.race(cache, readers=4, after_write=lambda rng: rng.random() < 0.05 and cache.clear())
    counts = cache.counters()
    assert counts.staged == counts.calls == batches
    bench.close()


# -- which batches are staged ---------------------------------------------------------------------------------------


def test_batches_are_staged_only_on_request(bench: Bench) -> None:
    store = bench.store(range(10))
    for path, staged in (("direct", 0), ("auto", 0), ("staged", 1)):
        cache = bench.cache(store, 40, miss_path=path)
        cache.lookup_arrays(np.arange(10))
        assert cache.counters().staged == staged
    apart = bench.cache(None, 40, miss_path="staged", dim=DIM)  # nothing to gather from
    assert (apart.lookup_arrays(np.arange(3)) == np.float32(DEFAULT)).all()
    assert apart.counters().staged == 0


def test_staged_cache_stages_batches_of_any_size_and_no_graphs(bench: Bench) -> None:
    cache = bench.cache(bench.store(range(199)), 40, miss_path="staged")

    def is_staged_with(n: int, **options: Any) -> bool:
        before = cache.counters().staged
        with (
            cache.backend.current(),
            cache.parts.state.copies(np.arange(n)) as (at,),
            cache.parts.state.buffer(4 * DIM * n) as room,
        ):
            cache.lookup(at, n, room, cache.parts.state.stream, **options)
            rows = np.empty((n, DIM), np.float32)
            cache.backend.to_host(rows, room, cache.parts.state.stream)
        assert_same_bits(rows, rows_of(range(n), DIM))
        return cache.counters().staged > before

    assert [is_staged_with(n) for n in (1, 50, 190)] == [True] * 3
    assert not is_staged_with(190, capturing=True)
    with cache.backend.current():
        absent = cache.backend.allocate(8 * 60, "list")
        assert is_staged_with(30, absent_list=absent.address)
        absent.release()


@pytest.mark.gpu
def test_gpu_graph_of_a_staged_cache_reads_host_memory_directly() -> None:
    torch = pytest.importorskip("torch")
    bench, n = Bench(0), 500
    cache = bench.cache(bench.store(range(1000)), 100, miss_path="staged")
    keys = torch.arange(n, device="cuda")
    out = torch.empty((n, DIM), device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cache.lookup(keys.data_ptr(), n, out.data_ptr(), stream.cuda_stream)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        cache.lookup(keys.data_ptr(), n, out.data_ptr(), stream.cuda_stream)
    for first in (0, 300, 480):
        keys.copy_(torch.arange(first, first + n))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(out.cpu().numpy(), rows_of(range(first, first + n), DIM))
    assert cache.counters().staged == 1
    del graph
    bench.close()


@pytest.mark.gpu
@pytest.mark.parametrize(("policy", "dim"), [("lru", 32), ("lfu", 128), ("fifo", 17)])
def test_gpu_large_batches_equal_direct_ones(monkeypatch: pytest.MonkeyPatch, policy: str, dim: int) -> None:
    """With pieces as they are, on a stream of the caller's, which goes on while the next batch is listed."""
    torch = pytest.importorskip("torch")
    monkeypatch.undo()
    bench, rng = Bench(0), np.random.default_rng(dim)
    universe = np.unique(rng.integers(-(2**62), 2**62, 400_000))
    store = bench.store(universe[:300_000], dim)
    caches = both(bench, store, 50_000, policy=policy)
    stream = torch.cuda.Stream()
    for n in (100_000, 500, 600_000, 250_001):
        keys = torch.from_numpy(universe[(rng.zipf(1.1, n) - 1) % len(universe)]).cuda()
        outs = [torch.full((n, dim), torch.nan, device="cuda") for _ in caches]
        torch.cuda.synchronize()
        for cache, out in zip(caches, outs, strict=True):
            cache.lookup(keys.data_ptr(), n, out.data_ptr(), stream.cuda_stream)
        stream.synchronize()
        assert torch.equal(*(out.view(torch.int32) for out in outs))
        expected = np.empty((n, dim), np.float32)
        store.lookup(keys.cpu().numpy(), expected, DEFAULT)
        assert_same_bits(outs[0].cpu().numpy(), expected)
    assert_alike(*caches)
    bench.close()


# -- in service ------------------------------------------------------------------------------------------


@pytest.fixture(params=ON_BOTH)
def service(request: pytest.FixtureRequest, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Service:
    if request.param is None:
        without_devices(monkeypatch)
    return Service(workshop, request.param)


def test_server_stages_and_shows_it_in_stats(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    server = service.open((range(300), DIM), gpucacheper=0.2, miss_path="staged")
    assert "miss_path" not in caplog.text
    keys = np.random.default_rng(4).integers(0, 320, 500)
    before = cache_of(server).staged  # warming before the first lookup is none
    assert before == 0
    expected = np.where((keys < 300)[:, None], rows_of(keys, DIM), np.float32(-7.5))
    for _ in range(2):
        assert_same_bits(service.lookup(server, keys), expected)
    assert cache_of(server).staged == 2
    server.update([5], rows_of([5], DIM, 1), "m", 0)
    assert_same_bits(service.lookup(server, [5]), rows_of([5], DIM, 1))
    assert_adds_up(server)


def test_keys_not_in_host_memory_go_to_slower_tiers(service: Service) -> None:
    server, tier = service.open_cold(volatile=KEEPING, miss_path="staged", hit_rate_threshold=1.0)
    expected = np.concatenate([rows_of([1, 2], DIM), defaults(1), rows_of([1], DIM)])
    assert_same_bits(service.lookup(server, [1, 2, 99, 1]), expected)
    service.settle(server)
    assert tier.keys["fetch"] == 3 and stats_of(server).rows == 2
    assert_same_bits(service.lookup(server, [3, 2, 1]), rows_of([3, 2, 1], DIM))
    assert (cache_of(server).hits, tier.keys["fetch"]) == (2, 4)
    assert cache_of(server).staged == 2
    assert_adds_up(server)


# -- the gathering -------------------------------------------------------------------------------------


def gathered(store: HostStore, keys: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray, int]:
    rows, words = np.full((len(keys), store.dim), np.nan, np.float32), np.full(len(keys), -1, np.int64)
    missing, _ = store.gather(keys, rows, words, -1.0, **options)
    return rows, words, missing


@pytest.mark.parametrize("least", [reading._GATHERED_BYTES, 1000])
@pytest.mark.parametrize("n", [0, 1, 1023, 1025, 5000])
def test_gathered_rows_are_those_of_a_lookup(monkeypatch: pytest.MonkeyPatch, least: int, n: int) -> None:
    monkeypatch.setattr(reading, "_GATHERED_BYTES", least)  # 1000: many ranges, for several threads
    store = HostStore(DIM)
    known = np.arange(0, 3000, 2)
    store.upsert(known, rows_of(known, DIM))
    store.erase(ints([10]))
    keys = np.random.default_rng(n).integers(0, 3000, n)
    blocks: list[int] = []
    rows, words, missing = gathered(store, keys, threads=3, in_force=lambda block: blocks.append(block) or block)
    content = ctypes.c_int64.from_address(blocks[0] + META_ROWS).value
    expected = np.empty((n, DIM), np.float32)
    assert store.lookup(keys, expected, -1.0) == missing
    assert_same_bits(rows, expected)
    slots = (words & SLOT_MASK) - FIRST_SLOT
    assert np.array_equal(slots >= 0, store.contains(keys))
    for slot, row in zip(slots, expected, strict=True):
        if slot >= 0:
            there = (ctypes.c_float * DIM).from_address(content + int(slot) * 4 * DIM)
            assert_same_bits(np.array(there, np.float32), row)
    store.close()


def test_new_row_has_a_new_index_word() -> None:
    store = HostStore(DIM)
    store.upsert(ints([1, 2]), rows_of([1, 2], DIM))
    before = gathered(store, ints([1, 2]))[1]
    store.upsert(ints([1]), rows_of([1], DIM, 1))
    after = gathered(store, ints([1, 2]))[1]
    assert before[0] != after[0] and before[1] == after[1]
    store.close()
    with pytest.raises(ClosedError, match="the store is closed"):
        gathered(store, ints([1]))


def test_gathering_counts_as_use() -> None:
    """What devices ask for ages as what the CPU asks for."""
    store = HostStore(DIM, max_rows=10, policy="evict_least_used", target=0.5)
    store.upsert(np.arange(10), rows_of(range(10), DIM))
    gathered(store, ints([3, 4, 5, 6, 7]))
    store.upsert(ints([20]), rows_of([20], DIM))
    assert store.contains(ints([3, 4, 5, 6, 7])).all()
    store.close()
