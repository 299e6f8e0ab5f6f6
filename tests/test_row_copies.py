"""Copies of rows on a GPU: their code, run on a CPU, gives the bytes of the generic copies; on a device (marker gpu) likewise.

``lanes_cuda_types`` writes LLVM operations and, for memory and shuffles, PTX. Here stand memory operations of a CPU in the
place of the PTX, and each lane of a warp runs by itself: what it asks of another lane is looked up in a table of the warp.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from llvmlite import binding, ir
from test_cache import Bench
from test_row_elements import e4m3_sample, halves_and_middles, interesting

from hps_numba.kernels import cache_rows, row_elements
from hps_numba.kernels.build import KernelSpec, bind
from hps_numba.kernels.lanes_host import NAMES
from hps_numba.kernels.policies._policy import load_policy
from hps_numba.kernels.row_elements import ELEMENT_BYTES, TYPE_NUMBERS, row_stride, scale_offset

copies = pytest.importorskip(
    "hps_numba.kernels.lanes_cuda_types", reason="numba-cuda is not installed: pip install 'numba-cuda[cu13]'"
)

DIMS = [1, 3, 4, 8, 17, 32, 100, 128, 384]
OUT_TYPES = ["float32", "float16", "bfloat16"]
#: all but float32 to float32, whose copies are others
PAIRS = [(row, out) for row in TYPE_NUMBERS for out in OUT_TYPES if (row, out) != ("float32", "float32")]
BYTES_OF = {**ELEMENT_BYTES}
NUMPY = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_64, _32 = ir.IntType(64), ir.IntType(32)
_VOID = ir.VoidType()


# -- a CPU in the place of the PTX ---------------------------------------------------------------


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _count(builder: Any, what: int) -> None:
    """Count an access: the table of the warp has, behind 32 rows, how many loads and stores there were, and their bytes."""
    place = _pointer(builder, builder.add(builder.function.args[-1], ir.Constant(_64, 8 * (32 + what))), _64)
    builder.store(builder.add(builder.load(place), ir.Constant(_64, 1)), place)


def cpu_load(builder: Any, scope: str, size: int, address: Any, inside: Any) -> list[Any]:
    words, kind = max(1, size // 4), _32 if size >= 4 else ir.IntType(8 * size)
    places = [builder.alloca(_32) for _ in range(words)]
    for place in places:
        builder.store(ir.Constant(_32, 0xDEADBEEF), place)  # what stands in a register that nothing was loaded to
    with builder.if_then(builder.icmp_unsigned("!=", inside, ir.Constant(_32, 0))):
        aligned = builder.icmp_unsigned("==", builder.and_(address, ir.Constant(_64, size - 1)), ir.Constant(_64, 0))
        _trap_unless(builder, aligned)
        for i, place in enumerate(places):
            value = builder.load(_pointer(builder, builder.add(address, ir.Constant(_64, 4 * i)), kind))
            builder.store(value if kind == _32 else builder.zext(value, _32), place)
        _count(builder, 0)
    return [builder.load(place) for place in places]


def cpu_store(builder: Any, scope: str, size: int, address: Any, values: Any, inside: Any) -> None:
    kind = _32 if size >= 4 else ir.IntType(8 * size)
    assert len(values) == max(1, size // 4)
    with builder.if_then(builder.icmp_unsigned("!=", inside, ir.Constant(_32, 0))):
        aligned = builder.icmp_unsigned("==", builder.and_(address, ir.Constant(_64, size - 1)), ir.Constant(_64, 0))
        _trap_unless(builder, aligned)
        for i, value in enumerate(values):
            place = _pointer(builder, builder.add(address, ir.Constant(_64, 4 * i)), kind)
            builder.store(value if kind == _32 else builder.trunc(value, kind), place)
        _count(builder, 1)


def _trap_unless(builder: Any, condition: Any) -> None:
    """A misaligned access kills a kernel; here it is counted."""
    with builder.if_then(builder.not_(condition)):
        _count(builder, 2)


def cpu_shuffled(builder: Any, value: Any, lane: Any) -> Any:
    """The row of a lane from the table; of a 32-bit value, the word where that lane loaded it: the scale of its row."""
    table, scale_at = builder.function.args[-1], ir.Constant(_64, builder.function.scale_at)
    row = builder.load(_pointer(builder, builder.add(table, builder.mul(builder.zext(lane, _64), ir.Constant(_64, 8))), _64))
    if value.type == _64:
        return row
    place = builder.alloca(_32)
    builder.store(ir.Constant(_32, 0xDEADBEEF), place)
    with builder.if_then(builder.icmp_unsigned("!=", row, ir.Constant(_64, 0))):
        builder.store(builder.load(_pointer(builder, builder.add(row, scale_at), _32)), place)
    return builder.load(place)


@pytest.fixture(autouse=True)
def on_a_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is None:
        for name, stand_in in (("load", cpu_load), ("store", cpu_store), ("shuffled", cpu_shuffled)):
            monkeypatch.setattr(copies, name, stand_in)
        monkeypatch.setattr(copies, "opaque", lambda builder, number: ir.Constant(_32, number))


@cache
def _engine() -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=1
    )
    return binding.create_mcjit_compiler(binding.parse_assembly(""), target)


def run_on_cpu(write: Callable[..., Any], words: int, scale_at: int = 0) -> Callable[..., int]:
    """What ``write(builder, *values)`` writes as code, as a function of ``words`` int64 and the address of the warp's table."""
    module = ir.Module(name=f"m{next(_numbers)}")
    module.triple = binding.get_process_triple()
    name = f"code_{module.name}"
    function = ir.Function(module, ir.FunctionType(_64, [_64] * (words + 1)), name)
    function.scale_at = scale_at
    builder = ir.IRBuilder(function.append_basic_block())
    answer = write(builder, *function.args[:-1])
    builder.ret(builder.zext(answer, _64) if answer is not None else ir.Constant(_64, 0))
    engine = _engine()
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    engine.add_module(parsed)
    engine.finalize_object()
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * (words + 1))(engine.get_function_address(name))


