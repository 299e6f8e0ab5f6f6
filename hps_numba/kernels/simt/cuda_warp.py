"""Lanes, tiles, warps and blocks of ``simt.reference`` for a GPU: a tile is 4 or 8 lanes of a warp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from hps_numba.kernels.compiler.numba_cuda import cuda, intrinsic, types
from hps_numba.kernels.simt.ptx import asm

__all__ = ["FULL", "WARP", "Lanes", "ctz", "grid_names", "lanes_of", "shuffle", "vote", "warp_names"]

_64, _32 = ir.IntType(64), ir.IntType(32)
_INT = types.int64
WARP = 32
FULL = 0xFFFFFFFF  # all lanes of a warp


@intrinsic
def shuffle(typingctx, mask, value, source, width):
    """``value`` (32 bits, zero-extended) of lane ``source`` of the segment of ``width`` lanes (shfl.sync.idx)."""

    def codegen(context, builder, signature, args):
        mask, value, source, width = (builder.trunc(arg, _32) for arg in args)
        clamp = builder.or_(builder.shl(builder.sub(ir.Constant(_32, 32), width), ir.Constant(_32, 8)), ir.Constant(_32, 31))
        text = "shfl.sync.idx.b32 $0, $1, $2, $3, $4;"
        return builder.zext(asm(builder, _32, text, "=r,r,r,r,r", [value, source, clamp, mask], convergent=True), _64)

    return _INT(_INT, _INT, _INT, _INT), codegen


@intrinsic
def vote(typingctx, mask, condition):
    """Bit i: lane i of the warp has the condition (vote.sync.ballot)."""

    def codegen(context, builder, signature, args):
        mask = builder.trunc(args[0], _32)
        flag = builder.zext(args[1], _32)
        text = "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, $2; }"
        return builder.zext(asm(builder, _32, text, "=r,r,r", [flag, mask], convergent=True), _64)

    return _INT(_INT, types.boolean), codegen


@intrinsic
def ctz(typingctx, bits):
    """Number of the lowest bit that is set."""

    def codegen(context, builder, signature, args):
        text = "{ .reg .b32 r; brev.b32 r, $1; clz.b32 $0, r; }"
        return builder.zext(asm(builder, _32, text, "=r,r", [builder.trunc(args[0], _32)]), _64)

    return _INT(_INT), codegen


@intrinsic
def _lanes_here(typingctx):
    """Bit i: lane i of the warp executes this now (activemask)."""

    def codegen(context, builder, signature, args):
        return builder.zext(asm(builder, _32, "activemask.b32 $0;", "=r", [], convergent=True), _64)

    return _INT(), codegen


@intrinsic
def _noinline(typingctx):
    def codegen(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


@dataclass(frozen=True)
class Lanes:
    """Device functions for a tile, from which others are made.

    Attributes:
        lanes: of a tile.   lane, tile_in_warp: their numbers.
        mask: the lanes that vote and shuffle together.   of_tile: the bits of this tile in a ballot.
    """

    lanes: int
    lane: Any
    tile_in_warp: Any
    mask: Any
    of_tile: Any


def lanes_of(lanes: int, uniform: bool, device: Callable[..., Any]) -> Lanes:
    """``uniform``: all tiles of a warp take every branch with lane operations together, else each tile on its own."""
    TILE_BITS = (1 << lanes) - 1
    SHIFT = lanes.bit_length() - 1  # shifts and masks: division that rounds as Python's does takes ten instructions

    @device
    def lane():
        return cuda.threadIdx.x & (lanes - 1)

    @device
    def tile_in_warp():
        return (cuda.threadIdx.x & 31) >> SHIFT

    @device
    def mask():
        return FULL if uniform else TILE_BITS << (lanes * tile_in_warp())

    @device
    def of_tile(votes):
        return (votes >> (lanes * tile_in_warp())) & TILE_BITS

    return Lanes(lanes, lane, tile_in_warp, mask, of_tile)


def grid_names(lanes: int, device: Callable[..., Any]) -> dict[str, Any]:
    """Numbers of lanes, tiles, warps and blocks in the grid, by their names in ``simt.reference``."""
    SHIFT = lanes.bit_length() - 1

    @device
    def is_first_lane():
        return cuda.threadIdx.x & (lanes - 1) == 0

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
        return WARP // lanes

    @device
    def lane_in_warp():
        return cuda.threadIdx.x & 31

    @device
    def warp_number():
        return (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) >> 5

    @device
    def grid_warps():
        return cuda.gridDim.x * cuda.blockDim.x >> 5

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

    others = ("lanes", "device", "SHIFT")
    return {name: function for name, function in locals().items() if name not in (*others, "others")}


def warp_names(tile: Lanes, add64: Any, device: Callable[..., Any]) -> dict[str, Any]:
    """Ballots, shuffles, barriers and what lanes do together, by their names in ``simt.reference``."""
    LANES, TILES = tile.lanes, WARP // tile.lanes
    TILE_BITS, SHIFT = (1 << LANES) - 1, LANES.bit_length() - 1
    lane, mask, of_tile = tile.lane, tile.mask, tile.of_tile

    @device
    def ballot(condition):
        return vote(FULL, condition)

    @device
    def any_in_warp(condition):
        return vote(FULL, condition) != 0

    @device
    def all_in_tile(condition):
        return of_tile(vote(mask(), condition)) == TILE_BITS

    @device
    def count_in_warp(condition):
        return cuda.popc(vote(FULL, condition)) >> SHIFT

    @device
    def tiles_of(votes):
        tiles = 0
        for number in range(TILES):
            tiles |= ((votes >> (LANES * number)) & 1) << number
        return tiles

    @device
    def popcount(bits):
        return cuda.popc(bits)

    @device
    def shfl(value, number):
        return shuffle(FULL, value, number, 32) | shuffle(FULL, value >> 32, number, 32) << 32

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
    def count_one(address):
        here, me = _lanes_here(), cuda.threadIdx.x & 31
        first = 0
        if me == ctz(here):
            first = add64(address, cuda.popc(here))
        first = shuffle(here, first, ctz(here), WARP) | shuffle(here, first >> 32, ctz(here), WARP) << 32
        return first + cuda.popc(here & ((1 << me) - 1))

    @device
    def sync_warp():
        cuda.syncwarp()

    @device
    def sync_tile():
        cuda.syncwarp(mask())

    @device
    def sync_block():
        cuda.syncthreads()

    return {
        "lane": lane,
        "tile_in_warp": tile.tile_in_warp,
        "ctz": ctz,
        "noinline": _noinline,
        "ballot": ballot,
        "any_in_warp": any_in_warp,
        "all_in_tile": all_in_tile,
        "count_in_warp": count_in_warp,
        "tiles_of": tiles_of,
        "popcount": popcount,
        "count_one": count_one,
        "shfl": shfl,
        "from_first_lane": from_first_lane,
        "max_in_tile": max_in_tile,
        "sync_warp": sync_warp,
        "sync_tile": sync_tile,
        "sync_block": sync_block,
    }
