"""Pooled lookup: bags of keys against a slow and obvious oracle, bit for bit, on the CPU and (marker gpu) on a device."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.backends import PlainBackend, PlainKernel
from support.oracles import EXTREME_64, rows_of
from support.waiting import Span, join_all

from hps_numba.cache import kernel_set, pooling
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.device.host_memory import PinnedHostAllocator, PlainHostAllocator
from hps_numba.errors import CapacityError, ClosedError, ConfigError, KeyDtypeError
from hps_numba.kernels.compiler.ptx import ptx_of
from hps_numba.kernels.compiler.spec import KernelSpec
from hps_numba.kernels.dtypes import TYPE_NUMBERS
from hps_numba.kernels.layouts.cache import GUARD_ENTERED, GUARD_LEFT, GUARD_STRIPES, MAX_BATCH
from hps_numba.kernels.layouts.pooling import (
    COMBINERS,
    EMPTY_DEFAULT,
    EQUAL,
    OFFSETS32,
    OPEN_END,
    PADDED,
    THREADS,
    pool_blocks,
    pool_lanes,
    pool_registers,
    pool_run,
)
from hps_numba.kernels.policies._load import load_policy
from hps_numba.storage.host.store import HostStore

DEFAULT = -7.5
PADDING = 5
DIMS = (1, 3, 16, 17, 128)
STORED = ("float32", "float16", "bfloat16", "int8", "float8_e4m3")
KNOWN = 40  # keys of the store; batches ask for 0 to 59
FORMS = {"int32": np.int32, "uint32": np.uint32}


class Batch:
    """Bags over known, unknown and padding keys: empty ones first, last and between, and keys that come again."""

    def __init__(self, seed: int, bags: int = 23, longest: int = 9, universe: Any = 60) -> None:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(0, longest + 1, bags)
        lengths[[0, bags // 2, -1]] = 0
        if bags > 4:
            lengths[3] = 4 * longest
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.keys = rng.choice(universe, self.offsets[-1]).astype(np.int64)
        self.weights = (rng.normal(size=len(self.keys)) + 3).astype(np.float32)

    @property
    def bags(self) -> int:
        return len(self.offsets) - 1


def naive_pool(batch: Batch, rows: np.ndarray, combiner: str, **how: Any) -> np.ndarray:
    """One operation at a time, in order; ``rows`` are those of the positions, in the type to calculate in."""
    kind, weights, skipped = rows.dtype.type, how.get("weights"), how.get("skipped", ())
    pooled = np.full((batch.bags, rows.shape[1]), how.get("empty", 0), kind)
    for bag in range(batch.bags):
        positions = [i for i in range(batch.offsets[bag], batch.offsets[bag + 1]) if batch.keys[i] not in skipped]
        if not positions:
            continue
        if combiner == "max":
            pooled[bag] = rows[positions].max(axis=0)
            continue
        sums, total = np.zeros(rows.shape[1], kind), kind(0)
        for i in positions:
            weight = kind(1) if weights is None else kind(weights[i])
            sums = sums + rows[i] * weight
            total = total + (weight * weight if combiner == "sqrtn" else weight)
        divisor = kind(1) if combiner == "sum" else total if combiner == "mean" else np.sqrt(total)
        pooled[bag] = sums / divisor if divisor != 0 else 0
    return pooled


class AheadBackend(PlainBackend):
    """Keys are sought ahead, as on a GPU, by one lane."""

    def kernel(self, spec: KernelSpec) -> Any:
        return PlainKernel(spec, POOL_MANY=True)


class Table:
    """A store of some keys (0 to 39), and a cache of 20 rows; ``stored=False``: no store, and 15 keys in the cache."""

    def __init__(
        self, where: str, dim: int, *, known: Any = range(KNOWN), stored: bool = True, policy: str = "lru", **options: Any
    ) -> None:
        device = 0 if where == "gpu" else None
        self.known = np.asarray(known, np.int64) if stored else np.arange(15)
        self.store = HostStore(dim, allocator=PlainHostAllocator() if device is None else PinnedHostAllocator())
        self.store.upsert(self.known, signed_rows(self.known, dim))
        store = self.store if stored else None
        self.cache = EmbeddingCache(dim, 20, device=device, policy=load_policy(policy), default=DEFAULT, store=store, **options)
        if where in ("plain", "ahead"):
            self.cache.parts.kernels.backend = PlainBackend() if where == "plain" else AheadBackend()
        if stored:
            self.cache.warm()
        else:
            self.cache.insert(self.known, signed_rows(self.known, dim))

    def close(self) -> None:
        self.cache.close()
        self.store.close()

    def rows_for(self, keys: np.ndarray) -> np.ndarray:
        """The rows that a lookup would now answer with: as the cache has them, else as the store has, else the default."""
        rows, missing = self.cache.query(keys)
        stored = signed_rows(keys, self.cache.dim)
        stored[~np.isin(keys, self.known)] = DEFAULT
        rows[missing] = stored[missing]
        return rows

    def pool(self, batch: Batch, combiner: str, weights: np.ndarray | None = None, **how: Any) -> np.ndarray:
        """A pooled lookup by addresses; ``shift``: bytes by which the answer is off its alignment."""
        cache, options, shift = self.cache, how.pop("options", 0), how.pop("shift", 0)
        out = np.full((batch.bags, cache.dim), 99, np.float32 if how.get("out_type", "float32") == "float32" else np.uint16)
        offsets = batch.offsets.astype(np.int32 if options & OFFSETS32 else np.int64)
        offsets = offsets[:-1] if options & OPEN_END else offsets
        keys = batch.keys.astype(FORMS.get(how.get("key_form", "int64"), np.int64))
        given = [keys, offsets] + ([weights] if weights is not None else [])
        with (
            cache.backend.current(),
            cache.parts.state.copies(*given) as addresses,
            cache.parts.state.buffer(out.nbytes + shift) as room,
        ):
            cache.pool(
                *(addresses[0], len(keys), addresses[1], batch.bags, room + shift, cache.parts.state.stream),
                combiner=combiner,
                weights=addresses[2] if weights is not None else 0,
                options=options,
                padding=PADDING,
                **how,
            )
            cache.backend.to_host(out, room + shift, cache.parts.state.stream)
        return out

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """The rows of a lookup that is not pooled."""
        return self.cache.lookup_arrays(keys)

    def guards(self) -> tuple[int, int]:
        """Counts of the guards entered and left."""
        entered, left = (
            self.cache.parts.state.read_words(self.cache.parts.state.address + at, GUARD_STRIPES // 2)
            for at in (GUARD_ENTERED, GUARD_LEFT)
        )
        return int(entered.view(np.uint32).sum()), int(left.view(np.uint32).sum())


def signed_rows(keys: np.ndarray, dim: int) -> np.ndarray:
    """Rows of both signs whose sums are rounded."""
    return ((rows_of(keys, dim) % 7 - 3) * np.float32(1.1)).astype(np.float32)


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))


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


@pytest.fixture(autouse=True)
def bags_in_a_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Sets how many bags a tile takes at a time: 3, as batches of tests would else have 1; None: as the cache chooses."""
    chosen = pooling.pool_run

    def choose(run: int | None) -> None:
        monkeypatch.setattr(pooling, "pool_run", chosen if run is None else lambda bags, n, dim: run)

    choose(3)
    return choose


