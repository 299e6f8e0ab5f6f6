"""Share out the bits of a ballot: which lane gets which of the lanes that voted, and what number each of them has.

A ballot is an int64 with bit i set if lane i of the warp voted. All functions are called by all lanes of a warp together.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.simt.reference import add64, ctz, is_warp_leader, lane_in_warp, popcount, shfl, tile_in_warp

__all__ = ["clear_lowest", "lane_for_tile", "number_voters", "rank_of_lane"]


def clear_lowest(bits, count):
    """``bits`` without the lowest ``count`` that are set."""
    for _ in range(count):
        bits &= bits - 1
    return bits


def lane_for_tile(ballot_bits):
    """``(has_one, lane)``: the voter that this tile takes, tile t the one of rank t; lane 0 if there are fewer."""
    mine = clear_lowest(ballot_bits, tile_in_warp())
    has_one = mine != 0
    return has_one, (ctz(mine) if has_one else np.int64(0))


def rank_of_lane(ballot_bits):
    """How many lanes before this one voted."""
    return np.int64(popcount(ballot_bits & ((np.int64(1) << lane_in_warp()) - 1)))


def number_voters(counter, ballot_bits):
    """Count the voters in the int64 at ``counter``, and give each the number it would have got by counting itself.

    One addition a warp, none without voters: all warps contend for the address.   **Writes:** counter.
    """
    first = np.int64(0)
    if is_warp_leader() and ballot_bits != 0:
        first = add64(counter, np.int64(popcount(ballot_bits)))
    return shfl(first, 0) + rank_of_lane(ballot_bits)
