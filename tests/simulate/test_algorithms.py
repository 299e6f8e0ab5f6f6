"""Fully associative algorithms: traces worked by hand, naive Python, and a contract for every file of the folder."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.algorithm_oracles import NAIVE

from hps_numba import plugins
from hps_numba.kernels.policies._load import as_policy
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, RESIDENT, Algorithm
from hps_numba.simulate.algorithms._scored import scored
from hps_numba.simulate.dense_trace import DenseTrace, densify
from hps_numba.traces.trace import open_trace

PACKAGE = "hps_numba.simulate.algorithms"
NAMES = plugins.names(PACKAGE)
BOUNDS = ("belady", "infinite")


def algorithm_of(name: str) -> Algorithm:
    found: Algorithm = plugins.load(PACKAGE, name)
    return found


def dense(keys: list[int] | np.ndarray) -> DenseTrace:
    return densify(open_trace(np.asarray(keys, np.int64)))


def hits_of(
    algorithm: Algorithm, trace: DenseTrace, capacity: int, pieces: tuple[int, ...] = ()
) -> tuple[list[bool], np.ndarray]:
    """Hits, a bool for each request, and the counters; the trace is cut at the given positions."""
    counters, hits = algorithm.new_counters(), np.full(len(trace), 7, np.uint8)
    state = algorithm.state(capacity, trace.distinct, trace.max_count)
    edges = [0, *pieces, len(trace)]
    for start, stop in itertools.pairwise(edges):
        ahead = (trace.future()[start:stop],) if algorithm.looks_ahead else ()
        algorithm(trace.ids[start:stop], hits[start:stop], counters, capacity, *ahead, *state)
    assert set(hits.tolist()) <= {0, 1}
    return hits.astype(bool).tolist(), counters


def shown(hits: list[bool]) -> str:
    return "".join("+" if hit else "." for hit in hits)


# -- worked by hand ---------------------------------------------------------------------------------------

BY_HAND = {
    # 1 2 3 fill it; 1 is touched, so that 4 evicts 2, 2 evicts 3, and 3 evicts 1
    "lru": ([1, 2, 3, 1, 4, 2, 3], 3, "...+..."),
    # 4 evicts 1 although it was touched; then 1 evicts 2
    "fifo": ([1, 2, 3, 1, 4, 1, 2, 3], 3, "...+...."),
    # counts 1:2 2:1 3:1; 4 evicts 2, which is older than 3; 2 evicts 3; 1 is still resident
    "lfu": ([1, 2, 3, 1, 4, 2, 1, 4], 3, "...+..++"),
    # 1 is referenced: the hand skips it and evicts 2; 1 is referenced again, 2 replaces 3, and 1 is still resident
    "clock": ([1, 2, 3, 1, 4, 1, 2, 1], 3, "...+.+.+"),
    # 1 is visited; the hand skips 1, evicts 2 and stops at 3. 5 evicts 3, 6 evicts 4. 1 was never moved
    "sieve": ([1, 2, 3, 1, 4, 5, 6, 1], 3, "...+...+"),
    # A1in has 1 of 4 rows. 5 moves 1 to A1out; 1 returns to Am while 2 moves to A1out; then 1 stays
    "two_q": ([1, 2, 3, 4, 5, 1, 6, 7, 1], 4, "........+"),
    # the small queue has 1 of 10 rows: 1; the others overflow to the main one. 11 makes 1 a ghost; 1 returns to main
    "s3fifo": ([*range(1, 12), 1, 12, 13, 1], 10, "..............+"),
    # 1 moves to T2; 3 makes 2 a ghost; 2 returns, p is 1, so 3 stays and 1 becomes a ghost in B2
    "arc": ([1, 1, 2, 3, 2, 3], 2, ".+...+"),
    # next requests: 3 at 4, 1 at 3, 2 at 5: 2 is evicted; later 2 itself is not admitted
    "belady": ([1, 2, 3, 1, 3, 2], 2, "...++."),
    "infinite": ([5, 6, 5, 7, 6], 1, "..+.+"),
    # the window has 1 row, the main part 2: 1 and 2 move there. 3 replaces neither, as both are more frequent
    "wtinylfu": ([1, 2, 1, 2, 3, 4, 1, 2, 3], 3, "..++..++."),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_hits_of_a_trace_worked_by_hand(name: str) -> None:
    keys, capacity, expected = BY_HAND[name]
    assert shown(hits_of(algorithm_of(name), dense(keys), capacity)[0]) == expected


def test_every_algorithm_but_two_has_an_oracle() -> None:
    """Random replacement depends on its generator, W-TinyLFU on the collisions in its sketch."""
    assert set(NAMES) - set(NAIVE) == {"random", "wtinylfu"}
    assert set(NAMES) - set(BY_HAND) == {"random"}


# -- against naive Python ---------------------------------------------------------------------------

traces = st.lists(st.integers(0, 14), min_size=1, max_size=120)


@pytest.mark.parametrize("name", NAIVE)
@settings(max_examples=60, deadline=None)
@given(keys=traces, capacity=st.integers(1, 12))
def test_hits_equal_those_of_naive_python(name: str, keys: list[int], capacity: int) -> None:
    assert shown(hits_of(algorithm_of(name), dense(keys), capacity)[0]) == shown(NAIVE[name](keys, capacity))


@pytest.mark.parametrize("name", NAIVE)
def test_hits_on_skewed_traces_equal_those_of_naive_python(name: str) -> None:
    rng = np.random.default_rng(5)
    keys = rng.zipf(1.3, 1200) % 150
    for capacity in (10, 37):
        found, _ = hits_of(algorithm_of(name), dense(keys), capacity)
        assert found == NAIVE[name](keys.tolist(), capacity)


# -- contract of all algorithms ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skewed() -> DenseTrace:
    return dense(np.random.default_rng(2).zipf(1.2, 20_000) % 3000)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("capacity", [1, 2, 50, 400])
def test_counters_are_consistent_and_pieces_do_not_matter(name: str, capacity: int, skewed: DenseTrace) -> None:
    algorithm = algorithm_of(name)
    hits, counters = hits_of(algorithm, skewed, capacity)
    again, same = hits_of(algorithm, skewed, capacity, pieces=(1, 777, 777, 15_000))
    assert hits == again and (counters == same).all(), "cutting the trace changes nothing"
    misses = len(hits) - sum(hits)
    assert counters[RESIDENT] == counters[ADMITTED] - counters[EVICTED]
    if name == "infinite":
        assert counters[RESIDENT] == skewed.distinct and counters[EVICTED] == 0
    else:
        assert counters[RESIDENT] == min(capacity, skewed.distinct)
        assert counters[ADMITTED] <= misses if name == "belady" else counters[ADMITTED] == misses
    optimum, _ = hits_of(algorithm_of("belady"), skewed, capacity)
    assert sum(hits) <= sum(optimum) or name == "infinite"


@pytest.mark.parametrize("name", NAMES)
def test_cache_for_all_keys_misses_each_key_once(name: str, skewed: DenseTrace) -> None:
    hits, _ = hits_of(algorithm_of(name), skewed, 40 * skewed.distinct if name == "wtinylfu" else skewed.distinct)
    assert len(hits) - sum(hits) == skewed.distinct


def test_random_evicts_uniformly() -> None:
    """In a loop over twice as many keys as rows, LRU never hits, and random as often as Mattson's birth process predicts."""
    trace = dense(np.tile(np.arange(200), 200))
    assert sum(hits_of(algorithm_of("lru"), trace, 100)[0]) == 0
    share = sum(hits_of(algorithm_of("random"), trace, 100)[0][10_000:]) / 30_000
    assert share == pytest.approx(0.203, abs=0.02)  # miss rate m = 1 - exp(-2 m): 0.797