@pytest.fixture
def open_table() -> Iterator[Any]:
    tables: list[Table] = []

    def open_one(*args: Any, **options: Any) -> Table:
        tables.append(Table(*args, **options))
        return tables[-1]

    yield open_one
    for table in tables:
        table.close()


def pools_batch(table: Table, batch: Batch, *combiners: str) -> None:
    for combiner in combiners or COMBINERS:
        assert_pools(table, batch, combiner)
        if combiner != "max":
            assert_pools(table, batch, combiner, batch.weights)


def pools_every_way(table: Table, bags: int, longest: int) -> None:
    for seed, combiner in enumerate(COMBINERS):
        pools_batch(table, Batch(seed, bags, longest), combiner)


@pytest.mark.parametrize("row_type", STORED)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("where", ["plain", GPU])
def test_plain_kernel_equals_the_oracle_bit_for_bit(open_table: Any, where: str, dim: int, row_type: str) -> None:
    bags, longest = (23, 9) if where == "gpu" or dim < 20 else (4, 2)
    pools_every_way(open_table(where, dim, row_type=row_type), bags, longest)


@pytest.mark.parametrize("where", ["cpu", GPU])
def test_compiled_kernel_equals_the_oracle_bit_for_bit(open_table: Any, where: str) -> None:
    pools_every_way(open_table(where, 16), 300, 20)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [3, 16, 128])
