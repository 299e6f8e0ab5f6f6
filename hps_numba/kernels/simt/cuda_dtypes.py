"""Rows on their way on a GPU where cache or answer are not float32: accesses of up to 16 bytes, conversion in registers.

A lane moves a *piece*: so many elements side by side that neither its load nor its store is wider than 16 bytes, and that a row
is whole pieces. The wider of the two is as wide as it can be, and lanes lie side by side in both: 4 elements from int8 to
float32 (4 bytes, 16 bytes), 8 from int8 to float16 (8, 16). A lane with more elements would need several accesses on one side,
each with gaps between the lanes.

Conversions give the bits of ``dtypes`` for all inputs, on every chip. They are LLVM's integer and float operations, none
of which may be joined with another or rounded otherwise; ``load``, ``store``, ``shuffled`` and ``opaque`` alone are PTX. So
what is written here also runs on a CPU, where tests compare it bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from hps_numba.kernels.compiler.numba_cuda import cuda, intrinsic, types
from hps_numba.kernels.dtypes import BFLOAT16, ELEMENT_BYTES, FLOAT8_E4M3, FLOAT16, FLOAT32, INT8, TYPE_NUMBERS

__all__ = [
    "BYTES",
    "Piece",
    "bits_of",
    "copy_group",
    "copy_row",
    "floats_of",
    "largest_of",
    "load",
    "scale_at",
    "scale_of",
    "store",
    "store_row",
    "typed_rows",
]

_64, _32, _16, _F32 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()
_INT = types.int64
_WARP = 32
_IN_FLIGHT = 8  # loads of a lane, in copies of one row
#: bytes of an element, by the number of its type
BYTES = {TYPE_NUMBERS[name]: size for name, size in ELEMENT_BYTES.items()}
_NO_NUMBER = 0x7FC00000


def _word(value: int) -> ir.Constant:
    return ir.Constant(_32, value)


def _wide(value: int) -> ir.Constant:
    return ir.Constant(_64, value)


def _float(value: float) -> ir.Constant:
    return ir.Constant(_F32, value)


# -- PTX ----------------------------------------------------------------------------------------


def _asm(builder: Any, result: Any, text: str, constraints: str, args: list[Any], *, together: bool = False) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    attributes = ("convergent",) if together else ()
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), args, attrs=attributes)


def _form(size: int) -> tuple[int, str, str, Any]:
    """Registers of an access of ``size`` bytes, how PTX writes it, and the kind of a register: it has none of a byte."""
    if size < 4:
        return 1, f".b{8 * size}", "h", _16
    words = size // 4
    return words, {1: "", 2: ".v2", 4: ".v4"}[words] + ".b32", "r", _32


def load(builder: Any, scope: str, size: int, address: Any, inside: Any) -> list[Any]:
    """``size`` bytes as 32-bit words, of less than 4 bytes the lower end of one; anything if not ``inside``."""
    words, form, register, kind = _form(size)
    into = "{" + ", ".join(f"${i}" for i in range(words)) + "}" if words > 1 else "$0"
    text = f"{{ .reg .pred p; setp.ne.u32 p, ${words + 1}, 0; @p ld.relaxed.{scope}.global{form} {into}, [${words}]; }}"
    result = ir.LiteralStructType([kind] * words) if words > 1 else kind
    got = _asm(builder, result, text, ",".join([f"={register}"] * words) + ",l,r,~{memory}", [address, inside])
    if size < 4:
        return [builder.zext(got, _32)]
    return [builder.extract_value(got, i) for i in range(words)] if words > 1 else [got]


def store(builder: Any, scope: str, size: int, address: Any, values: Sequence[Any], inside: Any) -> None:
    """``size`` bytes from 32-bit words, of less than 4 bytes from the lower end of one; nothing if not ``inside``.

    ``scope``: for which other threads the words are whole, "" for none.
    """
    words, form, register, _kind = _form(size)
    names = "{" + ", ".join(f"${i + 1}" for i in range(words)) + "}" if words > 1 else "$1"
    relaxed = f".relaxed.{scope}" if scope else ""
    text = f"{{ .reg .pred p; setp.ne.u32 p, ${words + 1}, 0; @p st{relaxed}.global{form} [$0], {names}; }}"
    values = [builder.trunc(values[0], _16)] if size < 4 else list(values)
    constraints = "l," + ",".join([register] * words) + ",r,~{memory}"
    _asm(builder, ir.VoidType(), text, constraints, [address, *values, inside])


def shuffled(builder: Any, value: Any, lane: Any) -> Any:
    """``value`` (32 or 64 bits) of a lane of the warp."""
    if value.type == _64:
        halves = (builder.trunc(value, _32), builder.trunc(builder.lshr(value, _wide(32)), _32))
        low, high = (builder.zext(shuffled(builder, half, lane), _64) for half in halves)
        return builder.or_(low, builder.shl(high, _wide(32)))
    return _asm(builder, _32, "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=r,r,r", [value, lane], together=True)


def opaque(builder: Any, number: int) -> Any:
    """A number that the compiler does not know, so that a loop stays a loop."""
    return _asm(builder, _32, f"mov.u32 $0, {number};", "=r", [])


# -- elements -----------------------------------------------------------------------------------


def floats_of(builder: Any, stored: int, words: Sequence[Any], count: int, scale: Any, *, any_nan: bool = False) -> list[Any]:
    """The float32 that ``count`` stored elements stand for; ``scale`` (float32) if the type has one.

    ``any_nan``: what is no number may be any, as where it is added to others; that takes fewer registers.
    """
    if stored == FLOAT32:
        return [builder.bitcast(word, _F32) for word in words]
    if BYTES[stored] == 2:
        float16 = _float_of_number if any_nan else _float_of_float16
        float_of = float16 if stored == FLOAT16 else _float_of_bfloat16
        return [float_of(builder, words[i // 2], i % 2) for i in range(count)]
    if stored == INT8:
        words = [builder.xor(word, _word(0x80808080)) for word in words]
        return [builder.fmul(_whole(builder, words[i // 4], i % 4), scale) for i in range(count)]
    return [_float_of_float8(builder, words[i // 4], i % 4, scale) for i in range(count)]


def _float_of_float16(builder: Any, word: Any, half: int) -> Any:
    """By a multiplication, which is exact; then infinity and what is no number get their exponent, and keep the rest."""
    top = word if half else builder.shl(word, _word(16))
    small = builder.and_(builder.ashr(top, _word(3)), _word(0x8FFFE000))
    value = builder.fmul(builder.bitcast(small, _F32), _float(2.0**112))
    bits = builder.bitcast(value, _32)
    size = builder.bitcast(builder.and_(bits, _word(0x7FFFFFFF)), _F32)
    beyond = builder.fcmp_ordered(">=", size, _float(65536.0))
    return builder.bitcast(builder.select(beyond, builder.or_(bits, _word(0x7F800000)), bits), _F32)


def _float_of_number(builder: Any, word: Any, half: int) -> Any:
    """By the instruction that there is: from a float16 that is no number it makes one with bits of its own."""
    bits = builder.trunc(builder.lshr(word, _word(16)) if half else word, _16)
    return builder.fpext(builder.bitcast(bits, ir.HalfType()), _F32)


def _float_of_bfloat16(builder: Any, word: Any, half: int) -> Any:
    bits = builder.and_(word, _word(0xFFFF0000)) if half else builder.shl(word, _word(16))
    return builder.bitcast(bits, _F32)


def _whole(builder: Any, word: Any, byte: int) -> Any:
    """An int8 as float32, from a word whose bytes are 128 too large: as the last bits of a float, where units are 1."""
    bits = builder.and_(builder.lshr(word, _word(8 * byte)), _word(0xFF))
    return builder.fsub(builder.bitcast(builder.or_(bits, _word(0x4B000000)), _F32), _float(2.0**23 + 128))


def _float_of_float8(builder: Any, word: Any, byte: int, scale: Any) -> Any:
    top = builder.shl(word, _word(24 - 8 * byte))
    small = builder.and_(builder.lshr(top, _word(4)), _word(0x07F00000))
    size = builder.fmul(builder.fmul(builder.bitcast(small, _F32), _float(2.0**120)), scale)
    value = builder.or_(builder.bitcast(size, _32), builder.and_(top, _word(0x80000000)))
    nan = builder.icmp_unsigned("==", small, _word(0x07F00000))
    return builder.bitcast(builder.select(nan, _word(_NO_NUMBER), value), _F32)


def bits_of(builder: Any, kind: int, values: Sequence[Any], scale: Any = None) -> list[Any]:
    """Float32 as elements of a kind, in 32-bit words; if that is less than a word, in the lower end of one."""
    each = 4 // BYTES[kind]
    element = {
        FLOAT32: lambda value: builder.bitcast(value, _32),
        FLOAT16: lambda value: _float16_of(builder, value),
        BFLOAT16: lambda value: _bfloat16_of(builder, value),
        INT8: lambda value: _int8_of(builder, value, scale),
        FLOAT8_E4M3: lambda value: _float8_of(builder, value, scale),
    }[kind]
    words = []
    for first in range(0, len(values), each):
        word, *others = (element(value) for value in values[first : first + each])
        for i, other in enumerate(others, 1):
            word = builder.or_(word, builder.shl(other, _word(8 * BYTES[kind] * i)))
        words.append(word)
    return words


def _high_half(builder: Any, value: Any) -> Any:
    return builder.lshr(builder.bitcast(value, _32), _word(16))


def _float16_of(builder: Any, value: Any) -> Any:
    half = builder.zext(builder.bitcast(builder.fptrunc(value, ir.HalfType()), _16), _32)
    sign = builder.and_(_high_half(builder, value), _word(0x8000))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(nan, builder.or_(sign, _word(0x7E00)), half)


def _bfloat16_of(builder: Any, value: Any) -> Any:
    high = _high_half(builder, value)
    bits = builder.add(builder.bitcast(value, _32), builder.add(builder.and_(high, _word(1)), _word(0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(nan, builder.or_(high, _word(0x40)), builder.lshr(bits, _word(16)))


def _size(builder: Any, value: Any) -> Any:
    """Bits of the absolute value."""
    return builder.and_(builder.bitcast(value, _32), _word(0x7FFFFFFF))


def _int8_of(builder: Any, value: Any, scale: Any) -> Any:
    value = builder.fdiv(value, scale)
    size = builder.bitcast(_size(builder, value), _F32)
    size = builder.select(builder.fcmp_ordered("<=", size, _float(127.0)), size, _float(127.0))
    whole = builder.fptosi(size, _32)
    left_over = builder.fsub(size, builder.sitofp(whole, _F32))
    whole = builder.add(whole, builder.zext(builder.fcmp_ordered(">=", left_over, _float(0.5)), _32))
    negative = builder.fcmp_ordered("<", value, _float(0.0))
    return builder.and_(builder.select(negative, builder.neg(whole), whole), _word(0xFF))


def _float8_of(builder: Any, value: Any, scale: Any) -> Any:
    value = builder.fdiv(value, scale)
    sign = builder.and_(builder.lshr(builder.bitcast(value, _32), _word(24)), _word(0x80))
    size = _size(builder, value)
    odd = builder.and_(builder.lshr(size, _word(20)), _word(1))
    normal = builder.sub(builder.add(size, odd), _word(0x3C000000 - 0x7FFFF))
    normal = builder.lshr(normal, _word(20))
    normal = builder.select(builder.icmp_unsigned("<", normal, _word(0x7E)), normal, _word(0x7E))
    # units of 2**-9 are the last bits of floats from 2**14 on
    units = builder.sub(builder.bitcast(builder.fadd(builder.bitcast(size, _F32), _float(2.0**14)), _32), _word(0x46800000))
    byte = builder.select(builder.icmp_unsigned("<", size, _word(0x3C800000)), units, normal)
    nan = builder.icmp_unsigned(">", size, _word(0x7F800000))
    return builder.or_(sign, builder.select(nan, _word(0x7F), byte))


def scale_of(builder: Any, largest: Any, stored: int) -> Any:
    """Scale (float32) of a row by the bits of its largest absolute value."""
    size = builder.bitcast(largest, _F32)
    if stored == INT8:
        scale = builder.fdiv(size, _float(127.0))
        return builder.select(builder.fcmp_ordered(">", size, _float(0.0)), scale, _float(1.0))
    scale, least = builder.fdiv(size, _float(448.0)), _float(1.0 / (448.0 * 512.0))
    return builder.select(builder.fcmp_ordered(">", scale, least), scale, least)


# -- copies -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """What a lane moves at a time: elements of a row of ``dim``, from the type ``stored`` to the type ``out``."""

    dim: int
    stored: int
    out: int
    most: int = 16  # elements; 1 if nothing is known of how answers are aligned

    @property
    def elements(self) -> int:
        """Of a piece: a power of two that divides the row."""
        return min(self.most, 16 // max(BYTES[self.stored], BYTES[self.out]), self.dim & -self.dim)

    @property
    def in_row(self) -> int:
        """Pieces of a row."""
        return self.dim // self.elements

    def load(self, builder: Any, scope: str, address: Any, inside: Any) -> list[Any]:
        """The words of a piece of a stored row."""
        return load(builder, scope, self.elements * BYTES[self.stored], address, inside)

    def store(self, builder: Any, scope: str, address: Any, words: Sequence[Any], inside: Any) -> None:
        """Write a piece."""
        store(builder, scope, self.elements * BYTES[self.out], address, words, inside)

    def convert(self, builder: Any, words: Sequence[Any], scale: Any) -> Sequence[Any]:
        """Words of the stored piece as words of the answer.

        What is no number was stored as the one that rounding gives, so that it, too, is what it was rounded to.
        """
        if self.stored == self.out:
            return words
        values = floats_of(builder, self.stored, words, self.elements, scale)
        return bits_of(builder, self.out, values, scale if BYTES[self.out] == 1 else None)


def _steps(builder: Any, pieces: int, lanes: int, lane: Any) -> list[list[tuple[Any, Any]]]:
    """``(number of the piece, whether there is one)`` of each step of a tile through a row, as many together as in flight."""
    steps = []
    for step in range(-(-pieces // lanes)):
        inside = _word(1)
        if (step + 1) * lanes > pieces:
            inside = builder.zext(builder.icmp_signed("<", lane, _wide(pieces - step * lanes)), _32)
        steps.append((builder.add(lane, _wide(step * lanes)), inside))
    return [steps[i : i + _IN_FLIGHT] for i in range(0, len(steps), _IN_FLIGHT)]


def _at(builder: Any, start: Any, number: Any, size: int) -> Any:
    return builder.add(start, builder.mul(number, _wide(size)))


def copy_row(
    builder: Any, piece: Piece, lanes: int, scopes: tuple[str, str], target: Any, source: Any, lane: Any,
    *, scale: Any = None, second: Any = None,
) -> None:  # fmt: skip
    """Copy a row by a tile of ``lanes``.

    Args:
        scopes: of loads and of stores.   target, source: addresses.   lane: in the tile.
        scale: float32 of the stored row, if it has one.
        second: address to which the words go as they are, or None. If it is given, it and ``target`` may be 0: left out.
    """
    size, out = piece.elements * BYTES[piece.stored], piece.elements * BYTES[piece.out]
    has = None
    if second is not None:
        has = [builder.zext(builder.icmp_unsigned("!=", to, _wide(0)), _32) for to in (target, second)]
    for together in _steps(builder, piece.in_row, lanes, lane):
        loaded = [piece.load(builder, scopes[0], _at(builder, source, number, size), inside) for number, inside in together]
        for (number, inside), words in zip(together, loaded, strict=True):
            wanted = builder.and_(inside, has[0]) if has else inside
            converted = piece.convert(builder, words, scale)
            piece.store(builder, scopes[1], _at(builder, target, number, out), converted, wanted)
            if has:
                store(builder, scopes[1], size, _at(builder, second, number, size), words, builder.and_(inside, has[1]))


def largest_of(builder: Any, piece: Piece, lanes: int, scope: str, source: Any, lane: Any) -> Any:
    """Bits of the largest absolute value among the elements of a lane of a float32 row; what is no number is larger."""
    size = piece.elements * BYTES[piece.stored]
    largest = _word(0)
    for together in _steps(builder, piece.in_row, lanes, lane):
        loaded = [piece.load(builder, scope, _at(builder, source, number, size), inside) for number, inside in together]
        for (_number, inside), words in zip(together, loaded, strict=True):
            there = builder.icmp_unsigned("!=", inside, _word(0))
            for word in words:
                bits = builder.and_(word, _word(0x7FFFFFFF))
                more = builder.and_(there, builder.icmp_unsigned(">", bits, largest))
                largest = builder.select(more, bits, largest)
    return largest


def scale_at(builder: Any, source: Any, place: int) -> Any:
    """The scale (float32) at byte ``place`` of a stored row, None if ``place`` is 0."""
    if not place:
        return None
    (bits,) = load(builder, "gpu", 4, builder.add(source, _wide(place)), _word(1))
    return builder.bitcast(bits, _F32)


def store_row(builder: Any, piece: Piece, lanes: int, place: int, target: Any, source: Any, lane: Any, largest: Any) -> None:
    """Store a float32 row in the cache by a tile, and its scale at byte ``place`` if that is not 0.

    ``largest``: int64, bits of its largest absolute value.
    """
    scale = None
    if place:
        scale = scale_of(builder, builder.trunc(largest, _32), piece.out)
        store(builder, "gpu", 4, builder.add(target, _wide(place)), [builder.bitcast(scale, _32)], _word(1))
    copy_row(builder, piece, lanes, ("sys", "gpu"), target, source, lane, scale=scale)


def copy_group(builder: Any, piece: Piece, group: int, depth: int, place: int, target: Any, source: Any, lane: Any) -> None:
    """A warp copies the rows of its first ``group`` lanes, all lanes together.

    Args:
        depth: loads of a lane that are in flight before the first piece is stored.
        place: byte of the scale in a stored row, or 0. Each lane loads that of its own row.
        target: address of the first answer; they go one after the other, so that lanes write side by side.
        source: each lane's row, or 0.   lane: in the warp, 32 bits.
    """
    size, out = piece.elements * BYTES[piece.stored], piece.elements * BYTES[piece.out]
    total = group * piece.in_row
    scale = None
    if place:
        has = builder.zext(builder.icmp_unsigned("!=", source, _wide(0)), _32)
        (scale,) = load(builder, "gpu", 4, builder.add(source, _wide(place)), has)

    def move(first: Any, count: int) -> None:
        """Steps ``first`` (a value) to ``first + count``."""
        base = builder.add(lane, builder.mul(first, _word(_WARP)))
        loaded = []
        for step in range(count):
            number = builder.add(base, _word(_WARP * step))
            row = builder.udiv(number, _word(piece.in_row))
            within = builder.zext(builder.urem(number, _word(piece.in_row)), _64)
            start = shuffled(builder, source, row)
            inside = builder.zext(builder.icmp_unsigned("!=", start, _wide(0)), _32)
            if total % _WARP:
                inside = builder.and_(inside, builder.zext(builder.icmp_unsigned("<", number, _word(total)), _32))
            loaded.append((row, inside, piece.load(builder, "gpu", _at(builder, start, within, size), inside)))
        to = builder.add(target, builder.mul(builder.zext(base, _64), _wide(out)))
        for step, (row, inside, words) in enumerate(loaded):
            of_row = builder.bitcast(shuffled(builder, scale, row), _F32) if place else None
            converted = piece.convert(builder, words, of_row)
            piece.store(builder, "", builder.add(to, _wide(_WARP * step * out)), converted, inside)

    steps = -(-total // _WARP)
    whole = steps // depth
    if whole == 1:
        move(_word(0), depth)
    elif whole > 1:
        with cgutils.for_range(builder, opaque(builder, whole), intp=_32) as loop:
            move(builder.mul(loop.index, _word(depth)), depth)
    if steps % depth:
        move(_word(whole * depth), steps % depth)


# -- what kernels call --------------------------------------------------------------------------


def typed_rows(
    constants: dict[str, Any],
    lanes: int,
    out_vector: bool,
    lane: Any,
    max_in_tile: Any,
    device: Callable[..., Any],
) -> dict[str, Any]:
    """What takes the place of functions of ``cache.rows``; the arguments are those of ``cuda.names`` and its functions.

    Rows of the cache begin at multiples of 16 bytes, or of their stride where that is less (``kernels.dtypes.row_stride``);
    float32 rows of the host store, of the stage and of callers at multiples of 16 if their width is one.
    """
    dim, group, depth, place = (constants[name] for name in ("DIM", "GROUP", "DEPTH", "SCALE_AT"))
    stored, out = constants["ROW_TYPE"], constants["OUT_TYPE"]
    most = 16 if out_vector else 1
    answer, host = Piece(dim, stored, out, most), Piece(dim, FLOAT32, out, most)

    @intrinsic
    def rows_to_answers(typingctx, target, source, lane):
        def codegen(context, builder, signature, args):
            target, source, lane = args
            copy_group(builder, answer, group, depth, place, target, source, builder.trunc(lane, _32))
            return context.get_dummy_value()

        return types.void(_INT, _INT, _INT), codegen

    @intrinsic
    def to_answer(typingctx, target, source, lane):
        def codegen(context, builder, signature, args):
            copy_row(builder, answer, lanes, ("gpu", ""), *args, scale=scale_at(builder, args[1], place))
            return context.get_dummy_value()

        return types.void(_INT, _INT, _INT), codegen

    @intrinsic
    def from_host(typingctx, target, stage, source, lane):
        def codegen(context, builder, signature, args):
            target, stage, source, lane = args
            copy_row(builder, host, lanes, ("sys", ""), target, source, lane, second=stage)
            return context.get_dummy_value()

        return types.void(_INT, _INT, _INT, _INT), codegen

    @device
    def copy_rows(target, source):
        rows_to_answers(target, source, cuda.threadIdx.x % _WARP)

    @device
    def copy_from_cache(target, source):
        to_answer(target, source, lane())

    @device
    def copy_from_host(target, stage, source):
        from_host(target, stage, source, lane())

    copies = {"copy_rows": copy_rows, "copy_from_cache": copy_from_cache, "copy_from_host": copy_from_host}
    return copies | _into_cache(Piece(dim, FLOAT32, stored), lanes, place, lane, max_in_tile, device)


def _into_cache(
    piece: Piece, lanes: int, place: int, lane: Any, max_in_tile: Any, device: Callable[..., Any]
) -> dict[str, Any]:
    """``store_in_cache``: a row of the cache from float32."""

    @intrinsic
    def largest(typingctx, source, lane):
        def codegen(context, builder, signature, args):
            return builder.zext(largest_of(builder, piece, lanes, "sys", *args), _64)

        return _INT(_INT, _INT), codegen

    @intrinsic
    def to_cache(typingctx, target, source, lane, largest):
        def codegen(context, builder, signature, args):
            store_row(builder, piece, lanes, place, *args)
            return context.get_dummy_value()

        return types.void(_INT, _INT, _INT, _INT), codegen

    if place:

        @device
        def store_in_cache(target, source):
            to_cache(target, source, lane(), max_in_tile(largest(source, lane())))

    else:

        @device
        def store_in_cache(target, source):
            to_cache(target, source, lane(), 0)

    return {"store_in_cache": store_in_cache}
