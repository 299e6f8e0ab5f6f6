"""``lanes`` for a GPU: a tile of 4 or 8 lanes of a warp, votes and shuffles, memory operations of PTX with their scope.

Loads and stores are written in PTX, because numba has no 16-byte accesses and no memory scopes (PTX ISA, "Memory consistency
model"): ``relaxed.gpu`` for what other blocks write meanwhile, ``relaxed.sys`` for what the CPU writes. No operation here keeps
data in the first-level cache, which is not coherent.

``names`` gives what ``build.py`` binds; each call makes new device functions, as numba keeps them for one chip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from hps_numba.kernels.compiler.numba_cuda import cuda, intrinsic, make_array, populate_array, types
from hps_numba.kernels.simt.cuda_dtypes import typed_rows
from hps_numba.kernels.simt.cuda_pooling import pool_names

__all__ = ["names"]

_64, _32, _F32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
_VOID = ir.VoidType()
_INT = types.int64
WARP = 32
LOCAL_WORDS = 16  # room of ``local_words``


def _asm(builder: Any, result: Any, text: str, constraints: str, args: list[Any], *, together: bool = False) -> Any:
    """Inline PTX; what lanes do ``together`` must stay one instruction, so that no branch keeps some of them from it."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    attributes = ("convergent",) if together else ()
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), args, attrs=attributes)


def _load(text: str, register: str = "l") -> Any:
    """``ld`` of one value, widened to int64."""

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            kind = _64 if register == "l" else _32
            value = _asm(builder, kind, f"{text} $0, [$1];", f"={register},l,~{{memory}}", list(args))
            return value if register == "l" else builder.zext(value, _64)

        return _INT(_INT), codegen

    return load


def _store(text: str, register: str = "l") -> Any:
    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, signature, args):
            value = args[1] if register == "l" else builder.trunc(args[1], _32)
            _asm(builder, _VOID, f"{text} [$0], $1;", f"l,{register},~{{memory}}", [args[0], value])
            return context.get_dummy_value()

        return types.void(_INT, _INT), codegen

    return store


@intrinsic
def _local_words(typingctx, count):
    kind = types.Array(_INT, 1, "C")

    def codegen(context, builder, signature, args):
        words = cgutils.alloca_once(builder, ir.ArrayType(_64, LOCAL_WORDS))
        array = make_array(kind)(context, builder)
        eight = context.get_constant(types.intp, 8)
        first = builder.bitcast(words, _64.as_pointer())
        populate_array(array, data=first, shape=[args[0]], strides=[eight], itemsize=eight, meminfo=None)
        return array._getvalue()

    return kind(_INT), codegen


def _narrow_store(bits: int) -> Any:
    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, signature, args):
            value = builder.trunc(args[1], ir.IntType(16))
            _asm(builder, _VOID, f"st.global.b{bits} [$0], $1;", "l,h,~{memory}", [args[0], value])
            return context.get_dummy_value()

        return types.void(_INT, _INT), codegen

    return store


def _narrow_load(bits: int) -> Any:
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            text = f"ld.relaxed.gpu.global.u{bits} $0, [$1];"
            return builder.zext(_asm(builder, ir.IntType(16), text, "=h,l,~{memory}", list(args)), _64)

        return _INT(_INT), codegen

    return load


def _load2(text: str) -> Any:
    """``ld`` of 16 bytes as two int64."""

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            kind = ir.LiteralStructType([_64, _64])
            pair = _asm(builder, kind, f"{text} {{$0, $1}}, [$2];", "=l,=l,l,~{memory}", list(args))
            both = context.get_constant_undef(signature.return_type)
            both = builder.insert_value(both, builder.extract_value(pair, 0), 0)
            return builder.insert_value(both, builder.extract_value(pair, 1), 1)

        return types.UniTuple(_INT, 2)(_INT), codegen

    return load