def test_device_and_cpu_agree_bit_for_bit(open_table: Any, dim: int) -> None:
    device, cpu = open_table("gpu", dim), open_table("cpu", dim)
    for seed, combiner in enumerate(COMBINERS):
        batch = Batch(seed, 2000, 30)
        weights = batch.weights if combiner != "max" else None
        assert_same(device.pool(batch, combiner, weights), cpu.pool(batch, combiner, weights))


@pytest.mark.parametrize("where", ["plain", GPU])
@pytest.mark.parametrize("dim", [256, 512, 1024])
def test_wide_rows_are_pooled(open_table: Any, where: str, dim: int) -> None:
    assert_pools(open_table(where, dim), Batch(1, 5, 2), "mean")


@pytest.mark.parametrize("where", ["plain", "ahead", GPU])
def test_padding_is_skipped_and_empty_bags_may_get_the_default(open_table: Any, where: str) -> None:
    table = open_table(where, 3)
    batch = Batch(3, 30, 2)
    batch.keys[batch.offsets[3] : batch.offsets[4]] = PADDING
    rows = table.rows_for(batch.keys)
    expected = naive_pool(batch, rows, "mean", skipped=(PADDING,), empty=DEFAULT, weights=batch.weights)
    assert_same(table.pool(batch, "mean", batch.weights, options=PADDED | EMPTY_DEFAULT), expected)
    assert (expected[3] == DEFAULT).all() and (expected[0] == DEFAULT).all()
    assert (table.pool(batch, "max", options=PADDED)[3] == 0).all()


@pytest.mark.parametrize("where", ["plain", "cpu", GPU])
@pytest.mark.parametrize("each", [0, 1, 5, 37])
def test_bags_of_equal_length_need_no_offsets(open_table: Any, where: str, each: int) -> None:
    table, bags = open_table(where, 16), 4 if where == "plain" else 200
    batch = Batch(each, bags, 1)
    batch.offsets = np.arange(bags + 1) * each
    batch.keys = np.resize(batch.keys, bags * each) if len(batch.keys) else np.arange(bags * each)
    backend = table.cache.backend
    for combiner in COMBINERS:
        expected = table.pool(batch, combiner)
        out = np.full_like(expected, 99)
        with (
            backend.current(),
            table.cache.parts.state.copies(batch.keys) as (keys,),
            table.cache.parts.state.buffer(out.nbytes) as room,
        ):
            stream = table.cache.parts.state.stream
            table.cache.pool(keys, len(batch.keys), each, bags, room, stream, combiner=combiner, options=EQUAL)
            backend.to_host(out, room, stream)
        assert_same(out, expected)


@pytest.mark.parametrize("where", ["plain", GPU])
@pytest.mark.parametrize("options", [OFFSETS32, OPEN_END, OFFSETS32 | OPEN_END])
def test_every_form_of_offsets_is_read(open_table: Any, where: str, options: int) -> None:
    table, batch = open_table(where, 4), Batch(4)
    expected = naive_pool(batch, table.rows_for(batch.keys), "sum")
    assert_same(table.pool(batch, "sum", options=options), expected)


@pytest.mark.parametrize("where", ["plain", GPU])
@pytest.mark.parametrize("run", [1, 2, 7, 32, 1000, None])
def test_any_run_of_bags_gives_the_same(open_table: Any, bags_in_a_run: Any, where: str, run: int | None) -> None:
    bags_in_a_run(run)
    table, batch = open_table(where, 3), Batch(5, 50_000 if run is None and where == "gpu" else 70, 3)
    expected = naive_pool(batch, table.rows_for(batch.keys), "sqrtn")
    assert_same(table.pool(batch, "sqrtn"), expected)


@pytest.mark.parametrize("where", ["plain", GPU])
def test_offsets_out_of_range_read_no_keys_out_of_range(open_table: Any, where: str) -> None:
    table, batch = open_table(where, 3), Batch(6, 4, 2)
    expected = naive_pool(batch, table.rows_for(batch.keys), "sum")
    batch.offsets[-1] = 1 << 40
    batch.offsets[0] = -5
    assert_same(table.pool(batch, "sum"), expected)


