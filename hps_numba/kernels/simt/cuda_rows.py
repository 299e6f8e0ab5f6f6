"""Copies of rows on a GPU: accesses of up to 16 bytes, conversion in registers (``simt.cuda_dtypes``).

A lane moves a *piece*: so many elements side by side that neither its load nor its store is wider than 16 bytes, and that a row
is whole pieces. The wider of the two is as wide as it can be, and lanes lie side by side in both: 4 elements from int8 to
float32 (4 bytes, 16 bytes), 8 from int8 to float16 (8, 16). A lane with more elements would need several accesses on one side,
each with gaps between the lanes.

Only ``load``, ``store``, ``shuffled`` and ``opaque`` are PTX: with those of a CPU in their place, tests run the rest there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from hps_numba.kernels.compiler.numba_cuda import cuda, intrinsic, types
from hps_numba.kernels.dtypes import FLOAT32
from hps_numba.kernels.simt.cuda_dtypes import BYTES, bits_of, floats_of, scale_of
from hps_numba.kernels.simt.ptx import load, opaque, shuffled, store

__all__ = ["Piece", "copy_group", "copy_row", "largest_of", "row_names", "scale_at", "store_row"]

_64, _32, _F32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
_INT = types.int64
_WARP = 32
_IN_FLIGHT = 8  # loads of a lane, in copies of one row


def _word(value: int) -> ir.Constant:
    return ir.Constant(_32, value)


def _wide(value: int) -> ir.Constant:
    return ir.Constant(_64, value)


@dataclass(frozen=True)
class Piece:
    """What a lane moves at a time: elements of a row of ``dim``, from the type ``stored`` to the type ``out``."""

    dim: int
    stored: int
    out: int
    max_elements: int = 16  # 1 if nothing is known of how answers are aligned

    @property
    def elements(self) -> int:
        """Elements of a piece: a power of two that divides the row."""
        return min(self.max_elements, 16 // max(BYTES[self.stored], BYTES[self.out]), self.dim & -self.dim)

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

        A NaN was stored as the one that rounding gives, so rounding it again changes nothing.
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
            stored = builder.and_(inside, has[0]) if has else inside
            converted = piece.convert(builder, words, scale)
            piece.store(builder, scopes[1], _at(builder, target, number, out), converted, stored)
            if has:
                store(builder, scopes[1], size, _at(builder, second, number, size), words, builder.and_(inside, has[1]))


def largest_of(builder: Any, piece: Piece, lanes: int, scope: str, source: Any, lane: Any) -> Any:
    """Bits of the largest absolute value among the elements of a lane of a float32 row; NaN is the largest."""
    size = piece.elements * BYTES[piece.stored]
    largest = _word(0)
    for together in _steps(builder, piece.in_row, lanes, lane):
        loaded = [piece.load(builder, scope, _at(builder, source, number, size), inside) for number, inside in together]
        for (_number, inside), words in zip(together, loaded, strict=True):
            is_inside = builder.icmp_unsigned("!=", inside, _word(0))
            for word in words:
                bits = builder.and_(word, _word(0x7FFFFFFF))
                more = builder.and_(is_inside, builder.icmp_unsigned(">", bits, largest))
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


def row_names(
    constants: dict[str, Any],
    lanes: int,
    out_vector: bool,
    lane: Any,
    max_in_tile: Any,
    device: Callable[..., Any],
) -> dict[str, Any]:
    """The copies of ``cache.rows``, by name; the arguments are those of ``cuda.names`` and its functions.

    Rows of the cache begin at multiples of 16 bytes, or of their stride where that is less (``kernels.dtypes.row_stride``);
    float32 rows of the host store, of the stage and of callers at multiples of 16 if their width is one. Where all rows are
    float32, none is read in pieces of 8 bytes.
    """
    dim, group, depth, place = (constants[name] for name in ("DIM", "GROUP", "DEPTH", "SCALE_AT"))
    stored, out = constants["ROW_TYPE"], constants["OUT_TYPE"]
    elements = 16 if out_vector and not (stored == out == FLOAT32 and dim % 4) else 1
    answer, host = Piece(dim, stored, out, elements), Piece(dim, FLOAT32, out, elements)

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
        # not lane_in_warp(): from a masked number the compiler makes all addresses first, 71 registers instead of 56 at D=128
        rows_to_answers(target, source, cuda.threadIdx.x % _WARP)

    @device
    def copy_from_cache(target, source):
        to_answer(target, source, lane())

    @device
    def copy_from_host(target, stage, source):
        from_host(target, stage, source, lane())

    copies = {"copy_rows": copy_rows, "copy_from_cache": copy_from_cache, "copy_from_host": copy_from_host}
    within = Piece(dim, FLOAT32, stored, 1 if stored == FLOAT32 and dim % 4 else 16)
    return copies | _into_cache(within, lanes, place, lane, max_in_tile, device)


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
