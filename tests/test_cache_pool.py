"""Pooled lookup: bags of keys against a slow and obvious oracle, bit for bit, on the CPU twin and (marker gpu) on a device."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from naive import rows_of

from hps_numba.cache import EmbeddingCache
from hps_numba.cache_layout import GUARD_ENTERED, GUARD_LEFT, GUARD_STRIPES
from hps_numba.cache_place import HostPlace
from hps_numba.kernels.build import KernelSpec, bindings, ptx_of
from hps_numba.kernels.cache_pool import (
    COMBINERS,
    EMPTY_DEFAULT,
    OFFSETS32,
    OPEN_END,
    PADDED,
    THREADS,
    pool_blocks,
    pool_lanes,
    pool_run,
)
from hps_numba.kernels.policies._policy import load_policy
from hps_numba.memory import PinnedHostAllocator, PlainHostAllocator
from hps_numba.storage.host_store import HostStore

DEFAULT = -7.5
PADDING = 5
DIMS = (1, 3, 16, 17, 128)
STORED = ("float32", "float16", "bfloat16", "int8", "float8_e4m3")
KNOWN = 40  # keys of the store; batches ask for 0 to 59


class Batch:
    """Bags over known, unknown and padding keys: empty ones first, last and between, and keys that come again."""

    def __init__(self, seed: int, bags: int = 23, longest: int = 9) -> None:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(0, longest + 1, bags)
        lengths[[0, bags // 2, -1]] = 0
        if bags > 4:
            lengths[3] = 4 * longest
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.keys = rng.integers(0, 60, self.offsets[-1]).astype(np.int64)
        self.weights = (rng.normal(size=len(self.keys)) + 3).astype(np.float32)

    @property
    def bags(self) -> int:
        return len(self.offsets) - 1


def naive_pool(batch: Batch, rows: np.ndarray, combiner: str, **how: Any) -> np.ndarray:
    """One operation at a time, in order; ``rows`` are those of the positions, in the type to calculate in."""
    kind, weights, skipped = rows.dtype.type, how.get("weights"), how.get("skipped", ())
    pooled = np.full((batch.bags, rows.shape[1]), how.get("empty", 0), kind)
    for bag in range(batch.bags):
        places = [i for i in range(batch.offsets[bag], batch.offsets[bag + 1]) if batch.keys[i] not in skipped]
        if not places:
            continue
        if combiner == "max":
            pooled[bag] = rows[places].max(axis=0)
            continue
        sums, total = np.zeros(rows.shape[1], kind), kind(0)
        for i in places:
            weight = kind(1) if weights is None else kind(weights[i])
            sums = sums + rows[i] * weight
            total = total + (weight * weight if combiner == "sqrtn" else weight)
        divisor = kind(1) if combiner == "sum" else total if combiner == "mean" else np.sqrt(total)
        pooled[bag] = sums / divisor if divisor != 0 else 0
    return pooled


class PlainKernel:
    """A kernel as plain Python."""

    def __init__(self, spec: KernelSpec) -> None:
        self._run: FunctionType = bindings(spec, lambda function: function)

    def launch(self, blocks: int, stream: int, *args: Any, threads: int = 1) -> None:
        with np.errstate(all="ignore"):
            self._run(*args)


class PlainPlace(HostPlace):
    """The memory of the process, and kernels that are not compiled."""

    def kernel(self, spec: KernelSpec) -> Any:
        return PlainKernel(spec)


class Table:
    """A store of the keys 0 to 39, and a cache that holds 20 of them at most."""

    def __init__(self, where: str, dim: int, *, policy: str = "lru", **options: Any) -> None:
        device = 0 if where == "gpu" else None
        self.store = HostStore(dim, allocator=PlainHostAllocator() if device is None else PinnedHostAllocator())
        self.store.upsert(np.arange(KNOWN), signed_rows(np.arange(KNOWN), dim))
        self.cache = EmbeddingCache(
            dim, 20, device=device, policy=load_policy(policy), default=DEFAULT, store=self.store, **options
        )
        if where == "plain":
            self.cache._place = PlainPlace()
        self.cache.warm()

    def close(self) -> None:
        self.cache.close()
        self.store.close()

    def rows_for(self, keys: np.ndarray) -> np.ndarray:
        """The rows that a lookup would now answer with: as the cache has them, else as the store has, else the default."""
        rows, missing = self.cache.query(keys)
        behind = signed_rows(keys, self.cache.dim)
        behind[(keys < 0) | (keys >= KNOWN)] = DEFAULT
        rows[missing] = behind[missing]
        return rows

    def pool(self, batch: Batch, combiner: str, weights: np.ndarray | None = None, **how: Any) -> np.ndarray:
        """Run the kernel as a pooled lookup does, and insert what it lists."""
        cache = self.cache
        options, out_type, key_form = how.get("options", 0), how.get("out_type", "float32"), how.get("key_form", "int64")
        run, shift = how.get("run", 3), how.get("shift", 0)
        spec = KernelSpec(
            name="pool_kernel",
            dim=cache.dim,
            policy=load_policy("fifo") if cache.fixed else cache.policy,
            fixed=cache.fixed,
            row_type=cache.row_type,
            out_type=out_type,
            key_form=key_form,
            out_vector=shift == 0,
        )
        scratch, stream, n = cache._own, cache._stream, len(batch.keys)
        out = np.full((batch.bags, cache.dim), 99, np.float32 if out_type == "float32" else np.uint16)
        offsets = batch.offsets.astype(np.int32 if options & OFFSETS32 else np.int64)
        offsets = offsets[:-1] if options & OPEN_END else offsets
        given = [batch.keys.astype(key_form), offsets] + ([weights] if weights is not None else [])
        with cache._controlled(), cache._copies(*given) as places, cache._room(out.nbytes + shift) as room, cache._reading():
            scratch.reserve(max(n, 1), False, stream)
            cache._place.kernel(spec).launch(
                pool_blocks(batch.bags, cache.dim, run),
                stream,
                *(cache._lines, cache._rows, cache.sets, cache._state, places[0], n, places[1], batch.bags, run),
                *(places[2] if weights is not None else 0, room + shift, COMBINERS[combiner], np.float32(DEFAULT)),
                *(options, PADDING, scratch.address),
                threads=THREADS,
            )
            if not cache.fixed:
                cache._finish(scratch, n, scratch.stage, 4 * cache.dim, max(1, 4 * n // cache.capacity), stream)
            cache._place.to_host(out, room + shift, stream)
        return out

    def guards(self) -> tuple[int, int]:
        """Counts of the guards entered and left."""
        entered, left = (self.cache._words(self.cache._state + at, GUARD_STRIPES // 2) for at in (GUARD_ENTERED, GUARD_LEFT))
        return int(entered.view(np.uint32).sum()), int(left.view(np.uint32).sum())


def signed_rows(keys: np.ndarray, dim: int) -> np.ndarray:
    """Rows of both signs whose sums are rounded."""
    return ((rows_of(keys, dim) % 7 - 3) * np.float32(1.1)).astype(np.float32)


def assert_same(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8))


def assert_pools(table: Table, batch: Batch, combiner: str, weights: np.ndarray | None = None) -> None:
    rows = table.rows_for(batch.keys)
    pooled = table.pool(batch, combiner, weights)
    assert_same(pooled, naive_pool(batch, rows, combiner, weights=weights))
    if combiner != "max":
        exact = naive_pool(batch, rows.astype(np.float64), combiner, weights=weights)
        size = naive_pool(
            batch, np.abs(rows.astype(np.float64)), combiner, weights=None if weights is None else np.abs(weights)
        )
        assert (np.abs(pooled - exact) <= 64 * 2.0**-24 * size).all()


GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture
def open_table() -> Iterator[Any]:
    tables: list[Table] = []

    def open_one(*args: Any, **options: Any) -> Table:
        tables.append(Table(*args, **options))
        return tables[-1]

    yield open_one
    for table in tables:
        table.close()


def pools_every_way(table: Table, bags: int, longest: int) -> None:
    for seed, combiner in enumerate(COMBINERS):
        batch = Batch(seed, bags, longest)
        assert_pools(table, batch, combiner)
        if combiner != "max":
            assert_pools(table, batch, combiner, batch.weights)


@pytest.mark.parametrize("row_type", STORED)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("where", ["plain", GPU])
def test_every_combiner_width_and_row_type_bit_for_bit(open_table: Any, where: str, dim: int, row_type: str) -> None:
    bags, longest = (23, 9) if where == "gpu" or dim < 20 else (4, 2)
    pools_every_way(open_table(where, dim, row_type=row_type), bags, longest)


@pytest.mark.parametrize("where", ["cpu", GPU])
def test_compiled_kernel_bit_for_bit(open_table: Any, where: str) -> None:
    pools_every_way(open_table(where, 16), 300, 20)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [3, 16, 128])
def test_device_and_cpu_twin_agree_bit_for_bit(open_table: Any, dim: int) -> None:
    device, twin = open_table("gpu", dim), open_table("cpu", dim)
    for seed, combiner in enumerate(COMBINERS):
        batch = Batch(seed, 2000, 30)
        weights = batch.weights if combiner != "max" else None
        assert_same(device.pool(batch, combiner, weights), twin.pool(batch, combiner, weights))


@pytest.mark.parametrize("where", ["plain", GPU])
@pytest.mark.parametrize("dim", [256, 512, 1024])
def test_wide_rows(open_table: Any, where: str, dim: int) -> None:
    assert_pools(open_table(where, dim), Batch(1, 5, 2), "mean")


@pytest.mark.parametrize("where", ["plain", GPU])
def test_padding_is_skipped_and_empty_bags_may_get_the_default(open_table: Any, where: str) -> None:
    table = open_table(where, 3)
    batch = Batch(3, 30, 2)
    batch.keys[batch.offsets[3] : batch.offsets[4]] = PADDING
    rows = table.rows_for(batch.keys)
    wanted = naive_pool(batch, rows, "mean", skipped=(PADDING,), empty=DEFAULT, weights=batch.weights)
    assert_same(table.pool(batch, "mean", batch.weights, options=PADDED | EMPTY_DEFAULT), wanted)
    assert (wanted[3] == DEFAULT).all() and (wanted[0] == DEFAULT).all()
    assert (table.pool(batch, "max", options=PADDED)[3] == 0).all()


@pytest.mark.parametrize("where", ["plain", GPU])
@pytest.mark.parametrize("options", [OFFSETS32, OPEN_END, OFFSETS32 | OPEN_END])
def test_forms_of_offsets(open_table: Any, where: str, options: int) -> None:
    table, batch = open_table(where, 4), Batch(4)
    wanted = naive_pool(batch, table.rows_for(batch.keys), "sum")
    assert_same(table.pool(batch, "sum", options=options), wanted)


@pytest.mark.parametrize("where", ["plain", GPU])
@pytest.mark.parametrize("run", [1, 2, 7, 32, 1000])
def test_any_run_of_bags_gives_the_same(open_table: Any, where: str, run: int) -> None:
    table, batch = open_table(where, 3), Batch(5, 70, 3)
    wanted = naive_pool(batch, table.rows_for(batch.keys), "sqrtn")
    assert_same(table.pool(batch, "sqrtn", run=run), wanted)


@pytest.mark.parametrize("where", ["plain", GPU])
def test_offsets_beyond_the_keys_read_nothing_beyond_them(open_table: Any, where: str) -> None:
    table, batch = open_table(where, 3), Batch(6, 4, 2)
    wanted = naive_pool(batch, table.rows_for(batch.keys), "sum")
    batch.offsets[-1] = 1 << 40
    batch.offsets[0] = -5
    assert_same(table.pool(batch, "sum"), wanted)


@pytest.mark.parametrize("where", ["plain", GPU])
def test_weights_that_sum_to_zero_give_zero(open_table: Any, where: str) -> None:
    table, batch = open_table(where, 3), Batch(7)
    weights = np.zeros_like(batch.weights)
    for combiner in ("mean", "sqrtn"):
        assert (table.pool(batch, combiner, weights) == 0).all()


@pytest.mark.parametrize("where", ["plain", GPU])
@pytest.mark.parametrize("out_type", ["float16", "bfloat16"])
@pytest.mark.parametrize("dim", [3, 4])
def test_narrow_answers(open_table: Any, where: str, out_type: str, dim: int) -> None:
    table, batch = open_table(where, dim), Batch(8)
    wanted = naive_pool(batch, table.rows_for(batch.keys), "sum")
    got = table.pool(batch, "sum", out_type=out_type)
    if out_type == "float16":
        assert_same(got.view(np.float16), wanted.astype(np.float16))
    else:
        bits = wanted.view(np.uint32)
        assert_same(got, ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))


@pytest.mark.parametrize("where", ["plain", GPU])
def test_an_answer_that_is_not_aligned(open_table: Any, where: str) -> None:
    table, batch = open_table(where, 8), Batch(9)
    wanted = naive_pool(batch, table.rows_for(batch.keys), "mean")
    assert_same(table.pool(batch, "mean", shift=4), wanted)


@pytest.mark.parametrize("where", ["plain", GPU])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_the_cache_is_left_as_by_a_lookup(open_table: Any, where: str, policy: str) -> None:
    pooled, looked_up = open_table(where, 3, policy=policy), open_table(where, 3, policy=policy)
    for seed in range(4):
        batch = Batch(seed)
        pooled.pool(batch, "sum")
        cache, n = looked_up.cache, len(batch.keys)
        with cache._copies(batch.keys) as (keys,):
            cache.lookup(keys, n, 0, cache._stream)
            cache.place.synchronize(cache._stream)
        assert pooled.cache.entries() == looked_up.cache.entries()
        assert pooled.cache.counters() == looked_up.cache.counters()
    assert pooled.cache.counters().inserted > 0 and pooled.cache.counters().absent > 0
    entered, left = pooled.guards()
    assert entered == left > 0


@pytest.mark.parametrize("where", ["plain", GPU])
def test_a_fixed_cache_of_a_part_of_the_table(open_table: Any, where: str) -> None:
    table, batch = open_table(where, 4, kind="uvm"), Batch(10)
    wanted = naive_pool(batch, table.rows_for(batch.keys), "max")
    assert_same(table.pool(batch, "max"), wanted)
    assert 0 < table.cache.counters().misses < len(batch.keys)


@pytest.mark.parametrize("where", ["plain", GPU])
def test_int32_keys(open_table: Any, where: str) -> None:
    table, batch = open_table(where, 3), Batch(11)
    batch.keys[::5] = -1 if where == "gpu" else 2**31 - 1
    wanted = naive_pool(batch, table.rows_for(batch.keys), "sum")
    assert_same(table.pool(batch, "sum", key_form="int32"), wanted)


def test_nothing_to_pool(open_table: Any) -> None:
    table, batch = open_table("plain", 3), Batch(12)
    batch.keys, batch.offsets = batch.keys[:0], np.zeros(4, np.int64)
    assert (table.pool(batch, "max") == 0).all()


def test_the_grid_covers_all_bags() -> None:
    for dim in (*DIMS, 32, 64, 1000):
        lanes = pool_lanes(dim)
        assert 4 <= lanes <= 32 and 32 % lanes == 0
        for bags in (1, 100, 300_000):
            for n in (0, bags, 100 * bags):
                run = pool_run(bags, n, dim)
                assert 1 <= run <= lanes
                assert pool_blocks(bags, dim, run) * THREADS // lanes * run >= bags


@pytest.mark.parametrize("chip", [(7, 5), (9, 0)])
@pytest.mark.parametrize("dim, row_type, out_type", [(128, "float32", "float32"), (17, "int8", "float16")])
def test_compiles_and_links(chip: tuple[int, int], dim: int, row_type: str, out_type: str) -> None:
    pytest.importorskip("numba_cuda")
    core = pytest.importorskip("cuda.core")
    spec = KernelSpec(name="pool_kernel", dim=dim, policy=load_policy("lru"), row_type=row_type, out_type=out_type)
    text = ptx_of(spec, chip)
    options = core.LinkerOptions(arch=f"sm_{chip[0]}{chip[1]}")
    assert len(core.Linker(core.ObjectCode.from_ptx(text.encode()), options=options).link("cubin").code) > 1000
    sums = text[text.index(".entry") :]
    assert "add.rn.f32" in sums and "mul.rn.f32" in sums and "fma.rn.f32" not in sums
    assert dim % 4 or "ld.relaxed.gpu.global.v4.b32" in sums