@pytest.mark.parametrize("where", ["plain", GPU])
def test_weights_that_sum_to_zero_give_zero(open_table: Any, where: str) -> None:
    table, batch = open_table(where, 3), Batch(7)
    weights = np.zeros_like(batch.weights)
    for combiner in ("mean", "sqrtn"):
        assert (table.pool(batch, combiner, weights) == 0).all()


@pytest.mark.parametrize("where", ["plain", GPU])
@pytest.mark.parametrize("out_type", ["float16", "bfloat16"])
@pytest.mark.parametrize("dim", [3, 4])
def test_half_precision_answers_are_rounded_once(open_table: Any, where: str, out_type: str, dim: int) -> None:
    table, batch = open_table(where, dim), Batch(8)
    expected = naive_pool(batch, table.rows_for(batch.keys), "sum")
    got = table.pool(batch, "sum", out_type=out_type)
    if out_type == "float16":
        assert_same(got.view(np.float16), expected.astype(np.float16))
    else:
        bits = expected.view(np.uint32)
        assert_same(got, ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))


@pytest.mark.parametrize("where", ["plain", GPU])
def test_unaligned_answers_are_written(open_table: Any, where: str) -> None:
    table, batch = open_table(where, 8), Batch(9)
    expected = naive_pool(batch, table.rows_for(batch.keys), "mean")
    assert_same(table.pool(batch, "mean", shift=4), expected)


@pytest.mark.parametrize("where", ["plain", "ahead", GPU])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_pooled_lookup_leaves_the_cache_as_a_lookup(open_table: Any, where: str, policy: str) -> None:
    pooled, looked_up = open_table(where, 3, policy=policy), open_table(where, 3, policy=policy)
    for seed in range(4):
        batch = Batch(seed)
        pooled.pool(batch, "sum")
        looked_up.lookup(batch.keys)
        assert pooled.cache.entries() == looked_up.cache.entries()
        assert pooled.cache.counters() == looked_up.cache.counters()
    assert pooled.cache.counters().inserted > 0 and pooled.cache.counters().absent > 0
    entered, left = pooled.guards()
    assert entered == left > 0


@pytest.mark.parametrize("where", ["plain", "ahead", GPU])
def test_fixed_cache_of_part_of_the_table_is_pooled(open_table: Any, where: str) -> None:
    table, batch = open_table(where, 4, kind="uvm"), Batch(10)
    expected = naive_pool(batch, table.rows_for(batch.keys), "max")
    assert_same(table.pool(batch, "max"), expected)
    assert 0 < table.cache.counters().misses < len(batch.keys)


ON_GPU = [(4, "float32", "lru"), (32, "float32", "lfu"), (128, "float32", "lru"), (256, "float32", "lru"), (32, "int8", "lru")]


@pytest.mark.parametrize(
    ("where", "dim", "row_type", "policy"),
    [("cpu", 16, "float32", "lru"), *(pytest.param("gpu", *how, marks=pytest.mark.gpu) for how in ON_GPU)],
)
def test_bags_of_any_length_all_of_whose_rows_are_in_the_cache(
    open_table: Any, where: str, dim: int, row_type: str, policy: str
) -> None:
    table = open_table(where, dim, known=range(15), row_type=row_type, policy=policy)
    batch = Batch(23, 40, 80, universe=sorted(table.cache.dump().tolist()))
    rows, guards = table.rows_for(batch.keys), table.guards()
    for combiner in COMBINERS:
        for weights in (None, batch.weights) if combiner != "max" else (None,):
            assert_same(table.pool(batch, combiner, weights), naive_pool(batch, rows, combiner, weights=weights))
        skipped = naive_pool(batch, rows, combiner, skipped=(PADDING,))
        assert_same(table.pool(batch, combiner, options=PADDED), skipped)
    assert table.cache.counters().misses == 0 and table.guards() == guards