def test_wtinylfu_keeps_popular_keys_through_a_scan() -> None:
    keys = np.concatenate([np.tile(np.arange(50), 20), np.arange(1000, 6000), np.arange(50)])
    last = hits_of(algorithm_of("wtinylfu"), dense(keys), 100)[0][-50:]
    assert sum(last) >= 45 and sum(hits_of(algorithm_of("lru"), dense(keys), 100)[0][-50:]) == 0


# -- policies that score rows ----------------------------------------------------------------------------


class Latest:
    """Exact LRU."""

    def first(now, count):
        return now

    def touch(score, now, count):
        return now


class Oldest:
    def first(now, count):
        return now

    def touch(score, now, count):
        return score


class Count:
    """LFU in which the row inserted first is evicted among equal counts."""

    needs_count = True

    def first(now, count):
        return count

    def touch(score, now, count):
        return score + count


@pytest.mark.parametrize(("kind", "name"), [(Latest, "lru"), (Oldest, "fifo")])
def test_scored_policy_equals_the_algorithm(kind: type, name: str, skewed: DenseTrace) -> None:
    algorithm = scored(as_policy(kind), 1, 1)
    for capacity in (1, 7, 300):
        found, counters = hits_of(algorithm, skewed, capacity, pieces=(50, 9000))
        expected, same = hits_of(algorithm_of(name), skewed, capacity)
        assert found == expected and (counters[: EVICTED + 1] == same[: EVICTED + 1]).all()


@settings(max_examples=60, deadline=None)
@given(keys=traces, capacity=st.integers(1, 8))
def test_scores_that_rise_equal_naive_python(keys: list[int], capacity: int) -> None:
    scores: dict[int, tuple[int, int]] = {}
    expected = []
    for now, key in enumerate(keys):
        expected.append(key in scores)
        if key in scores:
            scores[key] = (scores[key][0] + 1, scores[key][1])
            continue
        if len(scores) == capacity:
            del scores[min(scores, key=lambda one: scores[one])]
        scores[key] = (1, now)
    assert hits_of(scored(as_policy(Count), 1, 1), dense(keys), capacity)[0] == expected
