"""The copy of the host store's index: read while it is right, invalidated before it is not, never written under a reader."""

from __future__ import annotations

import ctypes
import gc
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.cache_bench import DEFAULT, DIM, Bench, Versions, ints
from support.cache_oracle import CacheOracle
from support.cache_pairs import OPERATIONS, Pair
from support.factories import ON_BOTH, Workshop
from support.oracles import assert_same_bits, rows_of
from support.waiting import HANG_SECONDS, join_all, wait_until

from hps_numba.cache import index_mirror
from hps_numba.cache.backends import CpuBackend
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.index_mirror import IndexMirror, taken_bytes
from hps_numba.cache.store_link import StoreLink
from hps_numba.cli.plan import _show as show_plan
from hps_numba.config import read_config
from hps_numba.device import driver
from hps_numba.errors import CapacityError, ClosedError, DeviceError
from hps_numba.kernels.layouts.cache import DESC_BLOCK, GUARD_ENTERED, GUARD_LEFT, STATE_BYTES, STATE_HOST
from hps_numba.kernels.layouts.host_store import META_LINES, index_bytes, lines_for
from hps_numba.kernels.policies._policy import Policy
from hps_numba.server.plan import DeviceRoom, make_plan
from hps_numba.storage.host import store as host_store
from hps_numba.storage.host import writing
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.store import HostStore


class CopyBench(Bench):
    """Caches that copy the index."""

    def cache(self, store: HostStore | None, rows: int = 0, *, policy: str | Policy = "lru", **options: Any) -> EmbeddingCache:
        return super().cache(store, rows, policy=policy, miss_path="auto", **options)