def _atomic(text: str, register: str = "l", operands: int = 1) -> Any:
    """``atom`` with one or two operands; returns what was there."""
    kind = _64 if register == "l" else _32

    def codegen(context, builder, signature, args):
        values = [arg if register == "l" else builder.trunc(arg, _32) for arg in args[1:]]
        places = ", ".join(f"${i + 2}" for i in range(operands))
        constraints = f"={register},l,{','.join([register] * operands)},~{{memory}}"
        old = _asm(builder, kind, f"{text} $0, [$1], {places};", constraints, [args[0], *values])
        return old if register == "l" else builder.zext(old, _64)

    if operands == 1:

        @intrinsic
        def atomic(typingctx, address, value):
            return _INT(_INT, _INT), codegen

        return atomic

    @intrinsic
    def compare_and_swap(typingctx, address, expected, value):
        return _INT(_INT, _INT, _INT), codegen

    return compare_and_swap


@intrinsic
def _shuffle(typingctx, mask, value, source, width):
    """``value`` (32 bits, zero-extended) of lane ``source`` of the segment of ``width`` lanes (shfl.sync.idx)."""

    def codegen(context, builder, signature, args):
        mask, value, source, width = (builder.trunc(arg, _32) for arg in args)
        clamp = builder.or_(builder.shl(builder.sub(ir.Constant(_32, 32), width), ir.Constant(_32, 8)), ir.Constant(_32, 31))
        got = _asm(
            builder, _32, "shfl.sync.idx.b32 $0, $1, $2, $3, $4;", "=r,r,r,r,r", [value, source, clamp, mask], together=True
        )
        return builder.zext(got, _64)

    return _INT(_INT, _INT, _INT, _INT), codegen


@intrinsic
def _vote(typingctx, mask, condition):
    """Bit i: lane i of the warp has the condition (vote.sync.ballot)."""

    def codegen(context, builder, signature, args):
        mask = builder.trunc(args[0], _32)
        flag = builder.zext(args[1], _32)
        text = "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, $2; }"
        return builder.zext(_asm(builder, _32, text, "=r,r,r", [flag, mask], together=True), _64)

    return _INT(_INT, types.boolean), codegen


def _instruction(text: str) -> Any:
    """An instruction without operands; none if there is no text."""

    @intrinsic
    def instruction(typingctx):
        def codegen(context, builder, signature, args):
            if text:
                _asm(builder, _VOID, text, "~{memory}", [])
            return context.get_dummy_value()

        return types.void(), codegen

    return instruction


@intrinsic
def _out_of_line(typingctx):
    def codegen(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _float_bits(typingctx, value):
    def codegen(context, builder, signature, args):
        return builder.zext(builder.bitcast(args[0], _32), _64)

    return _INT(types.float32), codegen


@intrinsic
def _bits_float(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], _32), _F32)

    return types.float32(_INT), codegen


@intrinsic
def _trailing_zeros(typingctx, bits):
    """Number of the lowest bit that is set."""

    def codegen(context, builder, signature, args):
        text = "{ .reg .b32 r; brev.b32 r, $1; clz.b32 $0, r; }"
        return builder.zext(_asm(builder, _32, text, "=r,r", [builder.trunc(args[0], _32)]), _64)

    return _INT(_INT), codegen


