"""Copies of rows on a GPU: their code, run on a CPU, gives the bytes of the generic copies; so does a device (marker gpu)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from llvmlite import ir
from support.cache_bench import Bench
from support.dtype_samples import compiled, float32_sample
from support.llvm_on_cpu import access_by_cpu, address, aligned, run_on_cpu

from hps_numba.kernels.cache import conversions
from hps_numba.kernels.dtypes import ELEMENT_BYTES, OUT_TYPES, TYPE_NUMBERS, row_stride, scale_offset

copies = pytest.importorskip(
    "hps_numba.kernels.simt.cuda_rows", reason="numba-cuda is not installed: pip install 'numba-cuda[cu13]'"
)

DIMS = [1, 3, 4, 8, 17, 32, 100, 128, 384]
PAIRS = [(row, out) for row in TYPE_NUMBERS for out in OUT_TYPES]
NARROW = [name for name in TYPE_NUMBERS if name != "float32"]
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@pytest.fixture(autouse=True)
def on_a_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is None:
        access_by_cpu(monkeypatch, copies)


# -- rows ---------------------------------------------------------------------------------------


def element_bytes(bits: np.ndarray, kind: str, scales: np.ndarray | None = None) -> np.ndarray:
    """Float32 bits ``[rows, dim]`` as elements of a kind, by the functions of ``cache.conversions``: the bytes of the rows."""
    if kind == "float32":
        elements = bits.astype(np.int64)
    elif scales is None:
        elements = compiled(getattr(conversions, f"{kind}_of"))(bits.ravel())
    else:
        store = compiled(conversions.int8_of if kind == "int8" else conversions.float8_of)
        elements = np.concatenate([store(row, scale) for row, scale in zip(bits, scales, strict=True)])
    return elements.reshape(bits.shape).astype(UNSIGNED[ELEMENT_BYTES[kind]]).view(np.uint8)


def float_bits(elements: np.ndarray, kind: str, scales: np.ndarray | None = None) -> np.ndarray:
    """Bytes of stored elements as float32 bits ``[rows, dim]``."""
    values = np.ascontiguousarray(elements).view(UNSIGNED[ELEMENT_BYTES[kind]])
    if kind == "float32":
        return values
    if scales is None:
        bits = compiled(getattr(conversions, f"float_of_{kind}"))(values.ravel())
    else:
        read = compiled(conversions.float_of_int8 if kind == "int8" else conversions.float_of_float8)
        bits = np.concatenate([read(row, scale) for row, scale in zip(values, scales, strict=True)])
    return bits.reshape(values.shape).astype(np.uint32)


class Rows:
    """Float32 rows, the rows that a cache has of them, and its answers, element by element."""

    def __init__(self, values: np.ndarray, row_type: str, out_type: str) -> None:
        self.count, dim = values.shape
        self.stride, self.scale_at = row_stride(dim, row_type), scale_offset(dim, row_type)
        self.out_bytes = dim * ELEMENT_BYTES[out_type]
        self.source = aligned((self.count, 4 * dim), 0)
        self.source[:] = values.view(np.uint8)
        bits, scales = values.view(np.uint32), None
        self.stored = aligned((self.count, self.stride), 0x55)
        if self.scale_at:
            largest = (bits & 0x7FFFFFFF).max(1)
            with np.errstate(all="ignore"):
                scales = np.array([conversions.scale_of(int(size), row_type == "int8") for size in largest], np.float32)
            self.stored[:, self.scale_at : self.scale_at + 4] = scales[:, None].view(np.uint8)
        elements = element_bytes(bits, row_type, scales)
        self.stored[:, : elements.shape[1]] = elements
        self.answers = element_bytes(float_bits(elements, row_type, scales), out_type)
        self.sources = address(self.source) + 4 * dim * np.arange(self.count)
        self.places = address(self.stored) + self.stride * np.arange(self.count)


def samples(dim: int, count: int) -> np.ndarray:
    """Rows of numbers of all sizes, among them 0, subnormal ones and NaN."""
    rng = np.random.default_rng(dim)
    values = (rng.normal(0, 1, (count, dim)) * 2.0 ** rng.integers(-30, 20, (count, dim))).astype(np.float32)
    values[::3] = rng.uniform(-1, 1, values[::3].shape)
    for special in (0.0, -0.0, 1e-40, -1e-45, 6e-8, 65520.0, np.nan, -np.nan):
        values[rng.random(values.shape) < 0.02] = special
    return values


# -- copies: every element once, aligned ------------------------------------------------------------


def table_of(rows: Any = ()) -> np.ndarray:
    """The other lanes: their rows; then the numbers of loads, stores and misaligned accesses."""
    table = np.zeros(35, np.int64)
    table[: len(rows)] = rows
    return table


def answers_at(rows: int, size: int, out_type: str, vector: bool) -> np.ndarray:
    """Memory for answers, at a multiple of 16 or (not ``vector``) one element after it."""
    room = aligned((rows * size + 16,), 0x77)
    return (
        room[: rows * size].reshape(rows, size)
        if vector
        else room[ELEMENT_BYTES[out_type] :][: rows * size].reshape(rows, size)
    )


def pairs_and_dims() -> list[tuple[str, str, int, int]]:
    """Each pair of types with three widths, so that each row type meets all of them; and a number."""
    return [(*pair, DIMS[(3 * i + j) % len(DIMS)], 3 * i + j) for i, pair in enumerate(PAIRS) for j in range(3)]


@pytest.mark.parametrize(("row_type", "out_type", "dim", "number"), pairs_and_dims())
def test_a_warp_copies_the_rows_of_its_lanes(row_type: str, out_type: str, dim: int, number: int) -> None:
    """And none of other lanes; where some have none, with more and fewer steps than loads in flight, answers at any address."""
    group, depth, vector = ((8, 8, True), (32, 3, True), (16, 16, True), (8, 4, False))[number % 4]
    rows = Rows(samples(dim, 40), row_type, out_type)
    piece = copies.Piece(dim, TYPE_NUMBERS[row_type], TYPE_NUMBERS[out_type], 16 if vector else 1)

    def write(builder: Any, target: Any, source: Any, lane: Any) -> None:
        lane = builder.trunc(lane, ir.IntType(32))
        copies.copy_group(builder, piece, group, depth, rows.scale_at, target, source, lane)

    copy = run_on_cpu(write, 3, rows.scale_at)
    chosen = np.random.default_rng(dim).permutation(rows.count)[:32]
    sources = rows.places[chosen]
    sources[[1, group - 2]] = 0
    there = sources[:group] != 0
    table = table_of(sources)
    out = answers_at(32, rows.out_bytes, out_type, vector)
    for lane in range(32):
        copy(address(out), int(table[lane]), lane, address(table))
    assert (out[:group][there] == rows.answers[chosen[:group][there]]).all()
    assert (out[:group][~there] == 0x77).all() and (out[group:] == 0x77).all()
    loads, stores, misaligned = table[32:]
    assert (stores, misaligned) == (there.sum() * piece.in_row, 0)
    assert loads == stores + ((sources != 0).sum() if rows.scale_at else 0)


@pytest.mark.parametrize(("row_type", "out_type", "dim", "number"), pairs_and_dims())
def test_a_tile_copies_a_row(row_type: str, out_type: str, dim: int, number: int) -> None:
    lanes, vector = ((4, True), (8, True), (8, False))[number // 3 % 3]
    rows = Rows(samples(dim, 12), row_type, out_type)
    piece = copies.Piece(dim, TYPE_NUMBERS[row_type], TYPE_NUMBERS[out_type], 16 if vector else 1)

    def write(builder: Any, target: Any, source: Any, lane: Any) -> None:
        scale = copies.scale_at(builder, source, rows.scale_at)
        copies.copy_row(builder, piece, lanes, ("gpu", ""), target, source, lane, scale=scale)

    copy, table = run_on_cpu(write, 3), table_of()
    out = answers_at(rows.count, rows.out_bytes, out_type, vector)
    for i in range(rows.count):
        for lane in range(lanes):
            copy(address(out[i]), int(rows.places[i]), lane, address(table))
    assert (out == rows.answers).all()
    loads, stores, misaligned = table[32:]
    assert (stores, misaligned) == (rows.count * piece.in_row, 0)
    assert loads == stores + (rows.count * lanes if rows.scale_at else 0)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("out_type", OUT_TYPES)
def test_a_tile_copies_a_row_of_the_host_store_to_answer_and_stage(out_type: str, dim: int) -> None:
    rows = Rows(samples(dim, 8), "float32", out_type)
    lanes, vector = ((4, True), (8, False))[DIMS.index(dim) % 2]
    piece = copies.Piece(dim, TYPE_NUMBERS["float32"], TYPE_NUMBERS[out_type], 16 if vector else 1)

    def write(builder: Any, target: Any, stage: Any, source: Any, lane: Any) -> None:
        copies.copy_row(builder, piece, lanes, ("sys", ""), target, source, lane, second=stage)

    copy, table = run_on_cpu(write, 4), table_of()
    out, stage = answers_at(rows.count, rows.out_bytes, out_type, vector), aligned(rows.source.shape, 0x66)
    for i in range(rows.count):
        answer, staged = (address(out[i]) if i != 1 else 0), (address(stage[i]) if i != 2 else 0)
        for lane in range(lanes):
            copy(answer, staged, int(rows.sources[i]), lane, address(table))
    assert (np.delete(out, 1, 0) == np.delete(rows.answers, 1, 0)).all() and (out[1] == 0x77).all()
    assert (np.delete(stage, 2, 0) == np.delete(rows.source, 2, 0)).all() and (stage[2] == 0x66).all()
    assert table[34] == 0


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("row_type", NARROW)
def test_a_tile_stores_a_row_in_the_cache(row_type: str, dim: int) -> None:
    values = samples(dim, 12)
    values[1], values[2, 0] = 0, 1e30 if scale_offset(dim, row_type) else np.inf
    rows = Rows(values, row_type, "float32")
    piece = copies.Piece(dim, TYPE_NUMBERS["float32"], TYPE_NUMBERS[row_type])
    lanes = (4, 8)[DIMS.index(dim) % 2]
    find = run_on_cpu(lambda builder, *args: copies.largest_of(builder, piece, lanes, "sys", *args), 2)
    store = run_on_cpu(lambda builder, *args: copies.store_row(builder, piece, lanes, rows.scale_at, *args), 4)
    stored, table = aligned(rows.stored.shape, 0x55), table_of()
    for i in range(rows.count):
        source = int(rows.sources[i])
        largest = max(find(source, lane, address(table)) for lane in range(lanes))
        for lane in range(lanes):
            store(address(stored[i]), source, lane, largest, address(table))
    assert (stored == rows.stored).all()
    assert table[34] == 0


@pytest.mark.parametrize(
    ("dim", "row_type", "out_type", "elements"),
    [
        (32, "int8", "float32", 4),
        (32, "float16", "float32", 4),
        (32, "float16", "float16", 8),
        (128, "float8_e4m3", "bfloat16", 8),
        (100, "bfloat16", "float16", 4),
        (32, "float32", "float16", 4),
        (6, "float16", "float32", 2),
        (17, "int8", "float32", 1),
    ],
)
def test_the_wider_access_of_a_piece_has_16_bytes_where_the_width_allows_it(
    dim: int, row_type: str, out_type: str, elements: int
) -> None:
    piece = copies.Piece(dim, TYPE_NUMBERS[row_type], TYPE_NUMBERS[out_type])
    assert (piece.elements, piece.in_row) == (elements, dim // elements)


# -- on a device: the kernels against those of the CPU --------------------------------------------------


def device_cases() -> list[tuple[str, str, int]]:
    """Every pair of types with a width or two, or with all of them if HPS_NUMBA_ALL_KERNELS is 1."""
    if os.environ.get("HPS_NUMBA_ALL_KERNELS") == "1":
        return [(*pair, dim) for pair in PAIRS for dim in DIMS]
    dims = [32, 128, 100, 8, 17, 4, 384, 1, 3]
    cases = [(*pair, dims[i % len(dims)]) for i, pair in enumerate(PAIRS)]
    return [*cases, ("float16", "float32", 32), ("int8", "float32", 128)]


def hard_rows(row_type: str, dim: int) -> np.ndarray:
    """All values of a type, middles between them, floats that rounding may get wrong, and random rows.

    No infinity where rows have a scale, which would be infinite: 0 times that is NaN, whose bits are the processor's.
    """
    sample = float32_sample()
    every = np.arange(1 << 16, dtype=np.uint32)
    if scale_offset(dim, row_type):
        sample = sample[(sample & 0x7FFFFFFF) < 0x7F000000]
        steps = np.arange(-255, 256) / 2  # int8 where the largest is 127: all of them and the middles
        with np.errstate(all="ignore"):
            of_e4m3 = compiled(conversions.float_of_float8)(np.arange(256), np.float32(1.0))
        fixed = [steps.astype(np.float32).view(np.uint32), of_e4m3.astype(np.uint32)]
        rows = [np.tile(some, -(-dim // len(some)))[:dim] if dim >= len(some) else some for some in fixed]
        sample = np.concatenate([*rows, sample])
    else:
        halves = every.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
        sample = np.concatenate([every << 16, halves, sample])
    count = min(-(-len(sample) // dim), 20_000)
    bits = np.resize(sample.astype(np.uint32), (count, dim))
    rows_ = bits.view(np.float32).copy()
    if scale_offset(dim, row_type):  # the same rows with a largest value of 127 and of 448, where all numbers are exact
        small = np.where(np.abs(rows_) <= 127, rows_, 0)
        small[::2, 0], small[1::2, 0] = 127.0, 448.0
        rows_ = np.concatenate([rows_, small.astype(np.float32)])
    return np.concatenate([rows_, samples(dim, 500)])


@pytest.mark.gpu
@pytest.mark.parametrize(("row_type", "out_type", "dim"), device_cases())
def test_kernels_answer_as_the_cpu_backend_does(row_type: str, out_type: str, dim: int) -> None:
    """From the host store and from the cache, in small and large batches, to answers at any address: the same bytes."""
    values = hard_rows(row_type, dim)
    large = np.random.default_rng(dim).integers(0, len(values), 33_321)
    expected: dict[Any, np.ndarray] = {}
    for device in (None, 0):
        bench = Bench(device)
        try:
            store = bench.store(dim=dim)
            store.upsert(np.arange(len(values)), values)
            cache = bench.cache(store, 5 * len(values), row_type=row_type)
            size, small = dim * ELEMENT_BYTES[out_type], cache.large_batch // 2
            for start in range(0, len(values), small):
                some = np.arange(start, min(start + small, len(values)))
                for turn in range(3):
                    got = looked_up(cache, some, size, out_type, shift=ELEMENT_BYTES[out_type] if turn == 2 else 0)
                    same = expected.setdefault((start, turn), got)
                    assert (got == same).all(), (start, turn, np.argwhere(got != same)[:5])
            assert cache.counters().misses == len(values)
            assert len(large) >= cache.large_batch
            for shift in (0, ELEMENT_BYTES[out_type]):
                got = looked_up(cache, large, size, out_type, shift=shift)
                same = expected.setdefault(("large", shift), got)
                assert (got == same).all(), (shift, np.argwhere(got != same)[:5])
        finally:
            bench.close()


def looked_up(cache: Any, keys: np.ndarray, size: int, out_type: str, shift: int) -> np.ndarray:
    """The bytes of the answers, written ``shift`` bytes after a multiple of 16."""
    out = np.empty(len(keys) * size + shift, np.uint8)
    place, stream = cache.backend, cache.parts.state.stream
    with place.current(), cache.parts.state.copies(keys) as (at,), cache.parts.state.buffer(out.nbytes) as room:
        cache.lookup(at, len(keys), room + shift, stream, out_type=out_type)
        place.to_host(out, room, stream)
    return out[shift:].reshape(len(keys), size)