@pytest.mark.parametrize("where", ["cpu", "ahead", GPU])
def test_few_misses_among_many_hits_are_pooled(open_table: Any, where: str) -> None:
    table = open_table(where, 16, known=range(15))
    batch = Batch(24, 30, 40, universe=sorted(table.cache.dump().tolist()))
    batch.keys[::97] = 1000
    rows, guards = table.rows_for(batch.keys), table.guards()
    for combiner in COMBINERS:
        assert_same(table.pool(batch, combiner), naive_pool(batch, rows, combiner))
    assert table.cache.counters().misses == len(COMBINERS) * len(batch.keys[::97])
    entered, left = table.guards()
    assert entered == left > guards[0]


# -- keys, and where their rows are -----------------------------------------------------------


@pytest.mark.parametrize("where", ["plain", GPU])
def test_int32_keys_are_pooled(open_table: Any, where: str) -> None:
    table, batch = open_table(where, 3), Batch(11)
    batch.keys[::5] = -1 if where == "gpu" else 2**31 - 1
    expected = naive_pool(batch, table.rows_for(batch.keys), "sum")
    assert_same(table.pool(batch, "sum", key_form="int32"), expected)


@pytest.mark.parametrize("where", ["plain", GPU])
def test_key_outside_32_bits_is_absent_with_checked_32_bit_keys(open_table: Any, where: str) -> None:
    table, batch = open_table(where, 3, known=[-3, 2**32 - 1, 2**32, *range(9)]), Batch(13, universe=[-3, 2**32, 2**32 - 1, 4])
    rows = table.rows_for(batch.keys)
    rows[(batch.keys < 0) | (batch.keys >= 2**32)] = DEFAULT
    assert_same(table.pool(batch, "sum", key_form="checked32_in_int64"), naive_pool(batch, rows, "sum"))


@pytest.mark.parametrize("where", ["plain", "cpu", GPU])
def test_extreme_keys_are_ordinary_keys(open_table: Any, where: str) -> None:
    known = [*EXTREME_64[::2], *range(-30, -2)]
    table, batch = open_table(where, 16, known=known), Batch(14, 40, universe=[*known, *EXTREME_64, -(2**63) + 1, -100])
    pools_batch(table, batch)
    assert set(table.cache.dump().tolist()) <= set(known)


@pytest.mark.parametrize("where", ["plain", GPU])
def test_unknown_keys_have_the_default_row_and_are_never_cached(open_table: Any, where: str) -> None:
    table, batch = open_table(where, 4), Batch(15, universe=[1000, -1000, 2**40])
    before = table.cache.entries()
    lengths = np.diff(batch.offsets).astype(np.float32)
    expected = np.repeat((lengths * np.float32(DEFAULT))[:, None], 4, axis=1) + np.float32(0)  # no -0
    assert_same(table.pool(batch, "sum"), expected)
    assert_same(table.pool(batch, "max"), np.where(expected == 0, expected, np.float32(DEFAULT)))
    assert table.cache.entries() == before
    assert table.cache.counters().absent == 2 * len(batch.keys)


@pytest.mark.parametrize("where", ["plain", GPU])
def test_without_a_store_only_what_was_inserted_is_found(open_table: Any, where: str) -> None:
    table, batch = open_table(where, 6, stored=False), Batch(16, universe=30)
    held = sorted(table.cache.dump().tolist())
    pools_batch(table, batch)
    assert sorted(table.cache.dump().tolist()) == held == list(range(15))


@pytest.mark.parametrize("row_type", ["float32", "int8"])
@pytest.mark.parametrize("where", ["plain", "ahead", GPU])
def test_pooled_rows_are_those_of_a_lookup_added_in_order(open_table: Any, where: str, row_type: str) -> None:
    pooled, looked_up = (open_table(where, 17, row_type=row_type) for _ in range(2))
    for seed, combiner in enumerate(("sum", "mean", "sqrtn", "max")):
        batch = Batch(seed, 30, universe=45)
        weights = batch.weights if combiner in ("sum", "sqrtn") else None
        expected = naive_pool(batch, looked_up.lookup(batch.keys), combiner, weights=weights)
        assert_same(pooled.pool(batch, combiner, weights), expected)
        assert pooled.cache.entries() == looked_up.cache.entries()