@pytest.fixture(params=ON_BOTH)
def bench(request: pytest.FixtureRequest) -> Iterator[CopyBench]:
    made = CopyBench(request.param)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def not_by_itself(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device too an index is copied when a test says so, but where ``by_itself`` is what is tested."""
    if "by_itself" not in request.fixturenames:
        monkeypatch.setattr(index_mirror, "_QUIET_SECONDS", 2 * HANG_SECONDS)


def led_to(cache: EmbeddingCache) -> int:
    """Address of the index that lookups read."""
    descriptor = cache.parts.state.word(STATE_HOST)
    return int(cache.parts.state.read_words(descriptor + DESC_BLOCK, 1)[0])


# -- what lookups read ------------------------------------------------------------------------------


def test_misses_read_the_mirror_until_the_store_changes(bench: CopyBench) -> None:
    store = bench.store(range(200))
    cache = bench.cache(store, 20)
    assert cache.mirror_index() and cache.mirror_index()
    assert led_to(cache) != store.block
    assert cache.index_mirror_bytes == index_bytes(ctypes.c_int64.from_address(store.block + META_LINES).value)
    keys = ints(range(250))
    expected = np.vstack([rows_of(keys[:200], DIM), np.full((50, DIM), DEFAULT, np.float32)])
    assert_same_bits(cache.lookup_arrays(keys), expected)
    store.upsert(keys[190:210], rows_of(keys[190:210], DIM, 1))
    assert led_to(cache) == store.block
    assert cache.index_mirror_bytes == 0
    cache.update(keys[190:210])
    expected[190:210] = rows_of(keys[190:210], DIM, 1)
    assert_same_bits(cache.lookup_arrays(keys), expected)
    assert cache.mirror_index()
    assert led_to(cache) != store.block
    assert_same_bits(cache.lookup_arrays(keys), expected)


@pytest.mark.parametrize("change", ["upsert", "update", "erase", "clear", "replace", "adopt", "grow", "close"])
def test_every_change_invalidates_the_mirror_first(bench: CopyBench, change: str) -> None:
    store = bench.store(range(60))
    cache = bench.cache(store, 20)
    assert cache.mirror_index()
    copy = led_to(cache)
    at_start: list[int] = []

    def look() -> None:
        at_start.append(led_to(cache))

    store.watch_writes(look)
    keys = ints(range(40, 80))
    if change == "close":
        store.close()
        assert copy not in at_start and not cache.index_mirror_bytes
        assert cache.parts.state.word(STATE_HOST) == 0
        return
    content, sibling = store.new_content(0), store.sibling()
    {
        "upsert": lambda: store.upsert(keys, rows_of(keys, DIM, 1)),
        "update": lambda: store.update(keys, rows_of(keys, DIM, 1)),
        "erase": lambda: store.erase(keys),
        "clear": store.clear,
        "replace": lambda: store.replace(content),
        "adopt": lambda: store.adopt(sibling),
        "grow": lambda: store.upsert(ints(range(5000)), rows_of(ints(range(5000)), DIM, 2)),
    }[change]()
    store.unwatch_writes(look)
    assert at_start and copy not in at_start
    assert led_to(cache) == store.block
    cache.clear()
    expected = np.empty((5000, DIM), np.float32)
    store.lookup(ints(range(5000)), expected, DEFAULT)
    for _ in range(2):
        assert_same_bits(cache.lookup_arrays(ints(range(5000))), expected)
        cache.clear()
        assert cache.mirror_index()


def test_mirror_copied_during_a_change_is_not_read(bench: CopyBench, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bench.store(range(100))
    cache = bench.cache(store, 20)
    copied, keys = cache.backend.copy, ints(range(100))

    def change_meanwhile(*args: int) -> None:
        copied(*args)
        store.upsert(keys[:50], rows_of(keys[:50], DIM, 1))

    with monkeypatch.context() as patch:
        patch.setattr(cache.backend, "copy", change_meanwhile, raising=False)
        assert not cache.mirror_index()
    assert led_to(cache) == store.block
    cache.update(keys)
    assert_same_bits(cache.lookup_arrays(keys[:50]), rows_of(keys[:50], DIM, 1))
    assert cache.mirror_index()
    assert_same_bits(cache.lookup_arrays(keys[50:]), rows_of(keys[50:], DIM))


def test_row_changed_after_it_was_found_in_the_mirror_is_not_inserted(
    bench: CopyBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ints(range(50))
    store = bench.store(keys)
    cache = bench.cache(store, 200)
    assert cache.mirror_index()
    end = cache.parts.lookups.end_batch

    def update_before(*args: Any) -> None:
        cache.backend.synchronize(args[3])  # the rows were read
        store.upsert(keys[:20], rows_of(keys[:20], DIM, 7))
        cache.update(keys[:20])
        assert cache.mirror_index() == (bench.device is not None)  # a lookup on the CPU is a reader that still has the old one
        end(*args)

    with monkeypatch.context() as patch:
        patch.setattr(cache.parts.lookups, "end_batch", update_before)
        assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    assert cache.counters().stale_dropped == 20
    assert cache.query(keys)[1].tolist() == keys[:20].tolist()
    assert_same_bits(cache.lookup_arrays(keys[:20]), rows_of(keys[:20], DIM, 7))


@pytest.mark.parametrize(("policy", "dim"), [("lru", 17), ("lfu", 3)])
@pytest.mark.parametrize("device", ON_BOTH)
def test_any_sequence_of_operations_equals_the_oracle(device: int | None, policy: str, dim: int) -> None:
    bench = CopyBench(device)
    pair = Pair(bench, policy, dim, seed=dim)
    read = 0
    for _ in range(120):
        operation = pair.rng.choice([*OPERATIONS, "copy", "copy"])
        if operation == "copy":
            assert pair.cache.mirror_index()
        else:
            getattr(pair, operation)()
        read += pair.cache.index_mirror_bytes > 0
        pair.check()
    assert isinstance(pair.oracle, CacheOracle) and read > 20
    bench.close()


def test_fixed_caches_and_pooled_lookups_read_the_mirror(bench: CopyBench) -> None:
    keys = ints(range(300))
    store = bench.store(keys[:30])
    cache = bench.cache(store, 30, kind="uvm")
    cache.warm()
    store.upsert(keys, rows_of(keys, DIM))
    assert cache.mirror_index()
    assert_same_bits(cache.lookup_arrays(keys), rows_of(keys, DIM))
    ends = ints(range(0, 301, 10))
    pooled = cache.pool_arrays(keys, ends)
    expected = np.zeros((30, DIM), np.float32)
    for bag in range(30):
        for key in keys[10 * bag : 10 * bag + 10]:
            expected[bag] += rows_of(ints([key]), DIM)[0]
    assert_same_bits(pooled, expected)
    assert led_to(cache) != store.block


def test_caches_that_hold_all_rows_have_no_mirror(bench: CopyBench) -> None:
    store = bench.store(range(100))
    assert not bench.cache(store, 100, whole=True).mirror_index()
    assert not bench.cache(store, 100, kind="static").mirror_index()
    assert not bench.cache(None, 100).mirror_index()
    plain = Bench(bench.device)
    assert not plain.cache(store, 20).mirror_index()  # miss_path direct
    plain.close()


# -- when it is made --------------------------------------------------------------------------------


class PlayedClock:
    """The clock and the timer of copies, whose time passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._due: dict[str, tuple[float, Callable[[], object]]] = {}

    def monotonic(self) -> float:
        return self.now

    def add(self, name: str, call: Callable[[], object], *, delay: float) -> None:
        self._due[name] = (self.now + delay, call)

    def remove(self, name: str) -> None:
        self._due.pop(name, None)

    def turn(self, seconds: float) -> None:
        """Let time pass, and make the calls that are due then."""
        end = self.now + seconds
        while due := sorted((at, name) for name, (at, _) in self._due.items() if at <= end):
            self.now, name = due[0]
            self._due.pop(name)[1]()
        self.now = end


@pytest.fixture
def clock(by_itself: None, monkeypatch: pytest.MonkeyPatch) -> PlayedClock:
    """Caches copy by themselves, by a clock that is played."""
    played = PlayedClock()
    monkeypatch.setattr(index_mirror, "_timer", played)
    monkeypatch.setattr(index_mirror, "time", played)
    return played


@pytest.fixture
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of the CPU copy by themselves, as those of a device do."""
    make = IndexMirror.__init__

    def made(self: IndexMirror, *args: Any) -> None:
        make(self, *args)
        self._automatic = True
        self.make_later()

    monkeypatch.setattr(IndexMirror, "__init__", made)


@pytest.mark.usefixtures("by_itself")
def test_timer_makes_a_mirror_and_another_after_a_change(bench: CopyBench) -> None:
    store = bench.store(range(100))
    cache = bench.cache(store, 20)
    wait_until(lambda: cache.index_mirror_bytes)
    store.upsert(ints([3]), rows_of(ints([3]), DIM, 1))
    wait_until(lambda: cache.index_mirror_bytes)
    assert_same_bits(cache.lookup_arrays(ints([3])), rows_of(ints([3]), DIM, 1))


def test_mirror_is_made_automatically_and_again_after_a_change(bench: CopyBench, clock: PlayedClock) -> None:
    store = bench.store(range(100))
    cache = bench.cache(store, 20)
    clock.turn(0.09)
    assert cache.index_mirror_bytes == 0
    clock.turn(0.02)
    assert cache.index_mirror_bytes > 0
    store.upsert(ints([3]), rows_of(ints([3]), DIM, 1))
    clock.turn(0.09)
    assert cache.index_mirror_bytes == 0
    clock.turn(0.02)
    assert cache.index_mirror_bytes > 0
    assert_same_bits(cache.lookup_arrays(ints([3])), rows_of(ints([3]), DIM, 1))


def test_mirror_is_not_made_while_the_store_is_written(
    bench: CopyBench, clock: PlayedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_mirror, "_QUIET_SECONDS", 0.3)
    store = bench.store(range(10))
    cache = bench.cache(store, 20)
    for pause in (0.01, 0.29) * 20:
        store.upsert(ints([3]), rows_of(ints([3]), DIM, 1))
        clock.turn(pause)
        assert cache.index_mirror_bytes == 0
    clock.turn(0.02)
    assert cache.index_mirror_bytes > 0


def test_mirror_is_not_made_while_the_cache_is_complete(bench: CopyBench, clock: PlayedClock) -> None:
    store = bench.store(range(100))
    cache = bench.cache(store, 100, kind="uvm")
    assert cache.warm() == 100
    assert cache.mirror_index()  # when asked for
    store.upsert(ints([3]), rows_of([3], DIM, 1))
    cache.update(ints([3]))
    clock.turn(60)
    assert cache.index_mirror_bytes == 0
    store.upsert(ints([100]), rows_of([100], DIM))
    cache.update(ints([100]))
    clock.turn(60)
    assert cache.index_mirror_bytes > 0
    assert_same_bits(cache.lookup_arrays(ints([3, 100])), np.vstack([rows_of([3], DIM, 1), rows_of([100], DIM)]))


def test_mirror_on_the_cpu_is_made_on_request(bench: CopyBench) -> None:
    cache = bench.cache(bench.store(range(100)), 20)
    cache.warm()
    assert (cache.index_mirror_bytes > 0) == (bench.device is not None)


def test_interrupted_write_is_repaired_before_mirroring(bench: CopyBench, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bench.store(range(100))
    cache = bench.cache(store, 20)
    assert cache.mirror_index()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "host_upsert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.upsert(ints([1]), rows_of(ints([1]), DIM, 1))
    assert not cache.mirror_index()
    store.upsert(ints([1]), rows_of(ints([1]), DIM, 1))
    assert cache.mirror_index()
    assert_same_bits(cache.lookup_arrays(ints([1])), rows_of(ints([1]), DIM, 1))


def test_writer_interrupted_while_it_invalidates_changes_nothing(bench: CopyBench, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bench.store(range(100))
    cache = bench.cache(store, 20)
    assert cache.mirror_index() and cache.parts.link is not None
    point_to = cache.parts.link.point_to

    def interrupted(*args: int) -> None:
        point_to(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache.parts.link, "point_to", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.erase(ints(range(100)))
    assert len(store) == 100
    assert_same_bits(cache.lookup_arrays(ints(range(100))), rows_of(ints(range(100)), DIM))
    store.erase(ints(range(50)))
    cache.erase(ints(range(50)))
    assert led_to(cache) == store.block
    assert cache.mirror_index()
    assert (cache.lookup_arrays(ints(range(50))) == np.float32(DEFAULT)).all()


def test_writer_and_mirroring_do_not_deadlock(bench: CopyBench, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bench.store(range(100))
    cache = bench.cache(store, 20)
    copied, begun, wait = cache.backend.copy, threading.Event(), Epochs.wait
    left_in_time: list[bool] = []

    def slow(*args: int) -> None:
        begun.set()
        time.sleep(0.2)
        copied(*args)

    def waits(epochs: Epochs, tag: int, seconds: float) -> bool:
        left_in_time.append(wait(epochs, tag, seconds))
        return left_in_time[-1]

    with monkeypatch.context() as patch:
        patch.setattr(cache.backend, "copy", slow, raising=False)
        patch.setattr(host_store, "_GRACE_SECONDS", HANG_SECONDS)
        patch.setattr(Epochs, "wait", waits)
        made: list[bool] = []
        thread = threading.Thread(target=lambda: made.append(cache.mirror_index()))
        thread.start()
        assert begun.wait(HANG_SECONDS)
        store.clear()  # waits for readers of the old content, of which the copy is one
        join_all(thread)
    assert left_in_time and all(left_in_time)
    assert made == [False]
    assert store.versions.retired == 0


def test_mirroring_does_not_wait_long_for_a_writer(bench: CopyBench) -> None:
    store = bench.store(range(100))
    cache = bench.cache(store, 20)
    answers: list[bool] = []
    with store.write_lock.writing():
        thread = threading.Thread(target=lambda: answers.append(cache.mirror_index()))
        thread.start()
        join_all(thread)
        assert answers == [False]
    assert cache.mirror_index()


def test_next_writer_tells_a_device_that_could_not_be_told(bench: CopyBench, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bench.store(range(100))
    cache = bench.cache(store, 20)
    copy, link = cache.parts.mirror, cache.parts.link
    assert cache.mirror_index() and copy is not None and link is not None
    with monkeypatch.context() as patch:
        patch.setattr(link, "point_to", lambda *_: False)
        store.upsert(ints([1]), rows_of([1], DIM, 1))
    assert copy.is_used and led_to(cache) != store.block
    store.upsert(ints([2]), rows_of([2], DIM, 1))
    assert not copy.is_used and led_to(cache) == store.block
    with monkeypatch.context() as patch:
        patch.setattr(link, "problem", DeviceError("lost"))
        assert not cache.mirror_index()


def test_failed_mirroring_is_retried(bench: CopyBench, clock: PlayedClock, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = iter([False, False])
    real = IndexMirror._has_room
    monkeypatch.setattr(IndexMirror, "_has_room", lambda copy, size: next(refusals, True) and real(copy, size))
    cache = bench.cache(bench.store(range(100)), 20)
    for seconds, left in ((0.2, 1), (5, 0), (5, 0)):
        assert cache.index_mirror_bytes == 0
        clock.turn(seconds)
        assert operator.length_hint(refusals) == left
    assert cache.index_mirror_bytes > 0


def test_forked_child_keeps_a_mirror_in_host_memory_only() -> None:
    bench = CopyBench(None)
    store = bench.store(range(100))
    cache = bench.cache(store, 20)
    assert cache.mirror_index() and cache.parts.mirror is not None
    cache.parts.mirror.reset_after_fork()
    store.upsert(ints(range(100)), rows_of(range(100), DIM, 1))
    cache.update(ints(range(100)))
    assert led_to(cache) == store.block
    assert_same_bits(cache.lookup_arrays(ints(range(100))), rows_of(range(100), DIM, 1))
    bench.close()


def test_mirror_on_a_device_ends_with_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = limited(monkeypatch, total=16_000, free=16_000)
    copy._lent = copy._automatic = True
    copy.reset_after_fork()
    assert not copy.is_used
    copy.invalidate()
    assert not copy._due
    copy.close()


def test_timer_does_not_keep_a_dropped_mirror_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = limited(monkeypatch, total=16_000, free=16_000)
    copy._automatic = True
    copy._call_in(60.0)
    copy._store.unwatch_writes(copy.invalidate)
    seen = weakref.ref(copy)
    del copy
    gc.collect()
    assert seen() is None


# -- its memory ---------------------------------------------------------------------------------------


class Played:
    """A copy for a device whose warps are played by the test, over memory of the process."""

    def __init__(self, store: HostStore) -> None:
        backend = CpuBackend()
        self.state = backend.allocate(STATE_BYTES, "state")
        self.link = StoreLink(backend, self.state.address, store)
        self.copy = IndexMirror(backend, self.link, store, "table", lambda: True)
        store.epochs.add_guard(self.link)

    def count(self, guard: int, stripe: int) -> None:
        ctypes.c_uint32.from_address(self.state.address + guard + 4 * stripe).value += 1

    def close(self) -> None:
        self.copy.close()
        self.link.close()


def test_mirror_is_not_overwritten_while_a_warp_may_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_mirror, "_READERS_SECONDS", 0.05)
    bench = CopyBench(None)
    store = bench.store(range(100))
    played = Played(store)
    assert played.copy.make()
    memory = played.copy._memory
    assert memory is not None
    before = ctypes.string_at(memory.address, played.copy.bytes)
    played.count(GUARD_ENTERED, 7)  # a warp that reads the copy
    store.upsert(ints(range(100)), rows_of(ints(range(100)), DIM, 1))
    assert not played.copy.make()
    assert ctypes.string_at(memory.address, played.copy.bytes) == before
    played.count(GUARD_LEFT, 7)
    assert played.copy.make()
    assert ctypes.string_at(memory.address, played.copy.bytes) != before
    played.close()
    bench.close()


def test_memory_of_the_mirror_grows_with_the_table_and_is_freed_with_the_cache(bench: CopyBench) -> None:
    store = bench.store(range(10))
    cache = bench.cache(store, 20)
    alone = cache.bytes
    assert cache.mirror_index()
    small = cache.index_mirror_bytes
    assert cache.bytes == alone + small
    store.upsert(ints(range(3000)), rows_of(ints(range(3000)), DIM))
    assert cache.mirror_index()
    assert cache.index_mirror_bytes >= 3000 * 16 > small
    assert_same_bits(cache.lookup_arrays(ints(range(3000))), rows_of(ints(range(3000)), DIM))
    mirror = cache.parts.mirror
    cache.close()
    assert mirror is not None and mirror.bytes == 0
    with pytest.raises(ClosedError):
        cache.mirror_index()


def limited(monkeypatch: pytest.MonkeyPatch, *, total: int, free: int) -> IndexMirror:
    """A copy for a device that there is not: memory is that of the process."""
    backend = CpuBackend()
    store = HostStore(DIM)
    link = SimpleNamespace(point_to=lambda *_: True, problem=None)
    copy = IndexMirror(backend, link, store, "table", lambda: True)  # type: ignore[arg-type]
    backend.ordinal = 41
    monkeypatch.setattr(index_mirror.driver, "device_info", lambda ordinal: SimpleNamespace(total_bytes=total))
    monkeypatch.setattr(index_mirror.device_memory, "free_bytes", lambda ordinal: free)
    return copy


def test_mirrors_of_a_device_take_a_bounded_share(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (limited(monkeypatch, total=16_000, free=16_000) for _ in range(2))
    first._take(700)
    with pytest.raises(CapacityError, match=r"device 41: expected room for 400 B, got .* free, and 700 B taken of 1000 B"):
        second._take(400)
    second._take(300)
    first.close()
    second._release()
    second._take(1000)
    second.close()
    assert taken_bytes(41) == 0


def test_mirrors_that_were_dropped_take_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = limited(monkeypatch, total=16_000, free=16_000)
    dropped._take(1000)
    del dropped
    gc.collect()
    other = limited(monkeypatch, total=16_000, free=16_000)
    other._take(1000)
    other.close()


def test_mirror_leaves_as_much_memory_free(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    copy = limited(monkeypatch, total=16_000, free=1500)
    caplog.set_level("INFO", "hps_numba.cache.index_mirror")
    assert not copy._has_room(600)
    assert not copy._has_room(600)
    (record,) = caplog.records  # said once
    assert "expected room for 600 B, got 1.5 KiB free" in record.getMessage()
    assert copy._has_room(400)
    copy.close()


def test_mirror_leaves_what_caches_were_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = limited(monkeypatch, total=16_000, free=1600)
    monkeypatch.setattr(index_mirror, "promised_bytes", lambda ordinal: 100)
    assert not copy._has_room(501)  # 1000 are left free
    assert copy._has_room(500)
    copy.close()


def test_lookups_work_without_memory_for_a_mirror(bench: CopyBench, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bench.store(range(100))
    cache = bench.cache(store, 20)

    def full(size: int, purpose: str) -> Any:
        raise CapacityError(f"{purpose}: full")

    with monkeypatch.context() as patch:
        patch.setattr(cache.backend, "allocate", full, raising=False)
        assert not cache.mirror_index()
    assert led_to(cache) == store.block
    assert cache.mirror_index()


@pytest.mark.parametrize(
    ("entry", "copies"),
    [
        ({}, True),
        ({"miss_path": "direct"}, False),
        ({"miss_path": "staged"}, False),
        ({"embedding_cache_type": "static"}, False),
        ({"embedding_cache_type": "uvm"}, True),
        ({"gpucacheper": 1.0}, False),
    ],
)
def test_plan_shows_bytes_of_mirrors(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], entry: dict[str, Any], copies: bool
) -> None:
    monkeypatch.setattr(driver, "device_count", lambda: 2)
    monkeypatch.setattr("hps_numba.server.plan.room_on", lambda device: DeviceRoom(total=16 << 30, free=15 << 30))
    model = workshop.model((range(1000), 4), (range(500), 4), **{"deployed_device_list": [1], "gpucacheper": 0.2} | entry)
    planned = make_plan(read_config({"supportlonglong": True, "models": [model]}))
    expected = [index_bytes(lines_for(rows)) if copies else 0 for rows in (1000, 500)]
    assert [table.index_mirror_bytes for table in planned.tables] == expected
    assert planned.index_mirror_bytes == {1: sum(expected)}
    assert planned.as_dict()["index_mirror_bytes"] == {"1": sum(expected)}
    show_plan(planned)
    assert ("for index mirrors if they fit" in capsys.readouterr().out) == copies


@pytest.mark.gpu
def test_gpu_server_mirrors_and_shows_it_in_stats(workshop: Workshop) -> None:
    torch = pytest.importorskip("torch")
    keys = np.arange(5000)
    model = workshop.model((keys, 32), gpucacheper=0.1, deployed_device_list=[0])
    server = workshop.open(model)
    (table,) = server.stats()["m"].values()
    (cache,) = table.caches
    assert 0 < cache.index_mirror_bytes < cache.bytes
    assert cache.index_mirror_bytes == server.plan().index_mirror_bytes[0]
    asked = torch.arange(5000, device="cuda")
    assert_same_bits(server.lookup(asked, "m", 0).cpu().numpy(), rows_of(keys, 32))
    server.update(keys[:100], rows_of(keys[:100], 32, 1), "m", 0)
    assert_same_bits(server.lookup(asked[:100], "m", 0).cpu().numpy(), rows_of(keys[:100], 32, 1))


# -- many threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ON_BOTH)
def test_threads_with_concurrent_writers_and_mirroring_see_whole_fresh_rows(device: int | None) -> None:
    bench = CopyBench(device)
    table = Versions(bench)
    cache = bench.cache(table.store, 60, buffers=3)
    copies: list[int] = []

    def copy() -> None:
        if cache.mirror_index():
            copies.append(1)
        time.sleep(0.001)

    def rest(rng: np.random.Generator) -> None:
        time.sleep(float(rng.choice([0.0, 0.0, 0.01])))

    table.race(cache, readers=3, after_write=rest, beside=[copy], enough=lambda: len(copies) > 20)
    bench.close()
