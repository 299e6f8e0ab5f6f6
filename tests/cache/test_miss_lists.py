"""Large batches, which list what they miss for a kernel of its own: the same answers and the same cache, bit for bit.

On the CPU, which does so only here, and (marker gpu) on a device; every batch counts as large.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from support.cache_bench import DEFAULT, DIM, Bench, Versions, ints
from support.cache_pairs import OPERATIONS, Pair
from support.factories import ON_BOTH
from support.oracles import EXTREME_64, assert_same_bits, rows_of
from support.staging import TYPES, ask, ask_both, assert_same_content
from support.waiting import HANG_SECONDS, join_all

from hps_numba.cache import index_mirror
from hps_numba.cache import parts as cache_parts
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.index_mirror import _shift_of, is_scattered
from hps_numba.cache.launch_plan import LaunchPlan
from hps_numba.cache.shares import Shares
from hps_numba.cache.staging import NEVER
from hps_numba.device.host_memory import PinnedHostAllocator
from hps_numba.kernels.cache.miss_sorted import scan_counts, start_of
from hps_numba.kernels.compiler.specialize import bind
from hps_numba.kernels.layouts.cache import MISSED_COUNT, MISSED_COUNTS, MISSED_SORTED, MISSED_TICKET, REGIONS
from hps_numba.kernels.policies._load import load_policy
from hps_numba.storage.host.store import HostStore

_listing_from, _reads_in_order = cache_parts.listing_from, LaunchPlan.reads_in_order


@pytest.fixture(autouse=True)
def every_batch_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_parts, "listing_from", lambda device, mirrors: 1)
    monkeypatch.setattr(LaunchPlan, "reads_in_order", property(lambda plan: True))
    monkeypatch.setattr(index_mirror, "_QUIET_SECONDS", 2 * HANG_SECONDS)  # an index is copied when a test says so


def both(bench: Bench, store: HostStore, rows: int = 0, **options: Any) -> tuple[EmbeddingCache, EmbeddingCache]:
    """A cache that lists what it misses, and its like that does not."""
    lists, plain = (bench.cache(store, rows, **options) for _ in range(2))
    plain.parts.residency.listing_from = plain.parts.residency.lists_missed_from = NEVER
    return lists, plain


def list_words(cache: EmbeddingCache) -> list[int]:
    """What is left of the lists of missed keys of each workspace: all counts, and the ticket."""
    words: list[int] = []
    for workspace in (*cache.parts.workspaces.pool.workspaces, *cache.parts.workspaces.captured):
        if workspace.own_list:
            words += cache.parts.state.read_words(workspace.own_list + MISSED_COUNTS, REGIONS).tolist()
            words += [int(cache.parts.state.read_words(workspace.own_list + at, 1)[0]) for at in (MISSED_COUNT, MISSED_TICKET)]
    return words


def assert_alike(lists: EmbeddingCache, plain: EmbeddingCache) -> None:
    assert lists.counters() == plain.counters()
    assert_same_content(lists, plain)
    left = list_words(lists)
    assert left and not any(left)
    assert not list_words(plain) or not any(list_words(plain))


@pytest.mark.parametrize("device", ON_BOTH)
@pytest.mark.parametrize(("policy", "dim"), [("lru", 17), ("lfu", 17)])
def test_any_sequence_of_operations_equals_the_oracle(device: int | None, policy: str, dim: int) -> None:
    bench = Bench(device)
    pair = Pair(bench, policy, dim, seed=dim)
    for _ in range(120):
        getattr(pair, pair.rng.choice(OPERATIONS))()
        pair.check()
    assert list_words(pair.cache)
    assert pair.cache.counters().misses > 200
    bench.close()


@pytest.mark.parametrize("policy", ["lru", "lfu", "tinylfu"])
def test_listing_and_direct_batches_are_alike(bench: Bench, policy: str) -> None:
    rng = np.random.default_rng(3)
    caches = both(bench, bench.store(range(800)), 120, policy=policy)
    for n in (1, 3, 40, 700, 700, 20, 2500, 1):
        keys = rng.zipf(1.2, n) % 1000  # many duplicates, some in no tier
        assert ask_both(caches, keys) == np.flatnonzero(keys >= 800).tolist()
        assert_alike(*caches)
    assert caches[0].counters().evicted > 0


@pytest.mark.parametrize("kind", ["static", "uvm"])
def test_fixed_caches_list_missed_keys(bench: Bench, kind: str) -> None:
    store = bench.store(range(100))
    caches = both(bench, store, 100, kind=kind)
    for cache in caches:
        cache.warm()
    store.upsert(np.arange(100, 400), rows_of(np.arange(100, 400), DIM))
    for cache in caches:
        cache.check_fully_resident()
    caches[1].parts.residency.lists_missed_from = NEVER
    keys = np.random.default_rng(1).integers(0, 450, 900)
    for _ in range(2):
        assert ask_both(caches, keys) == np.flatnonzero(keys >= 400).tolist()
    assert_alike(*caches)


def test_complete_cache_lists_nothing(bench: Bench) -> None:
    store = bench.store(range(100))
    cache = bench.cache(store, 300)
    assert cache.parts.residency.lists_missed_from == 1
    assert cache.warm() == 100
    assert cache.parts.residency.lists_missed_from == NEVER
    assert_same_bits(cache.lookup_arrays(ints(range(100))), rows_of(range(100), DIM))
    store.upsert(ints([1000]), rows_of([1000], DIM))
    cache.update(ints([1000]))
    assert cache.parts.residency.lists_missed_from == 1
    assert_same_bits(cache.lookup_arrays(ints([1000])), rows_of([1000], DIM))


@pytest.mark.parametrize(("device", "row_type", "form", "out_type", "shift"), TYPES)
def test_listing_serves_every_type_of_rows_keys_and_answers(
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


def test_policy_changes_between_batches(bench: Bench) -> None:
    caches = both(bench, bench.store(range(200)), 60)
    rng = np.random.default_rng(8)
    for policy in ("lfu", "lru", "lfu"):
        for _ in range(2):
            keys = rng.integers(0, 220, 300)
            assert_same_bits(*(cache.lookup_arrays(keys) for cache in caches))
        for cache in caches:
            cache.set_policy(load_policy(policy))
        caches[1].parts.residency.lists_missed_from = NEVER
    keys = rng.integers(0, 220, 300)
    assert_same_bits(*(cache.lookup_arrays(keys) for cache in caches))
    assert_alike(*caches)


def test_staged_batches_alternate_with_listed_ones(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bench.store(range(300))
    cache = bench.cache(store, 60, miss_path="staged")
    rng = np.random.default_rng(9)
    for turn in range(6):
        with monkeypatch.context() as patch:
            if turn % 2:
                patch.setattr(cache.parts.lookups, "staged_from", NEVER)
            keys = rng.integers(0, 320, 200)
            rows = cache.lookup_arrays(keys)
        assert_same_bits(rows[keys < 300], rows_of(keys[keys < 300], DIM))
        assert (rows[keys >= 300] == np.float32(DEFAULT)).all()
        assert not any(list_words(cache))
    assert cache.counters().staged == 3


def test_row_changed_before_the_insertion_is_dropped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ints(range(50))
    store = bench.store(keys)
    cache = bench.cache(store, 200)
    end = cache.parts.lookups.end_batch

    def update_before(*args: Any) -> None:
        cache.backend.synchronize(args[3])  # the rows were read
        store.upsert(keys[:20], rows_of(keys[:20], DIM, 7))
        cache.update(keys[:20])
        end(*args)

    with monkeypatch.context() as patch:
        patch.setattr(cache.parts.lookups, "end_batch", update_before)
        assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    assert cache.counters().stale_dropped == 20
    assert cache.query(keys)[1].tolist() == keys[:20].tolist()


def test_closed_store_answers_with_defaults(bench: Bench) -> None:
    store = bench.store(range(100))
    cache = bench.cache(store, 300)
    cache.lookup_arrays(ints(range(50)))
    store.close()
    rows = cache.lookup_arrays(ints(range(100)))
    assert_same_bits(rows[:50], rows_of(range(50), DIM))
    assert (rows[50:] == np.float32(DEFAULT)).all()


@pytest.mark.parametrize("device", ON_BOTH)
def test_threads_with_concurrent_writers_see_whole_fresh_rows(device: int | None) -> None:
    bench = Bench(device)
    table = Versions(bench)
    cache = bench.cache(table.store, 60, buffers=3, miss_path="auto")
    table.race(cache, readers=4, after_write=lambda rng: rng.random() < 0.05 and cache.mirror_index())
    assert not any(list_words(cache))
    bench.close()


# -- on a device, at full size ---------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("policy", "dim"), [("lru", 32), ("lfu", 100), ("fifo", 128)])
def test_gpu_large_listing_batches_equal_direct_ones(policy: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_parts, "listing_from", _listing_from)
    monkeypatch.setattr(LaunchPlan, "reads_in_order", _reads_in_order)
    monkeypatch.setattr(index_mirror, "_REMEMBERED_BYTES", 1 << 20)
    rng = np.random.default_rng(dim)
    universe = np.arange(300_000, dtype=np.int64) * 7919 - 10_000
    store = HostStore(dim, allocator=PinnedHostAllocator(), rows=len(universe))
    store.upsert(universe[:280_000], rows_of(universe[:280_000], dim))
    options: dict[str, Any] = {"device": 0, "policy": load_policy(policy), "store": store, "default": DEFAULT}
    lists, plain = (EmbeddingCache(dim, 50_000, miss_path=path, **options) for path in ("auto", "direct"))
    plain.parts.residency.listing_from = plain.parts.residency.lists_missed_from = NEVER
    assert lists.parts.gathered is not None
    lists.parts.gathered.shares = Shares(0.0)  # else threads of the host serve these batches
    lists.mirror_index()
    for turn, n in enumerate((131_072, 131_071, 200_000, 140_000, 1_000_000 if dim < 64 else 300_000)):
        keys = universe[np.minimum(rng.zipf(1.05, n) - 1, len(universe) - 1)] if turn % 2 else rng.choice(universe, n)
        answers = [cache.lookup_arrays(keys) for cache in (lists, plain)]
        assert np.array_equal(answers[0].view(np.uint32), answers[1].view(np.uint32))
        expected = np.empty((n, dim), np.float32)
        store.lookup(keys, expected, DEFAULT)
        assert np.array_equal(answers[0].view(np.uint32), expected.view(np.uint32))
    assert lists.counters() == plain.counters()
    assert lists.entries() == plain.entries()
    assert list_words(lists) and not any(list_words(lists)) and not any(list_words(plain))
    for thing in (lists, plain, store):
        thing.close()


def test_keys_are_served_in_the_order_of_the_regions_of_their_rows(bench: Bench) -> None:
    store = bench.store(range(5000), rows=5000)
    cache = bench.cache(store, 300, miss_path="auto")
    keys = np.random.default_rng(4).permutation(5000)
    assert cache.mirror_index()
    assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    (workspace,) = cache.parts.workspaces.pool.workspaces
    listed = cache.parts.state.read_words(
        int(cache.parts.state.read_words(workspace.own_list + MISSED_SORTED, 1)[0]), 2 * len(keys)
    ).reshape(-1, 2)
    assert sorted(listed[:, 0].tolist()) == list(range(5000))
    assert (keys[listed[:, 0]] == listed[:, 1]).all()
    regions = listed[:, 1] >> (13 - 6)  # rows were written in the order of keys: slots are keys, 5000 of 8192 in 64 regions
    assert (np.diff(regions) >= 0).all() and len(set(regions.tolist())) == 40
    store.upsert(ints([1]), rows_of([1], DIM))  # without a copy all are of one region, in the order of the batch
    cache.clear()
    assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    listed = cache.parts.state.read_words(
        int(cache.parts.state.read_words(workspace.own_list + MISSED_SORTED, 1)[0]), 2 * len(keys)
    ).reshape(-1, 2)
    assert sorted(listed[:, 0].tolist()) == list(range(5000))


class Warp:
    """32 lanes, a thread each, that exchange values as a warp does: all lanes at every exchange."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self._lane = threading.local()
        self._values = [0] * 32
        self._barrier = threading.Barrier(32, timeout=HANG_SECONDS)

    def shfl(self, value: int, number: int) -> int:
        self._values[self._lane.number] = int(value)
        self._barrier.wait()
        got = self._values[number]
        self._barrier.wait()
        return got

    def number(self) -> int:
        return int(self._lane.number)

    def load(self, address: int) -> int:
        return int(self.memory[address // 8])

    def run(self, function: Any) -> list[Any]:
        """What ``function``, of a kernel's module, returns in each lane."""
        names = {
            "LANES": 8,
            "lane_in_warp": self.number,
            "shfl": self.shfl,
            "ld64": self.load,
        }
        answers: list[Any] = [None] * 32

        def lane(number: int) -> None:
            self._lane.number = number
            answers[number] = function(number, lambda of: bind(of, names, lambda inner: inner))

        threads = [threading.Thread(target=lane, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        join_all(*threads)
        return answers


@pytest.mark.parametrize("seed", range(4))
def test_scan_of_counts_gives_the_start_of_each_region(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 1000, REGIONS) * (rng.random(REGIONS) < 0.6)
    memory = np.zeros(MISSED_COUNTS // 8 + REGIONS, np.int64)
    memory[MISSED_COUNTS // 8 :] = counts
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])

    def both_regions(lane: int, bound: Any) -> list[int]:
        before, first = bound(scan_counts)(0)
        return [int(bound(start_of)(0, before, first, region)) for region in (lane, 63 - lane, 2 * lane % 64)]

    for lane, answer in enumerate(Warp(memory).run(both_regions)):
        assert answer == [starts[lane], starts[63 - lane], starts[2 * lane % 64]]
    one = {"LANES": 1, "ld64": Warp(memory).load}
    alone = [bind(start_of, one, lambda inner: inner)(0, 0, 0, region) for region in range(REGIONS)]
    assert alone == starts.tolist()


@pytest.mark.parametrize(("slots", "shift"), [(0, 0), (1, 0), (64, 0), (65, 1), (128, 1), (129, 2), (8_388_608, 17)])
def test_shift_gives_at_most_the_maximum_of_regions(slots: int, shift: int) -> None:
    assert _shift_of(slots) == shift
    assert max(0, slots - 1) >> shift < REGIONS


@pytest.mark.parametrize(
    ("mib", "dim", "scattered"),
    [
        (0, 32, False),
        (256, 32, False),
        (1024, 32, True),
        (1024, 64, True),
        (1024, 128, False),
        (4096, 128, True),
        (8192, 512, False),
    ],
)
def test_rows_are_scattered_if_translation_is_the_limit(mib: int, dim: int, scattered: bool) -> None:
    assert is_scattered((mib << 20) // (4 * dim), 4 * dim) == scattered


def test_missed_keys_are_listed_with_a_mirror_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LaunchPlan, "reads_in_order", _reads_in_order)
    monkeypatch.setattr(index_mirror, "_REMEMBERED_BYTES", 0)
    store = bench.store(range(100))
    for path in ("direct", "auto"):
        cache = bench.cache(store, 20, miss_path=path)
        assert not cache.parts.plan.reads_in_order
        assert cache.mirror_index() == cache.parts.plan.reads_in_order == (path == "auto")
    store.upsert(ints([1]), rows_of([1], DIM))
    assert not cache.parts.plan.reads_in_order
    monkeypatch.setattr(index_mirror, "_REMEMBERED_BYTES", 1 << 40)
    assert cache.mirror_index() and not cache.parts.plan.reads_in_order


@pytest.mark.gpu
def test_gpu_cache_that_becomes_complete_meanwhile_serves_listed_keys() -> None:
    bench = Bench(0)
    store = bench.store(range(500))
    cache = bench.cache(store, 60, miss_path="auto")
    keys = np.random.default_rng(1).integers(0, 520, 300)
    for _ in range(3):
        cache.lookup_arrays(keys)
    cache.parts.residency.single_kernel = True  # as a check that ends between the choice of the kernels and their start has it
    rows = cache.lookup_arrays(keys)
    assert_same_bits(rows[keys < 500], rows_of(keys[keys < 500], DIM))
    assert (rows[keys >= 500] == np.float32(DEFAULT)).all()
    bench.close()


@pytest.mark.gpu
def test_gpu_graph_is_replayed_with_changing_keys() -> None:
    torch = pytest.importorskip("torch")
    dim, n = 32, 4096
    rng = np.random.default_rng(5)
    universe = rng.choice(1 << 20, 20_000, replace=False).astype(np.int64)
    store = HostStore(dim, allocator=PinnedHostAllocator(), rows=len(universe))
    store.upsert(universe[:15_000], rows_of(universe[:15_000], dim))
    cache = EmbeddingCache(dim, 4096, device=0, policy=load_policy("lru"), store=store, default=-1.0, miss_path="auto")
    keys = torch.zeros(n, dtype=torch.int64, device="cuda")
    out = torch.empty((n, dim), device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cache.lookup(keys.data_ptr(), n, out.data_ptr(), stream.cuda_stream)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        cache.lookup(keys.data_ptr(), n, out.data_ptr(), stream.cuda_stream, capturing=True)
    for replay in range(300):
        if replay % 20 == 10:
            some = rng.choice(universe, 300)
            store.upsert(some, rows_of(some, dim, replay // 20))
            cache.update(some)
        if replay % 50 == 30:
            cache.mirror_index()
        batch = rng.choice(universe, n)
        expected = np.empty((n, dim), np.float32)
        store.lookup(batch, expected, -1.0)
        keys.copy_(torch.from_numpy(batch))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert np.array_equal(out.cpu().numpy(), expected), replay
    assert cache.counters().misses > 100_000
    assert not any(list_words(cache))
    del graph
    cache.close()
    store.close()