# -- calls ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["plain", GPU])
def test_pool_arrays_equals_the_oracle(open_table: Any, where: str) -> None:
    table, batch = open_table(where, 16), Batch(17)
    rows = table.lookup(batch.keys)
    assert_same(table.cache.pool_arrays(batch.keys, batch.offsets), naive_pool(batch, rows, "sum"))
    weighted = table.cache.pool_arrays(batch.keys, batch.offsets.astype(np.int32), batch.weights, "mean")
    assert_same(weighted, naive_pool(batch, rows, "mean", weights=batch.weights))
    assert table.cache.pool_arrays(batch.keys[:0], np.zeros(1, np.int64)).shape == (0, 16)


@pytest.mark.parametrize("where", ["plain", GPU])
def test_empty_bags_get_zero_or_the_default(open_table: Any, where: str) -> None:
    table = open_table(where, 3)
    held = table.cache.entries()
    pooled = table.cache.pool_arrays(np.empty(0, np.int64), np.zeros(6, np.int64), combiner="max")
    assert_same(pooled, np.zeros((5, 3), np.float32))
    batch = Batch(12)
    batch.keys, batch.offsets = batch.keys[:0], np.zeros(4, np.int64)
    assert (table.pool(batch, "mean", options=EMPTY_DEFAULT) == DEFAULT).all()
    assert table.cache.entries() == held


def test_no_bags_start_no_kernel(open_table: Any) -> None:
    cache = open_table("plain", 3).cache
    cache.pool(0, 0, 0, 0, 0, 0)
    assert cache.counters().calls == 0


def test_bad_arguments_are_refused(open_table: Any) -> None:
    table, batch = open_table("plain", 3), Batch(18)
    cache, n = table.cache, len(batch.keys)
    with pytest.raises(ConfigError, match="combiner: expected one of sum, mean, sqrtn, max, got 'median'"):
        table.pool(batch, "median")
    with pytest.raises(ConfigError, match=r"expected key_form to be one of .*, got 'int8'"):
        table.pool(batch, "sum", key_form="int8")
    with pytest.raises(CapacityError, match=f"expected at most {MAX_BATCH} keys, got {MAX_BATCH + 1}"):
        cache.pool(0, MAX_BATCH + 1, 0, 1, 0, 0)
    with pytest.raises(KeyDtypeError, match=r"keys: expected int64\[n\], got float64"):
        cache.pool_arrays(np.zeros(3), np.array([0, 3]))
    for offsets, message in (
        (np.array([0.0, n]), r"offsets: expected int64\[bags \+ 1\], got float64"),
        (np.array([], np.int64), r"expected int64\[bags \+ 1\], got int64\[0\]"),
        (np.array([1, n]), f"expected from 0 to {n}, the number of keys, got 1 to {n}"),
        (np.array([0, n + 1]), f"expected from 0 to {n}, the number of keys, got 0 to {n + 1}"),
        (np.array([0, 5, 4, n]), "got one at 2 less than the one before"),
    ):
        with pytest.raises(ConfigError, match=message):
            cache.pool_arrays(batch.keys, offsets)
    for weights in (batch.weights[1:], batch.weights.astype(np.float64)):
        with pytest.raises(ConfigError, match=f"weights: expected float32\\[{n}\\]"):
            cache.pool_arrays(batch.keys, batch.offsets, weights)
    assert cache.counters().calls == 0


