"""Probes of ``simt.reference`` for a GPU: the lanes of a tile read a line of keys together, and vote on which is the key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hps_numba.kernels.simt.cuda_memory import load_two_words
from hps_numba.kernels.simt.cuda_warp import FULL, Lanes, ctz, shuffle, vote

__all__ = ["probe_names"]


def probe_names(tile: Lanes, memory: dict[str, Any], device: Callable[..., Any]) -> dict[str, Any]:
    """Probes of lines of a cache and of the host store's index, by their names in ``simt.reference``.

    ``memory``: ``cuda_memory.memory_names``.
    """
    by_tile = _probes_by_8 if tile.lanes == 8 else _probes_by_4
    settle = _settle(device)
    return {
        "probe_line_by_lane": _probe_line_by_lane(device),
        "probe_host_line_by_lane": _probe_host_line_by_lane(settle, device),
        "probe_two_lines": _probe_two_lines(tile, memory["ld64"], device),
        **by_tile(tile, memory, settle, device),
    }


def _probe_line_by_lane(device: Callable[..., Any]) -> Any:
    load_pair = load_two_words("ld.global.v2.b64")

    @device
    def probe_line_by_lane(line, key):
        """The whole line in four loads. They may come from the first-level cache: what is found is validated."""
        s23, s4_meta = load_pair(line + 48)
        k0, k1 = load_pair(line)
        k2, k3 = load_pair(line + 16)
        k4, s01 = load_pair(line + 32)
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
        return line + 8 * ctz(hits) if hits != 0 else 0, score << 32 | meta

    return probe_line_by_lane


def _probe_host_line_by_lane(settle: Any, device: Callable[..., Any]) -> Any:
    load_pair = load_two_words("ld.relaxed.gpu.global.v2.b64")

    @device
    def probe_host_line_by_lane(line, key):
        """The whole line in four loads."""
        k0, w0 = load_pair(line)
        k1, w1 = load_pair(line + 16)
        k2, w2 = load_pair(line + 32)
        k3, w3 = load_pair(line + 48)
        keys = np.int64(k0 == key) | np.int64(k1 == key) << 1 | np.int64(k2 == key) << 2 | np.int64(k3 == key) << 3
        used = np.int64(w0 != 0) | np.int64(w1 != 0) << 1 | np.int64(w2 != 0) << 2 | np.int64(w3 != 0) << 3
        entry, settled = settle(keys, used)
        word = w0
        if entry == 1:
            word = w1
        if entry == 2:
            word = w2
        if entry == 3:
            word = w3
        return word if entry >= 0 else 0, settled

    return probe_host_line_by_lane


def _probe_two_lines(tile: Lanes, load_word: Any, device: Callable[..., Any]) -> Any:
    LANES = tile.lanes
    lane, mask, of_tile = tile.lane, tile.mask, tile.of_tile

    @device
    def probe_two_lines(line, other, key):
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
        way = ctz(hit) if hit != 0 else 0
        score = shuffle(mask(), word >> 32 if way & 1 else word, 5 + (way >> 1), LANES)
        return line + 8 * way if hit != 0 else 0, score << 32 | meta

    return probe_two_lines


def _settle(device: Callable[..., Any]) -> Any:
    @device
    def settle(keys, used):
        """The first entry of a line that has the key, if none before it is unused: ``(entry or -1, settled)``."""
        found = ctz(keys) if keys != 0 else 4
        unused = ~used & 0xF
        end = ctz(unused) if unused != 0 else 4
        return found if found < end else -1, found < 4 or end < 4

    return settle


def _probes_by_8(tile: Lanes, memory: dict[str, Any], settle: Any, device: Callable[..., Any]) -> dict[str, Any]:
    """By 8 lanes, one word of the line each."""
    LANES = tile.lanes
    lane, mask, of_tile = tile.lane, tile.mask, tile.of_tile
    load_word, load_host_word = memory["ld64"], memory["ld64_host"]

    @device
    def probe_line(line, key):
        word = load_word(line + 8 * lane())
        votes = of_tile(vote(mask(), (lane() < 5) & (word == key)))
        meta = shuffle(mask(), word >> 32, 7, LANES)
        hit = votes & meta & 0x1F
        way = ctz(hit) if hit != 0 else -1
        at = 5 + (max(way, 0) >> 1)
        low = shuffle(mask(), word, at, LANES)
        high = shuffle(mask(), word >> 32, at, LANES)
        return way, meta, high if way & 1 else low

    @device
    def probe_host_line(line, key, active):
        word = load_host_word(line + 8 * lane()) if active else 0
        even = of_tile(vote(mask(), (lane() % 2 == 0) & (word == key)))
        odd = of_tile(vote(mask(), (lane() % 2 == 1) & (word != 0))) >> 1
        keys = (even & 1) | (even & 4) >> 1 | (even & 16) >> 2 | (even & 64) >> 3
        used = (odd & 1) | (odd & 4) >> 1 | (odd & 16) >> 2 | (odd & 64) >> 3
        entry, settled = settle(keys, used)
        at = 2 * max(entry, 0) + 1
        found = shuffle(mask(), word, at, LANES) | shuffle(mask(), word >> 32, at, LANES) << 32
        return found if entry >= 0 else 0, settled

    return {"probe_line": probe_line, "probe_host_line": probe_host_line}


def _probes_by_4(tile: Lanes, memory: dict[str, Any], settle: Any, device: Callable[..., Any]) -> dict[str, Any]:
    """By 4 lanes, two words of the line each."""
    LANES = tile.lanes
    lane, mask, of_tile = tile.lane, tile.mask, tile.of_tile
    load_pair, load_host_pair = load_two_words("ld.relaxed.gpu.global.v2.b64"), load_two_words("ld.relaxed.sys.global.v2.b64")

    @device
    def probe_line(line, key):
        first, second = load_pair(line + 16 * lane())
        v0 = of_tile(vote(mask(), (lane() < 3) & (first == key)))
        v1 = of_tile(vote(mask(), (lane() < 2) & (second == key)))
        votes = (v0 & 1) | (v1 & 1) << 1 | (v0 & 2) << 1 | (v1 & 2) << 2 | (v0 & 4) << 2
        meta = shuffle(mask(), second >> 32, 3, LANES)
        hit = votes & meta & 0x1F
        way = ctz(hit) if hit != 0 else -1
        number = max(way, 0)  # scores 0, 1: second of lane 2; 2, 3: first of lane 3; 4: second of lane 3
        pair = first if lane() == 3 and number < 4 else second
        at = 2 if number < 2 else 3
        low = shuffle(mask(), pair, at, LANES)
        high = shuffle(mask(), pair >> 32, at, LANES)
        return way, meta, high if number & 1 else low

    @device
    def probe_host_line(line, key, active):
        first, second = load_host_pair(line + 16 * lane()) if active else (0, 0)
        keys = of_tile(vote(mask(), first == key))
        used = of_tile(vote(mask(), second != 0))
        entry, settled = settle(keys, used)
        at = max(entry, 0)
        found = shuffle(mask(), second, at, LANES) | shuffle(mask(), second >> 32, at, LANES) << 32
        return found if entry >= 0 else 0, settled

    return {"probe_line": probe_line, "probe_host_line": probe_host_line}