_numbers: Iterator[int] = iter(range(1 << 30))


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def aligned(size: int, fill: int) -> np.ndarray:
    """Bytes that begin at a multiple of 16."""
    memory = np.full(size + 64, fill, np.uint8)
    return memory[-address(memory) % 16 :][:size]


# -- rows ---------------------------------------------------------------------------------------


@cache
def generic(name: str, dim: int, row_type: str, out_type: str) -> Any:
    """A function of ``cache_rows`` as the CPU twin has it."""
    import numba

    spec = KernelSpec(name="lookup_kernel", dim=dim, policy=load_policy("fifo"), row_type=row_type, out_type=out_type)
    wrap = numba.njit(error_model="numpy")
    return wrap(bind(getattr(cache_rows, name), {**spec.for_one_lane, **NAMES}, wrap))


class Rows:
    """Float32 rows, the stored rows that the CPU twin makes of them, and its answers."""

    def __init__(self, values: np.ndarray, row_type: str, out_type: str) -> None:
        self.count, self.dim = values.shape
        self.row_type, self.out_type = row_type, out_type
        self.stride, self.scale_at = row_stride(self.dim, row_type), scale_offset(self.dim, row_type)
        self.out_bytes = self.dim * BYTES_OF[out_type]
        self.source = aligned(values.nbytes, 0)
        self.source[:] = values.view(np.uint8).ravel()
        self.stored = self.make_stored(generic("store_in_cache", self.dim, row_type, out_type))

    def make_stored(self, store: Callable[..., Any]) -> np.ndarray:
        stored = aligned(self.count * self.stride, 0x55)
        for i in range(self.count):
            store(address(stored) + i * self.stride, address(self.source) + i * 4 * self.dim)
        return stored

    def answers(self) -> np.ndarray:
        out = aligned(self.count * self.out_bytes, 0x77)
        copy = generic("copy_from_cache", self.dim, self.row_type, self.out_type)
        for i in range(self.count):
            copy(address(out) + i * self.out_bytes, address(self.stored) + i * self.stride)
        return out