def test_cache_with_too_many_rows_is_refused(open_table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table, batch = open_table("plain", 3), Batch(25)
    rows = table.cache.capacity
    monkeypatch.setattr(kernel_set, "MAX_ROWS", rows)
    with pytest.raises(CapacityError, match=f"expected a cache of less than {rows} rows, got one of {rows}"):
        table.pool(batch, "sum")


def test_calls_after_close_raise(open_table: Any) -> None:
    cache = open_table("plain", 3).cache
    cache.close()
    with pytest.raises(ClosedError, match="closed"):
        cache.pool_arrays(np.arange(3), np.array([0, 3]))
    with pytest.raises(ClosedError, match="closed"):
        cache.pool(0, 1, 0, 1, 0, 0)


def test_failure_between_kernels_leaves_the_cache_usable(open_table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table, batch = open_table("plain", 3), Batch(19)
    table.cache.clear()

    def fails(*args: Any) -> None:
        raise CapacityError("between two kernels")

    with monkeypatch.context() as patch:
        patch.setattr(table.cache.parts.plan, "finish_lookup", fails)
        for _ in range(3):
            with pytest.raises(CapacityError, match="between"):
                table.pool(batch, "sum")
    assert table.cache.resident() == 0
    assert_pools(table, batch, "sum")
    assert table.cache.resident() > 0


def test_a_captured_call_keeps_its_workspace(open_table: Any) -> None:
    table, batch = open_table("plain", 3), Batch(21)
    table.pool(batch, "sum")
    before = table.cache.bytes
    for calls in (1, 2):
        assert_same(table.pool(batch, "sum", capturing=True), naive_pool(batch, table.rows_for(batch.keys), "sum"))
        captured = (table.cache.bytes - before) / calls
    assert captured > len(batch.keys) * 4 * 3 and table.cache.bytes == before + 2 * captured


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_captured_pooled_lookup_is_replayed_while_the_table_changes(open_table: Any, policy: str) -> None:
    torch = pytest.importorskip("torch")
    dim, bags, n = 32, 500, 4000
    table = open_table("gpu", dim, known=range(3000), policy=policy, set_count=150)
    rng = np.random.default_rng(22)
    keys = torch.zeros(n, dtype=torch.int64, device="cuda")
    offsets = torch.zeros(bags + 1, dtype=torch.int64, device="cuda")
    weights = torch.zeros(n, device="cuda")
    out = torch.empty((bags, dim), device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    arguments = (keys.data_ptr(), n, offsets.data_ptr(), bags, out.data_ptr(), stream.cuda_stream)
    with torch.cuda.graph(graph, stream=stream):
        table.cache.pool(*arguments, combiner="mean", weights=weights.data_ptr(), capturing=True)
    stamp = 0
    for replay in range(60):
        if replay % 10 == 5:
            stamp += 1
            table.store.upsert(table.known, rows_of(table.known, dim, stamp))
            table.cache.update(table.known)
        batch = Batch(replay, 10, 5)
        batch.keys = rng.integers(0, 4000, n)
        batch.offsets = np.sort(np.concatenate([[0, n], rng.integers(0, n, bags - 1)]))
        batch.weights = (rng.random(n) + 0.5).astype(np.float32)
        rows = np.empty((n, dim), np.float32)
        table.store.lookup(batch.keys, rows, DEFAULT)
        keys.copy_(torch.from_numpy(batch.keys))
        offsets.copy_(torch.from_numpy(batch.offsets))
        weights.copy_(torch.from_numpy(batch.weights))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert_same(out.cpu().numpy(), naive_pool(batch, rows, "mean", weights=batch.weights))
    counts = table.cache.counters()
    assert counts.calls == 60 and counts.inserted > 0 and counts.evicted > 0 and counts.absent > 0
    del graph


# -- threads ----------------------------------------------------------------------------------


class Versions:
    """A table whose rows tell their version, a writer of it and threads that pool bags of one key."""

    def __init__(self, table: Table, seconds: float) -> None:
        self.table, self.cache, self.keys = table, table.cache, table.known
        self.write(0)
        self.told = 0  # the version that the cache was told of
        self.problems: list[str] = []
        self.answers = 0
        self.span = Span(seconds, lambda: self.told > 3 and self.answers > 3)

    def write(self, version: int) -> None:
        self.table.store.upsert(self.keys, rows_of(self.keys, self.cache.dim, version))
        self.cache.update(self.keys)
        self.told = version

    def pool(self) -> None:
        rng = np.random.default_rng()
        while self.span.goes_on() and not self.problems:
            asked, least = rng.choice(self.keys, 50), self.told
            rows = self.cache.pool_arrays(asked, np.arange(51))
            versions = np.log2(rows[:, 0] / rows_of(asked, self.cache.dim)[:, 0])
            first = rows_of(asked, self.cache.dim)
            whole = (rows == first * np.exp2(versions)[:, None]).all() and (versions == np.round(versions)).all()
            if not whole or versions.min() < least or versions.max() > 100:
                self.problems.append(f"{versions} after {least}, whole: {whole}")
            self.answers += 1

    def write_all(self) -> None:
        while self.span.goes_on() and not self.problems and self.told < 100:
            self.write(self.told + 1)
            if self.told % 7 == 0:
                self.cache.erase(self.keys[::3])


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("cpu", "dynamic"),
        pytest.param("gpu", "dynamic", marks=pytest.mark.gpu),
        pytest.param("gpu", "static", marks=pytest.mark.gpu),
    ],
)
def test_concurrent_pooled_lookups_and_writes_see_whole_fresh_rows(open_table: Any, where: str, kind: str) -> None:
    table = open_table(where, 16, kind=kind, buffers=2, known=range(KNOWN if kind == "dynamic" else 20))
    table.cache.pool_arrays(table.known[:1], np.arange(2))  # kernels are compiled before the clock starts
    table.cache.update(table.known)
    table.cache.erase(table.known[:1])
    versions = Versions(table, 1.5)
    threads = [threading.Thread(target=versions.pool) for _ in range(3)] + [threading.Thread(target=versions.write_all)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert versions.problems == []
    assert versions.told > 3 and versions.answers > 3
    last = rows_of(table.known, 16, versions.told)
    assert_same(table.cache.pool_arrays(table.known, np.arange(len(last) + 1), combiner="mean"), last)


# -- launch, and what is built ----------------------------------------------------------------


def test_the_grid_covers_all_bags() -> None:
    for dim in (*DIMS, 32, 64, 1000):
        lanes = pool_lanes(dim)
        assert 4 <= lanes <= 32 and 32 % lanes == 0
        for bags in (1, 100, 300_000):
            for n in (0, bags, 100 * bags):
                run = pool_run(bags, n, dim)
                assert 1 <= run <= lanes
                assert pool_blocks(bags, dim, run) * THREADS // lanes * run >= bags


@pytest.mark.parametrize(
    ("chip", "dim", "row_type", "out_type"), [((7, 5), 128, "float32", "float32"), ((9, 0), 17, "int8", "float16")]
)
def test_kernel_compiles_and_links_for_every_chip(chip: tuple[int, int], dim: int, row_type: str, out_type: str) -> None:
    pytest.importorskip("numba_cuda")
    core = pytest.importorskip("cuda.core")
    spec = KernelSpec(name="pool_kernel", dim=dim, policy=load_policy("lru"), row_type=row_type, out_type=out_type)
    text = ptx_of(spec, chip)
    options = core.LinkerOptions(arch=f"sm_{chip[0]}{chip[1]}")
    assert len(core.Linker(core.ObjectCode.from_ptx(text.encode()), options=options).link("cubin").code) > 1000
    sums = text[text.index(".entry") :]
    assert "add.rn.f32" in sums and "mul.rn.f32" in sums and "fma.rn.f32" not in sums
    assert dim % 4 or "ld.relaxed.gpu.global.v4.b32" in sums


@pytest.mark.parametrize("dim", [17, 32, 128])
def test_rows_are_copied_before_their_lines_are_validated(dim: int) -> None:
    pytest.importorskip("numba_cuda")
    ptx = ptx_of(KernelSpec(name="pool_kernel", dim=dim, policy=load_policy("lru"), registers=168), (9, 0))
    awaited = []
    for function in re.split(r"(?m)^(?=\.(?:weak |visible )?\.?(?:func|entry))", ptx):  # each has registers of its own
        for register in re.findall(r"setp\.eq\.u32 p, (%r\d+), 0x9E3779B9", function):
            made = re.search(rf"\t(\S+)\s+{register}, ([^;]*);", function)
            awaited.append(register)  # of the rows, and no constant: the compiler must not see that nothing depends on them
            assert made is not None and not made[2].lstrip("-").isdigit(), (register, made)
    assert len(awaited) >= 2


@pytest.mark.parametrize(("dim", "chip", "copies"), [(32, (9, 0), True), (32, (7, 5), False), (17, (9, 0), False)])
def test_rows_in_flight_take_no_registers_with_asynchronous_copies(dim: int, chip: tuple[int, int], copies: bool) -> None:
    pytest.importorskip("numba_cuda")
    ptx = ptx_of(KernelSpec(name="pool_kernel", dim=dim, policy=load_policy("lru")), chip)
    assert ("cp.async.cg.shared.global" in ptx) == ("cp.async.wait_group 1;" in ptx) == copies


def test_register_limit_of_pool_kernel() -> None:
    assert pool_registers(32, TYPE_NUMBERS["float32"]) == pool_registers(128, TYPE_NUMBERS["float32"]) == 96
    assert pool_registers(17, TYPE_NUMBERS["float32"]) == pool_registers(32, TYPE_NUMBERS["int8"]) == 168
