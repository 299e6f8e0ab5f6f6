"""Policies in one small set: traces worked by hand, with every hit and all contents; longer ones against textbooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cache_oracle import CacheOracle

from hps_numba import plugins
from hps_numba.kernels.policies._load import as_policy, load_policy, policy_with
from hps_numba.kernels.policies._policy import Policy
from hps_numba.kernels.policies.lfu_decay import LFUDecay
from hps_numba.kernels.policies.pinned import pinned
from hps_numba.kernels.policies.ttl import ttl

ALPHABET = "ABCDEFGHIJKLMNOP"


def apart(words: int, key: int) -> tuple[int, ...]:
    """Counters in the sketch that no two keys of these tests share."""
    return key, 8, 24, 36, 48


def one_set(policy: Policy, ways: int) -> CacheOracle:
    """A cache of one set, which fills in the order of its ways."""
    host = {key: np.full(1, key, np.float32) for key in range(len(ALPHABET))}
    return CacheOracle(1, policy, 1, 0.0, lambda key: (0, 0), host, lines=1, ways=ways, counters_of=apart)


def played(policy: Policy, ways: int, requests: Iterable[tuple[int, str]]) -> tuple[str, str]:
    """``+`` for each request that hits, ``-`` for others; and the keys in the ways at the end. One request a batch."""
    cache, hits = one_set(policy, ways), ""
    for now, letter in requests:
        before = cache.hits
        cache.lookup([ALPHABET.index(letter)], now)
        hits += "+" if cache.hits > before else "-"
    return hits, "".join(ALPHABET[entry.key] for entry in cache.dump(0, 1))


def one_per_tick(letters: str, step: int = 1) -> list[tuple[int, str]]:
    return [(step * number, letter) for number, letter in enumerate(letters, start=1)]


#: policy, ways, (now, key) of each request, hits, keys in the ways at the end
TRACES: dict[str, tuple[Any, int, list[tuple[int, str]], str, str]] = {
    # B is the least recent at D, then C, then A
    "lru": ("lru", 3, one_per_tick("ABCADEDF", 8), "---+--+-", "FDE"),
    # A is evicted for D although it was just requested, then B
    "fifo": ("fifo", 3, one_per_tick("ABCADAB"), "---+---", "DAB"),
    # A was requested twice; B and C once, B is first; D is evicted for E
    "lfu": ("lfu", 3, one_per_tick("ABCADEA"), "---+--+", "AEC"),
    # A 288 / 438 with a half-life of 8; C at 1280, when three requests for A at 0, 1 and 2 are worth less than one
    "lfu_decay": (
        policy_with(LFUDecay, HALF_LIFE=8),
        2,
        [(0, "A"), (1, "A"), (2, "A"), (3, "B"), (40, "C"), (41, "D")],
        "-++---",
        "DC",
    ),
    # the generator says 3C6E, 4750, D1CC, AAF9, 6252 (hex), and modulo 4: 2, 0, 0, 1, 2
    "random": ("random", 4, one_per_tick("ABCDEFGHDI"), "--------+-", "GHID"),
    # D: the hand spares A and evicts B; E: evicts C; F: spares A and D and evicts E; G: evicts A, which was spared once
    "clock": ("clock", 3, one_per_tick("ABCADAEDFG"), "---+-+-+--", "GDF"),
    # as CLOCK up to F, which evicts the newest, so that the hand starts with the oldest again: it spares A, G evicts D,
    # H evicts F
    "sieve": ("sieve", 3, one_per_tick("ABCADAEDFGH"), "---+-+-+---", "AGH"),
    # C: once against twice for A, no; twice, no; three times, A is evicted; A: three times against once for B
    "tinylfu": ("tinylfu", 2, one_per_tick("AABCCCAC"), "-+-----+", "CA"),
    # D: A goes to the main queue, B is evicted; E: evicts C; F: D to the main queue, E is evicted; G: F to the main queue, A
    # goes round again, D, which was not requested there, is evicted
    "s3fifo": ("s3fifo", 3, one_per_tick("ABACDEADFFG"), "--+---++-+-", "AGF"),
    # D: B was idle for longest; E: A was inserted 70 ticks ago and is evicted, although it is the most recent; F: so is C
    "ttl": (
        ttl(64),
        3,
        [(0, "A"), (10, "B"), (20, "C"), (50, "A"), (60, "D"), (63, "A"), (70, "E"), (80, "C"), (90, "F")],
        "---+-+-+-",
        "EDF",
    ),
    # B is pinned; the others come and go in the second way, or wherever it is not
    "pinned": (pinned([1], "fifo"), 2, one_per_tick("ABCDBEB"), "----+-+", "EB"),
}


@pytest.mark.parametrize("name", TRACES)
def test_hits_of_a_trace_worked_by_hand(name: str) -> None:
    kind, ways, requests, hits, content = TRACES[name]
    policy = load_policy(kind) if isinstance(kind, str) else as_policy(kind)
    assert played(policy, ways, requests) == (hits, content)


def test_every_policy_has_one() -> None:
    assert set(TRACES) == set(plugins.names("hps_numba.kernels.policies"))


# -- batches ------------------------------------------------------------------------------------


def test_a_row_of_the_same_batch_is_never_evicted() -> None:
    class Always:
        def first(now, count):
            return 0

        def touch(score, now, count):
            return score

        def victim(scores, state):
            return 1

    cache = one_set(as_policy(Always), 3)
    cache.lookup([0, 1, 2], 1)
    cache.lookup([3, 4, 5], 2)  # ways 1, 2 and, going round, 0
    assert [entry.key for entry in cache.dump(0, 1)] == [5, 3, 4]
    cache.lookup([6], 3)
    assert [entry.key for entry in cache.dump(0, 1)] == [5, 6, 4]


def test_requests_are_counted_before_admission_and_halved_over_time() -> None:
    cache = one_set(load_policy("tinylfu"), 2)
    assert cache.sketch is not None and cache.sketch.period == 16
    cache.lookup([0, 1, 0, 1, 0], 1)
    cache.lookup([2, 2], 2)  # two against three
    assert cache.refused == 2 and cache.evictions == 0  # asked at both positions
    cache.lookup([3, 3, 3, 3], 3)  # four against three
    assert [entry.key for entry in cache.dump(0, 1)] == [3, 1]
    assert [cache.sketch(key) for key in range(4)] == [3, 2, 2, 4]
    cache.lookup([9] * 5, 4)  # the sixteenth request begins a new epoch
    assert [cache.sketch(key) for key in (*range(4), 9)] == [1, 1, 1, 2, 5]
    cache.lookup([9] * 14, 5)
    assert cache.sketch(9) == 15


def test_rows_with_the_largest_score_stay_even_if_a_batch_fills_all_other_ways() -> None:
    cache = one_set(as_policy(pinned([1, 2])), 3)
    cache.lookup([1], 1)
    cache.lookup([3, 4, 5], 2)  # 4 and 5 find a free way, or evict 3: no row of this batch is evicted for 5
    assert [entry.key for entry in cache.dump(0, 1)] == [1, 3, 4] and cache.refused == 1
    cache.lookup([2, 6, 7], 3)
    assert [entry.key for entry in cache.dump(0, 1)] == [1, 2, 6] and cache.refused == 2


# -- against textbooks ----------------------------------------------------------------------------

WAYS = 5
requests = st.lists(st.integers(0, 9), max_size=120)


def hits_of(name: str, keys: list[int], ways: int = WAYS) -> list[bool]:
    cache = one_set(load_policy(name), ways)
    found = []
    for now, key in enumerate(keys, start=1):
        before = cache.hits
        cache.lookup([key], now)
        found.append(cache.hits > before)
    return found


@given(requests)
def test_clock_equals_the_textbook(keys: list[int]) -> None:
    frames: list[int] = []
    asked: dict[int, bool] = {}
    hand, found = 0, []
    for key in keys:
        found.append(key in frames)
        if key in frames:
            asked[key] = True
        elif len(frames) < WAYS:
            frames.append(key)
            asked[key] = False
        else:
            while asked[frames[hand]]:
                asked[frames[hand]] = False
                hand = (hand + 1) % WAYS
            frames[hand] = key
            asked[key] = False
            hand = (hand + 1) % WAYS
    assert hits_of("clock", keys) == found


@given(requests)
def test_sieve_equals_the_paper(keys: list[int]) -> None:
    queue: list[int] = []  # head first, as in the paper
    visited: dict[int, bool] = {}
    hand: int | None = None  # a key; None: the tail
    found = []
    for key in keys:
        found.append(key in queue)
        if key in queue:
            visited[key] = True
            continue
        if len(queue) == WAYS:
            at = len(queue) - 1 if hand is None else queue.index(hand)
            while visited[queue[at]]:
                visited[queue[at]] = False
                at = at - 1 if at > 0 else len(queue) - 1
            hand = queue[at - 1] if at > 0 else None
            queue.pop(at)
        queue.insert(0, key)
        visited[key] = False
    assert hits_of("sieve", keys) == found


@given(requests)
def test_s3fifo_without_ghosts_is_two_queues(keys: list[int]) -> None:
    small: list[tuple[int, int]] = []  # (time of entry into the queue, frame): the frame decides among entries of one time
    main: list[tuple[int, int]] = []
    frames: list[int] = []
    asked: list[int] = []
    found = []
    for now, key in enumerate(keys, start=1):
        found.append(key in frames)
        if key in frames:
            asked[frames.index(key)] = min(3, asked[frames.index(key)] + 1)
            continue
        at = len(frames)
        while at == WAYS:
            queue = small or main  # a tenth of the ways is one
            oldest = min(queue)
            queue.remove(oldest)
            if asked[oldest[1]] == 0:
                at = oldest[1]
            else:
                asked[oldest[1]] = 0 if queue is small else asked[oldest[1]] - 1
                main.append((now, oldest[1]))
        frames[at : at + 1] = [key]
        asked[at : at + 1] = [0]
        small.append((now, at))
    assert hits_of("s3fifo", keys) == found


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3000)), max_size=60))
def test_lfu_decay_follows_the_sum_of_fading_weights(requests: list[tuple[int, int]]) -> None:
    policy = load_policy("lfu_decay")
    score: int | None = None
    weight, now = 0.0, 0
    for count, later in requests:
        weight *= 2 ** (-later / 1024)
        now += later
        if count == 0:
            continue
        score = policy.first(now, count) if score is None else policy.touch(score, now, count)
        weight += count
        assert abs(2 ** ((score - 256 * now / 1024) / 256) / weight - 1) < 0.35, (score, weight)