def samples(dim: int, count: int, seed: int = 0) -> np.ndarray:
    """Rows of all sizes of numbers, among them 0, subnormal ones and what is no number; infinity in some of the rows."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, (count, dim)) * 2.0 ** rng.integers(-30, 20, (count, dim))
    values = values.astype(np.float32)
    values[::3] = rng.uniform(-1, 1, values[::3].shape)
    for special in (0.0, -0.0, 1e-40, -1e-45, 6e-8, 65520.0, np.nan):
        values[rng.random(values.shape) < 0.02] = special
    return values


# -- conversions: all bits -------------------------------------------------------------------------------------


def compiled_element(name: str) -> Any:
    from test_row_elements import compiled

    return compiled(getattr(row_elements, name))


def converter(write: Callable[[Any, Any, Any], Any]) -> Callable[[np.ndarray, float], np.ndarray]:
    """``write(builder, word, scale)`` for each word of an array."""

    def loop(builder: Any, values: Any, answers: Any, count: Any, scale_bits: Any) -> None:
        from numba.core import cgutils

        scale = builder.bitcast(builder.trunc(scale_bits, _32), ir.FloatType())
        with cgutils.for_range(builder, count, intp=_64) as turn:
            offset = builder.mul(turn.index, ir.Constant(_64, 4))
            word = builder.load(_pointer(builder, builder.add(values, offset), _32))
            builder.store(write(builder, word, scale), _pointer(builder, builder.add(answers, offset), _32))

    function = run_on_cpu(loop, 4)

    def each(values: np.ndarray, scale: float = 1.0) -> np.ndarray:
        values = np.ascontiguousarray(values, np.uint32)
        answers = np.empty_like(values)
        function(address(values), address(answers), len(values), int(np.float32(scale).view(np.uint32)), 0)
        return answers

    return each


SCALES = [1.0, 0.0078125, 0.037, 3.5, 1e-38, 2.0**-127, 3e38]


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("half", [0, 1])
def test_all_16_bit_floats_are_read_as_ever(stored: str, half: int) -> None:
    kind = TYPE_NUMBERS[stored]
    read = converter(
        lambda builder, word, scale: builder.bitcast(copies.floats_of(builder, kind, [word], 2, None)[half], _32)
    )
    halves = np.arange(1 << 16, dtype=np.uint32)
    other = np.random.default_rng(1).permutation(halves)
    words = halves << 16 | other if half else other << 16 | halves
    assert (read(words) == compiled_element(f"float_of_{stored}")(halves)).all()


@pytest.mark.parametrize("stored", ["int8", "float8_e4m3"])
@pytest.mark.parametrize("byte", range(4))
def test_all_bytes_are_read_as_ever(stored: str, byte: int) -> None:
    kind = TYPE_NUMBERS[stored]
    read = converter(
        lambda builder, word, scale: builder.bitcast(copies.floats_of(builder, kind, [word], 4, scale)[byte], _32)
    )
    bytes_ = np.arange(256, dtype=np.uint32)
    words = np.full(256, 0x81FF7F01, np.uint32) & ~np.uint32(0xFF << (8 * byte)) | bytes_ << np.uint32(8 * byte)
    name = "float_of_int8" if stored == "int8" else "float_of_float8"
    for scale in SCALES:
        assert (read(words, scale) == compiled_element(name)(bytes_, np.float32(scale))).all(), scale


@cache
def float32_sample() -> np.ndarray:
    """Float32 that rounding may get wrong: all exponents, ties of the narrow types and their neighbours, random bits."""
    random = np.random.default_rng(5).integers(0, 1 << 32, 200_000)
    ties = [halves_and_middles("float16"), halves_and_middles("bfloat16"), e4m3_sample()]
    return np.unique(np.concatenate([interesting(), *ties, random]))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_floats_are_rounded_to_16_bits_as_ever(kind: str) -> None:
    write = converter(
        lambda builder, word, scale: copies.bits_of(builder, TYPE_NUMBERS[kind], [builder.bitcast(word, ir.FloatType())])[0]
    )
    bits = float32_sample()
    assert (write(bits) == compiled_element(f"{kind}_of")(bits)).all()


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3"])
def test_floats_are_rounded_to_bytes_as_ever(kind: str) -> None:
    def one(builder: Any, word: Any, scale: Any) -> Any:
        return copies.bits_of(builder, TYPE_NUMBERS[kind], [builder.bitcast(word, ir.FloatType())], scale)[0]

    write, bits = converter(one), float32_sample()
    for scale in SCALES:
        wanted = compiled_element("int8_of" if kind == "int8" else "float8_of")(bits, np.float32(scale))
        assert (write(bits, scale) == wanted).all(), scale


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3"])
def test_scales_are_as_ever(kind: str) -> None:
    write = converter(
        lambda builder, word, _scale: builder.bitcast(copies.scale_of(builder, word, TYPE_NUMBERS[kind]), _32)
    )
    sizes = np.unique(float32_sample() & 0x7FFFFFFF)
    with np.errstate(all="ignore"):
        wanted = [row_elements.scale_of(int(size), kind == "int8").view(np.uint32) for size in sizes[::7]]
    assert (write(sizes[::7]) == wanted).all()


def test_elements_are_packed_from_the_lower_end() -> None:
    values = np.array([1.0, -2.0, 3.0, -4.0], np.float32)

    def write(builder: Any, out: Any) -> None:
        floats = [ir.Constant(ir.FloatType(), float(value)) for value in values]
        for number, kind in enumerate(("float32", "float16", "bfloat16", "int8", "float8_e4m3")):
            words = copies.bits_of(builder, TYPE_NUMBERS[kind], floats, ir.Constant(ir.FloatType(), 1.0))
            for i, word in enumerate(words):
                builder.store(word, _pointer(builder, builder.add(out, ir.Constant(_64, 16 * number + 4 * i)), _32))

    out = np.zeros((5, 4), np.uint32)
    run_on_cpu(write, 1)(address(out), 0)
    assert (out[0] == values.view(np.uint32)).all()
    assert (out[1, :2] == values.astype(np.float16).view(np.uint32)).all()
    assert (out[2, :2].view(np.uint16) == values.view(np.uint32) >> 16).all()
    assert (out[3].view(np.int8)[:4] == values).all()
    assert (out[4].view(np.uint8)[:4] == [0x38, 0xC0, 0x44, 0xC8]).all()
    assert (out[3:, 1:] == 0).all() and (out[1:3, 2:] == 0).all()


# -- copies: every element once, wide, aligned ------------------------------------------------------


def table_of(rows: Any = ()) -> np.ndarray:
    """What stands for the other lanes: their rows; then the counts of loads, stores and misaligned accesses."""
    table = np.zeros(36, np.int64)
    table[: len(rows)] = rows
    return table


def accesses(pieces: int, lanes: int, width: int) -> int:
    return pieces


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("row_type", "out_type"), PAIRS)
def test_a_warp_copies_the_rows_of_its_lanes(row_type: str, out_type: str, dim: int) -> None:
    """Also where some lanes have no row, with more and fewer steps than loads in flight, and answers at any address."""
    rows = Rows(samples(dim, 40, dim), row_type, out_type)
    wanted = rows.answers().reshape(rows.count, -1)
    for group, depth, vector in ((8, 8, True), (32, 3, True), (16, 16, True), (8, 4, False)):
        piece = copies.Piece(dim, TYPE_NUMBERS[row_type], TYPE_NUMBERS[out_type], 16 if vector else 1)

        def write(builder: Any, target: Any, source: Any, lane: Any, piece=piece, group=group, depth=depth) -> None:  # type: ignore[no-untyped-def]
            lane = builder.trunc(lane, _32)
            copies.copy_group(builder, piece, group, depth, rows.scale_at, target, source, lane)

        copy = run_on_cpu(write, 3, rows.scale_at)
        numbers = np.random.default_rng(dim).permutation(rows.count)[:group]
        sources = address(rows.stored) + numbers * rows.stride
        sources[[1, group - 2]] = 0
        table = table_of(sources)
        out = aligned(32 * rows.out_bytes + 32, 0x77)
        target = out if vector else out[BYTES_OF[out_type] :]
        for lane in range(32):
            copy(address(target), int(table[lane]), lane, address(table))
        got = target[: 32 * rows.out_bytes].reshape(32, -1)
        there = sources != 0
        assert (got[:group][there] == wanted[numbers[there]]).all()
        assert (got[:group][~there] == 0x77).all() and (got[group:] == 0x77).all()
        moved = there.sum() * piece.in_row
        loads, stores, misaligned = table[32:35]
        assert (stores, misaligned) == (moved, 0)
        assert loads == moved + (there.sum() if rows.scale_at else 0)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("row_type", "out_type"), PAIRS)
def test_a_tile_copies_a_row(row_type: str, out_type: str, dim: int) -> None:
    rows = Rows(samples(dim, 12, dim), row_type, out_type)
    wanted = rows.answers().reshape(rows.count, -1)
    for lanes, vector in ((4, True), (8, True), (8, False)):
        piece = copies.Piece(dim, TYPE_NUMBERS[row_type], TYPE_NUMBERS[out_type], 16 if vector else 1)

        def write(builder: Any, target: Any, source: Any, lane: Any, piece=piece, lanes=lanes) -> None:  # type: ignore[no-untyped-def]
            scale = None
            if rows.scale_at:
                place = _pointer(builder, builder.add(source, ir.Constant(_64, rows.scale_at)), ir.FloatType())
                scale = builder.load(place)
            copies.copy_row(builder, piece, lanes, ("gpu", ""), target, source, lane, scale=scale)

        copy = run_on_cpu(write, 3)
        table = table_of()
        out = aligned(rows.count * rows.out_bytes + 16, 0x77)
        target = out if vector else out[BYTES_OF[out_type] :]
        for i in range(rows.count):
            for lane in range(lanes):
                copy(address(target) + i * rows.out_bytes, address(rows.stored) + i * rows.stride, lane, address(table))
        assert (target[: rows.count * rows.out_bytes].reshape(rows.count, -1) == wanted).all()
        assert list(table[32:35]) == [rows.count * piece.in_row] * 2 + [0]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("out_type", OUT_TYPES)
def test_a_tile_copies_a_row_of_the_host_store_to_answer_and_stage(out_type: str, dim: int) -> None:
    rows = Rows(samples(dim, 8, dim), "float32", out_type)
    wanted = rows.answers().reshape(rows.count, -1) if out_type != "float32" else rows.source.reshape(rows.count, -1)
    for lanes, vector in ((4, True), (8, False)):
        piece = copies.Piece(dim, TYPE_NUMBERS["float32"], TYPE_NUMBERS[out_type], 16 if vector else 1)

        def write(builder: Any, target: Any, stage: Any, source: Any, lane: Any, piece=piece, lanes=lanes) -> None:  # type: ignore[no-untyped-def]
            copies.copy_row(builder, piece, lanes, ("sys", ""), target, source, lane, second=stage)

        copy = run_on_cpu(write, 4)
        table = table_of()
        out, stage = aligned(rows.count * rows.out_bytes, 0x77), aligned(rows.source.nbytes, 0x66)
        for i in range(rows.count):
            answer = address(out) + i * rows.out_bytes if i != 1 else 0
            staged = address(stage) + i * 4 * dim if i != 2 else 0
            for lane in range(lanes):
                copy(answer, staged, address(rows.source) + i * 4 * dim, lane, address(table))
        out, stage = out.reshape(rows.count, -1), stage.reshape(rows.count, -1)
        some = np.arange(rows.count) != 1
        assert (out[some] == wanted[some]).all() and (out[1] == 0x77).all()
        some = np.arange(rows.count) != 2
        assert (stage[some] == rows.source.reshape(rows.count, -1)[some]).all() and (stage[2] == 0x66).all()
        assert table[34] == 0


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("row_type", [name for name in TYPE_NUMBERS if name != "float32"])
def test_a_tile_stores_a_row_in_the_cache(row_type: str, dim: int) -> None:
    kind = TYPE_NUMBERS[row_type]
    values = samples(dim, 12, dim)
    values[1], values[2, 0] = 0, np.inf if row_type in ("float16", "bfloat16") else 1e30
    rows = Rows(values, row_type, "float32")
    piece = copies.Piece(dim, TYPE_NUMBERS["float32"], kind)
    for lanes in (4, 8):

        def largest(builder: Any, source: Any, lane: Any, lanes=lanes) -> Any:  # type: ignore[no-untyped-def]
            return copies.largest_of(builder, piece, lanes, "sys", source, lane)

        def write(builder: Any, target: Any, source: Any, lane: Any, size: Any, lanes=lanes) -> None:  # type: ignore[no-untyped-def]
            scale = None
            if rows.scale_at:
                scale = copies.scale_of(builder, builder.trunc(size, _32), kind)
                place = builder.add(target, ir.Constant(_64, rows.scale_at))
                builder.store(scale, _pointer(builder, place, ir.FloatType()))
            copies.copy_row(builder, piece, lanes, ("sys", "gpu"), target, source, lane, scale=scale)

        find, store, table = run_on_cpu(largest, 2), run_on_cpu(write, 4), table_of()

        def by_tile(target: int, source: int, lanes=lanes, find=find, store=store, table=table) -> None:  # type: ignore[no-untyped-def]
            size = max(find(source, lane, address(table)) for lane in range(lanes)) if rows.scale_at else 0
            for lane in range(lanes):
                store(target, source, lane, size, address(table))

        assert (rows.make_stored(by_tile) == rows.stored).all()
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
