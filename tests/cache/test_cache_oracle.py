"""The oracle of the embedding cache itself, worked by hand: which way a key takes, which row is evicted, and with which score.

Two sets of 2 lines of 5 ways. Even keys belong to set 0, odd ones to set 1; in set 0 the primary line of
multiples of 4 is line 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.cache_oracle import CacheOracle
from support.oracles import EXTREME_64, assert_same_bits, rows_of

from hps_numba.kernels.policies._load import as_policy, load_policy
from hps_numba.kernels.policies._policy import Policy

DIM = 2
DEFAULT = -7.5
HOST_KEYS = range(100)
TEN = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]  # they fill set 0: 0 4 8 12 16 in line 0, 2 6 10 14 18 in line 1


def primary(key: int) -> tuple[int, int]:
    return key % 2, key // 2 % 2


def oracle(policy: str | Policy = "lru", host: Any = HOST_KEYS, **geometry: int) -> CacheOracle:
    """A cache over a host that has ``host``; None for a cache without one."""
    rows = None if host is None else {key: rows_of(key, DIM) for key in host}
    policy = policy if isinstance(policy, Policy) else load_policy(policy)
    return CacheOracle(2, policy, DIM, DEFAULT, primary, rows, **geometry)


def keys_in(cache: CacheOracle, number: int = 0) -> list[int]:
    return [entry.key for entry in cache.dump(number, number + 1)]


def ways_of(cache: CacheOracle, *keys: int) -> list[tuple[int, int, int] | None]:
    return [cache.find(key) for key in keys]


def scores_of(cache: CacheOracle, *keys: int) -> list[int]:
    score = {entry.key: entry.score for entry in cache.dump(0, 2)}
    return [score[key] for key in keys]


# -- where a new key goes --------------------------------------------------------------------


def test_new_key_takes_the_primary_line_first() -> None:
    cache = oracle()
    for now, key in enumerate([0, 2, 4, 8, 12, 16, 20], start=1):
        cache.lookup([key], now)
    assert ways_of(cache, 0, 4, 8, 12, 16) == [(0, 0, way) for way in range(5)]
    assert ways_of(cache, 2, 20) == [(0, 1, 0), (0, 1, 1)]


def test_eleventh_key_evicts_the_least_recently_used() -> None:
    cache = oracle()
    for now, key in enumerate(TEN):
        cache.lookup([key], 10 * now)
    cache.lookup([0], 200)
    cache.lookup([20], 210)
    assert ways_of(cache, 20, 2, 0) == [(0, 1, 0), None, (0, 0, 0)]
    assert scores_of(cache, 0, 4, 20) == [200, 20, 210]
    assert keys_in(cache, 1) == []


def test_first_in_probe_order_is_evicted_among_equal_scores() -> None:
    cache = oracle()
    cache.lookup(TEN, 100)
    cache.lookup([22], 200)  # primary line 1
    assert ways_of(cache, 22, 2) == [(0, 1, 0), None]
    cache.lookup([20], 201)  # primary line 0
    assert ways_of(cache, 20, 0) == [(0, 0, 0), None]
    assert keys_in(cache) == [20, 4, 8, 12, 16, 22, 6, 10, 14, 18]


def test_smallest_score_is_evicted_from_either_line() -> None:
    cache = oracle("fifo")
    for now, key in enumerate([18, *TEN[:-1]]):
        cache.lookup([key], now)
    cache.lookup([20], 50)
    assert ways_of(cache, 20, 18) == [(0, 1, 0), None]


def test_erased_way_is_taken_first() -> None:
    cache = oracle()
    cache.lookup(TEN, 100)
    assert cache.erase([8, 8, 14, 9, -1]) == 2
    assert keys_in(cache) == [0, 4, 12, 16, 2, 6, 10, 18]
    cache.lookup([20, 24], 101)
    assert ways_of(cache, 20, 24) == [(0, 0, 2), (0, 1, 3)]


def test_geometry_is_configurable() -> None:
    cache = oracle(lines=1, ways=4)
    cache.primary = lambda key: (key % 2, 0)
    for now, key in enumerate([0, 2, 4, 6, 8]):
        cache.lookup([key], 10 * now)
    assert keys_in(cache) == [8, 2, 4, 6]


# -- one batch --------------------------------------------------------------------------------


def test_only_as_many_positions_as_ways_count_in_each_set() -> None:
    cache = oracle()
    rows = cache.lookup([*range(0, 24, 2), 1, 3], 5)
    assert sorted(keys_in(cache)) == TEN
    assert keys_in(cache, 1) == [1, 3]
    assert_same_bits(rows, rows_of([*range(0, 24, 2), 1, 3], DIM))


def test_repeated_positions_count_too() -> None:
    cache = oracle()
    cache.lookup([4] * 9 + [6, 8], 5)
    assert keys_in(cache) == [4, 6]


def test_positions_of_absent_and_of_resident_keys_do_not_count() -> None:
    cache = oracle()
    cache.lookup([2], 1)
    rows = cache.lookup([100, 2] * 10 + [4], 2)
    assert keys_in(cache) == [4, 2]
    assert (rows[0:20:2] == DEFAULT).all()


def test_batch_does_not_evict_its_own_rows() -> None:
    """New rows of a counting policy have the smallest scores of all, and would otherwise replace each other."""
    cache = oracle("lfu")
    cache.lookup(TEN[:5] * 5 + TEN[5:] * 5, 1)  # the first ten positions: 0 2 4 6 8, twice
    cache.lookup(TEN[5:] * 5, 2)
    assert scores_of(cache, *TEN) == [5] * 10
    cache.lookup([20, 24, 28], 3)
    assert ways_of(cache, 20, 24, 28) == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]
    cache.lookup([32], 4)  # in a later batch they are replaced
    assert ways_of(cache, 32, 20) == [(0, 0, 0), None]


def test_ten_new_keys_replace_a_full_set() -> None:
    cache = oracle()
    cache.lookup(TEN, 100)
    new_keys = list(range(20, 42, 2))
    cache.lookup(new_keys, 100)
    assert sorted(keys_in(cache)) == new_keys[:10]


def test_hits_are_touched_before_insertions() -> None:
    cache = oracle()
    for now, key in enumerate(TEN):
        cache.lookup([key], 10 * now)
    cache.lookup([20, 0, 2], 200)  # 0 and 2 are the oldest, but are requested in this batch, after 20
    assert ways_of(cache, 20, 4) == [(0, 0, 1), None]
    assert scores_of(cache, 0, 2, 20) == [200, 200, 200]


def test_counting_policy_gets_the_number_of_requests() -> None:
    cache = oracle("lfu")
    cache.lookup([0, 0, 2, 0], 1)
    assert scores_of(cache, 0, 2) == [3, 1]
    cache.lookup([2, 4, 2], 2)
    assert scores_of(cache, 0, 2, 4) == [3, 3, 1]


def test_count_of_a_new_key_is_that_of_the_whole_batch() -> None:
    cache = oracle("lfu")
    cache.lookup([*TEN[1:], 0, *[0] * 5], 1)
    assert scores_of(cache, 0, 2) == [6, 1]


def test_non_counting_policy_gets_a_count_of_one() -> None:
    class Telling:
        @staticmethod
        def first(now: int, count: int) -> int:
            return 1000 * count + now

        @staticmethod
        def touch(score: int, now: int, count: int) -> int:
            return 2000 * count + now

    cache = oracle(as_policy(Telling))
    cache.lookup([0, 0, 0], 7)
    assert scores_of(cache, 0) == [1007]
    cache.lookup([0, 0, 0], 8)
    assert scores_of(cache, 0) == [2008]


def test_scores_are_kept_modulo_2_to_the_32() -> None:
    class Negative:
        @staticmethod
        def first(now: int, count: int) -> int:
            return -now

        @staticmethod
        def touch(score: int, now: int, count: int) -> int:
            return score

    cache = oracle(as_policy(Negative))
    cache.lookup([0], 1)
    cache.lookup([2], 2**32 + 5)
    assert scores_of(cache, 0, 2) == [2**32 - 1, 2**32 - 5]


# -- answers ----------------------------------------------------------------------------------


def test_absent_keys_get_the_default_and_stay_visible_later() -> None:
    cache = oracle()
    assert_same_bits(cache.lookup([100, 1], 1), np.stack([np.full(DIM, DEFAULT, np.float32), rows_of(1, DIM)]))
    assert cache.host is not None
    cache.host[100] = rows_of(100, DIM)
    assert_same_bits(cache.lookup([100], 2), rows_of([100], DIM))


def test_hits_are_answered_from_the_copy() -> None:
    cache = oracle()
    cache.lookup([0], 1)
    assert cache.host is not None
    cache.host[0] = rows_of(0, DIM, 1)
    assert_same_bits(cache.lookup([0], 2), rows_of([0], DIM))
    cache.update([0, 2])
    assert_same_bits(cache.lookup([0], 3), rows_of([0], DIM, 1))
    assert ways_of(cache, 2) == [None]


def test_query_inserts_nothing() -> None:
    cache = oracle(host=None)
    cache.insert([4, 6], rows_of([4, 6], DIM), 1)
    rows, missing = cache.query([2, 4, 2, 1], 20)
    assert missing == [0, 2, 3]
    assert_same_bits(rows[1], rows_of(4, DIM))
    assert (rows[missing] == DEFAULT).all()
    assert scores_of(cache, 4, 6) == [20, 1]
    assert len(cache.dump(0, 2)) == 2
    assert cache.lookup([2], 21).tolist() == [[DEFAULT, DEFAULT]]


def test_insertion_keeps_resident_rows() -> None:
    cache = oracle(host=None)
    cache.insert([4], rows_of([4], DIM), 1)
    cache.insert([4, 6, 6, *range(8, 40, 2)], rows_of([4, 6, 6, *range(8, 40, 2)], DIM, 1) + np.arange(19)[:, None], 30)
    assert sorted(keys_in(cache)) == [4, 6, 8, 10, 12, 14, 16, 18, 20, 22]  # ten positions: 6 twice, then 8 to 22
    row = {entry.key: entry.row for entry in cache.dump(0, 2)}
    assert_same_bits(row[4], rows_of(4, DIM))
    assert_same_bits(row[6], rows_of(6, DIM, 1) + np.float32(1))
    assert scores_of(cache, 4, 6) == [30, 30]


def test_update_overwrites_resident_rows() -> None:
    cache = oracle()
    cache.lookup([0, 2], 1)
    cache.update([0, 4, 0], np.array([[1, 1], [2, 2], [3, 3]], np.float32))
    assert cache.lookup([0, 2], 2).tolist() == [[3, 3], rows_of(2, DIM).tolist()]
    assert keys_in(cache) == [0, 2]
    assert scores_of(cache, 0) == [1]


def test_updates_and_refreshes_drop_keys_erased_from_the_host() -> None:
    cache = oracle()
    cache.lookup([0, 1, 2, 3], 1)
    assert cache.host is not None
    for key in (0, 1, 2):
        del cache.host[key]
    cache.host[3] = rows_of(3, DIM, 1)
    cache.update([0, 50])
    assert [keys_in(cache, 0), keys_in(cache, 1)] == [[2], [1, 3]]
    cache.refresh(0, 1, drop=False)
    assert keys_in(cache) == [2]
    cache.refresh(1, 2)
    assert [keys_in(cache, 0), keys_in(cache, 1)] == [[2], [3]]
    assert_same_bits(cache.dump(1, 2)[0].row, rows_of(3, DIM, 1))


def test_dumps_of_ranges_add_up_and_clearing_empties_all() -> None:
    cache = oracle()
    cache.lookup(range(25), 4)
    both = cache.dump(0, 1) + cache.dump(1, 2)
    assert [entry[2:] for entry in both] == [entry[2:] for entry in cache.dump(0, 2)]
    assert [entry.key for entry in both] == [entry.key for entry in cache.dump(0, 2)]
    assert all(primary(entry.key)[0] == entry.set and np.array_equal(entry.row, rows_of(entry.key, DIM)) for entry in both)
    assert cache.dump(1, 1) == []
    cache.clear()
    assert cache.dump(0, 2) == []


def test_every_key_is_legal() -> None:
    cache = oracle(host=EXTREME_64)
    assert_same_bits(cache.lookup(EXTREME_64, 1), rows_of(EXTREME_64, DIM))
    assert {entry.key for entry in cache.dump(0, 2)} == set(EXTREME_64)
    assert cache.lookup([], 2).shape == (0, DIM)


batches = st.lists(st.lists(st.integers(0, 39), max_size=40), max_size=8)


@given(st.sampled_from(["lru", "lfu", "fifo"]), batches)
def test_answers_are_exact_and_keys_are_unique(policy: str, traffic: list[list[int]]) -> None:
    cache = oracle(policy, host=range(30))
    for now, batch in enumerate(traffic):
        before = {entry.key for entry in cache.dump(0, 2)}
        expected = [rows_of(key, DIM) if key < 30 else np.full(DIM, DEFAULT, np.float32) for key in batch]
        assert_same_bits(cache.lookup(batch, 9 * now), np.array(expected, np.float32).reshape(-1, DIM))
        held = [entry.key for entry in cache.dump(0, 2)]
        assert len(held) == len(set(held))
        missed = [[key for key in batch if key < 30 and key % 2 == number and key not in before] for number in (0, 1)]
        assert set(held) - before == {*missed[0][:10], *missed[1][:10]}