def copy_words(lanes: int, size: int, load: str, store: str, width: int) -> Any:
    """Intrinsic ``copy(target, second, source, lane)``: ``size`` bytes in accesses of ``width``, to one or two targets.

    Up to 8 loads of a lane are in flight before the first is stored. A ``second`` of 0 is left out; likewise ``target``.
    """
    pieces = size // width
    words = max(1, width // 4)
    registers = ", ".join(f"${i}" for i in range(words))
    vector = {16: ".v4", 8: ".v2", 4: ""}[width]

    def emit_load(builder, address, inside):
        kind = ir.LiteralStructType([_32] * words) if words > 1 else _32
        what = f"{{{registers}}}" if words > 1 else "$0"
        text = f"{{ .reg .pred p; setp.ne.u32 p, ${words + 1}, 0; @p {load}{vector}.b32 {what}, [${words}]; }}"
        got = _asm(builder, kind, text, ",".join(["=r"] * words) + ",l,r,~{memory}", [address, inside])
        return [builder.extract_value(got, i) for i in range(words)] if words > 1 else [got]

    def emit_store(builder, address, values, inside):
        names = ", ".join(f"${i + 1}" for i in range(words))
        what = f"{{{names}}}" if words > 1 else "$1"
        text = f"{{ .reg .pred p; setp.ne.u32 p, ${words + 1}, 0; @p {store}{vector}.b32 [$0], {what}; }}"
        _asm(builder, _VOID, text, "l," + ",".join(["r"] * words) + ",r,~{memory}", [address, *values, inside])

    @intrinsic
    def copy(typingctx, target, second, source, lane):
        def codegen(context, builder, signature, args):
            target, second, source, lane = args
            start = builder.mul(lane, ir.Constant(_64, width))
            has = [builder.zext(builder.icmp_unsigned("!=", t, ir.Constant(_64, 0)), _32) for t in (target, second)]
            steps = -(-pieces // lanes)
            for group in range(0, steps, 8):
                loaded = []
                for step in range(group, min(group + 8, steps)):
                    offset = builder.add(start, ir.Constant(_64, step * lanes * width))
                    inside = ir.Constant(_32, 1)
                    if (step + 1) * lanes > pieces:
                        last = ir.Constant(_64, pieces - step * lanes)
                        inside = builder.zext(builder.icmp_signed("<", lane, last), _32)
                    loaded.append((offset, inside, emit_load(builder, builder.add(source, offset), inside)))
                for there, to in zip(has, (target, second), strict=True):
                    for offset, inside, values in loaded:
                        emit_store(builder, builder.add(to, offset), values, builder.and_(inside, there))
            return context.get_dummy_value()

        return types.void(_INT, _INT, _INT, _INT), codegen

    return copy


def copy_group(group: int, dim: int, width: int, stride: int, depth: int) -> Any:
    """Intrinsic ``copy(target, source, lane)``: a warp copies the rows of its first ``group`` lanes, all lanes together.

    ``source`` is each lane's row or 0, ``target`` the address of the first row; rows go one after the other, so that lanes
    write side by side. Up to ``depth`` loads of a lane are in flight before the first is stored.
    """
    pieces = 4 * dim // width
    words = width // 4
    total = group * pieces
    vector = {16: ".v4", 8: ".v2", 4: ""}[width]
    names_in = "{" + ", ".join(f"${i}" for i in range(words)) + "}" if words > 1 else "$0"
    names_out = "{" + ", ".join(f"${i + 1}" for i in range(words)) + "}" if words > 1 else "$1"

    def shuffled(builder, value, number):
        low, high = builder.trunc(value, _32), builder.trunc(builder.lshr(value, ir.Constant(_64, 32)), _32)
        text = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
        parts = [_asm(builder, _32, text, "=r,r,r", [part, number], together=True) for part in (low, high)]
        low, high = (builder.zext(part, _64) for part in parts)
        return builder.or_(low, builder.shl(high, ir.Constant(_64, 32)))

    @intrinsic
    def copy(typingctx, target, source, lane):
        def codegen(context, builder, signature, args):
            target, source, lane = args
            lane = builder.trunc(lane, _32)
            kind = ir.LiteralStructType([_32] * words) if words > 1 else _32
            steps = -(-total // 32)

            def move(first, count):
                """Steps ``first`` (a value) to ``first + count``."""
                base = builder.add(lane, builder.mul(first, ir.Constant(_32, 32)))
                loaded = []
                for step in range(count):
                    piece = builder.add(base, ir.Constant(_32, 32 * step))
                    row = builder.udiv(piece, ir.Constant(_32, pieces))
                    within = builder.zext(builder.urem(piece, ir.Constant(_32, pieces)), _64)
                    within = builder.mul(within, ir.Constant(_64, width))
                    start = shuffled(builder, source, row)
                    inside = builder.zext(builder.icmp_unsigned("!=", start, ir.Constant(_64, 0)), _32)
                    if total % 32:
                        real = builder.icmp_unsigned("<", piece, ir.Constant(_32, total))
                        inside = builder.and_(inside, builder.zext(real, _32))
                    got = load(builder.add(start, within), inside)
                    if stride == pieces * width:  # row after row
                        place = builder.mul(builder.zext(base, _64), ir.Constant(_64, width))
                        place = builder.add(place, ir.Constant(_64, 32 * step * width))
                    else:
                        place = builder.add(builder.mul(builder.zext(row, _64), ir.Constant(_64, stride)), within)
                    loaded.append((builder.add(target, place), got, inside))
                for to, values, inside in loaded:
                    store(to, values, inside)

            def load(address, inside):
                load_it = f"@p ld.relaxed.gpu.global{vector}.b32 {names_in}, [${words}];"
                text = f"{{ .reg .pred p; setp.ne.u32 p, ${words + 1}, 0; {load_it} }}"
                got = _asm(builder, kind, text, ",".join(["=r"] * words) + ",l,r,~{memory}", [address, inside])
                return [builder.extract_value(got, i) for i in range(words)] if words > 1 else [got]

            def store(address, values, inside):
                text = f"{{ .reg .pred p; setp.ne.u32 p, ${words + 1}, 0; @p st.global{vector}.b32 [$0], {names_out}; }}"
                _asm(builder, _VOID, text, "l," + ",".join(["r"] * words) + ",r,~{memory}", [address, *values, inside])

            whole = steps // depth
            if whole == 1:
                move(ir.Constant(_32, 0), depth)
            elif whole > 1:
                times = _asm(builder, _32, f"mov.u32 $0, {whole};", "=r", [])  # a number that keeps the loop a loop
                with cgutils.for_range(builder, times, intp=_32) as loop:
                    move(builder.mul(loop.index, ir.Constant(_32, depth)), depth)
            if steps % depth:
                move(ir.Constant(_32, whole * depth), steps % depth)
            return context.get_dummy_value()

        return types.void(_INT, _INT, _INT), codegen

    return copy


def names(
    *,
    lanes: int,
    uniform: bool,
    out_vector: bool,
    pdl: bool,
    copies: bool,
    constants: dict[str, Any],
    device: Callable[..., Any],
) -> dict[str, Any]:
    """What takes the place of the functions of ``lanes`` and of the copies in ``kernels.cache.rows`` for one kernel.

    Args:
        lanes: in a tile, 4 or 8.
        uniform: all tiles of a warp take every branch with lane operations together, else each tile for itself.
        out_vector: answers are 16-byte aligned.
        pdl: the kernel may be started before the work that it follows has ended (``uses_pdl``).
        copies: the chip copies from global to shared memory by itself.
        constants: DIM and the types of rows.
        device: makes a device function.
    """
    LANES, TILES, FULL = lanes, WARP // lanes, 0xFFFFFFFF
    TILE_BITS = (1 << lanes) - 1
    SHIFT = lanes.bit_length() - 1  # shifts and masks: division that rounds as Python's does takes ten instructions
    shuffle, vote, zeros = _shuffle, _vote, _trailing_zeros
    load_pair, load_word, load_host_word = (
        _load2("ld.relaxed.gpu.global.v2.b64"),
        _load("ld.relaxed.gpu.global.b64"),
        _load("ld.relaxed.sys.global.b64"),
    )
    line_pair = _load2("ld.global.v2.b64")
    load_host_pair = _load2("ld.relaxed.sys.global.v2.b64")

    @device
    def lane():
        return cuda.threadIdx.x & (LANES - 1)

    @device
    def tile_in_warp():
        return (cuda.threadIdx.x & 31) >> SHIFT

    @device
    def mask():
        return FULL if uniform else TILE_BITS << (LANES * tile_in_warp())

    @device
    def of_tile(votes):
        return (votes >> (LANES * tile_in_warp())) & TILE_BITS

    @device
    def is_first_lane():
        return cuda.threadIdx.x & (LANES - 1) == 0

    @device
    def is_warp_leader():
        return cuda.threadIdx.x & 31 == 0

    @device
    def is_block_leader():
        return cuda.threadIdx.x == 0

    @device
    def is_grid_leader():
        return cuda.threadIdx.x == 0 and cuda.blockIdx.x == 0

    @device
    def tiles_in_warp():
        return TILES

    @device
    def warp_number():
        return (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) >> 5

    @device
    def tile_number():
        return (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) >> SHIFT

    @device
    def grid_tiles():
        return cuda.gridDim.x * cuda.blockDim.x >> SHIFT

    @device
    def block_number():
        return cuda.blockIdx.x

    @device
    def block_tiles():
        return cuda.blockDim.x >> SHIFT

    @device
    def grid_blocks():
        return cuda.gridDim.x

    @device
    def grid_row():
        return cuda.blockIdx.y

    @device
    def grid_rows():
        return cuda.gridDim.y

    @device
    def any_in_warp(condition):
        return vote(FULL, condition) != 0

    @device
    def lane_in_warp():
        return cuda.threadIdx.x & 31

    @device
    def grid_warps():
        return cuda.gridDim.x * cuda.blockDim.x >> 5

    @device
    def ballot(condition):
        return vote(FULL, condition)

    @device
    def popcount(bits):
        return cuda.popc(bits)

    @device
    def shfl(value, number):
        return shuffle(FULL, value, number, 32) | shuffle(FULL, value >> 32, number, 32) << 32

    @device
    def sync_warp():
        cuda.syncwarp()

    @device
    def probe_alone(line, key):
        """By one lane: the whole line in four loads. They may come from the first-level cache: what was found is checked."""
        s23, s4_meta = line_pair(line + 48)
        k0, k1 = line_pair(line)
        k2, k3 = line_pair(line + 16)
        k4, s01 = line_pair(line + 32)
        meta = (s4_meta >> 32) & FULL
        hits = np.int64(k0 == key) | np.int64(k1 == key) << 1 | np.int64(k2 == key) << 2
        hits |= np.int64(k3 == key) << 3 | np.int64(k4 == key) << 4
        hits &= meta
        score = s01 & FULL
        if hits & 2:
            score = s01 >> 32
        if hits & 4:
            score = s23 & FULL
        if hits & 8:
            score = s23 >> 32
        if hits & 16:
            score = s4_meta & FULL
        return line + 8 * zeros(hits) if hits != 0 else 0, score << 32 | meta

    @device
    def probe_both(line, other, key):
        """By a tile of 8 lanes, a word of each line a lane."""
        word, second = load_word(line + 8 * lane()), load_word(other + 8 * lane())
        is_key = lane() < 5
        hit = of_tile(vote(mask(), is_key & (word == key)))
        hit_second = of_tile(vote(mask(), is_key & (second == key)))
        meta = shuffle(mask(), word >> 32, 7, LANES)
        meta_second = shuffle(mask(), second >> 32, 7, LANES)
        hit &= meta
        if hit == 0:
            line, word, hit, meta = other, second, hit_second & meta_second, meta_second
        way = zeros(hit) if hit != 0 else 0
        score = shuffle(mask(), word >> 32 if way & 1 else word, 5 + (way >> 1), LANES)
        return line + 8 * way if hit != 0 else 0, score << 32 | meta

    @device
    def tiles_of(votes):
        tiles = 0
        for tile in range(TILES):
            tiles |= ((votes >> (LANES * tile)) & 1) << tile
        return tiles

    @device
    def all_in_tile(condition):
        return of_tile(vote(mask(), condition)) == TILE_BITS

    @device
    def count_in_warp(condition):
        return cuda.popc(vote(FULL, condition)) >> SHIFT

    @device
    def from_first_lane(value):
        return shuffle(mask(), value, 0, LANES)

    @device
    def max_in_tile(value):
        for i in range(LANES):
            other = shuffle(mask(), value, (lane() + i) % LANES, LANES)
            value = max(value, other)
        return value

    @device
    def sync_tile():
        cuda.syncwarp(mask())

    @device
    def sync_block():
        cuda.syncthreads()

    @device
    def probe_line_8(line, key):
        word = load_word(line + 8 * lane())
        votes = of_tile(vote(mask(), (lane() < 5) & (word == key)))
        meta = shuffle(mask(), word >> 32, 7, LANES)
        hit = votes & meta & 0x1F
        way = zeros(hit) if hit != 0 else -1
        at = 5 + (max(way, 0) >> 1)
        low = shuffle(mask(), word, at, LANES)
        high = shuffle(mask(), word >> 32, at, LANES)
        return way, meta, high if way & 1 else low

    @device
    def probe_line_4(line, key):
        first, second = load_pair(line + 16 * lane())
        v0 = of_tile(vote(mask(), (lane() < 3) & (first == key)))
        v1 = of_tile(vote(mask(), (lane() < 2) & (second == key)))
        votes = (v0 & 1) | (v1 & 1) << 1 | (v0 & 2) << 1 | (v1 & 2) << 2 | (v0 & 4) << 2
        meta = shuffle(mask(), second >> 32, 3, LANES)
        hit = votes & meta & 0x1F
        way = zeros(hit) if hit != 0 else -1
        number = max(way, 0)  # scores 0, 1: second of lane 2; 2, 3: first of lane 3; 4: second of lane 3
        pair = first if lane() == 3 and number < 4 else second
        at = 2 if number < 2 else 3
        low = shuffle(mask(), pair, at, LANES)
        high = shuffle(mask(), pair >> 32, at, LANES)
        return way, meta, high if number & 1 else low

    @device
    def settle(keys, used):
        """The first entry of a line that has the key, if none before it is unused: ``(entry or -1, settled)``."""
        found = zeros(keys) if keys != 0 else 4
        unused = ~used & 0xF
        end = zeros(unused) if unused != 0 else 4
        return found if found < end else -1, found < 4 or end < 4

    @device
    def probe_host_line_8(line, key, wanted):
        word = load_host_word(line + 8 * lane()) if wanted else 0
        even = of_tile(vote(mask(), (lane() % 2 == 0) & (word == key)))
        odd = of_tile(vote(mask(), (lane() % 2 == 1) & (word != 0))) >> 1
        keys = (even & 1) | (even & 4) >> 1 | (even & 16) >> 2 | (even & 64) >> 3
        used = (odd & 1) | (odd & 4) >> 1 | (odd & 16) >> 2 | (odd & 64) >> 3
        entry, settled = settle(keys, used)
        at = 2 * max(entry, 0) + 1
        found = shuffle(mask(), word, at, LANES) | shuffle(mask(), word >> 32, at, LANES) << 32
        return found if entry >= 0 else 0, settled

    @device
    def probe_host_line_4(line, key, wanted):
        first, second = load_host_pair(line + 16 * lane()) if wanted else (0, 0)
        keys = of_tile(vote(mask(), first == key))
        used = of_tile(vote(mask(), second != 0))
        entry, settled = settle(keys, used)
        at = max(entry, 0)
        found = shuffle(mask(), second, at, LANES) | shuffle(mask(), second >> 32, at, LANES) << 32
        return found if entry >= 0 else 0, settled

    bound = {
        "lane": lane,
        "lane_in_warp": lane_in_warp,
        "grid_warps": grid_warps,
        "ballot": ballot,
        "local_words": _local_words,
        "ctz": zeros,
        "popcount": popcount,
        "shfl": shfl,
        "sync_warp": sync_warp,
        "probe_alone": probe_alone,
        "probe_both": probe_both,
        "tiles_of": tiles_of,
        "is_first_lane": is_first_lane,
        "is_warp_leader": is_warp_leader,
        "is_block_leader": is_block_leader,
        "is_grid_leader": is_grid_leader,
        "tile_in_warp": tile_in_warp,
        "tiles_in_warp": tiles_in_warp,
        "tile_number": tile_number,
        "warp_number": warp_number,
        "grid_tiles": grid_tiles,
        "grid_blocks": grid_blocks,
        "grid_row": grid_row,
        "grid_rows": grid_rows,
        "block_number": block_number,
        "block_tiles": block_tiles,
        "any_in_warp": any_in_warp,
        "all_in_tile": all_in_tile,
        "count_in_warp": count_in_warp,
        "from_first_lane": from_first_lane,
        "max_in_tile": max_in_tile,
        "sync_tile": sync_tile,
        "sync_block": sync_block,
        "probe_line": probe_line_8 if lanes == 8 else probe_line_4,
        "probe_host_line": probe_host_line_8 if lanes == 8 else probe_host_line_4,
        "ld64": load_word,
        "ld64_host": load_host_word,
        "ld32": _load("ld.relaxed.gpu.global.b32", "r"),
        "ld16": _narrow_load(16),
        "ld8": _narrow_load(8),
        "st64": _store("st.relaxed.gpu.global.b64"),
        "st32": _store("st.relaxed.gpu.global.b32", "r"),
        "st16": _narrow_store(16),
        "st8": _narrow_store(8),
        "cas32": _atomic("atom.relaxed.gpu.global.cas.b32", "r", 2),
        "cas64": _atomic("atom.relaxed.gpu.global.cas.b64", "l", 2),
        "add32": _atomic("atom.relaxed.gpu.global.add.u32", "r"),
        "add64": _atomic("atom.relaxed.gpu.global.add.u64"),
        "min64": _atomic("atom.relaxed.gpu.global.min.s64"),
        "max64": _atomic("atom.relaxed.gpu.global.max.s64"),
        "fence": _instruction("fence.acq_rel.gpu;"),
        "grid_dependency_sync": _instruction("griddepcontrol.wait; griddepcontrol.launch_dependents;" if pdl else ""),
        "noinline": _out_of_line,
        "float_bits": _float_bits,
        "bits_float": _bits_float,
    }
    if constants.get("ROW_TYPE") == 0 and constants.get("OUT_TYPE", 0) == 0:
        bound |= _float32_rows(
            lanes, constants["GROUP"], constants["DEPTH"], constants["DIM"], out_vector, lane, lane_in_warp, device
        )
    elif "ROW_TYPE" in constants:
        bound |= typed_rows(constants, lanes, out_vector, lane, max_in_tile, device)
    if "DIM" in constants:
        bound |= pool_names(constants, out_vector, copies)
    return bound


def _float32_rows(
    lanes: int, group: int, depth: int, dim: int, out_vector: bool, lane: Any, lane_in_warp: Any, device: Callable[..., Any]
) -> dict[str, Any]:
    """Copies of float32 rows: 16 bytes an access where width and alignment allow it."""
    width = 16 if dim % 4 == 0 and out_vector else 4
    within = 16 if dim % 4 == 0 else 4
    rows_to_answers = copy_group(group, dim, width, 4 * dim, depth)
    to_answer = copy_words(lanes, 4 * dim, "ld.relaxed.gpu.global", "st.global", width)
    from_host = copy_words(lanes, 4 * dim, "ld.relaxed.sys.global", "st.global", width)
    to_cache = copy_words(lanes, 4 * dim, "ld.relaxed.sys.global", "st.relaxed.gpu.global", within)

    @device
    def copy_rows(target, source):
        # not lane_in_warp(): from a masked number the compiler makes all addresses first, 71 registers instead of 56 at D=128
        rows_to_answers(target, source, cuda.threadIdx.x % WARP)

    @device
    def copy_from_cache(target, source):
        to_answer(target, 0, source, lane())

    @device
    def copy_from_host(target, stage, source):
        from_host(target, stage, source, lane())

    @device
    def store_in_cache(target, source):
        to_cache(target, 0, source, lane())

    return {
        "copy_rows": copy_rows,
        "copy_from_cache": copy_from_cache,
        "copy_from_host": copy_from_host,
        "store_in_cache": store_in_cache,
    }
